"""Inference in batches: media and texts are grouped, decoded ahead of the device, and divided among the ranks.

`BatchRunner.on_media` and `on_texts` are the two loops behind everything that `Predictor` and the evaluation compute.

Axes: b media, r inputs (questions, texts) about each, n files of a medium, v visual tokens, l text tokens, d width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from mplug2.checkpoint import PreprocessConfig
from mplug2.data.media import MediaError, normalize
from mplug2.data.media_batches import MediaReader, Medium, even_parts, media_batches, read_ahead
from mplug2.data.samples import join_text_pair
from mplug2.data.text import Tokenizer
from mplug2.distributed import AllRanksError, all_gather_object
from mplug2.generation import SpecialTokens
from mplug2.model.mplug2 import MPLUG2

Media = Medium | str | Path | tuple[str | Path, str | Path]
"""An image or a video; a tuple is a pair of images. The suffix and content of a path decide its modality."""
Text = str | tuple[str, str]
MEMORY = 4 * 2**30
"""Bytes of keys and values of V' in the decoder, at most. A batch has fewer inputs where V' is long: 10 videos of 16
frames with the large preset. The number of processes has no influence."""


@dataclass(frozen=True)
class Inference:
    """How a predictor works through its inputs."""

    batch_size: int = 64
    """Inputs (questions, texts, files) of a batch; fewer if the keys and values of V' would exceed MEMORY."""
    workers: int = 0
    """Processes that decode media; 0: a thread."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward passes run under autocast."""
    rank: int = 0
    world_size: int = 1
    """With several ranks, each of them calls the same methods with the same inputs, and computes its share of the
    batches. All of them return all results."""
    skip_unreadable: bool = False
    """The results of files that cannot be read are None, and their errors are in `Predictor.unreadable`."""
    progress: bool = False
    """Show a progress bar for what takes longer than a few seconds."""
    on_batch: Callable[[], bool] | None = None
    """Called after every batch. If it returns true, the work stops on all ranks and `Stopped` is raised."""


class Stopped(Exception):
    """`Inference.on_batch` asked to stop. `found` are the results so far, by the index of their input."""

    def __init__(self, found: dict):
        self.found = found


def require_list(inputs: Sequence) -> None:
    """Raise TypeError for a single path or text: a string is a sequence of letters, and would be taken for a list."""
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"found the single {str(inputs)!r}: expected a list of paths or texts")


