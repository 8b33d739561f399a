"""Settings of a run: groups, defaults, the help that shows them, and settings.json of this and older versions."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from mplug2.config import PRESETS, ModelConfig
from mplug2.dataclass_tools import field_docs
from mplug2.tasks import TASKS
from mplug2.training import run_checkpoint
from mplug2.training.run_checkpoint import SaveSchedule
from mplug2.training.settings import (
    GROUPS,
    MAY_CHANGE,
    OLD_NAMES,
    OWNERS,
    PRECEDENCE,
    Settings,
    command_line,
    read_settings,
    resolve_settings,
    settings_parser,
    was_restarted,
    write_settings,
)


def write_run(settings: Settings) -> None:
    """The folder of a run with a checkpoint, as far as settings are concerned."""
    write_settings(settings, [], model=dataclasses.asdict(PRESETS["tiny"]()))
    checkpoint = settings.folder / "step_0000001"
    checkpoint.mkdir()
    (settings.folder / "last").symlink_to(checkpoint.name)


def test_no_two_settings_have_the_same_flag_and_there_are_at_most_94():
    names = [field.name for cls in (*(cls for cls, _ in GROUPS.values()), ModelConfig)
             for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) <= 94
    assert {*MAY_CHANGE, *PRECEDENCE, *PRECEDENCE.values(), *OLD_NAMES.values()} <= set(OWNERS)


def test_settings_can_be_flattened_and_grouped_again():
    flat = {"seed": 3, "frames": 8, "vtc_weight": 0.5, "lr": 1.0, "parallel": "fsdp"}
    settings = Settings.from_flat(flat, {"width": 8})
    assert (settings.run.seed, settings.data.frames, settings.loss.vtc_weight) == (3, 8, 0.5)
    assert (settings.optimizer.lr, settings.parallel.parallel, settings.model) == (1.0, "fsdp", {"width": 8})
    assert Settings.from_flat(settings.flat(), settings.model) == settings
    changed = settings.replace(frames=2, seed=4)
    assert (changed.data.frames, changed.run.seed, changed.model) == (2, 4, {"width": 8}) and settings.data.frames == 8
    with pytest.raises(ValueError, match=r"unknown setting 'vtc_wieght' \(did you mean 'vtc_weight'\?\)"):
        Settings.from_flat({"vtc_wieght": 1.0})


# ---- help ------------------------------------------------------------------------------------------------------------


def shown_defaults(capsys, *arguments: str) -> dict[str, str]:
    """The default of each flag, as `train.py --help` shows it."""
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    flags = re.split(r" (?=--(?:\[no-\])?[a-z][a-z0-9-]+ )", text.partition("run (where")[2])
    return {flag.split()[0].replace("[no-]", ""): default[1] for flag in flags
            if (default := re.search(r"\(default: ([^)]*)\)", flag))}


@pytest.mark.parametrize("arguments, expected", [
    ("", {"--max-steps": "1500", "--lr": "0.0025", "--width": "64", "--vision-layers": "3", "--task": "pretrain"}),
    ("--task video_qa", {"--max-steps": "100", "--lr": "0.001", "--task": "video_qa"}),
    ("--task text_classification", {"--max-steps": "100", "--lr": "0.001"}),
    ("--task visual_entailment,grounding", {"--max-steps": "700", "--lr": "0.001"}),
    ("--preset large --width 2048", {"--vision-layers": "24", "--patch-size": "14", "--width": "2048"}),
    ("--preset large", {"--epochs": "30", "--max-steps": None, "--min-lr": "2e-06", "--min-lr-ratio": None}),
    ("--preset large --max-steps 9", {"--epochs": None, "--max-steps": "9", "--lr": "5e-05"}),
    ("--recipe msrvtt_caption", {"--epochs": "10", "--lr": "2e-05", "--frames": "16", "--task": "video_caption"}),
])
def test_help_shows_the_defaults_of_the_chosen_task_preset_and_recipe(capsys, arguments, expected):
    shown = shown_defaults(capsys, *arguments.split())
    assert {flag: shown.get(flag) for flag in expected} == expected


def test_the_groups_of_the_help_have_titles_and_list_the_tasks():
    groups = settings_parser(train.__doc__, "train.py").format_help().split("\n\n")[-8:]
    titles = [group.split()[0].strip(":") for group in groups]
    assert titles == ["run", "data", "batches", "losses", "optimizer", "parallelism", "model", "model"]
    assert all(task in groups[1] for task in TASKS)
    assert all(len(doc) > 15 for cls, _ in GROUPS.values() for doc in field_docs(cls).values())


# ---- pairs of which one is given -------------------------------------------------------------------------------------


def test_one_of_a_pair_replaces_the_default_or_the_recipe_s_value_of_the_other(tmp_path):
    def resolved(**given) -> Settings:
        return resolve_settings({"out": str(tmp_path), **given}, {})

    assert resolved(task="video_qa", epochs=2.5).data.epochs == 2.5
    recipe = dict(recipe="msrvtt_caption", data="d", preset="tiny")
    assert resolved(**recipe).data.epochs == 10 and resolved(**recipe, max_steps=7).data.epochs is None
    assert resolved(min_lr=1e-6).optimizer.floor(1e-3) == pytest.approx(1e-3)
    assert resolved(min_lr_ratio=0.5).optimizer.floor(1e-3) == 0.5
    for pair in PRECEDENCE.items():
        with pytest.raises(ValueError, match="give one of the two"):
            resolved(**dict.fromkeys(pair, 1))


# ---- settings.json ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_its_settings_and_the_flags_that_may_change(tmp_path):
    flags = {"out": str(tmp_path), "task": "video_qa,image_qa"}
    started = resolve_settings({**flags, "epochs": 3.0, "seed": 5}, {})
    write_run(started.replace(max_steps=77, epochs=None))
    resumed = resolve_settings({**flags, "resume": True, "log_every": 1}, {})
    assert resumed == started.replace(max_steps=77, epochs=None, resume=True, log_every=1)
    assert resolve_settings({**flags, "resume": True, "epochs": 4.0}, {}).data.epochs == 4
    assert resolve_settings({**flags, "resume": True, "task": "video_qa, image_qa"}, {}).data == resumed.data
    with pytest.raises(ValueError, match="seed, width: a resumed run keeps its settings"):
        resolve_settings({**flags, "resume": True, "seed": 6}, {"width": 32})


def test_a_run_that_went_back_to_a_checkpoint_does_not_go_back_to_it_again(tmp_path):
    write_run(Settings.from_flat({"out": str(tmp_path), "resume": True, "resume_from": "step_0000001"}))
    resumed = resolve_settings({"out": str(tmp_path), "resume": True}, {})
    assert resumed.run.resume_from == "" and resumed.checkpoint == tmp_path / "tiny" / "last"


def test_a_run_whose_folder_was_moved_continues_where_it_is(tmp_path, monkeypatch):
    """Into the default folder, where the command to resume it needs neither --out nor --name."""
    monkeypatch.chdir(tmp_path)
    write_run(Settings.from_flat({"out": "elsewhere", "name": "mine"}))
    Path("elsewhere").rename("runs")
    Path("runs/mine").rename("runs/tiny")
    assert resolve_settings({"resume": True}, {}).folder == Path("runs/tiny")


def test_settings_of_runs_with_the_old_names_can_be_resumed(tmp_path):
    """As they were written before the flags were renamed, when min_lr and warmup were fractions."""
    settings = Settings.from_flat({"out": str(tmp_path), "task": "pretrain,video_qa", "name": "old"})
    write_run(settings)
    file = settings.folder / "settings.json"
    contents = json.loads(file.read_text())
    new = {"accumulation_steps": 2, "keep_checkpoints": 7, "questions_per_sample": 1, "queue_size": 64,
           "distill_weight": 0.4, "hflip": True, "cpu_offload": True, "ema_decay": 0.9, "min_lr_ratio": 0.05,
           "warmup_ratio": 0.2, "augment": "finetune", "parallel": "fsdp", "lr": 0.5}
    old_name = {name: old for old, name in OLD_NAMES.items()}
    flat = {name: value for name, value in {**settings.flat(), **new}.items() if name not in ("min_lr", "warmup_steps")}
    contents["train"] = {**{old_name.get(name, name): value for name, value in flat.items()}, "epochs": 0.0}
    assert contents["train"]["min_lr"] == 0.05 and contents["train"]["momentum"] == 0.9
    file.write_text(json.dumps(contents))
    expected = settings.replace(**new, resume=True)
    assert resolve_settings({"out": str(tmp_path), "name": "old", "resume": True}, {}) == expected


@pytest.mark.parametrize("text, message", [
    ("{", "settings.json: not a JSON file ("),
    ("[]", "settings.json: expected a JSON object, found list"),
    ("{}", "settings.json: expected the settings of a run, with the parts 'train' and 'model'"),
    ('{"train": {"lrr": 1}, "model": {}}', "settings.json: unknown setting 'lrr' (did you mean 'lr'?)"),
    ('{"train": {"lr": -1}, "model": {}}', "settings.json: lr=-1: expected a number of at least 0"),
    ('{"train": {"lr": "x"}, "model": {}}', "settings.json: "),
])
def test_a_settings_file_that_cannot_be_read_is_refused_in_one_line(capsys, tmp_path, text, message):
    write_run(Settings.from_flat({"out": str(tmp_path)}))
    (tmp_path / "tiny" / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings(tmp_path / "tiny")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--resume", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_the_commands_of_a_run_are_kept_and_a_restart_is_recognized(tmp_path, monkeypatch):
    settings = Settings.from_flat({"out": str(tmp_path)})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "web")
    for arguments in (["--name", "a b"], [], ["--name", "a b"]):
        write_settings(settings, arguments, model={})
    commands = json.loads((settings.folder / "settings.json").read_text())["commands"]
    assert commands == ["python train.py --name 'a b'", "python train.py"]
    assert was_restarted(settings.folder)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert not was_restarted(settings.folder) and not was_restarted(tmp_path / "nowhere")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert was_restarted(settings.folder)


def test_the_command_of_a_run_can_be_typed_again(monkeypatch):
    assert command_line(["--data", "a b", "--max-steps", 3]) == "python train.py --data 'a b' --max-steps 3"
    for world, local, expected in ((4, 4, "torchrun --nproc-per-node 4 train.py"), (1, 1, "torchrun train.py"),
                                   (8, 4, "torchrun --nnodes 2 --nproc-per-node 4 train.py")):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert command_line([]) == expected


# ---- steps or minutes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, due", [
    (3, [3, 6]), ("3", [3, 6]), ("1min", [2, 4, 6]), ("1.5min", [2, 4, 6]), ("0.25min", [1, 2, 3, 4, 5, 6]),
    ("2min", [3, 6])])
def test_a_checkpoint_is_due_after_steps_or_minutes(monkeypatch, value, due):
    """A step takes 50 seconds. Minutes count from the newest checkpoint."""
    now, found = [1000.0], []
    monkeypatch.setattr(run_checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    schedule = SaveSchedule(value)
    for step in range(1, 7):
        now[0] += 50
        if schedule.due(step):
            found.append(step)
            schedule.restart()
    assert found == due


@pytest.mark.parametrize("value", [
    0, -1, 1.5, "", "15m", "0min", "0.0min", "-1min", "min", "nanmin", "15 minutes", "15min "])
def test_what_is_neither_steps_nor_minutes_is_refused(value):
    with pytest.raises(ValueError, match=f"save_every={re.escape(repr(value))}: expected a number of steps, such as "
                                         "500, or of minutes, such as 15min"):
        Settings.from_flat({"save_every": value})


def test_settings_keep_the_steps_or_minutes_that_were_given(tmp_path):
    for given, value in (("500", 500), ("15min", "15min")):
        settings = train.parse_settings("", "train.py", ["--out", str(tmp_path), "--save-every", given])
        write_run(settings.replace(name=given))
        assert json.loads((tmp_path / given / "settings.json").read_text())["train"]["save_every"] == value
        resumed = {"out": str(tmp_path), "name": given, "resume": True}
        assert resolve_settings(resumed, {}).run.save_every == value
        assert resolve_settings({**resumed, "save_every": "2min"}, {}).run.save_every == "2min"


# ---- form and losses -------------------------------------------------------------------------------------------------


def test_form_sets_its_model_settings_and_leaves_others(tmp_path):
    out = {"out": str(tmp_path)}
    assert resolve_settings(out, {}).model_config() == PRESETS["tiny"]()
    assert resolve_settings({**out, "form": "released"}, {"heads": 1}).model_config() == PRESETS["tiny"](heads=1)
    figure = resolve_settings({**out, "form": "figure"}, {"latents": 3, "universal_readout": "figure"})
    assert figure.model_config() == PRESETS["tiny"](
        latents=3, local_temporal_placement="figure", local_temporal_groups=2, temporal_on_images=False,
        class_token="figure", universal_readout="figure",
    )
    groups = resolve_settings({**out, "form": "figure"}, {"local_temporal_groups": 8})
    assert groups.model_config().local_temporal_groups == 8


def test_form_and_a_setting_at_odds_with_it_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--form", "figure", "--class-token", "released"])
    assert capsys.readouterr().err == ("train.py: class_token='released' contradicts form='figure', which sets it to "
                                       "'figure': give only one of them (help: train.py --help)\n")


@pytest.mark.parametrize("flags, message", [
    ({"mlm_weight": 0}, "batches of text would train nothing, .* or add --text-weight 0"),
    ({"task": "video_caption", "caption_weight": 0}, "batches of video_caption would train nothing, .* raise one of"),
    ({"task": "image_retrieval", "vtc_weight": 0, "vtm_weight": 0}, "batches of image_retrieval would train nothing"),
])
def test_batches_whose_losses_all_have_weight_0_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_flat(flags)


def test_losses_of_weight_0_are_skipped():
    assert Settings().loss.skipped == frozenset()
    assert Settings.from_flat({"mlm_weight": 0, "text_weight": 0}).loss.skipped == {"mlm"}
    both = Settings.from_flat({"task": "image_retrieval", "vtm_weight": 0, "answer_weight": 0})
    assert both.loss.skipped == {"vtm", "answer"}
    captions = Settings.from_flat({"task": "video_caption", "caption_weight": 0, "self_critical": True})
    assert captions.loss.skipped == {"caption"}


def test_a_folder_that_cannot_be_created_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    settings = train.parse_settings("", "train.py", ["--out", str(tmp_path / "file")])
    with pytest.raises(ValueError, match="file/tiny cannot be created .*: choose another one with --out"):
        write_settings(settings, [])
