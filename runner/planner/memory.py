"""Peak memory of every phase of a run, per GPU and per node, from closed formulas.

Activation memory counts, per token and layer, the tensors a backward needs, as Korthikanti et al. 2022 do ("Reducing
Activation Recomputation in Large Transformer Models", arXiv 2205.05198), for today's blocks: RMSNorm, grouped-query or latent
attention with a fused kernel (no s^2 term; Dao et al., arXiv 2205.14135), SwiGLU, dropless MoE with balanced experts.
Optimizer states follow ZeRO stage 1 (Rajbhandari et al., arXiv 1910.02054), which Megatron calls the distributed optimizer.

Shape legend: h hidden, n query heads.
Every number here is in bytes unless a name says otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil

from runner.config.choices import Drafting, Recompute
from runner.config.option import engine_layout, one_process, trainer_layout
from runner.config.schema import Config, ModelConfig, QatPlacement, Role
from runner.planner.parameters import Inventory, adapter_elements, base_elements, on_stage, shard, stage_layers
from runner.planner.workload import (
    GIB,
    base_bytes,
    longest_sequence_tokens,
    micro_batch_tokens,
    route_bytes_per_step,
)
from runner.precision.tensor_format import TensorFormat
from runner.trainer.adapters import has_adapters
from runner.weights.transports import kept_by_ranks, on_every_node

# What a process takes before it holds a tensor: CUDA context, cuBLAS workspaces, NCCL buffers (an assumption, on the safe side).
CUDA_RESERVE = int(2.5 * GIB)
# Share of a GPU lost to fragmentation of the caching allocator in training with varying lengths (an assumption).
FRAGMENTATION = 0.04
HOST_PER_PROCESS = 4 * GIB  # Python, torch and CUDA libraries of one GPU process in host memory
CPU_PROCESS = int(0.75 * GIB)  # the same for the single process of a CPU run
# transformers' own modules keep more than fused kernels do (fp32 copies in norms, rotary halves); measured through
# saved_tensors_hooks, and again by tests/test_planner.py.
UNFUSED_ATTENTION = 2.1
UNFUSED_MLP = 1.25
LOGITS_COPIES = 3  # fp32 [chunk, vocab] tensors at one time in the loss: logits, their softmax or entropy term, their gradient
SYNC_BUCKET = 1 * GIB  # weights in flight on each side of a sync


@dataclass(frozen=True)
class Phase:
    """What lies in one memory at one time. `where` names the memory, `items` what is in it."""

    name: str
    where: str
    items: dict[str, int]
    capacity: int

    @property
    def used(self) -> int:
        return sum(self.items.values())

    @property
    def headroom(self) -> int:
        return self.capacity - self.used

    @property
    def fits(self) -> bool:
        return self.headroom >= 0


@dataclass(frozen=True)
class KvCache:
    """The KV cache of one engine. `bytes_per_token` is on one rank; tokens and sequences are the engine's."""

    bytes_per_token: int
    tokens: int
    longest_tokens: int
    wanted_sequences: int

    @property
    def sequences(self) -> int:
        """Sequences of the longest kind that fit at one time."""
        return self.tokens // self.longest_tokens


@dataclass(frozen=True)
class MemoryPlan:
    phases: tuple[Phase, ...]
    kv: KvCache
    engine_weights: int  # on one rank
    trainer_weights: int  # of the fullest rank
    micro_batch_tokens: int

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases) and self.kv.sequences >= 1


@dataclass(frozen=True)
class StateShares:
    """Parameters of one rank: dense (over the data-parallel group) and expert (over the smaller expert-data-parallel group)."""

    dense: float
    expert: float
    dense_dp: int
    expert_dp: int
    quantized: float

    @property
    def elements(self) -> float:
        return self.dense + self.expert

    @property
    def optimizer_elements(self) -> float:
        return self.dense / self.dense_dp + self.expert / self.expert_dp


