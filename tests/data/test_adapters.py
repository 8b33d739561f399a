"""Public data sets: each adapter on a mock download that follows the published schema, and what is said of bad ones."""

import json
import pickle
from collections import defaultdict
from pathlib import Path

import downloads
import numpy as np
import pytest
from PIL import Image

from mplug2.data.__main__ import main
from mplug2.data.adapters import ADAPTERS, PUBLISHED, read
from mplug2.data.adapters.source import Files
from mplug2.data.records import RecordError, available, read_records


def found_in(name: str, root: Path) -> tuple[dict, Files]:
    files, parts = Files(root), defaultdict(list)
    for found in read(name, files):
        parts[found.task, found.split].append(found.fields)
        assert str(root) in found.source
    return dict(parts), files


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_download_as_it_is_published(name, tmp_path, capsys):
    """What the adapter finds, what the check says, and that the files it writes are data that training reads."""
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


def test_every_count_is_of_splits_that_the_adapter_makes(tmp_path):
    assert set(PUBLISHED) <= set(ADAPTERS)
    for name, (unit, counts) in PUBLISHED.items():
        made = {split for _, split in downloads.make(name, tmp_path / name)}
        assert unit in ("media", "records") and set(counts) <= made, name


def test_equal_counts_are_said_to_be_equal(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "coco", ("media", {"train": 2, "val": 1, "test": 7}))
    downloads.make("coco", tmp_path)
    main(["coco", str(tmp_path), "--picture", str(tmp_path / "sample.png")])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "." in line}
    assert rows["image_caption.train"].endswith("2 equal") and rows["image_caption.test"].endswith("7 DIFFERENT")
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_sample_is_drawn_with_its_frames_and_its_box(tmp_path):
    downloads.make("refcoco", tmp_path)
    main(["refcoco", str(tmp_path), "--picture", str(tmp_path / "sample.png")])
    drawn = np.asarray(Image.open(tmp_path / "sample.png"))
    red = (drawn == (255, 0, 0)).all(axis=2)
    assert red[48, 48:144].mean() > 0.9 and red[48:144, 48].mean() > 0.9  # the box from 1/4 to 3/4 of 192 pixels
    assert (drawn[192:] < 128).any()  # text below


def test_missing_and_unreadable_media_are_named_and_left_out(tmp_path, capsys):
    downloads.make("coco", tmp_path / "download")
    gone = tmp_path / "download" / "val2014" / "COCO_val2014_000000000003.jpg"
    gone.unlink()
    (tmp_path / "download" / "train2014" / "COCO_train2014_000000000000.jpg").write_bytes(b"not a picture")
    main(["coco", str(tmp_path / "download"), "--out", str(tmp_path / "data"), "--decode", "0"])
    said = capsys.readouterr().out
    assert "missing: 1\n  val2014/COCO_val2014_000000000003.jpg" in said
    assert "unreadable: 1\n" in said and "COCO_train2014_000000000000.jpg cannot be decoded" in said
    assert "image_caption.test: 1 of 1 records left out, their media are missing: numbers on this split" in said
    assert "test" not in available(tmp_path / "data")["image_caption"]
    with pytest.raises(SystemExit):
        main(["coco", str(tmp_path / "download"), "--out", str(tmp_path / "data")])
    assert "has image_caption.train.jsonl" in capsys.readouterr().err


def test_a_published_id_that_two_records_share_is_left_out(tmp_path):
    downloads.make("snli_ve", tmp_path / "download")
    path = tmp_path / "download" / "snli_ve_dev.jsonl"
    other = {**json.loads(path.read_text()), "pairID": "other"}
    path.write_text(path.read_text() * 2 + json.dumps(other) + "\n")
    main(["snli_ve", str(tmp_path / "download"), "--out", str(tmp_path / "data")])
    ids = [record.id for record in read_records(tmp_path / "data", "visual_entailment", "val")]
    assert ids == ["visual_entailment.val.jsonl:1", "visual_entailment.val.jsonl:2", "other"]


def test_a_name_in_two_places_is_refused_unless_the_published_path_decides(tmp_path):
    downloads.make("flickr30k", tmp_path)
    downloads.picture(tmp_path / "copy" / "1000092790.jpg")
    with pytest.raises(RecordError, match="1000092790.jpg is there more than once, as copy/.* and flickr30k-images/"):
        found_in("flickr30k", tmp_path)
    downloads.make("coco", tmp_path / "coco")
    downloads.picture(tmp_path / "coco" / "copy" / "COCO_train2014_000000000000.jpg")
    assert found_in("coco", tmp_path / "coco")[0]["image_caption", "train"][0]["image"].startswith("train2014/")


