"""Submission files of benchmarks: their format, and the predictions that are refused."""

import json

import pytest

from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.submissions import BENCHMARKS, write_submission


def predictions(benchmark: str, *pairs: tuple[str, str]) -> list[Prediction]:
    """Predictions of the benchmark's task, and one of another task, which does not belong into the file."""
    task = BENCHMARKS.get(benchmark, "image_qa")
    return [Prediction("grounding", (), "", (0.1, 0.2, 0.3, 0.4), (), "7")] + [
        Prediction(task, (), "", text, (), name) for name, text in pairs]


def test_vqav2_and_nocaps(tmp_path):
    path = write_submission("vqav2", tmp_path, "test-dev", predictions("vqav2", ("458752000", "net"), ("7", "")))
    assert path.name == "vqav2_test-dev.json"
    assert json.loads(path.read_text()) == [
        {"question_id": 458752000, "answer": "net"}, {"question_id": 7, "answer": ""},
    ]
    path = write_submission("nocaps", tmp_path, "test", predictions("nocaps", ("3", "a dog")))
    assert json.loads(path.read_text()) == [{"image_id": 3, "caption": "a dog"}]


@pytest.mark.parametrize("name, split, label, file, written", [
    ("glue_cola", "test", "acceptable", "CoLA.tsv", "1"),
    ("glue_sst2", "test", "negative", "SST-2.tsv", "0"),
    ("glue_mrpc", "test", "equivalent", "MRPC.tsv", "1"),
    ("glue_qqp", "test", "not_equivalent", "QQP.tsv", "0"),
    ("glue_stsb", "test", "5.25", "STS-B.tsv", "5.000"),
    ("glue_mnli", "test", "neutral", "MNLI-m.tsv", "neutral"),
    ("glue_mnli", "test_mismatched", "neutral", "MNLI-mm.tsv", "neutral"),
    ("glue_qnli", "test", "not_entailment", "QNLI.tsv", "not_entailment"),
    ("glue_rte", "test", "entailment", "RTE.tsv", "entailment"),
    ("glue_wnli", "test", "not_entailment", "WNLI.tsv", "0"),
])
def test_glue(name, split, label, file, written, tmp_path):
    path = write_submission(name, tmp_path, split, predictions(name, ("10", label), ("9", label)))
    assert path.name == file
    assert path.read_text() == f"index\tprediction\n9\t{written}\n10\t{written}\n"


@pytest.mark.parametrize("name, pairs, message", [
    ("vqa", [("1", "a")], "unknown benchmark 'vqa': expected one of vqav2, nocaps"),
    ("vqav2", [], "split test has no predictions of image_qa, which vqav2 needs"),
    ("vqav2", [("image_qa.test.jsonl:1", "a")], "expected a number, as the server of vqav2 does"),
    ("vqav2", [("1", "a"), ("1", "b")], "id 1: found two predictions, expected one"),
    ("nocaps", [("1", " ")], "id 1: the caption is empty"),
    ("glue_rte", [("1", "yes")], "id 1: 'yes' is not a class of RTE; expected one of entailment, not_entailment"),
])
def test_predictions_that_the_server_would_refuse_are_refused(name, pairs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_submission(name, tmp_path, "test", predictions(name, *pairs))
