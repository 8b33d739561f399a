"""Adapters: each one on a mock download in the published format, and the error messages for invalid annotations."""

import json
import pickle
from collections import defaultdict
from pathlib import Path

import downloads
import pytest

from mplug2.data.__main__ import main
from mplug2.data.adapters import ADAPTERS, PUBLISHED, read
from mplug2.data.adapters.source import Files
from mplug2.data.records import RecordError, read_records


def found_in(name: str, root: Path) -> tuple[dict, Files]:
    """The fields of all records by task and split, and the files of the download."""
    files, parts = Files(root), defaultdict(list)
    for record in read(name, files):
        parts[record.task, record.split].append(record.fields)
        assert str(root) in record.source
    return dict(parts), files


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_download_in_the_published_format(name, tmp_path, capsys):
    """The records that the adapter finds, the report of the check, and the files that it writes for training."""
    expected = downloads.make(name, tmp_path / "download")
    parts, files = found_in(name, tmp_path / "download")
    assert parts == expected
    assert not files.missing

    main([name, str(tmp_path / "download"), "--out", str(tmp_path / "data"), "--decode", "0"])
    said = capsys.readouterr().out
    assert "missing: 0\n" in said and "unreadable: 0\n" in said and "left out" not in said
    for task, split in expected:
        counted = next(line for line in said.splitlines() if line.startswith(f"{task}.{split} "))
        assert counted.split()[1] == str(len(expected[task, split]))
        published = PUBLISHED.get(name, ("", {}))[1].get(split)
        assert ("DIFFERENT" in counted) == (published is not None)
        records = read_records(tmp_path / "data", task, split)
        for record, fields in zip(records, expected[task, split], strict=True):
            assert all(path.is_file() for path in (record.image, record.video, *record.images) if path)
            assert record.captions == tuple(fields.get("captions", ()))
            assert record.label == fields.get("label")
            assert record.unlabelled == fields.get("unlabelled", False)
    has_media = any("glue" not in name for _ in expected)
    assert (tmp_path / "data" / f"{name}.png").is_file() == has_media


def test_published_counts_name_splits_that_the_adapter_makes(tmp_path):
    assert set(PUBLISHED) <= set(ADAPTERS)
    for name, (unit, counts) in PUBLISHED.items():
        made = {split for _, split in downloads.make(name, tmp_path / name)}
        assert unit in ("media", "records") and set(counts) <= made, name


def change(path: Path, **values) -> None:
    """Change fields of the first entry of a JSON list, JSON lines, or, at `key/field`, of a list in an object."""
    if path.suffix == ".jsonl" or path.parent.name == "data":
        entry = json.loads(path.read_text().splitlines()[0])
        path.write_text("\n" + json.dumps(edited(entry, values)) + "\n")
        return
    content = json.loads(path.read_text())
    if isinstance(content, list):
        content[0] = edited(content[0], values)
    else:
        for name, value in values.items():
            key, _, field = name.partition("__")
            content[key][0] = edited(content[key][0], {field: value})
    path.write_text(json.dumps(content))


def edited(entry: dict, values: dict) -> dict:
    return {name: value for name, value in {**entry, **values}.items() if value != "GONE"}


