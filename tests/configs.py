"""Configs of the tests: what conf/ composes, and on top of it the differences that a test is about."""

from __future__ import annotations

import copy
import functools

from omegaconf import DictConfig, OmegaConf

from runner import compose
from runner.schema import Config

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


@functools.cache
def _raw(overrides: tuple[str, ...]) -> DictConfig:
    return compose.load(list(overrides), check_rules=False).raw
