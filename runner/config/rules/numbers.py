"""What the schema says beside a type: ranges of numbers, texts that name one of a few choices, targets."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from runner.algorithms import estimators
from runner.config import option as options
from runner.config.limits import CHOICES, RANGE, walk
from runner.config.schema import Config
from runner.errors import UserError
from runner.precision.formats import UNQUANTIZED

# Where one place of a shared group allows less than its schema: sampling at temperature 0 has no logprobs to learn from.
ABOVE_ZERO = ("rollout.sampling.temperature",)
# Other rules look up what these name, and object least to this one in the place of a name that does not exist.
LOOKED_UP = {
    "precision.train.format": UNQUANTIZED,
    "precision.rollout.format": UNQUANTIZED,
    "algorithm.estimator": next(name for name in estimators.names() if not estimators.estimator_of(name).compares_group),
}


def out_of_range(cfg: Config) -> Iterator[tuple[str, Any, UserError]]:
    """(key, an allowed number in its place, problem) of every number that its schema does not allow."""
    for key, holder, field in walk(cfg):
        value, allowed = getattr(holder, field.name), field.metadata.get(RANGE)
        if allowed is not None and isinstance(value, list):
            good = [number for number in value if not (_is_number(number) and allowed.problem(number))]
            rest = f"{key}=[{','.join(map(str, good))}]"
            for wrong in (number for number in value if number not in good):
                yield key, good, UserError(f"{wrong} {allowed.problem(wrong)}", key=key, fix=rest)
        if allowed is None or not _is_number(value):
            continue
        problem, fix = allowed.problem(value), allowed.nearest(value)
        if problem is None and key in ABOVE_ZERO and value <= 0:
            problem, fix = "must be above 0", None
        if problem is not None:
            advice = f"{key}={fix}" if fix is not None else f"a number {allowed if key not in ABOVE_ZERO else 'above 0'}"
            asked = value if allowed.problem(value) is None else allowed.inside(value)
            yield key, asked, UserError(f"{value} {problem}", key=key, fix=advice)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def within_ranges(cfg: Config) -> Config:
    """A copy to ask the other rules with, which divide by numbers, count up to them, look up a format, ask options."""
    copy = deepcopy(cfg)
    replaced = {key: number for key, number, _ in out_of_range(cfg)}
    replaced |= {key: LOOKED_UP[key] for key, _, _ in _unknown(cfg) if key in LOOKED_UP}
    replaced |= {key: [entry for entry in entries if not _holds_more(entry)] for key, entries in _nested(cfg)}
    for key, holder, field in walk(copy):
        if key in replaced:
            setattr(holder, field.name, replaced[key])
    for problem in targets(cfg):
        section = getattr(copy, str(problem.key).partition(".")[0])
        section._target_ = next(choice.target for choice in options.choices() if choice.option.schema is type(section))
    return copy


def ranges(cfg: Config) -> Iterator[UserError]:
    for _, _, problem in out_of_range(cfg):
        yield problem


def _unknown(cfg: Config) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(key, text, what it may be) of every text that names none of its choices."""
    for key, holder, field in walk(cfg):
        value, among = getattr(holder, field.name), field.metadata.get(CHOICES)
        known = among() if among else None
        if known is not None and value is not None and value not in known:
            yield key, value, known


def _nested(cfg: Config) -> Iterator[tuple[str, list[Any]]]:
    """(key, value) of every list with a list or a mapping in it, which OmegaConf takes for an entry of any type."""
    for key, holder, field in walk(cfg):
        value = getattr(holder, field.name)
        if isinstance(value, list) and any(map(_holds_more, value)):
            yield key, value


def _holds_more(entry: Any) -> bool:
    return isinstance(entry, list | dict)


def lists(cfg: Config) -> Iterator[UserError]:
    for key, value in _nested(cfg):
        wrong = next(filter(_holds_more, value))
        yield UserError(f"{wrong} in a list is no single value", key=key, fix=f"{key}=[<value>, ..]")


def free_numbers(cfg: Config) -> Iterator[UserError]:
    """What a dictionary without a schema hands on (arguments of a function, of a server) is finite, too."""
    for key, holder, field in walk(cfg):
        value = getattr(holder, field.name)
        for name, number in value.items() if isinstance(value, dict) else ():
            if isinstance(number, float) and not math.isfinite(number):
                yield UserError(f"{number} must be a finite number", key=f"{key}.{name}", fix="a number, or a text in quotes")


def choices(cfg: Config) -> Iterator[UserError]:
    for key, value, known in _unknown(cfg):
        close = difflib.get_close_matches(value, known, n=1)
        fix = f"{key}={close[0]}" if close else f"one of: {', '.join(known)}"
        yield UserError(f"{value!r} is none of {', '.join(known)}", key=key, fix=fix)


def texts(cfg: Config) -> Iterator[UserError]:
    """No path, name or address holds the byte that ends a text for the operating system."""
    for key, holder, field in walk(cfg):
        value = getattr(holder, field.name)
        if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
            yield UserError("holds a NUL character", key=key, fix="leave it out")


def targets(cfg: Config) -> Iterator[UserError]:
    """`_target_` is the class that an option of its group names, never something that happens to be importable."""
    ours = options.choices()
    for group in options.groups():
        target, named = getattr(cfg, group)._target_, [choice for choice in ours if choice.group == group]
        if target not in (choice.target for choice in named):
            if target.startswith("runner."):
                problem = f"{target} is what no option of {group} names"
            else:
                problem = f"{target} is not a part of runner"
            instead = " or ".join({choice.target: str(choice) for choice in reversed(named)}.values())
            yield UserError(problem, key=f"{group}._target_", fix=f"choose an option of {group} instead: {instead}")


RULES = (lists, ranges, free_numbers, choices, texts, targets)
