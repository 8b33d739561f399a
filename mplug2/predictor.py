"""A trained model for scripts: files and texts in, texts and numbers out.

    model = mplug2.load("runs/tiny/last")
    model.caption(["video.mp4"])                          # ["a red seven moving left"]
    model.answer(["video.mp4"], ["which digit is it"])    # ["seven"]
    model.similarity(["video.mp4"], ["a red seven"])      # tensor of cosines, media by texts
    model.classify("visual_entailment", ["a.jpg"], ["a dog runs"])     # ["neutral"], after fine-tuning

Axes: b media, r inputs (questions, texts) about each, v visual tokens, l text tokens, e contrastive width, y classes,
c heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from mplug2.attention_maps import attention_maps
from mplug2.checkpoint import load_model, read_data, real_folder, save_model
from mplug2.data.text import clean
from mplug2.generation import beam_search, best_texts, greedy, rank_answers
from mplug2.hub import model_card, recorded
from mplug2.inference import BatchRunner, Media, Text, repeat_to, require_list
from mplug2.model.attention import Memory
from mplug2.model.mplug2 import answer_memory
from mplug2.tasks import INSTRUCTIONS, PROMPTS

CANDIDATES = 32
"""Answers of a list that are scored whole."""


def load(checkpoint: str | Path, device: str = "cpu", task: str | None = None) -> "Predictor":
    """Open a checkpoint folder, such as runs/tiny/last, or a model of the Hugging Face Hub, such as hf://user/name.
    `task` selects a smaller model than the saved one."""
    folder = real_folder(checkpoint)
    model, tokenizer, preprocess = load_model(folder, task)
    predictor = Predictor(model.to(device), tokenizer, preprocess)
    predictor.checkpoint = folder
    return predictor


@dataclass(frozen=True)
class Generation:
    """How the decoder writes a text."""

    beams: int = 1
    """Beams of the search; 1 is greedy."""
    min_length: int = 0
    """Smallest number of tokens. Beam search writes at least one."""
    max_length: int = 0
    """Largest number of tokens; 0: that of the checkpoint, which covers the longest training text."""
    prompted: bool = True
    """Captions continue the prompt of their modality, "a video of"; otherwise they start from [CLS] alone."""
    instructed: bool = False
    """Captions answer the instruction of their modality, "what does the video describe", as in Figure 1."""


@dataclass(frozen=True, eq=False)
class Word:
    """A word of a question or of the written text, with all that `Predictor.trace` finds about it."""

    text: str
    probability: float | None
    """Of a written word, given the words before it."""
    others: tuple[tuple[str, float], ...]
    """The most likely words at the position of a written word, with their probabilities."""
    maps: dict[str, Tensor]
    """Attention over the patches, `c t h w`, by the name of the cross-attention."""


@dataclass(frozen=True)
class WordAttention:
    """The attention of one word of a question, or of the written text, over the frames."""

    word: str
    module: str
    """The cross-attention that the weights come from."""
    map: Tensor
    """`t h w`. It sums to the fraction of the attention that is on patches; the rest is on the class token and text."""


class Predictor(BatchRunner):
    """A model with its tokenizer and preprocessing.

    Methods raise ValueError if the model does not have the modules, and MediaError for a file that cannot be read.
    """

    checkpoint: Path | None = None
    """The folder that the model was loaded from."""

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16, license: str = "") -> None:
        """Export the model to a new folder, without what only training needs, and by default in half precision.

        `load` opens it in single precision, and `train.py --init` starts from it. README.md is a model card for the
        Hugging Face Hub: sizes, training data, settings, `license`, and the results of `eval.py`, if it was run.
        """
        folder, known = Path(folder), self.checkpoint is not None
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: choose a new folder for the exported model")
        save_model(folder, self.model, self.tokenizer, self.preprocess, dtype)
        results, settings = recorded(self.checkpoint) if known else ({}, {})
        data = read_data(self.checkpoint) if known else None
        card = model_card(folder.resolve().name, self.model, data, results, settings, license)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def caption(self, media: Sequence[Media], **settings) -> list[str]:
        """A caption of each image or video. `settings` are fields of `Generation`, such as beams=5."""
        how = Generation(**settings)

        def write(vision: Tensor, modality: str, indices: list[int]) -> list[str]:
            memory, memory_mask = vision, None
            if how.instructed:
                memory, memory_mask = self._instructed(vision, len(indices), modality)
            prompt = self.start(len(indices), PROMPTS[modality] if how.prompted and not how.instructed else "")
            max_length = how.max_length or self.preprocess.max_length or 20
            return self._write(memory, prompt, how, max_length, memory_mask)

        return self.on_media(media, write)

    def answer(
        self, media: Sequence[Media] | None, questions: Sequence[str], answer_list: Sequence[str] | None = None,
        **settings,
    ) -> list[str]:
        """The answer to each question about the image or video at the same index; without media, from its text alone.

        The decoder writes it (`settings` are fields of `Generation`), or, with an `answer_list`, ranks the list: the
        CANDIDATES answers whose first token is most likely are scored whole.
        """
        how = Generation(**settings)
        require_list(questions)
        if media is not None:
            require_list(media)
        if media is not None and len(media) != len(questions):
            raise ValueError(f"{len(media)} media, but {len(questions)} questions: expected one question per medium")
        if answer_list is not None:
            require_list(answer_list)
            cleaned = [clean(text, self.preprocess.max_words) for text in answer_list]
            answers = [x.to(self.device) for x in self.tokenizer.encode(cleaned, self.model.config.max_positions)]

        def write(memory: Memory, memory_mask: Tensor) -> list[str]:
            if answer_list is not None:
                best = rank_answers(self.model, memory, *answers, CANDIDATES, memory_mask)[0][:, 0]
                return [answer_list[number] for number in best.tolist()]
            max_length = how.max_length or self.preprocess.max_length or 10
            return self._write(memory, self.start(memory.shape[0]), how, max_length, memory_mask)

        def about_media(vision: Tensor, _, indices: list[int]) -> list[str]:
            text, mask = self.encode_text([questions[i] for i in indices])
            vision, fused = self.model.fuse(vision, text, mask)
            return write(*answer_memory(vision, fused, mask))

        return self.on_texts(questions, write) if media is None else self.on_media(media, about_media)

    def _instructed(self, vision: Tensor, count: int, modality: str) -> tuple[Memory, Tensor]:
        """The memory of the decoder, and its mask, for `count` captions that answer the instruction."""
        ids, mask = self.tokenizer.encode([INSTRUCTIONS[modality]] * count)
        return self.model.instruction_memory(vision, ids.to(self.device), mask.to(self.device))

    def _write(
        self, memory: Memory, prompt: Tensor, how: Generation, max_length: int, memory_mask: Tensor | None = None
    ) -> list[str]:
        """Texts that continue the prompts `(b r) l`, about the memory `b m d`."""
        if how.min_length > max_length:
            raise ValueError(f"min_length={how.min_length}: a text has at most {max_length} tokens; raise --max-length")
        if how.beams == 1 and not how.min_length:
            ids = greedy(self.model, memory, prompt, self.special_tokens, max_length, memory_mask)
        else:
            memory = memory if memory.shape[0] == len(prompt) else repeat_to(memory, len(prompt))
            hypotheses = beam_search(
                self.model, memory, prompt, self.special_tokens, how.beams,
                how.min_length or 1, max_length, memory_mask=memory_mask,
            )
            ids = best_texts(hypotheses, self.special_tokens)
        return self.tokenizer.decode(ids)

    def likelihood(
        self, media: Sequence[Media], texts: Sequence[str], questions: Sequence[str] | None = None
    ) -> list[float]:
        """The probability that the decoder writes each text, [SEP] included, about the image or video at the same
        index: as the answer to the question at that index, or, without questions, as a caption."""
        def score(vision: Tensor, modality: str, indices: list[int]) -> list[float]:
            memory, memory_mask, start = vision, None, self.start(len(indices), "" if questions else PROMPTS[modality])
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

        return self.on_media(media, score)

    def classify(
        self, task: str, media: Sequence[Media] | None = None, texts: Sequence[Text] | None = None
    ) -> list[str] | list[float]:
        """The name of the class of each input, or its number (regression). `task` decides whether an input is a medium
        (a path, or a pair of paths), a text (or a pair of texts), or both."""
        classes = self.model.classes.get(task)
        outputs = self.read(media, texts, lambda hidden, *_: self.model.classify(hidden, task))
        return [classes[int(output.argmax())] if classes else output.item() for output in outputs]

    def predict_boxes(self, images: Sequence[Media], texts: Sequence[str]) -> list[Tensor]:
        """The box in each image that the text at the same index describes: (center x, center y, width, height), as
        fractions of the image."""
        return self.read(images, texts, self.model.predict_box)

    def read(
        self, media: Sequence[Media] | None, texts: Sequence[Text] | None,
        head: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    ) -> list[Tensor]:
        """`head(hidden, V', mask)` of each input. hidden is the text `b l d`, V' `b v d`, or, with both, the fused
        text. V' is None without media, and the mask of the text `b l` without texts."""
        if media is None:
            return self.on_texts(texts, lambda text, mask: head(text, None, mask))
        if texts is not None and len(media) != len(texts):
            raise ValueError(f"{len(media)} media, but {len(texts)} texts: expected one text per medium")

        def on_vision(vision: Tensor, _, indices: list[int]) -> Tensor:
            if texts is None:
                vision = repeat_to(vision, len(indices))
                return head(vision, vision, None)
            text, mask = self.encode_text([texts[i] for i in indices])
            vision, fused = self.model.fuse(vision, text, mask)
            return head(fused, repeat_to(vision, len(indices)), mask)

        return self.on_media(media, on_vision)

    def explain(self, medium: Media, question: str = "") -> tuple[str, list[WordAttention]]:
        """The answer to a question, or a caption, and the attention of every word, averaged over the heads.

        Words of the question come from the last cross-attention of fusion, written words from that of the decoder. A
        model without a decoder writes nothing; `question` is then the text that a label or a box is about.
        """
        written, words = self.trace(medium, question)
        last = [(word.text, *list(word.maps.items())[-1]) for word in words]
        return written, [WordAttention(text, module, weights.mean(dim=0)) for text, module, weights in last]

    @torch.no_grad()
    def trace(self, medium: Media, question: str = "", **settings) -> tuple[str, list[Word]]:
        """What `explain` averages: the written text, and all words with the attention of every layer and head.

        `settings` are fields of `Generation`.
        """
        how, words, written = Generation(**settings), [], ""
        writes, decode = "decoder" in self.model.components, self.tokenizer.decode
        if writes:
            (written,) = (self.answer([medium], [question], **settings) if question
                          else self.caption([medium], **settings))
        side = self.model.config.image_size // self.model.config.patch_size

        def collect(maps: dict[str, Tensor], component: str, ids: Tensor, logits: Tensor | None, v: int) -> None:
            grids = {name: rearrange(weights[0, :, :, 1:v].cpu(), "c l (t h w) -> l c t h w", h=side, w=side)
                     for name, weights in maps.items() if name.startswith(component)}
            for i, number in enumerate(ids.tolist()):
                if not (text := decode([[number]])[0]):
                    continue
                probability, others = None, ()
                if logits is not None:
                    likely = logits[i].softmax(dim=-1)
                    top = likely.topk(min(5, len(likely)))
                    probability = likely[number].item()
                    others = tuple((decode([[j]])[0] or "[end]", value)
                                   for j, value in zip(top.indices.tolist(), top.values.tolist()))
                words.append(Word(text, probability, others, {name: grid[i] for name, grid in grids.items()}))

        def record(vision: Tensor, modality: str, _) -> list[None]:
            with attention_maps(self.model) as maps:
                memory, memory_mask, start, ids = self.decoder_inputs(vision, modality, question, how)
            collect(maps, "fusion", ids[0], None, vision.shape[1])
            if not writes:
                return [None]
            new = self.tokenizer.encode([written], special=False)[0].to(self.device) if written else start[:, :0]
            ids, first = torch.cat([start, new], dim=1)[:, : self.model.config.max_positions], start.shape[1] - 1
            with attention_maps(self.model) as maps:  # a token is predicted at the position before it
                logits = self.model.decode(ids, torch.ones_like(ids, dtype=torch.bool), memory, memory_mask)
            maps = {name: weights[:, :, first:] for name, weights in maps.items()}
            collect(maps, "decoder", ids[0, first + 1:], logits[0, first:], vision.shape[1])
            return [None]

        self.on_media([medium], record)
        return written, words

    def decoder_inputs(
        self, vision: Tensor, modality: str, question: str, how: Generation
    ) -> tuple[Memory, Tensor | None, Tensor, Tensor]:
        """For one V' `1 v d`: the memory of the decoder and its mask, the first tokens of its text, and the tokens of
        the question or instruction, all `1 ...`."""
        if not question and not how.instructed:
            prompt = self.start(1, PROMPTS[modality] if how.prompted else "")
            return vision, None, prompt, prompt[:, :0]
        text = clean(question, self.preprocess.max_words) if question else INSTRUCTIONS[modality]
        ids, mask = (x.to(self.device) for x in self.tokenizer.encode([text]))
        seen, fused = self.model.fuse(vision, self.model.encode_text(ids, mask), mask)
        return *answer_memory(seen, fused, mask), self.start(1), ids

    def embed(self, inputs: Sequence[str | Path]) -> Tensor:
        """Unit vectors `b e` of media and texts, which may be mixed: a `Path` is opened, a string is a text."""
        require_list(inputs)
        media = [i for i, item in enumerate(inputs) if not isinstance(item, str)]
        texts = [i for i, item in enumerate(inputs) if isinstance(item, str)]
        vectors = dict(zip(media, self.embed_media([inputs[i] for i in media])))
        vectors |= zip(texts, self.embed_texts([inputs[i] for i in texts]))
        return torch.stack([vectors[i] for i in range(len(inputs))])

    def embed_media(self, media: Sequence[Media]) -> list[Tensor]:
        """A unit vector `e` of each image or video."""
        return self.on_media(
            media, lambda vision, _, indices: repeat_to(self.model.project_vision(vision), len(indices)))

    def embed_texts(self, texts: Sequence[str]) -> list[Tensor]:
        """A unit vector `e` of each text."""
        return self.on_texts(texts, lambda text, mask: self.model.project_text(text))

    def similarity(self, media: Sequence[Media], texts: Sequence[str]) -> Tensor:
        """Cosines between media and texts, (medium, text)."""
        return torch.stack(self.embed_media(media)) @ torch.stack(self.embed_texts(texts)).T

    @torch.no_grad()
    def match_probability(self, vision: Tensor, texts: Sequence[str]) -> Tensor:
        """The matching head's probability that each V' (`b v d`) and the text at the same index belong together: `b`.

        A single V' (`1 v d`) is compared with all texts.
        """
        text, mask = self.encode_text(list(texts))
        _, fused = self.model.fuse(vision, text, mask)
        return self.model.itm_logits(fused).softmax(dim=-1)[:, 1]

    def encode_media(self, media: Sequence[Media]) -> list[Tensor]:
        """V' of each image or video, `v d`."""
        return self.on_media(media, lambda vision, _, indices: repeat_to(vision, len(indices)))
