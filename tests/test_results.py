"""docs/results.json, the tables that docs/write_tables.py writes from it, and how a run is recorded in it."""

import json
import re
from datetime import date
from pathlib import Path

import pytest
from runs import FAST, MODEL, SIZES
from shown_commands import MARKDOWN, REPOSITORY

import mplug2
import tiny_data
import train
from docs import write_tables
from docs.write_tables import RESULTS, TABLES, dump, experiment, number
from mplug2.evaluation.data import EvalSplit
from mplug2.evaluation.evaluate import evaluate
from mplug2.tools import memory_plan
from mplug2.tools.communication import Collective
from tiny_data import write
from tiny_data.writer import VERSION

COMMITTED = json.loads(RESULTS.read_text(encoding="utf-8"))
EXPERIMENTS = COMMITTED["experiments"]
ABOUT = {"commit": "1a2b3c4", "machine": "2 CPU cores"}


# ---- what is committed ----------------------------------------------------------------------------------------------


def test_every_table_is_the_one_that_the_results_give():
    """Line counts may be off by a tenth (test_docs.py): a change of the code need not write the README again."""
    def comparable(text: str) -> str:
        return re.sub(r"(\.py\) \|) \d+ \|", r"\1 # |", text)

    written = write_tables.write_tables(COMMITTED, TABLES.read_text(encoding="utf-8"))
    assert {"README.md", "docs/evaluation.md", "docs/tasks.md", "tiny_data/pretrained/README.md"} <= set(written)
    for file, text in written.items():
        committed = (REPOSITORY / file).read_text(encoding="utf-8")
        assert comparable(text) == comparable(committed), f"{file}: change tables.txt, and run write_tables.py"


