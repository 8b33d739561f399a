"""Text: cleaning, and BERT's uncased WordPiece tokenizer, a thin wrapper around the `tokenizers` library.

A word that is not in the vocabulary is split into the longest pieces that are: "play ##ing".
Axes: `b` batch, `l` tokens.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FILE_NAME = "tokenizer.json"


UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff])"
)
"""Letters of scripts that write no blanks between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese."""


def split_characters(text: str) -> str:
    """Put blanks around each letter of a script without blanks between words; other text stays as it is.

    Each such letter is then a word: for the limit on words, and for metrics, which compare words. BERT's tokenizer does
    the same with Chinese characters.
    """
    return text if text.isascii() else UNSPACED.sub(r" \1 ", text)


ASCII_LETTERS = {code: None if chr(code) == "'" else chr(code) if chr(code).isalnum() else " " for code in range(128)}
"""What `normalize` makes of lower-case ASCII characters."""


def strip_marks(text: str) -> str:
    """Remove accents, other marks, and what nobody sees (soft hyphens, zero-width blanks, marks of direction).

    BERT's uncased tokenizer does so, too: a model can read and write none of them.
    """
    if text.isascii():
        return text
    kept = (char for char in unicodedata.normalize("NFD", text) if unicodedata.category(char) not in ("Mn", "Cf"))
    return unicodedata.normalize("NFC", "".join(kept))


def normalize(text: str) -> str:
    """Lower-case the text, remove accents and apostrophes, replace other punctuation and symbols by single blanks.

    Letters of scripts without blanks between words become words (`split_characters`). Accents are removed because
    BERT's uncased tokenizer drops them too: a model could never answer "café". So are characters that nobody sees, such
    as soft hyphens, which web pages have inside of words.
    """
    return " ".join(split_words(text))


def split_words(text: str) -> list[str]:
    """The words of the text, as `normalize` makes them."""
    if text.isascii():  # the same, about ten times as fast
        return text.lower().translate(ASCII_LETTERS).split()
    kept = []
    for char in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(char)
        if category not in ("Mn", "Cf") and char not in "'’":  # accents; soft hyphens, zero-width and direction marks
            kept.append(char if category[0] in "LMN" else " ")  # letters, their marks, numbers
    return split_characters(unicodedata.normalize("NFC", "".join(kept))).split()


@lru_cache(maxsize=100_000)  # the same texts return every epoch
def clean(text: str, max_words: int = 30) -> str:
    """`normalize`, cut after `max_words` words: how mPLUG-2 prepares all its text. Answers are scored in this form."""
    return " ".join(split_words(text)[:max_words])


class Tokenizer:
    """A WordPiece tokenizer, created by `Tokenizer.load` or `Tokenizer.train`.

    `pad`, `unk`, `cls`, `sep` and `mask` are the ids of the special tokens; `len` is the size of the vocabulary. As in
    BERT, a special token that a text spells out ("[MASK]") is read as that token.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()  # a loaded file may enable it, but no text may be cut silently
        backend.no_padding()
        self._backend = backend
        self._ids: dict[str, list[int]] = {}
        self.pad, self.unk, self.cls, self.sep, self.mask = map(backend.token_to_id, SPECIAL_TOKENS)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load BERT's `vocab.txt` (lower-cased), a `tokenizer.json` of a WordPiece model, or a folder with one of them.

        A folder with both uses `tokenizer.json`. Raises FileNotFoundError for a missing file, and ValueError for any
        other file and for a vocabulary without the special tokens.
        """
        path = Path(path)
        if path.is_dir():
            files = [path / name for name in (FILE_NAME, "vocab.txt") if (path / name).is_file()]
            if not files:
                raise FileNotFoundError(f"{path} has neither {FILE_NAME} nor vocab.txt; choose a folder with one")
            path = files[0]
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected a vocab.txt, a {FILE_NAME}, or a folder with one")
        if path.suffix == ".json":
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises nothing more specific
                raise ValueError(f"{path} is no {FILE_NAME} that the tokenizers library can read: {error}") from error
            if not isinstance(backend.model, models.WordPiece):
                raise ValueError(f"{path} has a {type(backend.model).__name__} model; expected WordPiece")
            vocabulary = backend.get_vocab()
        elif path.suffix == ".txt":
            with path.open(encoding="utf-8") as lines:
                vocabulary = {line.rstrip("\n"): index for index, line in enumerate(lines)}
        else:
            raise ValueError(f"{path} is no vocabulary: expected a vocab.txt (one token per line) or a {FILE_NAME}")
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(f"{path} lacks the tokens {' '.join(missing)}; expected the special tokens of BERT, "
                             f"{' '.join(SPECIAL_TOKENS)}")
        if len(vocabulary) != max(vocabulary.values()) + 1:
            raise ValueError(f"{path}: {len(vocabulary)} different tokens, but ids up to {max(vocabulary.values())}; "
                             "expected ids without gaps: remove the token that is listed twice")
        return cls(_bert(vocabulary) if path.suffix == ".txt" else backend)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a WordPiece vocabulary of at most `vocab_size` tokens (fewer if the corpus has nothing more to merge).

        The special tokens get ids 0 to 4, [PAD] first. The same corpus in any order gives the same vocabulary, which
        can spell every word made of the characters of the corpus. Raises ValueError for an empty corpus, and for a
        `vocab_size` smaller than the number of characters.
        """
        _check_list(texts)
        texts = list(texts)
        backend = _bert({token: index for index, token in enumerate(SPECIAL_TOKENS)})
        words = {
            word
            for text in texts
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        }
        # The library numbers characters in the order of a hash table, which differs from run to run, and breaks ties
        # between merges by number. As special tokens in sorted order they get the same numbers in every run.
        characters = sorted({char for word in words for char in word})
        continuations = sorted({f"##{char}" for word in words for char in word[1:]})
        first = SPECIAL_TOKENS + characters + continuations
        if not words:
            raise ValueError("the corpus is empty: expected texts with words to train a tokenizer on")
        if vocab_size < len(first):
            raise ValueError(f"vocab_size={vocab_size} is too small: the special tokens and the characters of this "
                             f"corpus alone need {len(first)}")
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
        backend.train_from_iterator(texts, trainer)
        return cls(_bert(backend.get_vocab(with_added_tokens=False)))

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` for `load`: to `path` if that ends in .json, otherwise into the folder `path`."""
        path = Path(path)
        file = path if path.suffix == ".json" else path / FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(file))

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, texts: list[str], max_length: int | None = None, special: bool = True) -> tuple[Tensor, Tensor]:
        """Texts to ids `b l` (int64), padded to the longest, and their mask `b l` (bool), which is False at padding.

        With `special`, each text becomes [CLS] text [SEP]. Raises ValueError for an empty text and for a text of more
        than `max_length` tokens, special tokens included (no text is cut silently); TypeError for a single string.
        """
        rows = self._rows(texts, special)
        if not rows:
            raise ValueError("texts is []: expected at least one text to encode")
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
        """The number of tokens of each text, [CLS] and [SEP] included. ValueError for an empty text."""
        return [len(row) for row in self._rows(texts, special=True)]

    def is_unknown(self, word: str) -> bool:
        """Whether the vocabulary cannot spell a word, which then becomes [UNK]."""
        return self.unk in self._row(word)

    def decode(self, ids: Tensor | list[list[int]]) -> list[str]:
        """Ids, `b l` or rows of different lengths, to texts (NFC): word pieces are joined, special tokens dropped.

        A row ends at its first [SEP]; the rest is ignored. Raises ValueError for an id outside the vocabulary.
        """
        if isinstance(ids, Tensor):
            if ids.ndim != 2:
                raise ValueError(f"ids of shape {tuple(ids.shape)}: expected shape (b l)")
            ids = ids.tolist()
        return [self._decode(row) for row in ids]

    def _decode(self, row: list[int]) -> str:
        pieces = []
        for index in row:
            if index == self.sep:
                break
            if not 0 <= index < len(self):
                raise ValueError(f"id {index} is outside the vocabulary of {len(self)} tokens; "
                                 "use the tokenizer that the model was trained with")
            if index not in (self.pad, self.unk, self.cls, self.mask):
                pieces.append(self._backend.id_to_token(index))
        # BERT's tokenizer decomposes characters, Korean syllables into letters; texts have them composed.
        return unicodedata.normalize("NFC", " ".join(pieces).replace(" ##", ""))

    def _rows(self, texts: list[str], special: bool) -> list[list[int]]:
        _check_list(texts)
        # One text at a time: the library's batch call starts threads, which a forked worker would not have.
        rows = [self._row(text) for text in texts]
        for index, row in enumerate(rows):
            if not row:
                raise ValueError(f"text {index} of {len(rows)} is empty: {texts[index]!r}; remove it")
        return [[self.cls, *row, self.sep] for row in rows] if special else rows

    def _row(self, text: str) -> list[int]:
        """The ids of a text, cached: the texts of a data set return every epoch."""
        if text not in self._ids:
            if len(self._ids) >= 100_000:
                self._ids.clear()
            self._ids[text] = self._backend.encode(text, add_special_tokens=False).ids
        return self._ids[text]


def _bert(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """BERT's uncased tokenizer with `vocabulary`, which includes the special tokens."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # `Tokenizer` does not use these two; they make the saved file complete for other programs.
    backend.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(SPECIAL_TOKENS)
    return backend


def _check_list(texts: Iterable[str]) -> None:
    if isinstance(texts, str):
        raise TypeError(f"found the single text {texts[:200]!r}; expected a list of texts")
