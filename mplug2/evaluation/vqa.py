"""VQA metrics."""

import re

from mplug2.data.text import normalize
from mplug2.evaluation.captions import _check_samples

VQA_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
VQA_NUMBERS["none"] = "0"
VQA_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
VQA_CONTRACTIONS = {
    word[:place] + word[place + 1:]: word for word in (
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


def vqa_accuracy(answers: list[list[str]], predictions: list[str]) -> float:
    """The accuracy of VQAv2, in [0, 1]: an answer counts in full if three of the ten people gave it.

    It is averaged over the ways to leave one person out: min(1, how many of the others agree / 3). As in the official
    evaluation the prediction is normalized (`vqa_normalize`), and people's answers lose their punctuation where they
    are not all the same. Source: Antol et al. 2015, "VQA: Visual Question Answering", and its evaluation code
    (github.com/GT-Vision-Lab/VQA). Raises ValueError as `bleu` does.
    """
    _check_samples(answers, predictions)
    scores = []
    for given, prediction in zip(answers, predictions):
        prediction = vqa_normalize(prediction)
        if len(set(given)) > 1:
            given = [_vqa_punctuation(answer) for answer in given]
        hits = sum(answer == prediction for answer in given)
        # Leaving out one who agrees leaves hits - 1 of them; leaving out one who does not leaves them all.
        total = hits * min(1.0, (hits - 1) / 3) + (len(given) - hits) * min(1.0, hits / 3) if hits else 0.0
        scores.append(total / len(given))
    return sum(scores) / len(scores)


def vqa_normalize(answer: str) -> str:
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


def exact_match(answers: list[list[str]], predictions: list[str]) -> float:
    """Fraction, in [0, 1], of predictions that equal one of their accepted answers after `normalize`.

    Raises ValueError as `bleu` does.
    """
    _check_samples(answers, predictions)
    hits = [normalize(prediction) in map(normalize, accepted) for accepted, prediction in zip(answers, predictions)]
    return sum(hits) / len(hits)