class BatchRunner:
    """A model, its tokenizer and preprocessing, and the loops over batches of inputs."""

    def __init__(
        self, model: MPLUG2, tokenizer: Tokenizer, preprocess: PreprocessConfig, inference: Inference | None = None
    ):
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self.inference = inference or Inference()
        self.special_tokens = SpecialTokens(tokenizer.cls, tokenizer.sep, tokenizer.pad)
        self.unreadable: dict[Medium, str] = {}
        self.description = ""
        """What the progress bar is about."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def is_main(self) -> bool:
        """Whether this rank scores and writes files."""
        return self.inference.rank == 0

    def encode_text(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Texts, or pairs of texts, to `b l d` and their mask `b l`."""
        cleaned = [
            join_text_pair((text,) if isinstance(text, str) else text, self.preprocess.max_words) for text in texts
        ]
        ids, mask = (x.to(self.device) for x in self.tokenizer.encode(cleaned, self.model.config.max_positions))
        return self.model.encode_text(ids, mask), mask

    def vision_tokens(self, pixels: Tensor) -> Tensor:
        """Pixels `b n 3 t H W`, uint8, to V' `b v d`, or `b (2 v) d` of pairs of images."""
        n = pixels.shape[1]
        vision = self.model.encode_vision(normalize(pixels.flatten(0, 1).to(self.device)))
        return vision if n == 1 else self.model.concat_pair(rearrange(vision, "(b n) v d -> b n v d", n=n))

    def start(self, b: int, prompt: str = "") -> Tensor:
        """Token ids of [CLS] and the prompt, repeated: `b l`."""
        ids = torch.full((1, 1), self.tokenizer.cls)
        if prompt:
            ids = torch.cat([ids, self.tokenizer.encode([prompt], special=False)[0]], dim=1)
        return ids.expand(b, -1).to(self.device)

    def on_texts(self, texts: Sequence[Text], function: Callable[[Tensor, Tensor], Iterable]) -> list:
        """Encode texts in batches, and call `function(text, mask)` on each batch, `b l d` and `b l`.

        Returns the results of `function` in the order of `texts`.
        """
        require_list(texts)
        batches = even_parts(len(texts), self.inference.batch_size)

        def results() -> Iterator[tuple[range, Iterable]]:
            for indices in self._own(batches):
                yield indices, function(*self.encode_text([texts[i] for i in indices]))

        found = self.collect(results(), len(self._own(batches)))
        return [found[i] for i in range(len(texts))]

    def on_media(self, media: Sequence[Media], function: Callable[[Tensor, str, list[int]], Iterable]) -> list:
        """Decode and encode media in batches of one modality, and call `function(V', modality, indices)` on each batch.

        V' is `b v d`. indices are those of the (b r) inputs about these media, r in a row for each: a file is decoded
        and encoded once. Returns the results of `function` in the order of `media`, and None for a file that cannot be
        read.
        """
        require_list(media)
        known = self._known(media)
        limit = self.most_inputs(known.values())
        batches = media_batches(known, limit)
        reader = MediaReader(self._own(batches), self.preprocess.frames, self.model.config.image_size)

        def results() -> Iterator[tuple[list[int], Iterable]]:
            for batch, pixels, errors in read_ahead(reader, self.inference.workers):
                self.unreadable |= errors
                if errors and not self.inference.skip_unreadable:
                    raise MediaError(next(iter(errors.values())))
                if batch:
                    vision = self.vision_tokens(pixels)
                    indices = [i for of_medium in batch.indices for i in of_medium]
                    for first in range(0, len(indices), limit):  # one medium may have more inputs than fit
                        part = indices[first: first + limit]
                        yield part, function(vision, batch.modality, part)
                else:
                    yield [], []

        found = self.collect(results(), len(reader))
        return [found.get(i) for i in range(len(media))]

    def most_inputs(self, media: Iterable[Medium]) -> int:
        """The batch size for these media: the keys and values of the longest V' fit into MEMORY that often."""
        config, frames = self.model.config, {"image": 1, "video": self.preprocess.frames}
        longest = max((len(one.paths) * (1 + frames[one.modality] * config.patches) for one in media), default=1)
        each = longest * config.decoder_layers * 2 * config.width * 4  # keys and values, 4 bytes a number
        return min(self.inference.batch_size, max(1, MEMORY // each))

    def _known(self, media: Sequence[Media]) -> dict[int, Medium]:
        """The media by their index, without files whose modality is unknown."""
        known: dict[int, Medium] = {}
        for i, item in enumerate(media):
            try:
                known[i] = Medium.of(item)
            except MediaError as error:
                if not self.inference.skip_unreadable:
                    raise
                self.unreadable[Medium((Path(item),), "unknown")] = str(error)
        return known

    def _own(self, batches: list) -> list:
        """The batches that this rank computes."""
        return batches[self.inference.rank:: self.inference.world_size]

    @torch.no_grad()
    def collect(self, results: Iterator[tuple[Sequence, Iterable]], batches: int) -> dict:
        """Run through `results`, batches of keys and values, and return those of all ranks in one dictionary."""
        found: dict = {}
        problem, stopped = "", False
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.inference.precision == "bfloat16")
        bar = tqdm(total=batches, desc=self.description, unit="batch", delay=3, leave=False,
                   disable=not self.inference.progress or self.inference.rank > 0)
        try:
            with autocast, bar:
                for keys, values in results:
                    found.update(zip(keys, values, strict=True))
                    bar.update()
                    if stopped := bool(self.inference.on_batch and self.inference.on_batch()):
                        break
        except ValueError as error:
            if self.inference.world_size == 1:
                raise
            problem = str(error)  # the other ranks wait for this one: they have to learn of it
        if self.inference.world_size > 1:
            found = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in found.items()}
            shares = all_gather_object((found, self.unreadable, problem, stopped))
            if problems := [problem for _, _, problem, _ in shares if problem]:
                raise AllRanksError(problems[0])
            found = {key: value for of_rank, _, _, _ in shares for key, value in of_rank.items()}
            self.unreadable = {medium: error for _, errors, _, _ in shares for medium, error in errors.items()}
            stopped = any(stopped for _, _, _, stopped in shares)
        if stopped:
            raise Stopped(found)
        return found


def repeat_to(x: Tensor, count: int) -> Tensor:
    """`b ...` -> `(b r) ...` with b * r = `count`: each row r times in a row."""
    return repeat(x, "b ... -> (b r) ...", r=count // len(x))
