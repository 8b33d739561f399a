"""Signals that are noted, generators that go on where they were, and who is told to hold up the others."""

import os
import random
import signal

import numpy as np
import torch
import torch.distributed as dist

from mplug2.distributed import DistInfo
from mplug2.training.fault_tolerance import GracefulStop, Watchdog, generator_states, set_generator_states

CPU = torch.device("cpu")


def test_signals_are_noted_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulStop() as stop:
        assert stop.name == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_all_generators_go_on_where_they_were_also_through_a_file(tmp_path):
    def draw() -> tuple:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    draw()
    torch.save(generator_states(CPU), tmp_path / "states.pt")
    expected = [draw() for _ in range(3)]
    set_generator_states(torch.load(tmp_path / "states.pt", weights_only=True), CPU)
    assert [draw() for _ in range(3)] == expected


def test_the_watchdog_names_who_is_behind_and_who_is_silent(monkeypatch):
    """Three of them, as three processes would have: two whose threads tell where they are, and one that asks."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    dogs = [Watchdog(DistInfo(rank, 3, CPU), timeout=1000) for rank in range(3)]
    dogs[0].interval, dogs[1].interval, dogs[2].interval = 0.15, 0.02, 0.02

    def report(*places: tuple[int, str]) -> list[str]:
        for dog, (step, doing) in zip(dogs, places):
            dog.heartbeat(step, doing, names=lambda: "a.jsonl:3")
            dog._tell()
        return dogs[0]._report().splitlines()

    data, step = "waiting for data", "in a step"
    with dogs[1], dogs[2]:
        assert report((7, step), (7, step), (6, step))[0] == "process 2 of 3 holds up the others"
        first, *lines = report((7, step), (7, data), (7, data))
        assert first == "process 1 and process 2 of 3 hold up the others"
        assert [line.strip() for line in lines] == [
            "process 0 of 3: 7 steps done, in a step a.jsonl:3 (this process)",
            "process 1 of 3: 7 steps done, waiting for data", "process 2 of 3: 7 steps done, waiting for data",
        ]
        assert report((7, step), (7, step), (7, step))[0] == "all processes are at the same place"
    first, *lines = report((6, data), (7, step), (7, step))
    assert first == "process 1 and process 2 of 3 hold up the others"
    assert [line.endswith("NO SIGN OF LIFE: stopped, killed or cut off") for line in lines] == [False, True, True]
