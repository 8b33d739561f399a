"""What each task is scored by: BLEU and CIDEr-D for captions, exact match for answers, recall at k for retrieval.

Everything here is plain Python and numpy: strings and arrays go in, numbers come out. Captions are compared on
their whitespace tokens, so normalise both sides alike before scoring them.
"""

import math
import unicodedata
from collections import Counter

import numpy as np

MAX_N = 4
"""The longest n-gram that BLEU and CIDEr-D count."""
SIGMA = 6.0
"""Width of CIDEr-D's Gaussian length penalty, in tokens."""

Ngram = tuple[str, ...]


def normalise(text: str) -> str:
    """Lower-case, without accents and apostrophes, all other punctuation and symbols blank, blanks squeezed.

    Accents go because BERT's uncased tokenizer drops them too: a model could never answer "café".
    """
    kept = []
    for char in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(char)
        if category != "Mn" and char not in "'’":
            kept.append(char if category[0] in "LMN" else " ")  # letters, the marks that belong to them, numbers
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())


def bleu(references: list[list[str]], hypotheses: list[str]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4, each in [0, 1] (Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation ...").

    BLEU-n is the geometric mean of the clipped precisions of 1- to n-grams over the whole corpus, times the brevity
    penalty against the reference closest in length (the shorter one of two equally close). As in the COCO caption
    evaluation, tiny constants stand in for counts of zero.

    Raises ValueError if the lists differ in length or are empty, or a sample has no references (with its index).
    """
    _check_samples(references, hypotheses)
    found, possible = [0] * MAX_N, [0] * MAX_N
    hypothesis_length = reference_length = 0
    for texts, hypothesis in zip(references, hypotheses):
        length = len(hypothesis.split())
        hypothesis_length += length
        reference_length += min((len(text.split()) for text in texts), key=lambda other: (abs(other - length), other))
        most = Counter()
        for text in texts:
            most |= _ngrams(text)
        for ngram, count in _ngrams(hypothesis).items():
            found[len(ngram) - 1] += min(count, most[ngram])
        for n in range(MAX_N):
            possible[n] += max(0, length - n)

    ratio = (hypothesis_length + 1e-15) / (reference_length + 1e-9)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    scores, product = [], 1.0
    for n in range(MAX_N):
        product *= (found[n] + 1e-15) / (possible[n] + 1e-9)
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


class CiderD:
    """CIDEr-D with the document frequencies of a given corpus (Vedantam et al. 2015, "CIDEr: Consensus-based ...").

    An n-gram of a caption weighs its count times its inverse document frequency, log(N / samples that mention it in
    any reference). For each n the score is the cosine of hypothesis and reference, with the hypothesis' weights
    clipped to the reference's, times a Gaussian penalty on the difference in length; it is averaged over n and over
    the references, and multiplied by 10.

    In a corpus of one sample every weight, and so every score, is 0.
    """

    def __init__(self, references: list[list[str]]):
        """references: one list of captions a sample; ValueError if there are no samples, or one without captions."""
        _check_samples(references, references)
        documents = Counter()
        for texts in references:
            documents.update({ngram for text in texts for ngram in _ngrams(text)})
        self._unseen = math.log(len(references))
        self._idf = {ngram: self._unseen - math.log(count) for ngram, count in documents.items()}

    def scores(self, references: list[list[str]], hypotheses: list[str]) -> np.ndarray:
        """The score of each hypothesis against its references, in [0, 10]: float64 array (sample,).

        The samples may be any, for instance one batch sampled from the corpus. Raises ValueError as `bleu` does.
        """
        _check_samples(references, hypotheses)
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
        """The weights of a text's n-grams, their Euclidean norm for each n, and the number of tokens."""
        counts = _ngrams(text)
        weights = {ngram: count * self._idf.get(ngram, self._unseen) for ngram, count in counts.items()}
        squares = [0.0] * MAX_N
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        return weights, [math.sqrt(square) for square in squares], len(text.split())


def cider_d(references: list[list[str]], hypotheses: list[str]) -> tuple[float, np.ndarray]:
    """CIDEr-D with document frequencies from these references: the corpus mean, and the score of each sample.

    Raises ValueError as `bleu` does.
    """
    scores = CiderD(references).scores(references, hypotheses)
    return float(scores.mean()), scores


def exact_match(answers: list[list[str]], predictions: list[str]) -> float:
    """Fraction, in [0, 1], of predictions that equal one of their accepted answers after `normalise`.

    Raises ValueError as `bleu` does.
    """
    _check_samples(answers, predictions)
    hits = [normalise(prediction) in map(normalise, accepted) for accepted, prediction in zip(answers, predictions)]
    return sum(hits) / len(hits)


def retrieval(similarity: np.ndarray, positives: np.ndarray) -> dict[str, float]:
    """Recall at 1, 5 and 10 (fractions) and the median rank (1 is best) of each query's best positive item.

    similarity: (query, item), higher is closer; positives: (query, item), bool. Ties are broken against us: a
    negative item that ties with the best positive counts before it, so a model that cannot tell items apart scores
    as badly as it should. The other positives of a query do not count before its best one.

    Raises ValueError for shapes that differ or are empty, positives that are not bool, a similarity that is not a
    number, and a query without a positive item (with its index).
    """
    similarity, positives = np.asarray(similarity), np.asarray(positives)
    if similarity.ndim != 2 or similarity.size == 0 or similarity.shape != positives.shape:
        raise ValueError("expected similarity and positives of one non-empty shape (query, item), "
                         f"found {similarity.shape} and {positives.shape}")
    if positives.dtype != np.bool_:
        raise ValueError(f"expected bool positives, found {positives.dtype}: say which items are right, not how much")
    unknown, lonely = np.isnan(similarity).any(axis=1), ~positives.any(axis=1)
    if unknown.any():
        raise ValueError(f"the similarities of query {unknown.argmax()} hold NaN: look for the cause in the model")
    if lonely.any():
        raise ValueError(f"query {lonely.argmax()} has no positive item: leave it out, or add its item to the gallery")
    best = np.where(positives, similarity, -np.inf).max(axis=1, keepdims=True)
    ranks = 1 + ((similarity >= best) & ~positives).sum(axis=1)
    recall = {f"r{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return recall | {"median_rank": float(np.median(ranks))}


def _ngrams(text: str) -> Counter[Ngram]:
    """How often each n-gram of 1 to MAX_N whitespace tokens occurs in `text`."""
    words = text.split()
    counts = Counter()
    for n in range(1, MAX_N + 1):
        counts.update(zip(*(words[start:] for start in range(n))))  # the list zipped with itself, one further on, ...
    return counts


def _check_samples(references: list[list[str]], predictions: list) -> None:
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} lists of references but {len(predictions)} predictions: "
                         "give one of each a sample")
    if not references:
        raise ValueError("no samples to score: check that the split is not empty")
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"sample {index}: expected a non-empty list of reference strings, found {texts!r}")