BAD = [
    ("msrvtt_caption", "annotation/train_val_videodatainfo.json", dict(videos__split="training"),
     r"train_val_videodatainfo.json: videos\[0\]: split: found 'training'; expected one of train, validate, test"),
    ("msrvtt_caption", "annotation/test_videodatainfo.json", dict(sentences__caption="  "),
     r"test_videodatainfo.json: sentences\[0\]: caption: found '  '; expected a text that is not empty"),
    ("msrvtt_caption", "annotation/test_videodatainfo.json", dict(sentences__video_id="video9"),
     r"sentences\[0\]: video_id: found 'video9'; expected the video_id of one of the videos"),
    ("msrvtt_qa", "val_qa.json", dict(answer=""), r"val_qa.json: entry\[0\]: answer: found ''; expected a text"),
    ("msrvtt_qa", "val_qa.json", dict(question="GONE"), r"val_qa.json: entry\[0\]: field 'question' is missing"),
    ("msvd_qa", "test_qa.json", dict(video_id=99), "found '99'; expected a number of youtube_mapping.txt"),
    ("ssv2", "labels/train.json", dict(template="Eating [something]"),
     r"train.json: entry\[0\]: template: found 'Eating something'; expected one of .*"),
    ("coco", "dataset_coco.json", dict(images__split="dev"), r"images\[0\]: split: found 'dev'"),
    ("coco", "dataset_coco.json", dict(images__sentences=[]), r"images\[0\]: sentences: found \[\]; expected one"),
    ("nocaps", "nocaps_val_4500_captions.json", dict(annotations__image_id=77),
     r"annotations\[0\]: image_id: found '77'; expected the id of one of the images"),
    ("vqav2", "v2_mscoco_val2014_annotations.json", dict(annotations__answers=[]),
     r"v2_mscoco_val2014_annotations.json: annotations\[0\]: answers: found \[\]; expected one or more"),
    ("vqav2", "v2_mscoco_train2014_annotations.json", dict(annotations__question_id=5),
     r"questions\[0\]: question_id: found '9000'; expected a question that has answers"),
    ("snli_ve", "snli_ve_dev.jsonl", dict(gold_label="-"),
     r"snli_ve_dev.jsonl:2: gold_label: found '-'; expected one of entailment, neutral, contradiction"),
    ("nlvr2", "data/dev.json", dict(label="Maybe"), r"dev.json:2: label: found 'Maybe'; expected one of True, False"),
    ("nlvr2", "data/dev.json", dict(identifier="dev"), r"dev.json:2: identifier: found 'dev'; expected split-set"),
    ("refcoco", "instances.json", dict(annotations__bbox=[9, 2, 6, 4]),
     r"annotations\[0\]: bbox: found \[9, 2, 6, 4\]; expected a box with an area inside the image, 12 x 8 pixels"),
    ("refcoco", "instances.json", dict(annotations__bbox=[1, 1, 0, 4]), "a box with an area"),
    ("refcoco", "instances.json", dict(annotations__bbox=[1, 1]), "expected four numbers"),
    ("refcoco", "instances.json", dict(images__width=float("nan")), r"images\[0\]: width: found nan; expected"),
    ("mplug2_caption", "test.jsonl", dict(golden_captions=["", "b"]),
     r"test.jsonl:2: golden_captions\[0\]: text: found ''; expected a text"),
    ("mplug2_qa", "train.jsonl", dict(video_id=["a"]), r"train.jsonl:2: video_id: found .*; expected a text"),
]


@pytest.mark.parametrize("name, file, values, message", BAD)
def test_invalid_annotations_are_named(name, file, values, message, tmp_path):
    downloads.make(name, tmp_path)
    change(tmp_path / file, **values)
    with pytest.raises(RecordError, match=message):
        found_in(name, tmp_path)


@pytest.mark.parametrize("name, file, line, message", [
    ("glue_rte", "RTE/dev.tsv", "1\ta\tb\tmaybe",
     r"dev.tsv:3: label: found 'maybe'; expected one of entailment, not_entailment"),
    ("glue_rte", "RTE/dev.tsv", "1\ta", r"dev.tsv:3: found .*; expected 4 columns \(index, sentence1, "),
    ("glue_cola", "CoLA/train.tsv", "gj04\t2\t\tHello.", r"train.tsv:2: label: found '2'; expected one of 0, 1"),
    ("glue_stsb", "STS-B/train.tsv", "1\tm\tf\t2012\t1\tn\tn\ta\tb\t5.5", "train.tsv:3: score: .* from 0 to 5"),
    ("glue_stsb", "STS-B/train.tsv", "1\tm\tf\t2012\t1\tn\tn\ta\tb\tx", "train.tsv:3: score: found 'x'; expected a"),
    ("kinetics", "validate.csv", "surfing,abc,1,11,val", "validate.csv:3: label: found 'surfing'; expected one of air"),
    ("tgif_qa", "Test_frameqa_question.csv", "g\tq\ta\t7\tv\tk\td", "question.csv:3: type: found '7'; expected one of"),
    ("lsmdc", "LSMDC16_annos_val.csv", "clip\t1\t2", "annos_val.csv:3: found .*; expected 6 columns"),
    ("cc3m", "Train_GCC-training.tsv", " \thttp://e.org", "training.tsv:3: caption: found .*; expected a text"),
])
def test_invalid_rows_are_named(name, file, line, message, tmp_path):
    downloads.make(name, tmp_path)
    with (tmp_path / file).open("a") as out:
        out.write(line + "\n")
    with pytest.raises(RecordError, match=message):
        found_in(name, tmp_path)


