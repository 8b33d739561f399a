"""README, docs, notebooks and docstrings: links resolve, commands can run as they are shown, and counts are true.

A command is given to the program that it names, which stops when it knows all its settings. Names in capitals (DIR,
CHECKPOINT) stand for files of the reader; every other file has to exist, or another shown command has to write it.
"""

import ast
import functools
import importlib
import re
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import shown_commands
from runs import SHUTDOWN_TIMEOUT
from shown_commands import CODE, MARKDOWN, NOTEBOOKS, PROGRAMS, REPOSITORY, Command, cells, from_markdown
from torch.distributed.run import get_args_parser

import eval as eval_program
import mplug2.flags
import train
from mplug2 import hub
from mplug2.training.settings import write_settings

STOPS = {"mplug2.tools.memory_plan": "format_plan", "mplug2.tools.report": "write_report"}
"""Modules that know their settings when they call this function."""
PRETRAINED = REPOSITORY / "tiny_data" / "pretrained"
LARGE = {"frames", "batch_size", "lr", "optimizer", "precision"}
"""What a command for many processes has to give, next to a length and a size, without a recipe or a larger preset."""
OF_THE_READER = {"my_data", "downloads/msrvtt", "vocab.txt", "mPLUG2_MSRVTT_Caption.pth", "clip-vit-large-patch14/",
                 "bert-large-uncased/", "web.sh", "torch"}
"""Files that the reader brings along."""


class Parsed(Exception):
    """A program knows its settings, and stops here."""


def stop(*values, **_):
    raise Parsed(*values)


def stop_after(function):
    return lambda *values, **named: stop(function(*values, **named))


class WrongCommand(AssertionError):
    """A shown command that cannot run."""


def options(words: tuple[str, ...]) -> dict[str, str]:
    """The values of the flags of a command, by name, as they are written."""
    pairs = zip(words, [*words[1:], ""])
    return {flag[2:].replace("-", "_"): value for flag, value in pairs if flag.startswith("--")}


def written_files(commands: list[Command]) -> set[str]:
    """Folders that the shown commands write: runs, and what is converted."""
    found = {"data/emoji"}
    for command in commands:
        given, words = options(command.words), command.words
        if "train.py" in words:
            run = given.get("name") or given.get("recipe") or given.get("task", "tiny")
            folder = f"{given.get('out', 'runs')}/{run}"
            found |= {folder, f"{folder}/last", f"{folder}/metrics.jsonl"}
        elif "out" in given:
            found.add(given["out"])
        found |= {f"{code[1]}" for code in re.finditer(r"\.save\('(.*?)'\)", shlex.join(words).replace("'\"'\"'", "'"))}
    return found


field_docs = functools.cache(mplug2.flags.field_docs)
COMMANDS = shown_commands.shown_commands()
WRITTEN = written_files(COMMANDS)


def exists(file: str) -> bool:
    """Whether a file is in the repository, or is written by a shown command, or belongs to the reader."""
    placeholder = re.fullmatch(r"[A-Z]+(/.*)?", file)
    known = placeholder or hub.ADDRESS.fullmatch(file) or file in WRITTEN or file in OF_THE_READER
    return bool(known or (REPOSITORY / file).exists())


@pytest.fixture(autouse=True)
def parsers_are_built_quickly(monkeypatch):
    """The help text of every flag comes from source code, which is parsed only once here."""
    monkeypatch.setattr(mplug2.flags, "field_docs", field_docs)


