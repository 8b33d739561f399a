"""`build_data`: sources and their weights, steps of a number of epochs, tokenizer and classes, and the batches."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from data_helpers import SUBJECTS, assert_equal_batches, make_tokenizer, write_data, write_records

import mplug2
from mplug2.data.build import DataSettings, TrainingData, build_data, read_sources, texts_per_epoch
from mplug2.data.records import RecordError, held_out_media
from mplug2.data.shards import pack
from mplug2.distributed import DistInfo

MODEL = mplug2.PRESETS["tiny"](image_size=8, patch_size=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("build") / "data")


def build(root, world_size: int = 1, rank: int = 0, tokenizer=None, classes=None, **settings) -> TrainingData:
    """The data of a run of six steps with four samples each, without workers."""
    settings = DataSettings(data=str(root), **{"batch_size": 4, "max_steps": 6, "text_weight": 0.3, **settings})
    return build_data(settings, MODEL, DistInfo(rank, world_size, torch.device("cpu")), 0, tokenizer, classes)


def test_sources_are_folders_with_weights():
    def sources(text: str) -> dict[str, float]:
        return {str(root): weight for root, weight in read_sources(text).items()}

    assert sources("a/b") == {"a/b": 1.0}
    assert sources("a=2,b/c=0.5,d") == {"a": 2.0, "b/c": 0.5, "d": 1.0}
    for text, message in (("a=x", "expected folders with weights"), ("a,a", "each folder once"),
                          ("a=-1,b", "at least one weight above 0"), ("a=0", "at least one weight above 0")):
        with pytest.raises(ValueError, match=f"data='{text}'.*{message}"):
            read_sources(text)


def test_media_that_another_source_holds_out_are_reported(tmp_path, capsys):
    """As in the union of RefCOCO and RefCOCOg, whose folders link to the same images."""
    (tmp_path / "coco").mkdir()
    for name, train, val in (("refcoco", "abc", "de"), ("refcocog", "bde", "af"), ("other", "gh", "i"),
                             ("single", "j", "j")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "media").symlink_to(tmp_path / "coco")
        for split, images in (("train", train), ("val", val)):
            write_records(tmp_path / name, f"grounding.{split}", [
                {"image": f"media/{image}.png", "text": SUBJECTS[0], "box": [0.5, 0.5, 0.2, 0.2]} for image in images])
    roots = {name: tmp_path / name for name in ("refcoco", "refcocog", "other", "single")}
    assert held_out_media([roots["refcoco"], roots["other"]], "grounding") == ""
    line = held_out_media([roots["refcoco"], roots["refcocog"]], "grounding")
    assert f"2 in {roots['refcoco']}/grounding.val.jsonl, 1 in {roots['refcocog']}/grounding.val.jsonl; remove" in line
    build(f"{roots['refcoco']},{roots['refcocog']}", task="grounding", tokenizer=make_tokenizer())
    assert "media to train on are held out elsewhere: 2 in" in capsys.readouterr().out
    build(roots["single"], task="grounding", tokenizer=make_tokenizer())  # `python -m mplug2.data` checks one data set
    assert "held out" not in capsys.readouterr().out


def test_the_ranks_share_the_batches_of_one_process(root):
    """Two micro-batches a step, on two ranks: every sample is drawn by exactly one of them."""
    whole = list(build(root, accumulation_steps=2).batches)
    parts = [list(build(root, 2, rank, accumulation_steps=2).batches) for rank in (0, 1)]
    assert [sorted(one + other) for one, other in zip(*parts, strict=True)] == list(map(sorted, whole))
    assert len(whole) == 12 and parts[0] != parts[1]


def test_the_name_of_a_single_folder_may_have_any_character(tmp_path):
    for name in ("lr=2", "a,b", "x=1,y=2"):
        (tmp_path / name).mkdir()
        assert read_sources(str(tmp_path / name)) == {tmp_path / name: 1.0}


def test_names_with_commas_and_equals_signs_are_found_in_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=2", "a,b", "a", "x=1,y=2", "c"):
        (tmp_path / name).mkdir()
    for text, expected in (
        ("lr=2,c", {"lr=2": 1, "c": 1}), ("lr=2=3,c=0.5", {"lr=2": 3, "c": 0.5}), ("c,a,b=2", {"c": 1, "a,b": 2}),
        ("a=2,c", {"a": 2, "c": 1}), ("x=1,y=2=0.25,a,b", {"x=1,y=2": 0.25, "a,b": 1}),
        ("c=2,gone", {"c": 2, "gone": 1}),
    ):
        assert {str(root): weight for root, weight in read_sources(text).items()} == expected, text
    with pytest.raises(ValueError, match="name has '=' or ',', check that it exists"):
        read_sources("gone=new,c")
    for text in ("a=nan,c", "a=inf,c"):
        with pytest.raises(ValueError, match="at least one weight above 0"):
            read_sources(text)
    for text in ("a,", ",a", "a,,c", "=2"):
        with pytest.raises(ValueError, match=f"data={text!r}: the name of a folder is empty"):
            read_sources(text)


def test_the_share_of_a_batch_type_is_divided_among_its_sources(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_records(other, "text_only.train", [{"text": SUBJECTS[0]}])
    data = build(f"{root}=1,{other}=3", video_weight=0.6, image_weight=0.0, text_weight=0.4, max_steps=100)
    assert data.sizes == {"video": 6, "text": 7, "text@1": 1}  # a batch type with weight 0 is left out
    counts = {stream: data.batches.kinds.count(stream) for stream in data.sizes}
    assert counts == {"video": 60, "text": 10, "text@1": 30}
    assert data.eval_root == root and list(data.roots.values()) == [1.0, 3.0]
    with pytest.raises(ValueError, match=r"all batch types that have training data \(text\) have weight 0"):
        build(other, text_weight=0.0)


def test_tasks_share_the_steps_by_their_weights():
    settings = DataSettings(task="video_qa,pretrain,grounding", task_weights="1,2,0", video_weight=3, image_weight=1,
                            text_weight=0)
    assert settings.batch_weights() == {"video_qa": 1.0, "video": 1.5, "image": 0.5, "text": 0.0, "grounding": 0.0}
    assert DataSettings(task="video_qa, grounding").task == "video_qa,grounding"
    assert DataSettings(task="video_qa,grounding").batch_weights() == {"video_qa": 1.0, "grounding": 1.0}


def test_an_epoch_sees_each_caption_or_question_once(root, tmp_path):
    """Six videos with two captions and three questions (two per step), five images with one caption, seven texts."""
    assert build(root, epochs=3.0).steps == 3 * (6 * 2 + 5 + 7) / 4
    assert build(root, epochs=3.0, questions_per_sample=1).steps == -(-3 * (6 * 3 + 5 + 7) // 4)
    sample = SimpleNamespace(captions=("a",), qa=("asked",) * 5)  # two of five questions are asked at a time
    assert texts_per_epoch(DataSettings(questions_per_sample=2), {"video": [sample, sample]}, {}) == 6
    assert build(root, epochs=0.01).steps == 1 and build(root, max_steps=9).steps == 9
    assert build(root).steps_per_epoch == -(-(6 + 5 + 7) // 4)
    pack(root, tmp_path / "shards")
    shards = build(tmp_path / "shards", epochs=2.0, tokenizer=make_tokenizer())
    assert shards.steps == 2 * (6 + 5 + 7) / 4 and shards.eval_root is None
    assert build(tmp_path / "shards", tokenizer=make_tokenizer(), eval_data=str(root)).eval_root == root


def test_a_vocabulary_is_trained_on_the_texts_unless_there_is_a_tokenizer(root, tmp_path):
    trained = build(root).tokenizer
    for text in (*SUBJECTS, "which digit is shown scarlet", "a video of", "what does the image describe"):
        assert trained.unk not in trained.encode([text])[0]
    given = make_tokenizer()
    assert build(root, tokenizer=given).tokenizer is given
    given.save(tmp_path)
    settings = DataSettings(data=str(root), tokenizer=str(tmp_path / "tokenizer.json"))
    assert len(build_data(settings, MODEL, DistInfo(0, 1, torch.device("cpu")), 0).tokenizer) == len(given)
    pack(root, tmp_path / "shards")
    with pytest.raises(ValueError, match="tar shards: a vocabulary cannot be trained on them; add --tokenizer"):
        build(tmp_path / "shards")
    with pytest.raises(ValueError, match="contains tar shards, which only pre-training can read; video_qa needs JSONL"):
        build(tmp_path / "shards", task="video_qa")


def test_classes_come_from_the_labels_unless_the_run_has_them(tmp_path):
    write_records(tmp_path, "text_classification.train", [{"text": "a one", "label": label} for label in "bab"])
    settings = dict(task="text_classification", batch_size=2)
    assert build(tmp_path, **settings).classes == {"text_classification": ("a", "b")}
    data = build(tmp_path, **settings, classes={"text_classification": ("c", "b", "a")})
    assert {1, 2} == {label for batch in data for label in batch["label"].tolist()}


def test_texts_that_do_not_fit_the_model_are_refused_before_training(tmp_path):
    write_records(tmp_path, "text_only.train", [{"text": "a one"}, {"text": "one " * 40}])
    with pytest.raises(RecordError, match="text_only.train.jsonl:2"):
        build(tmp_path, max_words=50, video_weight=0.0, image_weight=0.0)


@pytest.mark.parametrize("settings, message", [
    (dict(batch_size=7), r"batch_size=7 is not divisible by 2 \(2 ranks x 1 accumulation steps\)"),
    (dict(batch_size=8, accumulation_steps=3), r"batch_size=8 is not divisible by 6 \(2 ranks x 3 accumulation"),
])
def test_a_batch_that_the_ranks_cannot_share_is_refused_before_anything_is_read(settings, message):
    with pytest.raises(ValueError, match=message):
        build("nowhere", 2, **settings)
    assert DataSettings(batch_size=12, accumulation_steps=3).micro_batch_size(2) == 2


def test_the_default_number_of_workers_is_one_that_the_shards_suffice_for(root, tmp_path, monkeypatch):
    assert build(root).settings.workers == 0
    monkeypatch.setattr("mplug2.data.build.default_workers", lambda device: 7)
    assert build(root).settings.workers == 7 and build(root, workers=2).settings.workers == 2
    pack(root, tmp_path / "shards", samples_per_shard=1)  # five images, six videos, seven texts
    assert [build(tmp_path / "shards", ranks, tokenizer=make_tokenizer(), batch_size=6).settings.workers
            for ranks in (1, 2, 3)] == [5, 2, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_batches_continue_after_any_step(root, tmp_path, packed):
    """In the same order, with two micro-batches per step, from JSONL files and from shards."""
    if packed:
        pack(root, tmp_path / "shards", samples_per_shard=2)
    folder, settings = tmp_path / "shards" if packed else root, dict(tokenizer=make_tokenizer(), accumulation_steps=2)
    data = build(folder, **settings)
    whole = list(data)
    assert len(whole) == 12 and all(len(batch["source"]) == 2 for batch in whole)
    assert {batch["kind"] for batch in whole} == {"video", "image", "text"}
    stopped = build(folder, **settings)
    for batch in islice(stopped, 6):
        stopped.advance(batch)
    state = json.loads(json.dumps(stopped.state_dict()), object_pairs_hook=with_numbers)
    resumed = build(folder, **settings)
    resumed.load_state_dict(3, state)
    assert_equal_batches(list(resumed), whole[6:])


def with_numbers(pairs: list[tuple]) -> dict:
    """JSON turns the numbers of readers into strings."""
    return {int(name) if name.isdecimal() else name: value for name, value in pairs}


def test_the_samples_of_a_step_are_named(root, tmp_path):
    data = build(root, 2, 1, tokenizer=make_tokenizer())
    batches = list(data)
    for step, batch in enumerate(batches):
        assert data.names_at(step) == ", ".join(batch["source"])
    pack(root, tmp_path / "shards")
    kind = (packed := build(tmp_path / "shards", tokenizer=make_tokenizer())).batches.kinds[0]
    assert packed.names_at(0) == f"from the shards of {kind}"


def test_references_are_the_captions_of_samples_in_captioning_batches(root):
    references = build(root, tokenizer=make_tokenizer()).references()
    assert len(references) >= 11 and ["a red three moving left", "a red three going left"] in references
    assert build(root, task="video_caption", tokenizer=make_tokenizer()).references()[1] == [
        "a blue seven moving left", "a blue seven going left"]


def test_texts_of_shards_that_are_not_read_have_two_tokens_per_word():
    data = SimpleNamespace(sizes={"video": 9, "image@1": 9}, settings=DataSettings(max_words=20))
    for longest, expected in (({"image@1": 7}, 40), ({"image@1": 99}, 99), ({"video": 5, "image@1": 7}, 7)):
        data.longest = longest
        assert TrainingData.longest_text(data) == expected


def test_the_longest_text_is_that_of_the_captions_and_answers_but_not_of_the_questions(tmp_path):
    tokenizer, captions = make_tokenizer(), ["a red three", "a red three moving left, left?!"]
    question = {"question": "is it red or is it blue or is it green", "answers": ["red", "the red three"]}
    write_records(tmp_path, "video_caption.train", [{"video": "a.gif", "captions": captions}])
    write_records(tmp_path, "video_qa.train", [{"video": "a.gif", "qa": [question]}])
    count = {text: tokenizer.lengths([text])[0] - 1
             for text in ("a red three moving left left", "a red", "the red three")}

    def longest(task: str, **more) -> int:
        return build(tmp_path, tokenizer=tokenizer, task=task, max_unknown=1, **more).longest_text()

    assert longest("pretrain") == longest("video_caption") == count["a red three moving left left"]
    assert longest("video_caption", max_words=2) == count["a red"] and longest("video_qa") == count["the red three"]
