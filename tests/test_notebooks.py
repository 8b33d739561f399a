"""Every notebook runs from a clean kernel without an error, and prints what its committed outputs say.

The rule: the text of each cell (what it prints, or the value of its last line) equals the committed text. Differences
in white space are allowed, and so is one unit in the last digit of a number with a decimal point. Images are counted,
not compared. Cells tagged `varies` (times, addresses, output of other programs) only have to run.

After a change to a notebook, write its outputs again and look at them:

    python tests/test_notebooks.py notebooks/01_tokens.ipynb
"""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook, new_output

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SECONDS = 270  # limit for each cell
BYTES = 400_000  # limit for a notebook, images included


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a clean kernel, which starts in its folder and has one thread.

    Raises nbclient's CellExecutionError at the first error.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    # The mplug2 of this repository, even if another one is installed.
    here = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    client.execute(env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"})
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell prints and shows, in order, with the word [image] for each image."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        elif output.output_type == "error":
            parts.append(f"\n[{output.ename}]\n")
        else:
            text = "[image]" if any(kind.startswith("image/") for kind in output.data) else output.data["text/plain"]
            parts.append(f"\n{text}\n")
    return " ".join("".join(parts).split())


def same(found: str, committed: str) -> bool:
    """Whether texts are equal, up to one unit in the last digit of numbers with a decimal point."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", committed):
        return False
    for a, b in zip(NUMBER.findall(found), NUMBER.findall(committed)):
        digits = len(b.partition(".")[2])
        if len(a.partition(".")[2]) != digits or abs(float(a) - float(b)) > (digits > 0) * 1.01 * 10**-digits:
            return False
    return True


def drift(found: nbformat.NotebookNode, committed: nbformat.NotebookNode) -> list[str]:
    """One line for each cell whose text differs from the committed text."""
    lines = []
    for number, (new, old) in enumerate(zip(found.cells, committed.cells)):
        if old.cell_type == "code" and "varies" not in old.metadata.get("tags", ()):
            now, committed_text = text_of(new), text_of(old)
            if not same(now, committed_text):
                lines.append(f"cell {number}: committed {committed_text!r}, now {now!r}")
    return lines


@pytest.mark.slow
@pytest.mark.timeout(900)  # seconds; a notebook takes about thirty on an idle machine
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_and_prints_what_is_committed(path):
    lines = drift(execute(path), nbformat.read(path, as_version=4))
    assert not lines, "\n".join([f"{path.name} drifted; if intended, write its outputs again (see above)", *lines])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_committed_complete_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "the cells were not run in order"
    assert path.stat().st_size < BYTES
    for cell in cells:
        text = text_of(cell)
        assert str(Path.home()) not in text and str(FOLDER.parent) not in text, "a path of this machine"


def shown(*outputs: nbformat.NotebookNode, tags: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    return new_notebook(cells=[new_code_cell(outputs=list(outputs), metadata={"tags": list(tags)})])


def printed(text: str) -> nbformat.NotebookNode:
    return new_output("stream", name="stdout", text=text)


@pytest.mark.parametrize("old, new, drifted", [
    ("loss 0.123, -0.00", "loss  0.124,\n0.00", False),  # rounding
    ("loss 0.123", "loss 0.125", True),
    ("12 frames", "13 frames", True),  # integers are exact
    ("0.5", "0.50", True),
    ("a red seven", "a red one", True),
    ("a red seven", "", True),
])
def test_what_counts_as_drift(old, new, drifted):
    assert bool(drift(shown(printed(new)), shown(printed(old)))) == drifted
    assert drift(shown(printed(new)), shown(printed(old), tags=("varies",))) == []


def test_a_missing_image_is_drift_and_another_image_is_not():
    images = [new_output("display_data", data={"image/png": png, "text/plain": png}) for png in ("iVBO", "iVBP")]
    assert drift(shown(images[0]), shown(images[1])) == []
    assert len(drift(shown(), shown(images[1]))) == len(drift(shown(printed("iVBP")), shown(images[1]))) == 1


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(execute(Path(name)), name)
