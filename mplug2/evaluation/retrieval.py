"""Evaluation of retrieval: a text ranks the media of its gallery, and each of them ranks the texts.

The first ranking compares unit vectors, which every rank has for the whole gallery. The matching head then re-ranks the
best candidates of each query. That needs visual tokens, which are large: each rank keeps those of its own share, in
half precision and off the device, and scores the pairs whose image or video it holds.

Axes: b texts, v visual tokens, l text tokens, d width, k candidates.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mplug2.data.media_batches import Medium
from mplug2.data.records import Record
from mplug2.evaluation.bootstrap import Score, mean, mean_of, with_errors
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.metric_names import DIRECTIONS
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.ranking import ranks, retrieval
from mplug2.inference import repeat_to
from mplug2.predictor import Predictor
from mplug2.tasks import TASKS

ROWS = 1024
"""Queries that are compared with a whole gallery at a time."""


def evaluate_retrieval(
    predictor: Predictor, task: str, data: EvalSplit, options: EvalOptions
) -> tuple[dict[str, Score], list[Prediction]]:
    """Metrics are means over the galleries. A prediction is the best item after re-ranking: for a text the id of a
    record, for an image or video a text. Unlabelled records, which have no text, are left out."""
    galleries = defaultdict(list)
    for record in data.records(task):
        if not record.unlabelled:
            galleries[record.gallery].append(record)
    found, predictions = [], []
    for records in galleries.values():
        scores, of_gallery = evaluate_gallery(predictor, task, records, options)
        found += [scores] if scores else []
        predictions += of_gallery
    return {name: mean_of([scores[name] for scores in found]) for name in (found[0] if found else ())}, predictions


def evaluate_gallery(
    predictor: Predictor, task: str, records: list[Record], options: EvalOptions
) -> tuple[dict[str, Score], list[Prediction]]:
    """Records with the same `positive_id` are right answers for each other."""
    tokens: dict[int, Tensor] = {}  # V' `v d` of this rank's share

    def keep(vision: Tensor, _, indices: list[int]) -> Tensor:
        tokens.update(zip(indices, repeat_to(vision.to("cpu", torch.float16), len(indices))))
        return repeat_to(predictor.model.project_vision(vision).float().cpu(), len(indices))

    vectors = predictor.on_media([Medium.of_record(record) for record in records], keep)
    readable = [i for i, vector in enumerate(vectors) if vector is not None]
    if not readable:
        return {}, []
    tokens = {new: tokens[old] for new, old in enumerate(readable) if old in tokens}
    records, unit_vision = [records[i] for i in readable], torch.stack([vectors[i] for i in readable])
    queries = [(text, record) for record in records
               for text in (record.captions if options.all_captions else record.captions[:1])]
    texts, owners = [text for text, _ in queries], [record for _, record in queries]
    unit_text = torch.stack(predictor.on_texts(texts, lambda text, _: predictor.model.project_text(text).float().cpu()))

    media_ids, text_ids = (np.array([record.positive_id for record in side]) for side in (records, owners))
    media_ranks, media_best = rank_all(unit_text, unit_vision, text_ids, media_ids, options.rerank)
    text_ranks, text_best = rank_all(unit_vision, unit_text, media_ids, text_ids, options.rerank)
    pairs = {(int(medium), text) for text, row in enumerate(media_best) for medium in row}
    pairs |= {(medium, int(text)) for medium, row in enumerate(text_best) for text in row}
    matched = match_pairs(predictor, tokens, texts, pairs)
    if not predictor.is_main:
        return {}, []

    to_media, to_text = DIRECTIONS[TASKS[task].modality]
    of_text = [[matched[int(medium), text] for medium in row] for text, row in enumerate(media_best)]
    of_media = [[matched[medium, int(text)] for text in row] for medium, row in enumerate(text_best)]
    scores, first_media = score(to_media, media_ranks, media_best, of_text, text_ids, media_ids, owners)
    more, first_text = score(to_text, text_ranks, text_best, of_media, media_ids, text_ids, records)
    media_of, texts_of = defaultdict(list), defaultdict(list)
    for record in records:
        media_of[record.positive_id].append(record.id)
    for text, record in queries:
        texts_of[record.positive_id].append(text)
    return scores | more, [
        Prediction(task, (), text, records[best].id, tuple(media_of[record.positive_id]), record.id)
        for (text, record), best in zip(queries, first_media)
    ] + [
        Prediction(
            task, Medium.of_record(record).paths, "", texts[best], tuple(texts_of[record.positive_id]), record.id)
        for record, best in zip(records, first_text)
    ]


def rank_all(
    queries: Tensor, items: Tensor, query_ids: np.ndarray, item_ids: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each query's best positive by cosine (query,), and its k best items, best first (query, k)."""
    found, best = [], []
    for first in range(0, len(queries), ROWS):
        rows = slice(first, first + ROWS)
        cosines = queries[rows] @ items.T
        found.append(ranks(cosines.numpy(), query_ids[rows, None] == item_ids[None, :]))
        best.append(cosines.topk(min(k, len(items)), dim=1).indices.numpy())
    return np.concatenate(found), np.concatenate(best)


