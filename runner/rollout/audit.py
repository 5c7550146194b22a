"""What the engines of a pool compute with, against the run's plan."""

from __future__ import annotations

from collections.abc import Sequence

from runner.config.schema import Convention
from runner.errors import UserError
from runner.precision.audit import audit
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.rollout.protocol import EngineDescription


def audit_pool(plan: PrecisionPlan, described: Sequence[EngineDescription]) -> None:
    """UserError with every difference where an engine of a pool computes with other weights than the run's plan says."""
    labels = [f"engine {index}" if len(described) > 1 else "engine" for index in range(len(described))]
    found = [problem for label, engine in zip(labels, described, strict=True) for problem in audit_engine(plan, engine, label)]
    if found:
        raise UserError(
            f"the engines compute with other formats than the precision plan: {'; '.join(found)}",
            key="precision",
            fix="precision.roles of whole modules (engines fuse q, k, v and gate, up)",
        )


def audit_engine(plan: PrecisionPlan, description: EngineDescription, label: str = "engine") -> list[str]:
    """A plan against what an engine says it computes with."""
    try:
        convention = Convention[description.convention]
        tensors = {
            name: TensorFormat.named(kind, description.group_size, convention) for name, kind in description.formats.items()
        }
    except (KeyError, UserError) as error:
        return [f"{label} computes with an unknown format: {error.problem if isinstance(error, UserError) else error}"]
    return audit(("run", plan), (label, PrecisionPlan(tensors, plan.parameters)))
