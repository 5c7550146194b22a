"""Whether anything grows over a long run under cluster=ray: memory and open files of every process of it, by kind.

    python -m benchmarks.long_run [steps] [key=value ...]       default 300 toy steps; two Megatron ranks under Ray

A run as a user starts it, looked at from outside once a second. Memory in MiB: what a process has for itself, and of a raylet
what it has resident, which holds the node's object store. "early" is the median of the steps from a sixth to a third of the
run, when every kind of work has been done some dozens of times; "late" is that of the last sixth.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

RUN = (
    "cluster=ray", "trainer=megatron", "parallelism=cpu2", "rollout=local", "speculative=none", "tracking=none",
    "trainer.threads=1", "warm_start.enabled=false", "algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=2",
    "evaluation.interval_steps=50", "evaluation.num_prompts=16", "mismatch.decompose_interval_steps=0",
    "checkpoint.interval_steps=100",
)  # fmt: skip
MIB = 1 << 20
Seen = tuple[int, str, float, int]  # step, kind, MiB, open files; of all processes of a kind


def kind_of(process: psutil.Process) -> str:
    """What a process is of a run: `ray::RankHost.run` is a rank."""
    command = process.cmdline()
    first = Path(command[0].split(" ")[0]).name if command else ""
    if first.startswith("ray::"):
        return first.removeprefix("ray::").partition(".")[0]
    if first.startswith("python"):
        modules = [part for part in command[1:] if part.startswith("runner") or part.endswith(".py")]
        return Path(modules[0]).name if modules else "python"
    return first


def look(driver: int) -> dict[str, tuple[float, int]]:
    """Kind -> (MiB, open files) of the driver and all that it started."""
    root = psutil.Process(driver)
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for process in [root, *root.children(recursive=True)]:
        try:
            kind = "driver" if process.pid == driver else kind_of(process)
            memory = process.memory_full_info()
            found[kind][0] += (memory.rss if kind == "raylet" else memory.uss) / MIB
            found[kind][1] += process.num_fds()
        except psutil.Error:  # it has just ended
            continue
    return {kind: (memory, int(files)) for kind, (memory, files) in found.items()}


def watch(process: subprocess.Popen[str], metrics: Path) -> list[Seen]:
    """Once a second from the first step to the last."""
    seen: list[Seen] = []
    while process.poll() is None:
        time.sleep(1.0)
        step = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        if step:
            try:
                seen += [(step, kind, *numbers) for kind, numbers in look(process.pid).items()]
            except psutil.NoSuchProcess:
                break
    return seen


def show(seen: list[Seen], steps: int) -> None:
    print(f"{'':24} {'MiB early':>10} {'late':>8} {'files early':>12} {'late':>6}")
    for kind in sorted({row[1] for row in seen}):
        early = [row[2:] for row in seen if row[1] == kind and steps / 6 < row[0] <= steps / 3]
        late = [row[2:] for row in seen if row[1] == kind and row[0] > steps * 5 / 6]
        if early and late:
            memory, files = ([statistics.median(row[place] for row in rows) for rows in (early, late)] for place in (0, 1))
            print(f"{kind:24} {memory[0]:10.1f} {memory[1]:8.1f} {files[0]:12.0f} {files[1]:6.0f}")


def main() -> int:
    steps = int(sys.argv[1]) if sys.argv[1:] and sys.argv[1].isdigit() else 300
    extra = [argument for argument in sys.argv[1:] if "=" in argument]
    with tempfile.TemporaryDirectory(prefix="runner-long-") as outputs:
        command = [sys.executable, "-m", "runner", *RUN, f"steps={steps}", f"outputs_dir={outputs}", "run_name=long", *extra]
        log = Path(outputs) / "output.log"
        began = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=os.environ)
            metrics = Path(outputs) / "long" / "metrics.jsonl"
            seen = watch(process, metrics)
        if process.wait():
            print(log.read_text()[-3000:])
            return 1
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        step = statistics.median(row["perf/step_time"] for row in rows)
        print(f"{len(rows)} steps in {time.monotonic() - began:.0f} s, {step:.2f} s each (median), load {os.getloadavg()[0]:.1f}")
        show(seen, steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
