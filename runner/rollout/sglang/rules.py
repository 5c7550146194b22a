"""Rules of rollout=sglang: its engine options, and what SGLang does not do on a CPU or with packed weights."""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.choices import Drafting, PauseMode, Schedule
from runner.config.rules.precision import bad_roles, known_model, sharded_weights
from runner.config.schema import Config
from runner.errors import UserError
from runner.models import family_of
from runner.models.agreement import local_config, window_problem
from runner.models.family import Cut
from runner.precision.formats import spec_of
from runner.rollout.sglang import arguments
from runner.rollout.sglang.config import layout, on_cpu, settings
from runner.rollout.sglang.interface import wildcard
from runner.trainer import adapters
from runner.weights.transports import TRANSPORTS, on_every_node

CPU_FORMATS = ("bf16", "int4", "fp8")
# families that ran with real SGLang 0.5.23 servers (tests/sglang_servers)
FAMILIES = ("deepseek", "llama", "mimo", "mistral", "qwen2", "qwen3", "qwen3_moe")
# what was seen of others, on CPU servers
NOT_SERVED = {
    "gpt_oss": "its attention on a CPU takes no sinks; no weight sync was ever verified in one of its servers on a GPU",
    "mixtral": "it builds quantized Mixtral from a class of its own, which does not take the weights of the other",
    "qwen2_moe": "its gate of the shared expert is a Triton kernel, which ends a server on a CPU",
}


def families(cfg: Config) -> Iterator[UserError]:
    model = cfg.model
    if model.vision:
        yield UserError(
            "the SGLang pool sends tokens, not images: nobody has shown here that its servers place them as the trainer does",
            key="rollout",
            fix="rollout=local",
        )
    elif model.family not in FAMILIES:
        reason = NOT_SERVED.get(model.family, "no weight sync was ever verified in one of its servers")
        yield UserError(f"SGLang does not serve {model.family}: {reason}", key="model.family", fix="rollout=local")
    elif error := window_problem(model, family_of(model), local_config(model)):
        yield error


def options(cfg: Config) -> Iterator[UserError]:
    if cfg.speculative.method in (Drafting.none, *arguments.ALGORITHMS):
        yield from arguments.problems(cfg)


def speculation(cfg: Config) -> Iterator[UserError]:
    """SGLang's CPU path verifies drafts by argmax, whatever the temperature: sampled rollouts would be greedy ones."""
    if cfg.speculative.method == Drafting.none:
        return
    rollout = settings(cfg)
    verified = cfg.speculative.num_draft_tokens + 1
    if cfg.speculative.method == Drafting.mtp and cfg.model.num_mtp_layers > 1:
        yield UserError(
            f"SGLang drafts with one multi-token-prediction layer, {cfg.model.name} has {cfg.model.num_mtp_layers}",
            key="speculative.method",
            fix="speculative=ngram or none",
        )
    sampled = {"rollout": cfg.rollout.sampling.temperature}
    if cfg.evaluation.interval_steps:
        sampled["evaluation"] = cfg.evaluation.sampling.temperature
    for where, temperature in sampled.items():
        if on_cpu(cfg) and temperature > 0:
            yield UserError(
                f"SGLang on a CPU accepts drafts greedily and ignores {where}.sampling.temperature={temperature}",
                key="speculative",
                fix="speculative=none, or rollout=local",
            )
            return
    if cfg.router_replay.rollout and rollout.max_concurrency * verified > rollout.chunked_prefill_tokens:
        yield UserError(
            f"{rollout.max_concurrency} sequences x {verified} draft tokens do not fit SGLang's buffer of routes, which has "
            f"{rollout.chunked_prefill_tokens} rows",
            key="rollout.chunked_prefill_tokens",
            fix=f"rollout.chunked_prefill_tokens={rollout.max_concurrency * verified}",
        )


def formats(cfg: Config) -> Iterator[UserError]:
    chosen = cfg.precision.rollout.format
    if on_cpu(cfg) and chosen not in CPU_FORMATS:
        yield UserError(
            f"the CPU twin of SGLang computes with {', '.join(CPU_FORMATS)}, not with {chosen}",
            key="precision.rollout.format",
            fix="rollout=local, or precision=int4_qat",
        )


