"""Tiny models of each kind of table, and plans of them."""

# ruff: noqa: C408 (keyword tables read better)
from __future__ import annotations

import pytest
from tiny_models import BASE, MLA, MOE

from runner.config.schema import Convention, GridConfig, ModelConfig, PrecisionConfig, Role
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat

DENSE = ModelConfig(**BASE, name="dense", family="qwen3")
TIED = ModelConfig(**(BASE | dict(tied_embeddings=True)), name="tied", family="qwen3")
SPARSE = ModelConfig(**(BASE | MOE), name="moe", family="qwen3_moe")
MOONLIGHT = ModelConfig(**(BASE | MOE | MLA), name="moonlight", family="deepseek")
MODELS = [DENSE, TIED, SPARSE, MOONLIGHT]
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
FORMATS = [
    TensorFormat.int4(32, Convention.exact),
    TensorFormat.int4(-1, Convention.llmcompressor),
    TensorFormat.int8(64, Convention.kimi),
    TensorFormat.fp8(),
    TensorFormat.fp8("channel"),
    TensorFormat.mxfp4(),
    TensorFormat.nvfp4(),
]
INT4 = FORMATS[0]


def precision(roles: list[Role] | None = None, fmt: str = "int4", group_size: int = 32) -> PrecisionConfig:
    def grid(kind: str) -> GridConfig:
        return GridConfig(format=kind, group_size=group_size, convention=Convention.exact)

    return PrecisionConfig(name="test", roles=roles, train=grid(fmt), rollout=grid(fmt))


def roles_of(plan: PrecisionPlan) -> set[Role]:
    return {plan.parameters[name].role for name in plan.quantized}


def default_plan(model: ModelConfig) -> PrecisionPlan:
    return PrecisionPlan.build(model, precision(), "rollout")
