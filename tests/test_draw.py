"""The figures in docs/ are what docs/draw.py draws, and the example videos are videos of the tiny world."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import mplug2
from docs.draw import EXAMPLES, HERE, architecture, examples, main


def test_the_architecture_figure_is_up_to_date_and_names_files_of_the_package():
    drawn = architecture()
    assert (HERE / "architecture.svg").read_text(encoding="utf-8") == drawn, "run python docs/draw.py"
    files = re.findall(r"\w+\.py", drawn)
    assert len(files) == 5 and all((Path(mplug2.__file__).parent / "model" / file).is_file() for file in files)


def test_the_architecture_figure_lies_inside_its_frame_and_loads_nothing():
    root = ElementTree.fromstring(architecture())
    left, top, width, height = map(float, root.get("viewBox").split())
    positions = [(float(element.get("x")), float(element.get("y"))) for element in root.iter() if element.get("x")]
    assert len(positions) > 40 and all(0 < x - left < width and 0 < y - top < height for x, y in positions)
    assert "href" not in architecture() and "url(http" not in architecture()


def test_the_example_videos_come_from_the_test_split(tmp_path):
    examples(tmp_path)
    shipped = {path.name: path.read_bytes() for path in (HERE / "examples").iterdir()}
    assert shipped == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(shipped) == {f"{name}.gif" for name in EXAMPLES}


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--run", 2), ("docs", 2)])
def test_an_argument_draws_nothing(argument, code, monkeypatch):
    monkeypatch.setattr(mplug2, "load", lambda *_: pytest.fail("it draws"))
    with pytest.raises(SystemExit) as stopped:
        main([argument])
    assert stopped.value.code == code
