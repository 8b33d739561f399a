"""The check before training: bad texts and labels of all splits at once, and words that the vocabulary lacks."""

import json
import re
from pathlib import Path

import pytest

from mplug2.data.records import Record, RecordError
from mplug2.data.samples import read_classes, read_samples
from mplug2.data.text import Tokenizer
from mplug2.data.text_check import check_run_texts, describe_numbers, describe_unknown, equal_captions, unknown_words

WORDS = "a red blue seven one three what digit is it yes"


def write(root: Path, name: str, *records: dict) -> None:
    (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def check(root: Path, task: str, limit: int = 24, max_unknown: float = 0.2, words: str = WORDS) -> list[str]:
    samples = read_samples(root, task, "train")
    reports, _ = check_run_texts(samples, root, task, Tokenizer.train([words], 120), limit, 30, max_unknown,
                                 read_classes(samples))
    return reports


def problems(root: Path, task: str, **options) -> list[str]:
    with pytest.raises(RecordError) as refused:
        check(root, task, **options)
    return str(refused.value).splitlines()


def test_captions_are_equal_as_a_model_reads_them_and_none_if_they_have_no_words():
    records = [Record(id=name, positive_id=name, source="", captions=captions) for name, captions in {
        "a": ("A dog.", "!"), "b": ("a d\u00adog", "\u200b"), "c": ("a cat", "..."), "d": ("a cat", "a cat")}.items()]
    assert equal_captions(records) == ["a dog", "a cat"] and equal_captions(records[:1]) == []


def test_all_bad_texts_of_all_splits_are_listed_at_once(tmp_path):
    good = {"video": "a.gif", "captions": ["a red seven"]}
    write(tmp_path, "video_retrieval.train", good, {"video": "b.gif", "captions": ["a", "\U0001f389"]})
    write(tmp_path, "video_retrieval.val", good, {"video": "b.gif", "captions": ["!!!"]})
    write(tmp_path, "video_retrieval.test", {"video": "b.gif", "captions": ["red " * 8]}, good)
    write(tmp_path, "video_retrieval.extra", {"video": "b.gif", "captions": ["???"]})  # not evaluated by a run
    write(tmp_path, "video_qa.test", {"video": "a.gif", "qa": [{"question": "?", "answers": ["yes"]}]})  # another task
    found = problems(tmp_path, "video_retrieval", limit=9)
    assert [re.search(r"video_\w+\.\w+\.jsonl:\d+", line)[0] for line in found] == [
        "video_retrieval.train.jsonl:2", "video_retrieval.test.jsonl:1", "video_retrieval.val.jsonl:2"]
    assert "has no words; remove it" in found[0] and "has 10 tokens" in found[1]


def test_after_pretraining_captions_questions_and_galleries_are_evaluated(tmp_path):
    write(tmp_path, "video_caption.train", {"video": "a.gif", "captions": ["a red seven"]})
    write(tmp_path, "video_caption.test", {"video": "a.gif", "captions": ["..."]})
    write(tmp_path, "video_qa.test", {"video": "a.gif", "qa": [{"question": "?", "answers": ["yes"]}]})
    write(tmp_path, "image_retrieval.val", {"image": "a.png", "captions": ["!!"]})
    assert len(problems(tmp_path, "pretrain")) == 3


def test_captions_that_are_only_compared_may_be_long_but_questions_may_not(tmp_path):
    write(tmp_path, "video_caption.train", {"video": "a.gif", "captions": ["a red seven"]})
    write(tmp_path, "video_caption.test", {"video": "a.gif", "captions": ["red " * 20]})
    assert check(tmp_path, "video_caption", limit=10) == []
    question = {"question": "red " * 20, "answers": ["yes"]}
    write(tmp_path, "video_qa.train", {"video": "a.gif", "qa": [{"question": "what is it", "answers": ["yes"]}]})
    write(tmp_path, "video_qa.test", {"video": "a.gif", "qa": [question]})
    assert "has 22 tokens" in problems(tmp_path, "video_qa", limit=10)[0]


@pytest.mark.parametrize("words", [6, 7, 8, 9, 10])
def test_a_text_may_have_as_many_tokens_as_the_model_has_positions(tmp_path, words):
    """With [CLS] and [SEP]. Prompts are counted too."""
    write(tmp_path, "video_retrieval.train", {"video": "a.gif", "captions": ["red " * words]})
    if words + 2 <= 10:
        assert check(tmp_path, "video_retrieval", limit=10) == []
    else:
        assert f"has {words + 2} tokens" in problems(tmp_path, "video_retrieval", limit=10)[0]


def test_labels_of_all_splits_are_those_of_the_training_data(tmp_path):
    write(tmp_path, "text_classification.train", {"text": "a red", "label": "x"}, {"text": "a blue", "label": "y"})
    write(tmp_path, "text_classification.val", {"text": "a", "label": "z"}, {"text": "a", "unlabelled": True},
          {"text": "a", "label": 3})
    assert [line.split(": ", 1)[1] for line in problems(tmp_path, "text_classification")] == [
        f"label {label}: the model expects one of x, y; fix it, or train with this label" for label in ("'z'", "3.0")]
    write(tmp_path, "text_classification.train", {"text": "a red", "label": 1}, {"text": "a blue", "label": 2})
    assert "label 'z': the model expects a number" in problems(tmp_path, "text_classification")[0]


def test_unknown_words_are_reported_with_examples_and_refused_above_a_fraction(tmp_path):
    write(tmp_path, "video_caption.train", {"video": "a.gif", "captions": ["a red seven", "a red ##j jump jump it"]})
    report, = check(tmp_path, "video_caption", max_unknown=0.4)
    assert report == ("video_caption, train: 33.3% of the words are unknown to the vocabulary, such as 'jump', 'j'")
    refused, = problems(tmp_path, "video_caption")
    assert refused.startswith(report) and "At most 20% are allowed (--max-unknown)" in refused
    assert "--tokenizer" in refused
    write(tmp_path, "video_caption.train", {"video": "a.gif", "captions": ["red jump"]})
    assert "50.0% of the words" in check(tmp_path, "video_caption", max_unknown=0.5)[0]  # as many as allowed
    write(tmp_path, "video_caption.train", {"video": "a.gif", "captions": ["a red seven"]})
    write(tmp_path, "video_caption.test", {"video": "a.gif", "captions": ["jumping quickly red"]})
    assert problems(tmp_path, "video_caption")[0].startswith("video_caption, test: 66.7%")


def test_an_answer_of_unknown_words_only_is_refused(tmp_path):
    answers = {"qa": [{"question": WORDS, "answers": ["red", "red jump"]}, {"question": WORDS, "answers": ["jump"]}]}
    write(tmp_path, "video_qa.train", {"video": "a.gif", **answers})
    found = problems(tmp_path, "video_qa")
    assert len(found) == 1 and "video_qa.train.jsonl:1: the answer 'jump' has only words that are unknown" in found[0]


def test_unknown_words_of_any_texts():
    tokenizer = Tokenizer.train([WORDS], 120)
    unknown = unknown_words(["A red JUMP", "jump quick"], tokenizer)
    assert unknown == {"jump": 2, "quick": 1}
    assert describe_unknown("texts", unknown, 5) == (
        "texts: 60.0% of the words are unknown to the vocabulary, such as 'jump', 'quick'")


def test_all_bad_lines_of_a_file_are_listed_and_many_are_counted(tmp_path):
    write(tmp_path, "text_only.train", {"text": "a"}, {"text": 3}, {"txt": "a"}, *({"text": ""} for _ in range(30)))
    with pytest.raises(RecordError) as refused:
        read_samples(tmp_path, "pretrain", "train")
    lines = str(refused.value).splitlines()
    assert "jsonl:2: text: found 3" in lines[0] and "jsonl:3: " in lines[1] and len(lines) == 21
    assert lines[-1] == "and 12 more"


def test_whole_numbers_as_labels_are_reported_as_a_regression(tmp_path):
    texts = ["a red seven", "a blue one", "a red three"]
    write(tmp_path, "text_classification.train", *({"text": text, "label": i % 2} for i, text in enumerate(texts)))
    (line,) = check(tmp_path, "text_classification")
    assert "the labels 0, 1 are read as numbers to predict (regression)" in line and '"label": "0"' in line
    for labels in (("0", "1", "0"), (0.5, 1, 2)):
        records = [{"text": text, "label": label} for text, label in zip(texts, labels)]
        write(tmp_path, "text_classification.train", *records)
        assert check(tmp_path, "text_classification") == []
    assert describe_numbers("x", map(float, range(20))) and not describe_numbers("x", map(float, range(21)))
    assert describe_numbers("x", [None]) == ""
