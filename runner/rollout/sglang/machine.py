"""What rollout=sglang needs of this machine, and what its pool cannot do yet, though it can be planned. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.config import preflight
from runner.config.choices import Drafting, LauncherKind
from runner.config.packages import tool
from runner.config.schema import Config, Role
from runner.errors import UserError
from runner.models.config_file import CONFIG, architectures_of, read_json
from runner.rollout.sglang.config import on_cpu, settings
from runner.rollout.sglang.interface import listen_address
from runner.weights.transports import TRANSPORTS

REWRITTEN_DRAFTS = ("Qwen3MoeForCausalLM", "MiMoForCausalLM", "DeepseekV3ForCausalLM")  # of the families that runner knows


def live_updates(cfg: Config) -> Iterator[UserError]:
    """SGLang restores the weights of experts before a load; its linear layers keep the order of their kernel (Marlin), so that a
    live update of packed INT4 would be unpacked wrongly. Restoring them in the plugin, as its residency check does with experts,
    needs the shapes of the checkpoint, which linear layers drop when they are repacked: not done before a GPU can show it."""
    roles = cfg.precision.roles or [Role.routed_expert if cfg.model.num_experts else Role.dense_mlp]
    dense = [role.name for role in roles if role is not Role.routed_expert]
    if cfg.precision.rollout.format == "int4" and dense and cfg.parallelism.rollout_gpus:
        yield UserError(
            f"SGLang 0.5.23 cannot update packed INT4 weights of {', '.join(dense)} while it runs",
            key="precision.roles",
            fix="precision=fp8 or bf16, rollout=local, or 'precision.roles=[routed_expert]' on a mixture of experts",
        )


def compilers(cfg: Config) -> Iterator[UserError]:
    """SGLang compiles its Marlin kernels at the first start of an INT4 server, with nvcc and ninja."""
    if on_cpu(cfg) or cfg.precision.rollout.format != "int4" or not preflight.visible_gpus():
        return
    for name, fix in (("nvcc", "install the CUDA 13 toolkit, or set CUDA_HOME"), ("ninja", "make setup-gpu")):
        if tool(name) is None:
            yield UserError(f"SGLang compiles its INT4 kernels with {name}, which is not here", key="rollout=sglang", fix=fix)


def transport(cfg: Config) -> Iterator[UserError]:
    yield from TRANSPORTS[settings(cfg).weight_transport].obstacles(cfg)


def listens(cfg: Config) -> Iterator[UserError]:
    """Whether this machine has `cluster.interface`; the nodes of a cluster are asked when they are there."""
    if cfg.cluster.launcher == LauncherKind.local:
        try:
            listen_address(cfg.cluster)
        except UserError as error:
            yield error


def draft(cfg: Config) -> Iterator[UserError]:
    """What SGLang would load and then draft badly with, or not at all."""
    folder, method = cfg.speculative.draft_model, cfg.speculative.method
    if method not in (Drafting.draft, Drafting.eagle) or not folder:
        return
    try:
        config = read_json(Path(folder).expanduser() / CONFIG)
        architectures_of(config, folder)
    except UserError:
        return  # a hub id, or what preflight and SGLang report
    yield from _whole_model(config) if method == Drafting.draft else _eagle_head(cfg, config)


def _whole_model(config: dict[str, Any]) -> list[UserError]:
    """SGLang turns some architectures into their multi-token-prediction layer when they draft, and then finds no such weights."""
    return [
        UserError(
            f"SGLang 0.5.23 makes a multi-token-prediction layer of a draft model of {name}, whatever its folder has",
            key="speculative.draft_model",
            fix="speculative.draft_model=<a dense Qwen3 model of the same vocabulary>, or speculative=ngram",
        )
        for name in config.get("architectures") or []
        if name in REWRITTEN_DRAFTS
    ]


def _eagle_head(cfg: Config, config: dict[str, Any]) -> list[UserError]:
    """SGLang loads any model as an EAGLE head. One of EAGLE-3 skips its projection, a whole model ignores the policy's hidden
    states: neither is an error there, only drafts that are not accepted."""
    fix = "speculative.draft_model=<a LlamaForCausalLMEagle or Qwen2ForCausalLMEagle of the policy's hidden size>"
    problems = [
        UserError(f"{name} is not an EAGLE head (EAGLE-3 is not supported)", key="speculative.draft_model", fix=fix)
        for name in config.get("architectures") or []
        if not name.endswith("ForCausalLMEagle")
    ]
    width = config.get("hidden_size")
    if width is not None and width != cfg.model.hidden_size:
        message = f"the EAGLE head reads hidden states of width {width}, {cfg.model.name} has {cfg.model.hidden_size}"
        problems.append(UserError(message, key="speculative.draft_model", fix=fix))
    return problems


UNBUILT = (live_updates,)
RULES = (compilers, transport, draft, listens)
