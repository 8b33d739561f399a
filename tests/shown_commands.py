"""The commands that README, docs, notebooks and docstrings show, and those of docs/results.json, as the shell would run
them."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
MARKDOWN = [
    REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "tests" / "newcomer.md",
    REPOSITORY / "tests" / "golden" / "README.md", *sorted((REPOSITORY / "tiny_data").glob("**/README.md")),
]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
CODE = [
    REPOSITORY / "train.py", REPOSITORY / "eval.py", *sorted((REPOSITORY / "docs").glob("*.py")),
    *sorted((REPOSITORY / "notebooks").glob("*.py")), *sorted((REPOSITORY / "mplug2").rglob("*.py")),
    *sorted((REPOSITORY / "tiny_data").glob("*.py")),
]
RESULTS = REPOSITORY / "docs" / "results.json"
PROGRAMS = ("torchrun", "python", "pytest", "pip", "bash", "ruff", "autopep8", "jupyter", "cp", "sbatch")


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    """The program and its arguments; "..." stands for arguments that are not shown."""
    source: str = ""
    """File that shows it, relative to the repository."""

    def __str__(self) -> str:
        return f"{self.source}: {shlex.join(self.words)}"


def cells(notebook: Path, kind: str) -> list[str]:
    """The cells of a notebook of one kind, "markdown" or "code"."""
    return ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == kind]


def shown_commands() -> list[Command]:
    """All commands, without repetitions in the same file."""
    commands = []
    for path in MARKDOWN:
        commands += from_markdown(path.read_text(encoding="utf-8"), path)
    for path in NOTEBOOKS:
        commands += from_markdown("\n\n".join(cells(path, "markdown")), path)
        commands += [one for cell in cells(path, "code") for text in strings_of(cell) for one in statements(text, path)]
    for path in CODE:
        commands += [one for text in docstrings_of(path) for one in from_markdown(text, path)]
    for text in recorded_commands():
        commands += statements(text, RESULTS)
    return list(dict.fromkeys(commands))


def recorded_commands() -> Iterator[str]:
    """The commands that made the results and figures, for the first seed of an experiment and for each of its tasks."""
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    for entry in [*recorded["experiments"].values(), *recorded["figures"].values()]:
        for task in entry.get("tasks", [""]):
            for command in entry["commands"]:
                yield command.replace("{task}", task).replace("{seed}", str(entry.get("seeds", [0])[0]))


def strings_of(cell: str) -> list[str]:
    """The string literals of a code cell, and what it runs in a shell with "!"."""
    shell = [line.lstrip()[1:] for line in cell.splitlines() if line.lstrip().startswith("!")]
    tree = ast.parse("\n".join(line for line in cell.splitlines() if not line.lstrip().startswith(("!", "%"))))
    return shell + [node.value for node in ast.walk(tree)
                    if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def docstrings_of(path: Path) -> list[str]:
    """The docstrings of a module, its classes and its functions."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [ast.get_docstring(node) for node in nodes
             if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    return [text for text in found if text]


def from_markdown(text: str, path: Path = REPOSITORY) -> Iterator[Command]:
    """The commands of fenced and indented blocks, and of code spans that start with a program and name a file or a
    module ("`torchrun --max-restarts`" only mentions a flag)."""
    block, variables, fenced = [], {}, False
    for line in [*text.splitlines(), "end"]:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    ") or (block and not line.strip()):
            block.append(line)
            continue
        yield from statements("\n".join(block), path, variables)
        block = []
    for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        for command in statements(" ".join(span.split()), path):
            if command.words[0] != "torchrun" or any(word.endswith(".py") for word in command.words):
                yield command


def statements(block: str, path: Path = REPOSITORY, variables: dict[str, str] | None = None) -> Iterator[Command]:
    """The commands of some lines of shell. Continued lines, variables, `for` loops and `&&` are resolved. `variables`
    are those of the lines before, and are updated."""
    variables = {} if variables is None else variables
    block = re.sub(r"\\\n\s*", " ", block)
    block = re.sub(r'"[^"]*"', lambda quoted: " ".join(quoted[0].split()), block)
    block = re.sub(r"for (\w+) in (.*?); do\n(.*?)\n\s*done", unrolled, block, flags=re.DOTALL)
    if nodes := re.search(r"#SBATCH.*--nodes=(\d+)", block):
        variables |= {"SLURM_NNODES": nodes[1], "head": "NODE0"}
    for line in block.splitlines():
        if assigned := re.fullmatch(r'\s*(\w+)="([^$]*)"', line):
            variables[assigned[1]] = assigned[2]
            continue
        for one in line.split("&&"):
            one = re.sub(r"\$(\w+)", lambda used: variables.get(used[1], used[0]), one)
            try:
                words = shlex.split(one, comments=True)
            except ValueError:  # prose with an apostrophe
                continue
            while words and (words[0] == "srun" or re.fullmatch(r"[A-Z0-9_]+=\S*", words[0])):
                words = words[1:]
            if len(words) > 1 and words[0] in PROGRAMS:
                yield Command(tuple(words), path.relative_to(REPOSITORY).as_posix())


def unrolled(loop: re.Match) -> str:
    """The lines of a `for` loop, once for each value."""
    variable, values, body = loop.groups()
    return "\n".join(body.replace(f"${variable}", value) for value in values.split())
