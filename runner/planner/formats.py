"""The precision plan in the planner's terms: parameter name -> grid, for one side of the loop."""

from __future__ import annotations

from runner.planner.parameters import Grid
from runner.precision.plan import PrecisionPlan, Side
from runner.schema import Config


def grids(cfg: Config, side: Side) -> dict[str, Grid]:
    """Quantized parameters only; everything else stays in the base dtype. Raises what `PrecisionPlan.build` raises."""
    plan = PrecisionPlan.build(cfg.model, cfg.precision, side)
    shared: dict[tuple[str, int], Grid] = {}  # one object per grid: the inventory compares them by identity
    grids: dict[str, Grid] = {}
    for name, tensor in plan.quantized.items():
        key = (tensor.format.name, tensor.group_size)
        if key not in shared:
            shared[key] = Grid(tensor.format, tensor.group_size)
        grids[name] = shared[key]
    return grids
