"""Benchmark of evaluation: captions, answers and retrieval per second, on one and on two processes.

    python -m mplug2.tools.bench --evaluation 200    # writes 200 videos of 30 s, 640 x 360 pixels, and evaluates them

The model is `tiny_data/pretrained`, so nearly all the time goes into reading videos. Each process has one thread. The
clock of a task starts when all processes have loaded the model: its numbers are those of the evaluation alone. The last
row is the whole command, with the start of Python, scores and report: `eval.py` against `torchrun`.
"""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
import torch.multiprocessing as mp

import tiny_data
from mplug2 import distributed
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.evaluate import evaluate
from mplug2.inference import Inference
from mplug2.predictor import load
from mplug2.tools.bench_media import write_h264

QUESTIONS = ("which digit is it", "what color is it", "where does it move", "is it a red seven")
UNITS = {"video_caption": "captions", "video_qa": "answers", "video_retrieval": "pairs"}
"""The tasks, and what is counted per second: pairs are those of a video and a text that are re-ranked."""
SECONDS, RATE, WIDTH, HEIGHT = 30, 25, 640, 360
"""Length of a video, its frames per second, and its size in pixels."""
ROOT = Path(tiny_data.__file__).parents[1]
CHECKPOINT = ROOT / "tiny_data" / "pretrained"


def write_data(root: Path, count: int) -> None:
    """`count` copies of one H.264 video, each with one caption of its own and four questions."""
    video = write_h264(root / "0.mp4", SECONDS, RATE, None, WIDTH, HEIGHT)
    lines: dict[str, list[dict]] = {task: [] for task in UNITS}
    for number in range(count):
        if number:
            shutil.copy(video, root / f"{number}.mp4")
        record = {"id": str(number), "video": f"{number}.mp4"}
        captions = [f"a {color} {digit} moving {way}" for color in ("red", "blue", "green") for digit in ("one", "two")
                    for way in ("left", "right")]
        caption = {**record, "captions": [captions[number % len(captions)]]}
        lines["video_caption"].append(caption)
        lines["video_retrieval"].append(caption)
        lines["video_qa"].append({**record, "qa": [{"question": one, "answers": ["yes"]} for one in QUESTIONS]})
    for task, records in lines.items():
        (root / f"{task}.test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def measure(rank: int, root: Path, task: str, world_size: int, port: int, found: SimpleQueue) -> None:
    """Evaluate one task on one rank; the main rank reports seconds, and its peak memory in bytes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    process = distributed.init_distributed("cpu")
    predictor = load(CHECKPOINT, process.device)
    predictor.inference = Inference(rank=rank, world_size=world_size)
    distributed.all_gather_object(rank)  # all ranks are ready
    start = time.perf_counter()
    evaluate(predictor, EvalSplit(root, "test"), [task])
    distributed.all_gather_object(rank)
    if process.is_main:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        found.put((time.perf_counter() - start, peak))
    distributed.shutdown()


def on_processes(root: Path, task: str, world_size: int) -> tuple[float, float]:
    """Seconds of the evaluation of a task on `world_size` processes, and the peak memory of the main one in bytes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measure, (root, task, world_size, port, found), world_size)  # ends all of them if one fails
    return found.get()


def whole_command(root: Path, world_size: int) -> float:
    """Seconds that eval.py takes from start to end, on one process or by torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={world_size}"] if world_size > 1 else []
    command = [sys.executable, *launcher, ROOT / "eval.py", "--checkpoint", CHECKPOINT, "--data", root,
               "--out", root / "eval", "--device", "cpu"]
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"eval.py failed: {done.stderr}")
    return time.perf_counter() - start


def bench_evaluation(count: int) -> dict[str, float]:
    """Measure every task, and the whole command, on one and on two processes. Returns the numbers of `--json`."""
    units = {"video_caption": count, "video_qa": count * len(QUESTIONS),
             "video_retrieval": 2 * count * min(count, EvalOptions().rerank)}
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root, count)
        print(f"{count} videos of {SECONDS} s, {WIDTH} x {HEIGHT} pixels; {os.cpu_count()} cores, one thread per "
              "process\n")
        print(f"{'':<22}{'1 process, s':>14}{'per second':>12}{'2 processes, s':>16}{'per second':>12}{'ratio':>8}"
              f"{'peak GB':>9}")
        for task, unit in UNITS.items():
            (one, peak), (two, _) = on_processes(root, task, 1), on_processes(root, task, 2)
            name = f"{task.removeprefix('video_')}, {unit}"
            print(f"{name:<22}{one:>14.1f}{units[task] / one:>12.1f}{two:>16.1f}{units[task] / two:>12.1f}"
                  f"{one / two:>8.2f}{peak / 1e9:>9.2f}", flush=True)
            results |= {f"{task}_s": one, f"{task}_2_processes_s": two, f"{task}_{unit}_per_second": units[task] / one,
                        f"{task}_{unit}_per_second_2_processes": units[task] / two, f"{task}_peak_gb": peak / 1e9}
        one, two = whole_command(root, 1), whole_command(root, 2)
        print(f"{'eval.py, all of it':<22}{one:>14.1f}{'':>12}{two:>16.1f}{'':>12}{one / two:>8.2f}")
        results |= {"eval_command_s": one, "eval_command_2_processes_s": two}
    return results
