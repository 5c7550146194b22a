"""The table of docs/models.md: `python -m tests.families_table` writes it from the families, the rules and the twins."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from runner.config import compose
from runner.config.schema import Config, ModelConfig
from runner.models import FAMILIES, Family, auto, common
from runner.rollout.sglang import rules as sglang
from runner.trainer.megatron import rules as megatron
from tests import twins

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: python -m tests.families_table -->", "<!-- end of families -->"
HEAD = ("family", "`model_type`", "as", "convert, audit", "plan", "torch", "local", "megatron", "sglang", "R3", "MTP")
WORKS = "works"
VISION = "qwen3_vl"  # has no twin of a published config.json: its tests draw a tower of the published shape


def published() -> dict[str, str]:
    """Family -> the twin that stands for it."""
    return {model_of(name).family: name for name in twins.one_of_each_family()}


def model_of(name: str) -> ModelConfig:
    """What model=auto makes of a published config.json, which is all that there is."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(twins.PUBLISHED[name]))
        return ModelConfig(**auto.architecture(folder), hf_checkpoint=None)


def row(family: Family) -> tuple[str, ...]:
    name = published().get(family.name)
    model = model_of(name) if name else compose.load_config(["model=tiny_vlm"]).model
    shown = twins.PUBLISHED[name].get("_from", name) if name else "Qwen3-VL, dense"
    types = ", ".join(family.model_types)
    return (
        family.name, types, shown, WORKS, WORKS, WORKS, WORKS,
        _ruled(megatron.families, model), _ruled(sglang.families, model),
        WORKS if model.num_experts else "dense", _mtp(family),
    )  # fmt: skip


def _ruled(rule: object, model: ModelConfig) -> str:
    """What the rule of an option says of a model, without its own name in front."""
    cfg = cast(Config, SimpleNamespace(model=model))
    found = list(rule(cfg))  # type: ignore[operator]
    return found[0].problem.partition(": ")[2] or found[0].problem if found else WORKS


def _mtp(family: Family) -> str:
    if family.mtp is not None:
        return WORKS
    leaves_out = type(family).unused is not common.KnownFamily.unused
    return "left out by name" if leaves_out else "none"


def table() -> str:
    rows = [HEAD, ("---",) * len(HEAD), *(row(FAMILIES[name]) for name in sorted(FAMILIES))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
