"""Batches: which samples a step sees, as a function of the step alone; masking; the tensors of each batch type."""

from collections import Counter

import numpy as np
import pytest
import torch
from data_helpers import batch_of, batches_of, dataset, write_data, write_records
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.data.batches import Collate, MixedBatches, batch_schedule
from mplug2.data.records import RecordError
from mplug2.data.samples import check_texts, read_classes, read_samples

KIND_NAMES = ("video", "image", "text")
weights_of_kinds = st.lists(st.floats(0.01, 1), min_size=1, max_size=3).map(lambda w: dict(zip(KIND_NAMES, w)))


# ---- the order of batch types and samples ----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(weights_of_kinds, st.integers(1, 200))
def test_after_every_step_each_type_has_had_its_share(weights, steps):
    """Before a choice the k types are one step behind in total, and the furthest behind by at least 1 / k. Therefore no
    type is ever ahead by more than 1 - 1 / k."""
    kinds, k, counts = batch_schedule(weights, steps), len(weights), Counter()
    assert len(kinds) == steps
    for step, kind in enumerate(kinds, start=1):
        counts[kind] += 1
        ahead = [counts[name] - step * weight / sum(weights.values()) for name, weight in weights.items()]
        assert max(ahead) <= 1 - 1 / k + 1e-9
        assert min(ahead) >= -(k - 1) * (1 - 1 / k) - 1e-9
    assert batch_schedule(weights, steps // 2) == kinds[: steps // 2]


@st.composite
def batch_settings(draw: st.DrawFn) -> dict:
    weights = draw(weights_of_kinds)
    world_size = draw(st.integers(1, 3))
    return dict(
        sizes={kind: draw(st.integers(1, 9)) for kind in weights}, weights=weights, world_size=world_size,
        batch_size=world_size * draw(st.integers(1, 4)), steps=draw(st.integers(1, 30)),
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=20, deadline=None)
@given(batch_settings(), st.data())
def test_a_batch_is_a_function_of_its_step_alone(drawn, data):
    whole = list(MixedBatches(**drawn))
    start = data.draw(st.integers(0, drawn["steps"]))
    resumed = MixedBatches(**drawn, start=start)
    assert list(resumed) == whole[start:] and len(resumed) == len(whole[start:])
    assert list(resumed) == whole[start:]  # iterating again gives the same
    assert whole == list(MixedBatches(**{**drawn, "steps": drawn["steps"] + 3}))[: len(whole)]


@settings(max_examples=20, deadline=None)
@given(batch_settings())
def test_ranks_divide_the_global_batch(drawn):
    world_size = drawn.pop("world_size")
    alone = list(MixedBatches(**drawn))
    shares = [list(MixedBatches(**drawn, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert [key for share in shares for key in share[step]] == batch
        assert len({len(share[step]) for share in shares}) == 1
        assert len({kind for kind, _, _ in batch}) == 1


@settings(max_examples=20, deadline=None)
@given(batch_settings(), st.integers(1, 3), st.data())
def test_micro_batches_divide_the_batch_wherever_a_run_starts(drawn, accumulate, data):
    drawn["batch_size"] *= accumulate
    alone = list(MixedBatches(**{**drawn, "world_size": 1}))
    start = data.draw(st.integers(0, drawn["steps"]))
    shares = [list(MixedBatches(**drawn, rank=rank, start=start, accumulate=accumulate))
              for rank in range(drawn["world_size"])]
    for step, batch in enumerate(alone[start:]):
        parts = [share[step * accumulate: (step + 1) * accumulate] for share in shares]
        assert {len(part) for share in parts for part in share} == {len(batch) // accumulate // drawn["world_size"]}
        for micro in range(accumulate):
            size = len(batch) // accumulate
            assert sorted(key for part in parts for key in part[micro]) == sorted(batch[micro * size:][:size])
    assert all(len(share) == (drawn["steps"] - start) * accumulate for share in shares)


@settings(max_examples=20, deadline=None)
@given(batch_settings())
def test_every_sample_appears_once_per_epoch(drawn):
    keys = [key for batch in MixedBatches(**{**drawn, "world_size": 1}) for key in batch]
    for kind, size in drawn["sizes"].items():
        of_kind = [(epoch, index) for name, epoch, index in keys if name == kind]
        for start in range(0, len(of_kind), size):
            epoch = of_kind[start: start + size]
            assert {number for number, _ in epoch} == {start // size}
            if len(epoch) == size:
                assert sorted(index for _, index in epoch) == list(range(size))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 2**32))
def test_samples_of_a_group_follow_each_other_in_every_epoch(names, seed):
    size, number = len(names), {name: k for k, name in enumerate(dict.fromkeys(names))}
    groups = np.array([number[name] for name in names])
    batches = MixedBatches({"video": size}, {"video": 1.0}, size, 3, seed, groups={"video": groups})
    orders = [[index for _, _, index in batch] for batch in batches]
    for order in orders:
        assert sorted(order) == list(range(size))
        changes = sum(groups[one] != groups[other] for one, other in zip(order, order[1:]))
        assert changes == len(number) - 1
    if len(number) > 6:
        assert orders[0] != orders[1]


def test_the_order_changes_with_epoch_seed_and_kind():
    def order(kind: str, seed: int) -> list[int]:
        batches = MixedBatches({kind: 50}, {kind: 1.0}, 50, 2, seed)
        return [[index for _, _, index in batch] for batch in batches]

    first, second = order("video", 0)
    assert len({tuple(x) for x in (first, second, *order("video", 1), *order("image", 0))}) == 6


# ---- masking ---------------------------------------------------------------------------------------------------------


def test_masking_follows_bert(tokenizer):
    """15 % of the words: 80 % of them [MASK], 10 % a random token, 10 % unchanged; never special tokens or padding."""
    rng = np.random.default_rng(0)
    texts = ["red blue green three seven one " * n for n in rng.integers(1, 6, 6000)]
    ids, mask = tokenizer.encode(texts)
    noise = rng.random((len(texts), 3, 40))
    found = Collate(tokenizer).masked(ids, mask, noise)
    masked, replaced = torch.zeros_like(mask), found["masked_ids"]
    masked.view(-1)[found["masked_positions"]] = True
    special = ~mask | (ids == tokenizer.cls) | (ids == tokenizer.sep)
    assert not masked[special].any()
    assert (replaced == ids)[~masked].all()
    words, n = int((~special).sum()), int(masked.sum())
    assert abs(n / words - 0.15) < 0.005
    hidden = int((replaced[masked] == tokenizer.mask).sum())
    kept = int((replaced[masked] == ids[masked]).sum())
    random = replaced[masked][(replaced[masked] != tokenizer.mask) & (replaced[masked] != ids[masked])]
    assert abs(hidden / n - 0.8) < 0.02 and abs(kept / n - 0.1) < 0.02 and abs(len(random) / n - 0.1) < 0.02
    assert random.min() == 5 and random.max() == len(tokenizer) - 1
    assert len(random.unique()) == len(tokenizer) - 5


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_what_a_batch_holds(root, tokenizer):
    for batch in batches_of(root, tokenizer, workers=0):
        kind, r = batch["kind"], 2
        assert batch["positive_id"].shape == (3,) and len(batch["source"]) == 3 and batch["errors"] == []
        texts = tokenizer.decode(batch["caption_ids"])
        assert batch["caption_mask"].sum(1).tolist() == tokenizer.lengths(texts)
        if kind == "text":
            assert "pixels" not in batch and "prompted_ids" not in batch and "question_ids" not in batch
            continue
        assert batch["pixels"].shape == (3, 3, 4 if kind == "video" else 1, 8, 8)
        prompt = {"video": "a video of", "image": "a picture of"}[kind]
        assert tokenizer.decode(batch["prompted_ids"]) == [f"{prompt} {text}" for text in texts]
        words = tokenizer.lengths([prompt])[0] - 2
        assert tokenizer.decode(batch["prompted_ids"][:, 1: 1 + words]) == [prompt] * 3
        assert (batch["prompted_ids"][:, 0] == tokenizer.cls).all()
        labels = batch["prompted_ids"][:, 1:].flatten()[batch["prompted_positions"]]  # the captions and their [SEP]
        assert tokenizer.decode(labels[None]) == [texts[0]] and (labels == tokenizer.sep).sum() == 3
        assert len(labels) == batch["caption_mask"][:, 1:].sum()
        assert len(batch["answer_positions"]) == batch["answer_mask"][:, 1:].sum()
        assert batch["question_ids"].shape[0] == batch["answer_ids"].shape[0] == 3 * r
        if kind == "image":  # the only question is the instruction, and its answer is the caption of the same image
            answers = tokenizer.decode(batch["answer_ids"])
            assert answers == [text for text in texts for _ in range(r)]


def test_a_batch_has_the_texts_that_its_task_trains_on(root, tmp_path, tokenizer):
    write_data(tmp_path)
    (tmp_path / "video_retrieval.train.jsonl").write_text((root / "video_caption.train.jsonl").read_text())
    always = {"kind", "task", "source", "errors", "positive_id", "pixels"}
    for task, expected in (
        ("video_retrieval", {"caption_ids", "caption_mask"}),
        ("video_caption", {"prompted_ids", "prompted_mask", "prompted_positions", "prompt_length", "references"}),
        ("video_qa", {"question_ids", "question_mask", "answer_ids", "answer_mask", "answer_positions"}),
    ):
        data = dataset(read_samples(tmp_path, task, "train"))
        batch = Collate(tokenizer)([data[task, 0, i] for i in range(2)])
        assert set(batch) - always == expected and batch["task"] == batch["kind"] == task
    assert batch_of(root, tokenizer, "video_caption")["references"][0] == [
        "a red three moving left", "a red three going left"
    ]


# ---- labels and boxes ------------------------------------------------------------------------------------------------


def test_class_labels_become_indices_and_numbers_and_boxes_stay_as_they_are(labelled, tokenizer):
    for task, classes, numbers in (
        ("text_classification", ("left", "up"), [0, 1]), ("image_classification", ("one", "three"), [1, 0]),
        ("video_classification", ("down", "up"), [1, 0]), ("visual_entailment", ("entailment", "neutral"), [1, 0]),
        ("image_pair_reasoning", ("false", "true"), [1, 0]), ("text_pair_classification", (), [4.5, 1.0]),
    ):
        assert read_classes(read_samples(labelled, task, "train")) == {task: classes}
        batch = batch_of(labelled, tokenizer, task)
        assert batch["label"].tolist() == numbers and batch["label"].is_floating_point() == (classes == ())
        assert ("text_ids" in batch) == (task not in ("image_classification", "video_classification"))
        assert ("pixels" in batch) == (not task.startswith("text"))
    box = batch_of(labelled, tokenizer, "grounding")["box"]
    assert box.tolist() == [[0.5, 0.25, 0.5, 0.25], [0.25, 0.5, 0.25, 0.5]]


def test_texts_about_one_image_stay_apart_and_pairs_come_in_their_order(labelled, tokenizer):
    samples = read_samples(labelled, "visual_entailment", "train")["visual_entailment"]
    assert [sample.texts for sample in samples] == [("it is red",), ("it is blue",)]
    pixels = batch_of(labelled, tokenizer, "image_pair_reasoning")["pixels"]
    assert pixels.shape == (2, 2, 3, 1, 8, 8) and pixels[0].equal(pixels[1].flip(0))
    assert pixels[0, 0].equal(batch_of(labelled, tokenizer, "image_classification")["pixels"][0])
    batch = batch_of(labelled, tokenizer, "text_pair_classification")
    for row, (one, two) in zip(batch["text_ids"], (("a red one", "one in red"), ("a red one", "a blue one"))):
        both = [x.tolist()[0] for x in (tokenizer.encode([one])[0], tokenizer.encode([two])[0])]
        assert row.tolist()[: len(both[0] + both[1]) - 1] == both[0] + both[1][1:]  # [CLS] one [SEP] two [SEP]


def test_constant_mixed_or_unknown_labels_are_refused_with_their_place(labelled, tokenizer):
    write_records(labelled, "text_classification.train", [{"text": "a", "label": "x"}, {"text": "b", "label": 2}])
    with pytest.raises(RecordError, match=r"text_classification.train.jsonl:2: the label 2.0 is a number, others are"):
        read_classes(read_samples(labelled, "text_classification", "train"))
    write_records(labelled, "text_classification.train", [{"text": "a", "label": "x"}] * 2)
    with pytest.raises(RecordError, match="every label is 'x', .*; expected at least two classes"):
        read_classes(read_samples(labelled, "text_classification", "train"))
    samples = read_samples(labelled, "video_classification", "train")
    item = dataset(samples)["video_classification", 0, 1]
    for classes, expected in ((("up", "left"), "one of up, left"), ((), "a number")):
        with pytest.raises(RecordError, match=f"jsonl:2: label 'down': the model expects {expected}"):
            Collate(tokenizer, {"video_classification": classes})([item])
    samples = read_samples(labelled, "text_pair_classification", "train")
    longest = max(tokenizer.lengths(["a red one [SEP] one in red", "a red one [SEP] a blue one"]))
    check_texts(samples, tokenizer, longest, 30)
    with pytest.raises(RecordError, match=r"the text 'a red one / .*' has \d+ tokens"):
        check_texts(samples, tokenizer, longest - 1, 30)
    write_records(labelled, "text_pair_classification.train", [{"texts": ["a", "?!"], "label": "x"}])
    with pytest.raises(RecordError, match=r"jsonl:1: the text '\?!' has no words"):
        check_texts(read_samples(labelled, "text_pair_classification", "train"), tokenizer, 24, 30)