def test_every_marked_table_has_its_source():
    marked = {(path.relative_to(REPOSITORY).as_posix(), name) for path in MARKDOWN
              for name in re.findall(r"<!-- table: (.*?) -->", path.read_text(encoding="utf-8"))}
    assert marked == set(re.findall(r"^# (.+): (.+)$", TABLES.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_complete(name):
    entry = EXPERIMENTS[name]
    assert re.fullmatch("[0-9a-f]{7,}", entry["commit"]) and "core" in entry["machine"] and entry["metrics"]
    assert date.fromisoformat(entry["date"]) and (entry["commands"] or "no command" in entry["recorded"])
    assert not re.search(r"(^| )[~/]", " ".join(entry["commands"])), "a path that only exists on one machine"
    for value in entry["metrics"].values():
        if isinstance(value, list):
            assert len(value) == len(entry["seeds"])
        else:
            assert isinstance(value, float | int) or set(value) == {"mean", "std"} and len(entry["seeds"]) > 1
    shown = "".join([TABLES.read_text(encoding="utf-8"), *write_tables.pages().values()])
    assert f"{{{name} " in shown, "no table and no sentence shows it"


def test_the_number_of_parameters_is_that_of_the_default_model():
    """Exactly, and in millions where a reader wants two digits."""
    model = mplug2.load(REPOSITORY / "tiny_data" / "pretrained").model
    assert EXPERIMENTS["default"]["metrics"]["parameters"] == sum(value.numel() for value in model.parameters())
    for file in "README.md", "mplug2/config.py":
        assert re.search(r"0\.74 (M|million) parameters", (REPOSITORY / file).read_text(encoding="utf-8"))


def test_the_file_is_written_in_one_way():
    assert dump(COMMITTED) == RESULTS.read_text(encoding="utf-8")
    assert dump({"a": {"metrics": {"b": [0.5, -1.0], "c": {"mean": 1, "std": 0}}, "seeds": [0], "tasks": ["[ 1"]}}) == (
        '{\n "a": {\n  "metrics": {\n   "b": [0.5, -1.0],\n   "c": {"mean": 1, "std": 0}\n  },\n  "seeds": [0],\n'
        '  "tasks": [\n   "[ 1"\n  ]\n }\n}\n')


def test_every_figure_of_the_docs_has_commands_that_make_it():
    shown = {(path.parent / file).resolve().relative_to(REPOSITORY).as_posix() for path in MARKDOWN
             for file in re.findall(r'(?:!\[[^\]]*\]\(|src=")([^)":]+)', path.read_text(encoding="utf-8"))}
    assert shown == set(COMMITTED["figures"]) and all(entry["commands"] for entry in COMMITTED["figures"].values())


def test_the_curves_belong_to_the_shipped_checkpoint():
    """Its weights are in half precision, those of the log are not."""
    last = json.loads((REPOSITORY / "docs" / "metrics.jsonl").read_text().splitlines()[-1])
    shipped = EXPERIMENTS["shipped"]["metrics"]
    compared = [name for name in last if name in shipped and not name.endswith("cider")]
    assert len(compared) > 25
    assert {name: last[name] for name in compared} == pytest.approx(
        {name: shipped[name][0] for name in compared}, abs=0.005)


@pytest.mark.slow
def test_the_shipped_checkpoint_scores_what_is_recorded():
    """On the tasks of images, which take a few seconds. Another machine may round another way."""
    predictor = mplug2.load(REPOSITORY / "tiny_data" / "pretrained")
    found = evaluate(predictor, EvalSplit(tiny_data.ensure(), "test"), ["image_caption", "image_qa"]).metrics
    found = {f"test/{name}": value for name, value in found.items() if not name.endswith("cider")}
    recorded = EXPERIMENTS["shipped"]["metrics"]
    assert len(found) > 8 and {name: recorded[name][0] for name in found} == pytest.approx(found, abs=0.015)


@pytest.mark.slow
def test_the_chance_levels_are_those_of_the_tiny_world():
    assert EXPERIMENTS["chance"]["metrics"] == pytest.approx(write_tables.chance(), abs=1e-6)


def test_the_plans_are_read_from_what_the_planner_prints(monkeypatch):
    """Of the tiny preset: the real planner would take minutes for the large one."""
    monkeypatch.setattr(memory_plan, "cost", lambda *_, **__: memory_plan.Cost(4e12, 2**30, 2**30))
    monkeypatch.setattr(memory_plan, "step_collectives", lambda *_: [
        Collective(purpose, "all_gather", 10**10, 16, 2)
        for purpose in ("gradients, between nodes", "Muon", "checkpoint")])
    found = write_tables.plan(["python -m mplug2.tools.memory_plan --gpus 16 --batch-size 16"])
    assert set(found) == {f"16/{way}/{name}" for way in ("DDP", "FSDP2", "HSDP") for name in (
        "GiB", "passes", "products", "exposed", "step", "rate", "communication", "gradients,_between_nodes", "Muon",
        "checkpoint")}
    seconds = Collective("", "all_gather", 10**10, 16, 2).seconds
    assert found["16/HSDP/checkpoint"] == pytest.approx(1e3 * seconds, abs=0.05)
    assert found["16/DDP/Muon"] == pytest.approx(500 * seconds, abs=0.1) and found["16/DDP/GiB"] == 1.02
    assert {"64/HSDP/step", "512/FSDP2/Muon", "8/DDP/GiB"} <= set(EXPERIMENTS["plan"]["metrics"])


# ---- a number of a table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, metric, spec, expected", [
    ("one", "qa_order", None, "50.0 ± 10.0"),  # the deviation of a sample: n - 1
    ("one", "combos/qa_order", None, "25.0"),
    ("one", "caption_cider", ".2f", "4.00 ± 1.41"),
    ("one", "parameters", ",", "743,113"),
    ("other", "qa_order", None, "40.0 ± 10.0"),
    ("other", "caption_exact", None, "12.3 ± 0.4"),
    ("one - other", "qa_order", None, "+10.0 ± 20.0"),
    ("steps", "video_qa", None, "100"),
])
def test_a_number_is_formatted(source, metric, spec, expected):
    experiments = {
        "one": {"metrics": {"test/qa_order": [0.4, 0.5, 0.6], "combos/qa_order": [0.25], "parameters": 743113,
                            "test/caption_cider": [3.0, 5.0]}},
        "other": {"metrics": {"test/qa_order": [0.5, 0.4, 0.3],
                              "test/caption_exact": {"mean": 0.123, "std": 0.004}}},
    }
    assert number(experiments, source, metric, spec) == expected


