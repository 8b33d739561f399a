"""The state of a run: what is saved is what is loaded, on any number of ranks; other settings and records are refused.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import small

from mplug2.checkpoint import CheckpointError
from mplug2.distributed import DistInfo
from mplug2.model.mplug2 import MPLUG2
from mplug2.objectives.ema_teacher import EMATeacher
from mplug2.objectives.objectives import Objectives
from mplug2.training.fault_tolerance import generator_states
from mplug2.training.optim import OptimizerSettings, make_optimizer
from mplug2.training.parallel import gathered
from mplug2.training.state import TrainState, check_files


def make_state(rank: int = 0, world_size: int = 1, optimizer: str = "muon", trained: bool = False) -> TrainState:
    """The state of a run with an EMA teacher. `trained`: after one step, and with all counters above 0."""
    torch.manual_seed(int(trained))
    model = MPLUG2(small(), "image_qa")
    objectives = Objectives(model, EMATeacher(model))
    data = SimpleNamespace(seed=5, files=lambda: {"image": [("a", 1)]}, state_dict=lambda: {"at": 3},
                           load_state_dict=lambda *given: loaded.append(given))
    state, loaded = TrainState(objectives, make_optimizer(model, OptimizerSettings(optimizer)), data,
                               DistInfo(rank, world_size, torch.device("cpu"))), []
    state.loaded = loaded
    if trained:
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + number)
        state.optimizer.step()
        objectives.ema_teacher.steps = 7
        state.step, state.nonfinite_steps, state.nonfinite_in_a_row = 4, 3, 2
    return state


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_is_loaded_is_what_was_saved(optimizer):
    old, new = make_state(optimizer=optimizer, trained=True), make_state(optimizer=optimizer)
    saved = old.state_dict()
    expected = torch.rand(3)
    new.load_state_dict(saved)
    assert torch.rand(3).equal(expected)
    assert (new.step, new.nonfinite_steps, new.objectives.ema_teacher.steps) == (4, 3, 7)
    assert new.loaded == [(4, {"at": 3})]
    teachers = [one.objectives.ema_teacher.teacher.state_dict() for one in (old, new)]
    assert all(value.equal(teachers[1][name]) for name, value in teachers[0].items())
    names = dict(old.objectives.model.named_parameters())
    assert len(saved["optimizer"]) == len(names)
    for name, own in new.objectives.model.named_parameters():
        states = old.optimizer.state[names[name]], new.optimizer.state[own]
        assert states[0].keys() == states[1].keys() and states[0]
        assert all(torch.as_tensor(value).equal(torch.as_tensor(states[1][key])) for key, value in states[0].items())


def test_training_does_not_change_what_was_saved():
    state = make_state(trained=True)
    saved = state.state_dict()
    before = {name: {key: value.clone() for key, value in one.items()} for name, one in saved["optimizer"].items()}
    state.optimizer.step()
    assert all(value.equal(saved["optimizer"][name][key]) for name, one in before.items() for key, value in one.items())
    weight = torch.zeros(2)
    kept = gathered({"weight": weight}, keep=True)
    weight += 1
    assert kept["weight"].tolist() == [0, 0] and gathered({"weight": weight}, keep=False) == {}


def test_each_rank_continues_its_own_random_numbers():
    saved, expected = make_state(trained=True).state_dict(), []
    saved["generators"] = []
    for seed in range(2):
        torch.manual_seed(seed)
        saved["generators"].append(generator_states(torch.device("cpu")))
        expected.append(torch.rand(3))
    for rank in range(2):
        make_state(rank, 2).load_state_dict(saved)
        assert torch.rand(3).equal(expected[rank])


def test_another_number_of_ranks_draws_numbers_that_differ_between_ranks_and_are_the_same_each_time():
    saved, drawn = make_state(trained=True).state_dict(), []
    for rank in (0, 1, 2, 0):
        make_state(rank, 3).load_state_dict(saved)
        drawn.append(torch.rand(3))
    assert drawn[0].equal(drawn[3])
    assert not drawn[0].equal(drawn[1]) and not drawn[1].equal(drawn[2]) and not drawn[0].equal(drawn[2])


def test_the_old_name_of_the_teacher_is_still_read_and_a_run_without_one_is_refused():
    saved, new = make_state(trained=True).state_dict(), make_state()
    saved["objectives"] = {name.replace("ema_teacher.", "momentum.", 1): tensor
                           for name, tensor in saved["objectives"].items()}
    new.load_state_dict(saved)
    assert new.objectives.ema_teacher.steps == 7
    saved["objectives"].pop("momentum.steps")
    with pytest.raises(CheckpointError, match="ema_teacher.steps: in the checkpoint or in this run, but not in both"):
        new.load_state_dict(saved)


def test_other_records_are_refused_and_those_that_are_missing_are_named():
    saved = {"video": [("a.jsonl", 1000), ("b.jsonl", 2000)]}
    check_files(None, saved)
    check_files(saved, {"video": saved["video"][::-1]})
    with pytest.raises(CheckpointError, match=r"other records: a.jsonl \(1,000 bytes\); a resumed run"):
        check_files(saved, {"video": [("a.jsonl", 1001), ("b.jsonl", 2000)]})
    with pytest.raises(CheckpointError, match="other records: fewer files; "):
        check_files(saved, {"video": [*saved["video"], ("c.jsonl", 1)]})
    with pytest.raises(CheckpointError, match=r"other records: a.jsonl \(1,000 bytes\), b.jsonl"):
        make_state().load_state_dict(make_state(trained=True).state_dict() | {"files": saved})
