"""Records: what is written is what is read, and every kind of bad line is reported with file, line and field."""

import json
import pickle
import string
from contextlib import suppress
from pathlib import Path

import pytest
from data_helpers import hostile_versions
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.data.check_folder import check_folder
from mplug2.data.record_fields import OPTIONAL_FIELDS, PLAIN
from mplug2.data.records import RECORD_FIELDS, Question, Record, RecordError, available, read_records

GALLERIES = ("image_retrieval", "video_retrieval")
LABELS = {"visual_entailment": ("entailment", "neutral", "contradiction"), "image_pair_reasoning": ("true", "false")}
texts = st.builds(str.__add__, st.sampled_from("aÉ三🙂"), st.text(max_size=10))  # never blank, and nothing to filter
names = st.builds(str.__add__, st.sampled_from("abé_"), st.text(string.ascii_letters + "_- é", max_size=4))
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
sizes = st.floats(0.01, 1)
boxes = st.tuples(sizes, sizes, st.floats(0, 1), st.floats(0, 1)).map(
    lambda box: [box[0] / 2 + box[2] * (1 - box[0]), box[1] / 2 + box[3] * (1 - box[1]), box[0], box[1]]
)
questions = st.fixed_dictionaries(
    {"question": texts, "answers": st.lists(texts, min_size=1, max_size=3)}, optional={"kind": texts}
)
FIELD_VALUES = {
    "image": paths,
    "video": paths,
    "images": st.tuples(paths, paths).map(list),
    "captions": st.lists(texts, min_size=1, max_size=3),
    "qa": st.lists(questions, min_size=1, max_size=3),
    "text": texts,
    "texts": st.tuples(texts, texts).map(list),
    "label": texts,
    "box": boxes,
    "positive_id": texts,
    "gallery": texts,
}


@st.composite
def task_and_lines(draw: st.DrawFn) -> tuple[str, list[dict]]:
    task = draw(st.sampled_from(sorted(RECORD_FIELDS)))
    optional = ["positive_id"] + ["gallery"] * (task in GALLERIES)
    values = FIELD_VALUES | ({"label": st.sampled_from(LABELS[task])} if task in LABELS else {})
    line = st.fixed_dictionaries(
        {name: values[name] for name in RECORD_FIELDS[task]}, optional={name: values[name] for name in optional}
    )
    lines = draw(st.lists(line, min_size=1, max_size=4))
    for number, fields in enumerate(lines):
        if draw(st.booleans()):
            fields["id"] = f"id {number}"
    return task, lines


def write(root: Path, task: str, *lines: object, split: str = "train") -> Path:
    """Write lines: bytes unchanged, anything else as JSON."""
    path = root / f"{task}.{split}.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


GOOD = {
    "video_caption": {"video": "clips/1.gif", "captions": ["a red three moves left"]},
    "image_qa": {"image": "1.png", "qa": [{"question": "what color?", "answers": ["red"], "kind": "color"}]},
    "text_only": {"text": "a three"},
    "text_pair_classification": {"texts": ["a", "b"], "label": "same"},
    "visual_entailment": {"image": "1.png", "text": "it is red", "label": "neutral"},
    "image_pair_reasoning": {"images": ["1.png", "2.png"], "text": "both are red", "label": "true"},
    "grounding": {"image": "1.png", "text": "the red three", "box": [0.5, 0.5, 0.25, 1]},
    "video_retrieval": {"video": "1.gif", "captions": ["a"], "gallery": "twins"},
}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(task_and_lines())
def test_what_is_written_is_what_is_read(tmp_path_factory, drawn):
    task, lines = drawn
    root = tmp_path_factory.mktemp("data")
    path = write(root, task, *lines)
    records = read_records(root, task, "train")
    assert len(records) == len(lines)
    for number, (record, fields) in enumerate(zip(records, lines, strict=True), start=1):
        record_id = fields.get("id", f"{path.name}:{number}")
        expected = {"id": record_id, "positive_id": record_id, "source": f"{path}:{number}"} | fields
        if task in GALLERIES:
            expected.setdefault("gallery", "all")
        for name in ("image", "video"):
            if name in fields:
                expected[name] = root / fields[name]
        if "images" in fields:
            expected["images"] = tuple(root / name for name in fields["images"])
        if "qa" in fields:
            expected["qa"] = tuple(Question(q["question"], tuple(q["answers"]), q.get("kind")) for q in fields["qa"])
        for name in ("captions", "texts", "box"):
            if name in fields:
                expected[name] = tuple(fields[name])
        assert record == Record(**expected)


