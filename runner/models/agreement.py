"""Whether a checkpoint's config.json is what the model group says, and what no trainer or engine here computes. Torch-free.

transformers builds from config.json, Megatron, the planner and SGLang's arguments from the model group: a number on which they
differ and that shapes no weight (rope_theta, norm_eps, routed_scaling_factor) would make two models of one checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models.common import of_full_attention
from runner.models.family import Family

KEY = "model.hf_checkpoint"
# of this run, not of the checkpoint; the context may be shorter than the checkpoint's
OWN = ("name", "family", "max_context_tokens", "initializer_range", "vision")
OF_EXPERTS = ("num_dense_layers", "router_score", "router_bias", "routed_scaling_factor", "expert_groups", "expert_groups_top_k")
OF_PLAIN_ATTENTION = ("head_dim", "num_kv_heads")
FIXED_ROPE = ("default", "linear", "yarn", "llama3")  # whose angles depend on the position alone
MAX_EXPERT_MATRICES = 500_000  # layers times experts; Kimi-K2 has 23,424. The table of parameters has one line for each


@dataclass(frozen=True)
class Rope:
    """Rotary scaling of a config.json. `values`: rope_scaling, or rope_parameters as transformers 5 writes them."""

    kind: str
    values: dict[str, Any]

    @staticmethod
    def of(config: dict[str, Any]) -> Rope:
        text = config.get("text_config") or config
        values = text.get("rope_scaling") or text.get("rope_parameters") or {}
        if not isinstance(values, dict):
            return Rope(f"of type {type(values).__name__}", {})
        values = of_full_attention(values)
        return Rope(str(values.get("rope_type") or values.get("type") or "default"), values)

    def problem(self, rotary_share: float = 1.0) -> str | None:
        """Why trainer and engine would compute different angles; None for a kind that both know. `rotary_share`: the family's."""
        if self.kind in ("dynamic", "longrope"):
            return "its angles follow the longest sequence of a batch, so trainer and engine would differ"
        if self.kind not in FIXED_ROPE and not (self.kind == "mrope" or "mrope_section" in self.values):
            return f"known: {', '.join(FIXED_ROPE)}"
        if self.values.get("partial_rotary_factor", rotary_share) not in (None, rotary_share):
            return f"another part of a head would be rotated than this family's {rotary_share:.0%}"
        return None


def local_config(model: ModelConfig) -> dict[str, Any] | None:
    """config.json of a checkpoint that is a local folder; None for hub ids and for files that cannot be read (whoever loads
    the checkpoint says why)."""
    if model.hf_checkpoint is None:
        return None
    try:
        values = json.loads((Path(model.hf_checkpoint).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def fields_of(family: Family, config: dict[str, Any], name: str) -> dict[str, Any]:
    """ModelConfig fields in a config.json of this family; ValueError for what it does not compute and beyond all limits."""
    fields = family.from_hf_config(config, name)
    if fields["num_layers"] * fields["num_experts"] > MAX_EXPERT_MATRICES:
        asked = f"{fields['num_layers']} layers of {fields['num_experts']} experts"
        raise ValueError(f"config.json of '{name}' asks for {asked}, more than any model has")
    return fields


def numbers(model: ModelConfig, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the model group that a config.json decides; {} for one of another family (whoever loads it says which).

    Raises ValueError for what the family does not compute; TypeError, KeyError or AttributeError for nonsense.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not set(map(str, architectures)) & set(family.architectures):
        return {}
    fields = fields_of(family, config, str(model.hf_checkpoint))
    meaningless = (() if fields["num_experts"] else OF_EXPERTS) + (OF_PLAIN_ATTENTION if fields["kv_lora_rank"] else ())
    return {name: value for name, value in fields.items() if name not in OWN and name not in meaningless}


def problems(model: ModelConfig, family: Family, config: dict[str, Any]) -> Iterator[UserError]:
    """Everything in which the checkpoint is not the model of the model group, or is one that nobody here computes."""
    where = f"config.json of '{model.hf_checkpoint}'"
    error: UserError | None = None
    theirs: dict[str, Any] = {}
    try:
        theirs = numbers(model, family, config)
        if not theirs:
            return
    except ValueError as found:
        error = UserError(str(found), key=KEY, fix="a checkpoint of a kind that this family understands")
    except (TypeError, KeyError, AttributeError) as found:
        error = UserError(f"{where} cannot be understood: {found!r}", key=KEY, fix="the config.json that belongs to the weights")
    rope = Rope.of(config)
    if reason := rope.problem(family.rotary_share):
        yield UserError(f"{where} has rotary scaling {rope.kind!r}: {reason}", key=KEY, fix="a checkpoint without it")
    if error:
        yield error
    for name, value in theirs.items():
        ours = getattr(model, name)
        if ours != value:
            yield UserError(
                f"{where} has {name} {value}, the model group {ours}", key=f"model.{name}", fix=f"model.{name}={_typed(value)}"
            )


def window_problem(model: ModelConfig, family: Family, config: dict[str, Any] | None) -> UserError | None:
    """For trainers and engines that let every layer see everything: an error where some layer sees less than the run's context.
    `config`: of the checkpoint; None: unknown until it is loaded."""
    window = None if config is None else family.window(config)
    if window is None or window >= model.max_context_tokens:
        return None
    problem = f"some layers of '{model.hf_checkpoint}' see {window} tokens, of a context of {model.max_context_tokens}"
    return UserError(
        problem, key="model.max_context_tokens", fix=f"model.max_context_tokens={window}, or trainer=torch rollout=local"
    )


def check(model: ModelConfig, family: Family, config: dict[str, Any]) -> None:
    """UserError with all problems where there are any. (A rank sends one problem to its driver, not a list.)"""
    found = list(problems(model, family, config))
    if found:
        text = "; ".join(error.problem for error in found)
        raise UserError(text, key=found[0].key, fix=", ".join(dict.fromkeys(error.fix or "" for error in found)))


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
