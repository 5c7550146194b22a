"""rollout=local: the in-process engine. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from omegaconf import MISSING

from runner.config import preflight
from runner.config.choices import BaseDtype, DeviceKind, Drafting, KvDtype
from runner.config.limits import number
from runner.config.option import EngineLayout, Option
from runner.config.rules.parallelism import positive
from runner.config.rules.precision import bad_roles, known_model, sharded_weights
from runner.config.schema import Config, Role, RolloutConfig
from runner.errors import UserError
from runner.models import num_parameters
from runner.models.family import Parameter
from runner.rollout.local.machine import packed_matmul

SPECULATION = (Drafting.none, Drafting.ngram, Drafting.draft)
INT4_GROUPS = (32, 64, 128, 256)  # of torch's weight-only int4 matmul
INT4_ROWS = 16


@dataclass
class LocalRolloutConfig(RolloutConfig):
    device: DeviceKind = MISSING
    max_parameters_on_gpu: int = number(ge=0, le=10**13)  # 0: any size
    kv_cache_tokens: int = number(ge=0, le=2**31)  # slots over all running sequences; 0: from max_concurrency
    prefill_chunk_tokens: int = number(ge=1, le=2**24)


def settings(cfg: Config) -> LocalRolloutConfig:
    assert isinstance(cfg.rollout, LocalRolloutConfig)
    return cfg.rollout


def layout(cfg: Config) -> EngineLayout:
    return EngineLayout(
        engines=1,
        ranks=1,
        ranks_key="parallelism.gpus_per_engine",
        on_gpu=cfg.parallelism.rollout_gpus > 0,
        in_process=True,
        prefill_tokens=settings(cfg).prefill_chunk_tokens,
        cache_tokens=settings(cfg).kv_cache_tokens,
    )


def one_device(cfg: Config) -> Iterator[UserError]:
    par = cfg.parallelism
    wanted = max(par.gpus_per_engine, par.rollout_gpus)
    if positive(cfg) and wanted > 1:
        yield UserError(
            f"rollout=local is one engine on one device, not {wanted} GPUs",
            key="rollout",
            fix="rollout=sglang, or parallelism=h200x1",
        )


def speculation(cfg: Config) -> Iterator[UserError]:
    if cfg.speculative.method not in SPECULATION:
        yield UserError(
            f"the in-process engine drafts by {', '.join(SPECULATION[1:])}, not by {cfg.speculative.method}",
            key="speculative.method",
            fix="speculative=ngram, or rollout=sglang",
        )


def cache(cfg: Config) -> Iterator[UserError]:
    if cfg.precision.kv_cache != KvDtype.bf16:
        yield UserError(
            "the in-process engine keeps its KV cache in bf16", key="precision.kv_cache", fix="precision.kv_cache=bf16"
        )


def int4_matmul(cfg: Config) -> Iterator[UserError]:
    """torch's weight-only int4 matmul, which this engine decodes with, takes these shapes only."""
    if cfg.precision.rollout.format != "int4" or not known_model(cfg) or bad_roles(cfg):
        return
    group = cfg.precision.rollout.group_size
    if group not in INT4_GROUPS:
        yield UserError(
            f"the in-process engine's int4 matmul has no groups of {group}; it takes {', '.join(map(str, INT4_GROUPS))}",
            key="precision.group_size",
            fix="precision.group_size=32, or rollout=sglang",
        )
    shapes: dict[tuple[int, ...], Parameter] = {}
    for parameter in sharded_weights(cfg):
        if parameter.shape[0] % INT4_ROWS:
            shapes.setdefault(parameter.shape, parameter)
    for shape, parameter in shapes.items():
        yield UserError(
            f"the in-process engine's int4 matmul needs outputs in multiples of {INT4_ROWS}: {parameter.role.name} weight "
            f"{parameter.name.split('.')[-2]} is {list(shape)}",
            key="model.expert_ffn_size" if parameter.role is Role.routed_expert else "model.hidden_size",
            fix="another size, or rollout=sglang",
        )


def size_on_gpus(cfg: Config) -> Iterator[UserError]:
    """A GPU waits for this engine's Python: it decodes no faster than transformers' generate there (docs/gpus.md)."""
    if _asks_for_gpu(cfg) and not any(one_device(cfg)):  # whose advice is the same
        yield from _too_large(cfg)


def device(cfg: Config) -> Iterator[UserError]:
    yield from preflight.device("rollout.device", settings(cfg).device)


def size_on_this_gpu(cfg: Config) -> Iterator[UserError]:
    """The same where nothing but this machine says that it will be a GPU."""
    if settings(cfg).device == DeviceKind.auto and not _asks_for_gpu(cfg) and preflight.visible_gpus():
        yield from _too_large(cfg)


def _asks_for_gpu(cfg: Config) -> bool:
    chosen = settings(cfg).device
    return chosen == DeviceKind.cuda or (chosen == DeviceKind.auto and cfg.parallelism.rollout_gpus > 0)


def _too_large(cfg: Config) -> Iterator[UserError]:
    limit = settings(cfg).max_parameters_on_gpu
    if not limit or not known_model(cfg) or cfg.model.vision:  # no other engine sees images
        return
    size = num_parameters(cfg.model)
    if size > limit:
        yield UserError(
            f"the in-process engine decodes no faster than generate on a GPU; {cfg.model.name} has {size / 1e9:,.1f} billion "
            f"parameters, more than {limit / 1e9:g} billion",
            key="rollout",
            fix="rollout=sglang, or rollout.max_parameters_on_gpu=0 (any size, slowly)",
        )


def memory(cfg: Config) -> Iterator[UserError]:
    """What the engine would allocate at its first request, on a CPU: its KV cache, and logits of every draft token."""
    rollout, model = settings(cfg), cfg.model
    if rollout.device == DeviceKind.cuda or preflight.visible_gpus():
        return
    width = 2 if cfg.precision.base_dtype == BaseDtype.bfloat16 else 4
    tokens = cfg.task.max_prompt_tokens + max(
        cfg.rollout.sampling.max_response_tokens, cfg.evaluation.sampling.max_response_tokens
    )
    cached = model.num_layers * model.num_kv_heads * model.head_dim * 2 * width * tokens
    if cfg.task.rollout._target_ is not None:  # a copy of each conversation's is kept between its turns
        cached *= 2
    drafts = cfg.speculative.num_draft_tokens if cfg.speculative.method != Drafting.none else 0
    there, wanted = psutil.virtual_memory().total, rollout.max_concurrency * (cached + (drafts + 1) * model.vocab_size * 4)
    if wanted > there:
        fits = max(1, rollout.max_concurrency * there // (2 * wanted))
        yield UserError(
            f"{rollout.max_concurrency} sequences of {tokens} tokens, {drafts} of them drafts, take {wanted / 2**30:,.1f} GiB; "
            f"this machine has {there / 2**30:,.1f} GiB",
            key="rollout.max_concurrency",
            fix=f"rollout.max_concurrency={fits}",
        )


OPTION = Option(
    LocalRolloutConfig,
    rules=(one_device, speculation, cache, int4_matmul, size_on_gpus),
    machine=(device, memory, size_on_this_gpu),
    checks=(packed_matmul,),
    engines=layout,
    probe="runner.rollout.local.probe.LocalProbe",
)
