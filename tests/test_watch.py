"""Watch rules: when they fire, what they say, and that a resumed run repeats them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runner.config import schema
from runner.errors import UserError
from runner.run.watch import Watcher, diagnose
from runner.tracking.tracker import JsonlTracker
from tests.configs import composed

MISMATCH = "train/train_rollout_logprob_abs_diff"
ROUTING = {"mismatch/quantization_abs": 0.01, "mismatch/routing_abs": 0.05, "mismatch/numerics_abs": 0.002}
QUANTIZATION = {"mismatch/quantization_abs": 0.06, "mismatch/routing_abs": 0.01, "mismatch/numerics_abs": 0.002}
FIXED: dict[str, Any] = {"trainer.optimizer.lr": 1e-3, "rollout.sampling.max_response_tokens": 32}  # that remedies change
NUMERICS = {"mismatch/quantization_abs": 0.0, "mismatch/routing_abs": 0.0, "mismatch/numerics_abs": 0.004}


def rule(metric: str, **changes: Any) -> schema.WatchRuleConfig:
    return schema.WatchRuleConfig(metric, **({"patience_steps": 1} | changes))


def config(*, baseline: str | None = None, window: int = 4, r3: bool = True, **rules: schema.WatchRuleConfig) -> schema.Config:
    cfg = composed("model=tiny_moe", "precision=int4_qat", f"router_replay={'r3' if r3 else 'none'}", **FIXED)
    cfg.watch = schema.WatchConfig(baseline, window, dict(rules))
    return cfg


def fired(watcher: Watcher, metric: str, values: list[float], first_step: int = 0) -> list[int]:
    return [step for step, value in enumerate(values, first_step) if watcher.check(step, {metric: value})]


def test_bounds() -> None:
    watcher = Watcher(config(a=rule("m", above=1.0), b=rule("n", below=0.5)))
    assert fired(watcher, "m", [0.9, 1.0, 1.1]) == [2]
    assert fired(watcher, "n", [0.6, 0.5, 0.4]) == [2]


def test_a_jump_below_the_floor_is_noise() -> None:
    watcher = Watcher(config(a=rule("m", jump_ratio=3.0, jump_floor=1e-3)))
    assert fired(watcher, "m", [1e-5] * 4 + [9e-4, 1e-5, 1e-5, 1e-5, 2e-3]) == [8]
    with pytest.raises(UserError, match="jump_floor"):
        Watcher(config(a=rule("m", above=1.0, jump_floor=1e-3)))


def test_fires_once_per_episode_after_patience() -> None:
    watcher = Watcher(config(a=rule("m", above=1.0, patience_steps=3)))
    assert fired(watcher, "m", [2, 2, 0, 2, 2, 2, 2, 2, 0, 2, 2, 2]) == [5, 11]


@pytest.mark.parametrize("bound", [{"above": 1.0}, {"below": 0.0}, {"jump_ratio": 2.0}])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_break_every_rule(bound: dict[str, float], value: float) -> None:
    assert fired(Watcher(config(a=rule("m", **bound))), "m", [0.5, value]) == [1]


def test_jump_compares_with_earlier_values_that_kept_the_rule() -> None:
    watcher = Watcher(config(a=rule("m", jump_ratio=2.0)))
    # The first four fill the window; the jump itself must not raise the mean that later values are compared with.
    assert fired(watcher, "m", [1, 9, 1, 1, 6.1, 6.1, 1, 1, 1, 1, 2.1]) == [4, 10]


def test_a_ratio_under_one_is_a_collapse() -> None:
    watcher = Watcher(config(a=rule("train/grad_norm", jump_ratio=0.1)))
    assert fired(watcher, "train/grad_norm", [1, 1, 1, 1, 0.11, 5.0, 0.09]) == [6]


def test_steps_without_the_metric_count_neither_way() -> None:
    watcher = Watcher(config(a=rule("m", above=1.0, patience_steps=2), b=rule("never", above=1.0)))
    assert not watcher.check(0, {"m": 2.0}) and not watcher.check(1, {"other": 5.0})
    assert [alert.rule for alert in watcher.check(2, {"m": 2.0})] == ["a"]
    assert watcher.unseen() == ["b (never)"]


def test_stop_is_carried_by_the_alert() -> None:
    (alert,) = Watcher(config(a=rule("m", above=1.0, action=schema.WatchAction.stop))).check(7, {"m": 2.0})
    assert (alert.action, alert.rule, alert.step, alert.value) == ("stop", "a", 7, 2.0)
    assert not Watcher(config(a=rule("m", above=1.0, enabled=False))).check(7, {"m": 2.0})


def test_reward_drop_against_a_baseline(tmp_path: Path) -> None:
    baseline = JsonlTracker(tmp_path / "base")
    for step in range(3):
        baseline.log(step, {"rollout/raw_reward": 0.5})
    reward_drop = rule("rollout/raw_reward", drop_against_baseline=0.1)
    watcher = Watcher(config(baseline=str(tmp_path / "base"), reward_drop=reward_drop))
    assert fired(watcher, "rollout/raw_reward", [0.45, 0.3, 0.6, 0.0]) == [1]  # step 3 has no baseline
    assert fired(Watcher(config(reward_drop=reward_drop)), "rollout/raw_reward", [0.0] * 3) == []
    cfg = config(baseline="base", reward_drop=reward_drop)
    cfg.outputs_dir = str(tmp_path)
    assert Watcher(cfg).baseline[2]["rollout/raw_reward"] == 0.5
    with pytest.raises(UserError, match="nowhere"):
        Watcher(config(baseline="nowhere"))


@pytest.mark.parametrize("changes", [{}, {"jump_ratio": -1.0}, {"above": 1.0, "patience_steps": 0}])
def test_rules_that_say_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="watch.rules.a"):
        Watcher(config(a=rule("m", **changes)))


def test_a_resumed_watcher_fires_like_one_that_never_stopped() -> None:
    rules = {"a": rule("m", jump_ratio=2.0, patience_steps=2), "b": rule("m", above=100.0)}
    values = [1, 2, 1, 1, 1, 9, 9, 9, 1, 9, 9]
    whole = fired(Watcher(config(**rules)), "m", values)
    for cut in range(len(values)):
        first = Watcher(config(**rules))
        early = fired(first, "m", values[:cut])
        second = Watcher(config(**rules))
        second.load_state(json.loads(json.dumps(first.state())))
        assert early + fired(second, "m", values[cut:], cut) == whole
    assert whole == [6, 10]


@pytest.mark.parametrize(
    ("parts", "r3", "cause", "remedy"),
    [
        (ROUTING, False, "routing", "router_replay=r3"),
        (QUANTIZATION, True, "quantization", "precision.group_size=16"),
        (NUMERICS, True, "numerics", "algorithm.correction=tis"),
    ],
)
def test_mismatch_alert_names_the_largest_part(parts: dict[str, float], r3: bool, cause: str, remedy: str) -> None:
    watcher = Watcher(config(r3=r3, a=rule(MISMATCH, above=0.01)))
    watcher.check(0, {MISMATCH: 0.001, **parts})  # the decomposition comes every few steps only
    (alert,) = watcher.check(1, {MISMATCH: 0.05})
    assert f"likely cause: {cause} is the largest" in alert.message and remedy in alert.message.splitlines()[2]


def test_only_remedies_that_are_still_open_are_proposed() -> None:
    cfg = config()
    cfg.algorithm.correction = schema.Correction.tis
    routing = {"quantization": 0.0, "routing": 1.0, "numerics": 0.0}
    assert diagnose(MISMATCH, routing, cfg)[1] == []
    cfg.precision.train = schema.GridConfig("bf16", -1, schema.Convention.exact)
    assert diagnose(MISMATCH, {"quantization": 1.0, "routing": 0.0, "numerics": 0.0}, cfg)[1] == [
        "train in the rollout's format (now bf16 against int4)"
    ]


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        (MISMATCH, "mismatch.decompose_interval_steps=5"),
        ("train/grad_norm", "algorithm.dynamic_sampling=true"),
        ("train/entropy_loss", "algorithm.entropy_coef=0.001"),
        ("train/ppo_kl", "trainer.optimizer.lr=0.0005"),
        ("rollout/raw_reward", "trainer.optimizer.lr=0.0005"),
        ("rollout/truncated_ratio", "rollout.sampling.max_response_tokens=64"),
        ("sync/changed_integers", "trainer.optimizer.lr=0.002"),
    ],
)
def test_every_default_rule_has_a_cause_and_a_remedy(metric: str, remedy: str) -> None:
    cause, remedies = diagnose(metric, {}, config())
    assert cause and remedy in remedies