def test_a_number_that_is_not_there_is_named():
    experiments = {"one": {"metrics": {"test/a": [0.1]}}, "other": {"metrics": {"test/a": {"mean": 0.1, "std": 0.1}}}}
    for source, metric in (("one", "b"), ("another", "a")):
        with pytest.raises(ValueError, match=f"{source} {metric}: not in results.json"):
            number(experiments, source, metric, None)
    experiments |= {"third": {"seeds": [0], "metrics": {"test/a": [0.1]}}}
    for other in "other", "third":
        with pytest.raises(ValueError, match=f"one - {other}: expected values of the same seeds"):
            number(experiments, f"one - {other}", "a", None)


def test_a_missing_marker_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(write_tables, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("text\n<!-- table: x -->\n| old |\n\nmore\n| another |\n")
    tables = "# page.md: x\n\n| a | {one b} |\n|---|\n"
    results = {"experiments": {"one": {"metrics": {"test/b": [0.5]}}}}
    assert write_tables.write_tables(results, tables) == {
        "page.md": "text\n<!-- table: x -->\n| a | 50.0 |\n|---|\n\nmore\n| another |\n"}
    with pytest.raises(ValueError, match="page.md: expected one line '<!-- table: y -->', found 0"):
        write_tables.write_tables(results, tables.replace(": x", ": y"))


def test_a_number_within_a_sentence_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(write_tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(
        "<!-- table: x -->\n| old |\nIt took 2 runs: 7<!-- {one b} --> % in 1,234.5<!-- {one n:,} -->, not 12.\n"
        "0.0 ± 0.0<!-- {two b} -->, -1<!-- {steps video_qa} -->.\n")
    (tmp_path / "docs" / "other.md").write_text("3 % of <!-- a comment --> 4")
    results = {"experiments": {"one": {"metrics": {"test/b": [0.5], "n": 4321}},
                               "two": {"metrics": {"test/b": [0.25, 0.25]}}}}
    written = write_tables.write_tables(results, "# docs/page.md: x\n\n| {one b} |\n")
    assert written == {"docs/page.md": (
        "<!-- table: x -->\n| 50.0 |\nIt took 2 runs: 50.0<!-- {one b} --> % in 4,321<!-- {one n:,} -->, not 12.\n"
        "25.0 ± 0.0<!-- {two b} -->, 100<!-- {steps video_qa} -->.\n")}


# ---- runs to results ------------------------------------------------------------------------------------------------


def finished(folder: Path, command: str, metrics: dict, seed: int = 0, task: str = "pretrain", step: int = 8,
             evaluated: dict | None = None) -> Path:
    """The files of a run of eight steps that `add` reads."""
    (folder / "last" / "eval").mkdir(parents=True)
    settings = {"train": {"seed": seed, "task": task, "preset": "tiny", "max_steps": 8}, "parameters": 7,
                "commands": [command]}
    (folder / "settings.json").write_text(json.dumps(settings))
    lines = [{"step": 4, "val/qa_order": 0.1}, {"step": 8, "loss/vtc": 1.0}, {"step": step, **metrics}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        (folder / "last" / "eval" / "metrics.json").write_text(json.dumps(evaluated))
    return folder


def test_runs_with_several_seeds_are_one_experiment(tmp_path):
    runs = [finished(tmp_path / f"run{seed}", f"python train.py --frames 3 --name run{seed} --out x{flag}",
                     {"test/qa_order": value, "standard_errors": {"test/qa_order": 0.1}}, seed)
            for seed, flag, value in ((2, " --seed 2", 0.25), (0, "", 0.75))]
    entry = experiment(runs, {}, **ABOUT)
    assert entry == {
        "commands": ["python train.py --frames 3 --seed {seed}"], **ABOUT, "date": str(date.today()), "seeds": [0, 2],
        "metrics": {"parameters": 7, "test/qa_order": [0.75, 0.25]},
    }


def test_an_evaluation_by_eval_py_comes_first(tmp_path):
    run = finished(tmp_path / "run", "torchrun train.py --name x", {"test/qa_order": 0.5},
                   evaluated={"test/qa_order": 0.25, "combos/qa_order": 1 / 3, "records": {}})
    entry = experiment([run], {}, **ABOUT)
    assert entry["commands"] == ["torchrun train.py", "python eval.py --checkpoint runs/tiny/last"]
    assert entry["metrics"] == {"parameters": 7, "test/qa_order": [0.25], "combos/qa_order": [0.333333]}


def test_runs_of_several_tasks_are_one_experiment(tmp_path):
    runs = [finished(tmp_path / task, f"python train.py --task {task} --init tiny_data/pretrained",
                     {f"test/{metric}": 0.5}, task=task, evaluated={f"test/{metric}": 0.75})
            for task, metric in (("video_qa", "qa_order"), ("grounding", "grounding_accuracy"))]
    entry = experiment(runs, {}, **ABOUT)
    assert entry["commands"] == ["python train.py --task {task} --init tiny_data/pretrained",
                                 "python eval.py --checkpoint runs/{task}/last"]
    assert entry["tasks"] == ["video_qa", "grounding"] and entry["seeds"] == [0]
    assert entry["metrics"] == {"test/qa_order": [0.75], "test/grounding_accuracy": [0.75]}
    alone = experiment(runs[:1], {}, **ABOUT)
    assert alone["commands"] == ["python train.py --task video_qa --init tiny_data/pretrained",
                                 "python eval.py --checkpoint runs/video_qa/last"] and "tasks" not in alone


def test_an_exported_model_keeps_its_commands(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text('{"test/qa_order": 0.5, "standard_errors": {}}')
    entry = experiment([tmp_path], {"commands": ["how it was made"], "seeds": [3]}, **ABOUT)
    assert entry["commands"] == ["how it was made"] and entry["metrics"] == {"test/qa_order": [0.5]}


@pytest.mark.parametrize("second, message", [
    ({"seed": 1, "command": "python train.py --seed 1 --frames 3"}, "differ in more than seed and task"),
    ({"seed": 0}, r"test/qa_order: found in 2 runs, expected one for each of the seeds \[0\]"),
    ({"seed": 1, "metrics": {"test/qa_digit": 0.5}}, "test/qa_order: found in 1 runs"),
    ({"seed": 1, "step": 4}, "second: no evaluation on test after the last step"),
    ({"seed": 1, "metrics": {"val/qa_order": 0.5}}, "second: no evaluation on test after the last step"),
])
def test_runs_that_are_no_experiment_are_refused(second, message, tmp_path):
    defaults = {"command": "python train.py", "metrics": {"test/qa_order": 0.5}}
    runs = [finished(tmp_path / "first", **defaults), finished(tmp_path / "second", **defaults | second)]
    with pytest.raises(ValueError, match=message):
        experiment(runs, {}, **ABOUT)


@pytest.fixture
def copy(monkeypatch, tmp_path) -> Path:
    """A repository of its own for `write_tables.main`: one page with one table."""
    monkeypatch.setattr(write_tables, "ROOT", tmp_path)
    for name in ("RESULTS", "TABLES"):
        monkeypatch.setattr(write_tables, name, tmp_path / name)
    (tmp_path / "TABLES").write_text("# page.md: x\n\n| {one qa_order} | {one - other qa_order} |\n")
    (tmp_path / "page.md").write_text("<!-- table: x -->\n")
    metrics = {"test/qa_order": [0.5, 0.5]}
    (tmp_path / "RESULTS").write_text(dump({"experiments": {
        "one": {"metrics": {}}, "other": {"seeds": [4, 5], "metrics": metrics}, "one - other": {"metrics": metrics}}}))
    return tmp_path


def test_add_writes_the_entry_and_the_tables(copy):
    runs = [finished(copy / f"run{seed}", "python train.py", {"test/qa_order": seed / 10}, seed) for seed in (4, 5)]
    write_tables.main(["add", "one", *map(str, runs), "--commit", "abcdef0"])
    recorded = json.loads((copy / "RESULTS").read_text())["experiments"]
    assert recorded["one"]["commit"] == "abcdef0" and "core" in recorded["one"]["machine"]
    assert "one - other" not in recorded, "a difference that was recorded by hand does not outlive its runs"
    assert (copy / "page.md").read_text() == "<!-- table: x -->\n| 45.0 ± 7.1 | -5.0 ± 7.1 |\n"


def test_a_table_that_waits_for_other_runs_is_named(copy, capsys):
    run = str(finished(copy / "run", "python train.py", {"test/qa_digit": 0.5}))
    with pytest.raises(SystemExit):
        write_tables.main(["add", "one", run, "--commit", "abcdef0"])
    assert "results.json is written, the tables are not: one qa_order: not in results" in capsys.readouterr().err
    assert json.loads((copy / "RESULTS").read_text())["experiments"]["one"]["metrics"]["test/qa_digit"] == [0.5]


def test_results_of_code_that_is_not_committed_are_refused(copy, capsys):
    git = ["git", "-C", str(copy), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    run = str(finished(copy / "run", "python train.py", {"test/qa_order": 0.5}))
    (copy / "train.py").write_text("")
    for words in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "code"]):
        write_tables.subprocess.run([*git, *words], check=True)
    commit = write_tables.code_commit()
    for words in (["add", "page.md"], ["commit", "-qm", "a page"]):  # does not change what the code computes
        write_tables.subprocess.run([*git, *words], check=True)
    assert write_tables.code_commit() == commit and re.fullmatch("[0-9a-f]{7,}", commit)
    (copy / "train.py").write_text("changed")
    before = (copy / "RESULTS").read_text()
    with pytest.raises(SystemExit):
        write_tables.main(["add", "one", run])
    assert "train.py is changed and not committed" in capsys.readouterr().err
    assert (copy / "RESULTS").read_text() == before


def test_an_experiment_that_no_table_shows_is_refused(capsys):
    with pytest.raises(SystemExit):
        write_tables.main(["add", "defualt", "runs/tiny"])
    assert "no table shows defualt: name it in tables.txt first" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["add"], ["add", "default"], ["chance", "default", "runs/tiny"]])
def test_add_needs_a_name_and_runs(arguments, capsys):
    with pytest.raises(SystemExit):
        write_tables.main(arguments)
    assert "add needs the name of an experiment and the folders of its runs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run_is_recorded(copy, monkeypatch):
    write(copy / "cache" / f"tiny-v{VERSION}-seed0", seed=0, sizes=SIZES)
    monkeypatch.setenv("MPLUG2_CACHE", str(copy / "cache"))
    metrics = train.main([*MODEL, *FAST, "--max-steps", "2", "--out", str(copy)])
    entry = experiment([copy / "tiny"], {}, **ABOUT)
    assert entry["commands"] == [" ".join(["python train.py", *MODEL, *FAST, "--max-steps 2"])]
    assert entry["metrics"].pop("parameters") > 1000
    assert entry["metrics"] == {f"test/{name}": [pytest.approx(value, abs=1e-6)] for name, value in metrics.items()}
