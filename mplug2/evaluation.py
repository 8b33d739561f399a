"""What a model learned: captions, answers and retrieval on one split of a data set, as flat numbers.

Keys on clips: caption_exact, caption_cider, caption_bleu4; qa_<kind of question>; t2v_r1, v2t_r1, ..._r5, ..._r10,
..._r1_rerank. On pictures the same with the prefix `image_`. All but CIDEr are shares, from 0 to 1.
"""

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from mplug2.data.records import Record, available, read_records
from mplug2.inference import Predictor
from mplug2.metrics import bleu, cider_d, exact_match, retrieval
from mplug2.model import TASKS
from mplug2.tokenizer import clean


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One line of a contact sheet or of a predictions file."""

    task: str
    media: Path
    question: str
    prediction: str
    truth: tuple[str, ...]


def evaluate(
    predictor: Predictor, root: Path, split: str, limit: int | None = None
) -> tuple[dict[str, float], list[Prediction]]:
    """All that the model has the modules for and the folder `root` the files. `limit`: only the first records."""
    parts, there = TASKS[predictor.model.task], available(root)
    metrics: dict[str, float] = {}
    predictions: list[Prediction] = []
    for kind, prefix in (("video", ""), ("image", "image_")):
        if parts.decoder and split in there.get(f"{kind}_caption", ()):
            found, written = captions(predictor, read_records(root, f"{kind}_caption", split)[:limit], kind)
            metrics |= {f"{prefix}{key}": value for key, value in found.items()}
            predictions += written
        if parts.decoder and parts.fusion and split in there.get(f"{kind}_qa", ()):
            found, written = answers(predictor, read_records(root, f"{kind}_qa", split)[:limit], kind)
            metrics |= {f"{prefix}{key}": value for key, value in found.items()}
            predictions += written
        if parts.contrastive and split in there.get(f"{kind}_retrieval", ()):
            found = galleries(predictor, read_records(root, f"{kind}_retrieval", split)[:limit])
            metrics |= {f"{prefix}{key}": value for key, value in found.items()}
    return metrics, predictions


def captions(predictor: Predictor, records: list[Record], kind: str) -> tuple[dict[str, float], list[Prediction]]:
    media = [record.video or record.image for record in records]
    written = predictor.caption(media)
    references = [[clean(caption) for caption in record.captions] for record in records]
    metrics = {
        "caption_exact": exact_match(references, written),
        "caption_cider": cider_d(references, written)[0],
        "caption_bleu4": bleu(references, written)[3],
    }
    return metrics, [
        Prediction(f"{kind}_caption", path, "", text, tuple(truth))
        for path, text, truth in zip(media, written, references)
    ]


def answers(predictor: Predictor, records: list[Record], kind: str) -> tuple[dict[str, float], list[Prediction]]:
    asked = [(record.video or record.image, question) for record in records for question in record.qa]
    written = predictor.answer([media for media, _ in asked], [question.question for _, question in asked])
    by_kind = defaultdict(list)
    for (_, question), text in zip(asked, written):
        by_kind[question.kind or "all"].append((question.answers, text))
    metrics = {
        f"qa_{name}": exact_match([list(truth) for truth, _ in pairs], [text for _, text in pairs])
        for name, pairs in sorted(by_kind.items())
    }
    return metrics, [
        Prediction(f"{kind}_qa", media, question.question, text, question.answers)
        for (media, question), text in zip(asked, written)
    ]


def galleries(predictor: Predictor, records: list[Record], rerank: int = 16) -> dict[str, float]:
    """Mean over the galleries. The text of a record is the first of its captions; records of equal meaning are right
    answers for each other. The `rerank` best by cosine are ranked anew by the matching head."""
    by_gallery = defaultdict(list)
    for record in records:
        by_gallery[record.gallery].append(record)
    found = [gallery_metrics(predictor, of_gallery, rerank) for of_gallery in by_gallery.values()]
    return {key: float(np.mean([metrics[key] for metrics in found])) for key in found[0]}


@torch.no_grad()
def gallery_metrics(predictor: Predictor, records: list[Record], rerank: int) -> dict[str, float]:
    texts = [record.captions[0] for record in records]
    vision = torch.stack(predictor.encode_media([record.video or record.image for record in records]))
    unit_vision, unit_text = predictor.model.project_vision(vision), predictor.embed(texts)
    meaning = np.array([record.meaning for record in records])
    positives = meaning[:, None] == meaning[None, :]
    cosines = (unit_text @ unit_vision.T).cpu()
    metrics = {}
    for name, scores in (("t2v", cosines), ("v2t", cosines.T)):
        ranks = retrieval(scores.numpy(), positives)
        metrics |= {f"{name}_{key}": float(ranks[key]) for key in ("r1", "r5", "r10")}
        best = scores.topk(min(rerank, len(records)), dim=1).indices
        # Candidates outside the best keep their order below them: cosines are at most 1, probabilities at least 0.
        again = scores - 2
        for query, candidates in enumerate(best):
            if name == "t2v":
                again[query, candidates] = predictor.match(vision[candidates], [texts[query]] * len(candidates)).cpu()
            else:
                again[query, candidates] = predictor.match(
                    vision[query : query + 1], [texts[i] for i in candidates.tolist()]
                ).cpu()
        metrics[f"{name}_r1_rerank"] = float(retrieval(again.numpy(), positives)["r1"])
    return metrics


def table(by_split: dict[str, dict[str, float]]) -> str:
    """A row for each metric, a column for each split; shares in per cent, CIDEr as it is."""
    names = list(dict.fromkeys(name for metrics in by_split.values() for name in metrics))
    lines = [f"{'':<24}" + "".join(f"{split:>10}" for split in by_split)]
    for name in names:
        scale, digits = (1, 3) if name.endswith("cider") else (100, 1)
        cells = [f"{metrics[name] * scale:>10.{digits}f}" if name in metrics else f"{'':>10}"
                 for metrics in by_split.values()]
        lines.append(f"{name:<24}" + "".join(cells))
    return "\n".join(lines)
