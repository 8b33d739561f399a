"""The README: its picture of the architecture is what docs/draw.py draws, and what it links to is there."""

import re
from pathlib import Path
from xml.etree import ElementTree

import mplug2
from docs.draw import HERE, architecture

README = (HERE.parent / "README.md").read_text(encoding="utf-8")


def test_the_architecture_is_drawn_by_the_code_and_names_files_of_the_package():
    drawn = architecture()
    assert (HERE / "architecture.svg").read_text(encoding="utf-8") == drawn, "python docs/draw.py draws it anew"
    files = re.findall(r"\w+\.py", drawn)
    assert len(files) == 5 and all((Path(mplug2.__file__).parent / "model" / file).is_file() for file in files)


def test_the_architecture_is_all_inside_of_its_picture_and_loads_nothing():
    root = ElementTree.fromstring(architecture())
    left, top, width, height = map(float, root.get("viewBox").split())
    places = [(float(element.get("x")), float(element.get("y"))) for element in root.iter() if element.get("x")]
    assert len(places) > 40 and all(0 < x - left < width and 0 < y - top < height for x, y in places)
    assert "href" not in architecture() and "url(http" not in architecture()


def test_what_the_readme_links_to_is_there():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert len(local) > 60
    assert not [target for target in local if not (HERE.parent / target).exists()]
