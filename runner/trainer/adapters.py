"""Which weights have low-rank adapters (LoRA, Hu et al., arXiv 2106.09685), by role. Torch-free: rules and the planner ask.

A weight W [out, in] with an adapter is W + alpha / rank * B A, with A [rank, in] and B [out, rank]; stacked experts have an A and
a B each. W stays as it was; A and B are trained.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.choices import Role
from runner.config.schema import Config
from runner.errors import UserError
from runner.models import FAMILIES, family_of
from runner.models.family import Parameter

PEFT = "peft"  # the format of an export that holds adapters alone
MATRICES = (Role.attention, Role.dense_mlp, Role.shared_expert, Role.routed_expert)  # that may have adapters


def has_adapters(cfg: Config) -> bool:
    return cfg.trainer.lora.rank > 0


def roles(cfg: Config) -> frozenset[Role]:
    """Roles whose matrices have adapters; trainer.lora.targets null: all that may."""
    if not has_adapters(cfg):
        return frozenset()
    return frozenset(MATRICES if cfg.trainer.lora.targets is None else cfg.trainer.lora.targets)


def adapted(cfg: Config, parameter: Parameter) -> bool:
    return parameter.role in roles(cfg) and len(parameter.shape) == 2


def elements(cfg: Config, shape: tuple[int, ...]) -> int:
    """Of A and B of one matrix."""
    return cfg.trainer.lora.rank * sum(shape)


def targets(cfg: Config) -> Iterator[UserError]:
    """A rule of trainers that train adapters."""
    key, model = "trainer.lora.targets", cfg.model
    if not has_adapters(cfg) or model.family not in FAMILIES:
        return
    wrong = [role.name for role in cfg.trainer.lora.targets or [] if role not in MATRICES]
    if wrong:
        fix = f"'{key}=[{','.join(role.name for role in MATRICES)}]', or some of them"
        yield UserError(f"{', '.join(wrong)} have no adapters", key=key, fix=fix)
    elif not any(adapted(cfg, parameter) for parameter in family_of(model).parameters(model)):
        named = ", ".join(sorted(role.name for role in roles(cfg))) or "no role"
        yield UserError(f"adapters for {named}: {model.name} has no such matrix", key=key, fix=f"{key}=null")


def none(who: str, why: str, fix: str) -> Iterator[UserError]:
    """The problem of an option that knows no adapters, for its own rule."""
    yield UserError(f"{who} has no LoRA: {why}", key="trainer.lora.rank", fix=fix)
