"""Rules between groups: what each group allows by itself and what cannot go together. Torch-free.

Rules of one engine, trainer or task stand in its own room (option.py) and are asked where it is chosen.

A rule yields a UserError per problem: what is wrong in numbers, the key, and what to type. All of them are reported at once.
"""

from __future__ import annotations

from runner.config import option as options
from runner.config.option import Rule
from runner.config.rules import checkpoint, loop, names, numbers, parallelism, precision, vision
from runner.config.schema import Config
from runner.errors import UserError

RULES: tuple[Rule, ...] = (
    *names.RULES,
    *checkpoint.RULES,
    *precision.RULES,
    *parallelism.RULES,
    *loop.RULES,
    *vision.RULES,
)


def check(cfg: Config) -> list[UserError]:
    """Every broken rule, in the order of the groups, each text once.

    A number out of its range, or a choice that does not exist, is reported alone: the rules between groups see an allowed one in
    its place and are not asked about its key.
    """
    found: dict[str, UserError] = {}
    for alone in numbers.RULES:
        for error in alone(cfg):
            found.setdefault(str(error), error)
    known = {error.key for error in found.values()}
    allowed = numbers.within_ranges(cfg)
    for rule in (*RULES, *(rule for choice in options.chosen(allowed) for rule in choice.option.rules)):
        for error in rule(allowed):
            if error.key not in known:
                found.setdefault(str(error), error)
    return list(found.values())