def test_paths_are_absolute_even_if_the_folder_is_relative(tmp_path, monkeypatch):
    write(tmp_path, "video_caption", {"video": "clips/../a.gif", "captions": ["a"]})
    monkeypatch.chdir(tmp_path)
    assert read_records(".", "video_caption", "train")[0].video == tmp_path / "a.gif"


def test_blank_lines_and_a_byte_order_mark_are_skipped_but_counted(tmp_path):
    write(tmp_path, "text_only", b"\xef\xbb\xbf" + b'{"text": "one"}\r', b"", b"  \r", {"text": "two"}, b"")
    records = read_records(tmp_path, "text_only", "train")
    assert [(record.text, record.id) for record in records] == [
        ("one", "text_only.train.jsonl:1"),
        ("two", "text_only.train.jsonl:4"),
    ]


def test_the_old_name_of_positive_id_is_still_read(tmp_path):
    write(tmp_path, "text_only", {"text": "a", "meaning": "old"}, {"text": "b", "meaning": "x", "positive_id": "new"})
    assert [record.positive_id for record in read_records(tmp_path, "text_only", "train")] == ["old", "new"]


def test_records_are_a_sequence_that_keeps_its_lines_in_the_file(tmp_path):
    lines = [{"text": f"text {number}"} for number in range(5)]
    third = b"\xef\xbb\xbf" + json.dumps(lines[2]).encode()
    path = write(tmp_path, "text_only", b"", *lines[:2], b" ", third, *lines[3:])
    records = read_records(tmp_path, "text_only", "train")
    assert [record.text for record in records] == [line["text"] for line in lines]
    assert [records[index].text for index in (-1, 2, -5)] == ["text 4", "text 2", "text 0"]
    assert [record.source.rpartition(":")[2] for record in records[1:4]] == ["3", "5", "6"]
    assert [texts for _, texts, _ in records.texts()] == [[line["text"]] for line in lines]
    for index in (5, -6):
        with pytest.raises(IndexError):
            records[index]
    assert pickle.loads(pickle.dumps(records))[3] == records[3]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RecordError, match="text_only.train.jsonl changed while it was in use; start again"):
        records[4]


@pytest.mark.parametrize("after", [b"x", b"{}", b"\x0b", b"]"])
def test_nothing_may_follow_the_object_of_a_line_except_blanks(tmp_path, after):
    write(tmp_path, "text_only", b' {"text": "one"}', b'{"text": "two"} \t', b'{"text": "three"}' + after)
    with pytest.raises(RecordError, match="jsonl:3: found .*expected one JSON object"):
        read_records(tmp_path, "text_only", "train")


@settings(max_examples=15, deadline=None)
@given(task_and_lines())
def test_the_quick_path_gives_what_the_full_check_gives(tmp_path_factory, drawn):
    task, lines = drawn
    root = tmp_path_factory.mktemp("data")
    write(root, task, *lines)
    quick = list(read_records(root, task, "train"))
    slow = read_records(root, task, "train")
    slow._plain = lambda line: None
    assert quick == list(slow) == [slow[index] for index in range(len(slow))]


@pytest.mark.parametrize("value", ["a/../b.png", "./a.png", "/a.png", "a//b.png", "a/./b.png", "a/", "..", " ", "a\nb"])
def test_unusual_paths_get_the_full_check(value):
    assert not PLAIN["image"](value) and PLAIN["image"]("images/00/a b.png")


