"""Submission files of benchmarks: their format, and what is refused before or after the evaluation."""

import json

import pytest
from predictors import make_predictor, write_records

from mplug2.evaluation.data import EvalSplit
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.submissions import BENCHMARKS, check_submission, write_submission, write_submissions

FIELDS = {
    "image_qa": {"image": "a.png", "qa": [{"question": "what", "answers": ["net"]}]},
    "image_caption": {"image": "a.png", "captions": ["a dog"]}, "text_classification": {"text": "good", "label": "x"},
    "text_pair_classification": {"texts": ["good", "bad"], "label": "x"},
}


def records(root, benchmark: str, split: str, *ids: str) -> EvalSplit:
    """A split with a record for each id, of the task of the benchmark."""
    task = BENCHMARKS[benchmark]
    write_records(root, f"{task}.{split}", [{**FIELDS[task], **({"id": name} if name else {})} for name in ids])
    return EvalSplit(root, split)


def write(root, benchmark: str, split: str, *pairs: tuple[str, str]):
    """Write predictions of the benchmark's task; one of another task does not belong into the file."""
    data = records(root, benchmark, split, *(name for name, _ in pairs))
    found = [Prediction(BENCHMARKS[benchmark], (), "", text, (), name) for name, text in pairs]
    return write_submission(benchmark, root / "out", data,
                            [Prediction("grounding", (), "", (0.1, 0.2, 0.3, 0.4), (), "7"), *found])


def test_vqav2_and_nocaps(tmp_path):
    path = write(tmp_path, "vqav2", "test-dev", ("458752000", "net"), ("7", ""))
    assert path.name == "vqav2_test-dev.json"
    assert json.loads(path.read_text()) == [
        {"question_id": 458752000, "answer": "net"}, {"question_id": 7, "answer": ""},
    ]
    path = write(tmp_path, "nocaps", "test", ("3", "a dog"))
    assert json.loads(path.read_text()) == [{"image_id": 3, "caption": "a dog"}]


@pytest.mark.parametrize("name, split, label, file, written", [
    ("glue_cola", "test", "acceptable", "CoLA.tsv", "1"),
    ("glue_sst2", "test", "negative", "SST-2.tsv", "0"),
    ("glue_mrpc", "test", "equivalent", "MRPC.tsv", "1"),
    ("glue_qqp", "test", "not_equivalent", "QQP.tsv", "0"),
    ("glue_stsb", "test", "5.25", "STS-B.tsv", "5.000"),
    ("glue_mnli", "test", "neutral", "MNLI-m.tsv", "neutral"),
    ("glue_mnli", "test_matched", "neutral", "MNLI-m.tsv", "neutral"),
    ("glue_mnli", "test_mismatched", "neutral", "MNLI-mm.tsv", "neutral"),
    ("glue_qnli", "test", "not_entailment", "QNLI.tsv", "not_entailment"),
    ("glue_rte", "test", "entailment", "RTE.tsv", "entailment"),
    ("glue_wnli", "test", "not_entailment", "WNLI.tsv", "0"),
])
def test_glue(name, split, label, file, written, tmp_path):
    path = write(tmp_path, name, split, ("10", label), ("9", label))
    assert path.name == file
    assert path.read_text() == f"index\tprediction\n9\t{written}\n10\t{written}\n"


def test_a_file_is_complete_or_the_older_one_stays(tmp_path):
    """A skipped image has no prediction; an empty caption is one that the server of nocaps refuses."""
    file = write(tmp_path, "vqav2", "test", ("1", "a"), ("2", "b"))
    before = file.read_text()
    data = records(tmp_path, "vqav2", "test", "1", "2", "3")
    with pytest.raises(ValueError, match=r"vqav2_test.json is not written: 1 of 3 predictions are missing, .*id 2"):
        write_submission("vqav2", tmp_path / "out", data, [
            Prediction("image_qa", (), "", "a", (), name) for name in ("1", "3")])
    with pytest.raises(ValueError, match=r"is not written: 1 captions are empty, such as that of id 1"):
        write(tmp_path, "nocaps", "test", ("1", " "))
    assert file.read_text() == before and [path.name for path in file.parent.iterdir()] == [file.name]


def test_an_incomplete_split_does_not_keep_another_one_from_being_written(tmp_path, capsys):
    splits = [records(tmp_path, "vqav2", split, "1") for split in ("test", "test-dev")]
    with pytest.raises(ValueError, match="vqav2_test.json is not written: 1 of 1"):
        write_submissions("vqav2", tmp_path / "out", splits, {
            "test": [], "test-dev": [Prediction("image_qa", (), "", "a", (), "1")]})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vqav2_test-dev.json"]
    assert "for the server of vqav2: " in capsys.readouterr().out


RTE = ("entailment", "not_entailment")
CASES = {
    "another task": ("vqav2", {"tasks": ["image_caption"]}, "needs predictions of image_qa; add it to --task"),
    "no modules": ("vqav2", {"task": "video_caption"}, "does not have the modules for image_qa"),
    "a split of other tasks": ("vqav2", {"missing": "val"}, "has no image_qa.val.jsonl; leave the split val out of"),
    "a sample": ("vqav2", {"limit": 1}, "limit=1 with server='vqav2': the server only accepts complete predictions"),
    "no ids": ("vqav2", {"ids": [""]}, "image_qa.test.jsonl:1': expected a number, as the server of vqav2 does"),
    "two questions of one id": ("vqav2", {"questions": 2}, "id 1: found 2 predictions, expected one"),
    "other classes": ("glue_rte", {"classes": ("no", "yes")}, "this model predicts the classes no, yes; expected a "
                      "model that is trained on glue_rte, with the classes entailment, not_entailment"),
    "classes, not numbers": ("glue_stsb", {}, "expected a model that is trained on glue_stsb, with numbers"),
    "numbers, not classes": ("glue_rte", {"classes": ()}, "this model predicts numbers"),
    "two splits in one file": ("glue_rte", {"missing": "dev"}, "has one file for the splits test, dev"),
}


@pytest.mark.parametrize("benchmark, given, message", CASES.values(), ids=CASES)
def test_what_the_server_would_refuse_is_refused_first(benchmark, given, message, tmp_path, monkeypatch):
    qa = FIELDS["image_qa"]["qa"] * given.get("questions", 1)
    monkeypatch.setitem(FIELDS, "image_qa", {"image": "a.png", "qa": qa})
    records(tmp_path, benchmark, "test", *given.get("ids", ["1", "2"]))
    splits = [EvalSplit(tmp_path, name, given.get("limit", 0)) for name in ("test", given.get("missing")) if name]
    task, classes = given.get("task", "image_qa,text_pair_classification"), given.get("classes", RTE)
    model = make_predictor(task, classes={"text_pair_classification": classes}).model
    with pytest.raises(ValueError, match=message):
        check_submission(benchmark, tmp_path / "out", splits, given.get("tasks"), model)


def test_a_file_that_cannot_be_written_is_found_before_the_evaluation(tmp_path):
    data, model = records(tmp_path, "vqav2", "test", "1", "2"), make_predictor("image_qa").model
    check_submission("vqav2", tmp_path / "out", [data], None, model)
    (tmp_path / "out" / "vqav2_test.json").mkdir()
    with pytest.raises(ValueError, match="vqav2_test.json cannot be written"):
        check_submission("vqav2", tmp_path / "out", [data], ["image_qa"], model)
