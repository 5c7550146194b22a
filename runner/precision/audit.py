"""What the sides of a run quantize, and on which grid: their plans against each other.

Every function returns a list of differences in words, [] when the sides agree; nothing is repaired.
"""

from __future__ import annotations

from runner.precision.plan import NEVER_QUANTIZED, PrecisionPlan, shorten


def audit(reference: tuple[str, PrecisionPlan], *others: tuple[str, PrecisionPlan]) -> list[str]:
    """Plans of several sides against the first: ("trainer", plan), ("checkpoint", plan), ("engine", plan).

    Reports differing sets and grids, and on any side a quantized parameter whose role never may be.
    """
    label, plan = reference
    found = [problem for side in (reference, *others) for problem in forbidden(*side)]
    for other_label, other in others:
        found += plan.differences(other, (label, other_label))
    return found


def forbidden(label: str, plan: PrecisionPlan) -> list[str]:
    """Quantized routers, norms, embeddings, heads: a router on a 4-bit grid gives gibberish."""
    found: dict[str, list[str]] = {}
    for name in plan.quantized:
        if name in plan.parameters and plan.parameters[name].role in NEVER_QUANTIZED:
            found.setdefault(plan.parameters[name].role.name, []).append(name)
    return [f"{label} quantizes the {role}, which must stay bf16: {shorten(names)}" for role, names in found.items()]
