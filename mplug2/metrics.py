"""What each task is scored by, as its literature computes it.

    captions         bleu, CiderD and cider_d, rouge_l; paper_captions (the papers' pipeline: the extra `eval`, Java)
    answers          exact_match, vqa_accuracy (ten answers a question)
    retrieval        retrieval (recall at 1, 5, 10 and median rank, of one direction)
    classification   top_k, matthews, f1
    similarity       pearson, spearman
    grounding        box_iou, grounding_accuracy

Everything but `paper_captions` is plain Python and numpy: strings and arrays go in, numbers come out. Captions are
compared on their whitespace tokens, so normalise both sides alike before scoring them.
"""

import math
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Sequence

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
    """The pipeline of the captioning papers on raw captions, not on normalised ones: the Penn Treebank tokenizer, then
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


def exact_match(answers: list[list[str]], predictions: list[str]) -> float:
    """Fraction, in [0, 1], of predictions that equal one of their accepted answers after `normalise`.

    Raises ValueError as `bleu` does.
    """
    _check_samples(answers, predictions)
    hits = [normalise(prediction) in map(normalise, accepted) for accepted, prediction in zip(answers, predictions)]
    return sum(hits) / len(hits)


def vqa_accuracy(answers: list[list[str]], predictions: list[str]) -> float:
    """The accuracy of VQAv2, in [0, 1]: an answer counts in full if three of the ten people gave it.

    It is averaged over the ways to leave one person out: min(1, how many of the others agree / 3). As in the official
    evaluation the prediction is normalised (`vqa_normalise`), and people's answers lose their punctuation where they
    are not all the same. Source: Antol et al. 2015, "VQA: Visual Question Answering", and its evaluation code
    (github.com/GT-Vision-Lab/VQA). Raises ValueError as `bleu` does.
    """
    _check_samples(answers, predictions)
    scores = []
    for given, prediction in zip(answers, predictions):
        prediction = vqa_normalise(prediction)
        if len(set(given)) > 1:
            given = [_vqa_punctuation(answer) for answer in given]
        hits = sum(answer == prediction for answer in given)
        # Leaving out one who agrees leaves hits - 1 of them; leaving out one who does not leaves them all.
        total = hits * min(1.0, (hits - 1) / 3) + (len(given) - hits) * min(1.0, hits / 3) if hits else 0.0
        scores.append(total / len(given))
    return sum(scores) / len(scores)


VQA_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
VQA_NUMBERS["none"] = "0"
VQA_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
VQA_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
        "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
        "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
        "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
        "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
        "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
        "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've "
        "you'll you're you've"
    ).split() for place, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}
"""The official table: contractions that lost one apostrophe, and the form in which answers are compared. Its entry for
"somebody'd" is the other way round, and has to stay so."""


def vqa_normalise(answer: str) -> str:
    """Lower-case, without articles and punctuation, numbers to ten as digits, apostrophes back in contractions."""
    spaced = answer.replace("\n", " ").replace("\t", " ").strip()
    words = (VQA_NUMBERS.get(word, word) for word in _vqa_punctuation(spaced).lower().split())
    return " ".join(VQA_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _vqa_punctuation(text: str) -> str:
    """A sign inside a word becomes a blank, one at the edge of a word, or any in a text with 1,000s, goes without
    trace; a full stop goes unless a digit follows."""
    thousands = re.search(r"\d,\d", text)
    cleaned = text
    for sign in VQA_PUNCTUATION:
        at_edge = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if at_edge or thousands else " ")
    return re.sub(r"\.(?!\d)", "", cleaned)


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


def top_k(scores: np.ndarray, labels: Sequence[int], k: int) -> float:
    """Share of samples whose label is among the k classes of the highest score; scores (sample, class).

    A class that ties with the right one counts before it. Raises ValueError for shapes that do not fit, labels out of
    range (with the sample) and scores that are not numbers.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or scores.size == 0 or labels.shape != scores.shape[:1]:
        raise ValueError(f"expected scores (sample, class) and one label a sample, found {scores.shape} and "
                         f"{labels.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"the scores of sample {np.isnan(scores).any(axis=1).argmax()} hold NaN")
    outside = (labels < 0) | (labels >= scores.shape[1])
    if outside.any():
        raise ValueError(f"sample {outside.argmax()}: label {labels[outside.argmax()]} is not one of the "
                         f"{scores.shape[1]} classes, numbered from 0")
    right = scores[np.arange(len(labels)), labels]
    better = (scores >= right[:, None]).sum(axis=1) - 1
    return float((better < k).mean())


def matthews(truths: Sequence[bool], predictions: Sequence[bool]) -> float:
    """Matthews' correlation of two classes, in [-1, 1] (CoLA); 0 if either side has one class only."""
    return _correlation(*_two_classes(truths, predictions))


def f1(truths: Sequence[bool], predictions: Sequence[bool]) -> float:
    """F1 of the class "true", in [0, 1] (MRPC, QQP); 0 if nothing is true on either side."""
    truths, predictions = _two_classes(truths, predictions)
    hits, total = float((truths * predictions).sum()), float(truths.sum() + predictions.sum())
    return 2 * hits / total if total else 0.0


def pearson(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Correlation of the values, in [-1, 1] (STS-B); 0 if either side is constant."""
    return _correlation(*_pairs(truths, predictions))


def spearman(truths: Sequence[float], predictions: Sequence[float]) -> float:
    """Correlation of the ranks, in [-1, 1] (STS-B); equal values share the mean of their ranks."""
    return _correlation(*(_mean_ranks(values) for values in _pairs(truths, predictions)))


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (..., 4) as (centre x, centre y, width, height): (...)."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    low = np.maximum(first[..., :2] - first[..., 2:] / 2, second[..., :2] - second[..., 2:] / 2)
    high = np.minimum(first[..., :2] + first[..., 2:] / 2, second[..., :2] + second[..., 2:] / 2)
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    union = np.prod(first[..., 2:], axis=-1) + np.prod(second[..., 2:], axis=-1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def grounding_accuracy(truths: np.ndarray, predictions: np.ndarray) -> float:
    """Share of boxes (sample, 4) whose intersection over union with the true one is 0.5 or more (RefCOCO)."""
    truths, predictions = np.asarray(truths, float), np.asarray(predictions, float)
    if truths.shape != predictions.shape or truths.ndim != 2 or truths.shape[1] != 4 or not len(truths):
        raise ValueError(f"expected two arrays of boxes (sample, 4), found {truths.shape} and {predictions.shape}")
    return float((box_iou(truths, predictions) >= 0.5).mean())


def _two_classes(truths: Sequence[bool], predictions: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    for name, values in (("truths", truths), ("predictions", predictions)):
        if not set(np.asarray(values).ravel().tolist()) <= {0, 1}:
            raise ValueError(f"expected {name} of two classes, false and true, found {sorted(set(values))[:4]}")
    return _pairs(truths, predictions)


def _pairs(truths: Sequence[float], predictions: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    truths, predictions = np.asarray(truths, float), np.asarray(predictions, float)
    if truths.ndim != 1 or truths.shape != predictions.shape or not len(truths):
        raise ValueError(f"expected one truth and one prediction a sample, found {truths.shape} and "
                         f"{predictions.shape}")
    if not (np.isfinite(truths).all() and np.isfinite(predictions).all()):
        raise ValueError("truths or predictions hold values that are not finite")
    return truths, predictions


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).sum() / math.sqrt((first**2).sum() * (second**2).sum()))


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


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
