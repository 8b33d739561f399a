"""Adapters for public video data sets.

Each function takes the `Files` of a download and yields its records. Its docstring names the expected annotation files
and their fields. Videos are found by name, in any folder of the download.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

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
    """train_val_videodatainfo.json and test_videodatainfo.json, or MSRVTT_data.json for all splits, each with `videos`
    (video_id, split) and `sentences` (video_id, caption)."""
    for info in _msrvtt_info(files):
        videos = {video.text("video_id"): video for video in info.items("videos")}
        for video_id, captions in _msrvtt_sentences(info, videos).items():
            video = videos[video_id]
            split = video.choice("split", {"train": "train", "validate": "val", "test": "test"})
            yield ParsedRecord("video_caption", split, video.source, {
                "id": video_id, "video": files.media("video", video_id), "captions": captions,
            })


def _msrvtt_info(files: Files) -> Iterator[Annotation]:
    if path := files.optional("MSRVTT_data.json"):
        yield json_object(path)
        return
    names = {"train and val": ("train_val_videodatainfo.json",), "test": ("test_videodatainfo.json",)}
    yield from (json_object(path) for _, path in files.splits(names))


def _msrvtt_sentences(info: Annotation, videos: dict) -> Captions:
    captions: Captions = {}
    for sentence in info.items("sentences"):
        sentence.look_up("video_id", videos, "the video_id of one of the videos")
        captions.setdefault(sentence.text("video_id"), []).append(sentence.text("caption"))
    return captions


def msrvtt_retrieval(files: Files, train: str = "MSRVTT_train.9k.csv") -> Iterator[ParsedRecord]:
    """MSRVTT_train.9k.csv (video_id) with the captions in the files of `msrvtt_caption`, and the 1k-A test set
    MSRVTT_JSFUSION_test.csv (key, vid_key, video_id, sentence): one sentence per video."""
    for split, path in files.splits({"train": (train,), "test": ("MSRVTT_JSFUSION_test.csv",)}):
        captions: Captions = {}
        for info in _msrvtt_info(files) if split == "train" else ():
            captions |= _msrvtt_sentences(info, {video.text("video_id"): video for video in info.items("videos")})
        for row in table(path, ","):
            texts = [row.text("sentence")] if split == "test" else row.look_up(
                "video_id", captions, "a video with sentences in MSRVTT_data.json")
            yield ParsedRecord("video_retrieval", split, row.source, {
                "id": row.text("video_id"), "video": files.media("video", row.text("video_id")), "captions": texts,
            })


def msrvtt_retrieval_7k(files: Files) -> Iterator[ParsedRecord]:
    """The same files with the smaller training set, MSRVTT_train.7k.csv."""
    return msrvtt_retrieval(files, "MSRVTT_train.7k.csv")


def msrvtt_qa(files: Files) -> Iterator[ParsedRecord]:
    """train_qa.json, val_qa.json, test_qa.json: lists of question, answer, id, video_id (a number)."""
    return _qa(files, lambda entry: (f"video{entry.key('video_id')}",))


def _qa(files: Files, names_of: Callable[[Annotation], tuple[str, ...]]) -> Iterator[ParsedRecord]:
    """`names_of` gives the possible names of the video of an entry."""
    for split, path in files.splits({split: (f"{split}_qa.json",) for split in ("train", "val", "test")}):
        for entry in json_list(path):
            yield ParsedRecord("video_qa", split, entry.source, {
                "id": entry.key("id"), "video": files.media("video", *names_of(entry)), "qa": [_question(entry)],
            })


def _question(entry: Annotation) -> dict:
    """A question with its answer, and its kind if the entry has an `answer_type`."""
    question = {"question": entry.text("question"), "answers": [entry.text("answer")]}
    return question | ({"kind": entry.key("answer_type")} if "answer_type" in entry else {})


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
    for split, path in files.splits({split: (f"{split}_list.txt",) for split in ("train", "val", "test")}):
        for source, video in text_lines(path):
            entry = Annotation(source, {"video": video})
            yield ParsedRecord(task, split, source, {
                "id": video, "video": files.media("video", video),
                "captions": entry.look_up("video", captions, "a video of AllVideoDescriptions.txt"),
            })


def msvd_qa(files: Files) -> Iterator[ParsedRecord]:
    """train_qa.json, val_qa.json, test_qa.json, as in MSR-VTT, and youtube_mapping.txt (video, blank, vid<number>).

    Videos are called as in the mapping, or vid<number>, in which case the mapping may be missing.
    """
    mapping = files.optional("youtube_mapping.txt")
    if mapping is None:
        return _qa(files, lambda entry: (f"vid{entry.key('video_id')}",))
    videos = {}
    for source, line in text_lines(mapping):
        video, _, number = line.rpartition(" ")
        if not video or not number.startswith("vid"):
            fail(source, "a video and its number, such as mv89psg6zh4_33_46 vid1", line)
        videos[number.removeprefix("vid")] = video
    return _qa(files, lambda entry: (
        entry.look_up("video_id", videos, "a number of youtube_mapping.txt"), f"vid{entry.key('video_id')}"))


# ---- others ----------------------------------------------------------------------------------------------------------


def tgif_qa(files: Files) -> Iterator[ParsedRecord]:
    """FrameQA: Train_frameqa_question.csv and Test_frameqa_question.csv, separated by tabs: gif_name, question, answer,
    type (0 to 3), vid_id, ...; or frameqa_train.jsonl, frameqa_val.jsonl and frameqa_test.jsonl: gif_name or video_id,
    question, answer, answer_type."""
    kinds = {"0": "object", "1": "number", "2": "color", "3": "location"}
    names = {}
    for split in ("train", "val", "test"):
        name = f"{split.title()}_frameqa_question"
        names[split] = (f"{name}.csv", f"{name}.tsv", f"frameqa_{split}.jsonl")
    for split, path in files.splits(names):
        for row in json_lines(path) if path.suffix == ".jsonl" else table(path, "\t"):
            question = _question(row)
            if "type" in row:
                question["kind"] = row.choice("type", kinds)
            yield ParsedRecord("video_qa", split, row.source, {
                **({"id": row.key("vid_id")} if "vid_id" in row else {}),
                "video": files.media("video", f"{row.text('gif_name' if 'gif_name' in row else 'video_id')}.gif"),
                "qa": [question],
            })


def didemo(files: Files) -> Iterator[ParsedRecord]:
    """train_data.json, val_data.json, test_data.json: lists of video, description, annotation_id, times, ...

    X.mov, X.mp4 and "X." are names of the same video X. As in paragraph retrieval, the text of a video is the
    concatenation of all its descriptions.
    """
    for split, path in files.splits({split: (f"{split}_data.json",) for split in ("train", "val", "test")}):
        entries: dict[str, list[Annotation]] = {}
        for entry in json_list(path):
            name = entry.text("video")
            entries.setdefault(name.rpartition(".")[0] or name, []).append(entry)
        for video, found in entries.items():
            names = dict.fromkeys(entry.text("video") for entry in found)  # files may be called X.mov.mp4, too
            yield ParsedRecord("video_retrieval", split, found[0].source, {
                "id": video, "video": files.media("video", *names, video),
                "captions": [" ".join(entry.text("description") for entry in found)],
            })


def lsmdc(files: Files) -> Iterator[ParsedRecord]:
    """LSMDC16_annos_training.csv, LSMDC16_annos_val.csv and LSMDC16_challenge_1000_publictect.csv: tab-separated, no
    header; the video, four times, the sentence. All lines of a video are positives of each other."""
    names = {"train": ("LSMDC16_annos_training.csv",), "val": ("LSMDC16_annos_val.csv",),
             "test": ("LSMDC16_challenge_1000_publictect.csv",)}
    columns = ["video", "start_aligned", "end_aligned", "start_extracted", "end_extracted", "sentence"]
    for split, path in files.splits(names):
        for row in table(path, "\t", columns, quoted=False):
            video = row.text("video")
            yield ParsedRecord("video_retrieval", split, row.source, {
                "video": files.media("video", f"{video}.avi"), "captions": [row.text("sentence")], "positive_id": video,
            })


def kinetics(files: Files) -> Iterator[ParsedRecord]:
    """train.csv, val.csv (or validate.csv) and, if it has labels, test.csv; or kinetics-400_train.csv and so on: label,
    youtube_id, time_start, time_end, split. Videos are named youtube_id_start_end, with times of six digits."""
    words = ("kinetics-", "kinetics_", "kinetics", "k")
    prefixes = ("", *(f"{word}{size}_" for size in (400, 600, 700) for word in words))
    names = {"train": ("train",), "val": ("val", "validate"), "test": ("test",)}
    classes: dict[str, str] = {}
    for split, path in files.splits({
        split: tuple(f"{prefix}{name}.csv" for name in of_split for prefix in prefixes)
        for split, of_split in names.items()
    }):
        all_classes = not classes  # of the training split, or, without one, of this split
        for row in table(path, ","):
            if split == "test" and "label" not in row:
                break
            if all_classes:
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
    names = {split: (f"something-something-v2-{name}", name)
             for split, name in (("train", "train.json"), ("val", "validation.json"))}
    for split, path in files.splits(names):
        for entry in json_list(path):
            template = entry.text("template").replace("[", "").replace("]", "")
            label = Annotation(entry.source, {"template": template}).choice("template", classes)
            yield ParsedRecord("video_classification", split, entry.source, {
                "id": entry.key("id"), "video": files.media("video", f"{entry.key('id')}.webm"), "label": label,
            })


# ---- the files released with mPLUG-2 ---------------------------------------------------------------------------------


def mplug2_caption(files: Files) -> Iterator[ParsedRecord]:
    """train.jsonl (video_id, caption; one line per caption) and test.jsonl (video_id, golden_captions; a list)."""
    for split, path in _released(files):
        captions: Captions = {}
        sources = {}
        for entry in json_lines(path):
            gold = next((name for name in ("golden_captions", "golden_caption", "gold_caption") if name in entry), "")
            video = entry.text("video_id")
            captions.setdefault(video, []).extend(entry.texts(gold or "caption"))
            sources.setdefault(video, entry.source)
        for video, texts in captions.items():
            yield ParsedRecord("video_caption", split, sources[video], {
                "id": video, "video": files.media("video", video), "captions": texts,
            })


def mplug2_qa(files: Files) -> Iterator[ParsedRecord]:
    """train.jsonl and test.jsonl, or frameqa_train.jsonl and frameqa_test.jsonl: video_id or gif_name, question, answer
    and, optionally, answer_type."""
    for split, path in _released(files):
        for entry in json_lines(path):
            name = entry.text("gif_name" if "gif_name" in entry else "video_id")
            yield ParsedRecord("video_qa", split, entry.source, {
                **({"id": entry.key("vid_id")} if "vid_id" in entry else {}),
                "video": files.media("video", name), "qa": [_question(entry)],
            })


def mplug2_retrieval(files: Files) -> Iterator[ParsedRecord]:
    """train.jsonl and test.jsonl: clip_name (or video, a file name) and caption, a text or the list of the sentences of
    a paragraph. All lines of a video are positives of each other."""
    for split, path in _released(files):
        for entry in json_lines(path):
            video = entry.text("clip_name" if "clip_name" in entry or "video" not in entry else "video")
            yield ParsedRecord("video_retrieval", split, entry.source, {
                "video": files.media("video", video), "captions": [" ".join(entry.texts("caption"))],
                "positive_id": video,
            })


def _released(files: Files) -> Iterator[tuple[str, Path]]:
    return files.splits({split: (f"{split}.jsonl", f"frameqa_{split}.jsonl") for split in ("train", "val", "test")})
