"""The ways of bringing weights to engines: every module of this folder registers its own. Imports no torch."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from runner.weights.transports.base import TRANSPORTS, Driver, Rank, Site, Transport, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

if TYPE_CHECKING:
    from runner.config.schema import Config


def on_every_node(cfg: Config) -> bool:
    """Whether, under cluster=ray, the trainer's ranks write the rollout's weights on every node themselves."""
    chosen = TRANSPORTS.get(getattr(cfg.rollout, "weight_transport", ""))
    return chosen is not None and chosen.on_every_node


def kept_by_ranks(cfg: Config) -> bool:
    """Whether, under cluster=ray, the trainer's ranks keep the rollout's weights on their own nodes, and send them."""
    chosen = TRANSPORTS.get(getattr(cfg.rollout, "weight_transport", ""))
    return chosen is not None and chosen.kept_by_ranks


__all__ = ["TRANSPORTS", "Driver", "Rank", "Site", "Transport", "kept_by_ranks", "on_every_node", "register"]
