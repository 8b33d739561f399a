"""Evaluation: the same on any number of processes; unreadable files; samples of records; what the records decide."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from predictors import make_predictor, write_media, write_records
from processes import Processes

import mplug2.inference
from mplug2.config import PRESETS
from mplug2.data import media_batches as media_batches_module
from mplug2.data.media_batches import MediaReader, Medium, even_parts, media_batches, read_ahead
from mplug2.data.records import read_records
from mplug2.distributed import AllRanksError
from mplug2.evaluation.bootstrap import Score
from mplug2.evaluation.chance import chance_level
from mplug2.evaluation.data import EvalOptions, EvalSplit, find_data, read_answer_list
from mplug2.evaluation.evaluate import EVALUATORS, EvalResult, check_data, evaluate
from mplug2.evaluation.labels import UnknownClasses
from mplug2.evaluation.results import format_results, refusal
from mplug2.evaluation.settings import WritingSettings
from mplug2.inference import Inference, Stopped
from mplug2.predictor import Generation
from mplug2.tasks import EVALUATED

COLORS = ("red", "green", "blue")
WITH_CLASSES = ("text_classification", "text_pair_classification", "video_classification", "visual_entailment",
                "image_pair_reasoning")


def all_tasks_predictor(**inference):
    """A model with every module. Images are classified without a head, by captions."""
    labels = {task: COLORS for task in WITH_CLASSES} | {
        "visual_entailment": ("contradiction", "entailment", "neutral"), "image_pair_reasoning": ("false", "true"),
        "text_pair_classification": (),
    }
    predictor = make_predictor(",".join(["pretrain", "text_qa", *WITH_CLASSES, "grounding"]), classes=labels)
    predictor.inference = Inference(**{"batch_size": 4, "skip_unreadable": True, **inference})
    return predictor


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Records of every task. Some files cannot be read, some are shared, some have many questions."""
    root = tmp_path_factory.mktemp("data")
    videos, images = [f"{i}.gif" for i in range(8)], [f"{i}.png" for i in range(8)]
    for i, name in enumerate(videos + images):
        write_media(root / name, i, 4 if name.endswith("gif") else 1)
    write_media(root / "7.gif", 7, 1)  # a video of one frame
    (root / "5.gif").write_bytes(b"damaged")
    (root / "6.png").unlink()
    said = [f"a {COLORS[i % 3]} {word}" for i, word in enumerate("one two three one two three one two".split())]
    qa = [[{"question": f"which colour is it {word}".strip(), "answers": [COLORS[i % 3]], "kind": "color"}
           for word in ("now", "", "up", "down", "left")[: 1 + i % 5]] for i in range(8)]
    for modality, files in (("video", videos), ("image", images)):
        media = [{modality: file} for file in files]
        write_records(root, f"{modality}_caption.test", [
            {**one, "captions": [text, "red"]} for one, text in zip(media, said)])
        write_records(root, f"{modality}_qa.test", [{**one, "qa": asked} for one, asked in zip(media, qa)])
        write_records(root, f"{modality}_retrieval.test", [
            {**one, "captions": [text], "positive_id": text, "gallery": "a" if i < 5 else "b"}
            for i, (one, text) in enumerate(zip(media, said))])
        write_records(root, f"{modality}_classification.test", [
            {**one, "label": COLORS[i % 3]} for i, one in enumerate(media)])
    write_records(root, "image_classification.train", [{"image": "0.png", "label": label} for label in COLORS])
    write_records(root, "text_qa.test", [
        {"qa": [{**one, "question": f"{one['question']} {text}"} for one in asked]} for text, asked in zip(said, qa)])
    write_records(root, "text_classification.test", [{"text": t, "label": COLORS[i % 3]} for i, t in enumerate(said)])
    write_records(root, "text_pair_classification.test", [
        {"texts": [t, said[i - 1]], "label": i / 2} for i, t in enumerate(said)])
    write_records(root, "visual_entailment.test", [
        {"image": images[i // 2], "text": t, "label": "neutral"} for i, t in enumerate(said)])
    write_records(root, "image_pair_reasoning.test", [
        {"images": [images[i], images[i - 1]], "text": t, "label": "true"} for i, t in enumerate(said)])
    write_records(root, "grounding.test", [
        {"image": images[-1 - i // 3], "text": t, "box": [0.5, 0.5, 0.4, 0.2 + i / 20]} for i, t in enumerate(said)])
    return root


def summary(result: EvalResult) -> dict:
    lines = [prediction.line("test") for prediction in result.predictions]
    return {"metrics": result.metrics, "errors": result.errors, "lines": lines, "skipped": result.skipped,
            "records": result.records, "notes": result.notes}


def evaluate_on_a_rank(root: Path, options: EvalOptions) -> dict:
    torch.set_num_threads(1)
    predictor = all_tasks_predictor(rank=dist.get_rank(), world_size=dist.get_world_size())
    return summary(evaluate(predictor, EvalSplit(root, "test"), options=options))


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    processes = Processes(3)
    yield processes
    assert processes.close() == [0, 0, 0]


OPTIONS = {
    "default": EvalOptions(rerank=2),
    "beams, a list of answers, all captions": EvalOptions(
        Generation(beams=2, min_length=2), Generation(beams=2), ("red", "green", "a red one"), all_captions=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_two_and_three_processes_give_the_same_results(root, processes, options):
    one = summary(evaluate(all_tasks_predictor(), EvalSplit(root, "test"), options=options))
    assert {line["task"] for line in one["lines"]} == set(EVALUATED)
    assert len(one["metrics"]) > 40 and one["skipped"]
    for world_size in (2, 3):
        main, *others = processes.run(evaluate_on_a_rank, *[(root, options)] * world_size)
        for key in ("metrics", "errors"):
            assert list(main[key]) == list(one[key])
            np.testing.assert_allclose(list(main[key].values()), list(one[key].values()), rtol=0, atol=1e-5)
        for found, expected in zip(main["lines"], one["lines"], strict=True):
            assert_same_line(found, expected)
        assert (main["skipped"], main["records"]) == (one["skipped"], one["records"])
        assert all(other["metrics"] == {} for other in others)


def assert_same_line(found: dict, expected: dict) -> None:
    floats = {"confidence"} | ({"prediction"} if not isinstance(expected["prediction"], str) else set())
    for name, value in expected.items():
        if name in floats:
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-4)  # rounded to four digits
        else:
            assert found[name] == value, name


@pytest.mark.slow
def test_every_file_is_read_and_encoded_by_one_rank(root, processes):
    counts = processes.run(count_encoded, (root,), (root,), (root,))
    files = {record.video for record in read_records(root, "video_qa", "test")} - {root / "5.gif"}
    assert sum(counts) == len(files) and all(0 < count < len(files) for count in counts)


def count_encoded(root: Path) -> int:
    predictor = all_tasks_predictor(rank=dist.get_rank(), world_size=dist.get_world_size())
    encode, seen = predictor.model.encode_vision, []
    predictor.model.encode_vision = lambda pixels: seen.append(len(pixels)) or encode(pixels)
    evaluate(predictor, EvalSplit(root, "test"), ["video_qa"])
    return sum(seen)


@pytest.mark.slow
def test_an_error_on_one_rank_is_raised_on_all_of_them(root, processes, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    lines = (tmp_path / "data/video_qa.test.jsonl").read_text().replace("which colour is it now", "?", 1)
    (tmp_path / "data/video_qa.test.jsonl").write_text(lines)
    found = processes.run(error_of, (tmp_path / "data",), (tmp_path / "data",))
    assert len(set(found)) == 1 and "is empty" in found[0]


def error_of(root: Path) -> str:
    predictor = all_tasks_predictor(rank=dist.get_rank(), world_size=dist.get_world_size())
    with pytest.raises(ValueError) as raised:
        evaluate(predictor, EvalSplit(root, "test"), ["video_qa"])
    return str(raised.value)


@pytest.mark.slow
def test_a_stop_ends_the_evaluation_on_all_ranks(root, processes):
    assert processes.run(stopped_by_rank_one, (root,), (root,)) == ["stopped", "stopped"]
    with pytest.raises(Stopped):
        evaluate(all_tasks_predictor(on_batch=lambda: True), EvalSplit(root, "test"))


def stopped_by_rank_one(root: Path) -> str:
    rank = dist.get_rank()
    predictor = all_tasks_predictor(rank=rank, world_size=dist.get_world_size(), on_batch=lambda: rank == 1)
    try:
        evaluate(predictor, EvalSplit(root, "test"))
    except Stopped:
        return "stopped"
    return "finished"


# ---- files that cannot be read ---------------------------------------------------------------------------------------


def test_an_error_of_another_rank_is_raised_with_its_message(root, monkeypatch):
    monkeypatch.setitem(EVALUATORS, "caption", lambda *_: ({}, []))
    monkeypatch.setattr("mplug2.evaluation.evaluate.all_gather_object", lambda problem: [problem, "damaged there"])
    with pytest.raises(AllRanksError, match="^damaged there$"):
        evaluate(all_tasks_predictor(world_size=2), EvalSplit(root, "test"), ["video_caption"])


def test_a_stop_and_the_unreadable_files_of_another_rank_count_on_this_one(root, monkeypatch):
    medium = Medium((Path("a.gif"),), "video")
    for stopped in (False, True):
        monkeypatch.setattr(mplug2.inference, "all_gather_object",
                            lambda share, stopped=stopped: [share, ({7: "theirs"}, {medium: "gone"}, "", stopped)])
        predictor = all_tasks_predictor(world_size=2)
        results = iter([([0], ["mine"])])
        if stopped:
            with pytest.raises(Stopped) as raised:
                predictor.collect(results, 1)
        found = raised.value.found if stopped else predictor.collect(results, 1)
        assert found == {0: "mine", 7: "theirs"} and predictor.unreadable == {medium: "gone"}


def test_a_task_needs_records_in_one_of_the_splits(root):
    test, val = EvalSplit(root, "test"), EvalSplit(root, "val")
    check_data(all_tasks_predictor(), [val, test], ["video_qa"], 1.0)
    with pytest.raises(ValueError, match="has no records of video_qa in the splits val; leave it out of --task"):
        check_data(all_tasks_predictor(), [val], ["video_qa"], 1.0)


def test_unreadable_files_are_skipped_named_and_counted(root):
    result = evaluate(all_tasks_predictor(), EvalSplit(root, "test"), ["video_caption", "image_qa"])
    assert result.records == 16
    assert {Path(source).name for source in result.skipped} == {"video_caption.test.jsonl:6", "image_qa.test.jsonl:7"}
    damaged, missing = result.skipped.values()
    assert "5.gif cannot be decoded" in damaged and "6.png does not exist" in missing
    assert len([p for p in result.predictions if p.task == "video_caption"]) == 7


def test_a_result_has_the_value_and_the_standard_error_of_each_score():
    result = EvalResult({"qa_accuracy": Score(0.75, 0.125), "caption_cider": Score(1.5, 0.25)})
    assert result.metrics == {"qa_accuracy": 0.75, "caption_cider": 1.5}
    assert result.errors == {"qa_accuracy": 0.125, "caption_cider": 0.25}


def test_the_chance_level_is_shown_for_the_metrics_of_the_result_only():
    text = format_results({"test": EvalResult({"qa_accuracy": Score(0.5, 0.1)})}, {"qa_accuracy": 0.25, "t2v_r1": 0.01})
    assert "qa_accuracy" in text and "25.0" in text and "t2v_r1" not in text


def test_as_many_skipped_records_as_allowed_are_allowed():
    result = EvalResult(records=4, skipped={"a:1": "gone"})
    assert refusal({"test": result}, 0.25) == ""
    assert "1 of 4 records were skipped, more than max_skipped=0.24" in refusal({"test": result}, 0.24)
    assert "no record was evaluated" in refusal({"test": EvalResult()}, 1.0)


def test_a_split_of_unreadable_files_has_no_metrics(root, tmp_path):
    for task in ("video_caption", "video_qa", "video_retrieval", "video_classification", "image_pair_reasoning"):
        shutil.copy(root / f"{task}.test.jsonl", tmp_path)
    result = evaluate(all_tasks_predictor(), EvalSplit(tmp_path, "test"))
    assert result.metrics == {} and result.predictions == [] and len(result.skipped) == result.records == 40


# ---- what the records decide -----------------------------------------------------------------------------------------


def test_the_record_decides_between_image_and_video(root, monkeypatch):
    """A one-frame video gets the prompt and the frames of a video, and an animated file named as an image those of an
    image."""
    predictor, seen = all_tasks_predictor(), {}
    on_media = predictor.on_media

    def spy(media, function):
        def note(vision, modality, indices):
            seen.update((media[i], (modality, vision.shape[1])) for i in indices)
            return function(vision, modality, indices)
        return on_media(media, note)

    monkeypatch.setattr(predictor, "on_media", spy)
    evaluate(predictor, EvalSplit(root, "test"), ["video_caption"])
    video_tokens = seen[Medium((root / "0.gif",), "video")][1]
    assert seen[Medium((root / "7.gif",), "video")] == ("video", video_tokens)
    predictor.caption([Medium((root / "0.gif",), "image")])
    assert seen[Medium((root / "0.gif",), "image")][0] == "image"
    assert seen[Medium((root / "0.gif",), "image")][1] < video_tokens


def test_a_caption_that_looks_like_a_file_is_a_text(root, tmp_path):
    for name in ("0.png", "1.png"):
        shutil.copy(root / name, tmp_path)
    write_records(tmp_path, "image_retrieval.test", [
        {"image": "0.png", "captions": ["red 0001.jpg"]}, {"image": "1.png", "captions": ["two one.mp4"]}])
    result = evaluate(all_tasks_predictor(), EvalSplit(tmp_path, "test"))
    assert result.metrics["t2i_r5"] == 1 and result.predictions[0].question == "red 0001.jpg"


def test_references_are_scored_whole(root, tmp_path):
    """A caption that equals the first 30 words of a longer reference is not that reference."""
    shutil.copy(root / "0.gif", tmp_path)
    write_records(tmp_path, "video_caption.test", [{"video": "0.gif", "captions": ["red " * 40]}])
    predictor = all_tasks_predictor()
    predictor.caption = lambda media, **_: ["red " * 30]
    result = evaluate(predictor, EvalSplit(tmp_path, "test"))
    assert result.metrics["caption_exact"] == 0 and len(result.predictions[0].truth[0].split()) == 40


def test_settings_of_the_search_reach_captions_and_answers(root, monkeypatch):
    predictor, asked = all_tasks_predictor(), {}
    monkeypatch.setattr(predictor, "caption", lambda media, **how: asked.update(caption=how) or ["a"] * len(media))
    monkeypatch.setattr(predictor, "answer", lambda media, questions, **how: asked.update(answer=how)
                        or ["a"] * len(media))
    writing = WritingSettings(beams=3, min_length=2, max_length=7, prompted=False)
    options = EvalOptions(writing.generation("caption"), writing.generation("answer"))
    evaluate(predictor, EvalSplit(root, "test"), ["video_caption", "image_qa"], options)
    expected = {"beams": 3, "min_length": 2, "max_length": 7, "prompted": False, "instructed": False}
    assert asked == {"caption": expected, "answer": {**expected, "answer_list": None}}


def test_the_released_protocol_and_flags_that_win_over_it():
    assert WritingSettings(protocol="released").generation("caption") == Generation(5, 4, 20, False)
    assert WritingSettings(protocol="released").generation("answer") == Generation(5, 1, 10, True)
    assert WritingSettings(protocol="released", beams=2).generation("caption") == Generation(2, 4, 20, False)
    assert WritingSettings().generation("caption") == Generation()
    assert WritingSettings(protocol="figure").generation("caption") == Generation(instructed=True)
    assert WritingSettings(protocol="figure", beams=3).generation("answer") == Generation(3)
    with pytest.raises(ValueError, match="protocol=figure: its captions answer an instruction"):
        WritingSettings(protocol="figure", prompted=False)
    assert WritingSettings(min_length=3, max_length=3).generation("answer") == Generation(min_length=3, max_length=3)
    none = WritingSettings(protocol="released", min_length=0, prompted=True)
    assert none.generation("caption") == Generation(5, 0, 20, True)
    with pytest.raises(ValueError, match="min_length=9 with max_length=3"):
        WritingSettings(min_length=9, max_length=3)
    with pytest.raises(ValueError, match="beams=0"):
        WritingSettings(beams=0)


def test_a_prompt_that_the_model_writes_itself_is_cut_off(root, monkeypatch):
    predictor = all_tasks_predictor()
    monkeypatch.setattr(predictor, "caption", lambda media, **_: ["so a video of a red one"] * len(media))
    options = EvalOptions(Generation(prompted=False))
    lines = evaluate(predictor, EvalSplit(root, "test"), ["video_caption"], options).predictions
    assert {line.prediction for line in lines} == {"a red one"}
    lines = evaluate(predictor, EvalSplit(root, "test"), ["video_caption"]).predictions
    assert {line.prediction for line in lines} == {"so a video of a red one"}
    monkeypatch.setattr(predictor, "caption", lambda media, **_: ["a red one"] * len(media))  # it wrote no prompt
    lines = evaluate(predictor, EvalSplit(root, "test"), ["video_caption"], options).predictions
    assert {line.prediction for line in lines} == {"a red one"}


def test_the_length_of_a_text_is_that_of_the_checkpoint_unless_told(root):
    predictor = all_tasks_predictor()
    media = [root / "0.gif", root / "1.gif"]
    for length in (1, 2, 5):
        predictor.preprocess = dataclasses.replace(predictor.preprocess, max_length=length)
        assert predictor.caption(media) == predictor.caption(media, max_length=length)
        questions = ["which colour is it"] * 2
        assert predictor.answer(media, questions) == predictor.answer(media, questions, max_length=length)
        ids = predictor.tokenizer.encode(predictor.caption(media), special=False)[0]
        assert ids.shape[1] <= length


# ---- samples of records ----------------------------------------------------------------------------------------------


def test_a_limit_is_a_sample_that_is_the_same_in_every_run_and_keeps_galleries_whole(root):
    whole, some = EvalSplit(root, "test"), EvalSplit(root, "test", limit=3)
    assert len(whole.records("video_qa")) == 8
    chosen = [record.id for record in some.records("video_qa")]
    assert len(chosen) == 3 and chosen == [record.id for record in some.records("video_qa")]
    assert chosen != [record.id for record in whole.records("video_qa")[:3]]
    assert chosen == sorted(chosen)  # in the order of the file
    galleries = {record.gallery for record in some.records("video_retrieval")}
    assert len(galleries) == 1
    sizes = {gallery: sum(record.gallery == gallery for record in whole.records("video_retrieval")) for gallery in "ab"}
    assert len(some.records("video_retrieval")) == sizes[galleries.pop()]
    assert list(EvalSplit(root, "test", limit=100).records("video_qa")) == list(whole.records("video_qa"))


def test_classes_without_a_head_come_from_the_training_split(root, tmp_path):
    """Never from the evaluated records: with two records of one class every model would be right."""
    predictor = all_tasks_predictor()
    lines = evaluate(predictor, EvalSplit(root, "test"), ["image_classification"]).predictions
    assert all(line.confidence is None for line in lines)  # a cosine is no probability
    for file in ("0.png", "3.png"):
        shutil.copy(root / file, tmp_path)
    write_records(tmp_path, "image_classification.test", [{"image": f"{i}.png", "label": "red"} for i in (0, 3)])
    with pytest.raises(UnknownClasses, match="no image_classification.train.jsonl, so the classes are unknown"):
        evaluate(predictor, EvalSplit(tmp_path, "test"), ["image_classification"])
    result = evaluate(predictor, EvalSplit(tmp_path, "test"))
    assert result.metrics == {} and "the classes are unknown" in result.notes[0]
    shutil.copy(root / "image_classification.train.jsonl", tmp_path / "image_classification.train.jsonl")
    other = tmp_path / "other"
    shutil.copytree(tmp_path, other)
    again = evaluate(predictor, EvalSplit(other, "test")).predictions
    assert [line.prediction for line in again] == [lines[0].prediction, lines[3].prediction]
    (other / "image_classification.captions.json").write_text(json.dumps({"red": ["a red one"], "left": ["left"]}))
    found = evaluate(predictor, EvalSplit(other, "test")).predictions
    assert {line.prediction for line in found} <= {"red", "left"}


def test_a_baseline_that_reads_the_question_knows_the_training_answers(tmp_path):
    asked = [("is it red", "yes", "a")] * 2 + [("is it big", "no", "a")] * 3 + [("how many", "two", "b")]
    write_records(tmp_path, "video_qa.train", [
        {"video": "0.gif", "qa": [{"question": q, "answers": [a], "kind": k}]} for q, a, k in asked])
    write_records(tmp_path, "video_qa.test", [{"video": "0.gif", "qa": [
        {"question": "Is it red?", "answers": ["Yes"], "kind": "a"},       # the answer to the same question
        {"question": "is it blue", "answers": ["no"], "kind": "a"},        # to the same kind
        {"question": "how many", "answers": ["three"], "kind": "b"},       # wrong
        {"question": "who", "answers": ["no"]},                            # the most common answer
    ]}])
    assert chance_level(EvalSplit(tmp_path, "test")) == {"qa_accuracy": 0.75, "qa_a": 1.0, "qa_b": 0.0}


# ---- where the data comes from ---------------------------------------------------------------------------------------


def test_the_data_is_that_of_the_checkpoint_unless_told(root, tmp_path):
    assert find_data("given", [root], ["test"]) == (Path("given"), "--data")
    assert find_data("", [tmp_path / "gone", tmp_path, root], ["test"]) == (root, "the training data of the checkpoint")
    assert find_data("", [], ["test"]) == (None, "the tiny world")
    assert "does not record" in find_data("", None, ["test"])[1]
    with pytest.raises(ValueError, match="gone: the training data of the checkpoint is gone, or has no split val"):
        find_data("", [tmp_path / "gone"], ["val"])


def test_lists_of_answers_are_cleaned_and_come_in_order(root, tmp_path):
    (tmp_path / "answers.txt").write_text("Red!\nblue\n\nred\n")
    assert read_answer_list(str(tmp_path / "answers.txt"), root) == ("red", "blue")
    with pytest.raises(ValueError, match="answers='train': found no answers there"):
        read_answer_list("train", root)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_medium_is_in_one_batch_with_all_its_inputs():
    media = [Medium((Path(name),), kind) for name, kind in
             [("a", "video"), ("b", "image"), ("a", "video"), ("c", "video"), ("d", "video"), ("a", "image")] * 2]
    batches = media_batches(dict(enumerate(media)), 4)
    seen = [medium for batch in batches for medium in batch.media]
    assert len(seen) == len(set(seen)) == 5
    for batch in batches:
        assert len({medium.modality for medium in batch.media}) == 1
        assert len({len(indices) for indices in batch.indices}) == 1
        assert len(batch.media) == 1 or sum(map(len, batch.indices)) <= 4
        assert all(media[i] == medium for medium, indices in zip(batch.media, batch.indices) for i in indices)
    thrice = dict(enumerate([*media[:1] * 3, *media[1:2] * 3, *media[3:4] * 3]))  # two videos and an image
    assert sorted(len(batch.media) for batch in media_batches(thrice, 5)) == [1, 1, 1]
    assert sorted(len(batch.media) for batch in media_batches(thrice, 6)) == [1, 2]


@given(count=st.integers(0, 300), size=st.integers(1, 70))
@example(count=64, size=64)
def test_ranks_get_about_equally_many_items(count, size):
    parts = even_parts(count, size)
    assert [item for part in parts for item in part] == [*range(count)]
    sizes = [len(part) for part in parts]
    assert not sizes or (0 < min(sizes) and max(sizes) <= min(size, min(sizes) + 1))
    for ranks in (2, 4, 8) if count >= 64 else ():
        shares = [sum(sizes[rank::ranks]) for rank in range(ranks)]
        assert max(shares) - min(shares) <= max(1, len(parts) // ranks)  # one item of each batch


def test_workers_that_decode_draw_from_no_global_generator(monkeypatch):
    given = {}
    monkeypatch.setattr(media_batches_module, "DataLoader", lambda *_, **settings: given.update(settings) or ())
    read_ahead(MediaReader([], 1, 8), workers=1)
    assert isinstance(given["generator"], torch.Generator) and given["generator"] is not torch.default_generator


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_and_batch_sizes_do_not_change_the_results(root, workers):
    tasks = ["video_qa", "image_pair_reasoning"]
    expected = summary(evaluate(all_tasks_predictor(batch_size=64), EvalSplit(root, "test"), tasks))
    found = summary(evaluate(all_tasks_predictor(batch_size=2, workers=workers), EvalSplit(root, "test"), tasks))
    for one, other in zip(found["lines"], expected["lines"], strict=True):
        assert_same_line(one, other)


def test_batches_are_smaller_where_the_keys_and_values_of_v_are_large(root, monkeypatch):
    """The keys and values of the decoder stay within MEMORY, and the results are the same."""
    tasks, predictor, sizes = ["video_qa", "image_qa", "video_caption"], all_tasks_predictor(batch_size=64), []
    expected = summary(evaluate(predictor, EvalSplit(root, "test"), tasks))
    decoder, init_state = predictor.model.decoder, predictor.model.decoder.init_state

    def spy(memory, memory_mask=None):
        state = init_state(memory, memory_mask)
        sizes.append(sum(key.nbytes + value.nbytes for key, value in state.memories) / memory.shape[1])
        return state

    monkeypatch.setattr(decoder, "init_state", spy)
    one = 2 * predictor.model.config.width * 4 * len(decoder.layers)  # bytes of a token
    tokens = {"video": 1 + 4 * 4, "image": 1 + 4}  # 8 pixels, patches of 4, 4 frames
    for limit in (1, 3):
        monkeypatch.setattr(mplug2.inference, "MEMORY", limit * one * tokens["video"] + 1)
        for modality in tokens:
            sizes.clear()
            evaluate(predictor, EvalSplit(root, "test"), [f"{modality}_qa"])
            assert max(sizes) == one * min(6, limit * tokens["video"] // tokens[modality])
        found = summary(evaluate(predictor, EvalSplit(root, "test"), tasks))
        for mine, other in zip(found["lines"], expected["lines"], strict=True):
            assert_same_line(mine, other)


def test_a_batch_of_the_large_preset_has_ten_videos_of_16_frames():
    predictor = make_predictor(batch_size=64, frames=16)
    predictor.model.config = PRESETS["large"]()
    assert predictor.most_inputs([Medium((Path("a.mp4"),), "video")]) == 10
    assert predictor.most_inputs([Medium((Path("a.png"),), "image")]) == 64
    predictor.preprocess = dataclasses.replace(predictor.preprocess, frames=10_000)
    assert predictor.most_inputs([Medium((Path("a.mp4"),), "video")]) == 1


# ---- the progress bar ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "progress"), [(0, True), (0, False), (1, True)])
def test_a_progress_bar_shows_a_rate_and_the_time_that_is_left(root, monkeypatch, capsys, rank, progress):
    """On the main rank alone, and only for what takes longer than a few seconds (here: a delay of 0)."""
    real = mplug2.inference.tqdm

    def bar(**settings):
        assert settings["delay"] == 3
        return real(**{**settings, "delay": 0, "mininterval": 0})

    monkeypatch.setattr(mplug2.inference, "tqdm", bar)
    predictor = all_tasks_predictor(batch_size=1, progress=progress, rank=rank)
    evaluate(predictor, EvalSplit(root, "test"), ["video_caption"])
    shown = r"test video_caption: +\d+%\|.*\| \d/\d \[\d\d:\d\d<\d\d:\d\d, .*batch"  # done/all [time<left, rate
    assert bool(re.search(shown, capsys.readouterr().err)) == (progress and rank == 0)


def test_half_precision_changes_little(root):
    exact = evaluate(all_tasks_predictor(), EvalSplit(root, "test"), ["grounding"])
    rough = evaluate(all_tasks_predictor(precision="bfloat16"), EvalSplit(root, "test"), ["grounding"])
    boxes, others = ([line.prediction for line in result.predictions] for result in (exact, rough))
    assert boxes != others
    np.testing.assert_allclose(boxes, others, atol=0.1)
