"""Samples: records of several files joined; texts that are checked, cleaned and drawn; files that cannot be decoded."""

import json
import threading
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from data_helpers import dataset, write_data, write_gif, write_records
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mplug2.config import PRESETS
from mplug2.data import loader
from mplug2.data.batches import Collate
from mplug2.data.build import DataSettings, build_data
from mplug2.data.media import normalize, read_image, read_video, to_pixels
from mplug2.data.records import Question, RecordError
from mplug2.data.samples import Joined, Sample, check_texts, read_classes, read_samples, text_problem
from mplug2.data.transforms import Augmentation
from mplug2.distributed import DistInfo
from mplug2.tasks import INSTRUCTIONS

# ---- reading ---------------------------------------------------------------------------------------------------------


def test_questions_join_the_captions_of_their_video(root):
    samples = read_samples(root, "pretrain", "train")
    assert {kind: len(of_kind) for kind, of_kind in samples.items()} == {"video": 6, "image": 5, "text": 7}
    video = samples["video"][1]
    assert video.media == root / "1.gif" and video.source == f"{root / 'video_caption.train.jsonl'}:2"
    assert video.captions == ("a blue seven moving left", "a blue seven going left")
    assert [question.kind for question in video.qa] == ["color", "digit", "digit"]
    image, sentence = samples["image"][0], samples["text"][2]
    assert (image.media, image.captions, image.qa) == (root / "0.png", ("a red three",), ())
    assert (sentence.media, sentence.captions) == (None, ("Here is a green one!",))


def test_equal_positive_ids_are_equal_numbers_in_all_files(root):
    samples = read_samples(root, "pretrain", "train")
    ids = [video.positive_id for video in samples["video"]]
    assert ids == 2 * ids[:3] and [image.positive_id for image in samples["image"][:3]] == ids[:3]
    assert len({sample.positive_id for of_kind in samples.values() for sample in of_kind}) == 3 + 7
    assert all(0 <= sample.positive_id < 2**63 for sample in samples["text"])  # fits a tensor


def test_a_sample_has_the_positive_id_of_its_first_record(tmp_path):
    asked = {"question": "which digit is it", "answers": ["seven"]}
    write_records(tmp_path, "video_caption.train", [{"video": f"{i}.gif", "captions": ["a"], "positive_id": "x"}
                                                    for i in range(2)])
    write_records(tmp_path, "video_qa.train", [{"video": "1.gif", "qa": [asked], "positive_id": "y"}])
    one, other = read_samples(tmp_path, "pretrain", "train")["video"]
    assert one.positive_id == other.positive_id and other.qa


def test_classes_are_sorted_whatever_the_order_of_the_records():
    samples = [Sample("a.jsonl:1", 0, label=name) for name in ("dog", "cat", "emu", "cat")]
    assert read_classes({"image_classification": samples}) == {"image_classification": ("cat", "dog", "emu")}


def test_joined_parts_are_one_sequence():
    joined = Joined([["a", "b"], [], ["c"]])
    assert [joined[i] for i in range(len(joined))] == list(joined) == ["a", "b", "c"]
    with pytest.raises(IndexError):
        joined[3]


@given(st.text("ab ", min_size=1, max_size=12).filter(str.strip), st.integers(1, 20), st.integers(0, 4))
def test_a_text_is_refused_if_and_only_if_it_has_too_many_tokens(tokenizer, text, limit, prompt_length):
    """Words of these letters are not in the vocabulary: most letters are a token."""
    count = tokenizer.lengths([" ".join(text.split())])[0] + prompt_length
    assert bool(list(text_problem("a", text, tokenizer, limit, 30, prompt_length))) == (count > limit)


def test_a_large_photo_keeps_enough_pixels_for_the_crops_of_its_size(tmp_path):
    """JPEG can be decoded at an eighth of its size: enough for 8 pixels, but not for a crop of a part of the area."""
    Image.fromarray(np.zeros((160, 160, 3), np.uint8)).save(tmp_path / "a.jpg")
    sides = [dataset({}, augmentation=augmentation).read_image(tmp_path / "a.jpg").shape[1]
             for augmentation in (None, Augmentation())]
    assert 2 * 8 <= sides[0] < 4 * 8 <= sides[1]


def test_samples_of_a_batch_group_have_the_same_number(tmp_path):
    """They count from the top of the files, because Python's own hashes differ between ranks."""
    def groups(*names: str) -> list[int] | None:
        write_records(tmp_path, "video_caption.train", [
            {"video": f"{i}.gif", "captions": ["a seven"]} | ({"batch_group": name} if name else {})
            for i, name in enumerate(names)])
        found = read_samples(tmp_path, "pretrain", "train")["video"].groups
        return found if found is None else found.tolist()

    assert groups("", "") is None
    assert groups("b", "", "a", "b", "", "a") == [0, 1, 2, 0, 3, 2]
    asked = {"question": "which digit is it", "answers": ["seven"]}  # the first record of a video decides
    write_records(tmp_path, "video_qa.train", [{"video": "0.gif", "qa": [asked], "batch_group": "other"}])
    assert groups("b", "", "b") == [0, 1, 0]


