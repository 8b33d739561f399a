"""The loader: which samples a step sees, as a function of the step alone; what is masked; what happens to bad data."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mplug2.data.batches import Collate, MixedBatches, batch_schedule
from mplug2.data.loader import make_loader, prefetch
from mplug2.data.media import MediaError, read_image, read_video, to_pixels
from mplug2.data.records import Question, RecordError
from mplug2.data.samples import Sample, Samples, check_texts, read_classes, read_samples
from mplug2.data.text import Tokenizer
from mplug2.tasks import INSTRUCTIONS

KIND_NAMES = ("video", "image", "text")
weights_of_kinds = st.lists(st.floats(0.01, 1), min_size=1, max_size=3).map(lambda w: dict(zip(KIND_NAMES, w)))


# ---- the order of kinds and samples ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(weights_of_kinds, st.integers(1, 200))
def test_after_every_step_each_kind_has_had_its_share(weights, steps):
    """Together the k kinds are one step behind when one is chosen, the furthest behind of them therefore 1 / k or more:
    none gets ahead by more than 1 - 1 / k."""
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


@settings(max_examples=40, deadline=None)
@given(batch_settings(), st.data())
def test_a_batch_is_a_function_of_its_step_alone(drawn, data):
    whole = list(MixedBatches(**drawn))
    start = data.draw(st.integers(0, drawn["steps"]))
    resumed = MixedBatches(**drawn, start=start)
    assert list(resumed) == whole[start:] and len(resumed) == len(whole[start:])
    assert list(resumed) == whole[start:]  # a second time as well
    assert whole == list(MixedBatches(**{**drawn, "steps": drawn["steps"] + 3}))[: len(whole)]


@settings(max_examples=40, deadline=None)
@given(batch_settings())
def test_the_processes_share_the_global_batch(drawn):
    world_size = drawn.pop("world_size")
    alone = list(MixedBatches(**drawn))
    shares = [list(MixedBatches(**drawn, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert [share[step] for share in shares] == [batch[rank::world_size] for rank in range(world_size)]
        assert len({kind for kind, _, _ in batch}) == 1


@settings(max_examples=40, deadline=None)
@given(batch_settings(), st.integers(1, 3), st.data())
def test_micro_batches_are_the_parts_of_the_batch_wherever_a_run_starts(drawn, accumulate, data):
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


@settings(max_examples=40, deadline=None)
@given(batch_settings())
def test_every_sample_comes_once_an_epoch(drawn):
    keys = [key for batch in MixedBatches(**{**drawn, "world_size": 1}) for key in batch]
    for kind, size in drawn["sizes"].items():
        of_kind = [(epoch, index) for name, epoch, index in keys if name == kind]
        for start in range(0, len(of_kind), size):
            epoch = of_kind[start: start + size]
            assert {number for number, _ in epoch} == {start // size}
            if len(epoch) == size:
                assert sorted(index for _, index in epoch) == list(range(size))


def test_the_order_changes_with_epoch_seed_and_kind():
    def order(kind: str, seed: int) -> list[int]:
        batches = MixedBatches({kind: 50}, {kind: 1.0}, 50, 2, seed)
        return [[index for _, _, index in batch] for batch in batches]

    first, second = order("video", 0)
    assert len({tuple(x) for x in (first, second, *order("video", 1), *order("image", 0))}) == 6


# ---- a data set on disk ----------------------------------------------------------------------------------------------

CLIPS, PICTURES = 6, 5
SUBJECTS = ("a red three", "a blue seven", "a green one")


def write_gif(path: Path, seed: int, frames: int = 4) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (frames, 8, 8, 3), np.uint8)
    first, *rest = [Image.fromarray(frame) for frame in noise]
    first.save(path, save_all=True, append_images=rest)


def write_records(root: Path, name: str, records: list[dict]) -> None:
    (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_data(root: Path) -> Path:
    """Clips with captions and questions, pictures with captions, and sentences."""
    root.mkdir(exist_ok=True)
    for i in range(CLIPS):
        write_gif(root / f"{i}.gif", seed=i)
    for i in range(PICTURES):
        pixels = np.random.default_rng(100 + i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    write_records(root, "video_caption.train", [
        {"video": f"{i}.gif", "captions": [f"{SUBJECTS[i % 3]} moving left", f"{SUBJECTS[i % 3]} going left"],
         "positive_id": f"left {i % 3}"} for i in range(CLIPS)
    ])
    write_records(root, "video_qa.train", [
        {"video": f"{i}.gif", "positive_id": f"left {i % 3}", "qa": [
            {"question": "which colour is it?", "answers": ["red", "scarlet"], "kind": "colour"},
            {"question": "what digit is it?", "answers": ["three"], "kind": "digit"},
            {"question": "which digit is shown?", "answers": ["three"], "kind": "digit"},
        ]} for i in range(CLIPS)
    ])
    write_records(root, "image_caption.train", [
        {"image": f"{i}.png", "captions": [SUBJECTS[i % 3]], "positive_id": f"left {i % 3}"} for i in range(PICTURES)
    ])
    write_records(root, "text_only.train", [{"text": f"Here is {SUBJECTS[i % 3]}!"} for i in range(7)])
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = "a an red blue green three seven one moving going left here is which colour what digit it shown scarlet the"
    return Tokenizer.train([words, "video picture of does describe", *SUBJECTS], 120)


def dataset(samples: dict[str, list[Sample]], **changes) -> Samples:
    return Samples(samples, **{**dict(image_size=8, frames=4, questions=2, max_positions=24, max_words=30, seed=0),
                               **changes})


def test_questions_join_the_captions_of_their_clip(root):
    samples = read_samples(root, "pretrain", "train")
    assert {kind: len(of_kind) for kind, of_kind in samples.items()} == {"video": 6, "image": 5, "text": 7}
    clip = samples["video"][1]
    assert clip.media == root / "1.gif" and clip.source == f"{root / 'video_caption.train.jsonl'}:2"
    assert clip.captions == ("a blue seven moving left", "a blue seven going left")
    assert [question.kind for question in clip.qa] == ["colour", "digit", "digit"]
    picture, sentence = samples["image"][0], samples["text"][2]
    assert (picture.media, picture.captions, picture.qa) == (root / "0.png", ("a red three",), ())
    assert (sentence.media, sentence.captions) == (None, ("Here is a green one!",))


def test_equal_meanings_are_equal_numbers_in_all_files_and_different_ones_differ(root):
    samples = read_samples(root, "pretrain", "train")
    assert [clip.positive_id for clip in samples["video"]] == 2 * [clip.positive_id for clip in samples["video"][:3]]
    assert [picture.positive_id for picture in samples["image"][:3]] == [
        clip.positive_id for clip in samples["video"][:3]]
    assert len({sample.positive_id for of_kind in samples.values() for sample in of_kind}) == 3 + 7
    assert all(0 <= sample.positive_id < 2**63 for sample in samples["text"])  # what a tensor can hold


def test_a_task_reads_its_own_files_and_kinds_without_a_file_are_left_out(root, tmp_path):
    assert [len(clip.qa) for clip in read_samples(root, "video_qa", "train")["video_qa"]] == [3] * 6
    assert read_samples(root, "video_qa", "train")["video_qa"][0].captions == ()
    (tmp_path / "text_only.train.jsonl").write_text('{"text": "a red three"}\n')
    assert set(read_samples(tmp_path, "pretrain", "train")) == {"text"}
    with pytest.raises(FileNotFoundError) as refused:
        read_samples(tmp_path, "video_qa", "train")
    assert str(tmp_path) in str(refused.value)
    assert str(refused.value).endswith("video_qa, split train: expected one or more of video_qa.train.jsonl")
    with pytest.raises(FileNotFoundError, match="pretrain, split val: .*video_caption.val.jsonl, video_qa"):
        read_samples(tmp_path, "pretrain", "val")


def test_pretraining_refuses_a_clip_with_questions_but_no_caption(tmp_path):
    """A batch that is half such clips would train the contrastive loss on one process, and not on the other."""
    write_data(tmp_path)
    (tmp_path / "video_caption.train.jsonl").write_text('{"video": "0.gif", "captions": ["a red three"]}\n')
    with pytest.raises(RecordError) as refused:
        read_samples(tmp_path, "pretrain", "train")
    assert f"{tmp_path / 'video_qa.train.jsonl'}:2: " in str(refused.value)
    assert "no captions" in str(refused.value) and "video_caption.train.jsonl" in str(refused.value)
    assert len(read_samples(tmp_path, "video_qa", "train")["video_qa"]) == 6


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long_or_empty_is_refused_with_its_place(tmp_path, tokenizer):
    write_data(tmp_path)
    samples = read_samples(tmp_path, "pretrain", "train")
    check_texts(samples, tokenizer, 24, 30)
    write_records(tmp_path, "image_caption.train", [
        {"image": "0.png", "captions": ["a red three"]}, {"image": "1.png", "captions": ["a red three", "red " * 19]},
    ])
    samples = read_samples(tmp_path, "pretrain", "train")
    tokens = tokenizer.lengths(["red " * 19, "a picture of"])
    assert tokens[0] == 21
    whole = tokens[0] + tokens[1] - 2
    check_texts(samples, tokenizer, whole, 30)
    with pytest.raises(RecordError) as refused:
        check_texts(samples, tokenizer, whole - 1, 30)
    assert str(refused.value).startswith(
        f"{tmp_path / 'image_caption.train.jsonl'}:2: the text {'red ' * 19!r} has {whole} tokens"
    )
    assert f"the model takes {whole - 1}; shorten it" in str(refused.value)
    check_texts(samples, tokenizer, whole - 1, max_words=18)  # cut shorter
    for bad in (Sample("there:3", 0, captions=("?!",)), Sample("there:3", 0, qa=(Question("what", ("...",)),))):
        with pytest.raises(RecordError, match="there:3: the text '.*' has no words; take it out"):
            check_texts({"video": [bad]}, tokenizer, 24, 30)


def test_a_long_answer_is_found_too(tokenizer):
    sample = Sample("there:3", 0, qa=(Question("what", ("red", "red " * 30)),))
    with pytest.raises(RecordError, match="there:3: the text '(red )+' has 32 tokens .*takes 24; .*max_words"):
        check_texts({"video": [sample]}, tokenizer, 24, 30)


def test_one_caption_and_r_questions_are_drawn_every_kind_of_question_as_often(root):
    samples = read_samples(root, "pretrain", "train")
    data, captions, questions = dataset(samples), Counter(), Counter()
    for epoch in range(400):
        item = data["video", epoch, 0]
        captions[item["caption"]] += 1
        assert len(item["questions"]) == 2
        questions.update(item["questions"])
    assert set(captions) == {"a red three moving left", "a red three going left"}
    assert min(captions.values()) > 150  # of 200 expected, standard deviation 10
    counts, answers = Counter(), defaultdict(set)
    for (question, answer), count in questions.items():
        kind = next(word for word in ("colour", "digit", "describe") if word in question)
        counts[kind] += count
        answers[kind].add(answer)
    assert max(abs(counts[kind] - 800 / 3) for kind in answers) < 60  # standard deviation 13
    assert answers == {"colour": {"red", "scarlet"}, "digit": {"three"}, "describe": set(captions)}
    assert (INSTRUCTIONS["video"], "a red three moving left") in questions


def test_texts_are_cleaned_and_cut(root):
    data = dataset(read_samples(root, "pretrain", "train"), max_words=3)
    assert data["text", 0, 0]["caption"] == "here is a"
    assert data["image", 0, 0]["questions"] == [("what does the", "a red three")] * 2


# ---- masking ---------------------------------------------------------------------------------------------------------


def test_masking_is_that_of_bert(tokenizer):
    """15 % of the words; of these 80 % [MASK], 10 % any word, 10 % as they are; special tokens and padding never."""
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


def batches_of(root: Path, tokenizer: Tokenizer, workers: int, start: int = 0, seed: int = 0) -> list[dict]:
    samples = read_samples(root, "pretrain", "train")
    sizes = {kind: len(of_kind) for kind, of_kind in samples.items()}
    order = MixedBatches(sizes, {"video": 2, "image": 1, "text": 1}, 3, 6, seed, start)
    return list(make_loader(dataset(samples, seed=seed), order, Collate(tokenizer), workers, pin=False))


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.equal(other[name]) if torch.is_tensor(value) else value == other[name], name


def test_batches_are_the_same_with_any_number_of_workers_and_from_any_step(root, tokenizer):
    expected = batches_of(root, tokenizer, workers=0)
    assert_equal(batches_of(root, tokenizer, workers=2), expected)
    assert_equal(batches_of(root, tokenizer, workers=0, start=4), expected[4:])
    other = batches_of(root, tokenizer, workers=0, seed=1)
    assert any(one["source"] != two["source"] for one, two in zip(expected, other))


def test_a_loader_leaves_the_random_numbers_of_the_run_alone(root, tokenizer):
    """Else a resumed run, which makes its loader anew, would not go on with those of the run that never stopped."""
    before = torch.get_rng_state()
    batches_of(root, tokenizer, workers=0)
    assert torch.get_rng_state().equal(before)


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
        if kind == "image":  # nothing but the instruction is asked, and its answer is the caption of the same picture
            answers = tokenizer.decode(batch["answer_ids"])
            assert answers == [text for text in texts for _ in range(r)]


def test_a_kind_of_batch_has_the_texts_that_its_task_trains_on(root, tmp_path, tokenizer):
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


def batch_of(root: Path, tokenizer: Tokenizer, task: str, **limits) -> dict:
    """The first two samples of a task, collated."""
    samples = read_samples(root, task, "train")
    data = dataset(samples, **limits)
    return Collate(tokenizer, read_classes(samples))([data[task, 0, i] for i in range(2)])


@pytest.fixture
def labelled(tmp_path) -> Path:
    """A record or two of every task with labels or boxes."""
    write_data(tmp_path)
    for task, *records in (
        ("text_classification", {"text": "A red three!", "label": "left"}, {"text": "a blue one", "label": "up"}),
        ("text_pair_classification", {"texts": ["a red one", "one in red?"], "label": 4.5},
         {"texts": ["a red one", "a blue one"], "label": 1}),
        ("image_classification", {"image": "0.png", "label": "three"}, {"image": "1.png", "label": "one"}),
        ("video_classification", {"video": "0.gif", "label": "up"}, {"video": "1.gif", "label": "down"}),
        ("visual_entailment", {"image": "0.png", "text": "it is red", "label": "neutral"},
         {"image": "0.png", "text": "it is blue", "label": "entailment"}),
        ("image_pair_reasoning", {"images": ["0.png", "1.png"], "text": "both are red", "label": "true"},
         {"images": ["1.png", "0.png"], "text": "both are red", "label": "false"}),
        ("grounding", {"image": "0.png", "text": "the red one", "box": [0.5, 0.25, 0.5, 0.25]},
         {"image": "0.png", "text": "the blue one", "box": [0.25, 0.5, 0.25, 0.5]}),
    ):
        write_records(tmp_path, f"{task}.train", records)
    return tmp_path


def test_labels_are_numbered_by_the_names_of_the_classes_and_boxes_and_numbers_are_themselves(labelled, tokenizer):
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


def test_labels_that_teach_nothing_or_do_not_fit_are_refused_with_their_place(labelled, tokenizer):
    write_records(labelled, "text_classification.train", [{"text": "a", "label": "x"}, {"text": "b", "label": 2}])
    with pytest.raises(RecordError, match=r"text_classification.train.jsonl:2: the label 2.0 is a number, others are"):
        read_classes(read_samples(labelled, "text_classification", "train"))
    write_records(labelled, "text_classification.train", [{"text": "a", "label": "x"}] * 2)
    with pytest.raises(RecordError, match="every label is 'x', as this one; expected two classes at least"):
        read_classes(read_samples(labelled, "text_classification", "train"))
    samples = read_samples(labelled, "video_classification", "train")
    item = dataset(samples)["video_classification", 0, 1]
    for classes, expected in ((("up", "left"), "one of up, left"), ((), "a number")):
        with pytest.raises(RecordError, match=f"jsonl:2: label 'down': this model was made for {expected}"):
            Collate(tokenizer, {"video_classification": classes})([item])
    samples = read_samples(labelled, "text_pair_classification", "train")
    longest = max(tokenizer.lengths(["a red one [SEP] one in red", "a red one [SEP] a blue one"]))
    check_texts(samples, tokenizer, longest, 30)
    with pytest.raises(RecordError, match=r"the text 'a red one / .*' has \d+ tokens"):
        check_texts(samples, tokenizer, longest - 1, 30)
    write_records(labelled, "text_pair_classification.train", [{"texts": ["a", "?!"], "label": "x"}])
    with pytest.raises(RecordError, match=r"jsonl:1: the text '\?!' has no words"):
        check_texts(read_samples(labelled, "text_pair_classification", "train"), tokenizer, 24, 30)


def test_several_tasks_are_kinds_of_their_own(labelled):
    samples = read_samples(labelled, "grounding,video_qa,pretrain", "train")
    assert list(samples) == ["grounding", "video_qa", "video", "image", "text"]
    assert [len(of_kind) for of_kind in samples.values()] == [2, 6, 6, 5, 7]
    with pytest.raises(FileNotFoundError, match="no data for image_retrieval"):
        read_samples(labelled, "grounding,image_retrieval", "train")


def test_a_clip_is_sampled_anew_each_epoch_and_a_picture_is_its_first_frame(root, tmp_path):
    write_data(tmp_path)
    write_gif(tmp_path / "0.gif", 0, frames=16)
    write_gif(tmp_path / "0.png", 0, frames=3)  # an animated PNG, filed as a picture
    write_gif(tmp_path / "1.gif", 0, frames=1)  # a clip of one frame
    data = dataset(read_samples(tmp_path, "pretrain", "train"))
    clips = [data["video", epoch, 0]["pixels"] for epoch in range(8)]
    assert len({clip.numpy().tobytes() for clip in clips}) > 4
    every = to_pixels(read_video(tmp_path / "0.gif", None), 8)
    for clip in clips:
        for t in range(4):  # one of each quarter
            assert any(clip[:, t].equal(every[:, frame]) for frame in range(4 * t, 4 * t + 4))
    assert data["image", 0, 0]["pixels"].equal(to_pixels(read_image(tmp_path / "0.png"), 8))
    still = data["video", 0, 1]["pixels"]
    assert still.shape == (3, 4, 8, 8) and still.equal(still[:, :1].expand(-1, 4, -1, -1))


# ---- files that cannot be decoded ------------------------------------------------------------------------------------


def test_two_sources_of_one_kind_are_streams_of_their_own(root):
    samples = read_samples(root, "pretrain", "train")
    data = dataset({"video": samples["video"], "video@1": samples["video"]})
    one, other = data["video", 0, 0], data["video@1", 0, 0]
    assert one["kind"] == other["kind"] == "video" and one["source"] == other["source"]
    assert not np.array_equal(one["noise"], other["noise"])


def test_a_corrupt_clip_is_replaced_by_the_next_and_reported(tmp_path, tokenizer):
    write_data(tmp_path)
    (tmp_path / "2.gif").write_bytes(b"GIF89a, but not for long")
    (tmp_path / "5.gif").unlink()
    data = dataset(read_samples(tmp_path, "pretrain", "train"))
    item = data["video", 0, 2]
    assert len(item["errors"]) == 1
    assert item["errors"][0].startswith(f"{tmp_path / 'video_caption.train.jsonl'}:3: {tmp_path / '2.gif'} cannot be")
    assert data["video", 1, 2]["errors"] == item["errors"]  # the same words each time, by which it is counted once
    instead = data["video", 0, 3]
    assert instead["errors"] == [] and item["pixels"].equal(instead["pixels"])
    assert {key: item[key] for key in ("caption", "questions", "source", "positive_id")} == {
        key: instead[key] for key in ("caption", "questions", "source", "positive_id")
    }
    last = data["video", 0, 5]  # the one after the last is the first
    assert "5.gif does not exist" in last["errors"][0] and last["source"].endswith("jsonl:1")
    batch = Collate(tokenizer)([item, last, instead])
    assert batch["errors"] == item["errors"] + last["errors"]
    assert batch["pixels"].shape[0] == 3


def test_a_picture_filed_as_a_clip_is_reported_like_a_corrupt_one(tmp_path):
    write_data(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    write_records(tmp_path, "video_caption.train", [{"video": name, "captions": ["a"]} for name in ("0.jpg", "1.gif")])
    item = dataset(read_samples(tmp_path, "video_caption", "train"))["video_caption", 0, 0]
    assert "0.jpg is a still image, where a video was expected" in item["errors"][0]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_corrupt_clips_stops_the_run(tmp_path, tokenizer, workers):
    write_data(tmp_path)
    for i in range(CLIPS):
        (tmp_path / f"{i}.gif").write_bytes(b"")
    with pytest.raises(MediaError) as stopped:
        batches_of(tmp_path, tokenizer, workers)
    assert "6 files in a row cannot be decoded; the first: " in str(stopped.value)
    assert ".gif is empty (0 bytes)" in str(stopped.value)


def test_a_program_that_fails_with_workers_at_work_ends(tmp_path):
    """The error's traceback still holds the workers, which do not hear SIGTERM, when Python wants to exit."""
    write_data(tmp_path)
    for clip in tmp_path.glob("*.gif"):
        clip.write_bytes(b"GIF89a")
    program = textwrap.dedent(f"""
        from pathlib import Path
        from test_loader import batches_of
        from mplug2.data.text import Tokenizer
        batches_of(Path({str(tmp_path)!r}), Tokenizer.train(["a"], 120), workers=1)
    """)
    here = os.pathsep.join(map(str, Path(__file__).parents[:3]))  # this file, the helpers, and the package
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                           env={**os.environ, "PYTHONPATH": here})
    assert ended.returncode == 1 and "files in a row cannot be decoded" in ended.stderr, ended.stderr


@given(st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_one_batch_is_made_ahead_and_each_comes_once_in_order(count, taken):
    made = []
    batches = prefetch(made.append(i) or {"step": i} for i in range(count))
    for i in range(min(taken, count)):
        assert next(batches) == {"step": i}
    time.sleep(0.001)
    assert len(made) <= taken + 1
    assert [batch["step"] for batch in batches] == list(range(taken, count))


def test_an_error_in_a_batch_that_is_made_ahead_comes_when_the_batch_is_due():
    def failing():
        yield {"step": 0}
        raise MediaError("broken.gif")

    batches = prefetch(failing())
    assert next(batches) == {"step": 0}
    with pytest.raises(MediaError, match="broken.gif"):
        next(batches)
