"""Mutation testing: which tests a file has, which mutants are drawn, and a run in a copy of the tree."""

import subprocess
import sys
from pathlib import Path

import mutation
import pytest
from mutation import ROOT, draw, kill_rate

FILES = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "mplug2").rglob("*.py"))]


def test_the_tests_of_a_file_mirror_it_or_import_it_or_are_named():
    assert mutation.tests_of("mplug2/model/fusion.py") == ["tests/model/test_fusion.py"]
    assert mutation.tests_of("mplug2/objectives/packing.py") == ["tests/objectives/test_objectives.py"]  # imports it
    assert mutation.tests_of("mplug2/model/decoder.py") == ["tests/model/test_decoder.py", "tests/test_generation.py"]
    assert mutation.tests_of("mplug2/data/adapters/web.py")[0] == "tests/data/test_adapters.py"  # the folder
    assert all(map(mutation.tests_of, FILES))
    assert mutation.tests_of("train.py") == ["tests/test_train_eval.py"]
    named = [name for names in mutation.ELSEWHERE.values() for name in names]
    assert all((ROOT / "tests" / name).is_file() for name in named)
    assert all((ROOT / name).is_file() for name in mutation.ELSEWHERE)


@pytest.mark.parametrize("sample, size", [(0, 9), (4, 4), (9, 9), (20, 9)])
def test_a_sample_is_drawn_by_its_seed_and_keeps_the_order(sample, size):
    mutants = [f"mutant {i}" for i in range(9)]
    drawn = draw(mutants, sample, 0)
    assert len(drawn) == size and drawn == draw(mutants, sample, 0) == [one for one in mutants if one in drawn]
    assert size == 9 or drawn != draw(mutants, sample, 1)


def test_a_mutant_that_no_test_reaches_has_survived_and_one_that_hangs_has_not():
    assert kill_rate({"a": "killed", "b": "survived", "c": "no tests", "d": "timeout"}) == (
        "2 of 4 mutants killed (50.0 %), 1 by a timeout")
    assert kill_rate({}) == "0 of 0 mutants killed (0.0 %)"


def test_the_copy_has_the_files_of_the_tree_and_settings_for_one_file(tmp_path):
    mutation.copy_tree(tmp_path, "mplug2/boxes.py", ["tests/test_boxes.py"])
    for name in ("mplug2/boxes.py", "tests/test_boxes.py", "tiny_data/digits.npz", "train.py"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    settings = (tmp_path / "pyproject.toml").read_text()
    assert settings.count("[tool.mutmut]\nonly_mutate = ['mplug2/boxes.py']\n") == 1
    assert "pytest_add_cli_args_test_selection = ['tests/test_boxes.py']\n" in settings
    assert not (tmp_path / ".git").exists()


@pytest.mark.slow
def test_mutants_of_a_file_are_killed_and_the_tree_is_left_alone():
    pytest.importorskip("mutmut")
    before = Path(ROOT / "mplug2/boxes.py").read_bytes()
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "mutation.py"), "mplug2/boxes.py", "--sample", "3"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3 of 3 mutants killed (100.0 %)"
    assert Path(ROOT / "mplug2/boxes.py").read_bytes() == before and not (ROOT / "mutants").exists()