def test_duplicate_ids_are_listed_together_with_other_bad_lines(tmp_path):
    write(tmp_path, "text_only", {"text": "a", "id": "x"}, b"{", {"text": "b", "id": "x"}, b"[")
    with pytest.raises(RecordError, match=r"jsonl:2: found .*\n.*jsonl:3: id: found 'x'.*\n.*jsonl:4: found"):
        read_records(tmp_path, "text_only", "train")


@pytest.mark.parametrize("ids", [["a", "b", "a"], [None, "text_only.train.jsonl:1"],
                                 ["text_only.train.jsonl:2", None]])
def test_ids_are_unique_also_among_the_defaults(tmp_path, ids):
    write(tmp_path, "text_only", *({"text": "a", **({"id": one} if one else {})} for one in ids))
    with pytest.raises(RecordError, match="expected a unique id, but line 1 has it too"):
        read_records(tmp_path, "text_only", "train")


def read_one(root: Path, task: str, fields: dict) -> Record:
    write(root, task, fields)
    return read_records(root, task, "train")[0]


def test_fields_that_are_not_given_have_defaults_and_every_field_has_one_type(tmp_path):
    for caption in "a", "a\nb":  # the second takes the full check
        captioned = read_one(tmp_path, "video_retrieval", {"id": "own", "video": "1.gif", "captions": [caption]})
        assert (captioned.positive_id, captioned.gallery) == ("own", "all")
    assert read_one(tmp_path, "text_only", {"text": "a"}).positive_id == "text_only.train.jsonl:1"
    for text in "a", "a\nb":
        assert read_one(tmp_path, "text_only", {"text": text, "id": "own", "positive_id": "p"}).positive_id == "p"
    box = read_one(tmp_path, "grounding", GOOD["grounding"] | {"box": [0.4, 0.5, 0.25, 1]}).box
    assert box == (0.4, 0.5, 0.25, 1) and all(type(number) is float for number in box)
    pair = read_one(tmp_path, "image_pair_reasoning", GOOD["image_pair_reasoning"])
    assert pair.images == (tmp_path / "1.png", tmp_path / "2.png")
    for number in 3, -3.3e38:
        label = read_one(tmp_path, "text_pair_classification", {"texts": ["a", "b"], "label": number}).label
        assert label == number and type(label) is float


@pytest.mark.parametrize("task, allowed", [
    ("text_classification", True), ("text_pair_classification", True), ("image_classification", False),
    ("video_classification", False),
])
def test_only_labels_of_texts_may_be_numbers(tmp_path, task, allowed):
    given = {"text": "a", "texts": ["a", "b"], "image": "1.png", "video": "1.gif"}
    fields = {name: given[name] for name in RECORD_FIELDS[task] if name != "label"}
    assert read_one(tmp_path, task, fields | {"label": "3"}).label == "3"
    if allowed:
        assert read_one(tmp_path, task, fields | {"label": 3}).label == 3.0
    else:
        for number in (3, 1.5, 1234567):
            advice = f'label: found {number}; expected the name of a class; write the number as a text, "{number}"'
            with pytest.raises(RecordError, match=advice):
                read_one(tmp_path, task, fields | {"label": number})
        with pytest.raises(RecordError, match="label: found 1000.*; expected the name of a class"):
            read_one(tmp_path, task, fields | {"label": 10**400})
        with pytest.raises(RecordError, match="label: found True; expected a string"):
            read_one(tmp_path, task, fields | {"label": True})


@pytest.mark.parametrize("task", sorted(GOOD))
def test_an_unlabelled_line_may_leave_out_the_truth_and_nothing_else(tmp_path, task):
    truth, line = {"captions", "label", "box"}, GOOD[task] | {"unlabelled": True}
    bare = {name: value for name, value in line.items() if name not in truth}
    if "qa" in bare:
        bare["qa"] = [{"question": "what color?"}]
    record = read_one(tmp_path, task, bare)
    assert record.unlabelled and not any(getattr(record, name) for name in truth)
    assert [question.answers for question in record.qa or ()] == [()] * ("qa" in bare)
    for name in set(bare) & set(RECORD_FIELDS[task]):
        with pytest.raises(RecordError, match=f"field '{name}' is missing"):
            read_one(tmp_path, task, {other: value for other, value in bare.items() if other != name})
    labelled = {name: value for name, value in bare.items() if name != "unlabelled"}
    if labelled != GOOD[task]:
        with pytest.raises(RecordError, match="is missing|requires|answers"):
            read_one(tmp_path, task, labelled)


