"""The planner against published sizes and numbers worked out by hand."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from runner.cluster.placement import coordinates, place, placement_problems
from runner.config.choices import KvDtype, Recompute
from runner.config.compose import load_config
from runner.config.option import trainer_layout
from runner.config.schema import Config, Convention, QatPlacement, Role
from runner.errors import UserError
from runner.planner.fit import largest_max_tokens, try_changes, what_would_fit
from runner.planner.memory import (
    CPU_PROCESS,
    activation_bytes,
    engine_weight_bytes,
    kv_bytes_per_token,
    plan_memory,
    state_shares,
)
from runner.planner.parameters import shard, stage_layers, take_inventory
from runner.planner.tables import ranges, show
from runner.planner.traffic import bf16_stream_bytes, stream_bytes, sync_flows
from runner.planner.workload import GIB, micro_batch_tokens, route_bytes_per_step
from runner.precision.tensor_format import TensorFormat
from tests.configs import composed

# Every activation is kept, and the optimizer's states lie on the GPU.
KEPT = {"trainer.recompute": "none", "trainer.optimizer.cpu_offload": False}
APART = {"parallelism.colocate": False, "cluster.gpus_per_node": 8}
RECIPES = {
    "qwen3_4b": "qwen3_4b_fp8",
    "qwen3_30b": "qwen3_30b_int4",
    "qwen3_235b": "qwen3_235b_int4",
    "moonlight_16b": "moonlight_16b_int4",
    "kimi_k2_thinking": "kimi_k2_int4",
}


def config(model: str, *overrides: str, **changes: object) -> Config:
    """The recipe of a published run; changes as in tests.configs.composed."""
    return composed(f"recipe={RECIPES[model]}", *overrides, **changes)


def qwen3_30b(*overrides: str, **changes: object) -> Config:
    return config("qwen3_30b", *overrides, **changes)


def kimi(*overrides: str, **changes: object) -> Config:
    return config("kimi_k2_thinking", *overrides, **{"rollout.memory_fraction": 0.85, **changes})


def parallelism(gpus: int, **fields: object) -> dict[str, object]:
    """Changes: a layout of `gpus`, everything 1 that is not given."""
    values = dict.fromkeys(("tp", "pp", "cp", "ep", "etp", "engine_ep", "gpus_per_engine"), 1)
    values |= {"gpus": gpus, "ranks": gpus, "rollout_gpus": gpus, "last_stage_layers": None}
    return {f"parallelism.{key}": value for key, value in (values | fields).items()}


# ---- parameters


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # totals: the checkpoints' own parameter counts; active: the model cards'
        ("qwen3_4b", 4_022_468_096, 4.02e9),
        ("qwen3_30b", 30_532_122_624, 3.35e9),
        ("qwen3_235b", 235_093_634_560, 22.2e9),
        ("moonlight_16b", 15_960_111_936, 2.91e9),
        ("kimi_k2_thinking", 1_026_408_232_448, 32.9e9),
    ],
)
def test_totals_are_the_published_ones(name: str, total: int, active: float) -> None:
    inventory = take_inventory(config(name, "precision=bf16"))
    assert inventory.total == pytest.approx(total, rel=1e-5)
    assert inventory.active == pytest.approx(active, rel=0.01)


def test_roles_add_up_and_experts_are_counted_by_hand() -> None:
    counts = take_inventory(qwen3_30b()).by_role()
    assert counts[Role.routed_expert] == 48 * 128 * 3 * 768 * 2048
    assert counts[Role.router] == 48 * 128 * 2048
    assert counts[Role.embedding] == counts[Role.lm_head] == 151936 * 2048
    assert counts[Role.attention] == 48 * (2 * 32 * 128 * 2048 + 2 * 4 * 128 * 2048)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [  # 256 x 512 weights
        (TensorFormat.bf16(), 262144),
        (TensorFormat.int4(128, Convention.llmcompressor), 65536 + 256 * 4 * 2 + 16),
        (TensorFormat.int4(32, Convention.llmcompressor), 65536 + 256 * 16 * 2 + 16),
        (TensorFormat.int4(-1, Convention.llmcompressor), 65536 + 256 * 2 + 16),
        (TensorFormat.int8(-1, Convention.llmcompressor), 131072 + 256 * 2 + 16),
        (TensorFormat.fp8(), 131072 + 2 * 4 * 4),
        (TensorFormat.mxfp4(), 65536 + 256 * 16),
        (TensorFormat.nvfp4(), 65536 + 256 * 32 + 4),
    ],
)
def test_stored_bytes_by_hand(grid: TensorFormat, expected: int) -> None:
    assert grid.stored_bytes((256, 512)) == expected


def test_stored_bytes_are_those_of_real_tensors() -> None:
    """What the encoder really makes, for every format."""
    import torch

    from runner.precision.codec import encode

    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    formats = [TensorFormat.int4(g, Convention.exact) for g in (32, 128)]
    formats += [TensorFormat.bf16(), TensorFormat.fp8(), TensorFormat.mxfp4(), TensorFormat.nvfp4()]
    for tensor_format in formats:
        parts = encode("model.layers.0.mlp.up_proj.weight", weight, tensor_format).parts
        real = sum(part.numel() * part.element_size() for part in parts.values())
        assert tensor_format.stored_bytes((256, 512)) == real, tensor_format


def test_kimi_int4_checkpoint_is_594_gb() -> None:
    cfg = kimi()
    assert stream_bytes(cfg, take_inventory(cfg)) / 1e9 == pytest.approx(594, rel=0.01)


def test_shares_of_all_ranks_cover_the_model_once() -> None:
    """Summed over stages, what the ranks of one model replica hold is the model plus only what is replicated."""
    cfg = config("qwen3_235b")
    inventory = take_inventory(cfg)
    shares = [state_shares(cfg, inventory, stage) for stage in range(4)]
    experts = inventory.by_role()[Role.routed_expert]
    assert sum(s.expert for s in shares) * 16 == pytest.approx(experts)
    replicated = inventory.by_role()[Role.norm] + inventory.by_role()[Role.router]
    dense = inventory.total - experts - replicated
    assert sum(s.dense for s in shares) == pytest.approx(dense / 4 + replicated)


def test_embeddings_are_as_long_as_the_ranks_make_them() -> None:
    """151,939 rows on four ranks are 151,940; whole multiples of 128 per rank, which Megatron's own scripts take, are not."""
    cfg = config("qwen3_235b", **{"model.vocab_size": 151939})
    (embedding,) = [group for group in take_inventory(cfg).groups if group.role is Role.embedding]
    rows = trainer_layout(cfg).padded_vocabulary
    assert rows == 151940 and cfg.parallelism.tp == 4
    assert shard(embedding, tp=4, ep=1, etp=1, num_kv_heads=4, vocabulary=rows) * 151939 == pytest.approx(151940 / 4)
    assert shard(embedding, tp=4, ep=1, etp=1, num_kv_heads=4) == 1 / 4


