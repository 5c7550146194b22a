"""`make same BASE=<commit>`: short runs of the working tree and of another commit must leave equal metrics, bit for bit.

    python .ci/same.py BASE [--runs default,megatron,sglang] [--keep FOLDER] [--both KEY=VALUE ...]

A refactor changes where things stand and nothing that is computed. Each run is made twice, once with the code of this
checkout and once with that of BASE (in a worktree of its own), and their `metrics.jsonl` are compared key by key;
`perf/*` is left out, because it is time. A default that changed on purpose is given to both with --both. Exit 0: all equal;
1: the first differences are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    "tracking=none", "trainer.threads=1", "algorithm.prompts_per_step=8", "algorithm.samples_per_prompt=4",
    "evaluation.interval_steps=2", "evaluation.num_prompts=8", "evaluation.samples_per_prompt=2",
    "warm_start.max_steps=12", "warm_start.check_interval_steps=6", "warm_start.cache=false",
    "mismatch.decompose_interval_steps=1", "mismatch.decompose_samples=4", "checkpoint.interval_steps=2",
    "speculative.auto_disable=false",  # whether drafts pay is measured in seconds, which a busy machine changes
]  # fmt: skip
RUNS = {
    "default": ["steps=3"],
    "vision": ["steps=2", "model=tiny_vlm", "precision=bf16"],
    "dense": ["steps=2", "model=tiny_mtp", "precision=fp8", "algorithm=reinforce_pp"],
    "megatron": ["steps=2", "trainer=megatron", "parallelism.ranks=2", "parallelism.tp=2", "parallelism.sequence_parallel=true"],
    "sglang": ["steps=2", "rollout=sglang"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--runs", default=",".join(RUNS), help=f"some of {','.join(RUNS)}")
    parser.add_argument("--keep", type=Path, help="leave the runs here")
    parser.add_argument("--both", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of both runs")
    options = parser.parse_args()
    names = options.runs.split(",")
    if unknown := set(names) - set(RUNS):
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    if "sglang" in names and importlib.util.find_spec("sglang") is None:
        parser.error("sglang is not installed here: `make setup-sglang`, or leave it out with --runs")
    with tempfile.TemporaryDirectory(prefix="runner-same-") as scratch:
        base = Path(scratch) / "base"
        _git("worktree", "add", "--detach", str(base), options.base)
        try:
            outputs = options.keep or Path(scratch) / "outputs"
            return max([_compare(name, base, outputs, options.both) for name in names])
        finally:
            _git("worktree", "remove", "--force", str(base))


def _compare(name: str, base: Path, outputs: Path, both: list[str]) -> int:
    before = _run(name, base, outputs / "base", both)
    after = _run(name, ROOT, outputs / "here", both)
    problems = [f"{len(before)} steps, now {len(after)}"] if len(before) != len(after) else []
    compared = 0
    for step, (old, new) in enumerate(zip(before, after, strict=False)):
        for key in sorted(old.keys() | new.keys()):
            if key.startswith(("perf/", "_")):
                continue
            compared += 1
            if json.dumps(old.get(key)) != json.dumps(new.get(key)):
                problems.append(f"step {step} {key}: {old.get(key)} is now {new.get(key)}")
    if not compared:
        problems.append("nothing was compared")
    print(f"{name}: {'DIFFERS' if problems else 'same'} ({compared} values of {len(after)} steps)", flush=True)
    for problem in problems[:10]:
        print(f"    {problem}")
    return int(bool(problems))


def _run(name: str, tree: Path, outputs: Path, both: list[str]) -> list[dict[str, object]]:
    """The rows of metrics.jsonl of one run with the code of `tree`."""
    command = [sys.executable, "-m", "runner", *COMMON, *RUNS[name], *both, f"outputs_dir={outputs}", f"run_name={name}"]
    environment = os.environ | {"PYTHONPATH": str(tree), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} in {tree} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return [json.loads(line) for line in (outputs / name / "metrics.jsonl").read_text().splitlines()]


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
