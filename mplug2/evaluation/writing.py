"""Evaluation of what the decoder writes: captions and answers."""

from collections import defaultdict

from mplug2.data.text import normalize
from mplug2.evaluation.captions import bleu, cider_d, paper_captions, rouge_l
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.vqa import exact_match, vqa_accuracy
from mplug2.predictor import Predictor

VOTES = 10
"""Answers per question in VQAv2."""


def evaluate_captions(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, float], list[Prediction]]:
    """Captions are compared with all captions of the record, both normalized; the papers' pipeline takes them raw."""
    records = data.records(task)
    written = predictor.caption([record.video or record.image for record in records], options.beams)
    predictions = [
        Prediction(task, (record.video or record.image,), "", text, tuple(map(normalize, record.captions)), record.id)
        for record, text in zip(records, written)
    ]
    references = [list(prediction.truth) for prediction in predictions if prediction.truth]
    texts = [normalize(prediction.prediction) for prediction in predictions if prediction.truth]
    if not texts:
        return {}, predictions
    metrics = {
        "caption_exact": exact_match(references, texts),
        "caption_cider": cider_d(references, texts)[0],
        "caption_bleu4": bleu(references, texts)[3],
        "caption_rouge_l": rouge_l(references, texts),
    }
    if options.paper_captions:
        raw = [list(record.captions) for record in records if record.captions]
        metrics |= {f"caption_paper_{name}": value for name, value in paper_captions(raw, texts).items()}
    return metrics, predictions


def evaluate_answers(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, float], list[Prediction]]:
    """Answers are scored for each kind of question, and, where every question has ten answers, as VQAv2 does."""
    asked = [(record, question) for record in data.records(task) for question in record.qa]
    media = [record.video or record.image for record, _ in asked]
    written = predictor.answer(media, [question.question for _, question in asked], answer_list=options.answer_list)
    by_kind = defaultdict(list)
    for (_, question), text in zip(asked, written):
        if question.answers:
            by_kind[question.kind or "all"].append((list(question.answers), text))
    metrics = {f"qa_{kind}": exact_match(*map(list, zip(*pairs))) for kind, pairs in sorted(by_kind.items())}
    scored = [pair for pairs in by_kind.values() for pair in pairs]
    if scored and all(len(answers) == VOTES for answers, _ in scored):
        metrics["vqa_accuracy"] = vqa_accuracy(*map(list, zip(*scored)))
    return metrics, [
        Prediction(task, (path,), question.question, text, tuple(map(normalize, question.answers)), record.id)
        for path, (record, question), text in zip(media, asked, written)
    ]
