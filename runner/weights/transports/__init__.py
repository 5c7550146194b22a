"""The ways of bringing weights to engines: every module of this folder registers its own. Imports no torch."""

from __future__ import annotations

import importlib
import pkgutil

from runner.weights.transports.base import TRANSPORTS, Driver, Rank, Site, Transport, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["TRANSPORTS", "Driver", "Rank", "Site", "Transport", "register"]
