"""What a model learned: captions, answers, retrieval, classes and boxes on one split of a data set, as flat numbers.

Keys on clips: caption_exact, caption_cider, caption_bleu4, caption_rouge_l, and caption_paper_<metric> of the papers'
pipeline; qa_<kind of question>, vqa_accuracy where there are ten answers each; t2v_r1, v2t_r1, ..._r5, ..._r10,
..._median_rank, ..._r1_rerank. On pictures the same with the prefix `image_`. Of labels <task>_accuracy, _top5 where
there are more classes, _matthews and _f1 where there are two; of numbers <task>_pearson and <task>_spearman, of classes
that are told by captions alone <task>_zero_shot; grounding_accuracy (boxes that overlap the true one by half) and
grounding_iou. All but CIDEr, correlations and ranks are shares, from 0 to 1.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mplug2.data.records import Record, available, read_records
from mplug2.data.text import clean
from mplug2.evaluation.captions import bleu, cider_d, paper_captions, rouge_l
from mplug2.evaluation.ranking import f1, grounding_accuracy, matthews, pearson, retrieval, spearman, top_k
from mplug2.evaluation.vqa import exact_match, vqa_accuracy
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.losses import generalized_iou
from mplug2.predictor import Predictor
from mplug2.tasks import EVALUATED, PROMPTS, TASKS

CANDIDATES = 32
"""Answers of a list that are scored whole."""
DIRECTIONS = {"video": ("t2v", "v2t"), "image": ("t2i", "i2t")}
"""Names of the two directions of retrieval, from text and to text."""
VOTES = 10
"""Answers that VQAv2 has of each question."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One line of a contact sheet or of a predictions file."""

    task: str
    media: Path | None
    question: str
    """Or the text that a label or a box is about, or that a file is looked for by."""
    prediction: str | float | tuple[float, ...]
    truth: tuple
    second: Path | None = None
    """The other picture of a pair."""
    right: bool | None = None
    """Without it: is the prediction one of the truths?"""
    id: str = ""
    """Of the record."""
    confidence: float | None = None
    """Probability of the class that was predicted."""

    def line(self, split: str) -> dict:
        """As in predictions.jsonl."""
        media = [str(path) for path in (self.media, self.second) if path]
        line = {"task": self.task, "split": split, "id": self.id, "media": media, "question": self.question,
                "prediction": self.prediction, "truth": list(self.truth)}
        return line if self.confidence is None else {**line, "confidence": round(self.confidence, 4)}


def supports(model: MPLUG2, task: str) -> bool:
    """Whether the model has the modules for a task: for classes its head, or VTC, which compares with captions."""
    needed, built = TASKS[task].components, model.components
    if "classifier" in needed:
        return task in model.classes or ("contrastive" in built and "vision" in needed and "fusion" not in needed)
    return needed - {"temporal", "matching"} <= built


def evaluate(
    predictor: Predictor, root: Path, split: str, limit: int | None = None, tasks: Sequence[str] | None = None,
    answer_list: Sequence[str] | None = None, beams: int = 1, paper: bool = False, all_captions: bool = False,
) -> tuple[dict[str, float], list[Prediction]]:
    """All that the model has the modules for and the folder `root` the files; or these `tasks` only. `limit`: only the
    first records of each. `answer_list`: answers to rank, instead of writing them. `beams`: of the search for captions.
    `paper`: captions by the papers' pipeline too. `all_captions`: every caption is a query of retrieval, not only the
    first. Unlabelled records are predicted, but not scored.

    Raises ValueError for a task among `tasks` that is unknown, or that the model has no modules for.
    """
    there = available(root)
    for task in tasks or ():
        if task not in EVALUATED:
            raise ValueError(f"task {task!r} cannot be evaluated; known are {', '.join(EVALUATED)}")
        if not supports(predictor.model, task):
            raise ValueError(f"a model for {predictor.model.task} has not the modules for {task}; "
                             f"fine-tune it: train.py --task {task} --init")
    metrics: dict[str, float] = {}
    predictions: list[Prediction] = []
    for task in EVALUATED:
        if split not in there.get(task, ()) or not supports(predictor.model, task) or (tasks and task not in tasks):
            continue
        records = read_records(root, task, split)[:limit]
        modality, _, what = task.partition("_")
        prefix = "image_" if modality == "image" else ""
        if what == "caption":
            found, written = evaluate_captions(predictor, records, modality, beams, paper)
        elif what == "qa":
            found, written = evaluate_answers(predictor, records, modality, answer_list)
        elif what == "retrieval":
            prefix, (found, written) = "", evaluate_retrieval(predictor, task, records, all_captions=all_captions)
        elif task == "grounding":
            prefix, (found, written) = "", evaluate_boxes(predictor, records)
        else:
            prefix, (found, written) = f"{task}_", evaluate_labels(predictor, task, records, root)
        metrics |= {f"{prefix}{key}": value for key, value in found.items()}
        predictions += written
    return metrics, predictions