def match_pairs(
    predictor: Predictor, tokens: dict[int, Tensor], texts: Sequence[str], pairs: set[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """The matching probability of each pair (medium, text), from the ranks that hold the tokens of its medium."""
    wanted = defaultdict(list)
    for medium, text in sorted(pairs):
        if medium in tokens:
            wanted[medium].append(text)
    encoded = encode_texts(predictor, texts, {text for of_medium in wanted.values() for text in of_medium})
    size = predictor.inference.batch_size
    batches = [(medium, wanted[medium][first: first + size])
               for medium in wanted for first in range(0, len(wanted[medium]), size)]

    def results():
        for medium, chosen in batches:
            length = max(len(encoded[text]) for text in chosen)
            text = torch.zeros(len(chosen), length, encoded[chosen[0]].shape[1])
            mask = torch.zeros(len(chosen), length, dtype=torch.bool)
            for row, one in enumerate(chosen):
                text[row, : len(encoded[one])], mask[row, : len(encoded[one])] = encoded[one], True
            vision = tokens[medium][None].to(predictor.device, torch.float32)
            _, fused = predictor.model.fuse(vision, text.to(predictor.device), mask.to(predictor.device))
            matched = predictor.model.itm_logits(fused).float().softmax(dim=-1)[:, 1]
            yield [(medium, one) for one in chosen], matched.tolist()

    return predictor.collect(results(), len(batches))


def encode_texts(predictor: Predictor, texts: Sequence[str], wanted: set[int]) -> dict[int, Tensor]:
    """Hidden states `l d` of these texts, without padding, in half precision and off the device.

    Each rank encodes what it needs, in batches that do not depend on the rank.
    """
    encoded: dict[int, Tensor] = {}
    size = predictor.inference.batch_size

    def results():
        for first in range(0, len(texts), size):
            chosen = range(first, min(first + size, len(texts)))
            if wanted.isdisjoint(chosen):
                continue
            hidden, mask = predictor.encode_text([texts[i] for i in chosen])
            lengths = mask.sum(dim=1).tolist()
            hidden = hidden.to("cpu", torch.float16)
            encoded.update((i, hidden[row, : lengths[row]]) for row, i in enumerate(chosen) if i in wanted)
            yield [], []

    predictor.collect(results(), len(range(0, len(texts), size)))
    return encoded


def score(
    direction: str, first_ranks: np.ndarray, best: np.ndarray, matched: list[list[float]], query_ids: np.ndarray,
    item_ids: np.ndarray, owners: list[Record],
) -> tuple[dict[str, Score], list[int]]:
    """The metrics of one direction, and the best item of each query after re-ranking.

    `best` and `matched` are the candidates and their probabilities (query, k). A negative candidate that ties with the
    best positive counts before it.
    """
    matched, positive = np.array(matched), query_ids[:, None] == item_ids[best]
    hits = np.where(positive, matched, -1).max(axis=1) > np.where(positive, -1, matched).max(axis=1)
    records = [record.id for record in owners]
    scores = with_errors({**retrieval(first_ranks, records), "r1_rerank": mean(hits, records)})
    first = best[np.arange(len(best)), matched.argmax(axis=1)]
    return {f"{direction}_{name}": value for name, value in scores.items()}, first.tolist()
