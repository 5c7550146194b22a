"""Rules of a checkpoint that lies here: its config.json against the model group, and against what is computed. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.schema import Config
from runner.errors import UserError
from runner.models import FAMILIES, agreement


def agrees(cfg: Config) -> Iterator[UserError]:
    """config.json says what the model group says. A hub id is read when the run starts."""
    family, config = FAMILIES.get(cfg.model.family), agreement.local_config(cfg.model)
    if family is not None and config is not None:
        yield from agreement.problems(cfg.model, family, config)


RULES = (agrees,)
