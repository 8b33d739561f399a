"""Every task end to end: from a pre-training checkpoint, through some steps of train.py, to eval.py and its files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import QUICK_TASKS, slow_except
from PIL import Image
from runs import FAST, MODEL, SIZES, lines, refused
from safetensors.torch import load_file

import eval as evaluation
import train
from mplug2.checkpoint import checkpoint_classes
from mplug2.data.records import read_records
from mplug2.evaluation.data import EvalSplit
from mplug2.evaluation.labels import zero_shot
from mplug2.tasks import TASKS
from mplug2.training.run_checkpoint import load_training
from mplug2.training.settings import resolve_settings
from tiny_data import write

pytestmark = pytest.mark.usefixtures("no_curves")
FINE_TUNED = [task for task in TASKS if task != "pretrain"]
KEYS = {"caption": "caption_exact", "qa": "qa_digit", "retrieval": "t2v_r1", "grounding": "grounding_accuracy"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """All tasks, with two of the splits and a single retrieval gallery."""
    folder = write(tmp_path_factory.mktemp("tasks") / "world", seed=0, sizes=SIZES)
    for file in folder.glob("*.combos.jsonl"):
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory) -> Path:
    """A checkpoint after one step of pre-training."""
    out, light = tmp_path_factory.mktemp("pretrained"), tmp_path_factory.mktemp("light")
    (light / "media").symlink_to(world / "media")
    for name in ("video_caption", "video_qa", "image_caption", "image_qa", "text_only"):
        shutil.copy(world / f"{name}.train.jsonl", light)
    shutil.copy(world / "text_classification.val.jsonl", light)  # nothing that pre-training would be tested by
    train.main([*MODEL, *FAST, "--data", str(light), "--out", str(out), "--max-steps", "1"])
    return out / "tiny" / "last"


def fine_tune(task: str, init: Path, world: Path, out: Path, *arguments: str) -> Path:
    train.main([*FAST, "--task", task, "--init", str(init), "--data", str(world), "--out", str(out),
                "--name", "tuned", "--max-steps", "1", *arguments])
    return out / "tuned"


@pytest.mark.parametrize("task", slow_except(QUICK_TASKS[1:], FINE_TUNED))
def test_every_task_is_fine_tuned_and_evaluated(task, pretrained, world, tmp_path, capsys):
    run = fine_tune(task, pretrained, world, tmp_path)
    (results,) = [line for line in lines(run) if any(key.startswith("test/") for key in line)]
    what = task.partition("_")[2] or task
    key = KEYS.get(what, KEYS.get(task, TASKS[task].metric))
    prefix = task.partition("_")[0]
    key = f"{prefix}_{key}" if prefix in ("image", "text") and what in KEYS else key
    key = key.replace("image_t2v", "t2i")
    assert -1 <= results[f"test/{key}"] <= 1
    printed, said = capsys.readouterr()
    assert "failed" not in said  # a report or a plot would only warn
    assert ("so trained from scratch" in printed) == bool(TASKS[task].components & {"classifier", "box"})

    found = evaluation.main(["--checkpoint", str(run / "last"), "--data", str(world), "--task", task])
    trained = {name: value for name, value in results.items() if name not in ("step", "standard_errors")}
    assert found == pytest.approx(trained)
    printed = capsys.readouterr().out
    assert "chance" in printed.splitlines()[1]
    records = read_records(world, task, "test")
    written = [json.loads(line) for line in (run / "last" / "eval" / "predictions.jsonl").read_text().splitlines()]
    expected = {"retrieval": 2 * len(records), "qa": sum(len(record.qa) for record in records)}.get(what, len(records))
    assert len(written) == expected
    for line in written:
        sure = {"confidence"} if checkpoint_classes(run / "last").get(task) else set()
        assert set(line) == {"id", "task", "split", "media", "question", "prediction", "truth", "right"} | sure
        assert (line["task"], line["split"]) == (task, "test")
        searched = what == "retrieval" and line["question"]  # by a text, among files
        media = 1 + ("pair" in TASKS[task].components) if "vision" in TASKS[task].components and not searched else 0
        assert len(line["media"]) == media
    if "classifier" in TASKS[task].components and not key.endswith("pearson"):  # classes, not numbers
        labels = {record.label for record in read_records(world, task, "train")}
        assert set(checkpoint_classes(run / "last")[task]) == labels
        right = sum(line["prediction"] in line["truth"] for line in written) / len(written)
        assert found[f"test/{task}_accuracy"] == pytest.approx(right)


def test_several_tasks_share_the_steps_by_their_weights(pretrained, world, tmp_path):
    run = fine_tune("video_qa,visual_entailment,grounding", pretrained, world, tmp_path,
                    *"--task-weights 1,3,0 --max-steps 8".split())
    counts = [sum(f"loss/{name}" in line for line in lines(run)) for name in ("answer", "label", "l1")]
    assert counts == [2, 6, 0]
    (results,) = [line for line in lines(run) if "test/qa_digit" in line]
    assert "test/visual_entailment_accuracy" in results and "test/caption_exact" not in results
    # What was learned together can be taken apart, heads included.
    again = fine_tune("visual_entailment", run / "last", world, tmp_path / "again", "--lr", "0")
    before, after = (load_file(folder / "last" / "model.safetensors") for folder in (run, again))
    assert all(tensor.equal(before[name]) for name, tensor in after.items())


def test_fine_tuning_has_its_own_defaults_and_flags_take_precedence(tmp_path):
    assert all(TASKS[task].steps for task in FINE_TUNED)

    def settings(**given) -> tuple[str, int, float]:
        resolved = resolve_settings({"out": str(tmp_path), **given}, {})
        return resolved.folder.name, resolved.data.max_steps, resolved.optimizer.lr

    assert settings(task="grounding") == ("grounding", 300, 1e-3)
    assert settings(task="video_qa,grounding", lr=1.0) == ("video_qa,grounding", 400, 1.0)
    assert settings(task="grounding", max_steps=7, name="boxes") == ("boxes", 7, 1e-3)
    assert settings() == settings(task="pretrain") == ("tiny", 1500, 2.5e-3)
    assert settings(task="pretrain,video_qa")[1:] == (1500, 2.5e-3)


def test_a_checkpoint_is_evaluated_on_every_task_that_it_has_the_modules_for(pretrained, world):
    found = evaluation.main(["--checkpoint", str(pretrained), "--data", str(world), "--limit", "16"])
    tasks = {"caption_exact", "qa_digit", "t2v_r1", "image_caption_exact", "image_qa_digit", "t2i_r1",
             "image_classification_zero_shot", "video_classification_zero_shot"}
    assert {f"test/{key}" for key in tasks} <= set(found)
    assert not any("classification_accuracy" in key or "entailment" in key for key in found)
    assert not any("text_qa" in key for key in found)  # no part of pre-training, though its modules are there


@pytest.mark.slow
def test_a_resumed_run_has_the_ema_teacher_and_the_queue_of_an_uninterrupted_run(world, pretrained, tmp_path):
    arguments = ["--data", str(world), "--init", str(pretrained), "--name", "m", "--task", "video_retrieval,video_qa",
                 *FAST, *"--distill-weight 0.4 --queue-size 20 --ema-decay 0.9 --save-every 2".split(),
                 *"--keep-checkpoints 9 --max-steps 4".split()]
    test_files = [file for file in world.glob("*.test.jsonl") if "retrieval" in file.name or "qa" in file.name]
    data = tmp_path / "data"
    data.mkdir()
    (data / "media").symlink_to(world / "media")
    for file in (*world.glob("video_*.train.jsonl"), world / "video_qa.val.jsonl"):
        shutil.copy(file, data)
    assert test_files
    arguments[1] = str(data)
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    whole, resumed = tmp_path / "whole" / "m", tmp_path / "resumed" / "m"
    shutil.copytree(whole, resumed, symlinks=True)
    shutil.rmtree(resumed / "step_0000004")
    (resumed / "last").unlink()
    (resumed / "last").symlink_to("step_0000002")
    train.main(["--resume", "--name", "m", "--out", str(tmp_path / "resumed")])
    expected, found = (load_training(folder / "last")["objectives"] for folder in (whole, resumed))
    expected, found = ({name.removeprefix("ema_teacher."): tensor for name, tensor in saved.items()}
                       for saved in (expected, found))
    assert expected["steps"] == 4 and expected["queued"] == 16
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    expected, found = (load_file(folder / "last" / "model.safetensors") for folder in (whole, resumed))
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    copy = load_training(whole / "last")["objectives"]
    assert any(not copy[f"ema_teacher.teacher.{name}"].equal(tensor) for name, tensor in expected.items())


def test_self_critical_training_changes_only_the_modules_that_are_not_frozen(pretrained, world, tmp_path):
    run = fine_tune("video_caption", pretrained, world, tmp_path, "--self-critical", "--freeze",
                    "vision_encoder, universal", "--max-steps", "2")
    losses = {key for line in lines(run) for key in line if key.startswith("loss/")}
    assert losses == {"loss/reward"}
    before, after = load_file(pretrained / "model.safetensors"), load_file(run / "last" / "model.safetensors")
    changed = {name.split(".")[0] for name, tensor in after.items() if not tensor.equal(before[name])}
    assert changed <= {"decoder"}


def test_number_labels_are_learned_by_regression(world, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        lines_of = [json.dumps({"texts": ["a red one", f"a {word} one"], "label": number})
                    for word, number in (("red", 5), ("blue", 1.5), ("green", 0))]
        (data / f"text_pair_classification.{split}.jsonl").write_text("\n".join(lines_of * 3))
    train.main([*MODEL, *FAST, "--data", str(data), "--out", str(tmp_path),
                *"--task text_pair_classification --max-steps 60 --lr 5e-3 --batch-size 9".split()])
    run = tmp_path / "text_pair_classification"
    (results,) = [line for line in lines(run) if "test/text_pair_classification_pearson" in line]
    assert results["test/text_pair_classification_pearson"] > 0.9
    assert results["test/text_pair_classification_spearman"] > 0.9
    assert checkpoint_classes(run / "last") == {"text_pair_classification": ()}


@pytest.mark.slow
def test_the_attention_of_words_is_drawn(pretrained, world, tmp_path, capsys):
    clip = next((world / "media" / "test").glob("video-0*.gif"))
    arguments = ["--checkpoint", str(pretrained), "--input", str(clip)]
    for name, more in (("answer", ["--question", "Which digit is it?"]), ("caption", [])):
        file = tmp_path / "deep" / f"{name}.png"
        evaluation.main([*arguments, *more, "--attention", str(file)])
        written = capsys.readouterr().out.splitlines()
        assert written[-1] == f"attention: {file}"
        with Image.open(file) as picture:
            picture.load()
            assert min(picture.size) > 200
    words = evaluation.load(pretrained).explain(clip, "Which digit is it?")[1]
    assert [word.word for word in words if "fusion" in word.module] == ["which", "digit", "is", "it"]
    for word in words:
        assert word.map.dim() == 3 and word.map.shape[0] == 4 and 0 < word.map.sum() <= 1 + 1e-5
    # An image has the words of a caption, too.
    picture = next((world / "media" / "test").glob("image-0*.png"))
    assert all(word.map.shape[0] == 1 for word in evaluation.load(pretrained).explain(picture)[1])


def test_answers_are_chosen_from_a_list(pretrained, world, tmp_path, capsys):
    (tmp_path / "answers.txt").write_text("Red!\nseven\n\nred\n")
    arguments = ["--checkpoint", str(pretrained), "--data", str(world), "--task", "image_qa"]
    evaluation.main([*arguments, "--answers", str(tmp_path / "answers.txt")])
    read = (pretrained / "eval" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["prediction"] for line in read} <= {"red", "seven"}
    evaluation.main([*arguments, "--answers", "train"])
    known = {answer for record in [*read_records(world, "image_qa", "train"), *read_records(world, "video_qa", "train")]
             for question in record.qa for answer in question.answers}
    read = (pretrained / "eval" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["prediction"] for line in read} <= known
    (tmp_path / "empty.txt").write_text("\n")
    message = refused(capsys, evaluation.main, [*arguments, "--answers", tmp_path / "empty.txt"], 1)
    assert "found no answers there" in message


@pytest.mark.parametrize(("arguments", "message"), [
    ("--task video_cation", "unknown task 'video_cation' (did you mean 'video_caption'?); known are "),
    ("--task video_qa,video_qa", "task='video_qa,video_qa': 'video_qa' is named twice"),
    ("--task video_qa,", "task='video_qa,': name 2 of the list is empty; expected names with single commas between"),
    ("--task video_qa,image_qa --task-weights 1", "expected one number for each task of video_qa,image_qa"),
    ("--task video_qa --task-weights x", "task_weights='x': expected numbers"),
    ("--task video_qa --task-weights -1", "expected no negative number"),
    ("--task video_qa --task-weights 0", "all batch types have weight 0"),
    ("--task video_caption --distill-weight 0.4", "task=video_caption: this task has no answers to distill"),
    ("--queue-size 64", "queue_size=64: the queue needs an EMA teacher; add --distill-weight 0.4"),
    ("--task video_qa --distill-weight 0.4 --queue-size 64", "task=video_qa: this task has no VTC that would use it"),
    ("--distill-weight 0.4 --queue-size 15 --batch-size 32 --accumulation-steps 2",
     "queue_size=15: a micro-batch has 16 samples, and the queue has to hold them; raise --queue-size to 16 or more"),
    ("--ema-decay 1", "ema_decay=1.0: expected a number of at least 0 and below 1"),
    ("--task video_qa --self-critical", "task=video_qa: this task does not generate captions"),
    ("--layer-decay 1.5", "layer_decay=1.5: expected a number from 0 to 1"),
])
def test_settings_that_do_not_fit_the_task_are_refused(capsys, tmp_path, arguments, message):
    assert message in refused(capsys, train.main, [*arguments.split(), "--out", tmp_path], 2)


def test_tasks_that_a_checkpoint_cannot_do_are_refused_with_advice(capsys, pretrained, world, tmp_path):
    arguments = ["--checkpoint", pretrained, "--data", world]
    for task, message in (("grounding", "does not have the modules for grounding; fine-tune it with train.py "
                          "--task grounding --init CHECKPOINT"),
                          ("pretrain", "task 'pretrain' cannot be evaluated")):
        assert message in refused(capsys, evaluation.main, [*arguments, "--task", task], 1)
    message = refused(capsys, train.main, [*FAST, "--task", "video_qa", "--init", pretrained, "--data", world,
                                           "--out", tmp_path, "--freeze", "vision"], 1)
    assert "freeze='vision': the modules of a model for video_qa are vision_encoder, " in message
    message = refused(capsys, train.main, [*FAST, "--task", "video_qa", "--init", pretrained, "--data", world,
                                           "--out", tmp_path, "--name", "b", "--freeze", "vision_encoder,"], 1)
    assert "freeze='vision_encoder,': name 2 of the list is empty" in message


def test_zero_shot_classes_are_described_by_a_file_or_by_the_prompt(pretrained, world, tmp_path):
    model, task = evaluation.load(pretrained), "image_classification"
    records = read_records(world, task, "test")
    images = torch.stack(model.embed_media([record.image for record in records]))
    for label in ("one", "two"):
        with open(tmp_path / f"{task}.train.jsonl", "a") as file:
            file.write(json.dumps({"image": "a.png", "label": label}) + "\n")
    found = torch.stack(zero_shot(model, task, records, EvalSplit(tmp_path, "test")))
    texts = torch.stack(model.embed_texts(["a picture of a one", "a picture of a two"]))
    torch.testing.assert_close(found, images @ texts.T)
    (tmp_path / f"{task}.captions.json").write_text(json.dumps({"one": ["red", "blue"], "two": ["two"]}))
    found = torch.stack(zero_shot(model, task, records, EvalSplit(tmp_path, "test")))
    one, two = torch.stack(model.embed_texts(["red", "blue"])).mean(0), model.embed_texts(["two"])[0]
    torch.testing.assert_close(found, images @ torch.stack([torch.nn.functional.normalize(one, dim=0), two]).T)
    (tmp_path / f"{task}.captions.json").write_text(json.dumps({"one": ["red"], "three": []}))
    with pytest.raises(ValueError, match="found no captions of the class 'three'"):
        zero_shot(model, task, records, EvalSplit(tmp_path, "test"))
