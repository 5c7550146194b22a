"""Every model family: one file of this folder each, which ends in `FAMILY = <a Family>` (family.py). Imports no torch."""

from __future__ import annotations

import importlib
import pkgutil

from runner.models.family import Family

FAMILIES: dict[str, Family] = {}
for _module in pkgutil.iter_modules(__path__):
    _family: Family = importlib.import_module(f"{__name__}.{_module.name}").FAMILY
    FAMILIES[_family.name] = _family
