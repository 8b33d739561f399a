"""Checkpoints: loading returns what was saved, errors name what is wrong, and a kill never leaves half a checkpoint."""

import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import randomized, seeds, small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mplug2 import checkpoint
from mplug2.checkpoint import (
    CheckpointError,
    HashingWriter,
    PreprocessConfig,
    load_model,
    read_config,
    read_data,
    real_folder,
    save_model,
    sha256,
)
from mplug2.config import form_fields
from mplug2.data.text import Tokenizer
from mplug2.model.mplug2 import MPLUG2
from mplug2.tasks import TASKS
from mplug2.training.run_checkpoint import clean_partial, load_training, record_score, save_checkpoint
from mplug2.training.state import check_files

PREPROCESS = PreprocessConfig(frames=3, max_words=7)
TOKENIZER = Tokenizer.train(["a red one", "a one"], 20)


def make_model(task: str = "pretrain", seed: int = 0, **changes) -> MPLUG2:
    """Float32, the type that is saved."""
    return randomized(MPLUG2(small(**changes), task), seed).float()


def assert_same_weights(found: MPLUG2, expected: MPLUG2) -> None:
    weights = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert tensor.equal(weights[name]), name


@pytest.fixture
def saved(tmp_path) -> Path:
    save_model(tmp_path / "model", make_model(), TOKENIZER, PREPROCESS)
    return tmp_path / "model"


def change_weights(folder: Path, **changes) -> None:
    """Rewrite the file with changed entries. None removes an entry."""
    weights = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")