def test_the_first_unlabelled_record_is_known_by_its_index_not_by_its_line(tmp_path):
    unlabelled = {"text": "a", "unlabelled": True}
    write(tmp_path, "text_classification", {"text": "a", "label": "x"}, b"", unlabelled, unlabelled)
    records = read_records(tmp_path, "text_classification", "train")
    assert records.unlabelled == 1 and [record.unlabelled for record in records] == [False, True, True]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_box_may_reach_a_thousandth_outside_its_image(tmp_path, axis):
    for edge in 0.1, 0.9:  # center of a box of 0.2, at an edge of the image
        for outside, accepted in ((0.0009, True), (0.0011, False)):
            box = [0.5, 0.5, 0.2, 0.2]
            box[axis] = edge + (outside if edge > 0.5 else -outside)
            try:
                assert read_one(tmp_path, "grounding", GOOD["grounding"] | {"box": box}).box == tuple(box) and accepted
            except RecordError:
                assert not accepted


def test_unknown_fields_of_a_question_are_refused_next_to_valid_ones(tmp_path):
    question = {"question": "what color?", "answers": ["red"], "knid": "color"}
    with pytest.raises(RecordError, match="no field 'knid' .did you mean 'kind'"):
        read_one(tmp_path, "image_qa", {"image": "1.png", "qa": [question]})


@pytest.mark.parametrize("half", ["\ud800", "\udbff", "\udc00", "\udfff"])
def test_lone_halves_of_surrogate_pairs_are_refused_up_to_the_last(tmp_path, half):
    assert read_one(tmp_path, "text_only", {"text": "\ud7ff\ue000"}).text == "\ud7ff\ue000"
    with pytest.raises(RecordError, match="lone surrogates"):
        read_one(tmp_path, "text_only", {"text": half})


