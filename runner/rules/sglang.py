"""Rules of rollout=sglang: its engine options, and what SGLang does not do on a CPU or with packed weights."""

from __future__ import annotations

from collections.abc import Iterator

from runner.errors import UserError
from runner.rollout.sglang import arguments
from runner.rollout.sglang.interface import wildcard
from runner.schema import Config, SglangRolloutConfig

CPU_FORMATS = ("bf16", "int4", "fp8")


def options(cfg: Config) -> Iterator[UserError]:
    if isinstance(cfg.rollout, SglangRolloutConfig) and cfg.speculative.method in ("none", *arguments.ALGORITHMS):
        yield from arguments.problems(cfg)


def speculation(cfg: Config) -> Iterator[UserError]:
    """SGLang's CPU path verifies drafts by argmax, whatever the temperature: sampled rollouts would be greedy ones."""
    if not isinstance(cfg.rollout, SglangRolloutConfig) or cfg.speculative.method == "none":
        return
    verified = cfg.speculative.num_draft_tokens + 1
    if cfg.speculative.method == "mtp" and cfg.model.num_mtp_layers > 1:
        yield UserError(
            f"SGLang drafts with one multi-token-prediction layer, {cfg.model.name} has {cfg.model.num_mtp_layers}",
            key="speculative.method",
            fix="speculative=ngram or none",
        )
    sampled = {"rollout": cfg.rollout.sampling.temperature}
    if cfg.evaluation.interval_steps:
        sampled["evaluation"] = cfg.evaluation.sampling.temperature
    for where, temperature in sampled.items():
        if arguments.on_cpu(cfg) and temperature > 0:
            yield UserError(
                f"SGLang on a CPU accepts drafts greedily and ignores {where}.sampling.temperature={temperature}",
                key="speculative",
                fix="speculative=none, or rollout=local",
            )
            return
    if cfg.router_replay.rollout and cfg.rollout.max_concurrency * verified > cfg.rollout.chunked_prefill_tokens:
        yield UserError(
            f"{cfg.rollout.max_concurrency} sequences x {verified} draft tokens do not fit SGLang's buffer of routes, which has "
            f"{cfg.rollout.chunked_prefill_tokens} rows",
            key="rollout.chunked_prefill_tokens",
            fix=f"rollout.chunked_prefill_tokens={cfg.rollout.max_concurrency * verified}",
        )


def formats(cfg: Config) -> Iterator[UserError]:
    if not isinstance(cfg.rollout, SglangRolloutConfig):
        return
    chosen = cfg.precision.rollout.format
    if arguments.on_cpu(cfg) and chosen not in CPU_FORMATS:
        yield UserError(
            f"the CPU twin of SGLang computes with {', '.join(CPU_FORMATS)}, not with {chosen}",
            key="precision.rollout.format",
            fix="rollout=local, or precision=int4_qat",
        )


def limits(cfg: Config) -> Iterator[UserError]:
    if not isinstance(cfg.rollout, SglangRolloutConfig):
        return
    if cfg.rollout.use_router and cfg.router_replay.rollout:
        yield UserError(
            "sglang-router drops the routes that router replay needs",
            key="rollout.use_router",
            fix="rollout.use_router=false: the pool balances its engines itself, or router_replay=none",
        )
    if wildcard(cfg.cluster.interface):
        yield UserError(
            f"servers on {cfg.cluster.interface} would be open on every network of the machine",
            key="cluster.interface",
            fix="cluster.interface=<a name or an address>, or null for loopback",
        )
    if cfg.rollout.weight_transport == "distributed" and cfg.parallelism.colocate and not arguments.on_cpu(cfg):
        yield UserError(
            "NCCL cannot broadcast between two processes on one GPU, and trainer and engines share theirs",
            key="rollout.weight_transport",
            fix="rollout.weight_transport=tensor, or parallelism.colocate=false",
        )
    if cfg.model.vision:
        yield UserError("the SGLang pool sends tokens, not images", key="rollout", fix="rollout=local")


RULES = (options, speculation, formats, limits)
