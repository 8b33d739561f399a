"""The shape contract at the door of every forward.

einops catches a wrong size inside one call; `check` catches it between calls, with a message that
says what was expected. The letters are the same in every file:

    b batch      t frames         h w patch rows and columns   n = h*w patches a frame
    v = 1 + t*n visual tokens     l text tokens                q latent queries
    d width      c heads, d = c*e e width of a head            k kernel taps   s vocabulary
"""

from torch import Tensor


def check(x: Tensor, pattern: str, **sizes: int) -> dict[str, int]:
    """Check the shape of `x` against `pattern`, and return the sizes of all named axes.

    A pattern is a blank-separated list of axis names, integers and `_` (any size): `"b 3 t H W"`. A name bound
    before, by a keyword or earlier in the pattern, must have that size again; a new name is bound. The result can be
    handed to the next check: `sizes = check(x, "b l d", d=96); ...; check(y, "b l d", **sizes)`.

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
