"""Seconds per step of the schedules, and where each waits: trainer and one SGLang server, a core each.

    python -m benchmarks.schedules [--steps 12] [--seed 1] [key=value ...]

The same run under `sync`, `one_step_off` and `async`, one after the other. Means over the steps after the second. `waited` is the
time in which the trainer had no rollout to train on, `lag` how many updates old its samples' weights were.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

SCHEDULES: dict[str, list[str]] = {
    "sync": [],
    "one_step_off": [],
    "async, 1 ahead": ["algorithm.max_staleness=1"],
    "async, 2 ahead": ["algorithm.max_staleness=2"],
}
COLUMNS = {
    "step": "perf/step_time",
    "waited": "perf/rollout_time",
    "train": "perf/train_time",
    "sync": "perf/update_weights_time",
    "lag": "train/weight_version_lag",
    "reward": "rollout/raw_reward",
}
WARM = 2  # steps that are left out


def run(schedule: str, options: argparse.Namespace, root: Path) -> list[dict[str, float]]:
    folder = root / schedule.replace(", ", "_").replace(" ", "_")
    overrides = [
        *("rollout=sglang", "trainer.threads=1", "tracking=none", f"steps={options.steps}", f"seed={options.seed}"),
        *("evaluation.interval_steps=0", "mismatch.decompose_interval_steps=0"),
        *(f"algorithm.schedule={schedule.partition(',')[0]}", *SCHEDULES[schedule]),
        *(f"outputs_dir={root}", f"run_name={folder.name}"),
    ]
    done = subprocess.run([sys.executable, "-m", "runner", *overrides, *options.overrides], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    print(f"| schedule | {' | '.join(COLUMNS)} | step over sync |\n|---|{'---|' * (len(COLUMNS) + 1)}", flush=True)
    base = 0.0
    with tempfile.TemporaryDirectory(prefix="runner-schedules-") as folder:
        for schedule in SCHEDULES:
            rows = run(schedule, options, Path(folder))[WARM:]
            found = [mean(row.get(key, 0.0) for row in rows) for key in COLUMNS.values()]
            base = base or found[0]
            print(f"| {schedule} | {' | '.join(f'{value:.3f}' for value in found)} | {found[0] / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
