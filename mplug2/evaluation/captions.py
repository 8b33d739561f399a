"""Caption metrics: BLEU, CIDEr-D, ROUGE-L, and the pipeline of the captioning papers.

Strings in, numbers out, in plain Python and NumPy (except `paper_captions`). Captions are compared by their
whitespace tokens, so normalize hypotheses and references alike before scoring them. A sample has one hypothesis and
one or more references.
"""

import math
import shutil
from collections import Counter

import numpy as np

from mplug2.data.text import split_characters, strip_marks

MAX_N = 4
"""The longest n-gram that BLEU and CIDEr-D count."""
SIGMA = 6.0
"""Width of CIDEr-D's Gaussian length penalty, in tokens."""

Ngram = tuple[str, ...]


def bleu_counts(references: list[list[str]], hypotheses: list[str]) -> np.ndarray:
    """What BLEU counts in each sample, to be summed over a corpus: int (sample, 2 + 2 * MAX_N).

    The columns are the lengths of the hypothesis and of the reference closest to it (the shorter of two equally close
    ones), the clipped matches of 1- to 4-grams, and the number of 1- to 4-grams of the hypothesis.

    Raises ValueError if the lists are empty or differ in length, and for a sample without references (with its index).
    """
    check_samples(references, hypotheses)
    counts = np.zeros((len(hypotheses), 2 + 2 * MAX_N), int)
    for row, texts, hypothesis in zip(counts, references, hypotheses):
        length = len(hypothesis.split())
        row[0] = length
        row[1] = min((len(text.split()) for text in texts), key=lambda other: (abs(other - length), other))
        most = Counter()
        for text in texts:
            most |= _ngrams(text)
        for ngram, count in _ngrams(hypothesis).items():
            row[1 + len(ngram)] += min(count, most[ngram])
        row[2 + MAX_N:] = [max(0, length - n) for n in range(MAX_N)]
    return counts


def bleu(counts: np.ndarray) -> np.ndarray:
    """Corpus BLEU-1 to BLEU-4, each in [0, 1], from summed `bleu_counts` (..., k): (..., 4).

    BLEU-n is the geometric mean of the clipped precisions of 1- to n-grams over the whole corpus, times the brevity
    penalty. Tiny constants replace counts of zero, as in the COCO caption evaluation. Source: Papineni et al. 2002,
    "BLEU: a Method for Automatic Evaluation of Machine Translation".
    """
    counts = np.asarray(counts, float)
    precisions = (counts[..., 2: 2 + MAX_N] + 1e-15) / (counts[..., 2 + MAX_N:] + 1e-9)
    ratio = (counts[..., 0] + 1e-15) / (counts[..., 1] + 1e-9)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return brevity[..., None] * np.exp(np.log(precisions).cumsum(axis=-1) / np.arange(1, MAX_N + 1))


class CiderD:
    """CIDEr-D with the document frequencies of a given corpus (Vedantam et al. 2015, "CIDEr: Consensus-based ...").

    The weight of an n-gram is its count times its inverse document frequency: log(N / number of samples whose
    references contain it). For each n, the score is the cosine of hypothesis and reference, with the weights of the
    hypothesis clipped to those of the reference, times a Gaussian penalty on the difference in length. The scores are
    averaged over n and over the references, and multiplied by 10.

    In a corpus of one sample every weight is 0, and so is every score.
    """

    def __init__(self, references: list[list[str]]):
        """references: a list of captions for each sample. Raises ValueError as `bleu_counts` does."""
        check_samples(references, references)
        documents = Counter()
        for texts in references:
            documents.update({ngram for text in texts for ngram in _ngrams(text)})
        self._unseen = math.log(len(references))
        self._idf = {ngram: self._unseen - math.log(count) for ngram, count in documents.items()}

    def scores(self, references: list[list[str]], hypotheses: list[str]) -> np.ndarray:
        """The score of each hypothesis against its references, in [0, 10]: float64 array (sample,).

        Any samples may be scored, for instance one batch of the corpus. Raises ValueError as `bleu_counts` does.
        """
        check_samples(references, hypotheses)
        return np.array([self._score(texts, hypothesis) for texts, hypothesis in zip(references, hypotheses)])

    def _score(self, references: list[str], hypothesis: str) -> float:
        weights, norms, length = self._vector(hypothesis)
        total = 0.0
        for reference in references:
            other_weights, other_norms, other_length = self._vector(reference)
            products = [0.0] * MAX_N
            for ngram, weight in weights.items():
                if other := other_weights.get(ngram):
                    products[len(ngram) - 1] += min(weight, other) * other
            cosines = sum(p / (a * b) for p, a, b in zip(products, norms, other_norms) if p)
            total += cosines * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
        return 10 * total / (MAX_N * len(references))

    def _vector(self, text: str) -> tuple[dict[Ngram, float], list[float], int]:
        """The weights of the n-grams of a text, their Euclidean norm for each n, and the number of tokens."""
        counts = _ngrams(text)
        weights = {ngram: count * self._idf.get(ngram, self._unseen) for ngram, count in counts.items()}
        squares = [0.0] * MAX_N
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        return weights, [math.sqrt(square) for square in squares], len(text.split())


