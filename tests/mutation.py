"""Mutation testing of one file: which small changes of its code do the tests not notice?

    pip install -e ".[test,mutation]"
    python tests/mutation.py mplug2/boxes.py             # 40 mutants, drawn with --seed; --sample 0: all of them
    python tests/mutation.py mplug2/boxes.py --only mplug2.boxes.x_generalized_iou__mutmut_3

mutmut changes one thing in a function at a time (an operator, a number, an argument) and runs the quick tests that
reach this function. It works in a copy of the tree, never in the tree itself. Printed at the end: the kill rate and the
diff of every mutant that survived. Module-level code and decorated functions are not mutated.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KILLED = ("killed", "timeout", "segfault")
ELSEWHERE = {
    "train.py": ["test_train_eval.py"], "eval.py": ["test_train_eval.py"],
    "mplug2/training/run_checkpoint.py": ["test_checkpoint.py"],
    "mplug2/objectives/objectives.py": ["objectives/test_objectives.py", "objectives/test_ema_teacher.py"],
    "mplug2/model/decoder.py": ["model/test_decoder.py", "test_generation.py"],
    "mplug2/evaluation/retrieval.py": ["evaluation/test_evaluate.py", "test_predictor.py"],
    "mplug2/inference.py": ["evaluation/test_evaluate.py", "test_predictor.py"],
}
"""Files whose tests have another name, or lie in another folder."""


def tests_of(file: str) -> list[str]:
    """The test file that mirrors `file`; or else those that import it, of the same folder or of any; or the folder."""
    if file in ELSEWHERE:
        return [f"tests/{name}" for name in ELSEWHERE[file]]
    package, _, name = file.removesuffix(".py").replace("/", ".").rpartition(".")
    mirror = Path("tests", Path(file).relative_to("mplug2").with_name(f"test_{name}.py"))
    if (ROOT / mirror).exists():
        return [str(mirror)]
    imports = re.compile(rf"^\s*(from|import) {package}\.{name}\b|^\s*from {package} import .*\b{name}\b", re.MULTILINE)
    every = [test.relative_to(ROOT) for test in sorted((ROOT / "tests").rglob("test_*.py"))]
    found = [test for test in every if imports.search((ROOT / test).read_text(encoding="utf-8"))]
    near = next(near for folder in mirror.parents if (near := [test for test in every if test.parent == folder]))
    return list(map(str, [test for test in found if test in near] or found or near))


def copy_tree(folder: Path, file: str, tests: list[str]) -> None:
    """Copy the files that git knows or would add, and write what is mutated and tested into the copy's settings."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: name and (ROOT / name).is_file(), listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    settings = (folder / "pyproject.toml").read_text(encoding="utf-8")
    chosen = f"[tool.mutmut]\nonly_mutate = [{file!r}]\npytest_add_cli_args_test_selection = {tests}"
    (folder / "pyproject.toml").write_text(settings.replace("[tool.mutmut]", chosen), encoding="utf-8")


def mutants_of(file: str) -> list[str]:
    """Names of all mutants of a file, in the order of its lines."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name
    names = mutate_file_contents(file, Path(file).read_text(encoding="utf-8")).mutant_names
    return [get_mutant_name(Path(file), name) for name in names]


def draw(mutants: list[str], sample: int, seed: int) -> list[str]:
    """`sample` of the mutants (0: all), in their order."""
    if not 0 < sample < len(mutants):
        return mutants
    return [mutants[i] for i in sorted(random.Random(seed).sample(range(len(mutants)), sample))]


def kill_rate(statuses: dict[str, str]) -> str:
    """The last line: a mutant that no test reaches counts as survived."""
    found = [status for status in statuses.values() if status in KILLED]
    rest = ", ".join(f"{found.count(status)} by a {status}" for status in KILLED[1:] if status in found)
    return (f"{len(found)} of {len(statuses)} mutants killed ({100 * len(found) / max(1, len(statuses)):.1f} %)"
            + f", {rest}" * bool(rest))


def run(file: str, sample: int, seed: int, only: list[str], processes: int, folder: Path) -> dict[str, str]:
    tests = tests_of(file)
    copy_tree(folder, file, tests)
    os.chdir(folder)  # mutmut reads the settings of the folder that it runs in
    mutants = mutants_of(file)
    chosen = only or draw(mutants, sample, seed)
    print(f"{file}: {len(chosen)} of {len(mutants)} mutants against {' '.join(tests)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}

    def mutmut(*arguments: str, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mutmut", *arguments]
        done = subprocess.run(command, env=environment, text=True, check=False, **options)
        if done.returncode:
            sys.exit(f"{done.stdout or ''}\nmutmut {arguments[0]} failed, see above")
        return done

    progress = None if sys.stdout.isatty() else subprocess.PIPE
    mutmut("run", "--max-children", str(processes), *chosen, stdout=progress)
    results = mutmut("results", "--all", "true", capture_output=True).stdout
    statuses = dict(line.strip().rsplit(": ", 1) for line in results.splitlines() if "__mutmut_" in line)
    statuses = {name: status for name, status in statuses.items() if status != "not checked"}
    for name, status in statuses.items():
        if status not in KILLED:
            print(mutmut("show", name, capture_output=True).stdout)
    return statuses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a file of mplug2/, or train.py or eval.py")
    parser.add_argument("--sample", type=int, default=40, help="how many mutants (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", nargs="+", default=[], metavar="MUTANT", help="these mutants, by name")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(kill_rate(run(**vars(options), folder=Path(folder))))


if __name__ == "__main__":
    main()
