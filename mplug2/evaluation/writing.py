"""Evaluation of what the decoder writes: captions and answers."""

from collections import defaultdict

from mplug2.data.media_batches import Medium
from mplug2.data.text import normalize
from mplug2.evaluation.bootstrap import Score, Statistic, mean, ratio_of_sums, with_errors
from mplug2.evaluation.captions import bleu, bleu_counts, cider_d, paper_captions, rouge_l
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.labels import files_of
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.vqa import VOTES, exact_match, vqa_accuracy
from mplug2.predictor import Predictor
from mplug2.tasks import PROMPTS, TASKS


def evaluate_captions(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, Score], list[Prediction]]:
    """Captions are compared with all captions of the record, both normalized; the papers' pipeline takes them raw.

    A caption that was written without a prompt loses everything up to the prompt, if the model wrote that itself.
    """
    records = data.records(task)
    media = [Medium.of_record(record) for record in records]
    written = list(zip(records, media, predictor.caption(media, **vars(options.caption))))
    written = [(record, medium, text) for record, medium, text in written if text is not None]  # None: not readable
    if not options.caption.prompted:
        prompt = PROMPTS[TASKS[task].modality]
        written = [(record, medium, text.rpartition(f"{prompt} ")[2]) for record, medium, text in written]
    predictions = [
        Prediction(task, medium.paths, "", text, tuple(map(normalize, record.captions)), record.id)
        for record, medium, text in written
    ]
    references = [list(prediction.truth) for prediction in predictions if prediction.truth]
    texts = [normalize(prediction.prediction) for prediction in predictions if prediction.truth]
    if not texts or not predictor.is_main:
        return {}, predictions
    scores = with_errors({
        "caption_exact": mean(exact_match(references, texts)),
        "caption_cider": mean(cider_d(references, texts)),
        "caption_bleu4": ratio_of_sums(bleu_counts(references, texts), lambda sums: bleu(sums)[..., 3]),
        "caption_rouge_l": mean(rouge_l(references, texts)),
    })
    if options.paper_captions:
        raw = [list(record.captions) for record, _, _ in written if record.captions]
        scores |= {f"caption_paper_{name}": Score(value, 0.0) for name, value in paper_captions(raw, texts).items()}
    return scores, predictions


def evaluate_answers(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, Score], list[Prediction]]:
    """Answers are scored in total, for each kind of question, and as in VQAv2 if every question has ten answers."""
    asked = [(record, question) for record in data.records(task) for question in record.qa]
    media = None if TASKS[task].modality == "text" else [Medium.of_record(record) for record, _ in asked]
    settings = {**vars(options.answer), "answer_list": options.answer_list}
    written = predictor.answer(media, [question.question for _, question in asked], **settings)
    answered = [(record, question, text) for (record, question), text in zip(asked, written) if text is not None]
    predictions = [
        Prediction(task, files_of(record), question.question, text,
                   tuple(map(normalize, question.answers)), record.id)
        for record, question, text in answered
    ]
    if not predictor.is_main:
        return {}, predictions
    statistics: dict[str, Statistic] = {}
    groups: dict[str, list[tuple]] = defaultdict(list)
    for record, question, text in answered:
        if question.answers:
            row = (record.id, list(question.answers), text)
            groups["accuracy"].append(row)
            if question.kind:
                groups[question.kind].append(row)
    for kind in sorted(groups):
        records, truths, texts = map(list, zip(*groups[kind]))
        statistics[f"qa_{kind}"] = mean(exact_match(truths, texts), records)
        if kind == "accuracy" and all(len(answers) == VOTES for answers in truths):
            lower = [[answer.lower() for answer in answers] for answers in truths]  # as those of VQAv2, and the model's
            statistics["vqa_accuracy"] = mean(vqa_accuracy(lower, texts), records)
    return with_errors(statistics), predictions
