"""`python -m runner rollout=sglang`: the program itself, with real servers, for two steps. (That it learns is in README.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.run_folders import unclocked

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
SMALL = [
    "rollout=sglang", "model=tiny_moe", "steps=2", "warm_start.enabled=false", "algorithm.prompts_per_step=8",
    "algorithm.samples_per_prompt=4", "evaluation.num_prompts=8", "evaluation.samples_per_prompt=1",
    "evaluation.interval_steps=2", "checkpoint.interval_steps=1", "trainer.threads=1",
]  # fmt: skip
# What a server's batches reach: its logprobs, and through a route at a tie the replayed forward.
ROUNDED = ("train/train_rollout_", "mismatch/", "router_replay/", "train/entropy_loss")
SHARING = """
import sys
import runner.run.supervise
from runner.__main__ import main
runner.run.supervise.shares_gpus = lambda cfg: True  # on a GPU: trainer and engines share it
sys.exit(main())
"""


def run(tmp_path: Path, name: str, *overrides: str, program: tuple[str, ...] = ("-m", "runner")) -> list[dict[str, Any]]:
    """The metrics of every step."""
    command = [sys.executable, *program, *SMALL, f"outputs_dir={tmp_path}", f"run_name={name}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    events = (tmp_path / name / "events.jsonl").read_text()
    assert "sync_failed" not in events and "Traceback" not in done.stderr
    mine = [p for p in psutil.process_iter(["cmdline"]) if f"outputs_dir={tmp_path}" in (p.info["cmdline"] or [])]
    assert mine == []
    return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.promise("the program itself runs, in bf16 and packed INT4, and taking turns changes nothing")
def test_bf16_and_packed_int4_run_and_sharing_gpus_changes_nothing(tmp_path: Path) -> None:
    plain = {name: run(tmp_path, name, f"precision={name}") for name in ("bf16", "int4_qat")}
    for steps in plain.values():
        assert len(steps) == 2 and unclocked(steps) < 0.02
        for step in steps:
            assert step["perf/rollout_tokens"] > 0 and step["probe/logprob_abs_diff"] < 0.05
            assert step["sync/resident_checked"] >= 16
    wire = {name: steps[-1]["perf/update_weights_wire_bytes"] for name, steps in plain.items()}
    assert wire["int4_qat"] < wire["bf16"] / 2
    sharing = run(tmp_path, "sharing", "precision=int4_qat", program=("-c", SHARING))
    for alone, shared in zip(plain["int4_qat"], sharing, strict=True):
        # Which tensors a sync checks rotates with the number of loads, and engines that slept are loaded more often. A server
        # puts together the requests that are there: on a loaded machine its batches differ, and the last bits of logprobs.
        keys = [key for key in alone if not key.startswith(("perf/", "_")) and key != "sync/resident_checked"]
        rounded = [key for key in keys if key.startswith(ROUNDED)]
        exact = [key for key in keys if key not in rounded]
        assert len(exact) > 20 and {key: alone[key] for key in exact} == {key: shared[key] for key in exact}
        assert {key: alone[key] for key in rounded} == pytest.approx({key: shared[key] for key in rounded}, rel=0.02, abs=2e-4)