def test_stage_layers() -> None:
    assert [len(stage) for stage in stage_layers(94, 4, 22)] == [24, 24, 24, 22]
    assert [len(stage) for stage in stage_layers(61, 8, 5)] == [8] * 7 + [5]
    assert [len(stage) for stage in stage_layers(48, 4, None)] == [12] * 4
    with pytest.raises(UserError, match="61 layers do not split") as caught:
        stage_layers(61, 8, None)
    assert caught.value.fix == "parallelism.last_stage_layers=5"


# ---- memory


def test_optimizer_states_by_hand() -> None:
    """qwen3_30b on 8 GPUs, TP 4, EP 8: experts lie once over the 8 ranks, dense parts twice over groups of 4."""
    cfg = qwen3_30b(**{"trainer.optimizer.cpu_offload": False})
    train = next(p for p in plan_memory(cfg, take_inventory(cfg)).phases if p.name == "train")
    experts = 48 * 128 * 3 * 768 * 2048 // 8
    vocab = 2 * 2048 * 151936 // 4
    attention = 48 * 2 * 2048 * 128 * (32 + 4) // 4
    whole = 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048  # router and norms
    dense = vocab + attention + whole
    assert train.items["weights"] == 2 * (experts + dense)
    assert train.items["gradients"] == 4 * (experts + dense)
    assert train.items["fp32 masters"] == 4 * experts + 4 * dense // 2
    assert train.items["Adam moments"] == 8 * experts + 8 * dense // 2


