"""The check of a download: counts, missing and unreadable media, the preview, and the files that it writes."""

import json

import downloads
import numpy as np
import pytest
from PIL import Image

from mplug2.data.__main__ import main
from mplug2.data.adapters import PUBLISHED
from mplug2.data.records import available, read_records


def test_counts_are_compared_with_the_published_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "coco", ("media", {"train": 2, "val": 1, "test": 7}))
    downloads.make("coco", tmp_path)
    main(["coco", str(tmp_path), "--preview", str(tmp_path / "sample.png")])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "." in line}
    assert rows["image_caption.train"].endswith("2 equal") and rows["image_caption.test"].endswith("7 DIFFERENT")
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_preview_shows_the_image_its_box_and_its_text(tmp_path):
    downloads.make("refcoco", tmp_path)
    main(["refcoco", str(tmp_path), "--preview", str(tmp_path / "sample.png")])
    preview = np.asarray(Image.open(tmp_path / "sample.png"))
    red = (preview == (255, 0, 0)).all(axis=2)
    assert red[48, 48:144].mean() > 0.9 and red[48:144, 48].mean() > 0.9  # the box from 1/4 to 3/4 of 192 pixels
    assert (preview[192:] < 128).any()  # text below


def test_missing_and_unreadable_media_are_named_and_left_out(tmp_path, capsys):
    downloads.make("coco", tmp_path / "download")
    gone = tmp_path / "download" / "val2014" / "COCO_val2014_000000000003.jpg"
    gone.unlink()
    (tmp_path / "download" / "train2014" / "COCO_train2014_000000000000.jpg").write_bytes(b"not an image")
    main(["coco", str(tmp_path / "download"), "--out", str(tmp_path / "data"), "--decode", "0"])
    said = capsys.readouterr().out
    assert "missing: 1\n  val2014/COCO_val2014_000000000003.jpg" in said
    assert "unreadable: 1\n" in said and "COCO_train2014_000000000000.jpg cannot be decoded" in said
    assert "image_caption.test: 1 of 1 records left out, media missing; scores on this split" in said
    assert "test" not in available(tmp_path / "data")["image_caption"]
    with pytest.raises(SystemExit):
        main(["coco", str(tmp_path / "download"), "--out", str(tmp_path / "data")])
    assert "already contains image_caption.train.jsonl" in capsys.readouterr().err


def test_a_published_id_that_two_records_share_is_left_out(tmp_path):
    downloads.make("snli_ve", tmp_path / "download")
    path = tmp_path / "download" / "snli_ve_dev.jsonl"
    other = {**json.loads(path.read_text()), "pairID": "other"}
    path.write_text(path.read_text() * 2 + json.dumps(other) + "\n")
    main(["snli_ve", str(tmp_path / "download"), "--out", str(tmp_path / "data")])
    ids = [record.id for record in read_records(tmp_path / "data", "visual_entailment", "val")]
    assert ids == ["visual_entailment.val.jsonl:1", "visual_entailment.val.jsonl:2", "other"]


def test_a_link_to_the_download_inside_it_is_followed_once(tmp_path):
    downloads.make("coco", tmp_path)
    main(["coco", str(tmp_path), "--out", str(tmp_path / "out"), "--decode", "1"])
    main(["coco", str(tmp_path), "--decode", "1", "--preview", str(tmp_path / "again.png")])