def evaluate_captions(
    predictor: Predictor, records: list[Record], kind: str, beams: int = 1, paper: bool = False
) -> tuple[dict[str, float], list[Prediction]]:
    media = [record.video or record.image for record in records]
    written = predictor.caption(media, beams)
    references = [[clean(caption) for caption in record.captions] for record in records]
    scored = [(record.captions, truths, text) for record, truths, text in zip(records, references, written) if truths]
    metrics = {}
    if scored:
        raw, truths, texts = map(list, zip(*scored))
        metrics = {
            "caption_exact": exact_match(truths, texts),
            "caption_cider": cider_d(truths, texts)[0],
            "caption_bleu4": bleu(truths, texts)[3],
            "caption_rouge_l": rouge_l(truths, texts),
        }
        if paper:
            found = paper_captions([list(captions) for captions in raw], texts)
            metrics |= {f"caption_paper_{name}": value for name, value in found.items()}
    return metrics, [
        Prediction(f"{kind}_caption", path, "", text, tuple(truth), id=record.id)
        for path, text, truth, record in zip(media, written, references, records)
    ]


def evaluate_answers(
    predictor: Predictor, records: list[Record], kind: str, answer_list: Sequence[str] | None = None
) -> tuple[dict[str, float], list[Prediction]]:
    asked = [(record.video or record.image, question, record.id) for record in records for question in record.qa]
    media, questions = [media for media, _, _ in asked], [question.question for _, question, _ in asked]
    if answer_list is None:
        written = predictor.answer(media, questions)
    else:
        written = predictor.answer(media, questions, answer_list=answer_list, candidates=CANDIDATES)
    by_kind = defaultdict(list)
    for (_, question, _), text in zip(asked, written):
        if question.answers:
            by_kind[question.kind or "all"].append((list(question.answers), text))
    metrics = {
        f"qa_{name}": exact_match([truth for truth, _ in pairs], [text for _, text in pairs])
        for name, pairs in sorted(by_kind.items())
    }
    voted = [pair for pairs in by_kind.values() for pair in pairs]
    if voted and all(len(truth) == VOTES for truth, _ in voted):
        metrics["vqa_accuracy"] = vqa_accuracy([truth for truth, _ in voted], [text for _, text in voted])
    return metrics, [
        Prediction(f"{kind}_qa", path, question.question, text, question.answers, id=name)
        for (path, question, name), text in zip(asked, written)
    ]


def evaluate_retrieval(
    predictor: Predictor, task: str, records: list[Record], rerank: int = 16, all_captions: bool = False
) -> tuple[dict[str, float], list[Prediction]]:
    """Mean over the galleries, and the best of the re-ranked ones for each query: the id of a record for a text, a text
    for a file.
    The text of a record is the first of its captions, or all of them are, each for itself (COCO, Flickr30k); records of
    equal meaning are right answers for each other. The `rerank` best by cosine are ranked anew by the matching head."""
    by_gallery = defaultdict(list)
    for record in records:
        by_gallery[record.gallery].append(record)
    found, written = [], []
    for of_gallery in by_gallery.values():
        metrics, predictions = evaluate_gallery(predictor, task, of_gallery, rerank, all_captions)
        found.append(metrics)
        written += predictions
    return {key: float(np.mean([metrics[key] for metrics in found])) for key in found[0]}, written


