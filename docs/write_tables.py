"""Writes the tables of README and docs that hold measured numbers, from docs/results.json.

    python docs/write_tables.py                             # after a change of results.json or tables.txt
    python docs/write_tables.py add default RUN RUN RUN     # record finished runs as one experiment, one for each seed
    python docs/write_tables.py add fine-tuned RUN RUN      # or each task; --commit HASH if the code changed since
    python docs/write_tables.py chance                      # the chance levels of the tiny world
    python docs/write_tables.py plan                        # what the planner says about 8, 64 and 512 GPUs; minutes

docs/tables.txt says where each number of a table comes from; a number within a sentence has this behind it, in a
comment: 93.0<!-- {shipped caption_exact} -->. `add` takes the commands of a run from its settings.json,
and its metrics from last/eval/metrics.json, which eval.py writes, or else from the evaluation at its end. An exported
model has no settings.json: its experiment keeps the commands that it has.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
from datetime import date
from pathlib import Path
from statistics import fmean, stdev

from mplug2.tasks import TASKS

ROOT = Path(__file__).parents[1]
RESULTS, TABLES = ROOT / "docs" / "results.json", ROOT / "docs" / "tables.txt"
CODE = ("mplug2/*.py", "tiny_data/*.py", "train.py", "eval.py")
"""What a result depends on."""
INLINE = re.compile(r"[-+]?\d[\d,.]*(?<=\d)(?: ± [\d.]+)?(?=<!-- \{(.+?) ([^ }:]+)(?::([^}]*))?\} -->)")
"""A number within a sentence, and the comment that says where it comes from."""
Value = float | list[float] | dict[str, float]
"""A metric: one number, one for each seed, or only its mean and standard deviation ("mean", "std")."""


# ---- from results to tables -----------------------------------------------------------------------------------------


def write_tables(results: dict, tables: str) -> dict[str, str]:
    """The new text of each file that has measured numbers. ValueError for a number or a table that does not exist."""
    texts: dict[str, str] = {}
    for file, name, rows in re.findall(r"^# (.+): (.+)\n\n((?:\|.*\n)+)", tables, re.MULTILINE):
        text = texts.get(file) or (ROOT / file).read_text(encoding="utf-8")
        filled = re.sub(r"\{(.+?) ([^ }:]+)(?::([^}]*))?\}", lambda ref: number(results["experiments"], *ref.groups()),
                        rows)
        pattern = rf"(?<=<!-- table: {name} -->\n)(?:\|.*\n)*"
        texts[file], found = re.subn(pattern, lambda _, filled=filled: filled, text)
        if found != 1:
            raise ValueError(f"{file}: expected one line '<!-- table: {name} -->', found {found}")
    for file, text in pages().items():
        if INLINE.search(text):
            texts[file] = INLINE.sub(lambda ref: number(results["experiments"], *ref.groups()), texts.get(file, text))
    return texts


def pages() -> dict[str, str]:
    """README and every page of the documentation."""
    files = [file for pattern in ("*.md", "docs/*.md", "tiny_data/**/*.md") for file in ROOT.glob(pattern)]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def number(experiments: dict, source: str, metric: str, spec: str | None) -> str:
    """One number of a table, such as {default qa_order}: see the head of tables.txt."""
    if source == "lines":
        return str(len((ROOT / metric).read_text(encoding="utf-8").splitlines()))
    if source == "steps":
        return format(TASKS[metric].steps, spec or "")
    value, sign = value_of(experiments, source, metric), "+" if " - " in source else ""
    if isinstance(value, list):
        value = {"mean": fmean(value), "std": stdev(value)} if len(value) > 1 else value[0]
    mean, deviation = (value["mean"], value["std"]) if isinstance(value, dict) else (value, None)
    scale = 100 if spec is None else 1
    text = format(scale * mean, sign + (spec or ".1f"))
    return text if deviation is None else f"{text} ± {scale * deviation:{spec or '.1f'}}"


def value_of(experiments: dict, source: str, metric: str) -> Value:
    """A metric of an experiment, or the difference "one - other", paired by seed."""
    names = source.split(" - ")
    if len(names) == 2 and source not in experiments:  # the file has differences whose seeds are not on record
        one, other = (value_of(experiments, name, metric) for name in names)
        seeds = [experiments[name].get("seeds") for name in names]
        if not isinstance(one, list) or not isinstance(other, list) or seeds[0] != seeds[1]:
            raise ValueError(f"{source}: expected values of the same seeds; record both with write_tables.py add")
        return [a - b for a, b in zip(one, other, strict=True)]
    found = experiments.get(source, {}).get("metrics", {})
    for key in metric, f"test/{metric}":
        if key in found:
            return found[key]
    raise ValueError(f"{source} {metric}: not in results.json; correct the name in tables.txt, or record the runs")


# ---- from runs to results -------------------------------------------------------------------------------------------


def experiment(folders: list[Path], known: dict, **about: str) -> dict:
    """The entry of results.json for some runs, which differ in nothing except seed and task. `known` is the entry so
    far. ValueError if they differ in more, or if one is not finished."""
    runs = sorted(map(read_run, folders), key=lambda run: run["seed"])
    seeds, tasks = sorted({run["seed"] for run in runs}), list(dict.fromkeys(run["task"] for run in runs))
    commands = [[general(line, run, len(seeds) > 1, len(tasks) > 1) for line in run["commands"]] for run in runs]
    if different := [lines for lines in commands if lines != commands[0]]:
        raise ValueError(f"the runs differ in more than seed and task: {commands[0]} and {different[0]}")
    metrics: dict[str, Value] = {}
    if len(tasks) == 1 and "parameters" in runs[0]:
        metrics["parameters"] = runs[0]["parameters"]
    for name in dict.fromkeys(name for run in runs for name in run["metrics"]):
        metrics[name] = [round(run["metrics"][name], 6) for run in runs if name in run["metrics"]]
        if len(metrics[name]) != len(seeds):
            raise ValueError(f"{name}: found in {len(metrics[name])} runs, expected one for each of the seeds {seeds}")
    return {"commands": commands[0] or known.get("commands", []), **about, "date": max(run["date"] for run in runs),
            "seeds": seeds, **({"tasks": tasks} if len(tasks) > 1 else {}), "metrics": metrics}


def read_run(folder: Path) -> dict:
    """What is on record about a finished run of train.py, or about an exported model that eval.py has evaluated."""
    run, lines, file = {"seed": 0, "task": "", "commands": []}, [], folder / "eval" / "metrics.json"
    if (folder / "settings.json").is_file():
        settings = json.loads((folder / "settings.json").read_text())
        train, run["parameters"] = settings["train"], settings["parameters"]
        run |= {"seed": train["seed"], "task": train["task"], "commands": settings["commands"]}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["step"] == train["max_steps"] and any("test/" in name for name in line)]
        file = folder / "last" / "eval" / "metrics.json"
    if file.is_file():
        lines = [json.loads(file.read_text())]
        if run["commands"]:
            place = "{task}" if run["task"] != "pretrain" else train["preset"]
            run["commands"].append(f"python eval.py --checkpoint runs/{place}/last")
    if not lines:
        raise ValueError(f"{folder}: no evaluation on test after the last step; finish the run, or use eval.py")
    day = date.fromtimestamp((file if file.is_file() else folder / "metrics.jsonl").stat().st_mtime)
    return {**run, "metrics": {name: value for name, value in lines[-1].items() if "/" in name}, "date": str(day)}


def general(command: str, run: dict, many_seeds: bool, many_tasks: bool) -> str:
    """A command without the folder that it writes, and with {seed} and {task} where the runs differ."""
    words = shlex.split(command if many_tasks else command.replace("{task}", run["task"]))
    for flag in ("--name", "--out", *["--seed"] * many_seeds):
        if flag in words:
            del words[words.index(flag):words.index(flag) + 2]
    if many_tasks and "--task" in words:
        words[words.index("--task") + 1] = "{task}"
    if many_seeds and "train.py" in words:
        words += ["--seed", "{seed}"]
    return re.sub(r"'([^' ]*\{\w+\}[^' ]*)'", r"\1", shlex.join(words))  # the shell needs no quotes there


def code_commit() -> str:
    """The last commit that changed what results depend on. ValueError if there are changes that are not committed."""
    git = ["git", "-C", str(ROOT)]
    changed, commit = (subprocess.run([*git, *words, "--", *CODE], capture_output=True, text=True, check=True).stdout
                       for words in (["status", "--porcelain", "-uno"], ["log", "-1", "--format=%h"]))
    if changed:
        raise ValueError(f"{changed.split()[1]} is changed and not committed: commit it, or name the commit that the "
                         "runs were made with: --commit HASH")
    return commit.strip()


def chance() -> dict[str, Value]:
    """The chance levels of the tiny world, for all tasks and for the splits test and combos."""
    import tiny_data
    from mplug2.evaluation.chance import chance_level
    from mplug2.evaluation.data import EvalSplit
    return {f"{split}/{name}": round(value, 6) for split in ("test", "combos")
            for name, value in chance_level(EvalSplit(tiny_data.ensure(), split)).items()}


PLANS = [f"python -m mplug2.tools.memory_plan --preset large --gpus {gpus} --batch-size {16 * gpus} "
         "--precision bfloat16 --optimizer muon" for gpus in (8, 64, 512)]


def plan(commands: list[str]) -> dict[str, Value]:
    """What the planner prints: GiB of a device with activation checkpointing, and by way and purpose the exposed
    milliseconds of a step, such as 64/HSDP/VTC."""
    from mplug2.tools import memory_plan
    metrics: dict[str, Value] = {}
    for command in commands:
        printed, words = io.StringIO(), shlex.split(command)[3:]
        with contextlib.redirect_stdout(printed):
            memory_plan.main(words)
        metrics |= read_plan(printed.getvalue(), words[words.index("--gpus") + 1])
    return metrics


def read_plan(text: str, gpus: str) -> dict[str, Value]:
    """The numbers in the text of one plan."""
    metrics, way = {}, ""
    for line in text.splitlines():
        cells = line.replace(",", "").split()
        if found := re.match(r"(\w+), activation checkpointing ", line):
            metrics[f"{gpus}/{found[1]}/GiB"] = float(cells[-1])
        elif found := re.match(r"(\w+), a step of ", line):
            way = f"{gpus}/{found[1]}"
        elif line.startswith("a step: "):
            numbers = [float(cell) for cell in re.findall(r"[\d.]+", line.replace(",", ""))]
            names = "passes", "products", "exposed", "step", "rate", "communication"
            metrics |= {f"{way}/{name}": value for name, value in zip(names, numbers, strict=True)}
        elif way and (found := re.match(r"(\S.*?\S)  +[\d,]+ +[\d.,]+ +[\d.,]+ +([\d.,]+)$", line)):
            metrics[f"{way}/{found[1].replace(' ', '_')}"] = float(found[2].replace(",", ""))
    return metrics


def dump(results: dict) -> str:
    """JSON with a line for each metric."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    inner = r'([\[{])\n\s+((?:[-\d]|"mean")[^\]}]*?)\n\s+([\]}])'  # of numbers: on one line
    return re.sub(inner, lambda found: found[1] + " ".join(found[2].split()) + found[3], text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", default="write", choices=["write", "add", "chance", "plan"])
    parser.add_argument("name", nargs="?", help="add: the experiment, as tables.txt names it")
    parser.add_argument("runs", nargs="*", type=Path, help="add: folders of runs")
    parser.add_argument("--commit", help="the code that made the runs (default: the last commit that changed the code)")
    given = parser.parse_args(arguments)
    if (given.action == "add") != bool(given.runs):
        parser.error("add needs the name of an experiment and the folders of its runs; the others take neither")
    results, tables = json.loads(RESULTS.read_text(encoding="utf-8")), TABLES.read_text(encoding="utf-8")
    entries, done = results["experiments"], ""
    if given.runs and f"{{{given.name} " not in "".join([tables, *pages().values()]):
        parser.error(f"no table shows {given.name}: name it in tables.txt first, or correct the name")
    try:
        if given.action != "write":
            about = {"commit": given.commit or code_commit(), "machine": f"{os.cpu_count()} CPU cores"}
            if given.action == "chance":
                entries["chance"] |= {**about, "date": str(date.today()), "metrics": chance()}
            elif given.action == "plan":
                entries["plan"] = {"commands": PLANS, **about, "date": str(date.today()), "metrics": plan(PLANS)}
            else:
                entries[given.name] = experiment(given.runs, entries.get(given.name, {}), **about)
                for name in [name for name in entries if " - " in name and given.name in name.split(" - ")]:
                    del entries[name]  # a difference that was recorded by hand; from now on it is computed
            RESULTS.write_text(dump(results), encoding="utf-8")
            done = "results.json is written, the tables are not: "
        for file, text in write_tables(results, tables).items():
            (ROOT / file).write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(f"{done}{error}")


if __name__ == "__main__":
    main()
