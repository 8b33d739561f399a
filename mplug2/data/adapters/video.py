"""Adapters for public video data sets.

Each function takes the `Files` of a download and yields its records. Its docstring names the expected annotation files
and their fields. Videos are found by name, in any folder of the download.
"""

import os
from collections.abc import Callable, Iterator

from mplug2.data.adapters.source import (
    Annotation,
    Files,
    ParsedRecord,
    fail,
    json_lines,
    json_list,
    json_object,
    table,
    text_lines,
)

Captions = dict[str, list[str]]


# ---- MSR-VTT ---------------------------------------------------------------------------------------------------------


def msrvtt_caption(files: Files) -> Iterator[ParsedRecord]:
    """train_val_videodatainfo.json and test_videodatainfo.json, each with `videos` (video_id, split) and `sentences`
    (video_id, caption)."""
    for name in ("train_val_videodatainfo.json", "test_videodatainfo.json"):
        info = json_object(files.annotation(name))
        videos = {video.text("video_id"): video for video in info.items("videos")}
        for video_id, captions in _msrvtt_sentences(info, videos).items():
            video = videos[video_id]
            split = video.choice("split", {"train": "train", "validate": "val", "test": "test"})
            yield ParsedRecord("video_caption", split, video.source, {
                "id": video_id, "video": files.media("video", video_id), "captions": captions,
            })


def _msrvtt_sentences(info: Annotation, videos: dict) -> Captions:
    captions: Captions = {}
    for sentence in info.items("sentences"):
        sentence.look_up("video_id", videos, "the video_id of one of the videos")
        captions.setdefault(sentence.text("video_id"), []).append(sentence.text("caption"))
    return captions


def msrvtt_retrieval(files: Files, train: str = "MSRVTT_train.9k.csv") -> Iterator[ParsedRecord]:
    """MSRVTT_data.json (as above, all splits), MSRVTT_train.9k.csv (video_id), and the 1k-A test set
    MSRVTT_JSFUSION_test.csv (key, vid_key, video_id, sentence): one sentence per video."""
    info = json_object(files.annotation("MSRVTT_data.json"))
    captions = _msrvtt_sentences(info, {video.text("video_id"): video for video in info.items("videos")})
    for row in table(files.annotation(train), ","):
        yield ParsedRecord("video_retrieval", "train", row.source, {
            "id": row.text("video_id"), "video": files.media("video", row.text("video_id")),
            "captions": row.look_up("video_id", captions, "a video with sentences in MSRVTT_data.json"),
        })
    for row in table(files.annotation("MSRVTT_JSFUSION_test.csv"), ","):
        yield ParsedRecord("video_retrieval", "test", row.source, {
            "id": row.text("video_id"), "video": files.media("video", row.text("video_id")),
            "captions": [row.text("sentence")],
        })


def msrvtt_retrieval_7k(files: Files) -> Iterator[ParsedRecord]:
    """The same files with the smaller training set, MSRVTT_train.7k.csv."""
    return msrvtt_retrieval(files, "MSRVTT_train.7k.csv")


def msrvtt_qa(files: Files) -> Iterator[ParsedRecord]:
    """train_qa.json, val_qa.json, test_qa.json: lists of question, answer, id, video_id (a number)."""
    return _qa(files, lambda entry: f"video{entry.key('video_id')}")


def _qa(files: Files, video_of: Callable[[Annotation], str]) -> Iterator[ParsedRecord]:
    for split in ("train", "val", "test"):
        for entry in json_list(files.annotation(f"{split}_qa.json")):
            yield ParsedRecord("video_qa", split, entry.source, {
                "id": entry.key("id"), "video": files.media("video", video_of(entry)),
                "qa": [{"question": entry.text("question"), "answers": [entry.text("answer")]}],
            })


# ---- MSVD ------------------------------------------------------------------------------------------------------------


def msvd_caption(files: Files) -> Iterator[ParsedRecord]:
    """AllVideoDescriptions.txt (video, blank, description; comments start with #), and train_list.txt, val_list.txt and
    test_list.txt (one video per line)."""
    return _msvd(files, "video_caption")


