"""Watch rules: a metric that leaves its bounds warns or stops the run, and says the likely cause and what to try.

A rule (config group `watch`) compares one metric with a bound or with its own past:

    above, below            fixed bounds
    jump_ratio              the value over the running mean of the `window_steps` earlier values that kept the rule;
                            a ratio of 1 or more fires above it (a jump), one under 1 fires below it (a collapse)
    jump_floor              a jump to a value under it does not count: three times next to nothing is next to nothing
    drop_against_baseline   how far the value may lie under `watch.baseline_run` at the same step; without a baseline
                            run such a rule is idle

NaN and infinity break every rule of that metric. A rule fires after `patience_steps` consecutive values that break it,
once: it is armed again by the first value that keeps it. Steps without the metric count neither way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.config.schema import Config, Correction, WatchRuleConfig
from runner.errors import UserError
from runner.precision.formats import spec_of
from runner.tracking.folder import read_metrics

# The absolute parts: signed means of opposite tokens cancel.
DECOMPOSITION = {
    "quantization": "mismatch/quantization_abs",
    "routing": "mismatch/routing_abs",
    "numerics": "mismatch/numerics_abs",
}


@dataclass(frozen=True)
class Alert:
    """One rule that fired. `action` is "warn" or "stop"; `message` is what the user reads."""

    rule: str
    metric: str
    step: int
    value: float
    action: str
    message: str


@dataclass
class _RuleState:
    history: list[float] = field(default_factory=list)  # the last values that kept the rule, newest last
    broken_for: int = 0
    seen: bool = False


class Watcher:
    """Checks every enabled rule of `cfg.watch` against each step's metrics. Raises UserError for a rule that says nothing."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.window = cfg.watch.window_steps
        self.rules = {name: rule for name, rule in cfg.watch.rules.items() if rule.enabled}
        for name, rule in self.rules.items():
            _check_rule(name, rule)
        self.states = {name: _RuleState() for name in self.rules}
        self.parts: dict[str, float] = {}  # kind -> mean |difference| per token, of the latest decomposition
        self.baseline = _read_baseline(cfg)

    def check(self, step: int, metrics: dict[str, float]) -> list[Alert]:
        """The rules that fire at this step, each at most once per episode."""
        if all(name in metrics for name in DECOMPOSITION.values()):
            self.parts = {kind: metrics[name] for kind, name in DECOMPOSITION.items()}
        alerts = []
        for name, rule in self.rules.items():
            if rule.metric not in metrics:
                continue
            state, value = self.states[name], metrics[rule.metric]
            state.seen = True
            problem = self._problem(rule, state, step, value)
            if problem is None:
                state.broken_for = 0
                state.history = [*state.history, value][-self.window :]
                continue
            state.broken_for += 1
            if state.broken_for == rule.patience_steps:
                alerts.append(self._alert(name, rule, step, value, problem))
        return alerts

    def unseen(self) -> list[str]:
        """Rules whose metric never came: a misspelt metric, or one that this run does not log."""
        return [f"{name} ({self.rules[name].metric})" for name, state in self.states.items() if not state.seen]

    def state(self) -> dict[str, Any]:
        """JSON-serializable; a resumed run fires the same alerts as one that never stopped."""
        rules = {name: {"history": s.history, "broken_for": s.broken_for, "seen": s.seen} for name, s in self.states.items()}
        return {"rules": rules, "parts": self.parts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave; rules added or removed since then start afresh or are dropped."""
        for name, saved in state["rules"].items():
            if name in self.states:
                self.states[name] = _RuleState(list(saved["history"]), saved["broken_for"], saved["seen"])
        self.parts = dict(state["parts"])

    def _problem(self, rule: WatchRuleConfig, state: _RuleState, step: int, value: float) -> str | None:
        """What of the rule this value breaks, in words; None when it keeps it."""
        if not math.isfinite(value):
            return "is not finite"
        if rule.above is not None and value > rule.above:
            return f"is above {rule.above:g}"
        if rule.below is not None and value < rule.below:
            return f"is below {rule.below:g}"
        if rule.jump_ratio is not None and len(state.history) >= self.window:
            mean = sum(state.history) / len(state.history)
            jumped = value > max(rule.jump_ratio * mean, rule.jump_floor or 0.0)
            if rule.jump_ratio < 1:
                jumped = value < rule.jump_ratio * mean
            if mean > 0 and jumped:
                return (
                    f"is {value / mean:.2g} x its mean over {self.window} earlier steps, {mean:.4g} (bound {rule.jump_ratio:g} x)"
                )
        if rule.drop_against_baseline is not None:
            reference = self.baseline.get(step, {}).get(rule.metric)
            if reference is not None and reference - value > rule.drop_against_baseline:
                return f"is {reference - value:.4g} under the baseline's {reference:.4g} at this step"
        return None

    def _alert(self, name: str, rule: WatchRuleConfig, step: int, value: float, problem: str) -> Alert:
        cause, remedies = diagnose(rule.metric, self.parts, self.cfg)
        lines = [f"{name}: {rule.metric} = {value:.4g} {problem}"]
        if rule.patience_steps > 1:
            lines[0] += f", for {rule.patience_steps} steps"
        if cause:
            lines.append(f"likely cause: {cause}")
        if remedies:
            lines.append(f"try: {'; or '.join(remedies)}")
        return Alert(name, rule.metric, step, value, rule.action.value, "\n".join(lines))


def _check_rule(name: str, rule: WatchRuleConfig) -> None:
    key = f"watch.rules.{name}"
    bounds = ("above", "below", "jump_ratio", "drop_against_baseline")
    if all(getattr(rule, bound) is None for bound in bounds):
        raise UserError("the rule has no bound", key=key, fix=f"set one of {', '.join(bounds)}, or {key}.enabled=false")
    if rule.jump_ratio is not None and not (rule.jump_ratio > 0 and math.isfinite(rule.jump_ratio)):
        raise UserError(f"jump_ratio {rule.jump_ratio} is not positive", key=key, fix="2 fires at a doubling, 0.5 at a halving")
    if rule.jump_floor is not None and (rule.jump_ratio is None or rule.jump_ratio < 1):
        raise UserError("jump_floor belongs to a jump_ratio of 1 or more", key=key, fix=f"{key}.jump_floor=null")
    if rule.patience_steps < 1:
        raise UserError(f"patience_steps {rule.patience_steps} is less than 1", key=key, fix=f"{key}.patience_steps=1")


def _read_baseline(cfg: Config) -> dict[int, dict[str, float]]:
    """Metrics by step of watch.baseline_run (a path, or a name under outputs_dir); empty without one."""
    name = cfg.watch.baseline_run
    if name is None:
        return {}
    for folder in (Path(name), Path(cfg.outputs_dir) / name):
        if (folder / "metrics.jsonl").is_file():
            return {int(row["step"]): row for row in read_metrics(folder)}
    raise UserError(f"{name!r} has no metrics.jsonl", key="watch.baseline_run", fix="give the folder of a run, or null")


# ---- what it may be, and what to try


def diagnose(metric: str, parts: dict[str, float], cfg: Config) -> tuple[str, list[str]]:
    """(likely cause, remedies to type) for a metric that broke its rule. Proposes only what this config leaves open."""
    if metric.startswith(("mismatch/", "probe/")) or "train_rollout" in metric:
        return _diagnose_mismatch(parts, cfg)
    halved = f"trainer.optimizer.lr={cfg.trainer.optimizer.lr / 2:g}"
    if metric.startswith("train/grad_norm"):
        return (
            "gradients vanish or blow up: groups of equal reward, a saturated policy, or rollouts far from the trainer",
            ["look at rollout/zero_std", *_dynamic_sampling(cfg), *_correction(cfg), halved],
        )
    if metric.startswith(("train/ppo_kl", "train/kl_loss")):
        return "the policy moves too far in one step, or from its reference", [halved, "algorithm.updates_per_rollout=1"]
    if metric.startswith("train/entropy"):
        wider = f"algorithm.clip_high={cfg.algorithm.clip_high + 0.08:.2f}"
        bonus = f"algorithm.entropy_coef={max(0.001, 2 * cfg.algorithm.entropy_coef):g}"
        return "the policy becomes deterministic faster than it finds better answers", [wider, bonus, halved]
    if metric.startswith(("rollout/raw_reward", "eval/")):
        cause, remedies = _diagnose_mismatch(parts, cfg) if parts else ("", [])
        return f"the policy gets worse{'; at the same time ' + cause if cause else ''}", [*remedies, halved]
    if metric.startswith("rollout/truncated"):
        longer = f"rollout.sampling.max_response_tokens={2 * cfg.rollout.sampling.max_response_tokens}"
        return "answers run into the length limit and lose their reward", [longer]
    if metric.startswith("sync/changed"):
        return "updates are too small to move a weight to the next integer", [
            f"trainer.optimizer.lr={cfg.trainer.optimizer.lr * 2:g}"
        ]
    return "", []


def _diagnose_mismatch(parts: dict[str, float], cfg: Config) -> tuple[str, list[str]]:
    """Names the largest part of the decomposition."""
    if not parts:
        often = "mismatch.decompose_interval_steps=5"
        return "unknown: no decomposition has been logged yet", [often, *_replay(cfg), *_correction(cfg)]
    kind = max(parts, key=lambda name: parts[name])
    share = parts[kind] / (sum(parts.values()) or 1.0)
    cause = f"{kind} is the largest part of the train-rollout difference ({parts[kind]:.2g} per token, {share:.0%})"
    if kind == "routing":
        return cause, [*_replay(cfg), *_correction(cfg)]
    if kind == "quantization":
        return cause, [*_grid(cfg), *_correction(cfg)]
    return f"{cause}: kernels round differently", [*_correction(cfg), "python -m runner doctor engine"]


def _replay(cfg: Config) -> list[str]:
    moe = cfg.model.num_experts > 0
    return ["router_replay=r3"] if moe and not (cfg.router_replay.trainer and cfg.router_replay.rollout) else []


def _grid(cfg: Config) -> list[str]:
    if cfg.precision.train.format != cfg.precision.rollout.format:
        return [f"train in the rollout's format (now {cfg.precision.train.format} against {cfg.precision.rollout.format})"]
    finer = cfg.precision.group_size // 2
    return [f"precision.group_size={finer}"] if finer > 0 and finer in spec_of(cfg.precision.rollout.format).group_sizes else []


def _correction(cfg: Config) -> list[str]:
    return ["algorithm.correction=tis"] if cfg.algorithm.correction is Correction.none else []


def _dynamic_sampling(cfg: Config) -> list[str]:
    return [] if cfg.algorithm.dynamic_sampling else ["algorithm.dynamic_sampling=true"]
