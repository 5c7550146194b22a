"""task=calculator: the environment, its worked solutions, and whole runs with every engine and trainer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.config import compose
from runner.errors import UserErrors
from runner.models.tokenizer import byte_tokenizer
from runner.tasks.calculator import Calculator, CalculatorTask
from tests.configs import composed

SMALL = [
    "task=calculator", "steps=4", "warm_start.max_steps=20", "warm_start.check_interval_steps=20", "checkpoint.interval_steps=2",
    "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=4", "evaluation.interval_steps=2", "evaluation.num_prompts=8",
    "tracking=none", "speculative.auto_disable=false",
]  # fmt: skip


def test_worked_solutions_are_conversations_with_the_calculator() -> None:
    tokenizer = byte_tokenizer()
    task = CalculatorTask(compose.load_config(["task=calculator"]).task, tokenizer)  # type: ignore[arg-type]
    pairs = task.worked_solutions(30, seed=1)
    assert len(pairs) == 30
    for place in range(0, 30, 3):  # three numbers: two calls and the answer
        (start, first), (second, call), (third, answer) = pairs[place : place + 3]
        environment = Calculator(0.1)
        numbers = tokenizer.decode(start.tokens).rstrip("=").split("+")
        environment.answer = sum(map(int, numbers))
        seen, done, _ = asyncio.run(environment.step(first))
        assert tokenizer.decode(second.tokens) == f"{tokenizer.decode(start.tokens)}{first}<eos>{seen}" and not done
        seen, done, _ = asyncio.run(environment.step(call))
        assert tokenizer.decode(third.tokens) == f"{tokenizer.decode(second.tokens)}{call}<eos>{seen}" and not done
        assert asyncio.run(environment.step(answer))[1:] == (True, {"rewards": {"answer": 1.0}})


def test_held_out_problems_never_train_and_nonsense_costs() -> None:
    task = CalculatorTask(compose.load_config(["task=calculator"]).task, byte_tokenizer())  # type: ignore[arg-type]
    held = {prompt.text for prompt in task.eval_prompts(256)}
    assert len(held) == 256 and not held & {prompt.text for step in range(20) for prompt in task.train_prompts(step, 50)}
    for text in ("12+", "1+2+3", "=", "=12 ", "", "12+34=", "\u0661+1"):
        seen, done, info = asyncio.run(Calculator(0.1).step(text))
        assert (seen, done) == ("?;", False) and info["rewards"] == {"format": -0.1}


def test_gsm8k_with_the_calculator_composes_and_needs_no_other_key() -> None:
    cfg = composed("task=gsm8k_calculator")
    assert cfg.task.rollout.environment == "runner.turns.tools.ToolEnvironment" and cfg.task.rollout.observation_role == "tool"
    with pytest.raises(UserErrors, match="at most"):
        compose.load(["task=calculator", "task.rollout.max_turns=10000000"])


def _command(outputs: Path, name: str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "runner", *SMALL, f"outputs_dir={outputs}", f"run_name={name}", *overrides]


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def _metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_and_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    _run(_command(tmp_path, "whole", "task.rollout.lockstep_seconds=60"))
    killed = _command(tmp_path, "killed", "task.rollout.lockstep_seconds=60")
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 900
    while not (path.is_file() and len(path.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _run([sys.executable, "-m", "runner", f"resume={tmp_path / 'killed'}"])
    whole = _metrics(tmp_path / "whole")
    assert len(whole) == 4 and _metrics(tmp_path / "killed") == whole
    assert all(row["rollout/turns/mean"] > 1 and row["rollout/observation_tokens"] > 0 for row in whole)
    shown = _run(
        [sys.executable, "-m", "runner", "show", str(tmp_path / "whole"), "4"]
    )  # of some samples the first turn ends all
    assert "environment" in shown and "reward/answer" in shown and "engine" in shown
    one = _run([sys.executable, "-m", "runner", "show", str(tmp_path / "whole"), "4", "0"])
    assert one.strip() in shown and one.count("sample ") == 1
    page = tmp_path / "step.html"
    _run([sys.executable, "-m", "runner", "show", str(tmp_path / "whole"), "4", "--out", str(page)])
    assert "environment" in page.read_text() and "://" not in page.read_text().replace("http://www.w3.org", "")
    assert "environment</span>" in (tmp_path / "whole" / "report.html").read_text()


def _aligned(rows: list[dict[str, float]], apart: float) -> None:
    """Turns were taken, and engine and trainer agree on the tokens of the model after all of them, routes replayed."""
    for row in rows:
        assert row["rollout/turns/mean"] > 1 and row["rollout/failed"] == 0
        assert row["train/train_rollout_logprob_abs_diff"] < apart
        assert "router_replay/disagreement" in row


@pytest.mark.sglang
@pytest.mark.night
@pytest.mark.timeout(1800)
def test_with_sglang_servers(tmp_path: Path) -> None:
    pytest.importorskip("sglang")
    _run(_command(tmp_path, "run", "rollout=sglang", "steps=2", "precision=bf16"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    _aligned(rows, 0.02)
    assert all(row["perf/rollout_cached_tokens"] > 0 for row in rows)  # the servers' radix caches


@pytest.mark.megatron
@pytest.mark.timeout(1800)
def test_with_megatron(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    _run(_command(tmp_path, "run", "trainer=megatron", "parallelism=cpu2", "steps=2", "precision=bf16"))
    _aligned(_metrics(tmp_path / "run"), 0.02)
