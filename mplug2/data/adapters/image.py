"""Adapters for public image data sets. Each docstring names the expected annotation files, as in `video.py`."""

import os
from collections import Counter
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
from mplug2.data.record_fields import BOX_SLACK

# ---- captions --------------------------------------------------------------------------------------------------------


def coco(files: Files) -> Iterator[ParsedRecord]:
    """Karpathy's splits: dataset_coco.json (`images` with filename, filepath, split, sentences (raw, ...), cocoid), or
    coco_karpathy_train.json, ..._val.json and ..._test.json (lists of image, caption, image_id).

    "restval" belongs to the training split. Images may have their names of 2014 or of 2017. Each image serves
    captioning and retrieval.
    """
    if files.optional("dataset_coco.json"):
        yield from _karpathy(files, "dataset_coco.json", "cocoid")
        return
    names = {split: (f"coco_karpathy_{split}.json",) for split in ("train", "val", "test")}
    files.annotation("dataset_coco.json", *(name for of_split in names.values() for name in of_split))
    for split, path in files.splits(names):
        captions: dict[str, list[str]] = {}
        sources: dict[str, str] = {}
        for entry in json_list(path):
            captions.setdefault(entry.text("image"), []).extend(entry.texts("caption"))
            sources.setdefault(entry.text("image"), entry.source)
        for name, texts in captions.items():
            image = files.media("image", *_coco_names(name))
            fields = {"id": str(_coco_number(name)), "image": image, "captions": texts}
            for task in ("image_caption", "image_retrieval"):
                yield ParsedRecord(task, split, sources[name], fields)


def _coco_number(name: str) -> int | str:
    """The id in the name of an image of COCO, such as val2014/COCO_val2014_000000391895.jpg; other names stay."""
    digits = os.path.splitext(os.path.basename(name))[0].rpartition("_")[2]
    return int(digits) if digits.isdecimal() else name


def _coco_names(name: str) -> tuple[str, ...]:
    """The name of an image of COCO in 2014, and in 2017."""
    number = _coco_number(name)
    return (name, f"{number:012d}.jpg") if isinstance(number, int) else (name,)


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
                "id": image.key(id_field), "image": files.media("image", *_coco_names(path)), "captions": captions,
            })


def nocaps(files: Files) -> Iterator[ParsedRecord]:
    """nocaps_val_4500_captions.json (`images` with id and file_name, `annotations` with image_id and caption) and
    nocaps_test_image_info.json (`images` only: the server keeps the captions)."""
    names = {"val": ("nocaps_val_4500_captions.json",), "test": ("nocaps_test_image_info.json",)}
    for split, path in files.splits(names):
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
    regions, questions = files.optional("region_descriptions.json"), files.optional("question_answers.json")
    if not (regions or questions):
        files.annotation("region_descriptions.json", "question_answers.json")
    for image in json_list(regions) if regions else ():
        phrases = [region.text("phrase") for region in image.items("regions")]
        if phrases:  # a few images have none
            yield ParsedRecord("image_caption", "train", image.source, {
                "id": image.key("id"), "image": files.media("image", f"{image.key('id')}.jpg"), "captions": phrases,
            })
    for image in json_list(questions) if questions else ():
        qa = [{"question": each.text("question"), "answers": [each.text("answer")]} for each in image.items("qas")]
        if qa:
            yield ParsedRecord("image_qa", "train", image.source, {
                "id": image.key("id"), "image": files.media("image", f"{image.key('id')}.jpg"), "qa": qa,
            })


# ---- questions, entailment, pairs, boxes -----------------------------------------------------------------------------


def vqav2(files: Files) -> Iterator[ParsedRecord]:
    """v2_OpenEnded_mscoco_SPLIT_questions.json (`questions` with image_id, question, question_id) and
    v2_mscoco_SPLIT_annotations.json (`annotations` with question_id, answers (answer, ...), answer_type, ...) of
    train2014 and val2014, and the unlabelled questions of test2015 and test-dev2015."""
    years = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
    for split, path in files.splits({s: (f"v2_OpenEnded_mscoco_{y}_questions.json",) for s, y in years.items()}):
        year, labelled, answers = years[split], split in ("train", "val"), {}
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
                "id": entry.key("question_id"), "image": files.media("image", *_coco_names(name)),
                "qa": [question], **truth,
            })


def snli_ve(files: Files) -> Iterator[ParsedRecord]:
    """snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl: sentence2, gold_label, pairID, ..., and Flickr30K_ID
    (or Flikr30kID, flickr30k_id). Without such a field, the image is the part of pairID before "#"."""
    labels = {name: name for name in ("entailment", "neutral", "contradiction")}
    names = {"train": ("snli_ve_train.jsonl",), "val": ("snli_ve_dev.jsonl",), "test": ("snli_ve_test.jsonl",)}
    for split, path in files.splits(names):
        for entry in json_lines(path):
            spelled = (key for key in entry.values if key.lower().replace("_", "") in ("flickr30kid", "flikr30kid"))
            image = entry.key(next(spelled, "pairID")).partition("#")[0].removesuffix(".jpg")
            yield ParsedRecord("visual_entailment", split, entry.source, {
                "id": entry.text("pairID"), "image": files.media("image", f"{image}.jpg"),
                "text": entry.text("sentence2"), "label": entry.choice("gold_label", labels),
            })


def nlvr2(files: Files) -> Iterator[ParsedRecord]:
    """train.json, dev.json, test1.json, test2.json, one object per line: identifier (split-set-pair-sentence),
    sentence, label. test2.json becomes the split `test2`.

    The images are split-set-pair-img0.png and -img1.png.
    """
    names = {"train": ("train.json",), "val": ("dev.json",), "test": ("test1.json",), "test2": ("test2.json",)}
    for split, path in files.splits(names):
        for entry in json_lines(path):
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
    """Images in folders train/CLASS/ and val/CLASS/, anywhere in the download. In Kaggle's tree val/ has no folders of
    classes; LOC_val_solution.csv (ImageId, PredictionString) has them.

    With LOC_synset_mapping.txt (n01440764, blank, names separated by commas) a class is called by its first name; two
    classes with the same first name also have their number.
    """
    names: dict[str, str] = {}
    if path := files.optional("LOC_synset_mapping.txt"):
        first = {line.split(" ", 1)[0]: line.partition(" ")[2].split(",")[0].strip() for _, line in text_lines(path)}
        counts = Counter(first.values())
        names = {number: f"{name} ({number})" if counts[name] > 1 else name for number, name in first.items()}
    folders: dict[str, str] = {}
    if path := files.optional("LOC_val_solution.csv"):
        folders = {row.text("ImageId"): row.text("PredictionString").split()[0] for row in table(path, ",")}
    classes: dict[str, str] = {}
    images: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    for path in files.all_media("image"):
        folder, name = os.path.split(path)
        for split in images:
            if os.path.basename(os.path.dirname(folder)) == split:
                images[split].append((path, os.path.basename(folder)))
            elif os.path.basename(folder) == split:
                images[split].append((path, folders.get(os.path.splitext(name)[0], "")))
    if not any(images.values()):
        raise FileNotFoundError(f"{files.root} has no images: expected train/CLASS/IMAGE and val/CLASS/IMAGE")
    files.absent += [split for split, found in images.items() if not found]
    for split, found in images.items():
        for path, folder in found:
            if split == "train" or not images["train"]:
                classes.setdefault(folder, names.get(folder, folder))
            entry = Annotation(str(files.root / path), {"folder": folder})
            yield ParsedRecord("image_classification", split, entry.source, {
                "image": path, "label": entry.choice("folder", classes),
            })
