"""Small ablations in the tiny world, with three seeds each: what is each kind of module good for?

    python notebooks/ablations.py

It trains every variant by train.py, with its defaults but for the flags below, and writes the results on the test split
to notebooks/ablations.json, run by run; runs that are in the file already are not done again. Uncontended, on one core,
the runs of 400 steps take about 40 minutes in all, those of 1,500 steps an hour. Notebook 06 shows the results.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
# The runs "alone" have the steps of the full model that are of clips (65 %), or of pictures (30 %), and those of text
# only (5 %); the others are left out.
VARIANTS = {
    "1,500 steps: full": "",
    "1,500 steps: no local temporal": "--no-local-temporal",
    "400 steps: full": "--max-steps 400",
    "400 steps: no universal": "--max-steps 400 --universal-layers 0",
    "400 steps: all text layers universal": "--max-steps 400 --universal-layers 4",
    "400 steps: video alone": "--max-steps 280 --image-weight 0",
    "400 steps: image alone": "--max-steps 140 --video-weight 0",
}
METRICS = ("caption_exact", "qa_order", "qa_digit", "qa_binding", "v2t_r1", "t2v_r1",
           "image_caption_exact", "image_qa_digit", "image_v2t_r1", "image_t2v_r1")


def train(variant: str, seed: int) -> dict[str, float]:
    """Train and evaluate one model: its parameters, and by metric the share of the test split that is right."""
    flags = [*VARIANTS[variant].split(), "--seed", str(seed), "--eval-every", "9999"]  # no validation on the way
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", *flags, "--out", out, "--name", "run"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        last = json.loads((Path(out) / "run/metrics.jsonl").read_text().splitlines()[-1])
    line = next(line for line in done.stdout.splitlines() if " parameters, " in line)
    parameters = int(line.partition(": ")[2].partition(" ")[0].replace(",", ""))
    return {"parameters": parameters, **{name: round(last[f"test/{name}"], 4) for name in METRICS}}


def main() -> None:
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for seed in SEEDS:
        for variant in VARIANTS:
            if str(seed) not in runs.setdefault(variant, {}):
                runs[variant][str(seed)] = train(variant, seed)
                written = {"command": "python notebooks/ablations.py", "flags of train.py": VARIANTS, "runs": runs}
                RESULTS.write_text(json.dumps(written, indent=1) + "\n")
                print(variant, seed, runs[variant][str(seed)], flush=True)


if __name__ == "__main__":
    main()
