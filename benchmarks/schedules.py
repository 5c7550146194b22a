"""Seconds per step of the schedules, and where each side waits: a trainer and one SGLang server, a thread each.

    python -m benchmarks.schedules [--steps 14] [--seed 1] [--minutes 12] [--output FILE] [--only NAME ..] [key=value ...]

The same run under `sync`, `one_step_off` and `async`, one after the other, without a warm start: a random model says as much as
it may, so all schedules generate equally much. Means in seconds, without the first two and last two steps:

generate      from a rollout's first request to its last answer; rollouts of async overlap, so it has none of its own
train, sync   the trainer's update, and sending the new weights
trainer waits without a rollout to train on
engine waits  without a request: a step less generating, where rollouts do not overlap

`lag`: updates between the weights that a sample came from and those it trains. --output also writes the table, with the machine
and the command, to a file (benchmarks/results/schedules.md). A run that takes longer than its share of --minutes is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

from runner.cores import available_cores

SCHEDULES: dict[str, list[str]] = {
    "sync": ["algorithm.schedule=sync"],
    "one_step_off": ["algorithm.schedule=one_step_off"],
    "async, 1 ahead": ["algorithm.schedule=async", "algorithm.max_staleness=1"],
    "async, 2 ahead": ["algorithm.schedule=async", "algorithm.max_staleness=2"],
}
SIZES = [
    "rollout=sglang", "model=tiny_moe", "warm_start.enabled=false", "evaluation.interval_steps=0", "tracking=none",
    "mismatch.decompose_interval_steps=0", "checkpoint.interval_steps=0", "trainer.threads=1", "algorithm.prompts_per_step=16",
    "algorithm.samples_per_prompt=8", "rollout.sampling.max_response_tokens=24",
]  # fmt: skip
COLUMNS = ("schedule", "step", "over sync", "generate", "train", "sync", "trainer waits", "engine waits", "lag")
WARM, LAST = 2, 2  # steps that are left out: at the end nothing is generated beside the trainer any more


def run(name: str, options: argparse.Namespace, root: Path) -> list[dict[str, float]]:
    """metrics.jsonl of the run; it ends the program where it fails or is late."""
    folder = name.replace(", ", "_").replace(" ", "_")
    command = [sys.executable, "-m", "runner", *SIZES, *SCHEDULES[name], f"steps={options.steps}", f"seed={options.seed}"]
    command += [f"outputs_dir={root}", f"run_name={folder}", *options.overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # of the server, too: a core each
    log = root / f"{folder}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(timeout=60 * options.minutes / len(options.only))
        except subprocess.TimeoutExpired:
            process.terminate()  # the program ends its server
            process.wait()
            print(log.read_text()[-1000:], file=sys.stderr)
            sys.exit(f"{name} took longer than its share of {options.minutes:g} minutes: fewer --steps, or more --minutes")
    if code:
        sys.exit(log.read_text()[-3000:])
    return [json.loads(line) for line in (root / folder / "metrics.jsonl").read_text().splitlines()]


def row(name: str, rows: list[dict[str, float]], base: float) -> str:
    """`base`: seconds of a step under sync; 0 where this is sync."""

    def seconds(key: str) -> float:
        return mean(row.get(key, 0.0) for row in rows)

    step, waits = seconds("perf/step_time"), seconds("perf/rollout_time")
    overlapping = name.startswith("async")
    generate = seconds("perf/generation_time") if "perf/generation_time" in rows[0] else waits
    cells = [f"{step:.2f}", f"{step / (base or step):.2f}", "" if overlapping else f"{generate:.2f}"]
    cells += [f"{seconds(key):.2f}" for key in ("perf/train_time", "perf/update_weights_time")]
    cells += [f"{waits:.2f}", "" if overlapping else f"{max(0.0, step - generate):.2f}"]
    return f"| {name} | {' | '.join(cells)} | {seconds('train/weight_version_lag'):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=12, help="that all runs together may take")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    if options.steps <= WARM + LAST:
        parser.error(f"--steps={options.steps}: the first {WARM} and the last {LAST} are left out")
    table = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    print("\n".join(table), flush=True)
    base = 0.0
    with tempfile.TemporaryDirectory(prefix="runner-schedules-") as folder:
        for name in options.only:
            rows = run(name, options, Path(folder))[WARM:-LAST]
            table.append(row(name, rows, base))
            base = base or mean(row["perf/step_time"] for row in rows)
            print(table[-1], flush=True)
    if options.output:
        machine = f"{available_cores()} cores of {cpu_name()}, load {os.getloadavg()[2]:.1f} over the last quarter of an hour"
        only = [] if options.only == list(SCHEDULES) else ["--only", *map(repr, options.only)]
        sizes = f"--steps {options.steps} --seed {options.seed}"
        said = " ".join(["python -m benchmarks.schedules", sizes, *options.overrides, *only])
        text = f"# Schedules: seconds per step, and who waits\n\n{time.strftime('%Y-%m-%d')}, {machine}. `{said}`:\n\n"
        options.output.write_text(text + "\n".join(table) + "\n\nWhat the columns mean stands in benchmarks/schedules.py.\n")


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
