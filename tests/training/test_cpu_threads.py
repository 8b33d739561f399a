"""The number of CPU threads: the fastest at the moment, unless the environment fixes it."""

from types import SimpleNamespace

import pytest
import torch

from mplug2.training import cpu_threads
from mplug2.training.cpu_threads import CPUThreads, matrix_rate, products_seconds

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """A number of threads that tests may change: they do not start any, and it is put back."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    state = SimpleNamespace(number=8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: state.number)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(state, "number", number))
    return state


def test_the_fastest_number_is_used_until_another_one_is_faster(threads, monkeypatch):
    seconds, timed = {}, []
    monkeypatch.setattr(cpu_threads, "products_seconds",
                        lambda number, a, b: timed.append(number) or seconds[number])
    chosen = CPUThreads(CPU)
    for fastest in (8, 7, 4, 1, 8):
        seconds |= {number: 1 + (number != fastest) for number in (1, 4, 7, 8)}
        timed.clear()
        assert chosen.choose() == threads.number == fastest
        assert sorted(timed) == [1, 4, 7, 8]


@pytest.mark.parametrize(("cores", "tried"), [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (16, [16, 15, 8, 1])])
def test_all_cores_all_but_one_half_and_one_are_tried(cores, tried, threads):
    threads.number = cores
    assert CPUThreads(CPU).choices == tried


@pytest.mark.parametrize("reason", ["gpu", "environment", "compiled"])
def test_nothing_is_changed_on_a_gpu_with_compiled_blocks_or_where_the_number_is_fixed(reason, threads, monkeypatch):
    if reason == "environment":
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(cpu_threads, "products_seconds", None)  # not called
    device = torch.device("cuda") if reason == "gpu" else CPU
    assert CPUThreads(device, reason == "compiled").choose() == threads.number == 8


def test_a_number_of_threads_is_judged_by_its_slowest_try(threads, monkeypatch):
    """Another program on one of the cores does not disturb every try."""
    clock = iter([0, 5, 10, 12])
    monkeypatch.setattr(cpu_threads, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert products_seconds(3, torch.ones(2, 2), torch.ones(2, 2)) == 5
    assert threads.number == 3


def test_the_rate_counts_a_multiplication_and_an_addition_for_each_product_of_numbers(monkeypatch):
    clock = iter([0, 5, 10, 12])
    monkeypatch.setattr(cpu_threads, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(cpu_threads, "RATE_SIZE", 10)
    assert matrix_rate() == 2 * 10 * 10 * 10 / 2
