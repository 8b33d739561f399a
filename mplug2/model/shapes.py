"""`check`: every forward checks the shapes that it receives and returns.

einops catches a wrong size inside one call; `check` catches it between calls, and its message says what was expected.
Every file uses the same letters for the axes:

    b  batch                                  t    frames of tokens (T: frames of pixels)
    l  text tokens                            h w  rows and columns of patches (H W: of pixels)
    q  learned latent queries                 n    patches per frame, h*w
    m  tokens of a memory, which              f    tokens per frame, 1 + n: class token, then patches
       cross-attention reads                  v    visual tokens of all frames, 1 + t*n
    r  texts per image or video               d    width of the tokens
    s  vocabulary                             c    attention heads, d = c*e
    y  classes                                e    width of a head, or of the contrastive space
    k  kernel size of a convolution in time   z    channels of that convolution

In the patterns of `check`, `br` stands for the flattened axis (b r). `past` are the tokens that a cache holds.
"""

from torch import Tensor


def check(x: Tensor, pattern: str, **sizes: int) -> dict[str, int]:
    """Check the shape of `x` against `pattern`, and return the sizes of all named axes.

    A pattern lists the axes, separated by blanks: names, integers, or `_` for any size, as in `"b 3 t H W"`. A name
    that is already bound, by a keyword or earlier in the pattern, must have that size again; a new name is bound. Pass
    the result to the next check: `sizes = check(x, "b l d", d=96); ...; check(y, "b l d", **sizes)`.

    Raises ValueError with the expected and the found shape.
    """
    names, shape, bound = pattern.split(), tuple(x.shape), dict(sizes)
    agrees = len(names) == len(shape)
    if agrees:
        for name, size in zip(names, shape):
            if name != "_":
                agrees = agrees and size == (int(name) if name.isdigit() else bound.setdefault(name, size))
    if not agrees:
        known = ", ".join(f"{name}={sizes[name]}" for name in names if name in sizes)
        raise ValueError(f"expected shape ({pattern}){f' with {known}' if known else ''}, found {shape}")
    return bound