def change_config(folder: Path, part: str | None, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


# ---- saving and loading ----------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(sorted(TASKS)), seeds, st.sampled_from(["released", "figure"]), st.sampled_from([16, 24]))
def test_loading_is_bit_identical_to_what_was_saved(tmp_path_factory, task, seed, form, width):
    """In both forms. `vision_width` is 24: models with and without the layer that joins the two widths."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_model(task, seed, **form_fields(form, small(), {}), width=width)
    save_model(folder, model, TOKENIZER, PREPROCESS)
    found, tokenizer, preprocess = load_model(folder)
    assert_same_weights(found, model)
    assert (found.task, found.config, preprocess) == (task, model.config, PREPROCESS)
    assert tokenizer.encode(["one red"])[0].equal(TOKENIZER.encode(["one red"])[0])
    assert not found.training
    assert read_config(folder) == (task, model.config, PREPROCESS)
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}


def test_a_model_folder_keeps_the_stride_of_time_its_data_and_what_other_programs_ask_for(tmp_path):
    model = make_model("video_caption", temporal_stride=3, vocab_size=len(TOKENIZER))  # just enough for the tokenizer
    save_model(tmp_path, model, TOKENIZER, PREPROCESS, data=[tmp_path / "a", "b"])
    assert read_config(tmp_path)[1].temporal_stride == 3 and load_model(tmp_path)[0].config == model.config
    assert read_data(tmp_path) == [tmp_path / "a", Path("b").absolute()]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


@pytest.mark.parametrize("readout", ["released", "figure"])
def test_a_checkpoint_from_before_the_class_token_setting_loads_unless_it_has_the_old_readout(tmp_path, readout):
    model = make_model(universal_readout=readout)
    save_model(tmp_path, model, TOKENIZER, PREPROCESS)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["model"]["class_token"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    if readout == "figure":
        with pytest.raises(CheckpointError, match="has no cross-attention inside the universal layers"):
            load_model(tmp_path)
    else:
        assert_same_weights(load_model(tmp_path)[0], model)


@pytest.mark.parametrize(
    "task", sorted(task for task, row in TASKS.items() if not row.components & {"classifier", "box"})
)
def test_another_task_loads_only_the_part_that_it_needs(saved, task):
    found, _, _ = load_model(saved, task)
    assert found.task == task
    assert_same_weights(found, make_model())


NEW = {"text_classification": ["classifier.text_classification.bias", "classifier.text_classification.weight"],
       "image_pair_reasoning": ["classifier.image_pair_reasoning.bias", "classifier.image_pair_reasoning.weight",
                                "pair_place"],
       "grounding": [*(f"box_head.correct.{i}.{name}" for i in (0, 2) for name in ("bias", "weight")),
                     "box_head.key.weight", "box_head.query.bias", "box_head.query.weight"]}


@pytest.mark.parametrize("task", NEW)
def test_fine_tuning_initializes_the_heads_that_a_checkpoint_lacks_and_nothing_else(saved, task):
    with pytest.raises(CheckpointError, match=rf"not in the file[^$]*: train.py --task {task} --init CHECKPOINT"):
        load_model(saved, task)
    found, _, _ = load_model(saved, task, classes={task: ("a", "b")})
    assert sorted(found.newly_initialized) == NEW[task]
    expected = make_model().state_dict()
    for name, tensor in found.state_dict().items():
        if name not in NEW[task]:
            assert tensor.equal(expected[name]), name


def test_class_names_are_saved_and_a_head_for_other_classes_is_initialized(tmp_path):
    both = "visual_entailment,image_classification"
    classes = {"visual_entailment": ("no", "yes"), "image_classification": ("a", "b", "c")}
    model = MPLUG2(small(), both, classes).eval()
    save_model(tmp_path, model, TOKENIZER, PREPROCESS)
    found, _, _ = load_model(tmp_path)
    assert found.classes == classes and found.newly_initialized == []
    assert_same_weights(found, model)
    one, _, _ = load_model(tmp_path, "visual_entailment", classes={"visual_entailment": ("no", "yes")})
    assert one.newly_initialized == []
    assert one.classes == {"visual_entailment": ("no", "yes")}
    assert_same_weights(one, model)
    for others in (("yes", "no"), ("a", "b", "c"), ()):
        other, _, _ = load_model(tmp_path, "visual_entailment", classes={"visual_entailment": others})
        new = [f"classifier.visual_entailment.{name}" for name in ("bias", "weight")]
        assert sorted(other.newly_initialized) == new
    # Checkpoints from before there were class names have none.
    change_config(tmp_path, None, classes={})
    with pytest.raises(CheckpointError, match=r"visual_entailment.weight: expected \(1, 16\), found \(2, 16"):
        load_model(tmp_path)


def test_an_image_model_loads_a_video_model_without_the_local_temporal_modules_that_it_skips(tmp_path):
    model = make_model("pretrain", temporal_on_images=False)
    save_model(tmp_path, model, TOKENIZER, PREPROCESS)
    found, _, _ = load_model(tmp_path, "image_caption")
    assert not any(".lt" in name for name in found.state_dict())
    assert_same_weights(found, model)


def test_settings_that_do_not_change_the_weights_can_be_changed(saved):
    found, _, _ = load_model(saved, changes={"dropout": 0.25})
    assert found.config == small(dropout=0.25)
    with pytest.raises(ValueError, match="dropout=1.5: expected a fraction"):
        load_model(saved, changes={"dropout": 1.5})


def test_the_key_of_older_checkpoints_for_preprocessing_is_read(saved):
    config = json.loads((saved / "config.json").read_text())
    config["preparation"] = config.pop("preprocess")
    (saved / "config.json").write_text(json.dumps(config))
    assert load_model(saved)[2] == PREPROCESS


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_others_may_read_the_files_of_a_checkpoint_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        run = tmp_path / "run"
        save_checkpoint(run, "step_0000001", make_model(), TOKENIZER, PREPROCESS, {"step": 1}, keep=1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (run / "last").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask) and "model.safetensors" in modes


@pytest.mark.parametrize("patterns, new", [
    (["vision_encoder.blocks.*.lt*"], lambda name: name.startswith("vision_encoder.blocks.") and ".lt" in name),
    (["decoder", "temperature"], lambda name: name.startswith("decoder.") or name == "temperature"),
    (["decoder.layers.0.self_attention.out.weight"], lambda name: name == "decoder.layers.0.self_attention.out.weight"),
])
def test_modules_that_match_a_pattern_start_from_scratch(saved, patterns, new):
    model, _, _ = load_model(saved, reinit=patterns)
    expected = make_model().state_dict()
    wanted = {name for name in expected if new(name)}
    assert set(model.newly_initialized) == wanted
    for name, tensor in model.state_dict().items():
        assert tensor.equal(expected[name]) == (name not in wanted) or not tensor.any(), name
    change_weights(saved, **dict.fromkeys(wanted))  # the file does not need them
    assert set(load_model(saved, reinit=patterns)[0].newly_initialized) == wanted


def test_a_pattern_that_matches_nothing_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"reinit='decodr' matches no parameter .*did you mean 'decoder'"):
        load_model(saved, reinit=["decodr"])


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_task_whose_modules_the_checkpoint_lacks_is_refused(tmp_path):
    save_model(tmp_path, make_model("video_caption"), TOKENIZER, PREPROCESS)
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path, "pretrain")
    lines = str(refused.value).splitlines()
    assert lines[0].endswith("video_caption, does not fit this model for pretrain:")
    assert "  temperature: expected (), not in the file" in lines
    assert lines[-1].startswith("  and ") and len(lines) == 10  # eight of them, and how many more


def test_missing_unknown_and_wrongly_shaped_weights_are_named(saved):
    change_weights(saved, **{
        "fusion.layers.0.self_norm.bias": None, "matching_head.bias": torch.zeros(3), "decoder.extra": torch.zeros(1),
        "surprise": torch.zeros(1),
    })
    with pytest.raises(CheckpointError) as refused:
        load_model(saved)
    assert set(str(refused.value).splitlines()[1:]) == {
        "  fusion.layers.0.self_norm.bias: expected (16,), not in the file",
        "  matching_head.bias: expected (2,), found (3,)",
        "  decoder.extra: not part of this model",
        "  surprise: not part of this model",
    }
    # A captioning model has no fusion and no matching head, so it misses neither. The other two stay unknown.
    with pytest.raises(CheckpointError) as refused:
        load_model(saved, "image_caption")
    assert {line.split(":")[0] for line in str(refused.value).splitlines()[1:]} == {"  decoder.extra", "  surprise"}


def test_a_checkpoint_of_another_size_is_refused(saved):
    change_config(saved, "model", ff_width=28, latents=4)
    with pytest.raises(CheckpointError, match=r"universal.latents: expected \(4, 16\), found \(3, 16\)"):
        load_model(saved)
    with pytest.raises(CheckpointError, match=r"contrastive_text.weight: expected \(6, 16\), found \(5, 16\)") as error:
        load_model(saved, changes={"contrastive_width": 6, "ff_width": 20, "latents": 3})
    assert "\nIts settings differ from contrastive_width=6, ff_width=20, latents=3: leave out" in str(error.value)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights_are_reported(saved, kept):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read, it may be truncated .*an older"):
        load_model(saved)


def test_a_damaged_checkpoint_names_the_newest_older_one_that_is_intact(tmp_path):
    for step in range(1, 6):
        folder = tmp_path / f"step_{step:07d}"
        folder.mkdir()
        for name in checkpoint.RUN_FILES:
            (folder / name).write_text(f"{name} {step}")
        checkpoint.write_manifest(folder, step, {})
    checkpoint.verify(folder, checkpoint.RUN_FILES)
    for step in (3, 4):
        (tmp_path / f"step_{step:07d}" / "training.pt").write_text("training.pt x")
    for step in (3, 4):
        with pytest.raises(CheckpointError, match="training.pt was changed after.*--resume-from step_0000002$"):
            checkpoint.verify(tmp_path / f"step_{step:07d}", checkpoint.RUN_FILES)
    (tmp_path / "step_0000001" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing; this run has no older checkpoint"):
        checkpoint.verify(tmp_path / "step_0000001", checkpoint.RUN_FILES)


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a checkpoint: there is no such folder; expected a"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a checkpoint: it does not contain config.json; expected a"):
        load_model(tmp_path)
    (saved / "model.safetensors").rename(saved / "weights")
    with pytest.raises(CheckpointError, match=r"model.safetensors: no such file; the checkpoint is incomplete"):
        load_model(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_model(saved)
    with pytest.raises(CheckpointError, match="has no training.pt, so it cannot be resumed"):
        load_training(saved)


@pytest.mark.parametrize("spans, stride, expected", [(False, 2, 0), (True, 2, 2), (True, 3, 3)])
def test_the_model_settings_of_an_older_checkpoint_are_read(saved, spans, stride, expected):
    config = json.loads((saved / "config.json").read_text())
    del config["model"]["boxes"], config["model"]["class_token"]
    config["model"] |= {"temporal_downsampling": spans, "temporal_stride": stride}
    (saved / "config.json").write_text(json.dumps(config))
    model = read_config(saved)[1]
    assert (model.temporal_stride, model.boxes, model.class_token) == (expected, "soft_argmax", "released")


def test_a_config_with_an_unknown_missing_or_impossible_setting_is_refused(saved):
    original = (saved / "config.json").read_text()
    for part, changes, message in (
        ("model", {"widht": 3}, "unknown settings widht; known are boxes, class_token, "),
        ("preprocess", {"fps": 3}, "unknown settings fps; known are frames, max_length, max_words"),
        ("model", {"heads": 3}, "heads=3 does not divide width=16"),
        ("model", {"width": "16"}, "width='16': expected an integer"),
        (None, {"format": 99}, "format 99, but this version reads format 1"),
        (None, {"model": 5}, "does not describe a model"),
    ):
        change_config(saved, part, **changes)
        with pytest.raises(CheckpointError) as refused:
            load_model(saved)
        assert message in str(refused.value) and str(saved / "config.json") in str(refused.value)
        (saved / "config.json").write_text(original)
    for text in ("", "{", "[]", "{}", original.replace('"frames"', '"fames"'), original.replace('"task"', '"tusk"')):
        (saved / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="config.json"):
            load_model(saved)
    (saved / "config.json").write_text(original.replace('"pretrain"', '"pretraining"'))
    with pytest.raises(ValueError, match="unknown task 'pretraining' .did you mean 'pretrain'"):
        load_model(saved)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(saved):
    Tokenizer.train(["abcdefghij klmnopqrst"], 60).save(saved)
    with pytest.raises(CheckpointError, match="the tokenizer has 60 tokens, but the model has only 29"):
        load_model(saved)


# ---- the checkpoints of a run ----------------------------------------------------------------------------------------


def save(run: Path, step: int, model: MPLUG2, keep: int = 2) -> Path:
    return save_checkpoint(run, f"step_{step:07d}", model, TOKENIZER, PREPROCESS, {"step": step}, keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_last_is_the_newest_and_older_ones_are_removed(tmp_path):
    for step in (9, 10, 100):
        model = make_model(seed=step)
        folder = save(tmp_path, step, model)
        assert folder == tmp_path / f"step_{step:07d}"
        assert os.readlink(tmp_path / "last") == folder.name
        assert_same_weights(load_model(tmp_path / "last")[0], model)
        assert load_training(tmp_path / "last") == {"step": step}
    assert names(tmp_path) == ["last", "step_0000010", "step_0000100"]
    save(tmp_path, 100, make_model(seed=1), keep=1)  # the same step again
    assert names(tmp_path) == ["last", "step_0000100"]
    assert_same_weights(load_model(tmp_path / "last")[0], make_model(seed=1))
    save(tmp_path, 7, model, keep=5)
    assert len(names(tmp_path)) == 3


def test_the_checkpoint_just_written_is_kept_even_if_others_have_later_steps(tmp_path):
    for step, keep in ((20, 2), (30, 2), (21, 1)):
        save(tmp_path, step, make_model(seed=step), keep)
    assert names(tmp_path) == ["last", "step_0000021"]
    assert load_training(tmp_path / "last") == {"step": 21}


@pytest.mark.parametrize("error", [RuntimeError("connection closed by peer"), MemoryError()])
def test_advice_about_the_disk_is_given_only_if_the_disk_is_the_problem(tmp_path, monkeypatch, error):
    save(tmp_path, 1, make_model(seed=1))
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(CheckpointError) as refused:
        save(tmp_path, 2, make_model(seed=2))
    cause = str(error) or "MemoryError"
    assert str(refused.value).endswith(
        f"step_0000002 could not be written ({cause}); the previous one, step_0000001, is intact")
    assert names(tmp_path) == ["last", "step_0000001"]


def test_the_error_of_a_full_disk_is_not_replaced_by_that_of_torch(tmp_path):
    class FullDisk(HashingWriter):
        def write(self, data: bytes) -> int:
            if self.tell() + len(data) > 1000:
                raise OSError("no space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="no space left"), FullDisk(tmp_path / "file") as file:
        torch.save(torch.zeros(1000), file)


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    save(tmp_path, 1, make_model(seed=1))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(CheckpointError) as refused:
            save(tmp_path, 2, make_model(seed=2))
    assert "step_0000002 could not be written (no space left on device)" in str(refused.value)
    assert "; the previous one, step_0000001, is intact. Free some disk space" in str(refused.value)
    assert names(tmp_path) == ["last", "step_0000001"]
    assert_same_weights(load_model(tmp_path / "last")[0], make_model(seed=1))


def test_the_state_of_a_run_is_hashed_while_it_is_written(tmp_path, monkeypatch):
    """It is two thirds of a checkpoint, and is not read again."""
    read = []
    monkeypatch.setattr(checkpoint, "sha256", lambda path: read.append(path.name) or sha256(path))
    folder = save(tmp_path, 1, make_model())
    assert sorted(read) == ["config.json", "model.safetensors", "tokenizer.json"]
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files == {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
                     for name in (*read, "training.pt")}


def test_leftovers_of_an_earlier_attempt_do_not_get_into_a_checkpoint(tmp_path):
    save(tmp_path, 1, make_model(seed=1))
    (tmp_path / ".step_0000002.part").mkdir()
    (tmp_path / ".step_0000002.part" / "debris").write_text("of an earlier attempt")
    (tmp_path / ".last.part").symlink_to("nowhere")
    save(tmp_path, 2, make_model(seed=2))
    assert names(tmp_path) == ["last", "step_0000001", "step_0000002"]
    assert "debris" not in names(tmp_path / "last")
    assert_same_weights(load_model(tmp_path / "last")[0], make_model(seed=2))


def test_without_symbolic_links_last_is_a_text_file(tmp_path, monkeypatch):
    """As on exFAT."""
    monkeypatch.setattr(Path, "symlink_to", lambda *_, **__: (_ for _ in ()).throw(OSError("not permitted")))
    for step in (1, 2):
        save(tmp_path, step, make_model(seed=step))
    assert (tmp_path / "last").read_text() == "step_0000002\n"
    assert real_folder(tmp_path / "last") == tmp_path / "step_0000002"


def test_a_run_is_resumed_with_the_same_records_only():
    """Their names and sizes count, not where they lie; checkpoints of older versions have none."""
    files = {"video": [("video_caption.train.jsonl", 10), ("video_qa.train.jsonl", 2000)]}
    check_files(files, {"video": files["video"][::-1]})
    check_files(None, files)
    with pytest.raises(CheckpointError, match=r"other records: video_qa.train.jsonl \(2,000 bytes\); a resumed run"):
        check_files(files, {"video": [files["video"][0], ("video_qa.train.jsonl", 2001)]})
    with pytest.raises(CheckpointError, match="other records: fewer files;"):
        check_files({"video": files["video"][:1]}, files)


def test_the_state_of_a_run_cannot_run_code(tmp_path):
    """Only tensors, numbers and texts are read: no object of a class that a file names."""
    save_checkpoint(tmp_path, "step_0000001", make_model(), TOKENIZER, PREPROCESS, {"step": 1, "path": tmp_path}, 1)
    with pytest.raises(pickle.UnpicklingError):
        load_training(tmp_path / "last")


def test_a_checkpoint_that_was_moved_aside_is_moved_back_unless_the_new_one_has_its_name(tmp_path):
    for name in (".step_0000001.old", ".step_0000002.old", "step_0000002", ".step_0000003.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clean_partial(tmp_path)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {
        "step_0000001": ".step_0000001.old", "step_0000002": "step_0000002"}


@pytest.fixture
def journal(monkeypatch) -> list[tuple]:
    """What happens to files from now on, in order: inodes that are flushed, renames by name, and folders removed."""
    calls, flush, remove = [], os.fsync, shutil.rmtree
    move = {name: getattr(os, name) for name in ("rename", "replace")}
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(("flush", os.fstat(handle).st_ino)), flush(handle)))
    for name in move:
        def note_and_move(source, target, name=name) -> None:
            calls.append(("rename", Path(source).name, Path(target).name))
            move[name](source, target)

        monkeypatch.setattr(os, name, note_and_move)

    def remove_folder(path, *given, **how) -> None:
        if Path(path).exists():
            calls.append(("remove", Path(path).name))
        remove(path, *given, **how)

    monkeypatch.setattr(shutil, "rmtree", remove_folder)
    return calls


def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_its_name_before_another_is_removed(tmp_path, journal):
    """So a power failure at any moment leaves a complete one. The second one replaces a checkpoint of its step."""
    for step in (1, 2, 2):
        del journal[:]
        folder = save(tmp_path, step, make_model("video_caption"), keep=1)
        named = journal.index(("rename", f".{folder.name}.part", folder.name))
        for path in (*folder.iterdir(), folder):
            assert ("flush", path.stat().st_ino) in journal[:named], path.name
        pointed = journal.index(("rename", ".last.part", "last"))
        assert named < pointed < journal.index(("flush", tmp_path.stat().st_ino))
        removed = [number for number, call in enumerate(journal) if call[0] == "remove"]
        assert len(removed) == (step > 1) and all(journal[number - 1][0] == "flush" for number in removed)


def test_a_score_is_on_disk_before_it_replaces_the_manifest(tmp_path, journal):
    folder = save(tmp_path, 1, make_model("video_caption"))
    del journal[:]
    record_score(tmp_path, folder.name, 0.5, keep=2)
    assert journal == [("flush", (folder / "manifest.json").stat().st_ino),
                       ("rename", "manifest.part", "manifest.json"), ("rename", ".best.part", "best")]


def run_until_killed(action: Callable[[], object], moment: int) -> bool:
    """Run `action` in a child process that kills itself at its `moment`-th file operation, if it gets that far.

    Returns whether it did.
    """
    child = os.fork()
    if child == 0:
        count, flush = 0, os.fsync

        def count_operation(*_) -> None:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = lambda handle: (count_operation(), flush(handle))
        on_file = ("open", "os.", "shutil.")
        sys.addaudithook(lambda event, _: count_operation() if event.startswith(on_file) else 0)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 1])
def test_a_kill_at_any_moment_of_saving_leaves_a_complete_checkpoint(tmp_path, step):
    """A real SIGKILL at every file operation in turn, also where the same step is saved again."""
    old, new, moment, seen = make_model("video_caption", 1), make_model("video_caption", 2), 1, set()
    while True:
        run = tmp_path / str(moment)
        save(run, 1, old)
        killed = run_until_killed(partial(save, run, step, new, keep=1), moment)
        clean_partial(run)  # as a run does when it starts again
        found, saved = load_model(run / "last")[0], load_training(run / "last")
        is_new = found.decoder.head.bias.equal(new.decoder.head.bias)
        assert_same_weights(found, new if is_new else old)
        assert saved == {"step": step if is_new else 1}
        seen.add(is_new)
        if not killed:
            break
        save(run, 3, new, keep=1)  # nothing is in the way of the next one
        assert names(run) == ["last", "step_0000003"]
        moment += 1
    assert moment > 20 and seen == {False, True}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "training.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(tmp_path, name):
    for step in (1, 2, 3):
        save(tmp_path, step, make_model("video_caption", step), keep=3)
    path = tmp_path / "step_0000003" / name
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], bytes([content[0] ^ 1]) + content[1:], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        # The model itself needs neither training.pt nor a manifest: a model folder has none.
        loads = [load_model] if name not in ("training.pt", "manifest.json") else [load_training]
        loads += [load_model] if name == "manifest.json" and damaged is not None else []
        for load in loads:
            with pytest.raises(CheckpointError) as refused:
                load(tmp_path / "last")
            assert name in str(refused.value)
            if (damaged, name) != (None, "training.pt"):
                assert f"the checkpoint {tmp_path / 'last'} (step_0000003) is damaged: " in str(refused.value)
                assert "continue from the one before it with --resume --resume-from step_0000002" in str(refused.value)
        path.write_bytes(content)
    load_model(tmp_path / "last")
    (tmp_path / "step_0000002" / "model.safetensors").write_bytes(b"")
    path.write_bytes(content[1:])
    load = load_training if name == "training.pt" else load_model
    with pytest.raises(CheckpointError, match="--resume-from step_0000001"):
        load(tmp_path / "last")
    (tmp_path / "step_0000001" / "training.pt").unlink()
    with pytest.raises(CheckpointError, match="this run has no older checkpoint that is intact"):
        load(tmp_path / "last")


def test_the_best_is_kept_as_well_as_the_newest(tmp_path):
    scores = [(1, 0.2), (2, 0.7), (3, None), (4, 0.5), (5, None)]
    for step, score in scores:
        folder = save(tmp_path, step, make_model("video_caption", step))
        if score is not None:
            record_score(tmp_path, folder.name, score, keep=2)
        assert json.loads((folder / "manifest.json").read_text())["score"] == score
    assert names(tmp_path) == ["best", "last", "step_0000002", "step_0000004", "step_0000005"]
    assert os.readlink(tmp_path / "best") == "step_0000002"
    assert_same_weights(load_model(tmp_path / "best")[0], make_model("video_caption", 2))
    save(tmp_path, 6, make_model("video_caption"), keep=1)
    assert names(tmp_path) == ["best", "last", "step_0000002", "step_0000006"]  # until the new one has its score
    record_score(tmp_path, "step_0000006", 0.7, keep=1)
    assert names(tmp_path) == ["best", "last", "step_0000006"]
    load_training(tmp_path / "best")  # the manifest is still valid


@pytest.mark.slow
def test_a_kill_at_any_moment_of_scoring_leaves_a_complete_checkpoint(tmp_path):
    moment, seen = 1, set()
    while True:
        run = tmp_path / str(moment)
        for step in (1, 2):
            folder = save(run, step, make_model("video_caption", step))
            if step == 1:
                record_score(run, folder.name, 0.5, keep=2)
        killed = run_until_killed(partial(record_score, run, "step_0000002", 0.7, keep=1), moment)
        clean_partial(run)
        load_training(run / "last")
        load_training(run / "best")
        seen.add(os.readlink(run / "best"))
        if not killed:
            break
        save(run, 3, make_model("video_caption"), keep=1)
        record_score(run, "step_0000003", 0.9, keep=1)
        assert names(run) == ["best", "last", "step_0000003"]
        moment += 1
    assert moment > 5 and seen == {"step_0000001", "step_0000002"}


def test_the_training_state_is_saved_and_loaded(tmp_path):
    model = make_model("video_caption")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    memory = torch.randn(2, 3, 16)
    ids = torch.randint(29, (2, 5))
    for _ in range(2):
        model.decode(ids, ids > -1, memory).square().mean().backward()
        optimizer.step()
    training = {"step": 2, "optimizer": optimizer.state_dict(), "generators": [torch.get_rng_state()]}
    save_checkpoint(tmp_path, "step_0000002", model, TOKENIZER, PREPROCESS, training, 1)
    found = load_training(tmp_path / "last")
    assert found["step"] == 2 and found["generators"][0].equal(training["generators"][0])
    other = torch.optim.AdamW(model.parameters(), lr=0.2)
    other.load_state_dict(found["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    states = [optimizer.state[parameter] for parameter in model.decoder.parameters()]
    for state, parameter in zip(states, model.decoder.parameters()):
        assert other.state[parameter]["exp_avg"].equal(state["exp_avg"]) and state["exp_avg"].any()