@functools.lru_cache(maxsize=256)  # proposals plan the same shards many times
def _stage_elements(
    inventory: Inventory, stage: int, tp: int, pp: int, ep: int, etp: int, last_stage_layers: int | None, vocabulary: int | None
) -> tuple[float, float, float]:
    """(dense, expert, quantized) parameters of one rank of a pipeline stage."""
    model = inventory.model
    stages = stage_layers(model.num_layers, pp, last_stage_layers)
    dense = expert = quantized = 0.0
    for group in inventory.groups:
        if not on_stage(group, stage, stages, model.tied_embeddings):
            continue
        share = shard(group, tp=tp, ep=ep, etp=etp, num_kv_heads=model.num_kv_heads, vocabulary=vocabulary)
        elements = group.elements * share
        if group.role is Role.routed_expert:
            expert += elements
        else:
            dense += elements
        if group.train.quantized:
            quantized += elements
    return dense, expert, quantized


def state_shares(cfg: Config, inventory: Inventory, stage: int) -> StateShares:
    par, layout = cfg.parallelism, trainer_layout(cfg)
    dense, expert, quantized = _stage_elements(
        inventory, stage, par.tp, par.pp, par.ep, par.etp, par.last_stage_layers, layout.padded_vocabulary
    )
    dense_dp = max(par.ranks // (par.tp * par.pp), 1) if layout.shards_states else 1
    expert_dp = max(par.ranks // (par.ep * par.etp * par.pp), 1) if layout.shards_states else 1
    return StateShares(dense, expert, dense_dp, expert_dp, quantized)


def attention_bytes_per_token(model: ModelConfig, tp: int, sequence_split: int, act: int) -> float:
    """Residual input, norm output, q, k, v (twice where a norm or a concatenation follows), output, log-sum-exp."""
    n, h = model.num_heads, model.hidden_size
    whole = 2 * h
    if model.kv_lora_rank:
        q_dim = n * (model.qk_nope_head_dim + model.qk_rope_head_dim)
        whole += 2 * model.q_lora_rank + 2 * model.kv_lora_rank + model.qk_rope_head_dim
        split = 2 * q_dim + n * (model.qk_nope_head_dim + model.v_head_dim) + n * model.v_head_dim
    else:
        q_and_k = (n + model.num_kv_heads) * model.head_dim
        split = q_and_k * (2 if model.qk_norm else 1) + (model.num_kv_heads + n) * model.head_dim
    return act * whole / sequence_split + (act * split + 4 * n) / tp


def mlp_bytes_per_token(cfg: Config, moe: bool, sequence_split: int, act: int) -> float:
    """Residual input, norm output, gate and up, their product; for MoE per chosen expert also the permuted copies."""
    model, par = cfg.model, cfg.parallelism
    whole = act * 2 * model.hidden_size / sequence_split
    if not moe:
        return whole + act * 3 * model.ffn_size / par.tp
    router = 2 * 4 * model.num_experts / sequence_split
    routed = model.experts_top_k * act * (2 * model.hidden_size * par.etp + 3 * model.expert_ffn_size) / sequence_split
    shared = act * 3 * model.expert_ffn_size * model.num_shared_experts / par.tp
    return whole + router + routed + shared


def activation_bytes(cfg: Config, stage: int, tokens: int) -> int:
    """Peak activations of one rank, with the micro-batches that 1F1B keeps in flight (pp - stage of them).

    recompute none keeps every layer; full keeps each layer's input and one layer's inside. selective: fused kernels recompute
    the core attention (only its log-sum-exp is saved), others every mlp.
    """
    par, model = cfg.parallelism, cfg.model
    act = base_bytes(cfg)
    sequence_split = par.tp if par.sequence_parallel else 1
    stages = stage_layers(model.num_layers, par.pp, par.last_stage_layers)
    attention = attention_bytes_per_token(model, par.tp, sequence_split, act)
    kinds = [model.num_experts > 0 and layer >= model.num_dense_layers for layer in stages[stage]]
    mlps = [mlp_bytes_per_token(cfg, moe, sequence_split, act) for moe in kinds]
    fused = trainer_layout(cfg).fused
    if not fused:
        attention *= UNFUSED_ATTENTION
        mlps = [UNFUSED_MLP * mlp for mlp in mlps]
    inputs = act * model.hidden_size / sequence_split
    kept, working = attention * len(mlps) + sum(mlps), 0.0
    if cfg.trainer.recompute == Recompute.full:
        kept, working = len(mlps) * inputs, attention + max(mlps)
    elif cfg.trainer.recompute == Recompute.selective and fused:
        kept -= len(mlps) * 4 * model.num_heads / par.tp
    elif cfg.trainer.recompute == Recompute.selective:
        kept, working = len(mlps) * (attention + 2 * inputs), max(mlps)
    return int(tokens * (kept * (par.pp - stage) + working))


def logits_bytes(cfg: Config, tokens: int) -> int:
    """Last stage: the fp32 tensors of the loss for one chunk of positions, with the model-dtype logits they come from."""
    chunk = min(cfg.trainer.logprob_chunk_tokens, tokens)
    return int(chunk * cfg.model.vocab_size / cfg.parallelism.tp * (4 * LOGITS_COPIES + base_bytes(cfg)))


def trainer_items(cfg: Config, inventory: Inventory, stage: int, tokens: int) -> tuple[dict[str, int], dict[str, int]]:
    """What one training rank holds: (on its device, in host memory)."""
    shares, base, pp = state_shares(cfg, inventory, stage), base_bytes(cfg), cfg.parallelism.pp
    device: dict[str, int] = {"weights": int(shares.elements * base)}
    host: dict[str, int] = {}
    layout = trainer_layout(cfg)
    trained, stepped, masters = shares.elements, shares.optimizer_elements, layout.masters
    if has_adapters(cfg):  # one rank holds everything
        trained = stepped = adapter_elements(cfg, inventory)
        masters = True
        device["frozen base"] = base_elements(cfg, inventory) * base
    gradients = int(trained * 4)  # both trainers accumulate in fp32; a parameter's own gradient is freed at once
    states = {"fp32 masters": int(stepped * 4) if masters else 0, "Adam moments": int(stepped * 8)}
    if cfg.trainer.optimizer.cpu_offload:
        host.update(states)
        host["gradients for offloaded Adam"] = int(stepped * 4)
        device["gradients"] = 0 if layout.in_process else gradients  # a trainer in this process accumulates in host memory
    else:
        device.update({"gradients": gradients, **states})
    device.update(quantization_items(cfg, inventory, shares))
    if cfg.algorithm.kl_coef > 0:
        reference = trained * 4 if has_adapters(cfg) else shares.elements * base
        (device if layout.resident_reference else host)["reference weights"] = int(reference)
    device["activations"] = activation_bytes(cfg, stage, tokens)
    if stage == pp - 1:
        device["logits of a chunk"] = logits_bytes(cfg, tokens)
    return {k: v for k, v in device.items() if v}, {k: v for k, v in host.items() if v}


def quantization_items(cfg: Config, inventory: Inventory, shares: StateShares) -> dict[str, int]:
    """What training with quantized weights adds on a rank.

    In place: only the scales. In the forward: a dequantized copy of every quantized weight lives until its
    backward (of one layer under full recompute). Where activations are quantized, too: what is multiplied is kept in both
    layouts, unless the trainer has it otherwise.
    """
    quantized = {group.train.format: group.train.spec for group in inventory.groups if group.train.quantized}
    if not quantized:
        return {}
    for name, spec in quantized.items():
        if spec.quantizes_activations:
            kept = trainer_layout(cfg).keeps_quantized
            return {f"{name.upper()} copies of weights": int(2 * shares.quantized * spec.bits / 8)} if kept else {}
    if cfg.precision.qat_placement is QatPlacement.forward:
        layers = cfg.model.num_layers // cfg.parallelism.pp if cfg.trainer.recompute == Recompute.full else 1
        return {"fake-quantized copies": int(shares.quantized * base_bytes(cfg) / layers)}
    group = cfg.precision.train.group_size
    return {"scales": int(2 * shares.quantized / (group if group > 0 else cfg.model.hidden_size))}


def engine_weight_bytes(cfg: Config, inventory: Inventory) -> int:
    """Weights of one engine rank in rollout format: attention and dense parts over its ranks, experts over engine_ep."""
    return _engine_bytes(inventory, engine_layout(cfg).ranks, max(cfg.parallelism.engine_ep, 1), base_bytes(cfg))


@functools.lru_cache(maxsize=64)
def _engine_bytes(inventory: Inventory, ranks: int, ep: int, base: int) -> int:
    total = 0.0
    for group in inventory.groups:
        kv_heads = inventory.model.num_kv_heads
        share = shard(group, tp=ranks, ep=ep, etp=max(ranks // ep, 1), num_kv_heads=kv_heads)
        total += group.rollout.stored_bytes(group.shape, base) * group.count * share
    return int(total)


def kv_bytes_per_token(cfg: Config) -> int:
    """On one rank. Grouped-query attention: k and v of its heads (one head at least); latent attention: the compressed
    vector and the rope key, whole on every rank (DeepSeek-V2, arXiv 2405.04434). MTP layers keep a cache too when they draft."""
    model = cfg.model
    value = cfg.precision.kv_cache.num_bytes or base_bytes(cfg)
    layers = model.num_layers + (model.num_mtp_layers if cfg.speculative.method == Drafting.mtp else 0)
    if model.kv_lora_rank:
        return layers * (model.kv_lora_rank + model.qk_rope_head_dim) * value
    heads = ceil(model.num_kv_heads / engine_layout(cfg).ranks)
    return layers * 2 * heads * model.head_dim * value


def engine_runtime_bytes(cfg: Config) -> int:
    """Prefill activations, CUDA graphs and metadata outside weights and cache, as the engine says; else logits and a layer."""
    layout = engine_layout(cfg)
    if layout.runtime_bytes is not None:
        return layout.runtime_bytes
    rows = cfg.rollout.max_concurrency * (1 + cfg.speculative.num_draft_tokens * (cfg.speculative.method != Drafting.none))
    layer = attention_bytes_per_token(cfg.model, 1, 1, 2) + mlp_bytes_per_token(cfg, cfg.model.num_experts > 0, 1, 2)
    return int(rows * cfg.model.vocab_size * 4 * 2 + layout.prefill_tokens * layer)


def kv_cache(cfg: Config, capacity: int, weights: int) -> KvCache:
    """What memory_fraction of a GPU leaves beside the weights, or the cache that is asked for."""
    per_token, longest = kv_bytes_per_token(cfg), longest_sequence_tokens(cfg)
    layout = engine_layout(cfg)
    tokens = layout.cache_tokens or cfg.rollout.max_concurrency * longest
    if layout.memory_fraction is not None:
        tokens = max(int(capacity * layout.memory_fraction - weights) // per_token, 0)
    return KvCache(per_token, tokens, longest, cfg.rollout.max_concurrency)


def stream_bytes(cfg: Config, inventory: Inventory, grid: TensorFormat | None = None) -> int:
    """One whole copy of the weights in rollout format, or with `grid` in place of the quantized tensors' own."""
    return sum(
        g.count * (grid if grid and g.rollout.quantized else g.rollout).stored_bytes(g.shape, base_bytes(cfg))
        for g in inventory.groups
    )


def plan_memory(cfg: Config, inventory: Inventory) -> MemoryPlan:
    """Every phase on the fullest GPU (one row per pipeline stage in training) and on a node's host memory."""
    par, cluster = cfg.parallelism, cfg.cluster
    tokens = micro_batch_tokens(cfg)
    host_capacity = int(cluster.host_memory_gib * GIB)
    on_cpu = par.gpus == 0
    capacity = host_capacity if on_cpu else int(cluster.gpu_memory_gib * GIB)
    weights = engine_weight_bytes(cfg, inventory)
    kv = kv_cache(cfg, capacity, weights)
    engine = {"engine weights": weights, "KV cache": kv.tokens * kv.bytes_per_token, "engine runtime": engine_runtime_bytes(cfg)}
    ranks = [trainer_items(cfg, inventory, stage, tokens) for stage in range(par.pp)]
    routes = route_bytes_per_step(cfg)
    trainer_weights = max(device["weights"] for device, _ in ranks)
    if one_process(cfg):
        device, host = ranks[0]
        process = {"process": CPU_PROCESS if on_cpu else CUDA_RESERVE, **device, **engine}
        if on_cpu:
            phases = [Phase("run", "host", process | host | {"routes of a step": routes}, capacity)]
        else:
            phases = [
                Phase("run", "GPU", process, capacity),
                Phase("run", "host", {"process": HOST_PER_PROCESS, **host, "routes of a step": routes}, host_capacity),
            ]
    elif on_cpu:
        phases = [cpu_processes(cfg, ranks, engine, routes, capacity)]
    else:
        phases = separate_phases(cfg, ranks, engine, weights, routes, capacity, host_capacity, stream_bytes(cfg, inventory))
    return MemoryPlan(tuple(phases), kv, weights, trainer_weights, tokens)


def cpu_processes(
    cfg: Config, ranks: list[tuple[dict[str, int], dict[str, int]]], engine: dict[str, int], routes: int, capacity: int
) -> Phase:
    """Trainer ranks and engine processes of a laptop run, all in one machine's memory."""
    par, layout = cfg.parallelism, engine_layout(cfg)
    per_stage = max(par.ranks // par.pp, 1)
    engine_processes = layout.engines * layout.ranks
    items = {"processes": (par.ranks + engine_processes) * CPU_PROCESS, "routes of a step": routes}
    for device, host in ranks:
        for name, size in (*device.items(), *host.items()):
            items[name] = items.get(name, 0) + size * per_stage
    for name, size in engine.items():
        items[name] = size * engine_processes
    return Phase("run", "host", items, capacity)


def separate_phases(
    cfg: Config,
    ranks: list[tuple[dict[str, int], dict[str, int]]],
    engine: dict[str, int],
    weights: int,
    routes: int,
    capacity: int,
    host_capacity: int,
    published: int,
) -> list[Phase]:
    """Trainer and engines in their own processes: in turns on the same GPUs (colocate) or each on its own."""
    par = cfg.parallelism
    asleep = {"sleeping engine": CUDA_RESERVE} if par.colocate else {}
    slack = int(capacity * FRAGMENTATION)
    phases = []
    for stage, (device, _) in enumerate(ranks):
        where = "GPU" if par.pp == 1 else f"GPU of stage {stage}"
        items = {**device, "CUDA and NCCL": CUDA_RESERVE, "fragmentation": slack, **asleep}
        phases.append(Phase("train", where, items, capacity))
    engine = {**engine, "CUDA and NCCL": CUDA_RESERVE, **({"sleeping trainer": CUDA_RESERVE} if par.colocate else {})}
    phases.append(Phase("rollout", "GPU", engine, capacity))
    if par.colocate:
        awake = max(device["weights"] for device, _ in ranks)
        sync = {"weights": awake, "engine weights": weights, "buckets": 2 * SYNC_BUCKET, "CUDA and NCCL": 2 * CUDA_RESERVE}
        phases.append(Phase("weight sync", "GPU", sync, capacity))
    per_node = min(par.gpus, cfg.cluster.gpus_per_node)
    processes = per_node * (2 if par.colocate else 1)
    fullest = max((host for _, host in ranks), key=lambda items: sum(items.values()))
    node = {"processes": processes * HOST_PER_PROCESS, **{name: size * per_node for name, size in fullest.items()}}
    if par.colocate:
        stays = ("weights", "fp32 masters", "Adam moments", "reference weights")
        node["sleeping trainer"] = per_node * max(sum(device.get(name, 0) for name in stays) for device, _ in ranks)
    node["routes of a step"] = routes
    if cfg.cluster.nodes > 1 and on_every_node(cfg):
        node["published weights, old and new"] = 2 * published
    elif kept_by_ranks(cfg):
        node["published weights, old and new"] = 2 * published // max(par.gpus // per_node, 1)
    phases.append(Phase("all", "host of a node", node, host_capacity))
    return phases