def test_a_link_back_to_the_download_is_followed_once(tmp_path):
    downloads.make("coco", tmp_path)
    main(["coco", str(tmp_path), "--out", str(tmp_path / "out"), "--decode", "1"])
    main(["coco", str(tmp_path), "--decode", "1", "--picture", str(tmp_path / "again.png")])


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
     r"train_val_videodatainfo.json: videos\[0\]: split: expected one of train, validate, test; found 'training'"),
    ("msrvtt_caption", "annotation/test_videodatainfo.json", dict(sentences__caption="  "),
     r"test_videodatainfo.json: sentences\[0\]: caption: expected a text that is not empty; found '  '"),
    ("msrvtt_caption", "annotation/test_videodatainfo.json", dict(sentences__video_id="video9"),
     r"sentences\[0\]: video_id: expected the video_id of one of the videos; found 'video9'"),
    ("msrvtt_qa", "val_qa.json", dict(answer=""), r"val_qa.json: entry\[0\]: answer: expected a text that is not"),
    ("msrvtt_qa", "val_qa.json", dict(question="GONE"), r"val_qa.json: entry\[0\]: field 'question' is missing"),
    ("msvd_qa", "test_qa.json", dict(video_id=99), "expected a number of youtube_mapping.txt; found '99'"),
    ("ssv2", "labels/train.json", dict(template="Eating [something]"),
     r"train.json: entry\[0\]: template: expected one of .*; found 'Eating something'"),
    ("coco", "dataset_coco.json", dict(images__split="dev"), r"images\[0\]: split: .* found 'dev'"),
    ("coco", "dataset_coco.json", dict(images__sentences=[]), r"images\[0\]: sentences: expected one or more"),
    ("nocaps", "nocaps_val_4500_captions.json", dict(annotations__image_id=77),
     r"annotations\[0\]: image_id: expected the id of one of the images; found '77'"),
    ("vqav2", "v2_mscoco_val2014_annotations.json", dict(annotations__answers=[]),
     r"v2_mscoco_val2014_annotations.json: annotations\[0\]: answers: expected one or more answers"),
    ("vqav2", "v2_mscoco_train2014_annotations.json", dict(annotations__question_id=5),
     r"questions\[0\]: question_id: expected a question that has answers; found '9000'"),
    ("snli_ve", "snli_ve_dev.jsonl", dict(gold_label="-"),
     r"snli_ve_dev.jsonl:2: gold_label: expected one of entailment, neutral, contradiction; found '-'"),
    ("nlvr2", "data/dev.json", dict(label="Maybe"), r"dev.json:2: label: expected one of True, False; found 'Maybe'"),
    ("nlvr2", "data/dev.json", dict(identifier="dev"), r"dev.json:2: identifier: expected split-set-pair-sentence"),
    ("refcoco", "instances.json", dict(annotations__bbox=[9, 2, 6, 4]),
     r"annotations\[0\]: bbox: expected a box with an area inside the picture, 12 x 8 pixels; found \[9, 2, 6, 4\]"),
    ("refcoco", "instances.json", dict(annotations__bbox=[1, 1, 0, 4]), "a box with an area"),
    ("refcoco", "instances.json", dict(annotations__bbox=[1, 1]), "expected four numbers"),
    ("refcoco", "instances.json", dict(images__width=float("nan")), r"images\[0\]: width: expected a number; .* nan"),
    ("mplug2_caption", "test.jsonl", dict(golden_captions=["", "b"]),
     r"test.jsonl:2: golden_captions\[0\]: text: expected a text that is not empty"),
    ("mplug2_qa", "train.jsonl", dict(video_id=["a"]), r"train.jsonl:2: video_id: expected a text"),
]


@pytest.mark.parametrize("name, file, values, message", BAD)
def test_bad_annotations_are_named(name, file, values, message, tmp_path):
    downloads.make(name, tmp_path)
    change(tmp_path / file, **values)
    with pytest.raises(RecordError, match=message):
        found_in(name, tmp_path)