BAD = [  # task, changes to the good line (None removes a field), parts of the message
    ("video_caption", {"captions": []}, ["captions: found []; expected a list of one or more strings"]),
    ("video_caption", {"captions": ["a", " "]}, ["captions[1]: found ' '; expected a string that is not empty"]),
    ("video_caption", {"captions": "a"}, ["captions: found 'a'; expected a list"]),
    ("video_caption", {"captions": ["a", 3]}, ["captions[1]", "found 3"]),
    ("video_caption", {"captions": None}, ["field 'captions' is missing", "requires video, captions"]),
    ("video_caption", {"captoins": ["a"]}, ["no field 'captoins' (did you mean 'captions'?)"]),
    ("video_caption", {"gallery": "all"}, ["'video_caption' has no field 'gallery'", "video, captions"]),
    ("video_caption", {"video": 7}, ["video: found 7; expected a string"]),
    ("video_caption", {"video": "/etc/clip.gif"}, ["video: found '/etc/clip.gif'; expected the path of a file inside"]),
    ("video_caption", {"video": "../clip.gif"}, ["video: found '../clip.gif'; expected the path of a file inside"]),
    ("video_caption", {"video": "a/../../clip.gif"}, ["video: found ", "expected the path of a file inside"]),
    ("video_caption", {"video": "a/.."}, ["video: found ", "expected the path of a file inside"]),
    ("video_caption", {"id": 5}, ["id: found 5; expected a string"]),
    ("video_caption", {"id": "first"}, ["id: found 'first'; expected a unique id, but line 1 has it too"]),
    ("video_caption", {"positive_id": ""}, ["positive_id: found ", "expected a string that is not empty"]),
    ("video_retrieval", {"gallery": 1}, ["gallery: found 1; expected a string"]),
    ("image_qa", {"qa": []}, ["qa: found []; expected a list of one or more"]),
    ("image_qa", {"qa": ["what?"]}, ["qa[0]: found 'what?'; expected an object"]),
    ("image_qa", {"qa": [{"question": "q", "answers": []}]}, ["qa[0].answers: found []; expected a list of one or"]),
    ("image_qa", {"qa": [{"question": "", "answers": ["a"]}]}, ["qa[0].question: found ''; expected a string"]),
    ("image_qa", {"qa": [{"question": "q", "answers": ["a", 1]}]}, ["qa[0].answers[1]: found 1; expected a string"]),
    ("image_qa", {"qa": [{"question": "q", "answers": ["a"], "kind": 2}]}, ["qa[0].kind", "found 2"]),
    ("image_qa", {"qa": [{"question": "q", "answer": "a"}]}, ["qa[0]", "'answer' (did you mean 'answers'?)"]),
    ("image_qa", {"qa": [{"answers": ["a"]}]}, ["qa[0]: field 'question' is missing"]),
    ("text_only", {"text": "half \ud83d"}, ["text: found ", "expected text without lone surrogates"]),
    ("text_pair_classification", {"texts": ["a"]}, ["texts: found ['a']; expected a list of two strings"]),
    ("text_pair_classification", {"texts": ["a", ""]}, ["texts[1]: found ", "expected a string that is not empty"]),
    ("visual_entailment", {"label": 1.5}, ["label: found 1.5; expected one of"]),
    ("text_pair_classification", {"label": True}, ["label: found True; expected a string"]),
    ("text_pair_classification", {"label": float("nan")}, ["label: found nan; expected a number between"]),
    ("text_pair_classification", {"label": 10**400}, ["label: found 1000", "; expected a number between -3.4e+38"]),
    ("text_pair_classification", {"label": 1e39}, ["label: found 1e+39; expected a number between"]),
    ("text_pair_classification", {"label": -1e39}, ["label: found -1e+39; expected a number between"]),
    ("visual_entailment", {"label": "maybe"}, ["label: found 'maybe'; expected one of entailment, neutral"]),
    ("image_pair_reasoning", {"label": True}, ["label: found True; expected one of true, false"]),
    ("image_pair_reasoning", {"images": ["a.png", "/b.png"]}, ["images[1]: found '/b.png'; expected the path of"]),
    ("grounding", {"box": [0.5, 0.5, 0.2]}, ["box: found [0.5, 0.5, 0.2]; expected [center x, center y, "]),
    ("grounding", {"box": [0.5, 0.5, 0.2, 1.5]}, ["box: found ", "from 0 to 1", "1.5"]),
    ("grounding", {"box": [0.5, -0.1, 0.2, 0.2]}, ["box: found ", "from 0 to 1", "-0.1"]),
    ("grounding", {"box": [0.5, 0.5, float("nan"), 0.2]}, ["box: found ", "from 0 to 1", "nan"]),
    ("grounding", {"box": [0.5, 0.5, True, 0.2]}, ["box: found ", "True"]),
    ("grounding", {"box": [0.5, 0.5, 10**400, 0.2]}, ["box: found ", "from 0 to 1"]),
    ("grounding", {"box": ["0.5", 0.5, 0.2, 0.2]}, ["box: found ", "'0.5'"]),
    ("grounding", {"box": [0.5, 0.5, 0, 0.2]}, ["box that has an area"]),
    ("grounding", {"box": [0.5, 0.7, 0.2, 0.9]}, ["box that has an area and lies inside its image"]),
    ("grounding", {"box": [0.1, 0.5, 0.4, 0.2]}, ["box that has an area and lies inside its image"]),
]


