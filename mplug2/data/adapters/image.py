"""Adapters for public image data sets. Each docstring names the expected annotation files, as in `video.py`."""

import os
from collections.abc import Iterator

from mplug2.data.adapters.source import (
    Annotation,
    Files,
    ParsedRecord,
    fail,
    json_lines,
    json_list,
    json_object,
    pickle_list,
    table,
    text_lines,
)
from mplug2.data.records import BOX_SLACK, RecordError

# ---- captions --------------------------------------------------------------------------------------------------------


def coco(files: Files) -> Iterator[ParsedRecord]:
    """dataset_coco.json, Karpathy's splits: `images` with filename, filepath, split, sentences (raw, ...), cocoid.

    "restval" belongs to the training split. Each image serves captioning and retrieval.
    """
    return _karpathy(files, "dataset_coco.json", "cocoid")


def flickr30k(files: Files) -> Iterator[ParsedRecord]:
    """dataset_flickr30k.json, in the format of COCO, without filepath and cocoid."""
    return _karpathy(files, "dataset_flickr30k.json", "imgid")


def _karpathy(files: Files, name: str, id_field: str) -> Iterator[ParsedRecord]:
    splits = {"train": "train", "restval": "train", "val": "val", "test": "test"}
    for image in json_object(files.annotation(name)).items("images"):
        captions = [sentence.text("raw") for sentence in image.items("sentences")]
        if not captions:
            fail(f"{image.source}: sentences", "one or more sentences", captions)
        path = os.path.join(image.text("filepath") if "filepath" in image else "", image.text("filename"))
        for task in ("image_caption", "image_retrieval"):
            yield ParsedRecord(task, image.choice("split", splits), image.source, {
                "id": image.key(id_field), "image": files.media("image", path), "captions": captions,
            })


def nocaps(files: Files) -> Iterator[ParsedRecord]:
    """nocaps_val_4500_captions.json (`images` with id and file_name, `annotations` with image_id and caption) and
    nocaps_test_image_info.json (`images` only: the server keeps the captions)."""
    for split, name in (("val", "nocaps_val_4500_captions.json"), ("test", "nocaps_test_image_info.json")):
        path = files.annotation(name) if split == "val" else files.optional(name)
        if path is None:
            continue
        content = json_object(path)
        images = {image.key("id"): image for image in content.items("images")}
        captions: dict[str, list[str]] = {}
        for entry in content.items("annotations") if split == "val" else ():
            entry.look_up("image_id", images, "the id of one of the images")
            captions.setdefault(entry.key("image_id"), []).append(entry.text("caption"))
        for key, image in images.items():
            fields = {"id": key, "image": files.media("image", image.text("file_name"))}
            if split == "val":
                truth = {"captions": image.look_up("id", captions, "an image with captions")}
            else:
                truth = {"unlabelled": True}
            yield ParsedRecord("image_caption", split, image.source, fields | truth)


def visual_genome(files: Files) -> Iterator[ParsedRecord]:
    """region_descriptions.json (id, regions with phrase) as captions, question_answers.json (id, qas with qa_id,
    question, answer). Everything is for training; images are named after their id."""
    for image in json_list(files.annotation("region_descriptions.json")):
        phrases = [region.text("phrase") for region in image.items("regions")]
        if phrases:  # a few images have none
            yield ParsedRecord("image_caption", "train", image.source, {
                "id": image.key("id"), "image": files.media("image", f"{image.key('id')}.jpg"), "captions": phrases,
            })
    for image in json_list(files.annotation("question_answers.json")):
        qa = [{"question": each.text("question"), "answers": [each.text("answer")]} for each in image.items("qas")]
        if qa:
            yield ParsedRecord("image_qa", "train", image.source, {
                "id": image.key("id"), "image": files.media("image", f"{image.key('id')}.jpg"), "qa": qa,
            })


def cc3m(files: Files) -> Iterator[ParsedRecord]:
    """Train_GCC-training.tsv and, optionally, Validation_GCC-1.1.0-Validation.tsv: caption and URL.

    Images are named after their row number, from 0, in nine digits, in a folder `train` or `val`.
    """
    yield from _web(files, "train", files.annotation("Train_GCC-training.tsv"), ["caption", "url"], "train")
    if path := files.optional("Validation_GCC-1.1.0-Validation.tsv"):
        yield from _web(files, "val", path, ["caption", "url"], "val")