@pytest.mark.parametrize("name, file, line, message", [
    ("glue_rte", "RTE/dev.tsv", "1\ta\tb\tmaybe",
     r"dev.tsv:3: label: expected one of entailment, not_entailment; found 'maybe'"),
    ("glue_rte", "RTE/dev.tsv", "1\ta", r"dev.tsv:3: expected 4 columns \(index, sentence1, sentence2, label\)"),
    ("glue_cola", "CoLA/train.tsv", "gj04\t2\t\tHello.", r"train.tsv:2: label: expected one of 0, 1; found '2'"),
    ("glue_stsb", "STS-B/train.tsv", "1\tm\tf\t2012\t1\tn\tn\ta\tb\t5.5", "train.tsv:3: score: .* from 0 to 5"),
    ("glue_stsb", "STS-B/train.tsv", "1\tm\tf\t2012\t1\tn\tn\ta\tb\tx", "train.tsv:3: score: expected a number"),
    ("kinetics", "validate.csv", "surfing,abc,1,11,val", "validate.csv:3: label: expected one of air drumming; found"),
    ("tgif_qa", "Test_frameqa_question.csv", "g\tq\ta\t7\tv\tk\td", "question.csv:3: type: expected one of 0, 1, 2, 3"),
    ("lsmdc", "LSMDC16_annos_val.csv", "clip\t1\t2", "annos_val.csv:3: expected 6 columns"),
    ("cc3m", "Train_GCC-training.tsv", " \thttp://e.org", "training.tsv:3: caption: expected a text that is not empty"),
])
def test_bad_rows_are_named(name, file, line, message, tmp_path):
    downloads.make(name, tmp_path)
    with (tmp_path / file).open("a") as out:
        out.write(line + "\n")
    with pytest.raises(RecordError, match=message):
        found_in(name, tmp_path)


def test_the_rows_of_qqp_that_are_at_fault_as_published_are_named_and_left_out(tmp_path, capsys):
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
    assert "at fault as published, and left out: 3\n" in said and "train.tsv:3: 4 columns, not 6\n" in said
    assert "train.tsv:5: a question is empty\n" in said


@pytest.mark.parametrize("name, file, content, message", [
    ("webvid", "results_2M_val.csv", b"videoid,contentUrl,duration,page_dir,name\n1,a,b,c,\xff\n",
     "results_2M_val.csv:2: expected text in UTF-8"),
    ("webvid", "results_2M_val.csv", b"videoid,contentUrl,duration,page_dir,name\n1,a,b\rb,c,d\n",
     "results_2M_val.csv:2: expected a table"),
    ("glue_rte", "RTE/dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tb\tentailment\n",
     "dev.tsv:2: expected text in UTF-8"),
    ("glue_rte", "RTE/dev.tsv", b"index\tsentence1\tsentence2\tlabel\n\t\t\t\n",
     "dev.tsv:2: sentence1: expected a text that is not empty"),
    ("mplug2_qa", "test.jsonl", b"\xef\xbb\xbf\n{", "test.jsonl:2: expected a JSON object"),
])
def test_damaged_lines_are_named(name, file, content, message, tmp_path):
    downloads.make(name, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        found_in(name, tmp_path)


def test_a_carriage_return_within_a_caption_ends_no_row(tmp_path):
    downloads.make("cc12m", tmp_path)
    (tmp_path / "cc12m.tsv").write_bytes(b"http://e.org/1\ta\rtree\r\n")
    assert found_in("cc12m", tmp_path)[0]["image_caption", "train"][0]["captions"] == ["a\rtree"]


def test_a_file_that_is_cut_off_is_named_with_its_line(tmp_path):
    downloads.make("coco", tmp_path)
    path = tmp_path / "dataset_coco.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RecordError, match="dataset_coco.json:1: expected JSON"):
        found_in("coco", tmp_path)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    downloads.make("refcoco", tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(RecordError, match=r"refs\(unc\).p cannot be read: it holds pathlib"):
        found_in("refcoco", tmp_path)


def test_what_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no annotation file dataset_coco.json"):
        found_in("coco", tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Files(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        main(["msrvtt_captions", str(tmp_path)])
    assert "unknown data set 'msrvtt_captions'; did you mean msrvtt_caption?" in capsys.readouterr().err


def test_a_validation_class_that_training_lacks_is_refused(tmp_path):
    downloads.make("imagenet", tmp_path)
    downloads.picture(tmp_path / "val" / "n03126707" / "x.JPEG")
    with pytest.raises(RecordError, match="x.JPEG: folder: expected one of n01440764, n02012849; found 'n03126707'"):
        found_in("imagenet", tmp_path)
