"""Signals that are noted, and generators that go on where they were."""

import os
import random
import signal

import numpy as np
import torch

from mplug2.survival import StopSignal, generator_states, set_generator_states

CPU = torch.device("cpu")


def test_signals_are_noted_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
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