def test_a_run_keeps_batch_groups_together(tmp_path):
    write_data(tmp_path)
    lines = (tmp_path / "video_caption.train.jsonl").read_text().splitlines()
    write_records(tmp_path, "video_caption.train",
                  [json.loads(line) | {"batch_group": f"{i % 3}"} for i, line in enumerate(lines)])
    settings = DataSettings(data=str(tmp_path), task="video_caption", max_steps=3, batch_size=2, max_unknown=1.0)
    batches = build_data(settings, PRESETS["tiny"](), DistInfo(0, 1, torch.device("cpu")), seed=0).batches
    assert all(one % 3 == other % 3 for (_, _, one), (_, _, other) in batches)


def test_on_a_cpu_the_thread_that_trains_normalizes_the_pixels(tmp_path, monkeypatch):
    """The thread that prepares the next batch would start threads of torch of its own, which get in the way."""
    threads = set()
    monkeypatch.setattr(loader, "normalize", lambda pixels: threads.add(threading.get_ident()) or normalize(pixels))
    settings = DataSettings(data=str(write_data(tmp_path)), task="video_caption", max_steps=3, batch_size=2,
                            max_unknown=1.0)
    batches = list(build_data(settings, PRESETS["tiny"](), DistInfo(0, 1, torch.device("cpu")), seed=0))
    assert len(batches) == 3 and all(batch["pixels"].dtype == torch.float32 for batch in batches)
    assert threads == {threading.get_ident()}


def test_a_task_reads_its_own_files_and_batch_types_without_a_file_are_left_out(root, tmp_path):
    assert [len(video.qa) for video in read_samples(root, "video_qa", "train")["video_qa"]] == [3] * 6
    assert read_samples(root, "video_qa", "train")["video_qa"][0].captions == ()
    (tmp_path / "text_only.train.jsonl").write_text('{"text": "a red three"}\n')
    assert set(read_samples(tmp_path, "pretrain", "train")) == {"text"}
    with pytest.raises(FileNotFoundError) as refused:
        read_samples(tmp_path, "video_qa", "train")
    assert str(tmp_path) in str(refused.value)
    assert str(refused.value).endswith("video_qa, split train: expected one or more of video_qa.train.jsonl")
    with pytest.raises(FileNotFoundError, match="pretrain, split val: .*video_caption.val.jsonl, video_qa"):
        read_samples(tmp_path, "pretrain", "val")


def test_pretraining_refuses_a_video_with_questions_but_no_caption(tmp_path):
    """A batch with such videos would train the contrastive loss on one rank and not on another."""
    write_data(tmp_path)
    (tmp_path / "video_caption.train.jsonl").write_text('{"video": "0.gif", "captions": ["a red three"]}\n')
    with pytest.raises(RecordError) as refused:
        read_samples(tmp_path, "pretrain", "train")
    assert f"{tmp_path / 'video_qa.train.jsonl'}:2: " in str(refused.value)
    assert "has questions but no captions" in str(refused.value) and "video_caption.train.jsonl" in str(refused.value)
    assert len(read_samples(tmp_path, "video_qa", "train")["video_qa"]) == 6


def test_several_tasks_have_separate_batch_types(labelled):
    samples = read_samples(labelled, "grounding,video_qa,pretrain", "train")
    assert list(samples) == ["grounding", "video_qa", "video", "image", "text"]
    assert [len(of_kind) for of_kind in samples.values()] == [2, 6, 6, 5, 7]
    with pytest.raises(FileNotFoundError, match="no data for image_retrieval"):
        read_samples(labelled, "grounding,image_retrieval", "train")


def test_samples_are_a_sequence_in_the_order_of_their_first_records(tmp_path):
    write_records(tmp_path, "video_caption.train", [
        {"video": f"{name}.gif", "captions": [f"{name} {number}"]} for number, name in enumerate("badacb")])
    write_records(tmp_path, "video_qa.train", [
        {"video": f"./{name}.gif", "qa": [{"question": name, "answers": ["yes"]}]} for name in "cd"])
    samples = read_samples(tmp_path, "pretrain", "train")["video"]
    assert [sample.captions for sample in samples] == [
        ("b 0", "b 5"), ("a 1", "a 3"), ("d 2",), ("c 4",)] == [samples[index].captions for index in range(4)]
    assert [len(sample.qa) for sample in samples] == [0, 0, 1, 1]
    assert samples[-1] == samples[3] and samples[1:3] == [samples[1], samples[2]] and len(samples) == 4
    assert list(Joined([samples, samples])) == 2 * list(samples) and Joined([samples, samples])[5] == samples[1]


