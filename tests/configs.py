"""Configs of the tests: what conf/ composes, and on top of it the differences that a test is about."""

from __future__ import annotations

import copy
import functools

import pytest
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config import compose, rules
from runner.config.overrides import parse
from runner.config.schema import Config
from runner.config.searchpath import groups
from runner.errors import UserError, UserErrors

GROUPS = groups()
MODELS = [name for name in GROUPS["model"] if name != "auto"]  # groups with numbers of their own: auto's are its checkpoint's
_CONFIGS: dict[str, Config] = {}


def composed(*overrides: str, **changes: object) -> Config:
    """A fresh copy of the config that the overrides compose to, `changes` applied.

    `changes` are dotted keys, for example `**{"algorithm.kl_coef": 0.1}`; values that follow from them follow, dictionaries are
    merged, and a key that the schema does not know raises OmegaConf's error. Composing takes half a second and happens once per
    set of overrides, changing takes milliseconds. The rules are not asked: a test may want what a user may not have.
    """
    key = repr((overrides, sorted(changes.items())))
    if key not in _CONFIGS:
        raw = copy.deepcopy(_raw(overrides))
        for name, value in changes.items():
            OmegaConf.update(raw, name, value)
        _CONFIGS[key] = compose.to_config(raw)
    return copy.deepcopy(_CONFIGS[key])


def problems(*overrides: str) -> list[UserError]:
    """What is wrong with a run of these overrides; a failure when nothing is.

    The rules are asked about a changed copy of a composition, a tenth of compose.load's time; where they say nothing, or the
    overrides do not fit the schema, compose.load is what must refuse them.
    """
    choices, changes = [], {}
    for item in overrides:
        parsed = parse(item)
        if parsed is None or parsed.is_sweep_override() or parsed.type != OverrideType.CHANGE or parsed.key_or_group in GROUPS:
            choices.append(item)
        else:
            changes[parsed.key_or_group] = parsed.value()
    try:
        found = rules.check(composed(*choices, **changes))
    except (HydraException, OmegaConfBaseException, UserErrors, ValueError):
        found = []
    if not found:
        with pytest.raises(UserErrors) as caught:
            compose.load(list(overrides))
        found = caught.value.errors
    return found


@functools.cache
def _raw(overrides: tuple[str, ...]) -> DictConfig:
    return compose.load(list(overrides), check_rules=False).raw