def resolve(command: Command, monkeypatch, tmp_path: Path) -> None:
    """Raises WrongCommand if a command cannot run as it is shown."""
    words, processes, elided = list(command.words), 1, "..." in command.words
    words = [word for word in words if word != "..."]
    if "--help" in words:
        return
    if words[0] == "torchrun":
        words, processes = launched(words)
    if words[0] == "python":
        words = words[1:]
    if words[0] == "train.py":
        resolve_training(words[1:], processes, elided, monkeypatch, tmp_path)
    elif words[0] == "eval.py":
        check_files(words, "checkpoint", "data", "input")
        monkeypatch.setattr(eval_program, "load", stop)
        run(eval_program.main, words[1:], monkeypatch, tmp_path)
    elif words[0] == "-m":
        resolve_module(words[1], words[2:], monkeypatch, tmp_path)
    elif words[0] == "-c":
        compile(words[1], "python -c", "exec")
    elif words[0] == "pip":
        extras = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        if unknown := set(re.findall(r"\[(\w+)\]", words[-1])) - set(extras):
            raise WrongCommand(f"no extra {unknown}")
    elif words[0] == "pytest":
        known = (REPOSITORY / "tests" / "conftest.py").read_text(encoding="utf-8")
        for word in words[1:]:
            if word.startswith("--") and f'"{word}"' not in known or word.endswith(".py") and not exists(word):
                raise WrongCommand(f"pytest does not know {word}")
        markers = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
        if "-m" in words and f'"{words[words.index("-m") + 1].removeprefix("not ")}: ' not in markers:
            raise WrongCommand(f"no such marker: {shlex.join(words)}")
    else:
        files = [word for word in words if "/" in word and "*" not in word or word.endswith((".py", ".sh"))]
        if missing := [file for file in files if not exists(file.rstrip("/"))]:
            raise WrongCommand(f"no such file: {missing[0]}")


def launched(words: list[str]) -> tuple[list[str], int]:
    """The words after torchrun's own, and the number of processes it starts."""
    own = shlex.split(shlex.join(words[1:]).replace("--shutdown-timeout 150", " ".join(SHUTDOWN_TIMEOUT)))
    try:
        given = get_args_parser().parse_args(own)
    except SystemExit as error:
        raise WrongCommand("torchrun does not take these arguments") from error
    nodes = int(given.nnodes.split(":")[-1])
    return [given.training_script, *given.training_script_args], nodes * int(given.nproc_per_node)


def check_files(words: list[str], *flags: str) -> None:
    given = options(tuple(words))
    for file in (part.split("=")[0] for flag in flags if flag in given for part in given[flag].split(",")):
        if not exists(file):
            raise WrongCommand(f"{file} does not exist, and no shown command writes it")


