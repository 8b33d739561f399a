"""House rules: imports point one way, files and functions stay short, and the words of writing stay plain."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
TEXT_FILES = ("py", "md", "ipynb", "toml")
TRACKED = [ROOT / name for name in subprocess.run(
    ["git", "ls-files", *(f"*.{suffix}" for suffix in TEXT_FILES)], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split() if (ROOT / name).exists()]
CORE = [ROOT / "mplug2" / name for name in ("config.py", "tasks.py", "generation.py", "objectives/losses.py",
                                            "objectives/objectives.py")]
CORE += [file for file in (ROOT / "mplug2/model").glob("*.py") if file.name != "kernels.py"]


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


# ---- imports ---------------------------------------------------------------------------------------------------------


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imports_of(file: Path) -> set[str]:
    """The modules that a file imports anywhere, functions included."""
    found = set()
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(folder: str, allowed) -> list[str]:
    """The imports of mplug2 and of other packages that the files below mplug2/<folder> may not have."""
    files = sorted((ROOT / "mplug2").glob(folder))
    assert files
    return [f"{file.relative_to(ROOT)} imports {name}" for file in files for name in sorted(imports_of(file))
            if not allowed(name)]


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


STANDARD = ("dataclasses", "collections", "itertools", "typing", "functools", "math")


@pytest.mark.parametrize("folder, allowed", [
    ("model/*.py", lambda name: within(
        name, "torch", "einops", "mplug2.config", "mplug2.tasks", "mplug2.model", *STANDARD)),
    ("config.py", lambda name: within(name, *STANDARD)),
    ("tasks.py", lambda name: within(name, "mplug2.comma_list", "mplug2.did_you_mean", *STANDARD)),
    ("distributed.py", lambda name: within(name, "torch", "os", "time", "datetime", *STANDARD)),
    ("data/**/*.py", lambda name: not within(name, "mplug2.model")),
    ("evaluation/**/*.py", lambda name: not within(name, "mplug2.training")),
    ("**/*.py", lambda name: not within(name, "mplug2.tools", "train", "eval")),
], ids=["model", "config", "tasks", "distributed", "data", "evaluation", "tools"])
def test_imports_point_one_way(folder, allowed):
    found = violations(folder, allowed)
    if folder == "**/*.py":
        found = [line for line in found if not line.startswith("mplug2/tools/")]
    assert found == []


@pytest.mark.slow
def test_the_scripts_leave_matplotlib_and_its_backend_alone():
    """A notebook that imports them keeps its inline figures, and no start pays for a plot that is not drawn."""
    code = "import sys, mplug2, train, eval; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- sizes -----------------------------------------------------------------------------------------------------------


def functions_of(file: Path) -> Iterator[tuple[str, int]]:
    for node in nodes_of(file):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{file.relative_to(ROOT)}: {node.name}", node.end_lineno - node.lineno + 1


def test_the_paper_core_is_short():
    assert sum(map(lines_of, CORE)) <= 1900


@pytest.mark.parametrize("name, limit", [("train.py", 400), ("eval.py", 200), ("README.md", 150)])
def test_files_are_short(name, limit):
    assert lines_of(ROOT / name) <= limit


def test_no_file_of_the_model_is_longer_than_200_lines():
    assert {file.name: lines_of(file) for file in (ROOT / "mplug2/model").glob("*.py") if lines_of(file) > 200} == {}


def test_no_function_is_longer_than_100_lines():
    functions = [pair for file in TRACKED if file.suffix == ".py" for pair in functions_of(file)]
    assert {name: length for name, length in functions if length > 100} == {}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 2200


def test_train_has_few_flags(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    flags = set(re.findall(r"^  --(?:\[no-\])?([a-z][\w-]*)", capsys.readouterr().out, re.MULTILINE)) - {"help"}
    assert "universal-readout" in flags and "resume" in flags
    assert len(flags) <= 94


# ---- words -----------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "except": r"\bbut for\b", "again, from scratch": r"\banew\b", "fix": r"\bmend(s|ed|ing)?\b",
    "with a flag": r"\bby `?--[a-z]", "--accumulation-steps": r"--accumulate\b", "--keep-checkpoints": r"--keep\b(?!-)",
    "--questions-per-sample": r"--questions\b(?!-)", "--queue-size": r"--queue\b(?!-)",
    "--distill-weight": r"--distil\b", "--hflip": r"--flip\b", "--cpu-offload": r"--offload\b",
    "--warmup-steps or --warmup-ratio": r"--warmup\b(?!-)",
}
"""What to write, and the pattern that must not occur."""

OLD_NAMES = """masked_places answer_places label_places join_pair unmask split_tasks plain_attention select_texts
select_memories encode_pixels parallelise clip_gradient average_replicated meeting_point EverywhereError StopSignal
state_beside whole_model Preparation mean_share sureness image_t2v_r1 image_v2t_r1""".split()


@cache
def texts_of(file: Path) -> str:
    """What a person reads: the whole file, or the cells and printed outputs of a notebook (no images)."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    printed = [output.get("text", []) for cell in cells for output in cell.get("outputs", [])]
    return "\n".join("".join(source) for source in [*(cell["source"] for cell in cells), *printed])


OLD_RECORDINGS = ("test_golden_run.py",)
"""Files that read values recorded under old names."""


def occurrences(pattern: str, exempt: tuple[str, ...] = ()) -> list[str]:
    """Files and lines in which a pattern occurs, except in this file and in files named `exempt`."""
    files = [file for file in TRACKED if file.name not in (Path(__file__).name, *exempt)
             and re.search(pattern, texts_of(file), re.IGNORECASE)]
    return [
        f"{file.relative_to(ROOT)}: {line.strip()[:100]}" for file in files
        for line in texts_of(file).splitlines() if re.search(pattern, line, re.IGNORECASE)
    ]


@pytest.mark.parametrize("instead", FORBIDDEN)
def test_forbidden_words_do_not_occur(instead):
    assert occurrences(FORBIDDEN[instead]) == [], f"write {instead}"


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_names_do_not_occur(name):
    assert [line for line in occurrences(rf"\b{name}\b", OLD_RECORDINGS) if name in line] == []
