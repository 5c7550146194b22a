"""Model families: the table of parameters of each architecture. Importing this package does not import torch."""

from __future__ import annotations

import difflib

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models.families import FAMILIES
from runner.models.family import Family, Parameter, StackedParameter

__all__ = ["FAMILIES", "Family", "Parameter", "StackedParameter", "family_of", "num_parameters", "register_architectures"]


def family_of(model: ModelConfig) -> Family:
    """The family that `model.family` names; UserError with the nearest name when there is none."""
    if model.family in FAMILIES:
        return FAMILIES[model.family]
    close = difflib.get_close_matches(model.family, FAMILIES, n=1)
    fix = f"did you mean model.family={close[0]}?" if close else f"use one of {', '.join(FAMILIES)}"
    raise UserError(f"unknown model family '{model.family}'", key="model.family", fix=fix)


def register_architectures() -> None:
    """Let transformers build every family's architecture, whichever a process is going to meet. Imports torch."""
    for family in FAMILIES.values():
        family.register()


def num_parameters(model: ModelConfig) -> int:
    """Number of weights on disk; a tied lm_head counts once."""
    total = 0
    for parameter in family_of(model).parameters(model):
        size = 1
        for dimension in parameter.shape:
            size *= dimension
        total += size
    return total