def test_the_rows_of_qqp_that_are_published_broken_are_named_and_left_out(tmp_path, capsys):
    expected = downloads.make("glue_qqp", tmp_path)
    with (tmp_path / "QQP" / "train.tsv").open("a") as out:
        out.write('6\t1\t2\t"Was he real?\n\tWas he?\t0\n7\t1\t2\tHow?\t\t0\n8\t1\t2\tHow?\tWhy?\t1\n')
    parts, _ = found_in("glue_qqp", tmp_path)
    added = {"texts": ["How?", "Why?"], "label": "equivalent"}
    assert parts == expected | {
        ("text_pair_classification", "train"): [*expected["text_pair_classification", "train"], added],
    }
    main(["glue_qqp", str(tmp_path)])
    said = capsys.readouterr().out
    assert "invalid in the published file, left out: 3\n" in said and "train.tsv:3: 4 columns, not 6\n" in said
    assert "train.tsv:5: a question is empty\n" in said


@pytest.mark.parametrize("name, file, content, message", [
    ("webvid", "results_2M_val.csv", b"videoid,contentUrl,duration,page_dir,name\n1,a,b,c,\xff\n",
     "results_2M_val.csv:2: this is not UTF-8"),
    ("webvid", "results_2M_val.csv", b"videoid,contentUrl,duration,page_dir,name\n1,a,b\rb,c,d\n",
     "results_2M_val.csv:2: this is no CSV row"),
    ("glue_rte", "RTE/dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tb\tentailment\n",
     "dev.tsv:2: this is not UTF-8"),
    ("glue_rte", "RTE/dev.tsv", b"index\tsentence1\tsentence2\tlabel\n\t\t\t\n",
     "dev.tsv:2: sentence1: found ''; expected a text"),
    ("mplug2_qa", "test.jsonl", b"\xef\xbb\xbf\n{", "test.jsonl:2: this is not a JSON object"),
])
def test_damaged_lines_are_named(name, file, content, message, tmp_path):
    downloads.make(name, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        found_in(name, tmp_path)


def test_a_carriage_return_within_a_caption_does_not_end_its_row(tmp_path):
    downloads.make("cc12m", tmp_path)
    (tmp_path / "cc12m.tsv").write_bytes(b"http://e.org/1\ta\rtree\r\n")
    assert found_in("cc12m", tmp_path)[0]["image_caption", "train"][0]["captions"] == ["a\rtree"]


def test_a_truncated_file_is_named_with_its_line(tmp_path):
    downloads.make("coco", tmp_path)
    path = tmp_path / "dataset_coco.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RecordError, match="dataset_coco.json:1: this is not JSON"):
        found_in("coco", tmp_path)


def test_a_pickle_with_code_is_refused(tmp_path):
    downloads.make("refcoco", tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(RecordError, match=r"refs\(unc\).p cannot be read: it contains pathlib"):
        found_in("refcoco", tmp_path)


def test_missing_files_and_unknown_names_are_explained(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no annotation file dataset_coco.json or coco_karpathy_train.json"):
        found_in("coco", tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Files(tmp_path / "nowhere")
    for name, meant in (("msrvtt_captions", "msrvtt_caption"), ("chekc", "check")):
        with pytest.raises(SystemExit):
            main([name, str(tmp_path / "nowhere")])
        assert f"unknown data set {name!r} (did you mean {meant!r}?); expected" in capsys.readouterr().err


def test_a_validation_class_without_training_images_is_refused(tmp_path):
    downloads.make("imagenet", tmp_path)
    downloads.write_image(tmp_path / "val" / "n03126707" / "x.JPEG")
    with pytest.raises(RecordError, match="x.JPEG: folder: found 'n03126707'; expected one of n01440764, n02012849"):
        found_in("imagenet", tmp_path)