@torch.no_grad()
def evaluate_gallery(
    predictor: Predictor, task: str, records: list[Record], rerank: int, all_captions: bool
) -> tuple[dict[str, float], list[Prediction]]:
    asked = [(text, record) for record in records
             for text in (record.captions if all_captions else record.captions[:1])]
    texts, media = [text for text, _ in asked], [record.video or record.image for record in records]
    vision = torch.stack(predictor.encode_media(media))
    unit_vision, unit_text = predictor.model.project_vision(vision), predictor.embed(texts)
    of_text = np.array([record.positive_id for _, record in asked])
    of_media = np.array([record.positive_id for record in records])
    right = of_text[:, None] == of_media[None, :]
    cosines = (unit_text @ unit_vision.T).cpu()
    metrics, predictions = {}, []
    to_media, to_text = DIRECTIONS[TASKS[task].modality]
    for name, scores, positives in ((to_media, cosines, right), (to_text, cosines.T, right.T)):
        ranks = retrieval(scores.numpy(), positives)
        metrics |= {f"{name}_{key}": float(ranks[key]) for key in ("r1", "r5", "r10", "median_rank")}
        best = scores.topk(min(rerank, scores.shape[1]), dim=1).indices
        # Candidates outside the best keep their order below them: cosines are at most 1, probabilities at least 0.
        again = scores - 2
        for query, candidates in enumerate(best):
            if name == to_media:
                again[query, candidates] = predictor.match_probability(
                    vision[candidates], [texts[query]] * len(candidates)).cpu()
            else:
                again[query, candidates] = predictor.match_probability(
                    vision[query: query + 1], [texts[i] for i in candidates.tolist()]
                ).cpu()
        metrics[f"{name}_r1_rerank"] = float(retrieval(again.numpy(), positives)["r1"])
        queries = asked if name == to_media else [("", record) for record in records]
        answers = [record.id for record in records] if name == to_media else texts
        for (text, record), first, is_right in zip(queries, again.argmax(dim=1).tolist(), positives):
            truth = tuple(answers[i] for i in is_right.nonzero()[0])
            shown = None if name == to_media else record.video or record.image
            predictions.append(Prediction(task, shown, text, answers[first], truth, id=record.id))
    return metrics, predictions


def evaluate_labels(
    predictor: Predictor, task: str, records: list[Record], root: Path
) -> tuple[dict[str, float], list[Prediction]]:
    """Classes by the head of the task, or numbers; without a head, classes of media by captions (`zero_shot`)."""
    media = [record.images or record.video or record.image for record in records]
    texts: list = [record.texts or record.text for record in records]
    known = [place for place, record in enumerate(records) if not record.unlabelled]
    truths = [record.label for record in records]
    confidences: list[float | None] = [None] * len(records)
    if task in predictor.model.classes:
        name, classes = "accuracy", predictor.model.classes[task]
        scores = predictor.read(
            media if any(media) else None, texts if any(texts) else None,
            lambda hidden, _: predictor.model.classify(hidden, task),
        )
        found = [classes[best] for best in scores.argmax(dim=1).tolist()] if classes else scores[:, 0].tolist()
        if classes:
            confidences = scores.softmax(dim=1).amax(dim=1).tolist()
    else:
        name, classes, scores = "zero_shot", (), None
        found = zero_shot(predictor, task, media, sorted({truths[place] for place in known}), root)
    numbers = {isinstance(truths[place], float) for place in known} or {isinstance(found[0], float)}
    if numbers != {isinstance(found[0], float)}:
        raise ValueError(f"{records[0].source}: the labels here are not of the kind that the model was made for: "
                         "one has names of classes, the other numbers")
    metrics = {}
    if known and numbers == {True}:
        pairs = [truths[place] for place in known], [found[place] for place in known]
        metrics = {"pearson": pearson(*pairs), "spearman": spearman(*pairs)}
    elif known:
        metrics = {name: float(np.mean([found[place] == truths[place] for place in known]))}
        metrics |= of_classes([truths[place] for place in known], [found[place] for place in known], classes)
        if len(classes) > 5 and {truths[place] for place in known} <= set(classes):
            right = [classes.index(truths[place]) for place in known]
            metrics["top5"] = top_k(scores[known].cpu().numpy(), right, 5)
    return metrics, [
        Prediction(
            task, shown[0] if isinstance(shown, tuple) else shown,
            " / ".join(text) if isinstance(text, tuple) else text or "", value,
            () if record.unlabelled else (record.label,), shown[1] if isinstance(shown, tuple) and shown else None,
            id=record.id, confidence=confidence,
        )
        for shown, text, value, record, confidence in zip(
            [item or None for item in media], texts, found, records, confidences
        )
    ]


