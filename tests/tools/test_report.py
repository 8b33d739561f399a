"""The report: everything that the files of a run contain, nothing from outside, and no text of the data as HTML."""

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import screenshot
from PIL import Image
from predictors import make_predictor

from mplug2.evaluation.bootstrap import Score
from mplug2.evaluation.evaluate import EvalResult
from mplug2.tools.cards import CARDS
from mplug2.tools.report import header, latest, main, metric_tables, write_evaluation_report, write_report

EVIL = "<script src='http://a'>\"&"
COLOR = (200, 10, 250)


class Page(HTMLParser):
    """The text of a page, and everything that it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def line(task: str, media: list[Path], prediction, truth: list, question: str = "", **more) -> dict:
    return {"task": task, "split": "test", "id": "", "media": [str(path) for path in media], "question": question,
            "prediction": prediction, "truth": truth, **more}


def write_run(folder: Path, lines: list[dict], metrics: list[dict]) -> Path:
    folder.mkdir()
    settings = {"train": {"task": "pretrain", "max_steps": 9, "reinit": EVIL}, "model": {"width": 16},
                "data": {"gone": 1.0}, "commands": [f"torchrun train.py --name '{EVIL}'"], "parameters": 1234567}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics) + '{"step": 9, "lo')
    (folder / "predictions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    paths = {name: folder / name for name in ("clip.gif", "large & 'quoted'.png", "gone.gif", "broken.png")}
    paths = {name.split()[0]: path for name, path in paths.items()}
    grounds = [Image.new("RGB", (32, 32), color) for color in (COLOR, (0, 0, 0), (0, 250, 0))]
    grounds[0].save(paths["clip.gif"], save_all=True, append_images=grounds[1:], duration=100)
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), np.uint8)
    Image.fromarray(noise).save(paths["large"])
    paths["broken.png"].write_bytes(b"not a picture")
    return paths


@pytest.fixture(scope="module")
def run(media, tmp_path_factory) -> Path:
    clip, large = media["clip.gif"], media["large"]
    lines = [
        line("video_caption", [clip], EVIL, ["a red seven"]),
        line("video_qa", [clip], "red", ["Red!", "blue"], "which color is it"),
        line("video_qa", [clip], "red", ["green"], f"is it {EVIL}"),
        line("video_qa", [media["gone.gif"]], "left", ["right"], "gone"),
        line("image_caption", [media["broken.png"]], "up", ["down"]),
        line("image_classification", [large], "lion", ["dog"], confidence=0.875),
        line("image_classification", [large], "cow", ["dog"], confidence=0.125),
        line("image_pair_reasoning", [large, clip], "true", ["false"], "both show a digit", confidence=0.5),
        line("text_pair_classification", [], "entailment", ["entailment"], "one text / another text", confidence=1.0),
        line("text_classification", [], 2.5, [4.0], "a number"),
        line("grounding", [large], [0.5, 0.5, 0.2, 0.2], [[0.5, 0.5, 0.2, 0.19]], "the box that fits"),
        line("grounding", [large], [0.1, 0.1, 0.2, 0.2], [[0.9, 0.9, 0.2, 0.2]], "the box that misses"),
        line("video_caption", [clip], "what is not scored", []),
    ]
    metrics = [
        {"step": 2, "loss": 4.0, "loss/vtc": 3.0, "lr": 0.001, "grad_norm": 5.0, "samples_per_second": 80.0},
        {"step": 4, "loss": 2.0, "loss/vtc": 1.5, "lr": 0.001, "grad_norm": float("inf"), "samples_per_second": 90.0},
        {"step": 4, "val/qa_order": 0.25, "val/caption_cider": 1.5, "val/image_caption_exact": 0.5},
        {"step": 6, "val/qa_order": 0.75, "val/caption_cider": 2.5, "val/image_caption_exact": float("nan")},
        {"step": 6, "test/qa_order": 0.625, "test/grounding_iou": 0.5, "test/t2i_r1": 0.25},
    ]
    run = write_run(tmp_path_factory.mktemp("runs") / "mine", lines, metrics)
    write_report(run, make_predictor())
    return run


@pytest.fixture(scope="module")
def page(run) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_it_shows_settings_results_by_kind_predictions_and_the_command(page):
    for text in (
        "1,234,567", "torchrun train.py --name", "mine: pretrain", "max_steps", "6 of 9",
        "Answers by kind of question, videos", "qa_order", "75.0 %", "62.5 %", "Captions, images", "Retrieval, images",
        "Classes, labels, and boxes", "which color is it", "width16", "Attention of the words: which color is it",
        "2.50", "4.00", "one text / another text", "validation: answers by kind of question, videos",
        "the box that misses",
    ):
        assert text in page.text, text
    assert page.tags.count("svg") == 6  # losses, two kinds of metrics (never CIDEr), rate, norm, speed
    assert page.text.count(", logarithmic") == 2  # losses and norm
    assert "a white" not in page.text and page.text.count("25.0 %") == 1  # the newest value of each metric


def test_mistakes_are_the_most_confident_ones(page):
    mistakes = page.text[page.text.index("Hardest mistakes"):]
    assert "8 of 13 predictions are wrong" in mistakes
    assert mistakes.index("lion") < mistakes.index("cow") and "probability 88%" in mistakes
    assert "the box that misses" in mistakes and "the box that fits" not in mistakes and "overlap" in mistakes
    assert "gone" not in mistakes.split("Settings")[0]  # its file cannot be shown


def test_it_loads_nothing_and_runs_nothing(run, page):
    assert "default-src 'none'; img-src data:;" in (run / "report.html").read_text(encoding="utf-8")
    assert page.addresses and all(address.startswith("data:image/webp;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not page.handlers


def test_texts_of_the_data_are_escaped(run, page):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert page.text.count(EVIL) >= 5  # setting, command, caption, question of the samples and of the mistakes


def test_unreadable_files_are_named_and_large_images_scaled_down(run, page):
    assert "gone.gif" in page.text and "broken.png" in page.text
    assert (run / "report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize("left_out", [
    ["metrics.jsonl"], ["predictions.jsonl"], ["metrics.jsonl", "predictions.jsonl"],
])
def test_a_part_whose_file_is_missing_is_left_out(run, tmp_path, left_out):
    other = tmp_path / "other"
    other.mkdir()
    for name in {"settings.json", "metrics.jsonl", "predictions.jsonl"} - set(left_out):
        (other / name).write_bytes((run / name).read_bytes())
    main([str(other)])  # without a checkpoint there is no attention
    text = Page((other / "report.html").read_text(encoding="utf-8")).text
    assert ("Results" in text and "Curves" in text) == ("metrics.jsonl" not in left_out)
    assert ("Samples" in text and "Hardest mistakes" in text) == ("predictions.jsonl" not in left_out)
    assert "Settings" in text and "Attention of the words" not in text


def test_the_page_of_an_evaluation_has_the_name_of_its_checkpoint_and_its_own_predictions(tmp_path):
    folder = tmp_path / "step_0000007" / "eval"
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text(json.dumps(line("text_classification", [], "good", ["bad"])) + "\n")
    result = EvalResult({"text_classification_accuracy": Score(0.25, 0.125)})
    page = write_evaluation_report(folder, {"test": result}, {"text_classification_accuracy": 0.5}, make_predictor())
    assert page == folder / "report.html"
    text = Page(page.read_text(encoding="utf-8")).text
    assert "step_0000007: pretrain" in text and "25.0 ± 12.5 %" in text and "50.0 %" in text
    assert "1 of 1 predictions are wrong" in text


def test_the_newer_evaluation_is_shown(media, tmp_path):
    of_run, of_eval = (line("video_qa", [media["clip.gif"]], text, ["no"], "is it") for text in ("of a run", "of eval"))
    other = write_run(tmp_path / "other", [of_run], [{"step": 1, "val/qa_a": 0.5}])
    folder = other / "last" / "eval"
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text(json.dumps(of_eval) + "\n")
    (folder / "metrics.json").write_text('{"combos/qa_b": 0.125}')
    for newer, text, other_text in ((other, "of a run", "12.5 %"), (folder, "12.5 %", "of a run")):
        for path, age in ((other, 100), (folder, 100), (newer, 0)):
            os.utime(path / "predictions.jsonl", (1e9 - age, 1e9 - age))
        write_report(other, make_predictor())
        shown = Page((other / "report.html").read_text(encoding="utf-8")).text
        assert text in shown and other_text not in shown


def test_the_results_have_a_chance_level_if_the_data_are_there(tmp_path):
    """The second folder has the records; the first has other files, such as shards. The split is the last one."""
    run = write_run(tmp_path / "mine", [], [{"step": 1, "val/qa_accuracy": 0.5}, {"step": 2, "test/qa_accuracy": 0.5}])
    settings = json.loads((run / "settings.json").read_text())
    for name, there in (("shards", False), ("data", True)):
        (tmp_path / name).mkdir()
        settings["data"][str(tmp_path / name)] = 1.0
        (run / "settings.json").write_text(json.dumps(settings))
        if there:
            for split, answers in (("val", "ab"), ("test", "aaab")):
                asked = [{"video": "a.gif", "qa": [{"question": "who", "answers": [answer]}]} for answer in answers]
                lines = "".join(json.dumps(record) + "\n" for record in asked)
                (tmp_path / name / f"video_qa.{split}.jsonl").write_text(lines)
        write_report(run)
        text = Page((run / "report.html").read_text(encoding="utf-8")).text
        assert ("chance" in text and "75.0 %" in text) == there


def test_the_tiles_have_the_last_loss_and_the_usual_speed():
    """One line in three was slow, as a validation makes it."""
    metrics = [{"step": step, "loss": loss, "samples_per_second": rate}
               for step, loss, rate in ((1, 3.0, 80.0), (2, 2.0, 5.0), (3, 1.5, 81.0))]
    text = Page(header("mine", {"train": {"max_steps": 9}}, [*metrics, {"step": 4, "val/qa_order": 0.5}])).text
    assert "1.500loss" in text and "80samples per second" in text and "4 of 9steps" in text


def test_losses_are_no_results_and_bars_stay_in_their_cells():
    by_split, errors = latest([{"step": 1, "loss": 3.0, "loss/vtc": 2.0, "val/qa_order": -0.25},
                               {"step": 2, "test/qa_order": 1.5, "standard_errors": {"test/qa_order": 0.125}}])
    assert by_split == {"val": {"qa_order": -0.25}, "test": {"qa_order": 1.5}}
    assert errors == {"test": {"qa_order": 0.125}}
    assert re.findall(r"width: (\S+?)%", metric_tables(by_split, errors, {})) == ["0.0", "100.0"]


def test_samples_are_few_and_of_all_tasks(tmp_path):
    lines = [line(task, [], "a", ["a"], f"{task} {i}") for task in ("text_classification", "text_pair_classification")
             for i in range(100)]
    run = write_run(tmp_path / "many", lines, [])
    write_report(run)
    text = Page((run / "report.html").read_text(encoding="utf-8")).text
    assert text.count("text_classification,") == text.count("text_pair_classification,") == CARDS // 2


def test_each_box_has_an_image_of_its_own_with_the_true_box_in_white_and_the_predicted_one_in_orange(tmp_path):
    Image.new("RGB", (40, 40), (0, 0, 200)).save(tmp_path / "a.png")
    lines = [line("grounding", [tmp_path / "a.png"], [x, 0.5, 0.2, 0.4], [[0.75, 0.5, 0.3, 0.4]], f"number {x}")
             for x in (0.25, 0.3)]
    run = write_run(tmp_path / "boxes", lines, [])
    write_report(run)
    page = Page((run / "report.html").read_text(encoding="utf-8").split("Hardest mistakes")[0])
    assert len(page.addresses) == 2
    file = tmp_path / "card.webp"
    for address in page.addresses:
        file.write_bytes(base64.b64decode(address.split(",")[1]))
        image = np.asarray(Image.open(file).convert("RGB"))
        white, orange = (image == 255).all(axis=2), (image == (255, 150, 0)).all(axis=2)
        assert np.argwhere(white).min(0).tolist() == [12, 24] and np.argwhere(white).max(0).tolist() == [28, 36]
        assert 5 < np.argwhere(orange)[:, 1].min() < np.argwhere(orange)[:, 1].max() < 18


def test_a_folder_that_is_not_a_run_is_refused(tmp_path, capsys):
    for arguments, code, message in (([str(tmp_path)], 1, "has no settings.json: expected the folder of a run"),
                                     ([], 2, "RUN: not given"), (["a", "b"], 2, "unknown argument b")):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == code and message in capsys.readouterr().err


@pytest.mark.browser
def test_chromium_shows_it_on_a_light_and_on_a_dark_background(run, tmp_path):
    light = screenshot(run / "report.html", tmp_path / "light.png")
    dark = screenshot(run / "report.html", tmp_path / "dark.png", dark=True)
    assert light[2, 2].min() > 240 and dark[2, 2].max() < 60
    for shown in (light, dark):  # frames of the video, larger than a patch of the attention on it
        assert ((shown == COLOR).all(axis=2) | (shown == (0, 250, 0)).all(axis=2)).sum() >= 128 * 128
    assert len(np.unique(light.reshape(-1, 3), axis=0)) > 100