def cc12m(files: Files) -> Iterator[ParsedRecord]:
    """cc12m.tsv: URL and caption, images named as in CC3M."""
    return _web(files, "train", files.annotation("cc12m.tsv"), ["url", "caption"])


def sbu(files: Files) -> Iterator[ParsedRecord]:
    """sbu.tsv (caption and URL), or the published pair SBU_captioned_photo_dataset_urls.txt and ..._captions.txt,
    line by line; images named as in CC3M."""
    if path := files.optional("sbu.tsv"):
        yield from _web(files, "train", path, ["caption", "url"])
        return
    urls = files.annotation("SBU_captioned_photo_dataset_urls.txt")
    captions = list(text_lines(files.annotation("SBU_captioned_photo_dataset_captions.txt")))
    if (count := sum(1 for _ in text_lines(urls))) != len(captions):
        raise RecordError(f"{urls} has {count} lines, but there are {len(captions)} captions; download both again")
    for number, (source, caption) in enumerate(captions):
        yield ParsedRecord("image_caption", "train", source, {
            "image": files.media("image", f"{number:09d}.jpg"), "captions": [caption],
        })


def _web(files: Files, split: str, path, columns: list[str], folder: str = "") -> Iterator[ParsedRecord]:
    number = 0
    for row in table(path, "\t", columns, quoted=False):
        if number == 0 and list(row.values.values()) == columns:  # a header, which img2dataset requires
            continue
        name = os.path.join(folder, f"{number:09d}.jpg")
        yield ParsedRecord("image_caption", split, row.source, {
            "image": files.media("image", name), "captions": [row.text("caption")],
        })
        number += 1


# ---- questions, entailment, pairs, boxes -----------------------------------------------------------------------------


def vqav2(files: Files) -> Iterator[ParsedRecord]:
    """v2_OpenEnded_mscoco_SPLIT_questions.json (`questions` with image_id, question, question_id) and
    v2_mscoco_SPLIT_annotations.json (`annotations` with question_id, answers (answer, ...), answer_type, ...) of
    train2014 and val2014, and the unlabelled questions of test2015 and test-dev2015."""
    for split, year in (("train", "train2014"), ("val", "val2014"), ("test", "test2015"), ("test-dev", "test-dev2015")):
        name, labelled = f"v2_OpenEnded_mscoco_{year}_questions.json", split in ("train", "val")
        path = files.annotation(name) if labelled else files.optional(name)
        if path is None:
            continue
        answers = {}
        if labelled:
            truths = json_object(files.annotation(f"v2_mscoco_{year}_annotations.json"))
            answers = {entry.key("question_id"): entry for entry in truths.items("annotations")}
        for entry in json_object(path).items("questions"):
            name = f"COCO_{year.replace('-dev', '')}_{int(entry.number('image_id')):012d}.jpg"
            question, truth = {"question": entry.text("question")}, {"unlabelled": True}
            if labelled:
                given = entry.look_up("question_id", answers, "a question that has answers")
                question["answers"] = [each.text("answer") for each in given.items("answers")]
                question["kind"], truth = given.text("answer_type"), {}
                if not question["answers"]:
                    fail(f"{given.source}: answers", "one or more answers", [])
            yield ParsedRecord("image_qa", split, entry.source, {
                "id": entry.key("question_id"), "image": files.media("image", name), "qa": [question], **truth,
            })


def snli_ve(files: Files) -> Iterator[ParsedRecord]:
    """snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl: Flickr30K_ID, sentence2, gold_label, pairID, ..."""
    labels = {name: name for name in ("entailment", "neutral", "contradiction")}
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        for entry in json_lines(files.annotation(f"snli_ve_{name}.jsonl")):
            yield ParsedRecord("visual_entailment", split, entry.source, {
                "id": entry.text("pairID"), "image": files.media("image", f"{entry.key('Flickr30K_ID')}.jpg"),
                "text": entry.text("sentence2"), "label": entry.choice("gold_label", labels),
            })


