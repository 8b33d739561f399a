"""Metrics of answers: exact match, and the accuracy of VQAv2 with its normalization."""

import re

from mplug2.data.text import normalize, split_characters, strip_marks
from mplug2.evaluation.captions import check_samples

VOTES = 10
"""Answers per question in VQAv2."""
VQA_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
VQA_NUMBERS["none"] = "0"
VQA_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
VQA_CONTRACTIONS = {
    word[:i] + word[i + 1:]: word for word in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
        "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
        "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
        "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
        "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
        "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
        "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've "
        "you'll you're you've"
    ).split() for i, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}
"""The official table: contractions without one of their apostrophes, and the form in which answers are compared. Its
entry for "somebody'd" is reversed, which we keep."""


def vqa_accuracy(answers: list[list[str]], predictions: list[str]) -> list[float]:
    """The VQAv2 accuracy of each answer, in [0, 1]: an answer counts in full if three of ten annotators gave it.

    It is the mean of min(1, annotators that agree / 3) over all ways to leave one annotator out. Prediction and answers
    are normalized with `vqa_normalize`, unless all answers of a question are the same. Letters of scripts without
    blanks between words count as words, and accents are removed (`strip_marks`). ASCII text is scored as in the
    official code. Raises ValueError as `bleu_counts` does.

    Source: Antol et al. 2015, "VQA: Visual Question Answering", and its evaluation code as corrected in March 2021
    (github.com/GT-Vision-Lab/VQA, commit a013f00). Before, only predictions were normalized in full.
    """
    check_samples(answers, predictions)
    scores = []
    for given, prediction in zip(answers, predictions):
        prediction, *given = map(_vqa_spaces, (prediction, *given))
        if len(set(given)) > 1:
            prediction, *given = map(vqa_normalize, (prediction, *given))
        hits = sum(answer == prediction for answer in given)
        # Without an annotator that agrees, hits - 1 are left; without one that does not, all of them.
        total = hits * min(1.0, (hits - 1) / 3) + (len(given) - hits) * min(1.0, hits / 3) if hits else 0.0
        scores.append(total / len(given))
    return scores


def vqa_normalize(answer: str) -> str:
    """The normalization of VQAv2: lower case, no articles, no punctuation, numbers up to ten as digits, and the
    apostrophes of contractions restored."""
    words = (VQA_NUMBERS.get(word, word) for word in _vqa_punctuation(_vqa_spaces(answer)).lower().split())
    return " ".join(VQA_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _vqa_spaces(text: str) -> str:
    """The text without line breaks, tabs and accents, its letters apart if their script has no blanks between words."""
    text = strip_marks(text).replace("\n", " ").replace("\t", " ").strip()
    spaced = split_characters(text)
    return text if spaced == text else " ".join(spaced.split())


def _vqa_punctuation(text: str) -> str:
    """A punctuation mark inside a word becomes a space. At the edge of a word, and in a text with numbers such as
    1,000, it is removed. A full stop is removed unless a digit follows."""
    thousands = re.search(r"\d,\d", text)
    cleaned = text
    for sign in VQA_PUNCTUATION:
        at_edge = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if at_edge or thousands else " ")
    return re.sub(r"\.(?!\d)", "", cleaned)


def exact_match(answers: list[list[str]], predictions: list[str]) -> list[bool]:
    """Whether each prediction equals one of its accepted answers after `normalize`.

    Raises ValueError as `bleu_counts` does.
    """
    check_samples(answers, predictions)
    return [normalize(prediction) in map(normalize, accepted) for accepted, prediction in zip(answers, predictions)]