def run(program, arguments: list[str], monkeypatch, tmp_path: Path):
    """Run a program until it stops, in a folder with the files of the repository and of the reader. Returns the first
    value that it stopped with."""
    for name in ("docs", "tiny_data", "mplug2", "notebooks"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(REPOSITORY / name)
    for flag in ("init", "checkpoint", "input", "answers", "tokenizer"):
        file = tmp_path / options(tuple(arguments)).get(flag, "docs")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(PRETRAINED if flag in ("init", "checkpoint") else REPOSITORY / "docs" / "examples"
                            if "--find" in arguments else REPOSITORY / "README.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda address: PRETRAINED)
    said: list[str] = []
    monkeypatch.setattr(sys, "stderr", type("Said", (), {"write": lambda self, text: said.append(text),
                                                         "flush": lambda self: None})())
    try:
        program(arguments)
    except Parsed as parsed:
        return parsed.args[0] if parsed.args else None
    except SystemExit as error:
        raise WrongCommand("".join(said).strip()) from error
    raise WrongCommand("the program ended without a result")


def resolve_training(arguments: list[str], processes: int, elided: bool, monkeypatch, tmp_path: Path) -> None:
    given = options(tuple(arguments))
    check_files(arguments, "init", "data", "eval_data", "tokenizer")
    if "resume" in given:  # a run to resume: the default one
        name = given.get("name", "tiny")
        monkeypatch.setattr(train, "Trainer", stop)
        folder = tmp_path / given.get("out", "runs") / name
        settings = run(train.main, ["--name", name, "--out", given.get("out", "runs")], monkeypatch, tmp_path)
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(settings, [], model={})
        for checkpoint in ("last", given.get("resume_from")):
            if checkpoint:
                (folder / checkpoint).symlink_to(PRETRAINED)
    monkeypatch.setattr(train, "Trainer", stop)
    settings = run(train.main, arguments, monkeypatch, tmp_path)
    if elided:
        return
    try:
        settings.data.micro_batch_size(processes)
    except ValueError as error:
        raise WrongCommand(str(error)) from error
    converted = given.get("init") in ("runs/start", "runs/released")
    if processes < 8 or "recipe" in given or given.get("preset", "tiny") != "tiny" or converted:
        return
    missing = LARGE - set(given)
    missing |= {"max_steps or epochs"} if not {"max_steps", "epochs"} & set(given) else set()
    missing |= {"preset or init"} if not {"preset", "init"} & set(given) else set()
    if missing:
        raise WrongCommand(f"a large run at the tiny world's settings: {', '.join(sorted(missing))} not given")


def resolve_module(module: str, arguments: list[str], monkeypatch, tmp_path: Path) -> None:
    """`python -m module`: its parser reads the arguments, and the program stops."""
    files = [word for word in arguments if "/" in word and not word.startswith("-")]
    if missing := [file for file in files if not exists(file)]:
        raise WrongCommand(f"{missing[0]} does not exist, and no shown command writes it")
    name = module if importlib.util.find_spec(module).submodule_search_locations is None else f"{module}.__main__"
    program = importlib.import_module(name)
    if module in STOPS:
        monkeypatch.setattr(program, STOPS[module], stop)
    elif hasattr(program, "parse"):
        monkeypatch.setattr(program, "parse", stop_after(program.parse))
    else:
        monkeypatch.setattr(ArgumentParser, "parse_args", stop_after(ArgumentParser.parse_args))
        monkeypatch.setattr(mplug2.flags.Parser, "read", stop_after(mplug2.flags.Parser.read))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    run(lambda given: program.main(given) if program.main.__code__.co_argcount else program.main(), arguments,
        monkeypatch, tmp_path)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_each_shown_command_can_run(command, monkeypatch, tmp_path):
    resolve(command, monkeypatch, tmp_path)


LARGE_RUN = ("--preset tiny --data DIR --frames 4 --batch-size 1024 --epochs 30 --optimizer adamw --lr 5e-5 "
             "--precision bfloat16")


@pytest.mark.parametrize("text, message", [
    ("torchrun train.py --max-step 20", "did you mean '--max-steps'"),
    ("torchrun --nproc-per-node 2 train.py --wrong", "unknown argument --wrong"),
    ("torchrun --processes 2 train.py", "torchrun does not take"),
    ("torchrun --nproc-per-node 3 train.py", "not divisible by 3"),
    ("torchrun train.py --hflip", "add --augment finetune"),
    ("torchrun train.py --init runs/tinny/last", "runs/tinny/last does not exist"),
    ("torchrun train.py --recipe msrvtt_captions --data DIR", "did you mean 'msrvtt_caption'"),
    ("python eval.py --checkpoint runs/tiny/last --input clip.mp4", "clip.mp4 does not exist"),
    ("python eval.py --checkpoint runs/tiny/last --beam 5", "did you mean '--beams'"),
    ("python -m mplug2.tools.memory_plan --gpus 0", "gpus=0"),
    ("python -m mplug2.data pack DIR", "OUT"),
    ("pytest -m fast", "no such marker"),
    ("pip install -e '.[notebook]'", "no extra"),
    ("python docs/drawing.py", "no such file"),
    # A Slurm script whose 64 processes share a batch of 32:
    ("#SBATCH --job-name=web --nodes=8 --ntasks-per-node=1\n    head=$(scontrol show hostnames)\n    srun torchrun "
     '--nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-endpoint "$head:29500" train.py --data DIR',
     "batch_size=32 is not divisible by 64"),
    # Many processes with the tiny world's learning rate, number of steps or frames:
    ("torchrun --nproc-per-node 8 train.py --data DIR --parallel fsdp --precision bfloat16",
     "batch_size, frames, lr, max_steps or epochs, optimizer, preset or init not given"),
    *[(f"torchrun --nproc-per-node 8 train.py {LARGE_RUN}".replace(f"{flag} {LARGE_RUN.split(flag)[1].split()[0]}", ""),
       name) for flag, name in (("--lr", "lr"), ("--epochs", "max_steps or epochs"), ("--frames", "frames"))],
])
def test_a_wrong_command_is_noticed(text, message, monkeypatch, tmp_path):
    (command,) = from_markdown(f"    {text}")
    with pytest.raises(WrongCommand, match=re.escape(message)):
        resolve(command, monkeypatch, tmp_path)


def test_commands_are_found_wherever_they_are_shown():
    sources = {command.source for command in COMMANDS}
    expected = {"README.md", "train.py", "eval.py", "docs/scaling.md", "mplug2/data/__main__.py", "docs/results.json"}
    assert expected <= sources and any(source.endswith(".ipynb") for source in sources)
    assert len(COMMANDS) > 120 and {command.words[0] for command in COMMANDS} <= set(PROGRAMS)
    launches = [command for command in COMMANDS if "--nnodes" in command.words and command.source == "docs/scaling.md"]
    assert [launched(list(command.words))[1] for command in launches] == [16, 64]


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a Markdown text, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_relative_link_resolves():
    texts = [(path, path.read_text(encoding="utf-8")) for path in MARKDOWN]
    texts += [(path, "\n".join(cells(path, "markdown"))) for path in NOTEBOOKS]
    links = [(path, target) for path, text in texts for target in re.findall(r"\]\(([^)\s]+)\)", text)
             if not target.startswith(("http", "mailto"))]
    assert len(links) > 150
    broken = []
    for path, target in links:
        file, _, anchor = target.partition("#")
        file = (path.parent / file) if file else path
        if not file.exists() or anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            broken.append(f"{path.relative_to(REPOSITORY)}: {target}")
    assert not broken


def test_the_reading_order_is_complete_and_its_line_counts_are_true():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^\]]*\]\(([^)]+\.py)\) \| (\d+) \|", text, re.MULTILINE)
    lines = {file: len((REPOSITORY / file).read_text(encoding="utf-8").splitlines()) for file, _ in rows}
    assert not {file: lines[file] for file, shown in rows if abs(lines[file] - int(shown)) > lines[file] / 10}
    model = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "mplug2" / "model").glob("*.py")}
    left_out = {"mplug2/model/__init__.py", "mplug2/model/kernels.py"}
    assert model - left_out <= {file for file, _ in rows} and {"train.py", "eval.py"} <= {file for file, _ in rows}