def merged_blocks(cfg: Config) -> Iterator[UserError]:
    """SGLang merges projections into one matrix, and wants whole blocks of each. Where ranks cut, rules/precision.py looks."""
    rows = spec_of(cfg.precision.rollout.format).block_rows
    if rows == 1 or not known_model(cfg) or bad_roles(cfg):
        return
    bad: dict[tuple[str, int], list[str]] = {}
    for p in sharded_weights(cfg):
        if p.fused and p.cut is not Cut.whole and p.shape[0] % rows:
            bad.setdefault((p.role.name, p.shape[0]), []).append(p.name.split(".")[-2])
    for (role, size), projections in bad.items():
        yield UserError(
            f"SGLang merges {role} weights {', '.join(projections)} of {size} outputs with others, and a block has {rows} rows",
            key="precision.roles",
            fix=f"sizes in multiples of {rows}, precision.roles without {role}, or rollout=local",
        )


def whole_engines(cfg: Config) -> Iterator[UserError]:
    par, per_node = cfg.parallelism, cfg.cluster.gpus_per_node
    if par.rollout_gpus and per_node and par.gpus_per_engine % per_node and per_node % par.gpus_per_engine:
        yield UserError(
            f"engines of {par.gpus_per_engine} GPUs lie neither whole on a node of {per_node} GPUs nor on whole nodes",
            key="parallelism.gpus_per_engine",
            fix=f"parallelism.gpus_per_engine={max(per_node, par.gpus_per_engine // per_node * per_node)}",
        )


def over_nodes(cfg: Config) -> Iterator[UserError]:
    """An engine of several nodes reads its weights from each node's own memory."""
    rollout, nodes = settings(cfg), layout(cfg).nodes
    if nodes == 1:
        return
    key = "rollout.cpu_nodes" if on_cpu(cfg) else "parallelism.gpus_per_engine"
    if on_cpu(cfg) and rollout.cpu_tp % nodes:
        yield UserError(
            f"{rollout.cpu_tp} ranks do not divide over {nodes} nodes", key="rollout.cpu_tp", fix=f"rollout.cpu_tp={nodes}"
        )
    if cfg.cluster.nodes % nodes:
        yield UserError(
            f"engines of {nodes} nodes do not divide the cluster's {cfg.cluster.nodes}", key=key, fix=f"cluster.nodes={nodes}"
        )
    elif on_cpu(cfg) and rollout.cpu_engines % (cfg.cluster.nodes // nodes):
        groups = cfg.cluster.nodes // nodes
        yield UserError(
            f"{rollout.cpu_engines} engines do not divide over {groups} groups of {nodes} nodes",
            key="rollout.cpu_engines",
            fix=f"rollout.cpu_engines={groups}",
        )
    if not on_every_node(cfg):
        possible = " or ".join(name for name, transport in TRANSPORTS.items() if transport.on_every_node)
        yield UserError(
            f"engines of {nodes} nodes read weights that every node has, which {rollout.weight_transport} does not bring there",
            key="rollout.weight_transport",
            fix=f"rollout.weight_transport={possible}",
        )


def limits(cfg: Config) -> Iterator[UserError]:
    rollout = settings(cfg)
    if cfg.algorithm.schedule == Schedule["async"] and rollout.pause_mode != PauseMode.abort:
        yield UserError(
            f"with pause_mode={rollout.pause_mode} nothing says which tokens of a sample came from which weights",
            key="rollout.pause_mode",
            fix="rollout.pause_mode=abort: a sample goes on after the update, and its spans say where",
        )
    if cfg.router_replay.rollout and rollout.pause_mode == PauseMode.retract:
        yield UserError(
            "a retracted request loses its routes",
            key="rollout.pause_mode",
            fix="rollout.pause_mode=abort, or router_replay=none",
        )
    if rollout.use_router and cfg.router_replay.rollout:
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
    if transport := TRANSPORTS.get(rollout.weight_transport):  # what is none, rules/numbers.py names
        yield from transport.problems(cfg)


def lora(cfg: Config) -> Iterator[UserError]:
    if adapters.has_adapters(cfg):
        why = "merged weights of adapters were not compared with what its servers compute"
        yield from adapters.none("rollout=sglang", why, fix="rollout=local, or trainer.lora.rank=0")


RULES = (families, options, speculation, formats, merged_blocks, limits, whole_engines, over_nodes, lora)
