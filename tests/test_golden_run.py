"""Golden values: the default run, the order of its samples and the shipped checkpoint must give what was recorded.

A refactoring must not change behavior, so nothing here may move: the losses of the first steps of `python train.py`,
the samples of each batch, the outputs of `tiny_data/pretrained`, and the names and shapes of all weights.

Values are compared bit by bit on the machine signature that they were recorded on. On any other, floats may differ
slightly, as the order of summation does; texts, names, integers and orders must still be equal.

Record `golden/run.json` again only after a deliberate change of behavior:

    MPLUG2_RECORD_GOLDEN=1 pytest -n 0 tests/test_golden_run.py
"""

import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import mplug2
import tiny_data
from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.samples import Samples, read_samples
from mplug2.data.text import Tokenizer

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "run.json"
PRETRAINED = ROOT / "tiny_data" / "pretrained"
RECORDING = os.environ.get("MPLUG2_RECORD_GOLDEN", "") not in ("", "0")
HOW_TO_RECORD = "MPLUG2_RECORD_GOLDEN=1 pytest -n 0 tests/test_golden_run.py"
RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""Tolerances for floats on another machine."""
RENAMED: dict[str, str] = {
    "source": "where", "positive_id": "meaning", "masked_positions": "masked_places",
    "prompted_positions": "prompted_places", "answer_positions": "answer_places",
}
"""Fields of metrics.jsonl and of batches that were renamed after the recording: current name -> recorded name."""

STEPS = 20
"""Steps of the default run that are compared."""
BATCH_SIZE, TOTAL_STEPS, SEED, FRAMES, QUESTIONS, MAX_WORDS = 32, 1500, 0, 4, 4, 30
WEIGHTS = {"video": 0.55, "image": 0.42, "text": 0.03}
"""The defaults of train.py, spelled out: a changed default shows in the losses of the run."""


# ---- recording and comparing -----------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What decides whether floats are equal bit by bit."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        # Virtual machines often hide the exact model, but kernels are chosen by the instruction set.
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def check(section: str, found: dict) -> None:
    """Compare `found` with a section of run.json, or, if MPLUG2_RECORD_GOLDEN is set, write it there."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if RECORDING:
        # All sections have to come from the same machine: the first one from another machine drops the others.
        kept = golden if golden.get("machine") == machine() else {}
        text = json.dumps({**kept, "machine": machine(), section: found}, indent=1, ensure_ascii=False)
        on_one_line = re.sub(r'\[\s+([^][{}"]+?)\s+\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
        GOLDEN.write_text(on_one_line + "\n", encoding="utf-8")
        return
    assert section in golden, f"{GOLDEN} has no section {section!r}; record it with {HOW_TO_RECORD}"
    exact = golden["machine"] == machine()
    differing = differences(found, golden[section], exact, section)
    how = "bit by bit" if exact else f"with rtol={RELATIVE}, atol={ABSOLUTE}, as recorded on {golden['machine']}"
    shown = "\n  ".join([*differing[:30], *([f"... and {len(differing) - 30} more"] if len(differing) > 30 else [])])
    assert not differing, f"{len(differing)} values differ from {GOLDEN.name} (compared {how}):\n  {shown}"


def differences(found, expected, exact: bool, place: str) -> list[str]:
    """One line for each value that differs, with its place."""
    if isinstance(found, dict) and isinstance(expected, dict):
        lines = [f"{place}: {key!r} is missing" for key in expected if key not in found]
        lines += [f"{place}: {key!r} was not recorded" for key in found if key not in expected]
        shared = [key for key in expected if key in found and (exact or key != "bits")]
        return lines + [line for key in shared for line in differences(
            found[key], expected[key], exact, f"{place}/{key}")]
    if isinstance(found, list) and isinstance(expected, list):
        lines = [f"{place}: {len(found)} values, recorded were {len(expected)}"] if len(found) != len(expected) else []
        return lines + [line for number, pair in enumerate(zip(found, expected)) for line in differences(
            *pair, exact, f"{place}[{number}]")]
    if isinstance(found, float) and isinstance(expected, float) and not exact:
        equal = math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    else:
        equal = type(found) is type(expected) and found == expected
    return [] if equal else [f"{place}: {found!r}, recorded was {expected!r}"]


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def described(value: object) -> object:
    """A short form of a field of a batch: small enough to store, and as strict as the field itself.

    `bits` is the digest of floats. It is compared on the same machine only; elsewhere the sums and the first values,
    with tolerance, stand for the tensor.
    """
    if isinstance(value, torch.Tensor):
        header = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        digest = sha256(value.contiguous().numpy().tobytes())
        if not value.is_floating_point():
            return header | {"sha256": digest}
        sums = {"mean": value.double().mean().item(), "mean_square": value.double().square().mean().item()}
        return header | {"bits": digest, **sums, "first": value.flatten()[:8].tolist()}
    if isinstance(value, list):
        return {"length": len(value), "sha256": sha256(json.dumps(value)), "first": value[:2]}
    return value


def current(fields: dict) -> dict:
    """The fields under the names that they were recorded with."""
    return {RENAMED.get(name, name): value for name, value in fields.items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache folder with the default tiny world, written by the current code."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLUG2_CACHE", str(folder))
        tiny_data.ensure()
    return folder


@pytest.fixture(scope="module")
def world(cache) -> Path:
    (folder,) = cache.iterdir()
    return folder


# ---- the default run -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a machine with other work, too
def test_the_default_run_has_the_recorded_losses(cache, tmp_path):
    """`python train.py`, with a line for every step, is stopped after 20 steps: the learning rate then follows the
    schedule of the whole run. On one thread, so that sums do not depend on the number of cores, and on the CPU."""
    run, output = tmp_path / "tiny", tmp_path / "output.txt"
    metrics = run / "metrics.jsonl"
    environment = {
        **os.environ, "MPLUG2_CACHE": str(cache), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--out", str(tmp_path), "--log-every", "1"],
            cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT,
        )
    try:
        limit = time.monotonic() + 600
        while not metrics.exists() or metrics.read_text().count("\n") < STEPS:
            assert process.poll() is None and time.monotonic() < limit, output.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output.read_text()

    lines = [current(json.loads(line)) for line in metrics.read_text().splitlines()[:STEPS]]
    kept = [{name: value for name, value in line.items() if name.startswith("loss") or name in ("grad_norm", "lr")}
            for line in lines]
    vocabulary = json.loads((run / "last" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    check("run", {
        "steps": {str(line["step"]): values for line, values in zip(lines, kept)},
        "vocabulary": " ".join(sorted(vocabulary, key=vocabulary.get)),
    })


# ---- the order of samples, and what is in a batch --------------------------------------------------------------------


@pytest.mark.slow
def test_samples_come_in_the_recorded_order(world):
    """For the only process, and for the second of two that accumulate two micro-batches a step."""
    sizes = {stream: len(samples) for stream, samples in read_samples(world, "pretrain", "train").items()}
    found: dict[str, object] = {"sizes": sizes}
    for rank, processes, accumulate, shown in ((0, 1, 1, STEPS), (1, 2, 2, 6)):
        batches = MixedBatches(sizes, WEIGHTS, BATCH_SIZE, TOTAL_STEPS, SEED, 0, rank, processes, accumulate)
        lines = [" ".join(f"{stream}:{epoch}:{index}" for stream, epoch, index in batch) for batch in batches]
        found[f"rank {rank} of {processes}, accumulate {accumulate}"] = {
            "batches": len(lines), "sha256": sha256("\n".join(lines)), "first": lines[:shown],
        }
    check("order", found)


@pytest.mark.slow
def test_batches_hold_the_recorded_tensors(world):
    """The first three batches of the default run, and its first batch of text."""
    samples = read_samples(world, "pretrain", "train")
    sizes = {stream: len(of_stream) for stream, of_stream in samples.items()}
    config = mplug2.PRESETS["tiny"]()
    dataset = Samples(samples, config.image_size, FRAMES, QUESTIONS, config.max_positions, MAX_WORDS, SEED)
    collate = Collate(Tokenizer.load(PRETRAINED))
    keys = list(islice(MixedBatches(sizes, WEIGHTS, BATCH_SIZE, TOTAL_STEPS, SEED), STEPS))
    first_text = next(number for number, batch in enumerate(keys) if batch[0][0] == "text")
    found = {}
    for number in (0, 1, 2, first_text):
        batch = collate([dataset[key] for key in keys[number]])
        batch["source"] = [source.replace(f"{world}{os.sep}", "") for source in batch["source"]]
        found[str(number)] = {name: described(value) for name, value in current(batch).items()}
    check("batches", found)


@pytest.mark.slow
def test_the_tiny_world_has_the_recorded_texts(world):
    """All of its records, and the names of all media."""
    files = sorted(world.glob("*.json*"))
    found = {file.name: sha256(file.read_text().replace('"positive_id"', '"meaning"')) for file in files}
    names = sorted(file.relative_to(world).as_posix() for file in (world / "media").rglob("*.*"))
    check("world", {**found, "media": {"files": len(names), "sha256": sha256("\n".join(names))}})


# ---- the shipped checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_checkpoint_gives_the_recorded_outputs(world):
    model = mplug2.load(PRETRAINED)
    paths, texts, named = [], [], {}
    for medium in ("video", "image"):
        for line in (world / f"{medium}_caption.test.jsonl").read_text().splitlines()[:4]:
            record = json.loads(line)
            paths.append(world / record[medium])
            texts.append(record["captions"][0])
            named[record[medium]] = texts[-1]
    questions = [
        "which colour is the digit", "which digit is shown", "how many digits are there", "is a red digit shown",
    ]
    asked = [(path, question) for path in paths for question in questions]
    answers = model.answer(*zip(*asked))
    words = ["red", "blue", "yellow", "zero", "seven", "one", "two", "yes", "no"]
    vision = model.encode_media(paths[:4])
    found = {
        "files": named,
        "caption": model.caption(paths),
        "caption, 5 beams": model.caption(paths, beams=5),
        "caption, without a prompt": model.caption(paths, prompted=False),
        "answer": answers,
        "answer, among given words": model.answer(*zip(*asked), answer_list=words),
        "likelihood of captions": model.likelihood(paths, texts),
        "likelihood of answers": model.likelihood(*zip(*[(path, answer) for (path, _), answer in zip(asked, answers)]),
                                                  [question for _, question in asked]),
        "similarity": model.similarity(paths, texts).tolist(),
        "embeddings of media": model.embed(paths).tolist(),
        "embeddings of texts": model.embed(texts).tolist(),
        "match": [model.match_probability(one[None], texts).tolist() for one in vision],
        "tokens of the first clip": described(vision[0]),
    }
    for path, question in ((paths[0], questions[1]), (paths[4], "")):
        written, looks = model.explain(path, question)
        found[f"look at {path.name}, {question or 'caption'}"] = {
            "written": written,
            "maps": [{"word": look.word, "shape": list(look.map.shape), "values": look.map.flatten().tolist()}
                     for look in looks],
        }
    check("checkpoint", found)


@pytest.mark.parametrize("task", ["pretrain", "video_qa,grounding,image_pair_reasoning,visual_entailment"])
def test_weights_have_the_recorded_names_and_shapes(task):
    """Checkpoints of today have to fit the code of tomorrow."""
    classes = {
        "image_pair_reasoning": ("false", "true"), "visual_entailment": ("contradiction", "entailment", "neutral"),
    }
    model = mplug2.MPLUG2(mplug2.PRESETS["tiny"](), task, classes)
    check(f"weights, {task}", {name: list(weight.shape) for name, weight in sorted(model.state_dict().items())})
