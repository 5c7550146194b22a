"""Rules between groups: what each group allows by itself and what cannot go together. Torch-free.

A rule yields a UserError per problem: what is wrong in numbers, the key, and what to type. All of them are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from runner.errors import UserError
from runner.rules import checkpoint, loop, megatron, names, numbers, parallelism, precision, sglang, vision
from runner.schema import Config

Rule = Callable[[Config], Iterator[UserError]]
RULES: tuple[Rule, ...] = (
    *names.RULES,
    *numbers.RULES,
    *checkpoint.RULES,
    *precision.RULES,
    *parallelism.RULES,
    *megatron.RULES,
    *loop.RULES,
    *sglang.RULES,
    *vision.RULES,
)


def check(cfg: Config) -> list[UserError]:
    """Every broken rule, in the order of the groups, each text once."""
    found: dict[str, UserError] = {}
    for rule in RULES:
        for error in rule(cfg):
            found.setdefault(str(error), error)
    return list(found.values())