@pytest.mark.parametrize("file", ["README.md", "docs/evaluation.md"])
def test_the_shown_python_gives_what_it_says(file, monkeypatch):
    """Lines with a literal as their comment."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "mplug2.load" in block]
    monkeypatch.chdir(REPOSITORY)
    names, compared = {}, 0
    for line in block.splitlines():
        code, _, comment = line.partition("#")
        if comment.strip().startswith("["):
            assert eval(code, names) == ast.literal_eval(comment.strip())
            compared += 1
        else:
            exec(code, names)
    assert compared


def test_the_first_commands_of_the_readme_find_what_they_name(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    shown = [command.words[2:] for command in COMMANDS if command.source == "README.md" and "--input" in command.words]
    said = []
    for arguments in shown:
        eval_program.main(list(arguments))
        said.append(capsys.readouterr().out.strip().splitlines()[0])
    assert said[:2] == ["a blue seven that moves to the left", "seven"] and said[2].endswith("blue_seven_left.gif")


def test_the_text_cites_no_section_of_the_paper():
    """Only its figures and its abstract could be read."""
    cited = re.compile(r"\bsections? \d(\.\d)?\b(?! of (this|the same))", re.IGNORECASE)
    texts = {path: path.read_text(encoding="utf-8") for path in [*MARKDOWN, *CODE]}
    texts |= {path: "\n".join(cells(path, "markdown")) for path in NOTEBOOKS}
    assert not [path.name for path, text in texts.items() if cited.search(text)]
