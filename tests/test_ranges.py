"""Every number of the schema has a range, and whatever a key is set to: a problem with the key and a fix, or a valid config."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from enum import Enum
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config import compose, limits, preflight, rules, schema
from runner.config import option as options
from runner.config.rules import numbers
from runner.errors import UserErrors
from tests.configs import problems

BASES = (
    [],
    ["trainer=megatron", "rollout=sglang", "speculative=none", "model=tiny_mla"],
    ["model=tiny_vlm"],
    ["model=qwen3_30b", "task=gsm8k", "task.train_path=a.jsonl", "task.eval_path=a.jsonl"],
)
INTEGERS = st.one_of(st.integers(), st.integers(-3, 300), st.sampled_from([0, -1, 2**31, 2**32, 2**63, 10**100]))
FLOATS = st.one_of(
    st.floats(), st.floats(-2, 2), st.sampled_from([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-320, 1e308]), st.integers(-2, 2)
)
VALUES: dict[Any, Any] = {int: INTEGERS, float: FLOATS, bool: st.booleans(), str: st.text(max_size=8)}


def values_of(kind: Any) -> Any:
    """Random values of a field's type; None for a free dictionary."""
    if type(None) in get_args(kind):
        inner = values_of(next(k for k in get_args(kind) if k is not type(None)))
        return st.none() | inner
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from(list(kind))
    if getattr(kind, "__origin__", None) is list:
        return st.lists(values_of(get_args(kind)[0]), max_size=3)
    return VALUES.get(kind)


@pytest.fixture(scope="module")
def configs() -> list[schema.Config]:
    return [compose.load(base, check_rules=False).config for base in BASES]


def test_every_number_has_a_range_and_no_number_hides_in_another_type() -> None:
    without, free, ranged = [], [], 0
    for cls in schema_classes():
        for name, field in cls.__dataclass_fields__.items():
            if re.search(r"\b(?:int|float|complex)\b", field.type):  # in lists and choices, too
                ranged += 1
                without += [f"{cls.__name__}.{name}"] if limits.RANGE not in field.metadata else []
            free += [f"{cls.__name__}.{name}"] if "Any" in field.type else []
    # what these hand on has no schema here: `free_numbers` asks for finite numbers, the function or the server for the rest
    assert free == ["ConversationConfig.arguments", "SglangRolloutConfig.server_args"]
    assert without == [] and ranged > 150


def schema_classes() -> list[Any]:
    ours = [item for item in vars(schema).values() if hasattr(item, "__dataclass_fields__")]
    return [*ours, *{choice.option.schema for choice in options.choices()}]


def test_shipped_defaults_are_allowed_and_near_limits_are_named(configs: list[schema.Config]) -> None:
    for cfg in configs:
        assert list(numbers.out_of_range(cfg)) == []


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_value_of_the_right_type_is_a_valid_config_or_a_problem_with_its_key(configs: list[schema.Config], data: Any) -> None:
    cfg = deepcopy(data.draw(st.sampled_from(configs)))
    wrong = []
    keys = [(key, holder, field) for key, holder, field in limits.walk(cfg)]
    for key, holder, field in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique_by=lambda item: item[0])):
        kind = limits.typed_keys(type(holder))[field.name]
        strategy = values_of(kind)
        if strategy is None:
            continue
        value = data.draw(strategy, label=key)
        setattr(holder, field.name, value)
        allowed = field.metadata.get(limits.RANGE)
        if allowed is not None and any(map(allowed.problem, value if isinstance(value, list) else [value] * (value is not None))):
            wrong.append(key)
    found = rules.check(cfg)
    assert set(wrong) <= {error.key for error in found}
    for error in found:
        assert error.key and error.fix
    if not found:
        try:
            preflight.check(cfg)
        except UserErrors as errors:
            assert all(error.key for error in errors.errors)


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.clip_low=1.5", "algorithm.clip_high=inf", "trainer.optimizer.lr=nan", "seed=4294967296",
        "evaluation.sampling.temperature=inf", "rollout.request_timeout_seconds=1e300", "watch.rules.kl_jump.above=nan",
        "rollout.max_concurrency=10000000000", "speculative.num_draft_tokens=100000", "task.digits=1000000", "scale.x=1",
        "trainer._target_=os.system", "trainer._target_=runner.trainer.torch.Missing",
        "task._target_=runner.missing.Task",
        "rollout._target_=runner.errors.UserError", "rollout.sampling.stop_token_ids=[1,-1]", "precision.roles=[[mlp]]",
        "rollout.sampling.stop_token_ids=[[1]]", "tracking.tags=[{a:1}]", "task.rollout.arguments.x=nan",
    ],
)  # fmt: skip
def test_values_that_were_accepted_are_refused_with_key_and_fix(override: str) -> None:
    about = [error for error in problems(override) if error.key == override.partition("=")[0]]
    assert about and about[0].fix


def test_more_than_the_machine_holds_is_refused_before_anything_starts(configs: list[schema.Config]) -> None:
    cfg = deepcopy(configs[0])
    cfg.rollout.max_concurrency, cfg.model.max_context_tokens, cfg.task.max_prompt_tokens = 2**16, 2**24, 2**20
    with pytest.raises(UserErrors) as caught:
        preflight.check(cfg)
    (problem,) = caught.value.errors
    assert problem.key == "rollout.max_concurrency" and "GiB" in problem.problem
