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
from mplug2.tasks import INSTRUCTIONS, PROMPTS

Media = str | Path | tuple[str | Path, str | Path]  # an image, a video, or two images
Text = str | tuple[str, str]
CANDIDATES = 32
"""Answers of a list that are scored whole."""


def load(checkpoint: str | Path, device: str = "cpu", task: str | None = None) -> "Predictor":
    """Open a checkpoint folder, such as runs/tiny/last. `task` selects a smaller model than the saved one."""
    model, tokenizer, preprocess = load_model(checkpoint, task)
    return Predictor(model.to(device), tokenizer, preprocess)


def require_list(inputs: Sequence[str | Path]) -> None:
    """Raise TypeError for a single path or text: a string is a sequence of letters, and would be taken for a list."""
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"found the single {str(inputs)!r}: expected a list of paths or texts")


@dataclass(frozen=True)
class WordAttention:
    """The attention of one word of a question, or of the written text, over the frames."""

    word: str
    module: str
    """The cross-attention that the weights come from."""
    map: Tensor
    """`t h w`. It sums to the fraction of the attention that is on patches; the rest is on the class token and text."""


class Predictor:
    """A model with its tokenizer and preprocessing.

    Methods raise ValueError if the model does not have the modules, and MediaError for a file that cannot be read.
    """

    def __init__(self, model: MPLUG2, tokenizer: Tokenizer, preprocess: PreprocessConfig, batch_size: int = 64):
        self.model, self.tokenizer, self.preprocess, self.batch_size = model, tokenizer, preprocess, batch_size
        self.special_tokens = SpecialTokens(tokenizer.cls, tokenizer.sep, tokenizer.pad)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Export the model to a new folder, without what only training needs, and by default in half precision.

        `load` opens it in single precision, and `train.py --init` starts from it.
        """
        if Path(folder).exists() and any(Path(folder).iterdir()):
            raise FileExistsError(f"{folder} is not empty: choose a new folder for the exported model")
        save_model(folder, self.model, self.tokenizer, self.preprocess, dtype)

    def caption(
        self, paths: Sequence[str | Path], beams: int = 1, max_length: int = 20, prompted: bool = True,
        instructed: bool = False,
    ) -> list[str]:
        """A caption of each image or video, of at most `max_length` tokens. One beam is greedy search.

        A caption continues the prompt of its modality, "a video of" or "a picture of". Without `prompted` it starts
        from [CLS] alone, as in the released evaluation. With `instructed` it is the answer to the instruction of its
        modality, such as "what does the video describe", through text encoder and fusion, as in Figure 1.
        """
        def write(vision: Tensor, modality: str, _) -> list[str]:
            memory, memory_mask, prompt = vision, None, PROMPTS[modality] if prompted else ""
            if instructed:
                ids, mask = self.tokenizer.encode([INSTRUCTIONS[modality]] * len(vision))
                memory, memory_mask = self.model.instruction_memory(vision, ids.to(self.device), mask.to(self.device))
                prompt = ""
            start, special = self.start(len(vision), prompt), self.special_tokens
            if beams == 1:
                ids = greedy(self.model, memory, start, special, max_length, memory_mask)
            else:
                ids = best_texts(beam_search(self.model, memory, start, special, beams, max_length=max_length,
                                             memory_mask=memory_mask), special)
            return self.tokenizer.decode(ids)

        return self.on_media(paths, write)

    def answer(
        self, paths: Sequence[str | Path], questions: Sequence[str], max_length: int = 10,
        answer_list: Sequence[str] | None = None,
    ) -> list[str]:
        """The answer to each question about the image or video at the same index.

        The decoder writes it, or, with an `answer_list`, ranks the list: the CANDIDATES answers whose first token is
        most likely are scored whole.
        """
        require_list(paths)
        require_list(questions)
        if len(paths) != len(questions):
            raise ValueError(f"{len(paths)} paths, but {len(questions)} questions: expected one question per path")
        if answer_list is not None:
            require_list(answer_list)
            cleaned = [clean(text, self.preprocess.max_words) for text in answer_list]
            answers = [x.to(self.device) for x in self.tokenizer.encode(cleaned, self.model.config.max_positions)]

        def write(vision: Tensor, _, indices: list[int]) -> list[str]:
            text, mask = self.encode_text([questions[i] for i in indices])
            vision, fused = self.model.fuse(vision, text, mask)
            memory, memory_mask = answer_memory(vision, fused, mask)
            if answer_list is not None:
                best = rank_answers(self.model, memory, *answers, CANDIDATES, memory_mask)[0][:, 0]
                return [answer_list[number] for number in best.tolist()]
            start = self.start(len(vision))
            return self.tokenizer.decode(
                greedy(self.model, memory, start, self.special_tokens, max_length, memory_mask)
            )

        return self.on_media(paths, write)

    def likelihood(
        self, paths: Sequence[str | Path], texts: Sequence[str], questions: Sequence[str] | None = None
    ) -> list[float]:
        """The probability that the decoder writes each text, [SEP] included, about the image or video at the same
        index: as the answer to the question at that index, or, without questions, as a caption."""
        def score(vision: Tensor, modality: str, indices: list[int]) -> list[float]:
            memory, memory_mask, start = vision, None, self.start(len(vision), "" if questions else PROMPTS[modality])
            if questions:
                text, mask = self.encode_text([questions[i] for i in indices])
                vision, fused = self.model.fuse(vision, text, mask)
                memory, memory_mask = answer_memory(vision, fused, mask)
            cleaned = [clean(texts[i], self.preprocess.max_words) for i in indices]
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
        """The name of the class of each input, or its number (regression). `task` decides whether an input is a medium
        (a path, or a pair of paths), a text (or a pair of texts), or both."""
        classes = self.model.classes.get(task)
        outputs = self.read(media, texts, lambda hidden, _: self.model.classify(hidden, task))
        if not classes:
            return outputs[:, 0].tolist()
        return [classes[number] for number in outputs.argmax(dim=1).tolist()]

    def predict_boxes(self, paths: Sequence[str | Path], texts: Sequence[str]) -> Tensor:
        """The box in each image that the text at the same index describes: `b 4` (center x, center y, width, height,
        as fractions of the image)."""
        return self.read(paths, texts, self.model.predict_box)

    @torch.no_grad()
    def read(
        self, media: Sequence[Media] | None, texts: Sequence[Text] | None,
        head: Callable[[Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """`head(hidden, V')` of each input, `b ...`. hidden is the text `b l d`, V' `b v d`, or, with both, the fused
        text. V' is None without media."""
        if media is not None and texts is not None and len(media) != len(texts):
            raise ValueError(f"{len(media)} media, but {len(texts)} texts: expected one text per medium")

        def on_vision(vision: Tensor, _, indices: list[int]) -> Tensor:
            if texts is None:
                return head(vision, vision)
            text, mask = self.encode_text([texts[i] for i in indices])
            vision, fused = self.model.fuse(vision, text, mask)
            return head(fused, vision)

        if media is not None and not any(isinstance(item, tuple) for item in media):
            return torch.stack(self.on_media(media, on_vision))
        count, rows = len(texts if media is None else media), []
        for first in range(0, count, self.batch_size):
            indices = list(range(first, min(first + self.batch_size, count)))
            if media is None:
                rows.append(head(self.encode_text([texts[i] for i in indices])[0], None))
            else:
                paths = [path for i in indices for path in media[i]]
                vision = rearrange(torch.stack(self.encode_media(paths)), "(b two) v d -> b two v d", two=2)
                rows.append(on_vision(self.model.concat_pair(vision), "image", indices))
        return torch.cat(rows)

    @torch.no_grad()
    def explain(self, path: str | Path, question: str = "") -> tuple[str, list[WordAttention]]:
        """The answer to a question, or a caption, and the attention of every word, averaged over the heads.

        Words of the question come from the last cross-attention of fusion, written words from that of the decoder. A
        model without a decoder writes nothing; `question` is then the text that a label or a box is about.
        """
        words: list[WordAttention] = []
        writes = "decoder" in self.model.components
        written = "" if not writes else self.answer([path], [question])[0] if question else self.caption([path])[0]
        config = self.model.config

        def collect(maps: dict[str, Tensor], component: str, ids: list[int], v: int) -> None:
            module = [name for name in maps if name.startswith(component)][-1]
            side = config.image_size // config.patch_size
            weights = maps[module].mean(dim=1)[0, :, 1:v].cpu()
            for number, row in zip(ids, rearrange(weights, "l (t h w) -> l t h w", h=side, w=side)):
                if (word := self.tokenizer.decode([[number]])[0]):
                    words.append(WordAttention(word, module, row))

        def record(vision: Tensor, modality: str, _) -> list[None]:
            memory, memory_mask, start = vision, None, self.start(1, "" if question else PROMPTS[modality])
            if question:
                ids, mask = self.tokenizer.encode([clean(question, self.preprocess.max_words)])
                ids, mask = ids.to(self.device), mask.to(self.device)
                with attention_maps(self.model) as maps:
                    seen, fused = self.model.fuse(vision, self.model.encode_text(ids, mask), mask)
                collect(maps, "fusion", ids[0].tolist(), vision.shape[1])
                memory, memory_mask = answer_memory(seen, fused, mask)
            if not writes:
                return [None]
            # A token is predicted at the position before it.
            new = self.tokenizer.encode([written], special=False)[0].to(self.device) if written else start[:, :0]
            ids = torch.cat([start, new], dim=1)[:, : config.max_positions]
            with attention_maps(self.model) as maps:
                self.model.decode(ids, torch.ones_like(ids, dtype=torch.bool), memory, memory_mask)
            maps = {name: weights[:, :, start.shape[1] - 1:] for name, weights in maps.items()}
            collect(maps, "decoder", new[0].tolist(), vision.shape[1])
            return [None]

        self.on_media([path], record)
        return written, words

    def embed(self, inputs: Sequence[str | Path]) -> Tensor:
        """Unit vectors `b e` of media and texts, which may be mixed. A `Path`, or a string that ends like a media file
        (.gif, .mp4, .png, ...), is opened; any other string is a text."""
        require_list(inputs)
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
        """Cosines between media and texts, (medium, text)."""
        require_list(media)
        require_list(texts)
        return self.embed([Path(path) for path in media]) @ self.embed(list(texts)).T

    @torch.no_grad()
    def match_probability(self, vision: Tensor, texts: Sequence[str]) -> Tensor:
        """The matching head's probability that each V' (`b v d`) and the text at the same index belong together: `b`.

        A single V' (`1 v d`) is compared with all texts.
        """
        text, mask = self.encode_text(list(texts))
        _, fused = self.model.fuse(vision, text, mask)
        return self.model.itm_logits(fused).softmax(dim=-1)[:, 1]

    def encode_media(self, paths: Sequence[str | Path]) -> list[Tensor]:
        """V' of each image or video, `v d`."""
        return self.on_media(paths, lambda vision, *_: list(vision))

    def encode_text(self, texts: list[Text]) -> tuple[Tensor, Tensor]:
        """Texts, or pairs of texts, to `b l d` and their mask `b l`."""
        cleaned = [
            join_text_pair((text,) if isinstance(text, str) else text, self.preprocess.max_words) for text in texts
        ]
        ids, mask = (x.to(self.device) for x in self.tokenizer.encode(cleaned, self.model.config.max_positions))
        return self.model.encode_text(ids, mask), mask

    def start(self, b: int, prompt: str = "") -> Tensor:
        """Token ids of [CLS] and the prompt, repeated: `b l`."""
        ids = torch.full((1, 1), self.tokenizer.cls)
        if prompt:
            ids = torch.cat([ids, self.tokenizer.encode([prompt], special=False)[0]], dim=1)
        return ids.expand(b, -1).to(self.device)

    @torch.no_grad()
    def on_media(self, paths: Sequence[str | Path], function: Callable[[Tensor, str, list[int]], Iterable]) -> list:
        """Decode and encode media in batches of one modality, and call `function(V', modality, indices)` on each batch.

        indices are those of the inputs in `paths`. The results of `function` come back in the order of `paths`.
        """
        require_list(paths)
        # Files that wait for their batch, by modality: the pixels, and the indices of the inputs that ask for them. A
        # video with several questions is decoded and encoded once.
        waiting: dict[str, dict[str, tuple[Tensor, list[int]]]] = {"image": {}, "video": {}}
        results: dict[int, object] = {}

        def flush(modality: str) -> None:
            pixels, indices = zip(*waiting[modality].values())
            waiting[modality].clear()
            vision = self.model.encode_vision(torch.stack(pixels).to(self.device))
            rows = torch.tensor([row for row, of_file in enumerate(indices) for _ in of_file], device=self.device)
            asked = [i for of_file in indices for i in of_file]
            results.update(zip(asked, function(vision[rows], modality, asked), strict=True))

        for i, path in enumerate(map(str, paths)):
            known = [modality for modality in waiting if path in waiting[modality]]
            if known:
                modality = known[0]
            else:
                modality = kind_of(path)
                size = self.model.config.image_size
                frames = read_image(path, 2 * size) if modality == "image" else read_video(path, self.preprocess.frames)
                waiting[modality][path] = to_pixels(frames, size), []
            waiting[modality][path][1].append(i)
            if sum(len(of_file) for _, of_file in waiting[modality].values()) == self.batch_size:
                flush(modality)
        for modality in waiting:
            if waiting[modality]:
                flush(modality)
        return [results[i] for i in range(len(paths))]
