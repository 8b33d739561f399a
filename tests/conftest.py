"""Settings of all tests: one thread, the same random examples in every run, and which tests need an opt-in."""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

os.environ.pop("WANDB_PROJECT", None)  # no run of a test goes to the account of the person who tests
torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other

settings.register_profile(
    "tests", max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate])  # of mutation.py: nothing is shrunk


def pytest_addoption(parser):
    parser.addoption("--browser", action="store_true", help="also run the tests that look at a page in Chromium")


def pytest_collection_modifyitems(config, items):
    """Deselect browser tests without --browser, and gpu tests without a GPU. A `-m` on the command line stays free."""
    missing = {"browser": not config.getoption("browser"), "gpu": not torch.cuda.is_available()}
    left_out = [item for item in items if any(missing[name] and item.get_closest_marker(name) for name in missing)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The modules that are imported here stay, so garbage collections need not look at them, now or later: imageio
    collects for each file that it reads."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module")
def no_curves():
    """Runs of train.py in this process draw no curves, which would take longer than the few steps of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.draw_curves", lambda *_: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def usual_scheduling():
    """No test file may leave this process with a real-time policy: it would starve the files that follow. See
    `video_files.usual_scheduling`."""
    yield
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