def test_a_record_costs_little_memory(tmp_path):
    """The texts stay in the file: 1.3 kB per record became less than 100 bytes."""
    write_records(tmp_path, "image_caption.train", [
        {"image": f"images/{number // 100:04d}/{number:09d}.jpg", "captions": [f"a photo of thing number {number}"]}
        for number in range(5000)])
    read_samples(tmp_path, "image_caption", "train")  # imports, and caches of the standard library
    tracemalloc.start()
    samples = read_samples(tmp_path, "image_caption", "train")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / 5000 < 100 and samples["image_caption"][4999].captions == ("a photo of thing number 4999",)


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
    check_texts(samples, tokenizer, whole - 1, max_words=18)  # cut to fewer words
    for bad in (Sample("there:3", 0, captions=("?!",)), Sample("there:3", 0, qa=(Question("what", ("...",)),))):
        with pytest.raises(RecordError, match="there:3: the text '.*' has no words; remove it"):
            check_texts({"video": [bad]}, tokenizer, 24, 30)


def test_a_long_answer_is_refused_too(tokenizer):
    sample = Sample("there:3", 0, qa=(Question("what", ("red", "red " * 30)),))
    with pytest.raises(RecordError, match="there:3: the text 'red red .*' has 32 tokens .*takes 24; .*max_words"):
        check_texts({"video": [sample]}, tokenizer, 24, 30)


def test_one_caption_and_r_questions_are_drawn_each_kind_of_question_equally_often(root):
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
        kind = next(word for word in ("color", "digit", "describe") if word in question)
        counts[kind] += count
        answers[kind].add(answer)
    assert max(abs(counts[kind] - 800 / 3) for kind in answers) < 60  # standard deviation 13
    assert answers == {"color": {"red", "scarlet"}, "digit": {"three"}, "describe": set(captions)}
    assert (INSTRUCTIONS["video"], "a red three moving left") in questions


def test_texts_are_cleaned_and_cut(root):
    data = dataset(read_samples(root, "pretrain", "train"), max_words=3)
    assert data["text", 0, 0]["caption"] == "here is a"
    assert data["image", 0, 0]["questions"] == [("what does the", "a red three")] * 2


# ---- media -----------------------------------------------------------------------------------------------------------


def test_frames_of_a_video_are_drawn_again_each_epoch_and_an_image_is_the_first_frame(root, tmp_path):
    write_data(tmp_path)
    write_gif(tmp_path / "0.gif", 0, frames=16)
    write_gif(tmp_path / "0.png", 0, frames=3)  # an animated PNG, named as an image
    write_gif(tmp_path / "1.gif", 0, frames=1)  # a video of one frame
    data = dataset(read_samples(tmp_path, "pretrain", "train"))
    videos = [data["video", epoch, 0]["pixels"] for epoch in range(8)]
    assert len({video.numpy().tobytes() for video in videos}) > 4
    every = to_pixels(read_video(tmp_path / "0.gif", None), 8)
    for video in videos:
        for t in range(4):  # one frame of each quarter
            assert any(video[:, t].equal(every[:, frame]) for frame in range(4 * t, 4 * t + 4))
    assert data["image", 0, 0]["pixels"].equal(to_pixels(read_image(tmp_path / "0.png"), 8))
    still = data["video", 0, 1]["pixels"]
    assert still.shape == (3, 4, 8, 8) and still.equal(still[:, :1].expand(-1, 4, -1, -1))


def test_two_sources_of_one_batch_type_are_separate_streams(root):
    samples = read_samples(root, "pretrain", "train")
    data = dataset({"video": samples["video"], "video@1": samples["video"]})
    one, other = data["video", 0, 0], data["video@1", 0, 0]
    assert one["kind"] == other["kind"] == "video" and one["source"] == other["source"]
    assert not np.array_equal(one["noise"], other["noise"])


def test_a_corrupt_video_is_replaced_by_the_next_and_reported(tmp_path, tokenizer):
    write_data(tmp_path)
    (tmp_path / "2.gif").write_bytes(b"GIF89a, but not for long")
    (tmp_path / "5.gif").unlink()
    data = dataset(read_samples(tmp_path, "pretrain", "train"))
    item = data["video", 0, 2]
    assert len(item["errors"]) == 1
    assert item["errors"][0].startswith(f"{tmp_path / 'video_caption.train.jsonl'}:3: {tmp_path / '2.gif'} cannot be")
    assert data["video", 1, 2]["errors"] == item["errors"]  # the same message each epoch, so it is counted once
    instead = data["video", 0, 3]
    assert instead["errors"] == [] and item["pixels"].equal(instead["pixels"])
    assert {key: item[key] for key in ("caption", "questions", "source", "positive_id")} == {
        key: instead[key] for key in ("caption", "questions", "source", "positive_id")
    }
    last = data["video", 0, 5]  # the sample after the last is the first
    assert "5.gif does not exist" in last["errors"][0] and last["source"].endswith("jsonl:1")
    batch = Collate(tokenizer)([item, last, instead])
    assert batch["errors"] == item["errors"] + last["errors"]
    assert batch["pixels"].shape[0] == 3


def test_an_image_named_as_a_video_is_reported_like_a_corrupt_file(tmp_path):
    write_data(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    write_records(tmp_path, "video_caption.train", [{"video": name, "captions": ["a"]} for name in ("0.jpg", "1.gif")])
    item = dataset(read_samples(tmp_path, "video_caption", "train"))["video_caption", 0, 0]
    assert "0.jpg is a still image, where a video was expected" in item["errors"][0]
