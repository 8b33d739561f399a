"""Versions: the oldest ones that are tested are those that pyproject.toml allows."""

import re
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")


def lower_bounds(listed: str) -> dict[str, Version]:
    """The lower bound of each package of a list of pyproject.toml. (Python 3.10 has no tomllib.)"""
    of_list = re.search(rf"^{listed} = \[\n(.*?)^\]", PROJECT, re.MULTILINE | re.DOTALL)[1]
    found = re.findall(r'^ *"([\w-]+)>=([\d.]+)",', of_list, re.MULTILINE)
    assert len(found) == len(of_list.splitlines()) > 5
    return {name: Version(version) for name, version in found}


def test_the_oldest_versions_are_the_lower_bounds():
    lines = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in pinned.items()} == (
        lower_bounds("dependencies") | lower_bounds("test"))


def test_the_oldest_python_is_checked_with_the_oldest_versions_and_the_newest_with_the_newest():
    oldest = re.search(r'^requires-python = ">=(.*)"', PROJECT, re.MULTILINE)[1]
    checks = dict(re.findall(r'- python: "(.*?)"\n((?: {12}.*\n)*)', WORKFLOW))
    assert min(checks, key=Version) == oldest and "constraints: tests/oldest.txt" in checks[oldest]
    assert "torch: torch " in checks["3.14"] and "constraints" not in checks["3.14"]
    assert [name for name in checks if "constraints" in checks[name]] == [oldest]


@pytest.mark.parametrize("variable", ["CONSTRAINTS", "TORCH"])
def test_the_check_gets_its_versions_from_the_workflow(variable):
    assert re.search(rf"^ +{variable}: \$\{{\{{ matrix\.{variable.lower()} \}}\}}$", WORKFLOW, re.MULTILINE)
    assert f"${{{variable}:" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
