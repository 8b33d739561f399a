"""docs/speedrun.py: what a row says, and what is not run again."""

from types import SimpleNamespace

import pytest

from docs import speedrun
from docs.speedrun import row, run

RUN = {"caption_exact": 0.91, "qa_binding": 0.76, "t2v_r1": 0.86, "minutes": 4.0, "gflops": 100.0}


def test_a_row_has_the_means_and_whether_they_reach_the_goals():
    other = RUN | {"caption_exact": 0.89, "minutes": 6.0, "gflops": 200.0}
    assert row([RUN, other], ["--lr", "1e-3"], "2026-11-27") == (
        "| 2026-11-27 | `--lr 1e-3` | 5.0 | 800 | 90.0 | 76.0 | 86.0 | yes |")
    for name in speedrun.GOALS:
        assert row([RUN | {name: 0.7}], [], "today").startswith("| today | defaults | 4.0 | 400 |")
        assert row([RUN | {name: 0.7}], [], "today").endswith("| no |")


def test_a_finished_run_is_not_repeated_unless_its_flags_differ(tmp_path, monkeypatch):
    trained = []

    def train(arguments: list[str]) -> dict[str, float]:
        trained.append(arguments)
        (tmp_path / "runs" / "speedrun-2").mkdir(parents=True)
        return RUN | {"qa_digit": 0.5}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speedrun, "train", SimpleNamespace(main=train))
    monkeypatch.setattr(speedrun, "time", SimpleNamespace(time=iter([1000, 1240]).__next__))
    monkeypatch.setattr(speedrun, "matrix_rate", lambda: 1e11)
    assert run(2, ["--max-steps", "9"]) == RUN == run(2, ["--max-steps", "9"])
    assert trained == [["--max-steps", "9", "--seed", "2", "--name", "speedrun-2"]]
    with pytest.raises(SystemExit, match="was made with the flags .*9.*delete it to run it again"):
        run(2, [])


@pytest.mark.parametrize("flags", [["--out", "elsewhere"], ["--task=video_qa"], ["--max-steps", "9", "--seed", "4"]])
def test_flags_that_a_speedrun_chooses_are_refused_before_it_trains(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speedrun, "train", None)
    with pytest.raises(SystemExit, match="speedrun: it chooses --(out|task|seed) itself"):
        run(0, flags)


def test_a_run_that_was_stopped_gives_no_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speedrun, "train", SimpleNamespace(main=lambda _: {}))
    with pytest.raises(SystemExit, match="the run was stopped; delete .*speedrun-1 to run it again"):
        run(1, [])