def test_cpu_offload_moves_the_optimizer_to_the_host() -> None:
    on_gpu, offloaded = (qwen3_30b(**{"trainer.optimizer.cpu_offload": offload}) for offload in (False, True))
    inventory = take_inventory(on_gpu)
    gpu = {p.name: p for p in plan_memory(offloaded, inventory).phases}
    before = {p.name: p for p in plan_memory(on_gpu, inventory).phases}
    moved = before["train"].items["fp32 masters"] + before["train"].items["Adam moments"]
    assert before["train"].used - gpu["train"].used == moved
    assert gpu["all"].items["fp32 masters"] + gpu["all"].items["Adam moments"] == 8 * moved


def test_activations_by_hand() -> None:
    """One dense layer type, no parallelism: bytes per token worked out from the list in the docstring."""
    cfg = config("qwen3_4b", **parallelism(1), **{"trainer.recompute": "none"})
    attention = 2 * 2 * 2560 + 2 * (2 * (32 + 8) * 128 + (8 + 32) * 128) + 4 * 32
    mlp = 2 * 2 * 2560 + 2 * 3 * 9728
    assert activation_bytes(cfg, 0, 1000) == 36 * (attention + mlp) * 1000
    cfg.trainer.recompute = Recompute.full
    assert activation_bytes(cfg, 0, 1000) == (36 * 2 * 2560 + attention + mlp) * 1000


