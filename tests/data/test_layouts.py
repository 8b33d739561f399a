"""Adapters: the layouts in which people have the public data sets on disk, and pairings that would be wrong."""

import json
import shutil
import zlib
from collections import defaultdict
from pathlib import Path

import downloads
import pytest
from PIL import Image

from mplug2.data.__main__ import main
from mplug2.data.adapters import PUBLISHED, read
from mplug2.data.adapters.source import Files
from mplug2.data.records import RecordError, read_records


def found_in(name: str, root: Path, **options) -> tuple[dict, Files]:
    """The fields of all records by task and split, and the files of the download."""
    files, parts = Files(root, **options), defaultdict(list)
    for record in read(name, files):
        parts[record.task, record.split].append(record.fields)
    return dict(parts), files


def checked(capsys, *arguments) -> str:
    """The output of the check of a download."""
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    """The error message of the check of a download."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 1
    return capsys.readouterr().err


# ---- wrong pairings --------------------------------------------------------------------------------------------------


def test_validation_captions_of_cc3m_are_not_paired_with_training_images(tmp_path, capsys):
    """Row 0 of both tables is called 000000000.jpg; only the folder distinguishes the images."""
    downloads.make("cc3m", tmp_path)
    shutil.rmtree(tmp_path / "val")
    parts, files = found_in("cc3m", tmp_path)
    assert parts["image_caption", "val"] == [{"image": "val/000000000.jpg", "captions": ["a hill"]}]
    assert files.missing == {"val/000000000.jpg"}
    assert "missing: 1\n" in checked(capsys, "cc3m", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "image_caption.val.jsonl").exists()
    shutil.move(tmp_path / "train", tmp_path / "images")  # now nothing says which table the images belong to
    assert "none of the 3 media files of the annotations, such as train/000000000.jpg" in refused(
        capsys, "cc3m", tmp_path, "--out", tmp_path / "again")


def with_captions(root: Path, shards: dict[str, list[str]], suffix: str = ".jpg", text_only: bool = False) -> None:
    """The files that img2dataset writes: the number of the shard, the number within it, and captions next to them."""
    for folder, captions in shards.items():
        for number, caption in enumerate(captions):
            path = root / folder / f"{folder.split('/')[-1]}{number:04d}{suffix}"
            (downloads.write_video if suffix == ".mp4" else downloads.write_image)(path)
            path.with_suffix(".txt").write_text(caption)
            if not text_only:
                downloads.dump(path.with_suffix(".json"), {"caption": caption, "url": "http://e.org", "key": path.stem})


@pytest.mark.parametrize("text_only", [False, True])
def test_keys_of_img2dataset_are_not_row_numbers(tmp_path, text_only):
    """With two images per shard, the image of row 3 is called 000010001; the caption next to it is the right one."""
    captions = ["one tree", "two trees", "three trees", "four trees"]
    with_captions(tmp_path, {"00000": captions[:2], "00001": captions[2:]}, text_only=text_only)
    table = [[f"http://e.org/{n}", captions[n] if n < 4 else f"caption {n}"] for n in range(10002)]
    downloads.rows(tmp_path / "cc12m.tsv", "\t", ["url", "caption"], *table)
    parts, files = found_in("cc12m", tmp_path)
    assert parts["image_caption", "train"] == [
        {"image": f"0000{n // 2}/0000{n // 2}000{n % 2}.jpg", "captions": [captions[n]]} for n in range(4)
    ]
    assert not files.faulty
    (tmp_path / "cc12m.tsv").unlink()  # the captions are there without the table, too
    assert len(found_in("cc12m", tmp_path)[0]["image_caption", "train"]) == 4


def test_captions_that_differ_from_the_table_are_refused(tmp_path):
    with_captions(tmp_path, {"00000": ["one tree", "two trees"]})
    downloads.rows(tmp_path / "cc12m.tsv", "\t", ["http://e.org/1", '"One tree."'], ["http://e.org/2", "two houses"])
    with pytest.raises(RecordError, match="000000001.json: caption 'two trees' is not in the published .* 1 of 2"):
        found_in("cc12m", tmp_path)
    captions = [f"caption {n}" for n in range(200)]
    with_captions(tmp_path, {"00000": captions})
    downloads.rows(tmp_path / "cc12m.tsv", "\t", *([f"http://e.org/{n}", c] for n, c in enumerate(captions[:199])))
    parts, files = found_in("cc12m", tmp_path)  # one of 200 is left out: programs read quotes in different ways
    assert len(parts["image_caption", "train"]) == 199 and "caption 199" in files.faulty[0]


def test_splits_of_cc3m_come_from_the_folder_or_from_the_table(tmp_path):
    downloads.rows(tmp_path / "Train_GCC-training.tsv", "\t", ["a tree", "http://e.org/1"])
    downloads.rows(tmp_path / "Validation_GCC-1.1.0-Validation.tsv", "\t", ["a hill", "http://e.org/3"])
    with_captions(tmp_path, {"00000": ["a hill", "a tree"]})
    parts, _ = found_in("cc3m", tmp_path)
    assert parts == {("image_caption", "val"): [{"image": "00000/000000000.jpg", "captions": ["a hill"]}],
                     ("image_caption", "train"): [{"image": "00000/000000001.jpg", "captions": ["a tree"]}]}
    shutil.move(tmp_path / "00000", tmp_path / "cc3m_val")  # a training caption in a validation folder
    with pytest.raises(RecordError, match="caption 'a tree' is not in the published table \\(val\\)"):
        found_in("cc3m", tmp_path)


def test_invalid_captions_next_to_images_are_left_out_and_listed(tmp_path):
    with_captions(tmp_path, {"00000": ["a", "b", "c", "d"]})
    for number, content in enumerate(('{"caption": null}', '{"caption": 7}', "[" * 100_000)):
        (tmp_path / "00000" / f"00000000{number}.json").write_text(content)
    parts, files = found_in("cc12m", tmp_path)
    assert [fields["captions"] for fields in parts["image_caption", "train"]] == [["c"], ["d"]]
    assert len(files.faulty) == 2 and "found None; expected a text" in files.faulty[0]


def test_webvid_from_video2dataset_and_as_published(tmp_path):
    with_captions(tmp_path / "train", {"00000": ["A boat, seen from above"]}, suffix=".mp4")  # 8 digits are fine, too
    downloads.rows(tmp_path / "results_2M_train.csv", ",", ["videoid", "contentUrl", "duration", "page_dir", "name"],
                   [2127, "https://e.org/v.mp4", "PT00H00M15S", "006001_006050", "A boat, seen from above"])
    parts, _ = found_in("webvid", tmp_path)
    assert parts == {("video_caption", "train"): [
        {"video": "train/00000/000000000.mp4", "captions": ["A boat, seen from above"]}]}
    shutil.rmtree(tmp_path / "train")
    downloads.write_video(tmp_path / "2127.mp4")  # ids of WebVid identify a video without their folder
    assert found_in("webvid", tmp_path)[0]["video_caption", "train"][0]["video"] == "2127.mp4"


def test_a_download_of_tars_is_explained(tmp_path, capsys):
    (tmp_path / "00000.tar").write_bytes(b"")
    message = refused(capsys, "cc12m", tmp_path)
    assert "00000.tar is a tar and needs no conversion: give its folder to train.py --data" in message


def test_names_of_the_usual_downloader_of_conceptual_captions(tmp_path):
    """They have the row, the checksum of the URL, and no suffix."""
    downloads.rows(tmp_path / "Train_GCC-training.tsv", "\t", ["a tree", "http://e.org/1"])
    path = tmp_path / "training" / f"0_{zlib.crc32(b'http://e.org/1')}"
    path.parent.mkdir()
    Image.new("RGB", (8, 8)).save(path, "JPEG")
    parts, files = found_in("cc3m", tmp_path)
    assert parts["image_caption", "train"][0]["image"] == f"training/{path.name}" and not files.missing


def test_a_file_named_by_two_splits_or_by_two_records_of_a_gallery_is_reported(tmp_path, capsys):
    downloads.make("msrvtt_retrieval", tmp_path)
    assert "named by two" not in checked(capsys, "msrvtt_retrieval", tmp_path, "--preview", tmp_path / "a.png")
    downloads.rows(tmp_path / "MSRVTT_JSFUSION_test.csv", ",", ["key", "vid_key", "video_id", "sentence"],
                   ["ret0", "msr2", "video2", "a woman cooks"], ["ret1", "msr0", "video0", "a cat plays"],
                   ["ret2", "msr2", "video2", "someone cooks"])
    said = checked(capsys, "msrvtt_retrieval", tmp_path, "--preview", tmp_path / "a.png")
    assert "files named by two splits" in said
    assert "videos/all/video0.mp4: video_retrieval.train and video_retrieval.test" in said
    assert "files named by two records of a retrieval split" in said and "video2.mp4: again at" in said
    downloads.make("lsmdc", tmp_path / "lsmdc")  # several lines of a video that mean the same are fine
    assert "named by two" not in checked(capsys, "lsmdc", tmp_path / "lsmdc", "--preview", tmp_path / "a.png")


# ---- names -----------------------------------------------------------------------------------------------------------


def test_didemo_has_one_video_under_several_names(tmp_path):
    names = ["1@N00_7_aa.mov", "1@N00_7_aa.mp4", "1@N00_7_aa.", "2@N00_8_bb.avi", "3@N00_9_cc."]
    downloads.dump(tmp_path / "test_data.json", [{"video": name, "description": f"text {n}"}
                                                 for n, name in enumerate(names)])
    for file in ("1@N00_7_aa.mov.mp4", "2@N00_8_bb.mp4", "3@N00_9_cc.mov"):
        downloads.write_video(tmp_path / "videos" / file)
    parts, files = found_in("didemo", tmp_path)
    assert parts == {("video_retrieval", "test"): [
        {"id": "1@N00_7_aa", "video": "videos/1@N00_7_aa.mov.mp4", "captions": ["text 0 text 1 text 2"]},
        {"id": "2@N00_8_bb", "video": "videos/2@N00_8_bb.mp4", "captions": ["text 3"]},
        {"id": "3@N00_9_cc", "video": "videos/3@N00_9_cc.mov", "captions": ["text 4"]},
    ]}
    assert not files.missing and [name.split(" ")[0] for name in files.absent] == ["train", "val"]


@pytest.mark.parametrize("field, value", [
    ("Flickr30K_ID", "4705552913"), ("Flikr30kID", "4705552913.jpg"), ("flickr30k_id", 4705552913), (None, None)])
def test_the_image_of_snli_ve_has_three_spellings_or_is_in_the_pair(tmp_path, field, value):
    downloads.write_image(tmp_path / "4705552913.jpg")
    downloads.lines(tmp_path / "snli_ve_dev.jsonl", {
        "pairID": "4705552913.jpg#2r1n", "sentence2": "They smile", "gold_label": "neutral",
        **({field: value} if field else {}),
    })
    assert found_in("snli_ve", tmp_path)[0]["visual_entailment", "val"][0]["image"] == "4705552913.jpg"


def test_coco_under_the_names_of_2017_and_in_the_files_of_blip(tmp_path):
    downloads.make("coco", tmp_path / "a")
    for path in (tmp_path / "a").rglob("COCO_*.jpg"):
        path.rename(path.with_name(path.name.rpartition("_")[2]))
    parts, files = found_in("coco", tmp_path / "a")
    assert parts["image_caption", "test"][0]["image"] == "val2014/000000000003.jpg" and not files.missing

    downloads.dump(tmp_path / "b" / "coco_karpathy_train.json", [
        {"caption": text, "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"}
        for text in ("A woman", "A lady")])
    downloads.dump(tmp_path / "b" / "coco_karpathy_test.json", [
        {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["A man", "He rides"]}])
    for number in (522418, 391895):
        downloads.write_image(tmp_path / "b" / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    parts, _ = found_in("coco", tmp_path / "b")
    assert parts["image_retrieval", "train"] == [{"id": "522418", "image": "val2014/COCO_val2014_000000522418.jpg",
                                                  "captions": ["A woman", "A lady"]}]
    assert parts["image_caption", "test"][0]["captions"] == ["A man", "He rides"]


@pytest.mark.parametrize("mapping", [True, False])
def test_videos_of_msvd_may_be_named_by_number(tmp_path, mapping):
    downloads.make("msvd_qa", tmp_path)
    for path in tmp_path.glob("*.avi"):
        path.unlink()
    for number in (1, 2, 3):
        downloads.write_video(tmp_path / f"vid{number}.avi")
    if not mapping:
        (tmp_path / "youtube_mapping.txt").unlink()
    parts, files = found_in("msvd_qa", tmp_path)
    assert parts["video_qa", "test"][0]["video"] == "vid3.avi" and not files.missing


def test_kinds_and_ids_of_questions_are_kept_and_frameqa_files_are_read(tmp_path):
    downloads.lines(tmp_path / "frameqa_train.jsonl", {"gif_name": "tumblr_a", "question": "what?", "answer": "cat",
                                                       "answer_type": "object", "vid_id": "FRAMEQA9"})
    downloads.lines(tmp_path / "frameqa_test.jsonl", {"video_id": "tumblr_a", "question": "how many?", "answer": "two"})
    downloads.write_gif(tmp_path / "tumblr_a.gif")
    for name in ("tgif_qa", "mplug2_qa"):
        parts, _ = found_in(name, tmp_path)
        assert parts["video_qa", "train"] == [{"id": "FRAMEQA9", "video": "tumblr_a.gif", "qa": [
            {"question": "what?", "answers": ["cat"], "kind": "object"}]}]
        assert parts["video_qa", "test"][0]["qa"] == [{"question": "how many?", "answers": ["two"]}]


def test_the_sentences_of_a_paragraph_are_one_text(tmp_path):
    downloads.lines(tmp_path / "test.jsonl", {"video": "a.mov", "caption": ["A dog runs.", "It stops."]})
    downloads.write_video(tmp_path / "a.mp4")
    assert found_in("mplug2_retrieval", tmp_path)[0]["video_retrieval", "test"][0]["captions"] == [
        "A dog runs. It stops."]


def test_captions_of_sbu_in_one_file(tmp_path):
    downloads.dump(tmp_path / "sbu-captions-all.json", {"image_urls": ["http://e.org/1"], "captions": ["a tree"],
                                                        "user_ids": ["u"]})
    downloads.write_image(tmp_path / "000000000.jpg")
    assert found_in("sbu", tmp_path)[0]["image_caption", "train"][0]["captions"] == ["a tree"]
    downloads.dump(tmp_path / "sbu-captions-all.json", {"image_urls": ["a", "b"], "captions": ["a tree"]})
    with pytest.raises(RecordError, match="has 2 URLs, but there are 1 captions"):
        found_in("sbu", tmp_path)


def test_msrvtt_captions_in_one_file(tmp_path):
    downloads.make("msrvtt_retrieval", tmp_path)
    parts, _ = found_in("msrvtt_caption", tmp_path)
    assert {split for _, split in parts} == {"train", "val", "test"}


def test_kinetics_in_the_files_of_its_crawler_and_the_tree_with_replacements(tmp_path, capsys):
    downloads.make("kinetics", tmp_path)
    (tmp_path / "train.csv").rename(tmp_path / "kinetics-400_train.csv")
    (tmp_path / "validate.csv").unlink()
    name = "-3B32lodo2Mtrain_000059_000069.mp4"
    shutil.move(tmp_path / "train" / "air drumming" / name, tmp_path / "train" / name)
    downloads.write_video(tmp_path / "replacement" / "replacement_for_corrupted_k400" / name)
    parts, files = found_in("kinetics", tmp_path)
    assert parts["video_classification", "train"][0]["video"] == f"train/{name}"
    said = checked(capsys, "kinetics", tmp_path, "--preview", tmp_path / "a.png")
    assert "names that several files have; the first one is used (choose with --prefer FOLDER): 1\n" in said
    said = checked(capsys, "kinetics", tmp_path, "--prefer", "replacement_for_corrupted_k400", "--out", tmp_path / "o")
    assert "names that several files have" not in said
    record, = read_records(tmp_path / "o", "video_classification", "train")
    assert "replacement" in str(record.video)


def test_links_to_the_same_file_are_one_file_and_copies_are_counted(tmp_path):
    downloads.make("flickr30k", tmp_path)
    (tmp_path / "aa").mkdir()
    (tmp_path / "aa" / "1000092790.jpg").symlink_to(tmp_path / "flickr30k-images" / "1000092790.jpg")
    parts, files = found_in("flickr30k", tmp_path)
    assert not files.duplicates
    downloads.write_image(tmp_path / "small" / "more" / "1000092790.jpg", size=(6, 4))
    parts, files = found_in("flickr30k", tmp_path)
    assert list(files.duplicates) == ["1000092790.jpg"]
    assert parts["image_caption", "train"][0]["image"].split("/")[0] in ("aa", "flickr30k-images")
    assert found_in("flickr30k", tmp_path, prefer="small")[0]["image_caption", "train"][0]["image"].startswith("small/")
    downloads.make("coco", tmp_path / "coco")  # the published path decides
    downloads.write_image(tmp_path / "coco" / "copy" / "COCO_train2014_000000000000.jpg")
    parts, files = found_in("coco", tmp_path / "coco")
    assert parts["image_caption", "train"][0]["image"].startswith("train2014/") and not files.duplicates


def test_imagenet_as_on_kaggle(tmp_path):
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    downloads.rows(tmp_path / "LOC_val_solution.csv", ",", ["ImageId", "PredictionString"],
                   ["ILSVRC2012_val_00000001", "n01440764 85 1 499 272 "])
    tree = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    downloads.write_image(tree / "train" / "n01440764" / "n01440764_18.JPEG")
    downloads.write_image(tree / "val" / "ILSVRC2012_val_00000001.JPEG")
    downloads.write_image(tree / "test" / "ILSVRC2012_test_00000001.JPEG")
    parts, _ = found_in("imagenet", tmp_path)
    assert {part: [fields["label"] for fields in found] for part, found in parts.items()} == {
        ("image_classification", "train"): ["tench"], ("image_classification", "val"): ["tench"]}


def test_the_second_test_set_of_nlvr2(tmp_path):
    downloads.make("nlvr2", tmp_path)
    (tmp_path / "data" / "test1.json").rename(tmp_path / "data" / "test2.json")
    assert ("image_pair_reasoning", "test2") in found_in("nlvr2", tmp_path)[0]


def test_annotations_of_another_task_of_glue_are_not_taken(tmp_path):
    downloads.make("glue_wnli", tmp_path)
    with pytest.raises(FileNotFoundError, match="WNLI/.*belongs to another task of GLUE: expected a folder RTE"):
        found_in("glue_rte", tmp_path)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_annotations_in_a_folder_of_their_own_and_folders_named_like_the_data_set(tmp_path, capsys):
    """RefCOCO as published: refcoco/, refcoco+/ and refcocog/, each with an instances.json, next to the images."""
    for name in ("refcoco", "refcoco+"):
        downloads.make(name, tmp_path / "refer" / name)
    shutil.move(tmp_path / "refer" / "refcoco" / "images", tmp_path / "images" / "mscoco")
    shutil.rmtree(tmp_path / "refer" / "refcoco+" / "images")
    content = json.loads((tmp_path / "refer" / "refcoco+" / "instances.json").read_text())
    content["annotations"][0]["bbox"] = [0, 0, 12, 8]
    downloads.dump(tmp_path / "refer" / "refcoco+" / "instances.json", content)
    for name, box in (("refcoco", [0.5] * 4), ("refcoco+", [0.5, 0.5, 1, 1])):
        for root, annotations in ((tmp_path, None), (tmp_path / "images", tmp_path / "refer")):
            parts, files = found_in(name, root, annotations=annotations)
            assert parts["grounding", "train"][0]["box"] == box and not files.missing
    checked(capsys, "refcoco", tmp_path / "images", "--annotations", tmp_path / "refer", "--out", tmp_path / "out")
    assert read_records(tmp_path / "out", "grounding", "testA")[0].image.is_file()


def test_annotations_that_exist_twice_are_refused_with_a_way_out(tmp_path, capsys):
    """The annotations of the released code: one folder per data set, with equal names."""
    for name in ("msrvtt_qa", "msvd_qa"):
        downloads.make("mplug2_qa", tmp_path / "annotations_all" / name)
    assert "test.jsonl exists more than once" not in (message := refused(capsys, "mplug2_qa", tmp_path))
    assert "train.jsonl exists more than once" in message and "--annotations" in message
    said = checked(capsys, "mplug2_qa", tmp_path, "--annotations", tmp_path / "annotations_all" / "msvd_qa",
                   "--preview", tmp_path / "a.png")
    assert "video_qa.train" in said


@pytest.mark.parametrize("name", [name for name in downloads.TEST_ONLY])
def test_a_download_without_training_annotations_is_converted(name, tmp_path):
    expected = downloads.make(name, tmp_path)
    for path in downloads.TEST_ONLY[name]:
        shutil.rmtree(tmp_path / path) if (tmp_path / path).is_dir() else (tmp_path / path).unlink()
    parts, files = found_in(name, tmp_path)
    gone = ("train", "val") if name == "msrvtt_caption" else ("train",)  # there, both are in one file
    assert parts == {part: fields for part, fields in expected.items() if part[1] not in gone}
    assert any(name.split(" ")[0] in ("train", "train and val") for name in files.absent)


def test_nothing_found_is_an_error(tmp_path, capsys):
    downloads.make("msvd_caption", tmp_path)
    shutil.rmtree(tmp_path / "YouTubeClips")
    message = refused(capsys, "msvd_caption", tmp_path, "--out", tmp_path / "out")
    assert "none of the 3 media files of the annotations, such as -4wsuPCjDBc_5_15.mp4; unpack the media" in message
    assert not (tmp_path / "out").exists()


def test_an_incomplete_test_set_of_a_server_is_not_written(tmp_path, capsys):
    downloads.make("nocaps", tmp_path)
    (tmp_path / "test" / "002.jpg").unlink()
    said = checked(capsys, "nocaps", tmp_path, "--out", tmp_path / "out")
    assert "image_caption.test: not written, 1 of 1 records have no media; the server" in said
    assert not (tmp_path / "out" / "image_caption.test.jsonl").exists()


def test_a_git_lfs_pointer_is_named(tmp_path):
    downloads.make("coco", tmp_path)
    (tmp_path / "dataset_coco.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(RecordError, match="dataset_coco.json is a git-lfs pointer, not the file; fetch"):
        found_in("coco", tmp_path)


def test_files_of_macos_are_passed_over(tmp_path):
    downloads.make("coco", tmp_path)
    (tmp_path / "._dataset_coco.json").write_bytes(b"\0")
    (tmp_path / "train2014" / "._COCO_train2014_000000000000.jpg").write_bytes(b"\0")
    _, files = found_in("coco", tmp_path)
    assert all("/._" not in path for path in files.all_media("image"))


def test_published_counts():
    for name, counts in {
        "glue_rte": {"train": 2490, "val": 277, "test": 3000}, "glue_wnli": {"train": 635, "val": 71, "test": 146},
        "msvd_qa": {"train": 30933, "val": 6415, "test": 13157}, "nlvr2": {"val": 6982, "test": 6967},
        "lsmdc": {"train": 101079, "val": 7408}, "cc3m": {"val": 15840}, "msrvtt_qa": {"val": 12278},
    }.items():
        assert counts.items() <= PUBLISHED[name][1].items(), name
