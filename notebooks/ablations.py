"""Small ablations: sharing between text and vision, and between clips and pictures, in the tiny world; three seeds each.

    python notebooks/ablations.py          # about 40 minutes on one core; what is in ablations.json already is kept

It trains every variant by train.py, with its defaults but for the flags below, and writes the results on the test split
to notebooks/ablations.json. Notebook 06 shows them, beside the full-length runs without local temporal modules of the
README.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix(".json")
STEPS = 400
SEEDS = (0, 1, 2)
VARIANTS = {
    "full": "",
    "no universal": "--universal-layers 0",
    "all text layers universal": "--universal-layers 4",
    # The steps of the full model that are of clips, or of pictures, and those of text only; the others are left out.
    "video alone": f"--image-weight 0 --max-steps {round(0.7 * STEPS)}",
    "image alone": f"--video-weight 0 --max-steps {round(0.35 * STEPS)}",
}
METRICS = ("caption_exact", "qa_order", "qa_digit", "qa_binding", "v2t_r1", "t2v_r1",
           "image_caption_exact", "image_qa_digit", "image_v2t_r1", "image_t2v_r1")


def arguments(variant: str, seed: int) -> list[str]:
    """Of train.py; validations on the way are left out."""
    steps = [] if "--max-steps" in VARIANTS[variant] else ["--max-steps", str(STEPS)]
    return [*VARIANTS[variant].split(), *steps, "--seed", str(seed), "--eval-every", str(10 * STEPS)]


def train(variant: str, seed: int) -> dict[str, float]:
    """Train and evaluate one model: parameters, and the share of the test split that is right, by metric."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", *arguments(variant, seed), "--out", out, "--name", "run"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        last = json.loads((Path(out) / "run/metrics.jsonl").read_text().splitlines()[-1])
    parameters = next(line for line in done.stdout.splitlines() if " parameters, " in line)
    count = int(parameters.partition(": ")[2].partition(" ")[0].replace(",", ""))
    return {"parameters": count, **{name: round(last[f"test/{name}"], 4) for name in METRICS}}


def main() -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    runs = found.get("runs", {})
    for seed in SEEDS:
        for variant in VARIANTS:
            if str(seed) in runs.get(variant, {}):
                continue
            runs.setdefault(variant, {})[str(seed)] = train(variant, seed)
            commands = {name: " ".join(["train.py", *arguments(name, 0)]) for name in VARIANTS}
            RESULTS.write_text(json.dumps(
                {"command": "python notebooks/ablations.py", "training, seed 0": commands, "runs": runs}, indent=1) + "\n")
            print(variant, seed, runs[variant][str(seed)], flush=True)


if __name__ == "__main__":
    main()
