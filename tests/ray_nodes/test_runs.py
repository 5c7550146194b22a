"""Whole runs under Ray, as a user starts them: the metrics of cluster=local, and SIGTERM to the whole process group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.config import compose
from tests.test_recipes import BLOCKS, PUBLISHED

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SMALL = [
    "tracking=none", "trainer.threads=1", "warm_start.enabled=false", "algorithm.prompts_per_step=2",
    "algorithm.samples_per_prompt=2", "evaluation.interval_steps=0", "mismatch.decompose_interval_steps=0",
]  # fmt: skip
ONE_NODE = [*SMALL, "trainer=megatron", "parallelism=cpu2", "rollout=local", "speculative=none"]
TWO_NODES = [
    *SMALL, "scale=laptop", "cluster=ray", "cluster.nodes=2", "trainer=megatron", "parallelism=cpu2", "rollout=sglang",
    "rollout.cpu_engines=2", "speculative=none", "rollout.startup_timeout_seconds=600",
]  # fmt: skip


def _start(outputs: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "runner", *overrides, f"outputs_dir={outputs}", f"run_name={name}"]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def _metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def test_a_run_has_the_metrics_of_one_without_ray(tmp_path: Path) -> None:
    for name, cluster in (("local", "cluster=local"), ("ray", "cluster=ray")):
        run = _start(tmp_path, name, *ONE_NODE, cluster, "steps=2")
        said, _ = run.communicate(timeout=400)
        assert run.returncode == 0, said[-3000:]
    ours, theirs = _metrics(tmp_path / "ray"), _metrics(tmp_path / "local")
    assert len(ours) == 2 and ours == theirs


def test_sigterm_to_the_whole_group_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = _start(tmp_path, "stopped", *ONE_NODE, "cluster=ray", "steps=1000")
    rows, deadline = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 300
    while not (rows.is_file() and rows.read_text()) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGTERM)
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 130 and "Traceback" not in said, said[-3000:]
    assert "is complete. Continue with:" in said and list((tmp_path / "stopped" / "checkpoints").glob("step_*"))


def _servers(folder: Path) -> list[Any]:
    """The processes that a run's agents started for its engines."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            mine = "runner.rollout.sglang.entry" in process.cmdline() and str(folder) in str(process.open_files())
            if mine and "NodeAgent" in " ".join(psutil.Process(process.ppid()).cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


# FP8 quantizes blocks of 128 x 128: two tensor-parallel shards of a toy would cut one, and servers want whole ones
WHOLE_BLOCKS = ["parallelism.tp=1", *BLOCKS]
RECIPES: dict[str, list[str]] = {
    "kimi_k2_int4": [],
    "moonlight_16b_int4": [],
    "qwen3_235b_int4": [],
    "qwen3_30b_int4": [],
    "qwen3_30b_fp8": WHOLE_BLOCKS,
    "qwen3_4b_fp8": WHOLE_BLOCKS,
}


def test_every_recipe_of_many_gpus_is_run_on_two_nodes() -> None:
    """Those that Megatron ranks and SGLang servers can run: not the one of a vision model."""
    assert set(RECIPES) == {name for name in PUBLISHED if compose.load_config([f"recipe={name}"]).trainer.name == "megatron"}
    for recipe, layout in RECIPES.items():
        compose.load_config([f"recipe={recipe}", *TWO_NODES, *layout])


@pytest.mark.sglang
@pytest.mark.night  # three minutes each: a rank and a server on each node
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_on_two_nodes_survives_a_killed_server(tmp_path: Path, recipe: str) -> None:
    """A Megatron rank and an SGLang server on each node; one server is killed after the first step, and no sample is missing."""
    _survives_a_killed_server(tmp_path, recipe, f"recipe={recipe}", *TWO_NODES, *RECIPES[recipe])


@pytest.mark.sglang
@pytest.mark.night
def test_two_stages_send_weights_to_servers_of_which_one_starts_again(tmp_path: Path) -> None:
    """weight_transport=ranks: each pipeline stage is a sender; the server that starts again is sent them, too."""
    staged = ["parallelism.tp=1", "parallelism.pp=2", "rollout.weight_transport=ranks"]
    _survives_a_killed_server(tmp_path, "staged", "model=tiny_moe", "precision=int4_qat", *TWO_NODES, *staged)


def _survives_a_killed_server(outputs: Path, name: str, *overrides: str) -> None:
    run = _start(outputs, name, *overrides, "steps=3")
    folder, deadline = outputs / name, time.monotonic() + 700
    rows = folder / "metrics.jsonl"
    while not (rows.is_file() and rows.read_text()) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    parents = _servers(folder)
    assert len(parents) == 2, run.communicate(timeout=700)[0][-3000:]
    parents[0].kill()
    said, _ = run.communicate(timeout=700)
    assert run.returncode == 0, said[-3000:]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == 3 and sum(row["rollout/engine_restarts"] for row in found) >= 1
    assert all(row["train/nan_steps"] == 0 and row["sync/resident_checked"] > 0 for row in found)


@pytest.mark.sglang
@pytest.mark.night
def test_an_engine_of_two_nodes_survives_the_death_of_its_second_part(tmp_path: Path) -> None:
    """One server of two tensor-parallel ranks, one on each node, as an engine that is larger than a node. Each part loads the
    weights that its own node has; the end of one part is the end of the server, which is started again on both."""
    wide = ["model=tiny_moe", "precision=int4_qat", "rollout.cpu_engines=1", "rollout.cpu_tp=2", "rollout.cpu_nodes=2"]
    run = _start(tmp_path, "wide", *TWO_NODES, *wide, "steps=3", "algorithm.samples_per_prompt=4")
    folder, deadline = tmp_path / "wide", time.monotonic() + 700
    rows = folder / "metrics.jsonl"
    while not (rows.is_file() and rows.read_text()) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    parts = _servers(folder)
    second = [part for part in parts if any("_part1" in opened.path for opened in part.open_files())]
    assert len(parts) == 2 and len(second) == 1, run.communicate(timeout=700)[0][-3000:]
    second[0].kill()
    said, _ = run.communicate(timeout=700)
    assert run.returncode == 0, said[-3000:]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(found) == 3 and sum(row["rollout/engine_restarts"] for row in found) >= 1
    for row in found:
        assert row["train/nan_steps"] == 0 and row["sync/resident_checked"] > 0
        assert row["train/train_rollout_logprob_abs_diff"] < 0.03 and row["router_replay/disagreement"] < 0.05
