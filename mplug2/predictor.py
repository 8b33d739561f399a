"""A trained model for scripts: files and texts in, texts and numbers out.

    model = mplug2.load("runs/tiny/last")
    model.caption(["clip.mp4"])                          # ["a red seven moving left"]
    model.answer(["clip.mp4"], ["which digit is it"])    # ["seven"]
    model.similarity(["clip.mp4"], ["a red seven"])      # tensor of cosines, media by texts
    model.classify("visual_entailment", ["a.jpg"], ["a dog runs"])     # ["neutral"], after fine-tuning

Axes: b inputs, v visual tokens, l text tokens, e contrastive width, y classes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from mplug2.attention_maps import attention_maps
from mplug2.checkpoint import PreprocessConfig, load_model, save_model
from mplug2.data.media import is_media, kind_of, read_image, read_video, to_pixels
from mplug2.data.samples import join_text_pair
from mplug2.data.text import Tokenizer, clean
from mplug2.generation import SpecialTokens, beam_search, best_texts, greedy, rank_answers
from mplug2.model.mplug2 import MPLUG2, answer_memory
from mplug2.tasks import PROMPTS

Media = str | Path | tuple[str | Path, str | Path]  # a picture, a clip, or two pictures
Text = str | tuple[str, str]


def load(checkpoint: str | Path, device: str = "cpu", task: str | None = None) -> "Predictor":
    """Open a checkpoint folder, such as runs/tiny/last; `task`: as a smaller model than it was saved."""
    model, tokenizer, preprocess = load_model(checkpoint, task)
    return Predictor(model.to(device), tokenizer, preprocess)


def check_list(inputs: Sequence[str | Path]) -> None:
    """A string is a sequence too, of letters: refuse it where a list of paths or texts is expected."""
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"expected a list of paths or texts, found the single one {str(inputs)!r}")


@dataclass(frozen=True)
class WordAttention:
    """Where a word of the question or of the text that was written looks: `map`, `t h w`, sums to the share of its
    attention that is on patches (the rest is on the class token and on text)."""

    word: str
    module: str
    map: Tensor


class Predictor:
    """A model with its tokenizer and preprocess. Methods raise ValueError if the model's task lacks the modules."""

    def __init__(self, model: MPLUG2, tokenizer: Tokenizer, preprocess: PreprocessConfig, batch_size: int = 64):
        self.model, self.tokenizer, self.preprocess, self.batch_size = model, tokenizer, preprocess, batch_size
        self.special_tokens = SpecialTokens(tokenizer.cls, tokenizer.sep, tokenizer.pad)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Export the model: a checkpoint folder without what only training needs, small in half precision; `load`
        opens it, in single precision, and `train.py --init` starts from it."""
        if Path(folder).exists() and any(Path(folder).iterdir()):
            raise FileExistsError(f"{folder} is not empty: export a model into a new folder")
        save_model(folder, self.model, self.tokenizer, self.preprocess, dtype)

    def caption(
        self, paths: Sequence[str | Path], beams: int = 1, max_length: int = 20, prompted: bool = True
    ) -> list[str]:
        """What each picture or clip shows; `beams` of 1 is greedy.

        `prompted`: continued from the prompt of its kind, "a video of" or "a picture of"; else, as released, from
        [CLS] alone.
        """
        def write(vision: Tensor, kind: str, _) -> list[str]:
            start = self.start(len(vision), PROMPTS[kind] if prompted else "")
            if beams == 1:
                ids = greedy(self.model, vision, start, self.special_tokens, max_length)
            else:
                ids = best_texts(
                    beam_search(self.model, vision, start, self.special_tokens,
                                beams, max_length=max_length), self.special_tokens
                )
            return self.tokenizer.decode(ids)

        return self.on_media(paths, write)

    def answer(
        self, paths: Sequence[str | Path], questions: Sequence[str], max_length: int = 10,
        answer_list: Sequence[str] | None = None, candidates: int = 32,
    ) -> list[str]:
        """The answer to each question about the picture or clip of the same place in the list.

        It is written, or, with a list `answer_list`, chosen: of the answers there, the `candidates` whose first word is
        likeliest are scored whole.
        """
        check_list(paths)
        check_list(questions)
        if len(paths) != len(questions):
            raise ValueError(f"{len(paths)} paths, but {len(questions)} questions: expected one question for each path")
        if answer_list is not None:
            check_list(answer_list)
            cleaned = [clean(text, self.preprocess.max_words) for text in answer_list]
            answers = [x.to(self.device) for x in self.tokenizer.encode(cleaned, self.model.config.max_positions)]

        def write(vision: Tensor, kind: str, indices: list[int]) -> list[str]:
            text, mask = self.encode_text([questions[place] for place in indices])
            vision, fused = self.model.fuse(vision, text, mask)
            memory, memory_mask = answer_memory(vision, fused, mask)
            if answer_list is not None:
                best = rank_answers(self.model, memory, *answers, candidates, memory_mask)[0][:, 0]
                return [answer_list[number] for number in best.tolist()]
            start = self.start(len(vision))
            return self.tokenizer.decode(
                greedy(self.model, memory, start, self.special_tokens, max_length, memory_mask)
            )

        return self.on_media(paths, write)

    def likelihood(
        self, paths: Sequence[str | Path], texts: Sequence[str], questions: Sequence[str] | None = None
    ) -> list[float]:
        """The probability with which the decoder writes each text, [SEP] included, about the picture or clip of the
        same place in the list: as the answer to the question of that place, or, without questions, as a caption."""
        def score(vision: Tensor, kind: str, indices: list[int]) -> list[float]:
            memory, memory_mask, start = vision, None, self.start(len(vision), "" if questions else PROMPTS[kind])
            if questions:
                text, mask = self.encode_text([questions[place] for place in indices])
                seen, fused = self.model.fuse(vision, text, mask)
                memory, memory_mask = answer_memory(seen, fused, mask)
            cleaned = [clean(texts[place], self.preprocess.max_words) for place in indices]
            ids, mask = (x.to(self.device) for x in self.tokenizer.encode([text or "[SEP]" for text in cleaned]))
            mask[[not text for text in cleaned], 2:] = False  # an empty text is [SEP] alone
            ids = torch.cat([start, ids[:, 1:]], dim=1)[:, : self.model.config.max_positions]
            mask = torch.cat([torch.ones_like(start, dtype=mask.dtype), mask[:, 1:]], dim=1)[:, : ids.shape[1]]
            logits = self.model.decode(ids, mask, memory, memory_mask)
            log_probs = logits[:, :-1].float().log_softmax(dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
            written = (log_probs * mask[:, 1:])[:, start.shape[1] - 1:]
            return written.sum(dim=1).exp().tolist()

        return self.on_media(paths, score)

    def classify(
        self, task: str, media: Sequence[Media] | None = None, texts: Sequence[Text] | None = None
    ) -> list[str] | list[float]:
        """The class of each input, by name, or its number (regression): of the media, of the texts, or of both, as
        `task` has it. An item is a path or a pair of paths, a text or a pair of texts."""
        classes = self.model.classes.get(task)
        outputs = self.read(media, texts, lambda hidden, _: self.model.classify(hidden, task))
        if not classes:
            return outputs[:, 0].tolist()
        return [classes[number] for number in outputs.argmax(dim=1).tolist()]

    def predict_boxes(self, paths: Sequence[str | Path], texts: Sequence[str]) -> Tensor:
        """Where each picture shows what the text of the same place says: boxes `b 4` (centre x, y, width, height, as
        shares of the picture)."""
        return self.read(paths, texts, self.model.predict_box)

    @torch.no_grad()
    def read(
        self, media: Sequence[Media] | None, texts: Sequence[Text] | None,
        head: Callable[[Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """What `head` makes of text `b l d`, of V' `b v d`, or, if both are given, of the fused text; its second
        argument is V'. Returns `b ...`."""
        if media is not None and texts is not None and len(media) != len(texts):
            raise ValueError(f"{len(media)} media, but {len(texts)} texts: expected one text for each")

        def on_vision(vision: Tensor, _, indices: list[int]) -> Tensor:
            if texts is None:
                return head(vision, vision)
            text, mask = self.encode_text([texts[place] for place in indices])
            vision, fused = self.model.fuse(vision, text, mask)
            return head(fused, vision)

        if media is not None and not any(isinstance(item, tuple) for item in media):
            return torch.stack(self.on_media(media, on_vision))
        count, rows = len(texts if media is None else media), []
        for first in range(0, count, self.batch_size):
            indices = list(range(first, min(first + self.batch_size, count)))
            if media is None:
                rows.append(head(self.encode_text([texts[place] for place in indices])[0], None))
            else:
                paths = [path for place in indices for path in media[place]]
                vision = rearrange(torch.stack(self.encode_media(paths)), "(b two) v d -> b two v d", two=2)
                rows.append(on_vision(self.model.concat_pair(vision), "image", indices))
        return torch.cat(rows)

    @torch.no_grad()
    def explain(self, path: str | Path, question: str = "") -> tuple[str, list[WordAttention]]:
        """The answer to a question, or a caption, and where its words look: the question's in the last cross-attention
        of fusion, those that were written in that of the decoder; the mean over the heads. A model without a decoder
        writes nothing: the words are those of `question`, the text of a label or a box."""
        looks: list[WordAttention] = []
        writes = "decoder" in self.model.components
        written = "" if not writes else self.answer([path], [question])[0] if question else self.caption([path])[0]
        config = self.model.config

        def collect(maps: dict[str, Tensor], part: str, ids: list[int], v: int) -> None:
            module = [name for name in maps if name.startswith(part)][-1]
            side = config.image_size // config.patch_size
            weights = maps[module].mean(dim=1)[0, :, 1:v].cpu()
            for number, row in zip(ids, rearrange(weights, "l (t h w) -> l t h w", h=side, w=side)):
                if (word := self.tokenizer.decode([[number]])[0]):
                    looks.append(WordAttention(word, module, row))

        def record(vision: Tensor, kind: str, _) -> list[None]:
            memory, memory_mask, start = vision, None, self.start(1, "" if question else PROMPTS[kind])
            if question:
                ids, mask = self.tokenizer.encode([clean(question, self.preprocess.max_words)])
                ids, mask = ids.to(self.device), mask.to(self.device)
                with attention_maps(self.model) as maps:
                    seen, fused = self.model.fuse(vision, self.model.encode_text(ids, mask), mask)
                collect(maps, "fusion", ids[0].tolist(), vision.shape[1])
                memory, memory_mask = answer_memory(seen, fused, mask)
            if not writes:
                return [None]
            # What a token is written from stands one place before it.
            words = self.tokenizer.encode([written], special=False)[0].to(self.device) if written else start[:, :0]
            ids = torch.cat([start, words], dim=1)[:, : config.max_positions]
            with attention_maps(self.model) as maps:
                self.model.decode(ids, torch.ones_like(ids, dtype=torch.bool), memory, memory_mask)
            maps = {name: weights[:, :, start.shape[1] - 1:] for name, weights in maps.items()}
            collect(maps, "decoder", words[0].tolist(), vision.shape[1])
            return [None]

        self.on_media([path], record)
        return written, looks

    def embed(self, inputs: Sequence[str | Path]) -> Tensor:
        """Unit vectors `b e` of media and texts, which may be mixed: a path, or a string that ends like a media file
        (.gif, .mp4, .png, ...), is opened; any other string is a text."""
        check_list(inputs)
        media = [i for i, item in enumerate(inputs) if isinstance(item, Path) or is_media(item)]
        texts = [i for i in range(len(inputs)) if i not in set(media)]
        vectors: dict[int, Tensor] = {}
        if media:
            found = self.on_media([inputs[i] for i in media], lambda vision, *_: self.model.project_vision(vision))
            vectors |= zip(media, found)
        for first in range(0, len(texts), self.batch_size):
            indices = texts[first: first + self.batch_size]
            with torch.no_grad():
                text, _ = self.encode_text([str(inputs[i]) for i in indices])
                vectors |= zip(indices, self.model.project_text(text))
        return torch.stack([vectors[i] for i in range(len(inputs))])

    def similarity(self, media: Sequence[str | Path], texts: Sequence[str]) -> Tensor:
        """Cosines, media by texts."""
        check_list(media)
        check_list(texts)
        return self.embed([Path(path) for path in media]) @ self.embed(list(texts)).T

    @torch.no_grad()
    def match_probability(self, vision: Tensor, texts: Sequence[str]) -> Tensor:
        """How likely each V' (`b v d`) and the text of the same place belong together, by the matching head: `b`.

        One V' (`1 v d`) may serve all texts.
        """
        text, mask = self.encode_text(list(texts))
        _, fused = self.model.fuse(vision, text, mask)
        return self.model.itm_logits(fused).softmax(dim=-1)[:, 1]

    def encode_media(self, paths: Sequence[str | Path]) -> list[Tensor]:
        """V' of each picture or clip, `v d`."""
        return self.on_media(paths, lambda vision, *_: list(vision))

    def encode_text(self, texts: list[Text]) -> tuple[Tensor, Tensor]:
        """Texts, or pairs of texts, -> `b l d` and their mask `b l`."""
        cleaned = [
            join_text_pair((text,) if isinstance(text, str) else text, self.preprocess.max_words) for text in texts
        ]
        ids, mask = (x.to(self.device) for x in self.tokenizer.encode(cleaned, self.model.config.max_positions))
        return self.model.encode_text(ids, mask), mask

    def start(self, b: int, prompt: str = "") -> Tensor:
        """[CLS] and the prompt, `b` times."""
        ids = torch.full((1, 1), self.tokenizer.cls)
        if prompt:
            ids = torch.cat([ids, self.tokenizer.encode([prompt], special=False)[0]], dim=1)
        return ids.expand(b, -1).to(self.device)

    @torch.no_grad()
    def on_media(self, paths: Sequence[str | Path], function: Callable[[Tensor, str, list[int]], Iterable]) -> list:
        """Decode and encode the media in batches, pictures and clips apart; `function(V', kind, indices)` is called on
        each batch, and its results come back in the order of `paths`."""
        check_list(paths)
        # What waits for its batch, by kind: the pixels of each file, and the indices that ask for it (a clip with
        # several questions is decoded and encoded once).
        waiting: dict[str, dict[str, tuple[Tensor, list[int]]]] = {"image": {}, "video": {}}
        results: dict[int, object] = {}

        def flush(kind: str) -> None:
            pixels, indices = zip(*waiting[kind].values())
            waiting[kind].clear()
            vision = self.model.encode_vision(torch.stack(pixels).to(self.device))
            each = torch.tensor([i for i, askers in enumerate(indices) for _ in askers], device=self.device)
            asked = [place for askers in indices for place in askers]
            results.update(zip(asked, function(vision[each], kind, asked), strict=True))

        for place, path in enumerate(map(str, paths)):
            known = [kind for kind in waiting if path in waiting[kind]]
            if known:
                kind = known[0]
            else:
                kind = kind_of(path)
                frames = read_image(path) if kind == "image" else read_video(path, self.preprocess.frames)
                waiting[kind][path] = to_pixels(frames, self.model.config.image_size), []
            waiting[kind][path][1].append(place)
            if sum(len(askers) for _, askers in waiting[kind].values()) == self.batch_size:
                flush(kind)
        for kind in waiting:
            if waiting[kind]:
                flush(kind)
        return [results[place] for place in range(len(paths))]
