"""Do the schedules learn alike? Runs the default experiment per schedule and seed, each in a fresh process with one thread.

    python -m benchmarks.schedule_curves [--schedules sync one_step_off async] [--seeds 1 2 3] [--outputs DIR] [key=value ...]

Prints one row per run: the mean reward of every ten steps, the evaluation at the end, the mean lag of the samples' weights in
updates, and the run's own seconds. `async` generates with an SGLang server, because the in-process engine cannot go on while the
trainer works; the others with the in-process engine. A run that lies complete under --outputs is read instead of made.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

from benchmarks.learning import Finished, finished

SCHEDULES = {
    "sync": ["algorithm.schedule=sync"],
    "one_step_off": ["algorithm.schedule=one_step_off"],
    "async": ["algorithm.schedule=async", "algorithm.max_staleness=1", "rollout=sglang"],
}
DECADE = 10  # steps of one mean


def row(schedule: str, seed: int, done: Finished) -> str:
    decades = [done.rows[first : first + DECADE] for first in range(0, len(done.rows), DECADE)]
    rewards = [mean(step["rollout/raw_reward"] for step in steps) for steps in decades]
    evals = [step["eval/arithmetic"] for step in done.rows if "eval/arithmetic" in step]
    lag = mean(step["train/weight_version_lag"] for step in done.rows)
    cells = [*(f"{value:.3f}" for value in rewards), f"{evals[-1]:.3f}" if evals else "", f"{lag:.2f}", f"{done.seconds:.0f}"]
    return f"| {schedule} | {seed} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--outputs", type=Path, help="a folder that keeps the runs")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    head = ""
    with tempfile.TemporaryDirectory(prefix="runner-curves-") as folder:
        for schedule in options.schedules:
            for seed in options.seeds:
                overrides = [*SCHEDULES[schedule], f"seed={seed}", "trainer.threads=1", "tracking=none", *options.overrides]
                done = finished(f"{schedule}_{seed}", overrides, options.outputs or Path(folder))
                if not head:
                    steps = [f"to {min(last + DECADE, len(done.rows))}" for last in range(0, len(done.rows), DECADE)]
                    head = f"| schedule | seed | {' | '.join(steps)} | eval | lag | seconds |"
                    print(f"{head}\n|{'---|' * (head.count('|') - 1)}", flush=True)
                print(row(schedule, seed, done), flush=True)


if __name__ == "__main__":
    main()
