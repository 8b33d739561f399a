"""The check of a folder of one's own: everything that is wrong, at once, and what training should know."""

from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import write_data, write_records
from PIL import Image

from mplug2.data.__main__ import main
from mplug2.data.check_folder import describe_labels, video_header
from mplug2.data.text import Tokenizer


def run(capsys, *arguments, code: int = 0) -> str:
    capsys.readouterr()
    if code:
        with pytest.raises(SystemExit) as stopped:
            main(["check", *map(str, arguments)])
        assert stopped.value.code == code
    else:
        main(["check", *map(str, arguments)])
    shown = capsys.readouterr()
    return shown.out + shown.err


def test_a_good_folder(root, tmp_path, capsys):
    Tokenizer.train(["a red blue green one moving going left"], 100).save(tmp_path)
    said = run(capsys, root, "--tokenizer", tmp_path)
    assert "video_caption.train: 6 records, 6 media files\n" in said
    assert "8 x 8 to 8 x 8 pixels" in said and "frames per second" in said
    assert "longest text: 5 words, 7 tokens" in said
    assert "unknown words: " in said and "'three'" in said
    assert "missing: 0\n" in said and "unreadable: 0\n" in said and "invalid lines and texts without words: 0" in said


def test_everything_that_is_wrong_is_listed_at_once(tmp_path, capsys):
    write_data(tmp_path)
    (tmp_path / "0.gif").unlink()
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.gif").write_bytes(b"GIF89a")
    write_records(tmp_path, "text_only.train", [{"text": "fine"}, {"text": "?!"}])
    write_records(tmp_path, "text_only.val", [{"text": 3}, {"txt": "a"}])
    said = run(capsys, tmp_path, "--decode", 0, code=1)
    assert "missing: 2\n" in said and "/0.gif\n" in said and "/1.png\n" in said
    assert "unreadable: 1\n" in said and "2.gif cannot be decoded" in said
    assert "invalid lines and texts without words: 3\n" in said
    assert "text_only.train.jsonl:2: the text '?!' has no words" in said
    assert "text_only.val.jsonl:1: text: found 3" in said and "text_only.val.jsonl:2: " in said
    assert "3 invalid lines, 2 missing and 1 unreadable media files" in said


def test_the_rate_of_an_animation_that_only_pillow_reads_comes_from_its_milliseconds(tmp_path):
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], duration=250)
    assert video_header(tmp_path / "a.webp") == (4.0, 0)


@pytest.mark.parametrize("count, rest", [(8, ""), (9, ", and 1 more, at least 1 each")])
def test_up_to_eight_labels_are_listed(count, rest, capsys):
    describe_labels([SimpleNamespace(label=f"{number}") for number in range(count)])
    assert capsys.readouterr().out == "  labels: " + ", ".join(f"{number} 1" for number in range(8)) + rest + "\n"


def test_labels_duplicates_and_leaks_are_counted(tmp_path, capsys):
    for number in range(4):
        Image.fromarray(np.full((6 + number, 8, 3), 50 * number, np.uint8)).save(tmp_path / f"{number}.png")
    write_records(tmp_path, "image_classification.train", [
        {"image": "0.png", "label": "cat"}, {"image": "1.png", "label": "cat"}, {"image": "2.png", "label": "dog"},
        {"image": "0.png", "label": "cat"}])
    write_records(tmp_path, "image_classification.val", [{"image": "2.png", "label": "dog"}])
    write_records(tmp_path, "image_retrieval.test", [
        {"image": f"{number}.png", "captions": [f"A man, talking{'' if number < 2 else number}"]}
        for number in range(4)])
    said = run(capsys, tmp_path)
    assert "  1 records occur more than once\n" in said
    assert "labels: cat 3, dog 1\n" in said and "8 x 6 to 8 x 8 pixels" in said
    assert "files named by several splits of a task: 1\n" in said
    assert "2.png: image_classification, train and val" in said
    assert "equal captions: 1 captions belong to several records, such as 'a man talking'" in said