def nlvr2(files: Files) -> Iterator[ParsedRecord]:
    """train.json, dev.json, test1.json, one object per line: identifier (split-set-pair-sentence), sentence, label.

    The images are split-set-pair-img0.png and -img1.png.
    """
    for split, name in (("train", "train.json"), ("val", "dev.json"), ("test", "test1.json")):
        for entry in json_lines(files.annotation(name)):
            pair, dash, _ = entry.text("identifier").rpartition("-")
            if not dash:
                fail(f"{entry.source}: identifier", "split-set-pair-sentence", entry.text("identifier"))
            yield ParsedRecord("image_pair_reasoning", split, entry.source, {
                "id": entry.text("identifier"), "text": entry.text("sentence"),
                "images": [files.media("image", f"{pair}-img{side}.png") for side in (0, 1)],
                "label": entry.choice("label", {"True": "true", "False": "false"}),
            })


def refcoco(files: Files, refs: str = "refs(unc).p") -> Iterator[ParsedRecord]:
    """refs(unc).p (a list of ref_id, ann_id, image_id, split, sentences with sent) and instances.json (`images` with
    id, file_name, width, height; `annotations` with id, bbox): RefCOCO and RefCOCO+, each in its own folder."""
    instances = json_object(files.annotation("instances.json"))
    images = {image.key("id"): image for image in instances.items("images")}
    boxes = {entry.key("id"): entry for entry in instances.items("annotations")}
    splits = {split: split for split in ("train", "val", "testA", "testB", "test")}
    for ref in pickle_list(files.annotation(refs)):
        image = ref.look_up("image_id", images, "the id of one of the images of instances.json")
        box = _box(ref.look_up("ann_id", boxes, "the id of one of the annotations of instances.json"), image)
        for number, sentence in enumerate(ref.items("sentences")):
            yield ParsedRecord("grounding", ref.choice("split", splits), ref.source, {
                "id": f"{ref.key('ref_id')}-{number}", "image": files.media("image", image.text("file_name")),
                "text": sentence.text("sent"), "box": box,
            })


def refcocog(files: Files) -> Iterator[ParsedRecord]:
    """RefCOCOg with the UMD splits: refs(umd).p and instances.json."""
    return refcoco(files, "refs(umd).p")


def _box(entry: Annotation, image: Annotation) -> list[float]:
    """bbox (left, top, width, height in pixels) -> center x, center y, width, height as fractions of the image size."""
    width, height, bbox = image.number("width"), image.number("height"), entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4:
        fail(f"{entry.source}: bbox", "four numbers, left, top, width, height", bbox)
    left, top, w, h = (Annotation(f"{entry.source}: bbox[{k}]", {"": value}).number("") for k, value in enumerate(bbox))
    inside = left >= 0 and top >= 0 and w > 0 and h > 0
    if not inside or left + w > width * (1 + BOX_SLACK) or top + h > height * (1 + BOX_SLACK):
        fail(f"{entry.source}: bbox", f"a box with an area inside the image, {width:g} x {height:g} pixels", bbox)
    return [(left + w / 2) / width, (top + h / 2) / height, min(1.0, w / width), min(1.0, h / height)]


# ---- classes ---------------------------------------------------------------------------------------------------------


def imagenet(files: Files) -> Iterator[ParsedRecord]:
    """Images in folders train/CLASS/ and val/CLASS/.

    With LOC_synset_mapping.txt (n01440764, blank, names separated by commas) a class is called by its first name; two
    classes with the same first name also have their number.
    """
    names: dict[str, str] = {}
    if path := files.optional("LOC_synset_mapping.txt"):
        first = {line.split(" ", 1)[0]: line.partition(" ")[2].split(",")[0].strip() for _, line in text_lines(path)}
        shared = {name for name in first.values() if list(first.values()).count(name) > 1}
        names = {number: f"{name} ({number})" if name in shared else name for number, name in first.items()}
    classes: dict[str, str] = {}
    for split in ("train", "val"):
        images = list(files.images(split))
        if not images:
            raise FileNotFoundError(f"{files.root / split} has no images: expected {split}/CLASS/IMAGE")
        for path in images:
            entry = Annotation(str(files.root / path), {"folder": path.split("/")[1]})
            if split == "train":
                classes.setdefault(entry.text("folder"), names.get(entry.text("folder"), entry.text("folder")))
            yield ParsedRecord("image_classification", split, entry.source, {
                "image": path, "label": entry.choice("folder", classes),
            })
