"""Text to token ids and back: BERT's uncased WordPiece, a thin face on the `tokenizers` library.

A word that the vocabulary lacks is split into the longest pieces that it has: "play ##ing". Axes: b batch, l tokens.
"""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from mplug2.model.shapes import check

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FILE_NAME = "tokenizer.json"


def normalize(text: str) -> str:
    """Lower-case, without accents and apostrophes, all other punctuation and symbols blank, blanks squeezed.

    Accents go because BERT's uncased tokenizer drops them too: a model could never answer "café".
    """
    kept = []
    for char in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(char)
        if category != "Mn" and char not in "'’":
            kept.append(char if category[0] in "LMN" else " ")  # letters, the marks that belong to them, numbers
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())


@lru_cache(maxsize=100_000)  # the texts of a data set come again every epoch
def clean(text: str, max_words: int = 30) -> str:
    """Lower-case, without accents and punctuation (see `normalize`), cut at `max_words` words.

    This is how mPLUG-2 prepares all its text; answers are scored after the same steps.
    """
    return " ".join(normalize(text).split()[:max_words])


class Tokenizer:
    """A WordPiece vocabulary, made by `Tokenizer.load` or `Tokenizer.train`.

    `pad`, `unk`, `cls`, `sep` and `mask` are the ids of the special tokens; `len` is the size of the vocabulary. As in
    BERT, a special token that is spelled out in a text ("[MASK]") is read as that token.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()  # files from elsewhere may ask for it, and a text must never be cut silently
        backend.no_padding()
        self._backend = backend
        self._ids: dict[str, list[int]] = {}
        self.pad, self.unk, self.cls, self.sep, self.mask = map(backend.token_to_id, SPECIAL_TOKENS)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load BERT's `vocab.txt` (lower-cased), a `tokenizer.json` of a WordPiece model, or a folder that holds one.

        If a folder holds both, `tokenizer.json` is taken. Raises FileNotFoundError if there is no such file, and
        ValueError, naming the file, if it is not such a file or has no special tokens (named).
        """
        path = Path(path)
        if path.is_dir():
            files = [path / name for name in (FILE_NAME, "vocab.txt") if (path / name).is_file()]
            if not files:
                raise FileNotFoundError(f"{path}: this folder holds neither {FILE_NAME} nor vocab.txt")
            path = files[0]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a vocab.txt, a {FILE_NAME} or a folder with one")
        if path.suffix == ".json":
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises nothing more specific
                raise ValueError(f"{path}: not a {FILE_NAME} that the tokenizers library can read: {error}") from error
            if not isinstance(backend.model, models.WordPiece):
                raise ValueError(f"{path}: expected a WordPiece model, found {type(backend.model).__name__}")
            vocabulary = backend.get_vocab()
        elif path.suffix == ".txt":
            with path.open(encoding="utf-8") as lines:
                vocabulary = {line.rstrip("\n"): index for index, line in enumerate(lines)}
        else:
            raise ValueError(f"{path}: expected a vocab.txt (one token a line) or a {FILE_NAME}")
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(f"{path}: the vocabulary lacks {' '.join(missing)}; expected the five special tokens "
                             f"{' '.join(SPECIAL_TOKENS)}, as in the files of BERT")
        if len(vocabulary) != max(vocabulary.values()) + 1:
            raise ValueError(f"{path}: {len(vocabulary)} different tokens, but ids up to {max(vocabulary.values())}; "
                             "expected ids without gaps: look for a token that is listed twice")
        return cls(_bert(vocabulary) if path.suffix == ".txt" else backend)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a WordPiece vocabulary of at most `vocab_size` tokens (fewer if the corpus has no more to merge).

        The special tokens get ids 0 to 4, [PAD] first. The same corpus, in any order, gives the same vocabulary, in
        which every word made of the corpus' characters can be written. Raises ValueError for an empty corpus, and for
        a `vocab_size` that its characters alone exceed.
        """
        _check_list(texts)
        texts = list(texts)
        backend = _bert({token: index for index, token in enumerate(SPECIAL_TOKENS)})
        words = {
            word
            for text in texts
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        }
        # The library numbers the characters in the order of a hash table that differs from run to run, and breaks ties
        # between merges by number. Listed among the special tokens, in our order, they always get the same numbers.
        characters = sorted({char for word in words for char in word})
        continuations = sorted({f"##{char}" for word in words for char in word[1:]})
        first = SPECIAL_TOKENS + characters + continuations
        if not words:
            raise ValueError("no words to train a tokenizer on: the corpus is empty")
        if vocab_size < len(first):
            raise ValueError(f"vocab_size={vocab_size} is too small: the special tokens and the characters of this "
                             f"corpus alone need {len(first)}")
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        return cls(_bert(backend.get_vocab(with_added_tokens=False)))

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` for `load`: to `path` if that ends in .json, else into the folder `path`."""
        path = Path(path)
        file = path if path.suffix == ".json" else path / FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(file))

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, texts: list[str], max_length: int | None = None, special: bool = True) -> tuple[Tensor, Tensor]:
        """Texts -> ids `b l` (int64), padded to the longest, and the mask `b l` (bool) of what is not padding.

        With `special`, each text becomes [CLS] text [SEP]. Raises ValueError for an empty text (with its position),
        and for one of more than `max_length` tokens, the special ones included: nothing is ever cut silently; TypeError
        for a bare string in place of the list.
        """
        rows = self._rows(texts, special)
        if not rows:
            raise ValueError("no texts to encode: expected at least one")
        for text, row in zip(texts, rows):
            if max_length is not None and len(row) > max_length:
                shown = text if len(text) <= 200 else text[:200] + "..."
                counted = f"{len(row)} tokens{' with [CLS] and [SEP]' if special else ''}"
                raise ValueError(f"the text {shown!r} has {counted}, more than max_length={max_length}: "
                                 "shorten it (see clean), or raise max_length")
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, self.pad)
        ids[mask] = torch.tensor([token for row in rows for token in row])
        return ids, mask

    def lengths(self, texts: list[str]) -> list[int]:
        """How many tokens each text has, [CLS] and [SEP] included. ValueError for an empty text."""
        return [len(row) for row in self._rows(texts, special=True)]

    def decode(self, ids: Tensor | list[list[int]]) -> list[str]:
        """Ids, `b l` or rows of any lengths -> texts: word pieces joined, special tokens dropped.

        A row ends at its first [SEP]; what follows is ignored. Raises ValueError for an id outside the vocabulary.
        """
        if isinstance(ids, Tensor):
            check(ids, "b l")
            ids = ids.tolist()
        return [self._decode(row) for row in ids]

    def _decode(self, row: list[int]) -> str:
        pieces = []
        for index in row:
            if index == self.sep:
                break
            if not 0 <= index < len(self):
                raise ValueError(f"id {index} is outside the vocabulary of {len(self)} tokens: "
                                 "use the tokenizer that the model was trained with")
            if index not in (self.pad, self.unk, self.cls, self.mask):
                pieces.append(self._backend.id_to_token(index))
        return " ".join(pieces).replace(" ##", "")

    def _rows(self, texts: list[str], special: bool) -> list[list[int]]:
        _check_list(texts)
        # One text at a time: the library's batch call starts threads, which do not survive the fork of a data worker.
        rows = [self._row(text) for text in texts]
        for index, row in enumerate(rows):
            if not row:
                raise ValueError(f"text {index} of {len(rows)} is empty: {texts[index]!r}; leave it out")
        return [[self.cls, *row, self.sep] for row in rows] if special else rows

    def _row(self, text: str) -> list[int]:
        """The ids of a text, kept for when it comes again: those of a data set do every epoch."""
        if text not in self._ids:
            if len(self._ids) >= 100_000:
                self._ids.clear()
            self._ids[text] = self._backend.encode(text, add_special_tokens=False).ids
        return self._ids[text]


def _bert(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """BERT's uncased tokenizer over `vocabulary`, which holds the special tokens."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Encoding and decoding above do without these two; they make the saved file complete for other programs.
    backend.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(SPECIAL_TOKENS)
    return backend


def _check_list(texts: Iterable[str]) -> None:
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, found the single text {texts[:200]!r}")
