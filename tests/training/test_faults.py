"""Faults of a run, for real: processes that are killed or hang, signals, a full disk, losses that are not finite."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from data_helpers import write_data
from processes import free_port
from runs import SHUTDOWN_TIMEOUT, SMALL, lines
from safetensors.torch import load_file

import train
from mplug2.objectives.objectives import Objectives
from mplug2.training.run_checkpoint import BackgroundSave, load_training, save_checkpoint

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("no_curves")]  # 900 s: for a busy machine
HERE = Path(train.__file__).parent
LONG = ["--max-steps", "100000", "--warmup-steps", "1", "--save-every", "4"]
"""A run that only a fault ends."""
PATIENCE = 250
"""Seconds after which a test stops waiting."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


LAUNCHED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def end_all_processes():
    """The processes of a test end with it, even if it fails."""
    yield
    while LAUNCHED:
        process = LAUNCHED.pop()
        if process.poll() is None:
            for pid in (*processes_of(process).values(), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(60)


def launch(*arguments, torchrun: tuple | None = None, new_session: bool = False) -> subprocess.Popen:
    """train.py in the background, under torchrun if its arguments are given.

    The output goes to a file: a full pipe that nobody reads would block the process.
    """
    program = [sys.executable] if torchrun is None else [sys.executable, "-m", "torch.distributed.run", *torchrun]
    output = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [*map(str, program), str(HERE / "train.py"), *map(str, arguments)], start_new_session=new_session,
        stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    process.output = output
    LAUNCHED.append(process)
    return process


def output_of(process: subprocess.Popen) -> str:
    """What a process has printed so far."""
    process.output.seek(0)
    return process.output.read()


def wait_until_ended(process: subprocess.Popen) -> str:
    """Wait until a process has ended. Returns what it printed."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    assert process.returncode is not None, output_of(process)
    return output_of(process)


def wait_for(condition: Callable, process: subprocess.Popen):
    """Wait until `condition()` is true, and return it. Fails with the output if the process ends before."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < end, output_of(process)
        time.sleep(0.1)
    return found


def steps(run: Path) -> list[int]:
    return [line["step"] for line in lines(run)] if (run / "metrics.jsonl").exists() else []


def processes_of(launcher: subprocess.Popen) -> dict[int, int]:
    """The process ids of the ranks that a torchrun started."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        with suppress(OSError):  # it has ended in the meantime
            settings = Path(f"/proc/{child}/environ").read_text().split("\0")
            found |= {int(line.removeprefix("RANK=")): int(child) for line in settings if line.startswith("RANK=")}
    return found


def processes_of_session(leader: int) -> list[int]:
    """The running processes of a session, including those whose parent has ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, session, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            found += [int(process.name)] * (int(session) == leader and state != "Z")
    return found


def refused(capsys, arguments: list, code: int = 1) -> str:
    """The error message that ends a run, on one line."""
    with pytest.raises(SystemExit) as stopped:
        train.main([str(argument) for argument in arguments])
    assert stopped.value.code == code
    return " ".join(capsys.readouterr().err.split())


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_node_continues_after_sigkill_and_a_sigterm_to_one_rank_makes_all_save_and_exit(data, tmp_path):
    """Then the run continues on one process."""
    run = tmp_path / "tiny"
    launcher = launch(*SMALL, *LONG, "--save-every", 2, "--data", data, "--out", tmp_path, torchrun=(
        "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", 2, "--max-restarts", 1,
        "--monitor-interval", "0.1",
    ))
    wait_for(lambda: (run / "last").exists() and len(steps(run)) >= 3, launcher)
    first = processes_of(launcher)
    os.kill(first[1], signal.SIGKILL)
    killed_at = wait_for(lambda: not set(first.values()) & set(processes_of(launcher).values()) and steps(run)[-1],
                         launcher)
    wait_for(lambda: steps(run)[-1] > killed_at + 1, launcher)
    os.kill(processes_of(launcher)[1], signal.SIGTERM)
    said = wait_until_ended(launcher)
    assert launcher.returncode == 0, said
    step = steps(run)[-1]
    assert steps(run) == list(range(1, step + 1))
    assert said.count("pretrain: ") == 2  # one rank of two prints, once per start
    assert f"saved after step {step} of 100000; continue with --resume from {run / 'last'}" in said
    assert os.readlink(run / "last") == f"step_{step:07d}" and load_training(run / "last")["step"] == step
    train.main(["--resume", "--out", str(tmp_path), "--max-steps", str(step + 2)])
    assert steps(run) == list(range(1, step + 3))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_with_workers_saves_when_ctrl_c_reaches_all_its_processes(data, tmp_path, ranks):
    """Alone it exits with 0. The exit code of torchrun is 1 after Ctrl-C, whatever its ranks return."""
    run = tmp_path / "tiny"
    torchrun = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", 2) if ranks > 1 else None
    process = launch(*SMALL, *LONG, "--workers", 1, "--data", data, "--out", tmp_path, torchrun=torchrun,
                     new_session=True)
    wait_for(lambda: len(steps(run)) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    said = wait_until_ended(process)
    assert process.returncode == ranks - 1, said
    assert said.count(f"SIGINT: saved after step {steps(run)[-1]} of 100000") == 1
    assert said.count("stopping after this step; press Ctrl-C again to quit now") == 1
    assert ranks > 1 or "Traceback" not in said
    assert load_training(run / "last")["step"] == steps(run)[-1]


# ---- processes that die or hang --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_nodes_continue_from_the_last_checkpoint_after_a_rank_is_killed(data, tmp_path):
    """Two agents of torchrun meet at a local port, as on two machines, and one of their ranks is killed. Later the
    agents are asked to stop, and wait until their ranks have saved."""
    run, port = tmp_path / "tiny", free_port()
    nodes = [
        launch(*SMALL, *LONG, "--data", data, "--out", tmp_path, torchrun=(
            "--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1, "--max-restarts", 2, "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--monitor-interval", "0.1",
            *SHUTDOWN_TIMEOUT, "--local-addr", "127.0.0.1",  # a host name may not resolve
        )) for node in range(2)
    ]
    wait_for(lambda: (run / "last").exists() and len(steps(run)) >= 6, nodes[0])
    first = {rank: pid for node in nodes for rank, pid in processes_of(node).items()}
    assert sorted(first) == [0, 1]
    os.kill(first[1], signal.SIGKILL)
    killed_at = steps(run)[-1]
    wait_for(lambda: len(processes_of(nodes[0])) == 1 and set(processes_of(nodes[0]).values()) != {first[0]}
             and steps(run)[-1:] > [killed_at + 4], nodes[0])
    for node in nodes:  # as Slurm does before the time limit: torchrun forwards it
        node.send_signal(signal.SIGTERM)
    said = [wait_until_ended(node) for node in nodes]
    found = steps(run)
    assert found == list(range(1, found[-1] + 1)) and found[-1] >= killed_at + 4  # each step once
    assert "saved after step" in said[0] + said[1]
    assert load_training(run / "last")["step"] == found[-1]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_the_run_ends(data, tmp_path):
    run = tmp_path / "tiny"
    launcher = launch(  # saves rarely, because a save may take ten times --timeout
        *SMALL, *LONG, "--save-every", 100, "--data", data, "--out", tmp_path, "--timeout", 12,
        torchrun=("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", 2))
    wait_for(lambda: len(steps(run)) >= 130, launcher)
    hanging = processes_of(launcher)[1]
    os.kill(hanging, signal.SIGSTOP)
    waiting = processes_of(launcher)[0]
    status = Path(f"/proc/{waiting}/status")
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text(), launcher)
    os.kill(hanging, signal.SIGKILL)  # a stopped process would not react to SIGTERM
    said = wait_until_ended(launcher)
    assert launcher.returncode != 0
    assert "no progress for 12 s (--timeout): rank 1 of 2 blocks the others" in said, said
    assert "rank 1 of 2: " in said and "NO SIGN OF LIFE" in said
    assert "train.py" in said.split("The stack of this process:")[1]  # its stack
    assert load_training(run / "last")["step"] % 100 == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_hangs_is_named_and_no_process_is_left(tmp_path, workers):
    """A video whose decoder never returns: here, a pipe that nobody writes to."""
    pipe = tmp_path / "pipe.gif"
    os.mkfifo(pipe)
    (tmp_path / "video_caption.train.jsonl").write_text('{"video": "pipe.gif", "captions": ["a red three"]}\n')
    process = launch(*SMALL, "--data", tmp_path, "--out", tmp_path, "--timeout", 4, "--workers", workers,
                     new_session=True)
    said = wait_until_ended(process)
    end = time.monotonic() + PATIENCE
    while running := processes_of_session(process.pid):
        assert time.monotonic() < end, running
        time.sleep(0.1)
    assert process.returncode == 70
    assert "no progress for 4 s (--timeout)" in said and "waiting for data" in said
    assert f"{tmp_path / 'video_caption.train.jsonl'}:1" in said


def test_a_restarted_run_continues_without_resume(data, tmp_path, monkeypatch, capsys):
    """torchrun restarts it after a rank failed, Slurm after a node failed, and another agent of the same launch may
    start it too: always the same command, without --resume. Before the first checkpoint it starts from scratch."""
    arguments = [str(a) for a in [*SMALL, "--data", data, "--out", tmp_path, "--max-steps", 2]]
    run = tmp_path / "tiny"
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save_checkpoint", lambda *_: (_ for _ in ()).throw(ValueError("disk gone")))
        assert "disk gone" in refused(capsys, arguments)
    assert not (run / "last").exists() and steps(run) == [1, 2]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "web")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train.main(arguments)
    assert load_training(run / "last")["step"] == 2 and steps(run) == [1, 2]
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with monkeypatch.context() as another:
        another.setenv("TORCHELASTIC_RUN_ID", "another launch")
        assert "already contains a run" in refused(capsys, arguments, 2)
    train.main([*arguments, "--max-steps", "3"])  # of the same launch
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main([*arguments, "--max-steps", "4"])
    assert load_training(run / "last")["step"] == 4 and steps(run) == [1, 2, 3, 4]


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_with_a_message_and_the_older_checkpoint_is_intact(capsys, data, tmp_path):
    """The system refuses to write more than a few bytes to a file, as with a full disk or quota."""
    arguments = [*SMALL, "--data", data, "--out", tmp_path]
    train.main([str(argument) for argument in [*arguments, "--max-steps", 2]])
    run, before = tmp_path / "tiny", resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = (run / "last" / "model.safetensors").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        message = refused(capsys, ["--resume", "--out", tmp_path, "--max-steps", 4])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step_0000004 could not be written (" in message and "File too large" in message
    assert "the previous one, step_0000002, is intact. Free some disk space, then continue with --resume" in message
    assert sorted(path.name for path in run.iterdir() if "step" in path.name) == ["step_0000002"]
    assert (run / "last" / "model.safetensors").read_bytes() == weights
    train.main(["--resume", "--out", str(tmp_path), "--max-steps", "4"])
    assert load_training(run / "last")["step"] == 4


def test_training_continues_while_a_checkpoint_is_written_and_the_files_hold_the_step_of_the_save(
    data, tmp_path, monkeypatch
):
    """Each save but the last waits for the next step. The next save waits for it."""
    arguments = [str(a) for a in [*SMALL, "--data", data, "--max-steps", 4, "--save-every", 2, "--dropout", 0.1,
                                  "--distill-weight", 0.4]]
    run, began = tmp_path / "slow" / "tiny", []

    def slow(folder: Path, name: str, *rest) -> None:
        began.append((name, sorted(path.name for path in run.glob("step_*"))))
        end = time.monotonic() + PATIENCE
        while name == "step_0000002" and 3 not in steps(run):
            assert time.monotonic() < end
            time.sleep(0.01)
        save_checkpoint(folder, name, *rest)

    monkeypatch.setattr(train, "save_checkpoint", slow)
    train.main([*arguments, "--out", str(tmp_path / "slow")])
    assert began == [("step_0000002", []), ("step_0000004", ["step_0000002"])]
    monkeypatch.setattr(train, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(BackgroundSave, "start", lambda self, action: action())
    train.main([*arguments, "--out", str(tmp_path / "at once")])
    for step in (2, 4):
        folders = run / f"step_{step:07d}", tmp_path / "at once" / "tiny" / f"step_{step:07d}"
        for name in ("model.safetensors", "training.pt"):
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), (step, name)


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(capsys, data, tmp_path, monkeypatch):
    run = tmp_path / "tiny"

    def failing(folder: Path, name: str, *rest) -> Path:
        if name == "step_0000004":
            raise ValueError("disk gone")
        return save_checkpoint(folder, name, *rest)

    monkeypatch.setattr(train, "save_checkpoint", failing)
    message = refused(capsys, [*SMALL, *LONG, "--save-every", 2, "--data", data, "--out", tmp_path])
    assert "train.py: disk gone" in message and message.count("disk gone") == 1
    assert 4 <= steps(run)[-1] <= 6 and load_training(run / "last")["step"] == 2


def test_an_error_waits_for_the_checkpoint_and_neither_hides_the_other(capsys):
    done = []
    with pytest.raises(KeyError, match="other"), BackgroundSave() as saving:
        saving.start(lambda: time.sleep(0.2) or done.append(True))
        raise KeyError("other")
    assert done == [True] and not saving.failed and capsys.readouterr().err == ""
    with pytest.raises(KeyError, match="other"), BackgroundSave() as saving:
        saving.start(lambda: [].pop())
        raise KeyError("other")
    assert saving.failed and "warning: pop from empty list" in capsys.readouterr().err
    with BackgroundSave() as saving:
        saving.start(lambda: [].pop())
        with pytest.raises(IndexError):
            saving.wait()
        saving.wait()  # an error is raised once, and not repeated as a warning
    assert not saving.failed and capsys.readouterr().err == ""


def test_a_damaged_checkpoint_is_refused_and_the_run_continues_from_the_one_before(capsys, data, tmp_path):
    run = tmp_path / "tiny"
    train.main([str(a) for a in [*SMALL, "--data", data, "--out", tmp_path, "--max-steps", 4, "--save-every", 2]])
    expected = load_file(run / "last" / "model.safetensors")
    with open(run / "step_0000004" / "training.pt", "r+b") as file:
        file.seek(100)
        file.write(b"!")
    message = refused(capsys, ["--resume", "--out", tmp_path, "--max-steps", 6])
    assert f"{run / 'last'} (step_0000004) is damaged: training.pt was changed after it was saved" in message
    assert "continue from the one before it with --resume --resume-from step_0000002" in message
    train.main(["--resume", "--resume-from", "step_0000002", "--out", str(tmp_path)])
    assert os.readlink(run / "last") == "step_0000004" and steps(run) == [1, 2, 3, 4]
    found = load_file(run / "last" / "model.safetensors")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


# ---- losses that are not finite --------------------------------------------------------------------------------------


def make_nonfinite(monkeypatch, steps: set[int], gradient: bool) -> None:
    """Make the loss, or only its gradient, infinite at these steps."""
    forward, count = Objectives.forward, iter(range(1000))

    def nonfinite_forward(self, batch: dict) -> dict:
        losses = forward(self, batch)
        if next(count) in steps:
            name = next(iter(losses))
            if gradient:
                losses[name].register_hook(lambda _: torch.tensor(float("nan")))
            else:
                losses[name] = losses[name] * float("inf")
        return losses

    monkeypatch.setattr(Objectives, "forward", nonfinite_forward)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_counted_and_reported(capsys, data, tmp_path, monkeypatch, gradient):
    make_nonfinite(monkeypatch, {1, 2, 4}, gradient)
    train.main([str(a) for a in [*SMALL, "--data", data, "--out", tmp_path, "--max-steps", 6]])
    said = capsys.readouterr().err
    for step in (1, 2, 4):
        (line,) = [line for line in said.splitlines() if f"step {step} is not finite" in line]
        assert line.count(".jsonl:") == 6 and ("gradient norm nan" in line) == gradient or not gradient
    assert [line["nonfinite_steps"] for line in lines(tmp_path / "tiny")] == [0, 1, 2, 2, 3, 3]
    assert all(value == value for line in lines(tmp_path / "tiny") for value in line.values())
    weights = load_file(tmp_path / "tiny" / "last" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_several_steps_in_a_row_that_are_not_finite_stop_the_run(capsys, data, tmp_path, monkeypatch):
    make_nonfinite(monkeypatch, {1, 3, 4, 5, 6, 7}, gradient=False)
    message = refused(capsys, [*SMALL, "--data", data, "--out", tmp_path, "--save-every", 2])
    assert "5 steps in a row were not finite; the last: step 7 is not finite" in message
    assert message.count(".jsonl:") >= 6
    assert load_training(tmp_path / "tiny" / "last")["step"] == 6
    assert json.loads((tmp_path / "tiny" / "last" / "manifest.json").read_text())["step"] == 6