@pytest.mark.parametrize("task, changes, expected", BAD, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_reported_by_file_line_and_field(tmp_path, task, changes, expected):
    bad = {name: value for name, value in (GOOD[task] | changes).items() if value is not None}
    path = write(tmp_path, task, GOOD[task] | {"id": "first"}, bad)
    with pytest.raises(RecordError) as caught:
        read_records(tmp_path, task, "train")
    assert str(caught.value).startswith(f"{path}:2: ")
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "line", [b'{"text": "a"', b"text", b'{"text": "\xff"}', b"[" * 100_000, b'["a"]', b'"text"', b"null"]
)
def test_a_line_that_is_not_an_object_is_reported(tmp_path, line):
    path = write(tmp_path, "text_only", GOOD["text_only"], line)
    with pytest.raises(RecordError, match=r"expected (one|a) JSON object") as caught:
        read_records(tmp_path, "text_only", "train")
    assert str(caught.value).startswith(f"{path}:2: ")
    assert len(str(caught.value)) < len(str(path)) + 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["a.gif", "true"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["question", "answers"]), inner),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(GOOD)), json_values)
def test_any_value_of_any_field_is_a_record_or_a_record_error(tmp_path_factory, data, task, value):
    """No other exception is raised."""
    field = data.draw(st.sampled_from(RECORD_FIELDS[task] + OPTIONAL_FIELDS))
    root = tmp_path_factory.mktemp("data")
    write(root, task, GOOD[task] | {field: value})
    try:
        assert len(read_records(root, task, "train")) == 1
    except RecordError as error:
        assert f"{task}.train.jsonl:1: {field}" in str(error)


@pytest.mark.parametrize("task", sorted(GOOD))
def test_a_hostile_value_at_any_depth_is_a_record_or_a_short_message_with_its_line(tmp_path, task):
    """Records that are accepted can be used: whatever their names are, their media are looked for."""
    for where, fields in hostile_versions(GOOD[task] | {"id": "x", "positive_id": "y"}):
        path = write(tmp_path, task, GOOD[task], fields)
        try:
            records = read_records(tmp_path, task, "train")
        except RecordError as error:
            message = str(error)
            assert message.startswith(f"{path}:2: {where[0]}"), message
            assert len(message) < len(str(path)) + 400 and message.encode()
        else:
            assert list(records)[1].source == f"{path}:2" and len(list(records.texts())) == 2
            with suppress(RecordError):  # the media do not exist
                check_folder(tmp_path)


def test_a_file_without_records_is_an_error(tmp_path):
    write(tmp_path, "text_only", b"", b" ")
    with pytest.raises(RecordError, match=r"text_only\.train\.jsonl is empty: expected one JSON object per line"):
        read_records(tmp_path, "text_only", "train")


def test_an_unknown_task_is_named_with_the_closest(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown task 'video_captions' \(did you mean 'video_caption'\?\).*grounding"
    ):
        read_records(tmp_path, "video_captions", "train")


def test_a_missing_split_lists_the_existing_files(tmp_path):
    write(tmp_path, "video_qa", split="train")
    write(tmp_path, "video_qa", split="val")
    with pytest.raises(FileNotFoundError, match=r"video_qa\.tset\.jsonl does not exist: no split 'tset'") as caught:
        read_records(tmp_path, "video_qa", "tset")
    assert str(caught.value).splitlines()[1:] == ["  video_qa.train.jsonl", "  video_qa.val.jsonl"]


@settings(max_examples=15, deadline=None)
@given(
    st.sets(
        st.tuples(st.sampled_from(sorted(RECORD_FIELDS)), st.sampled_from(["train", "val", "testA", "combos"])),
        min_size=1,
    )
)
def test_available_lists_the_existing_files(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("data")
    for name in ("notes.txt", "captions.train.jsonl", "video_qa.train.jsonl.bak", "video_qa.jsonl"):
        (root / name).touch()
    for task, split in files:
        write(root, task, split=split)
    found = available(root)
    assert {(task, split) for task, splits in found.items() for split in splits} == files
    assert list(found) == [task for task in RECORD_FIELDS if task in found]
    assert all(splits == sorted(splits) for splits in found.values())


def test_a_folder_without_any_data_file_is_explained(tmp_path):
    (tmp_path / "captions.train.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"<task>\.<split>\.jsonl.*video_caption, .*grounding"):
        available(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        available(tmp_path / "nowhere")
