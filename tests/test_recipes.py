"""Every recipe is planned at its own size."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from runner.config import compose
from runner.config.searchpath import groups
from runner.planner.tables import show as plan

RECIPES = [name for name in groups()["recipe"] if name != "none"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_the_machines_that_it_names(recipe: str) -> None:
    out = io.StringIO()
    cfg = compose.load_config([f"recipe={recipe}"])
    assert plan(cfg, Console(file=out, width=200, color_system=None)) == 0, out.getvalue()
    assert "FITS" in out.getvalue()
