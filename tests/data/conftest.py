"""Fixtures of the data tests: a small data set on disk, and a tokenizer for its texts."""

from pathlib import Path

import pytest
from data_helpers import make_tokenizer, write_data, write_records

from mplug2.data.text import Tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def labelled(tmp_path) -> Path:
    """Two records of every task with labels or boxes."""
    write_data(tmp_path)
    for task, *records in (
        ("text_classification", {"text": "A red three!", "label": "left"}, {"text": "a blue one", "label": "up"}),
        ("text_pair_classification", {"texts": ["a red one", "one in red?"], "label": 4.5},
         {"texts": ["a red one", "a blue one"], "label": 1}),
        ("image_classification", {"image": "0.png", "label": "three"}, {"image": "1.png", "label": "one"}),
        ("video_classification", {"video": "0.gif", "label": "up"}, {"video": "1.gif", "label": "down"}),
        ("visual_entailment", {"image": "0.png", "text": "it is red", "label": "neutral"},
         {"image": "0.png", "text": "it is blue", "label": "entailment"}),
        ("image_pair_reasoning", {"images": ["0.png", "1.png"], "text": "both are red", "label": "true"},
         {"images": ["1.png", "0.png"], "text": "both are red", "label": "false"}),
        ("grounding", {"image": "0.png", "text": "the red one", "box": [0.5, 0.25, 0.5, 0.25]},
         {"image": "0.png", "text": "the blue one", "box": [0.25, 0.5, 0.25, 0.5]}),
    ):
        write_records(tmp_path, f"{task}.train", records)
    return tmp_path