def msvd_retrieval(files: Files) -> Iterator[ParsedRecord]:
    """The same files as `msvd_caption`."""
    return _msvd(files, "video_retrieval")


def _msvd(files: Files, task: str) -> Iterator[ParsedRecord]:
    captions: Captions = {}
    for source, line in text_lines(files.annotation("AllVideoDescriptions.txt")):
        if not line.startswith("#"):
            video, _, text = line.partition(" ")
            captions.setdefault(video, []).append(Annotation(source, {"description": text}).text("description"))
    for split in ("train", "val", "test"):
        for source, video in text_lines(files.annotation(f"{split}_list.txt")):
            entry = Annotation(source, {"video": video})
            yield ParsedRecord(task, split, source, {
                "id": video, "video": files.media("video", video),
                "captions": entry.look_up("video", captions, "a video of AllVideoDescriptions.txt"),
            })


def msvd_qa(files: Files) -> Iterator[ParsedRecord]:
    """train_qa.json, val_qa.json, test_qa.json, as in MSR-VTT, and youtube_mapping.txt (video, blank, vid<number>)."""
    videos = {}
    for source, line in text_lines(files.annotation("youtube_mapping.txt")):
        video, _, number = line.rpartition(" ")
        if not video or not number.startswith("vid"):
            fail(source, "a video and its number, such as mv89psg6zh4_33_46 vid1", line)
        videos[number.removeprefix("vid")] = video
    return _qa(files, lambda entry: entry.look_up("video_id", videos, "a number of youtube_mapping.txt"))


# ---- others ----------------------------------------------------------------------------------------------------------


def tgif_qa(files: Files) -> Iterator[ParsedRecord]:
    """FrameQA: Train_frameqa_question.csv and Test_frameqa_question.csv, separated by tabs: gif_name, question, answer,
    type (0 to 3), vid_id, ..."""
    kinds = {"0": "object", "1": "number", "2": "color", "3": "location"}
    for split in ("train", "test"):
        name = f"{split.title()}_frameqa_question"
        for row in table(files.annotation(f"{name}.csv", f"{name}.tsv"), "\t"):
            yield ParsedRecord("video_qa", split, row.source, {
                "video": files.media("video", f"{row.text('gif_name')}.gif"),
                "qa": [{"question": row.text("question"), "answers": [row.text("answer")],
                        "kind": row.choice("type", kinds)}],
            })


def didemo(files: Files) -> Iterator[ParsedRecord]:
    """train_data.json, val_data.json, test_data.json: lists of video, description, annotation_id, times, ...

    As in paragraph retrieval, the text of a video is the concatenation of all its descriptions.
    """
    for split in ("train", "val", "test"):
        texts: Captions = {}
        sources = {}
        for entry in json_list(files.annotation(f"{split}_data.json")):
            texts.setdefault(entry.text("video"), []).append(entry.text("description"))
            sources.setdefault(entry.text("video"), entry.source)
        for video, descriptions in texts.items():
            yield ParsedRecord("video_retrieval", split, sources[video], {
                "id": video, "video": files.media("video", video), "captions": [" ".join(descriptions)],
            })


def lsmdc(files: Files) -> Iterator[ParsedRecord]:
    """LSMDC16_annos_training.csv, LSMDC16_annos_val.csv and LSMDC16_challenge_1000_publictect.csv: tab-separated, no
    header; the video, four times, the sentence. All lines of a video are positives of each other."""
    names = {"train": "LSMDC16_annos_training.csv", "val": "LSMDC16_annos_val.csv",
             "test": "LSMDC16_challenge_1000_publictect.csv"}
    columns = ["video", "start_aligned", "end_aligned", "start_extracted", "end_extracted", "sentence"]
    for split, name in names.items():
        for row in table(files.annotation(name), "\t", columns, quoted=False):
            video = row.text("video")
            yield ParsedRecord("video_retrieval", split, row.source, {
                "video": files.media("video", f"{video}.avi"), "captions": [row.text("sentence")], "positive_id": video,
            })


