"""How fast can the tiny world be learned? Trains with seeds 0, 1 and 2, and prints a row for docs/speed.md.

    python docs/speedrun.py --max-steps 1200            # any flags of train.py

The goal, as a mean over the seeds on the test split: 90 % of the captions, 75 % of the questions about binding and 85 %
of R@1 (text to video). The cost is the minutes of a whole run, evaluation and report included, times the matrix rate of
the machine at its end. Finished runs, in runs/speedrun-SEED, are not repeated: delete them after a change of the code.
"""

import json
import sys
import time
from datetime import date
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))

import train  # noqa: E402
from mplug2.training.cpu_threads import matrix_rate  # noqa: E402

GOALS = {"caption_exact": 0.90, "qa_binding": 0.75, "t2v_r1": 0.85}
SEEDS = (0, 1, 2)


def run(seed: int, flags: list[str]) -> dict[str, float]:
    """Train with a seed. Returns the metrics of GOALS, the minutes, and the rate in GFLOP/s."""
    if refused := {flag.partition("=")[0] for flag in flags} & {"--seed", "--name", "--out", "--task"}:
        raise SystemExit(f"speedrun: it chooses {', '.join(sorted(refused))} itself; leave it out")
    record = Path("runs") / f"speedrun-{seed}" / "speedrun.json"
    if not record.exists():
        start = time.time()
        results = train.main([*flags, "--seed", str(seed), "--name", record.parent.name])
        if not results:
            raise SystemExit(f"speedrun: the run was stopped; delete {record.parent} to run it again")
        found = {"minutes": (time.time() - start) / 60, "gflops": matrix_rate() / 1e9}
        record.write_text(json.dumps({"flags": flags, **found, **{name: results[name] for name in GOALS}}))
    found = json.loads(record.read_text())
    if (made := found.pop("flags")) != flags:
        raise SystemExit(f"speedrun: {record.parent} was made with the flags {made}; delete it to run it again")
    return found


def row(runs: list[dict[str, float]], flags: list[str], today: str) -> str:
    """The row of the table: date, change, minutes, minutes x GFLOP/s, metrics of GOALS, and whether all reach it."""
    mean = {name: fmean(run[name] for run in runs) for name in runs[0]}
    cost = fmean(run["minutes"] * run["gflops"] for run in runs)
    scores = " | ".join(f"{100 * mean[name]:.1f}" for name in GOALS)
    reached = all(mean[name] >= goal for name, goal in GOALS.items())
    change = f"`{' '.join(flags)}`" if flags else "defaults"
    return f"| {today} | {change} | {mean['minutes']:.1f} | {cost:,.0f} | {scores} | {'yes' if reached else 'no'} |"


if __name__ == "__main__":
    print(row([run(seed, sys.argv[1:]) for seed in SEEDS], sys.argv[1:], str(date.today())))