def cider_d(references: list[list[str]], hypotheses: list[str]) -> np.ndarray:
    """CIDEr-D of each sample, with the document frequencies of these references.

    Raises ValueError as `bleu_counts` does.
    """
    return CiderD(references).scores(references, hypotheses)


ROUGE_BETA = 1.2
"""Weight of recall relative to precision in ROUGE-L, as in the COCO caption evaluation."""


def rouge_l(references: list[list[str]], hypotheses: list[str]) -> list[float]:
    """ROUGE-L of each sample, in [0, 1] (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

    As in the COCO caption evaluation, precision and recall of the longest common subsequence of words are each the
    best over the references, and are combined in an F-measure with beta 1.2. Raises ValueError as `bleu_counts` does.
    """
    check_samples(references, hypotheses)
    scores = []
    for texts, hypothesis in zip(references, hypotheses):
        words = hypothesis.split()
        common = [(_common(words, text.split()), len(text.split())) for text in texts]
        precision = max(length for length, _ in common) / len(words) if words else 0.0
        recall = max(length / total if total else 0.0 for length, total in common)
        if precision and recall:
            scores.append((1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision))
        else:
            scores.append(0.0)
    return scores


def _common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        above_left = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = above_left + 1 if word == other else max(above, row[column - 1])
            above_left = above
    return row[-1]


def paper_captions(references: list[list[str]], hypotheses: list[str]) -> dict[str, float]:
    """The pipeline of the captioning papers: Penn Treebank tokens, then BLEU-1 to -4, METEOR, ROUGE-L, and CIDEr of
    `pycocoevalcap`. Fractions from 0 to 1, CIDEr from 0 to 10.

    Takes raw captions, not normalized ones. Letters of scripts without blanks between words count as words, and accents
    are removed, which no model here can write. The tokenizer and METEOR are Java programs. Raises ValueError as `bleu`
    does, and if the package or Java is missing.
    """
    check_samples(references, hypotheses)
    check_paper_captions()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    tokenizer = PTBTokenizer()
    truths = {i: [{"caption": _one_line(text)} for text in texts] for i, texts in enumerate(references)}
    truths = tokenizer.tokenize(truths)
    found = tokenizer.tokenize({i: [{"caption": _one_line(text)}] for i, text in enumerate(hypotheses)})
    scores = {f"bleu{n}": x for n, x in enumerate(Bleu(4).compute_score(truths, found, verbose=0)[0], start=1)}
    for name, metric in (("meteor", Meteor()), ("rouge_l", Rouge()), ("cider", Cider())):
        scores[name] = metric.compute_score(truths, found)[0]
    return {name: float(score) for name, score in scores.items()}


def check_paper_captions() -> None:
    """Raise ValueError if the package or Java, which `paper_captions` needs, is missing."""
    try:
        import pycocoevalcap.meteor.meteor
        import pycocoevalcap.tokenizer.ptbtokenizer  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--paper-captions needs the package pycocoevalcap ({error}): pip install mplug2[eval]"
        ) from error
    if shutil.which("java") is None:
        raise ValueError("--paper-captions runs Java (for its tokenizer and METEOR), and there is no `java`: install a "
                         "Java runtime, or leave the flag out")


def _one_line(text: str) -> str:
    """A caption without line breaks of any kind: the tokenizer takes one caption per line, and would assign all that
    follow to the wrong samples. It skips empty lines, so a full stop, which it drops, replaces an empty caption."""
    return " ".join(split_characters(strip_marks(text)).split()) or "."


def _ngrams(text: str) -> Counter[Ngram]:
    """How often each n-gram of 1 to MAX_N whitespace tokens occurs in `text`."""
    words = text.split()
    counts = Counter()
    for n in range(1, MAX_N + 1):
        counts.update(zip(*(words[start:] for start in range(n))))  # the list, zipped with itself shifted by 1, ...
    return counts


def check_samples(references: list[list[str]], predictions: list) -> None:
    """Raise ValueError unless there is one prediction, and at least one reference, for each sample."""
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} lists of references but {len(predictions)} predictions: expected one of "
                         "each per sample")
    if not references:
        raise ValueError("no samples to score: check that the split is not empty")
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"sample {index}: found {texts!r}, expected a non-empty list of reference strings")