def webvid(files: Files) -> Iterator[ParsedRecord]:
    """results_2M_train.csv and results_2M_val.csv (or 10M): videoid, contentUrl, duration, page_dir, name."""
    for split in ("train", "val"):
        for row in table(files.annotation(f"results_2M_{split}.csv", f"results_10M_{split}.csv"), ","):
            video = os.path.join(row.text("page_dir"), f"{row.key('videoid')}.mp4")
            yield ParsedRecord("video_caption", split, row.source, {
                "id": row.key("videoid"), "video": files.media("video", video), "captions": [row.text("name")],
            })


def kinetics(files: Files) -> Iterator[ParsedRecord]:
    """train.csv, val.csv (or validate.csv) and, if it has labels, test.csv: label, youtube_id, time_start, time_end,
    split. Videos are named youtube_id_start_end, with times of six digits."""
    classes: dict[str, str] = {}
    for split, names in {"train": ("train.csv",), "val": ("val.csv", "validate.csv"), "test": ("test.csv",)}.items():
        path = files.optional(*names) if split == "test" else files.annotation(*names)
        for row in table(path, ",") if path else ():
            if split == "test" and "label" not in row:
                break
            if split == "train":
                classes[row.text("label")] = row.text("label")
            name = f"{row.text('youtube_id')}_{row.number('time_start'):06.0f}_{row.number('time_end'):06.0f}"
            yield ParsedRecord("video_classification", split, row.source, {
                "id": name, "video": files.media("video", name), "label": row.choice("label", classes),
            })


def ssv2(files: Files) -> Iterator[ParsedRecord]:
    """Something-Something v2: train.json and validation.json (lists of id, label, template, placeholders) and
    labels.json (template: number); all names may begin with something-something-v2-. The class is the template
    without brackets."""
    labels = json_object(files.annotation("something-something-v2-labels.json", "labels.json"))
    classes = {template: template for template in labels.values}
    for split, name in (("train", "train.json"), ("val", "validation.json")):
        for entry in json_list(files.annotation(f"something-something-v2-{name}", name)):
            template = entry.text("template").replace("[", "").replace("]", "")
            label = Annotation(entry.source, {"template": template}).choice("template", classes)
            yield ParsedRecord("video_classification", split, entry.source, {
                "id": entry.key("id"), "video": files.media("video", f"{entry.key('id')}.webm"), "label": label,
            })


# ---- the files released with mPLUG-2 ---------------------------------------------------------------------------------


def mplug2_caption(files: Files) -> Iterator[ParsedRecord]:
    """train.jsonl (video_id, caption; one line per caption) and test.jsonl (video_id, golden_captions; a list)."""
    for split in ("train", "val", "test"):
        captions: Captions = {}
        sources = {}
        for entry in _released(files, split):
            gold = next((name for name in ("golden_captions", "golden_caption", "gold_caption") if name in entry), "")
            video = entry.text("video_id")
            captions.setdefault(video, []).extend(entry.texts(gold or "caption"))
            sources.setdefault(video, entry.source)
        for video, texts in captions.items():
            yield ParsedRecord("video_caption", split, sources[video], {
                "id": video, "video": files.media("video", video), "captions": texts,
            })


def mplug2_qa(files: Files) -> Iterator[ParsedRecord]:
    """train.jsonl and test.jsonl: video_id, question, answer."""
    for split in ("train", "val", "test"):
        for entry in _released(files, split):
            yield ParsedRecord("video_qa", split, entry.source, {
                "video": files.media("video", entry.text("video_id")),
                "qa": [{"question": entry.text("question"), "answers": [entry.text("answer")]}],
            })


def mplug2_retrieval(files: Files) -> Iterator[ParsedRecord]:
    """train.jsonl and test.jsonl: clip_name (or video, a file name) and caption, a text or a list.

    All lines of a video are positives of each other.
    """
    for split in ("train", "val", "test"):
        for entry in _released(files, split):
            video = entry.text("clip_name" if "clip_name" in entry or "video" not in entry else "video")
            yield ParsedRecord("video_retrieval", split, entry.source, {
                "video": files.media("video", video), "captions": entry.texts("caption"), "positive_id": video,
            })


def _released(files: Files, split: str) -> Iterator[Annotation]:
    path = files.optional("val.jsonl") if split == "val" else files.annotation(f"{split}.jsonl")
    return json_lines(path) if path else iter(())
