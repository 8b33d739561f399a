"""Signals, the state of the random generators, and the ranks that the watchdog names."""

import json
import os
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mplug2.distributed import DistInfo
from mplug2.training import fault_tolerance
from mplug2.training.fault_tolerance import GracefulStop, Watchdog, generator_states, set_generator_states

CPU = torch.device("cpu")


def test_signals_set_the_name_and_the_old_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulStop() as stop:
        assert stop.name == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_prints_what_will_happen_and_a_later_second_ctrl_c_quits(capfd, monkeypatch):
    """A SIGINT within a second is the same Ctrl-C, which torchrun passes on; SIGTERM never quits at once."""
    quits = []
    monkeypatch.setattr(os, "_exit", quits.append)
    with GracefulStop("stopping after this batch") as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert quits == []
        stop.pressed -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert quits == []
        os.kill(os.getpid(), signal.SIGINT)
        assert quits == [130]
    assert capfd.readouterr().err.count("stopping after this batch; press Ctrl-C again to quit now") == 1


def test_generators_continue_from_their_saved_states(tmp_path):
    def draw() -> tuple:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    draw()
    torch.save(generator_states(CPU), tmp_path / "states.pt")
    expected = [draw() for _ in range(3)]
    set_generator_states(torch.load(tmp_path / "states.pt", weights_only=True), CPU)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("activities, verdict", [
    (("in a step", "waiting for data", "in a step"), "rank 1 of 3 blocks the others"),
    (("in a step", "in a step", "in a step"), "all ranks are equally far"),
])
def test_a_rank_that_waits_for_data_is_behind_one_that_computes(activities, verdict, monkeypatch):
    """The store is a dictionary here, and the other ranks publish a heartbeat while this one sleeps."""
    dog, entries = Watchdog(DistInfo(0, 1, CPU), timeout=9), {}

    def publish(count: int) -> None:
        entries.update({str(rank): json.dumps([count, 7, activities[rank]]) for rank in (1, 2)})

    publish(1)
    dog.process, dog.store = DistInfo(0, 3, CPU), SimpleNamespace(get=entries.__getitem__, set=entries.__setitem__)
    dog.heartbeat(7, activities[0])
    dog._publish()
    monkeypatch.setattr(fault_tolerance, "time", SimpleNamespace(sleep=lambda _: publish(2), monotonic=time.monotonic))
    assert dog._report().splitlines()[0] == verdict


def test_workers_that_hang_do_not_outlive_the_process(monkeypatch, capsys):
    ends, killed = [], []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(fault_tolerance.multiprocessing, "active_children",
                        lambda: [SimpleNamespace(kill=lambda: killed.append(len(ends)))])
    monkeypatch.setattr(fault_tolerance.faulthandler, "dump_traceback", lambda file: None)
    Watchdog(DistInfo(0, 1, CPU), timeout=9)._end("a report")
    with GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.pressed -= 2
        os.kill(os.getpid(), signal.SIGINT)
    assert ends == [70, 130] and killed == [0, 1]  # before each end
    assert "train.py: no progress for 10 x 9 s (--timeout): a report" in capsys.readouterr().err


def test_an_evaluation_counts_its_batches_and_has_patience():
    dog = Watchdog(DistInfo(0, 1, CPU), timeout=9)
    for done in (1, 2):
        dog.batch_done()
        assert dog.latest[1:3] == (done, "evaluating") and dog.patience == 10


@pytest.mark.slow
def test_the_watchdog_names_the_ranks_that_are_behind_or_silent(monkeypatch):
    """Three watchdogs stand for three ranks: two publish their heartbeats, and one asks for the report."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    dogs = [Watchdog(DistInfo(rank, 3, CPU), timeout=1000) for rank in range(3)]
    dogs[0].interval, dogs[1].interval, dogs[2].interval = 0.15, 0.02, 0.02

    def report(*heartbeats: tuple[int, str]) -> list[str]:
        for dog, (step, activity) in zip(dogs, heartbeats):
            dog.heartbeat(step, activity, names=lambda: "a.jsonl:3")
            dog._publish()
        return dogs[0]._report().splitlines()

    data, step = "waiting for data", "in a step"
    with dogs[1], dogs[2]:
        assert report((7, step), (7, step), (6, step))[0] == "rank 2 of 3 blocks the others"
        first, *lines = report((7, step), (7, data), (7, data))
        assert first == "rank 1 and rank 2 of 3 block the others"
        assert [line.strip() for line in lines] == [
            "rank 0 of 3: 7 steps done, in a step a.jsonl:3 (this rank)",
            "rank 1 of 3: 7 steps done, waiting for data", "rank 2 of 3: 7 steps done, waiting for data",
        ]
        assert report((7, step), (7, step), (7, step))[0] == "all ranks are equally far"
    first, *lines = report((6, data), (7, step), (7, step))
    assert first == "rank 1 and rank 2 of 3 block the others"
    assert [line.endswith("NO SIGN OF LIFE: stopped, killed or cut off") for line in lines] == [False, True, True]
