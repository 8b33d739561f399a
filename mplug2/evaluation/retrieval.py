"""Evaluation of retrieval: a text ranks the media of its gallery, and each of them ranks the texts."""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from mplug2.data.records import Record
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.metric_names import DIRECTIONS
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.ranking import retrieval
from mplug2.predictor import Predictor
from mplug2.tasks import TASKS


def evaluate_retrieval(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, float], list[Prediction]]:
    """Metrics are means over the galleries. A prediction is the best item after re-ranking: for a text the id of a
    record, for an image or video a text."""
    galleries = defaultdict(list)
    for record in data.records(task):
        galleries[record.gallery].append(record)
    metrics, predictions = [], []
    for records in galleries.values():
        found, of_gallery = evaluate_gallery(predictor, task, records, options)
        metrics.append(found)
        predictions += of_gallery
    return {name: float(np.mean([found[name] for found in metrics])) for name in metrics[0]}, predictions


@torch.no_grad()
def evaluate_gallery(
    predictor: Predictor, task: str, records: list[Record], options: EvalOptions
) -> tuple[dict[str, float], list[Prediction]]:
    """Records with the same `positive_id` are right answers for each other."""
    queries = [(text, record) for record in records
               for text in (record.captions if options.all_captions else record.captions[:1])]
    texts, media = [text for text, _ in queries], [record.video or record.image for record in records]
    vision = torch.stack(predictor.encode_media(media))
    cosines = (predictor.embed(texts) @ predictor.model.project_vision(vision).T).cpu()
    positives = np.array([[record.positive_id == query.positive_id for record in records] for _, query in queries])

    def match(query: int, candidates: Tensor) -> Tensor:
        return predictor.match_probability(vision[candidates], [texts[query]] * len(candidates))

    def match_texts(query: int, candidates: Tensor) -> Tensor:
        return predictor.match_probability(vision[query: query + 1], [texts[i] for i in candidates.tolist()])

    to_media, to_text = DIRECTIONS[TASKS[task].modality]
    best_media, metrics = rank(cosines, positives, match, options.rerank, to_media)
    best_text, of_text = rank(cosines.T, positives.T, match_texts, options.rerank, to_text)
    predictions = [
        Prediction(task, (), text, records[best].id, tuple(records[i].id for i in right.nonzero()[0]), record.id)
        for (text, record), best, right in zip(queries, best_media, positives)
    ] + [
        Prediction(task, (path,), "", texts[best], tuple(texts[i] for i in right.nonzero()[0]), record.id)
        for path, record, best, right in zip(media, records, best_text, positives.T)
    ]
    return metrics | of_text, predictions


def rank(cosines: Tensor, positives: np.ndarray, match, rerank: int, direction: str) -> tuple[list[int], dict]:
    """The best item of each query after re-ranking, and the metrics of one direction.

    cosines and positives: (query, item). `match(query, candidates)` gives the matching probabilities of the `rerank`
    best items by cosine.
    """
    ranks = retrieval(cosines.numpy(), positives)
    metrics = {f"{direction}_{name}": float(ranks[name]) for name in ("r1", "r5", "r10", "median_rank")}
    # All other items keep their order below the candidates: cosines are at most 1, probabilities at least 0.
    scores = cosines - 2
    for query, candidates in enumerate(cosines.topk(min(rerank, cosines.shape[1]), dim=1).indices):
        scores[query, candidates] = match(query, candidates).cpu()
    metrics[f"{direction}_r1_rerank"] = float(retrieval(scores.numpy(), positives)["r1"])
    return scores.argmax(dim=1).tolist(), metrics
