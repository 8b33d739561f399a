"""What each task is scored by, as its literature computes it.

    captions         bleu, CiderD and cider_d, rouge_l; paper_captions (the papers' pipeline: the extra `eval`, Java)
    answers          exact_match, vqa_accuracy (ten answers a question)
    retrieval        retrieval (recall at 1, 5, 10 and median rank, of one direction)
    classification   top_k, matthews, f1
    similarity       pearson, spearman
    grounding        box_iou, grounding_accuracy

Everything but `paper_captions` is plain Python and numpy: strings and arrays go in, numbers come out. Captions are
compared on their whitespace tokens, so normalize both sides alike before scoring them.
"""

import math
import shutil
from collections import Counter

import numpy as np

MAX_N = 4
"""The longest n-gram that BLEU and CIDEr-D count."""
SIGMA = 6.0
"""Width of CIDEr-D's Gaussian length penalty, in tokens."""

Ngram = tuple[str, ...]


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


ROUGE_BETA = 1.2
"""How much more recall weighs than precision in the COCO evaluation's ROUGE-L."""


def rouge_l(references: list[list[str]], hypotheses: list[str]) -> float:
    """ROUGE-L in [0, 1] (Lin 2004, "ROUGE: A Package for Automatic Evaluation ..."), the mean over the samples.

    As in the COCO caption evaluation: precision and recall of the longest common subsequence of words, each the best
    over the references, and their F-measure with beta 1.2. Raises ValueError as `bleu` does.
    """
    _check_samples(references, hypotheses)
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
    return sum(scores) / len(scores)


def _common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        above_left = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = above_left + 1 if word == other else max(above, row[place - 1])
            above_left = above
    return row[-1]


def paper_captions(references: list[list[str]], hypotheses: list[str]) -> dict[str, float]:
    """The pipeline of the captioning papers on raw captions, not on normalized ones: the Penn Treebank tokenizer, then
    BLEU-1 to -4, METEOR, ROUGE-L and CIDEr of `pycocoevalcap`. Shares from 0 to 1; CIDEr from 0 to 10.

    Tokenizer and METEOR are Java programs. Raises ValueError as `bleu` does, and if the package or Java is missing.
    """
    _check_samples(references, hypotheses)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise ValueError(
            f"the papers' caption metrics need the package pycocoevalcap ({error}): pip install mplug2[eval]"
        ) from error
    if shutil.which("java") is None:
        raise ValueError("the papers' caption metrics run Java (tokenizer, METEOR), and there is no `java`: install a "
                         "Java runtime, or leave --paper-captions out for the metrics that need none")
    tokenizer = PTBTokenizer()
    # An empty caption is passed over by the tokenizer's line count: a full stop, which it drops, stands for it.
    truths = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(references)})
    found = tokenizer.tokenize({i: [{"caption": text or "."}] for i, text in enumerate(hypotheses)})
    scores = {f"bleu{n}": x for n, x in enumerate(Bleu(4).compute_score(truths, found, verbose=0)[0], start=1)}
    for name, metric in (("meteor", Meteor()), ("rouge_l", Rouge()), ("cider", Cider())):
        scores[name] = metric.compute_score(truths, found)[0]
    return {name: float(score) for name, score in scores.items()}


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
