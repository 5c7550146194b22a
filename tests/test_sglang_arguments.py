"""SGLang's server arguments: golden files per recipe, options checked by name and kind, conflicts, warnings. Needs no SGLang.

Golden files: tests/goldens.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runner.config import compose, preflight
from runner.config.schema import Config
from runner.config.searchpath import groups
from runner.errors import UserErrors
from runner.planner.tables import not_run_yet
from runner.rollout.sglang import arguments
from runner.rollout.sglang import rules as sglang
from runner.rollout.sglang.config import SglangRolloutConfig, layout
from runner.rollout.sglang.option_table import options, problem_of
from runner.weights import transfer_engine
from tests import goldens
from tests.configs import problems

GOLDEN = Path(__file__).parent / "golden" / "sglang"
RECIPES = [name for name in groups()["recipe"] if name not in ("none", "qwen3_vl_2b_geo3k")]  # servers are sent no images
CPU = ["rollout=sglang", "speculative=none"]


def load(*overrides: str) -> Config:
    return compose.load_config(list(overrides))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_gives_its_golden_arguments(recipe: str) -> None:
    """Recipes of the in-process engine are asked what they would start with SGLang servers on a CPU."""
    cfg = load(f"recipe={recipe}")
    if not isinstance(cfg.rollout, SglangRolloutConfig):
        cfg = load(f"recipe={recipe}", *CPU, *(["precision=int4_qat"] if "fp4" in cfg.precision.name else []))
    found = {"servers": layout(cfg).engines, **arguments.server_arguments(cfg)}
    goldens.check(GOLDEN / f"{recipe}.yaml", found, RECIPES[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_argument_is_an_option_of_sglang_with_a_value_of_its_kind(recipe: str) -> None:
    for name, value in goldens.read(GOLDEN / f"{recipe}.yaml").items():
        if name != "servers":
            assert problem_of(name, value) is None, name


def test_options_of_the_config_arrive() -> None:
    cfg = load(
        "model=tiny_moe",
        *CPU,
        "rollout.max_concurrency=7",
        "precision=bf16",
        "precision.base_dtype=float32",
        "+rollout.server_args.schedule_policy=lpm",
    )
    found = arguments.server_arguments(cfg)
    assert found["max_running_requests"] == 7 and found["dtype"] == "float32" and found["schedule_policy"] == "lpm"
    assert found["enable_return_routed_experts"] and found["device"] == "cpu" and found["attention_backend"] == "torch_native"
    assert found["load_format"] == "dummy" and found["trust_remote_code"] is False
    assert not arguments.server_arguments(load("model=tiny_moe", *CPU, "router_replay=none"))["enable_return_routed_experts"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max_runing_requests=8", "max_running_requests"),
        ("port=3000", "the pool sets this"),
        ("api_key=abc", "the pool sets this"),
        ("trust_remote_code=true", "code of a checkpoint is never run"),
        ("enable_custom_logit_processor=true", "execute code"),
        ("tp_size=2", "contradicts 1"),
        ("speculative_algorithm=NGRAM", "the speculative group says"),
        ("speculative_num_draft_tokens=3", "the speculative group says"),
        ("speculative_accept_threshold_single=0.5", "would not have sampled"),
        ("quantization=fp8", "the precision group says"),
        ("pp_size=2", "parallelism.gpus_per_engine"),
        ("dp_size=2", "balances them itself"),
        ("ssl_keyfile=key.pem", "plain HTTP"),
        ("weight_cache_mode=owner", "verified by runner's plugin"),
        ("dtype=float16", "precision.base_dtype"),
        ("schedule_conservativeness=often", "is not one of: float"),
        ("speculative_ngram_match_type=DEEP", "'BFS'"),
    ],
)
def test_wrong_options_fail_at_composition(option: str, message: str) -> None:
    with pytest.raises(UserErrors) as caught:
        load("model=tiny_moe", *CPU, f"+rollout.server_args.{option}")
    assert message in str(caught.value) and f"rollout.server_args.{option.partition('=')[0]}" in str(caught.value)


def test_an_option_may_repeat_what_follows_from_the_config() -> None:
    load("model=tiny_moe", *CPU, *(f"+rollout.server_args.{option}=1" for option in ("tp_size", "dp_size", "pp_size")))


@pytest.mark.promise("the router drops routes and knows no pause")
@pytest.mark.promise("speculation on a CPU ignores temperature")
@pytest.mark.promise("retract loses routes")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=tiny_moe", "rollout=sglang", "speculative=ngram"], "accepts drafts greedily"),
        ([*CPU, "precision=fp8"], "merges attention weights k_proj, v_proj of 64 outputs"),
        (
            [*CPU, "model=tiny_dense", "precision=fp8", "precision.roles=[dense_mlp]", "model.ffn_size=192"],
            "gate_proj, up_proj of 192",
        ),
        (["model=tiny_moe", "rollout=sglang", "speculative=ngram", "rollout.sampling.temperature=0"], "ignores evaluation"),
        (["model=tiny_moe", *CPU, "rollout.use_router=true"], "drops the routes"),
        (["model=tiny_moe", *CPU, "cluster.interface=0.0.0.0"], "open on every network"),
        (["model=tiny_moe", *CPU, "cluster.interface='::'"], "open on every network"),
        (["model=tiny_moe", *CPU, "precision=mxfp4_qat"], "not with mxfp4"),
        (["model=tiny_moe", *CPU, "rollout.pause_mode=retract"], "loses its routes"),
        (["model=tiny_moe", *CPU, "rollout.cpu_engines=0"], "must be at least 1"),
        (["model=tiny_moe", *CPU, "rollout.cpu_tp=3"], "attention heads do not divide by 3.*rollout.cpu_tp=2"),
        (["model=tiny_moe", *CPU, "parallelism.engine_ep=2"], "does not divide an engine of 1 ranks.*rollout.cpu_tp=2"),
    ],
)
def test_what_sglang_does_not_do_here_is_refused_with_the_reason(overrides: list[str], message: str) -> None:
    assert re.search(f"(?s){message}", "\n".join(map(str, problems(*overrides))))


@pytest.mark.promise("a tree of n-gram drafts gives wrong routes")
@pytest.mark.promise("sequences x drafts overflow the buffer of routes")
def test_greedy_speculation_is_mapped_and_its_routes_must_fit_their_buffer() -> None:
    cfg = load("model=tiny_moe", *CPU)
    cfg.speculative = load("model=tiny_moe").speculative
    cfg.rollout.sampling.temperature = cfg.evaluation.sampling.temperature = 0.0  # training refuses it
    assert list(sglang.speculation(cfg)) == []
    found = arguments.server_arguments(cfg)
    assert found["speculative_algorithm"] == "NGRAM" and found["speculative_num_draft_tokens"] == 5
    assert found["speculative_ngram_max_bfs_breadth"] == 1
    cfg.rollout.chunked_prefill_tokens = 512  # type: ignore[attr-defined]
    (problem,) = sglang.speculation(cfg)
    assert "buffer of routes" in str(problem)


@pytest.mark.parametrize(("method", "algorithm"), [("mtp", "NEXTN"), ("eagle", "EAGLE"), ("draft", "STANDALONE")])
def test_draft_models_are_mapped(method: str, algorithm: str) -> None:
    draft = [] if method == "mtp" else ["speculative.draft_model=/models/d"]
    found = arguments.server_arguments(load("model=mimo_7b", f"speculative={method}", "speculative.num_draft_tokens=3", *draft))
    assert (found["speculative_algorithm"], found["speculative_num_steps"]) == (algorithm, 3)
    assert (found["speculative_eagle_topk"], found["speculative_num_draft_tokens"]) == (1, 4)
    assert found.get("speculative_draft_model_path") == (None if method == "mtp" else "/models/d")
    # multi-token-prediction layers travel in bf16 with the policy's packed INT4; another model says itself what it is
    assert found.get("speculative_draft_model_quantization") == ("unquant" if method == "mtp" else None)
    assert all(problem_of(name, value) is None for name, value in found.items())


@pytest.mark.promise("a Qwen3-MoE draft model is rewritten to its multi-token-prediction layer")
@pytest.mark.parametrize(("architecture", "refused"), [("Qwen3MoeForCausalLM", True), ("Qwen3ForCausalLM", False)])
def test_a_draft_model_that_sglang_would_rewrite_is_refused(tmp_path: Path, architecture: str, refused: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    with pytest.raises(UserErrors) as caught:  # of the GPUs that are missing, at least
        preflight.check(load("model=mimo_7b", "speculative=draft", f"speculative.draft_model={tmp_path}"))
    assert ("makes a multi-token-prediction layer" in str(caught.value)) == refused


@pytest.mark.promise("whatever is called an EAGLE head is loaded as one")
@pytest.mark.parametrize(
    ("architecture", "hidden_size", "refused"),
    [
        ("LlamaForCausalLMEagle", 4096, None),
        ("LlamaForCausalLMEagle", 2048, "hidden states of width 2048, mimo_7b has 4096"),
        ("LlamaForCausalLMEagle3", 4096, "LlamaForCausalLMEagle3 is not an EAGLE head"),
        ("Qwen3ForCausalLM", 4096, "Qwen3ForCausalLM is not an EAGLE head"),
    ],
)
def test_what_sglang_would_silently_draft_badly_with_is_refused(
    tmp_path: Path, architecture: str, hidden_size: int, refused: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "hidden_size": hidden_size}))
    with pytest.raises(UserErrors) as caught:  # of the GPUs that are missing, at least
        preflight.check(load("model=mimo_7b", "speculative=eagle", f"speculative.draft_model={tmp_path}"))
    assert refused in str(caught.value) if refused else "speculative.draft_model" not in str(caught.value)


def test_one_multi_token_prediction_layer_drafts() -> None:
    with pytest.raises(UserErrors, match="SGLang drafts with one multi-token-prediction layer, mimo_7b has 2"):
        load("model=mimo_7b", "speculative=mtp", "model.num_mtp_layers=2")


@pytest.mark.promise("INT4 of linear layers cannot be loaded again on CUDA")
def test_dense_int4_on_gpus_can_be_planned_and_not_run() -> None:
    cfg = load("model=mimo_7b", "precision=int4_qat")
    with pytest.raises(UserErrors, match="cannot update packed INT4 weights of dense_mlp"):
        preflight.check(cfg)
    (note,) = not_run_yet(cfg)
    assert note.startswith("a run is refused") and "dense_mlp" in note and "precision=fp8" in note
    assert not not_run_yet(load("model=mimo_7b", "precision=fp8"))


def test_transports_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserErrors, match="NCCL cannot broadcast between two processes on one GPU"):
        load("recipe=qwen3_30b_int4", "rollout.weight_transport=distributed")


@pytest.mark.promise("transports")
def test_rdma_is_refused_where_the_hardware_does_not_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = load("model=tiny_moe", *CPU, "rollout.weight_transport=p2p")
    monkeypatch.setattr(transfer_engine, "DEVICES", tmp_path / "nothing")
    with pytest.raises(UserErrors, match="cannot be read peer to peer over rdma here: this machine has no RDMA device"):
        preflight.check(cfg)
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(transfer_engine, "DEVICES", tmp_path)
    monkeypatch.setattr(transfer_engine.importlib.util, "find_spec", lambda name: None)
    (problem,) = transfer_engine.obstacles("rdma")[:1]
    assert problem == "mooncake-transfer-engine is not installed"
    with pytest.raises(UserErrors, match="rollout.transfer_protocol"):
        load("model=tiny_moe", *CPU, "rollout.weight_transport=p2p", "rollout.transfer_protocol=udp")
    (line,) = (line for line in arguments.warnings(cfg) if "p2p" in line)
    assert "no keys" in line and not any("p2p" in line for line in arguments.warnings(load("model=tiny_moe", *CPU)))


def test_sglangs_own_way_of_handing_out_weights_is_refused() -> None:
    option = "remote_instance_weight_loader_start_seed_via_transfer_engine"
    with pytest.raises(UserErrors, match="hands out addresses of the weights to anybody"):
        load("model=tiny_moe", *CPU, f"+rollout.server_args.{option}=true")


def test_cuda_graphs_that_do_not_cover_the_concurrency_are_a_warning() -> None:
    cfg = load("recipe=qwen3_30b_int4")
    assert arguments.warnings(cfg) == []
    cfg.rollout.cuda_graph_max_batch = 16  # type: ignore[attr-defined]
    (warning,) = arguments.warnings(cfg)
    assert "up to 16 sequences" in warning and "rollout.cuda_graph_max_batch=32" in warning  # 32 x 8 samples over 8 engines


def test_the_table_of_options_knows_defaults_and_refuses_other_kinds() -> None:
    assert len(options()) > 500
    assert problem_of("enable_memory_saver", True) is None and problem_of("enable_memory_saver", 1) is not None
    assert problem_of("mem_fraction_static", 1) is None and problem_of("context_length", None) is None


def test_arguments_are_built_without_torch_and_without_sglang() -> None:
    code = (
        "import sys; from runner.config import compose; from runner.rollout.sglang import arguments;"
        "arguments.server_arguments(compose.load_config(['model=tiny_moe', 'rollout=sglang', 'speculative=none']));"
        "assert 'torch' not in sys.modules and 'sglang' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.sglang
def test_the_table_is_that_of_the_installed_sglang() -> None:
    from runner.rollout.sglang.server import STUBS

    code = "import json; from runner.rollout.sglang.option_table import installed; print(json.dumps(installed()))"
    env = {**os.environ, "PYTHONPATH": str(STUBS), "SGLANG_USE_CPU_ENGINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True, env=env)
    assert yaml.safe_load(result.stdout.splitlines()[-1]) == options()
