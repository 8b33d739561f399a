"""Chance level."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from mplug2.data.records import available, read_records
from mplug2.data.text import clean
from mplug2.evaluation.evaluate import DIRECTIONS
from mplug2.objectives.losses import generalized_iou
from mplug2.tasks import EVALUATED


def chance_level(root: Path, split: str, limit: int | None = None) -> dict[str, float]:
    """What the metrics of a model are that looks at nothing: it knows the commonest answer to each kind of question,
    the commonest label, and the mean box of the split, and ranks a gallery at random."""
    there, found = available(root), {}
    for task in EVALUATED:
        if split not in there.get(task, ()):
            continue
        records = [record for record in read_records(root, task, split)[:limit] if not record.unlabelled]
        if not records:
            continue
        modality, _, what = task.partition("_")
        prefix = "image_" if modality == "image" else ""
        if what == "qa":
            by_kind = defaultdict(list)
            for question in (question for record in records for question in record.qa):
                by_kind[question.kind or "all"].append({clean(answer) for answer in question.answers})
            for kind, asked in by_kind.items():
                commonest = Counter(answer for accepted in asked for answer in accepted).most_common(1)[0][1]
                found[f"{prefix}qa_{kind}"] = commonest / len(asked)
        elif what == "retrieval":
            of_gallery = Counter((record.gallery, record.positive_id) for record in records)
            sizes = Counter(record.gallery for record in records)
            for k in (1, 5, 10):
                # One minus the chance that k draws miss all the right ones.
                values = [
                    1 - math.comb(n - right, min(k, n)) / math.comb(n, min(k, n))
                    for record in records for n, right in [
                        (sizes[record.gallery], of_gallery[record.gallery, record.positive_id])]
                ]
                found |= {f"{way}_r{k}": float(np.mean(values)) for way in DIRECTIONS[modality]}
            found |= {f"{way}_r1_rerank": found[f"{way}_r1"] for way in DIRECTIONS[modality]}
        elif task == "grounding":
            truth = torch.tensor([record.box for record in records])
            overlap = generalized_iou(truth.mean(dim=0).expand_as(truth), truth)[0]
            found |= {"grounding_accuracy": float((overlap >= 0.5).float().mean()),
                      "grounding_iou": float(overlap.mean())}
        elif what == "caption":
            commonest = Counter(clean(caption) for record in records for caption in set(record.captions))
            found[f"{prefix}caption_exact"] = commonest.most_common(1)[0][1] / len(records)
        elif isinstance(records[0].label, str):
            share = Counter(record.label for record in records).most_common(1)[0][1] / len(records)
            found |= {f"{task}_accuracy": share, f"{task}_zero_shot": share}
    return found