@pytest.mark.parametrize("name", ["qwen3_4b", "qwen3_30b"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_those_that_autograd_keeps(name: str, recompute: str) -> None:
    """One more layer of the torch trainer's model keeps what the planner says, within a fifth (sums over unique storages)."""
    import torch

    from runner.models.build import build_model
    from runner.trainer import experts
    from runner.trainer.recompute import install_recompute

    experts.register()
    sizes = {"hidden_size": 512, "ffn_size": 1536, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "vocab_size": 64}
    if name == "qwen3_30b":
        sizes |= {"num_experts": 8, "experts_top_k": 2, "expert_ffn_size": 512}
    tokens, kept, planned = 256, [], []
    for layers in (1, 2):
        cfg = config(name, "trainer=torch", **parallelism(1), **{"trainer.recompute": recompute})
        cfg.model = replace(cfg.model, **sizes, num_layers=layers, hf_checkpoint=None)
        model = build_model(cfg.model, dtype=torch.bfloat16, seed=0, experts=experts.NAME).train()
        install_recompute(model, Recompute(recompute))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def keep(t: torch.Tensor, weights: set[int] = weights, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in weights:
                saved[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden = model.model(torch.arange(tokens)[None] % 64).last_hidden_state
        kept.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
        working = activation_bytes(cfg, 0, tokens) - activation_bytes(_without_layers(cfg), 0, tokens)
        planned.append(working)
        del hidden
    measured, expected = kept[1] - kept[0], planned[1]
    assert measured == pytest.approx(expected, rel=0.2)


def _without_layers(cfg: Config) -> Config:
    """The same with one layer less, so that a difference is one layer's share."""
    fewer = copy.deepcopy(cfg)
    fewer.model.num_layers = max(cfg.model.num_layers - 1, 1)
    return fewer


def test_recompute_sequence_parallel_and_stages_order_activations() -> None:
    sizes = []
    for recompute in ("none", "selective", "full"):
        cfg = qwen3_30b(**{"trainer.recompute": recompute})
        sizes.append(activation_bytes(cfg, 0, 8192))
    assert sizes[0] > sizes[1] > sizes[2]
    scattered = qwen3_30b()
    whole = copy.deepcopy(scattered)
    whole.parallelism.sequence_parallel = False
    assert activation_bytes(whole, 0, 8192) > activation_bytes(scattered, 0, 8192)
    staged = qwen3_30b(**parallelism(8, tp=2, pp=4, ep=2))
    by_stage = [activation_bytes(staged, stage, 8192) for stage in range(4)]
    assert by_stage == sorted(by_stage, reverse=True) and by_stage[0] > by_stage[3]


def test_fake_quantization_in_the_forward_costs_memory_and_in_place_does_not() -> None:
    in_place, forward = (qwen3_30b(**KEPT, **{"precision.qat_placement": where}) for where in ("in_place", "forward"))
    inventory = take_inventory(in_place)
    first = {cfg.precision.qat_placement: plan_memory(cfg, inventory).phases[0].items for cfg in (in_place, forward)}
    experts = 48 * 128 * 3 * 768 * 2048 // 8
    assert first[QatPlacement.forward]["fake-quantized copies"] == 2 * experts
    assert first[QatPlacement.in_place]["scales"] == 2 * experts // 128


def test_kv_cache_bytes() -> None:
    assert kv_bytes_per_token(qwen3_30b()) == 48 * 2 * 4 * 128 * 2
    assert kv_bytes_per_token(kimi()) == 61 * (512 + 64) * 2, "latent attention: whole on every GPU"
    spread = config("qwen3_235b")
    assert kv_bytes_per_token(spread) == 94 * 2 * 1 * 128 * 2, "8 GPUs cannot cut 4 heads below one"
    spread.precision.kv_cache = KvDtype.fp8_e4m3
    assert kv_bytes_per_token(spread) == 94 * 2 * 128


def test_engine_weights_by_hand() -> None:
    cfg = qwen3_30b()
    inventory = take_inventory(cfg)
    experts = 48 * 128 * 3 * (768 * 2048 // 2 + 768 * 2048 // 128 * 2 + 16)
    rest = inventory.total - 48 * 128 * 3 * 768 * 2048
    assert engine_weight_bytes(cfg, inventory) == experts + 2 * rest


def test_kimi_int4_fits_an_engine_of_8_h200_and_bf16_does_not() -> None:
    int4, bf16 = kimi(), kimi("precision=bf16")
    assert plan_memory(int4, take_inventory(int4)).fits
    plan = plan_memory(bf16, take_inventory(bf16))
    assert not plan.fits
    # "all": a node's host memory, which holds a copy of the weights for its engines
    assert {p.name for p in plan.phases if not p.fits} == {"all", "rollout", "weight sync"}
    assert plan.engine_weights * 8 / 1e12 == pytest.approx(2.05, rel=0.02), "2 bytes for each of 1.03 T"


def test_published_recipes_fit() -> None:
    for cfg in map(config, RECIPES):
        assert not placement_problems(cfg)
        assert plan_memory(cfg, take_inventory(cfg)).fits, cfg.model.name


def test_longest_sequence_decides_the_micro_batch() -> None:
    cfg = qwen3_30b(**{"trainer.max_tokens_per_gpu": 4096})
    assert micro_batch_tokens(cfg) == 2048 + 8192
    cfg.parallelism.cp = 4
    assert micro_batch_tokens(cfg) == 4096
    cfg.model = copy.copy(cfg.model)
    cfg.model.max_context_tokens, cfg.parallelism.cp = 6000, 1
    assert micro_batch_tokens(cfg) == 6000


def test_cpu_run_is_one_process_with_everything_in_it() -> None:
    cfg = composed()
    (run,) = plan_memory(cfg, take_inventory(cfg)).phases
    assert run.where == "host" and {"weights", "fp32 masters", "KV cache", "engine weights", "activations"} <= set(run.items)
    assert run.items["KV cache"] == 64 * 512 * 4 * 2 * 2 * 32 * 2
    assert not plan_memory(composed(**{"cluster.host_memory_gib": 0.5}), take_inventory(cfg)).fits


def test_cpu_engines_are_counted_with_their_ranks() -> None:
    """The pool starts cpu_engines servers of cpu_tp ranks, so that many processes, weights and readers are planned."""
    base = ["rollout=sglang", "rollout.cpu_tp=2"]
    one, four = (load_config([*base, f"rollout.cpu_engines={engines}"]) for engines in (1, 4))
    inventory = take_inventory(one)
    (alone,), (together,) = plan_memory(one, inventory).phases, plan_memory(four, inventory).phases
    assert together.items["engine weights"] == 4 * alone.items["engine weights"] == 8 * engine_weight_bytes(four, inventory)
    assert together.items["processes"] - alone.items["processes"] == 6 * CPU_PROCESS
    assert kv_bytes_per_token(four) * 2 == kv_bytes_per_token(load_config(["rollout=sglang"])), "two ranks share the heads"
    flows = {flow.what.split(", ")[1]: flow for flow in sync_flows(four, inventory)}
    assert flows["tensor (configured)"].how.endswith("read by 4 engines")
    assert flows["distributed"].size == 8 * stream_bytes(four, inventory), "each of 4 x 2 ranks receives every tensor"


# ---- placement and traffic


def test_rank_order_is_megatrons() -> None:
    """The example of Megatron-core's initialize_model_parallel: 16 GPUs, TP 2, PP 4."""
    at = [coordinates(rank, ranks=16, tp=2, cp=1, pp=4, ep=1, etp=1) for rank in range(16)]

    def group(axis: str, of: int) -> list[int]:
        others = [a for a in ("tp", "dp", "pp") if a != axis]
        return [r for r in range(16) if all(getattr(at[r], o) == getattr(at[of], o) for o in others)]

    assert group("tp", 0) == [0, 1] and group("tp", 14) == [14, 15]
    assert group("dp", 0) == [0, 2] and group("dp", 1) == [1, 3] and group("dp", 13) == [13, 15]
    assert group("pp", 0) == [0, 4, 8, 12] and group("pp", 3) == [3, 7, 11, 15]


def test_coordinates_are_a_bijection_in_both_views() -> None:
    at = [coordinates(rank, ranks=64, tp=4, cp=2, pp=4, ep=16, etp=1) for rank in range(64)]
    assert len({(c.tp, c.cp, c.dp, c.pp) for c in at}) == 64
    assert len({(c.etp, c.ep, c.edp, c.pp) for c in at}) == 64


def test_engines_share_gpus_or_follow_the_trainer() -> None:
    together = place(qwen3_30b(**{"parallelism.gpus_per_engine": 2}))
    assert [p.engine for p in together] == [0, 0, 1, 1, 2, 2, 3, 3] and [p.rank for p in together] == list(range(8))
    apart = place(qwen3_30b(**APART, **{"parallelism.gpus_per_engine": 8, "cluster.nodes": 2}))
    assert [p.rank for p in apart] == [*range(8), *[None] * 8]
    assert [p.engine for p in apart] == [*[None] * 8, *[0] * 8] and [p.node for p in apart] == [0] * 8 + [1] * 8


def test_too_few_gpus_is_a_problem() -> None:
    (problem,) = placement_problems(qwen3_30b(**APART))
    assert "16 GPUs are needed" in problem and "= 8" in problem


def test_route_bytes() -> None:
    assert route_bytes_per_step(qwen3_30b()) == 32 * 8 * (2048 + 8192 - 1) * 48 * 8
    assert route_bytes_per_step(kimi()) == 128 * 8 * (2048 + 16384 - 1) * 60 * 8 * 2, "384 experts: two bytes; one dense layer"
    without = qwen3_30b()
    without.router_replay.rollout = False
    assert route_bytes_per_step(without) == 0


def test_sync_ratio_and_transports() -> None:
    cfg = kimi()
    inventory = take_inventory(cfg)
    stream = stream_bytes(cfg, inventory)
    assert bf16_stream_bytes(cfg, inventory) / stream == pytest.approx(3.45, rel=0.01)
    flows = {flow.what.split(", ")[1]: flow.size for flow in sync_flows(cfg, inventory)}
    arriving = stream * 31 // 32  # at each of 32 nodes, which keeps a copy that its engine reads
    assert flows["tensor (configured)"] == 64 * stream + 32 * arriving and flows["distributed"] == 256 * stream
    assert flows["disk_full"] == 33 * stream


# ---- proposals and output


def test_proposals_fit_when_applied() -> None:
    cfg = qwen3_30b(**KEPT, **{"rollout.sampling.max_response_tokens": 32768})
    cfg.cluster.gpu_memory_gib = 80.0
    inventory = take_inventory(cfg)
    assert not plan_memory(cfg, inventory).fits
    proposals = what_would_fit(cfg, inventory)
    assert proposals
    for proposal in proposals:
        changed = copy.deepcopy(cfg)
        for override in proposal.split():
            path, _, text = override.partition("=")
            *parents, leaf = path.split(".")
            target = changed
            for name in parents:
                target = getattr(target, name)
            old = getattr(target, leaf)
            setattr(target, leaf, text == "true" if isinstance(old, bool) else type(old)(text))
        assert plan_memory(changed, take_inventory(changed)).fits, proposal


def test_what_the_rules_refuse_is_not_proposed() -> None:
    """The in-process engine has no FP8 cache, however well it would fit."""
    run = ["model=qwen3_4b", "trainer=torch", "rollout=local", "rollout.max_parameters_on_gpu=0"]
    cfg = composed(*run)
    proposals = what_would_fit(cfg, take_inventory(cfg))
    assert proposals and not [proposal for proposal in proposals if "kv_cache" in proposal]
    for proposal in proposals:
        assert load_config([*run, *proposal.split()])


def test_no_proposal_where_nothing_helps() -> None:
    cfg = kimi()
    cfg.cluster.gpu_memory_gib = 6.0
    assert what_would_fit(cfg, take_inventory(cfg)) == []


def test_largest_max_tokens_is_the_border() -> None:
    cfg = qwen3_30b(**KEPT, **{"rollout.sampling.max_response_tokens": 2048})
    cfg.cluster.gpu_memory_gib = 100.0
    inventory = take_inventory(cfg)
    best = largest_max_tokens(cfg, inventory)
    assert best is not None

    def free(tokens: int) -> float:
        plan = try_changes(cfg, inventory, (("", lambda c: setattr(c.trainer, "max_tokens_per_gpu", tokens)),))
        assert plan is not None
        return min(p.headroom / p.capacity for p in plan.phases if p.name == "train")

    assert free(best) >= 0.05 > free(best + 512)


def run_plan(cfg: Config) -> tuple[int, str]:
    out = io.StringIO()
    return show(cfg, Console(file=out, width=200, color_system=None)), out.getvalue()


def test_output_and_exit_codes() -> None:
    code, text = run_plan(qwen3_30b())
    assert code == 0 and "FITS" in text and "30.53 B parameters, 3.35 B active" in text and "\x1b" not in text
    assert "Placement (8 GPUs" in text and "96.0 KiB per token" in text
    code, text = run_plan(kimi("precision=bf16"))
    assert code == 1 and "DOES NOT FIT: rollout on GPU" in text and "precision=int4_qat" in text
    code, text = run_plan(composed())
    assert code == 0 and "the CPU" in text and "Placement" not in text
    code, text = run_plan(qwen3_30b(**APART))
    assert code == 1 and "16 GPUs are needed" in text


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and ranges([]) == "-" and ranges([3, 3]) == "3"


def test_planner_imports_no_torch() -> None:
    code = "import sys, runner.planner.tables, runner.planner.parameters; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]


def test_gib_of_an_h200_engine_leaves_room() -> None:
    """The int4 30b on one H200 per engine: about 17 GiB of weights, and a cache for tens of long sequences."""
    cfg = qwen3_30b()
    plan = plan_memory(cfg, take_inventory(cfg))
    assert plan.engine_weights / GIB == pytest.approx(16.8, abs=0.2)
    assert plan.kv.sequences == int(139.8 * GIB * 0.7 - plan.engine_weights) // (48 * 2 * 4 * 128 * 2) // 10240
