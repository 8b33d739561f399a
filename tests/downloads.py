"""Mock downloads of public data sets: all fields of the published files, with one or two entries and tiny media.

`make(name, root)` writes a download and returns the expected records: {(task, split): [fields, ...]}.
"""

import csv
import io
import json
import pickle
from functools import cache
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image


@cache
def video_bytes() -> bytes:
    """A small video of eight frames."""
    frames = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    return iio.imwrite("<bytes>", frames, plugin="pyav", extension=".mp4", codec="libx264", fps=8)


def write_video(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(video_bytes())


def write_gif(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def write_image(path: Path, size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def dump(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def lines(path: Path, *entries: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def rows(path: Path, delimiter: str, *entries: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if delimiter == ",":
        buffer = io.StringIO()
        csv.writer(buffer).writerows(entries)
        path.write_text(buffer.getvalue())
    else:
        path.write_text("".join(delimiter.join(map(str, entry)) + "\n" for entry in entries))


# ---- videos ----------------------------------------------------------------------------------------------------------


def _msrvtt_info(entries: list[tuple[int, str, list[str]]]) -> dict:
    return {
        "info": {"contributor": "", "data_created": "2016-04-14", "version": "1.0", "description": "", "year": 2016},
        "videos": [
            {"category": 9, "url": "https://example.org/v", "video_id": f"video{n}", "start time": 137.72,
             "end time": 149.44, "split": split, "id": n} for n, split, _ in entries
        ],
        "sentences": [
            {"caption": text, "video_id": f"video{n}", "sen_id": 10 * n + k}
            for n, _, texts in entries for k, text in enumerate(texts)
        ],
    }


MSRVTT = [(0, "train", ["a cat plays", "a cat is playing"]), (1, "validate", ["two men talk"])]
MSRVTT_TEST = [(2, "test", ["a woman cooks", "someone cooks food"])]


def msrvtt_caption(root: Path) -> dict:
    dump(root / "annotation/train_val_videodatainfo.json", _msrvtt_info(MSRVTT))
    dump(root / "annotation/test_videodatainfo.json", _msrvtt_info(MSRVTT_TEST))
    found = {}
    for n, split, texts in MSRVTT + MSRVTT_TEST:
        folder = "TestVideo" if split == "test" else "TrainValVideo"
        write_video(root / folder / f"video{n}.mp4")
        found["video_caption", "val" if split == "validate" else split] = [
            {"id": f"video{n}", "video": f"{folder}/video{n}.mp4", "captions": texts}
        ]
    return found


def msrvtt_retrieval(root: Path, train: str = "MSRVTT_train.9k.csv") -> dict:
    dump(root / "MSRVTT_data.json", _msrvtt_info(MSRVTT + MSRVTT_TEST))
    rows(root / train, ",", ["video_id"], ["video0"], ["video1"])
    rows(root / "MSRVTT_JSFUSION_test.csv", ",", ["key", "vid_key", "video_id", "sentence"],
         ["ret0", "msr2", "video2", "a woman cooks, quickly"])
    for n in range(3):
        write_video(root / "videos" / "all" / f"video{n}.mp4")
    return {
        ("video_retrieval", "train"): [
            {"id": f"video{n}", "video": f"videos/all/video{n}.mp4", "captions": texts} for n, _, texts in MSRVTT
        ],
        ("video_retrieval", "test"): [
            {"id": "video2", "video": "videos/all/video2.mp4", "captions": ["a woman cooks, quickly"]}
        ],
    }


def msrvtt_retrieval_7k(root: Path) -> dict:
    return msrvtt_retrieval(root, "MSRVTT_train.7k.csv")


def msrvtt_qa(root: Path) -> dict:
    found = {}
    for n, split in enumerate(("train", "val", "test")):
        dump(root / f"{split}_qa.json", [
            {"answer": "cat", "category_id": 7, "id": 40 + n, "question": "what plays?", "video_id": n}
        ])
        write_video(root / f"video{n}.mp4")
        found["video_qa", split] = [{
            "id": str(40 + n), "video": f"video{n}.mp4", "qa": [{"question": "what plays?", "answers": ["cat"]}],
        }]
    return found


MSVD = {"train": "-4wsuPCjDBc_5_15", "val": "04Gt01vatkk_248_265", "test": "04Gt01vatkk_308_321"}


def _msvd(root: Path, task: str) -> dict:
    (root / "AllVideoDescriptions.txt").write_text(
        "# the descriptions of all videos\n\n"
        + "".join(f"{name} a squirrel eats\n{name} an animal is eating\n" for name in MSVD.values())
    )
    for split, name in MSVD.items():
        (root / f"{split}_list.txt").write_text(f"{name}\n")
        write_video(root / "YouTubeClips" / f"{name}.avi")
    return {
        (task, split): [{"id": name, "video": f"YouTubeClips/{name}.avi",
                         "captions": ["a squirrel eats", "an animal is eating"]}]
        for split, name in MSVD.items()
    }


def msvd_caption(root: Path) -> dict:
    return _msvd(root, "video_caption")


def msvd_retrieval(root: Path) -> dict:
    return _msvd(root, "video_retrieval")


def msvd_qa(root: Path) -> dict:
    (root / "youtube_mapping.txt").write_text("".join(f"{name} vid{n}\n" for n, name in enumerate(MSVD.values(), 1)))
    found = {}
    for n, (split, name) in enumerate(MSVD.items(), start=1):
        dump(root / f"{split}_qa.json", [{"answer": "eat", "id": n, "question": "what does it do?", "video_id": n}])
        write_video(root / f"{name}.avi")
        found["video_qa", split] = [{
            "id": str(n), "video": f"{name}.avi", "qa": [{"question": "what does it do?", "answers": ["eat"]}],
        }]
    return found


def tgif_qa(root: Path) -> dict:
    header = ["gif_name", "question", "answer", "type", "vid_id", "key", "description"]
    found = {}
    for split, kind, name in (("train", 2, "color"), ("test", 1, "number")):
        write_gif(root / "gifs" / f"tumblr_{split}_400.gif")
        rows(root / f"{split.title()}_frameqa_question.csv", "\t", header,
             [f"tumblr_{split}_400", "how many dogs ?", "two", kind, "FRAMEQA3", 25889, "two dogs ."])
        found["video_qa", split] = [{
            "id": "FRAMEQA3", "video": f"gifs/tumblr_{split}_400.gif",
            "qa": [{"question": "how many dogs ?", "answers": ["two"], "kind": name}],
        }]
    return found


def didemo(root: Path) -> dict:
    found = {}
    for split in ("train", "val", "test"):
        name = f"{split}@N02_13482799053_87ef417396.mov"
        dump(root / f"{split}_data.json", [
            {"annotation_id": k, "description": text, "dl_link": "https://example.org", "download_link": "",
             "num_segments": 6, "times": [[0, 0], [0, 0]], "video": name}
            for k, text in enumerate(("a dog runs", "the dog stops"))
        ])
        write_video(root / "videos" / name.replace(".mov", ".mp4"))
        found["video_retrieval", split] = [{
            "id": name.removesuffix(".mov"), "video": f"videos/{name.replace('.mov', '.mp4')}",
            "captions": ["a dog runs the dog stops"],
        }]
    return found


def lsmdc(root: Path) -> dict:
    found = {}
    files = {"train": "LSMDC16_annos_training.csv", "val": "LSMDC16_annos_val.csv",
             "test": "LSMDC16_challenge_1000_publictect.csv"}
    for n, (split, name) in enumerate(files.items()):
        key = f"000{n}_American_Beauty_00.00.51.926-00.00.54.129"
        times = ["00.00.51.926", "00.00.54.129", "00.00.51.815", "00.00.54.400"]
        rows(root / name, "\t", [key, *times, 'SOMEONE says "no".'], [key, *times, "He sits."])
        write_video(root / f"000{n}_American_Beauty" / f"{key}.avi")
        found["video_retrieval", split] = [{
            "video": f"000{n}_American_Beauty/{key}.avi", "captions": [text], "positive_id": key,
        } for text in ('SOMEONE says "no".', "He sits.")]
    return found


def webvid(root: Path) -> dict:
    found = {}
    for n, split in enumerate(("train", "val")):
        rows(root / f"results_2M_{split}.csv", ",", ["videoid", "contentUrl", "duration", "page_dir", "name"],
             [2127 + n, "https://example.org/v.mp4", "PT00H00M15S", "006001_006050", "A boat, seen from above"])
        write_video(root / "videos" / "006001_006050" / f"{2127 + n}.mp4")
        found["video_caption", split] = [{
            "id": str(2127 + n), "video": f"videos/006001_006050/{2127 + n}.mp4",
            "captions": ["A boat, seen from above"],
        }]
    return found


def kinetics(root: Path) -> dict:
    found = {}
    for split, file in (("train", "train.csv"), ("val", "validate.csv")):
        name = f"-3B32lodo2M{split}_000059_000069"
        rows(root / file, ",", ["label", "youtube_id", "time_start", "time_end", "split"],
             ["air drumming", f"-3B32lodo2M{split}", 59, 69, split])
        write_video(root / split / "air drumming" / f"{name}.mp4")
        found["video_classification", split] = [{
            "id": name, "video": f"{split}/air drumming/{name}.mp4", "label": "air drumming",
        }]
    return found


def ssv2(root: Path) -> dict:
    dump(root / "labels" / "labels.json", {"Pushing something so it moves": "0", "Holding something": "1"})
    found = {}
    for n, (split, file) in enumerate((("train", "train.json"), ("val", "validation.json"))):
        dump(root / "labels" / file, [{
            "id": str(78687 + n), "label": "holding potato", "template": "Holding [something]",
            "placeholders": ["potato"],
        }])
        write_video(root / "20bn-something-something-v2" / f"{78687 + n}.webm")
        found["video_classification", split] = [{
            "id": str(78687 + n), "video": f"20bn-something-something-v2/{78687 + n}.webm",
            "label": "Holding something",
        }]
    return found


def mplug2_caption(root: Path) -> dict:
    lines(root / "train.jsonl", {"video_id": "video0", "caption": "a cat plays"},
          {"video_id": "video0", "caption": "a cat"})
    lines(root / "test.jsonl", {"video_id": "video1", "golden_captions": ["two men talk", "men talk"]})
    write_video(root / "video0.mp4")
    write_video(root / "video1.avi")
    return {
        ("video_caption", "train"): [{"id": "video0", "video": "video0.mp4", "captions": ["a cat plays", "a cat"]}],
        ("video_caption", "test"): [{"id": "video1", "video": "video1.avi", "captions": ["two men talk", "men talk"]}],
    }


def mplug2_qa(root: Path) -> dict:
    found = {}
    for split in ("train", "test"):
        lines(root / f"{split}.jsonl", {"video_id": split, "question": "what?", "answer": "cat"})
        write_video(root / f"{split}.mp4")
        found["video_qa", split] = [{"video": f"{split}.mp4", "qa": [{"question": "what?", "answers": ["cat"]}]}]
    return found


def mplug2_retrieval(root: Path) -> dict:
    lines(root / "train.jsonl", {"clip_name": "video0", "caption": "a cat plays"})
    lines(root / "test.jsonl", {"video": "video1.mp4", "caption": ["two men talk"]})
    write_video(root / "video0.mp4")
    write_video(root / "video1.mp4")
    return {
        ("video_retrieval", "train"): [{"video": "video0.mp4", "captions": ["a cat plays"], "positive_id": "video0"}],
        ("video_retrieval", "test"): [
            {"video": "video1.mp4", "captions": ["two men talk"], "positive_id": "video1.mp4"}],
    }


# ---- images ----------------------------------------------------------------------------------------------------------


def _karpathy(root: Path, coco: bool) -> dict:
    images, found = [], {}
    for n, split in enumerate(("train", "restval", "val", "test")):
        year = "train2014" if split == "train" else "val2014"
        name = f"COCO_{year}_{n:012d}.jpg" if coco else f"100009279{n}.jpg"
        texts = [f"a dog {n}", f"dog number {n}."]
        entry = {
            "imgid": n, "sentids": [2 * n, 2 * n + 1], "split": split, "filename": name,
            "sentences": [{"tokens": text.split(), "raw": text, "imgid": n, "sentid": 2 * n + k}
                          for k, text in enumerate(texts)],
        }
        path = f"{year}/{name}" if coco else f"flickr30k-images/{name}"
        images.append(entry | ({"filepath": year, "cocoid": 100 + n} if coco else {}))
        write_image(root / path)
        for task in ("image_caption", "image_retrieval"):
            found.setdefault((task, "train" if split == "restval" else split), []).append(
                {"id": str(100 + n if coco else n), "image": path, "captions": texts}
            )
    dump(root / f"dataset_{'coco' if coco else 'flickr30k'}.json",
         {"images": images, "dataset": "coco" if coco else "flickr30k"})
    return found


def coco(root: Path) -> dict:
    return _karpathy(root, True)


def flickr30k(root: Path) -> dict:
    return _karpathy(root, False)


def nocaps(root: Path) -> dict:
    def entry(n: int) -> dict:
        return {"id": n, "open_images_id": f"00{n}", "coco_url": "", "license": 0, "width": 12, "height": 8,
                "file_name": f"00{n}.jpg", "date_captured": "2018-11-06 11:04:33", "domain": "near-domain"}

    dump(root / "nocaps_val_4500_captions.json", {
        "licenses": [], "info": {}, "images": [entry(1)],
        "annotations": [{"image_id": 1, "id": k, "caption": f"a baby {k}"} for k in range(2)],
    })
    dump(root / "nocaps_test_image_info.json", {"licenses": [], "info": {}, "images": [entry(2)]})
    write_image(root / "validation" / "001.jpg")
    write_image(root / "test" / "002.jpg")
    return {
        ("image_caption", "val"): [{"id": "1", "image": "validation/001.jpg", "captions": ["a baby 0", "a baby 1"]}],
        ("image_caption", "test"): [{"id": "2", "image": "test/002.jpg", "unlabelled": True}],
    }


def visual_genome(root: Path) -> dict:
    dump(root / "region_descriptions.json", [
        {"id": 2, "regions": [{"region_id": 1, "width": 4, "height": 5, "image_id": 2, "phrase": "a clock", "x": 1,
                               "y": 1}]},
        {"id": 3, "regions": []},
    ])
    dump(root / "question_answers.json", [
        {"id": 2, "qas": [{"a_objects": [], "question": "What color?", "image_id": 2, "qa_id": 9, "answer": "Green.",
                           "q_objects": []}]},
    ])
    write_image(root / "VG_100K_2" / "2.jpg")
    return {
        ("image_caption", "train"): [{"id": "2", "image": "VG_100K_2/2.jpg", "captions": ["a clock"]}],
        ("image_qa", "train"): [{"id": "2", "image": "VG_100K_2/2.jpg",
                                 "qa": [{"question": "What color?", "answers": ["Green."]}]}],
    }


def cc3m(root: Path) -> dict:
    rows(root / "Train_GCC-training.tsv", "\t", ['a "quoted" tree', "http://e.org/1"], ["a road", "http://e.org/2"])
    rows(root / "Validation_GCC-1.1.0-Validation.tsv", "\t", ["a hill", "http://e.org/3"])
    for path in ("train/00000/000000000.jpg", "train/00000/000000001.jpg", "val/00000/000000000.jpg"):
        write_image(root / path)
    return {
        ("image_caption", "train"): [{"image": "train/00000/000000000.jpg", "captions": ['a "quoted" tree']},
                                     {"image": "train/00000/000000001.jpg", "captions": ["a road"]}],
        ("image_caption", "val"): [{"image": "val/00000/000000000.jpg", "captions": ["a hill"]}],
    }


def cc12m(root: Path) -> dict:
    rows(root / "cc12m.tsv", "\t", ["url", "caption"], ["http://e.org/1", "a tree"])
    write_image(root / "00000" / "000000000.jpg")
    return {("image_caption", "train"): [{"image": "00000/000000000.jpg", "captions": ["a tree"]}]}


def sbu(root: Path) -> dict:
    (root / "SBU_captioned_photo_dataset_urls.txt").write_text("http://e.org/1\nhttp://e.org/2\n")
    (root / "SBU_captioned_photo_dataset_captions.txt").write_text("a tree\na road\n")
    write_image(root / "000000000.jpg")
    write_image(root / "000000001.jpg")
    return {("image_caption", "train"): [{"image": "000000000.jpg", "captions": ["a tree"]},
                                         {"image": "000000001.jpg", "captions": ["a road"]}]}


def vqav2(root: Path) -> dict:
    found = {}
    for split, year in (("train", "train2014"), ("val", "val2014"), ("test", "test2015"), ("test-dev", "test-dev2015")):
        labelled, number = "2014" in year, 458752 if "test" in split else 9
        dump(root / f"v2_OpenEnded_mscoco_{year}_questions.json", {
            "info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": year,
            "questions": [{"image_id": number, "question": "Is it red?", "question_id": number * 1000}],
        })
        image = f"COCO_{year.replace('-dev', '')}_{number:012d}.jpg"
        write_image(root / year.replace("-dev", "") / image)
        question = {"question": "Is it red?"}
        if labelled:
            answers = ["yes"] * 9 + ["no"]
            dump(root / f"v2_mscoco_{year}_annotations.json", {
                "info": {}, "data_type": "mscoco", "data_subtype": year, "license": {},
                "annotations": [{
                    "question_type": "is it", "multiple_choice_answer": "yes", "image_id": number,
                    "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": k}
                                for k, text in enumerate(answers, start=1)],
                    "answer_type": "yes/no", "question_id": number * 1000,
                }],
            })
            question |= {"answers": answers, "kind": "yes/no"}
        found["image_qa", split] = [{
            "id": str(number * 1000), "image": f"{year.replace('-dev', '')}/{image}", "qa": [question],
        } | ({} if labelled else {"unlabelled": True})]
    return found


def snli_ve(root: Path) -> dict:
    found = {}
    write_image(root / "flickr30k-images" / "4705552913.jpg")
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        lines(root / f"snli_ve_{name}.jsonl", {
            "annotator_labels": ["neutral"], "captionID": "4705552913.jpg#2", "gold_label": "neutral",
            "pairID": "4705552913.jpg#2r1n", "sentence1": "Two women", "sentence2": "The sisters smile",
            "Flickr30K_ID": "4705552913",
        })
        found["visual_entailment", split] = [{
            "id": "4705552913.jpg#2r1n", "image": "flickr30k-images/4705552913.jpg", "text": "The sisters smile",
            "label": "neutral",
        }]
    return found


def nlvr2(root: Path) -> dict:
    found = {}
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test1")):
        pair = f"{name}-10171-0"
        lines(root / "data" / f"{name}.json", {
            "validation": {"32": "True"}, "sentence": "Two boats.", "left_url": "", "writer": 23, "label": "True",
            "right_url": "", "synset": "boat", "query": "boats1", "identifier": f"{pair}-1",
        })
        for side in (0, 1):
            write_image(root / "images" / f"{pair}-img{side}.png")
        found["image_pair_reasoning", split] = [{
            "id": f"{pair}-1", "text": "Two boats.", "label": "true",
            "images": [f"images/{pair}-img{side}.png" for side in (0, 1)],
        }]
    return found


def _refs(root: Path, refs: str, splits: tuple[str, ...]) -> dict:
    images, boxes, entries, found = [], [], [], {}
    for n, split in enumerate(splits):
        file = f"COCO_train2014_{n:012d}.jpg"
        write_image(root / "images" / file)
        images.append({"license": 1, "file_name": file, "coco_url": "", "height": 8, "width": 12, "date_captured": "",
                       "flickr_url": "", "id": n})
        boxes.append({"segmentation": [], "area": 8, "iscrowd": 0, "image_id": n, "bbox": [3, 2, 6, 4],
                      "category_id": 1, "id": 50 + n})
        sentences = [{"tokens": text.split(), "raw": text, "sent_id": 2 * n + k, "sent": text}
                     for k, text in enumerate(("left cow", "the brown one"))]
        entries.append({
            "sent_ids": [2 * n, 2 * n + 1], "file_name": file.replace(".jpg", f"_{n}.jpg"), "ann_id": 50 + n,
            "ref_id": n, "image_id": n, "split": split, "sentences": sentences, "category_id": 1,
        })
        found["grounding", split] = [
            {"id": f"{n}-{k}", "image": f"images/{file}", "text": each["sent"], "box": [0.5, 0.5, 0.5, 0.5]}
            for k, each in enumerate(sentences)
        ]
    dump(root / "instances.json", {"info": {}, "images": images, "licenses": [], "annotations": boxes,
                                   "categories": [{"supercategory": "animal", "id": 1, "name": "cow"}]})
    (root / refs).write_bytes(pickle.dumps(entries, protocol=2))
    return found


def refcoco(root: Path) -> dict:
    return _refs(root, "refs(unc).p", ("train", "val", "testA", "testB"))


def refcocog(root: Path) -> dict:
    return _refs(root, "refs(umd).p", ("train", "val", "test"))


def imagenet(root: Path) -> dict:
    (root / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n")
    found = {}
    for split in ("train", "val"):
        found["image_classification", split] = []
        for folder, label in (("n01440764", "tench"), ("n02012849", "crane (n02012849)")):
            path = f"{split}/{folder}/ILSVRC2012_{split}_{folder}.JPEG"
            write_image(root / path)
            found["image_classification", split].append({"image": path, "label": label})
    return found


# ---- GLUE ------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "sst2": (["sentence", "label"], ["it 's \"good", "1"], {"label": "positive"}),
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", "One.", "Two."],
             {"label": "equivalent"}),
    "qqp": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["5", "1", "2", "One.", "Two.", "0"],
            {"label": "not_equivalent"}),
    "stsb": (["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2",
              "score"], ["0", "main", "MSR", "2012", "1", "none", "none", "One.", "Two.", "3.200"], {"label": 3.2}),
    "mnli": (["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
              "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"],
             ["0", "31193", "31193n", "gov", "( )", "( )", "(R)", "(R)", "One.", "Two.", "neutral", "neutral"],
             {"label": "neutral"}),
    "qnli": (["index", "question", "sentence", "label"], ["0", "One.", "Two.", "entailment"], {"label": "entailment"}),
    "rte": (["index", "sentence1", "sentence2", "label"], ["0", "One.", "Two.", "not_entailment"],
            {"label": "not_entailment"}),
    "wnli": (["index", "sentence1", "sentence2", "label"], ["0", "One.", "Two.", "1"], {"label": "entailment"}),
}
FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "stsb": "STS-B", "mnli": "MNLI",
           "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI"}
LABELS = ("label", "Quality", "is_duplicate", "score", "label1", "gold_label")


def glue(root: Path, name: str) -> dict:
    if name == "ax":
        rows(root / "diagnostic" / "diagnostic.tsv", "\t", ["index", "sentence1", "sentence2"], ["7", "One.", "Two."])
        return {("text_pair_classification", "test"): [{"texts": ["One.", "Two."], "id": "7", "unlabelled": True}]}
    folder = root / FOLDERS[name]
    if name == "cola":
        for file in ("train", "dev"):
            rows(folder / f"{file}.tsv", "\t", ["gj04", "1", "", "Our friends won't buy."])
        rows(folder / "test.tsv", "\t", ["index", "sentence"], ["4", "Bill slept."])
        labelled = {"text": "Our friends won't buy.", "label": "acceptable"}
        return {("text_classification", "train"): [labelled], ("text_classification", "val"): [labelled],
                ("text_classification", "test"): [{"text": "Bill slept.", "id": "4", "unlabelled": True}]}
    header, row, label = COLUMNS[name]
    single = name == "sst2"
    texts = {"text": row[0]} if single else {"texts": ["One.", "Two."]}
    kept = [k for k, column in enumerate(header) if column not in LABELS]
    test_header, test_row = ["index"], ["3"]
    for k in kept:
        if header[k] not in ("index", "id"):
            test_header.append(header[k])
            test_row.append(row[k])
    if name == "qqp":
        test_header[0] = "id"
    task = "text_classification" if single else "text_pair_classification"
    files = {"train": "train", "dev": "val", "test": "test"}
    if name == "mnli":
        files = {"train": "train", "dev_matched": "val", "dev_mismatched": "val_mismatched", "test_matched": "test",
                 "test_mismatched": "test_mismatched"}
    found = {}
    for file, split in files.items():
        if split.startswith("test"):
            rows(folder / f"{file}.tsv", "\t", test_header, test_row)
            found[task, split] = [{**texts, "id": "3", "unlabelled": True}]
        else:
            rows(folder / f"{file}.tsv", "\t", header, row)
            found[task, split] = [{**texts, **label}]
    return found


def make(name: str, root: Path) -> dict[tuple[str, str], list[dict]]:
    root.mkdir(parents=True, exist_ok=True)
    if name.startswith("glue_"):
        return glue(root, name.removeprefix("glue_"))
    return globals()[{"refcoco+": "refcoco"}.get(name, name)](root)


TEST_ONLY: dict[str, tuple[str, ...]] = {
    "msrvtt_caption": ("annotation/train_val_videodatainfo.json",), "msrvtt_qa": ("train_qa.json",),
    "msrvtt_retrieval": ("MSRVTT_train.9k.csv", "MSRVTT_data.json"), "msvd_caption": ("train_list.txt",),
    "msvd_qa": ("train_qa.json",), "tgif_qa": ("Train_frameqa_question.csv",), "didemo": ("train_data.json",),
    "lsmdc": ("LSMDC16_annos_training.csv",), "webvid": ("results_2M_train.csv",), "kinetics": ("train.csv",),
    "ssv2": ("labels/train.json",), "cc3m": ("Train_GCC-training.tsv",), "imagenet": ("train",),
    "vqav2": ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"),
    "snli_ve": ("snli_ve_train.jsonl",), "nlvr2": ("data/train.json",), "glue_rte": ("RTE/train.tsv",),
    "glue_mnli": ("MNLI/train.tsv",), "mplug2_caption": ("train.jsonl",), "mplug2_qa": ("train.jsonl",),
    "mplug2_retrieval": ("train.jsonl",),
}
"""Training annotations in the mock downloads; without them, the test set can still be converted."""