def of_classes(truths: list[str], found: list[str], classes: Sequence[str]) -> dict[str, float]:
    """What GLUE scores two classes by: Matthews' correlation, and F1 where one class is the other's "not_"."""
    if len(classes) != 2:
        return {}
    positive = next((name for name in classes if f"not_{name}" in classes), classes[0])
    pairs = [truth == positive for truth in truths], [name == positive for name in found]
    return {"matthews": matthews(*pairs)} | ({"f1": f1(*pairs)} if f"not_{positive}" in classes else {})


def zero_shot(
    predictor: Predictor, task: str, media: list[Path], classes: list[str], root: Path
) -> list[str]:
    """The class whose captions each picture or clip is nearest to, by VTC, without any training on classes.

    The captions of a class are those in `<task>.captions.json` (an object: class -> list of captions), if the folder
    has that file, else "a picture of a <class>", "a video of a <class>". A class is the mean of their vectors.
    """
    file = root / f"{task}.captions.json"
    if file.is_file():
        captions = json.loads(file.read_text(encoding="utf-8"))
        if missing := [name for name in classes if not captions.get(name)]:
            raise ValueError(f"{file}: no captions of the class {missing[0]!r}")
        classes = list(captions)
    else:
        captions = {name: [f"{PROMPTS[task.split('_')[0]]} a {name}"] for name in classes}
    vectors = torch.stack([predictor.embed(captions[name]).mean(dim=0) for name in classes])
    scores = predictor.embed(media) @ torch.nn.functional.normalize(vectors, dim=1).T
    return [classes[number] for number in scores.argmax(dim=1).tolist()]


def evaluate_boxes(predictor: Predictor, records: list[Record]) -> tuple[dict[str, float], list[Prediction]]:
    records = [record for record in records if not record.unlabelled]  # no server takes boxes
    if not records:
        return {}, []
    found = predictor.predict_boxes([record.image for record in records], [record.text for record in records]).cpu()
    truths = torch.tensor([record.box for record in records])
    overlap = generalized_iou(found, truths)[0]
    return {
        "grounding_accuracy": grounding_accuracy(truths.numpy(), found.numpy()),
        "grounding_iou": float(overlap.mean()),
    }, [
        Prediction("grounding", record.image, record.text, tuple(round(x, 4) for x in box), (record.box,), None, good,
                   record.id)
        for record, box, good in zip(records, found.tolist(), (overlap >= 0.5).tolist())
    ]


def format_table(by_split: dict[str, dict[str, float]]) -> str:
    """A row for each metric, a column for each split; shares in per cent, CIDEr as it is."""
    names = list(dict.fromkeys(name for metrics in by_split.values() for name in metrics))
    width = max([23, *map(len, names)]) + 1
    column = max([8, *map(len, by_split)]) + 2
    lines = [f"{'':<{width}}" + "".join(f"{split:>{column}}" for split in by_split)]
    for name in names:
        scale, digits = (1, 3) if name.endswith("cider") else (1, 1) if name.endswith("median_rank") else (100, 1)
        cells = [f"{metrics[name] * scale:>{column}.{digits}f}" if name in metrics else f"{'':>{column}}"
                 for metrics in by_split.values()]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)
