"""Bad configs: each is refused with the key it is about and a hint that helps, all of them at once, without a traceback."""

from __future__ import annotations

import re
import shlex
from collections import Counter

import pytest

from runner.config.compose import load
from runner.config.overrides import parse, readable, shell
from runner.errors import UserError, UserErrors
from tests.configs import problems

# overrides, key of the problem, part of the problem, part of the fix
BAD: list[tuple[str, str, str, str]] = [
    # misspelt options and keys
    ("model=qwen3_30", "model", "no option qwen3_30", "model=qwen3_30b"),
    ("precision=int4", "precision", "its options are", "precision=int4_qat"),
    ("trainer=megatorn", "trainer", "no option", "trainer=megatron"),
    ("router_replay=off", "router_replay", "no option", "router_replay=none"),
    ("speculative=null", "speculative", "no option null", "speculative=none"),
    ("recipe=kimi_int4", "recipe", "no option", "recipe=kimi_k2_int4"),
    ("precision.gruop_size=64", "precision.gruop_size", "no such key", "precision.group_size=64"),
    ("group_size=64", "group_size", "no such key", "precision.group_size=64"),
    ("model.trust_remote_code=true", "model.trust_remote_code", "no longer a key", "leave it out"),
    ("task.max_turns=4", "task.max_turns", "no longer a key", "task.rollout.max_turns"),
    ("trainer.optimizer.learning_rate=1", "trainer.optimizer.learning_rate", "no such key", ""),
    ("trainer.router_fusoin=true model=qwen3_30b", "trainer.router_fusoin", "no such key", "trainer.router_fusion=true"),
    ("+extra=1", "extra", "no such key", "lists every key"),
    ("~steps", "steps", "cannot be removed", "steps=null"),
    ("rollout.server_args.x=1 model=qwen3_30b", "rollout.server_args.x", "no entry", "+rollout.server_args.x=1"),
    ("steps", "steps", "key=value", "steps=<value>"),
    ("seed=1,2", "seed", "only a sweep", "-m seed=1,2"),
    # types and ranges
    ("steps=many", "steps", "not a whole number", "whole number"),
    ("steps=null", "steps", "may not be null", "whole number"),
    ("trainer.optimizer.lr=fast", "trainer.optimizer.lr", "not a number", "a number"),
    ("parallelism.colocate=perhaps", "parallelism.colocate", "not true or false", "true or false"),
    ("algorithm.estimator=grop", "algorithm.estimator", "none of", "algorithm.estimator=grpo"),
    ("precision.convention=exakt", "precision.convention", "none of", "precision.convention=exact"),
    ("precision.roles=[routed_expert,rooter]", "precision.roles", "rooter", ""),
    ("seed=???", "seed", "no value", "seed=<value>"),
    ("steps=0", "steps", "at least 1", "steps=1"),
    ("task.operands=11", "task.operands", "at most 10", "task.operands=10"),
    ("task.digits=0", "task.digits", "at least 1", "task.digits=1"),
    ("trainer.optimizer.lr=-1", "trainer.optimizer.lr", "above 0", "above 0"),
    ("trainer.recompute=ful", "trainer.recompute", "none of", "trainer.recompute=full"),
    ("tracking.wandb_mode=ofline", "tracking.wandb_mode", "none of", "tracking.wandb_mode=offline"),
    ("trainer._target_=os.system", "trainer._target_", "not a part of runner", "option of trainer"),
    # precision
    ("precision.group_size=48", "precision.group_size", "not one of", "precision.group_size"),
    ("model=qwen3_30b precision.group_size=512", "precision.group_size", "not one of", "precision.group_size"),
    ("precision.group_size=256", "precision.group_size", "not a multiple of group_size 256", "divides"),
    ("precision.group_size=16", "precision.group_size", "int4 matmul has no groups of 16", "precision.group_size=32"),
    ("precision.group_size=-1", "precision.group_size", "int4 matmul has no groups", "rollout=sglang"),
    ("model.expert_ffn_size=40 precision.roles=[routed_expert]", "precision.group_size", "not a multiple", "divides"),
    ("precision.roles=[router]", "precision.roles", "never quantized", "leave out router"),
    ("model=tiny_dense precision.roles=[routed_expert]", "precision.roles", "quantize nothing", "precision.roles=["),
    ("precision.rollout.group_size=64", "precision.rollout.group_size", "training grid", "precision.group_size"),
    ("precision.rollout.convention=kimi", "precision.rollout.convention", "training grid", "precision.convention"),
    ("precision.rollout.format=bf16", "precision.rollout.format", "two different policies", "precision=int4_train"),
    ("precision=fp8 precision.group_size=64", "precision.group_size", "groups of 128 by definition", "leave"),
    ("precision=mxfp4_qat precision.group_size=64", "precision.group_size", "groups of 32 by definition", "leave"),
    ("precision.base_dtype=float32", "precision.qat_placement", "masters", "qat_placement=forward"),
    ("trainer.master_weights=false", "precision.qat_placement", "masters", "qat_placement=forward"),
    (
        "precision=fp8 precision.fp8_param_gather=true model=qwen3_30b",
        "precision.fp8_param_gather",
        "CPU-offloaded",
        "cpu_offload=false",
    ),
    ("precision.fp8_backward=true", "precision.fp8_backward", "needs FP8 training", "precision=fp8"),
    ("precision.kv_cache=fp8_e4m3", "precision.kv_cache", "bf16", "precision.kv_cache=bf16"),
    ("model=moonlight_16b parallelism.engine_ep=1", "parallelism.engine_ep", "cuts a group of 128", "parallelism.engine_ep=4"),
    ("model=qwen3_30b parallelism.ep=4 parallelism.etp=2 precision.group_size=256", "parallelism.etp", "cuts a group", "etp=1"),
    # parallel sizes
    ("model=qwen3_30b parallelism.tp=3", "parallelism.tp", "does not divide 8", "product divides 8"),
    ("model=qwen3_30b parallelism.ranks=4", "parallelism.ranks", "one for each", "parallelism.ranks=8"),
    ("model=qwen3_30b parallelism.ep=3", "parallelism.ep", "128 experts do not divide", "parallelism.ep=2"),
    ("model=qwen3_30b parallelism.ep=16", "parallelism.ep", "does not divide 8", "parallelism.ep=8"),
    (
        "model=qwen3_30b parallelism.sequence_parallel=false",
        "parallelism.sequence_parallel",
        "experts need",
        "sequence_parallel=true",
    ),
    ("parallelism.sequence_parallel=true", "parallelism.sequence_parallel", "tp is 1", "sequence_parallel=false"),
    ("model=mimo_7b parallelism.ep=8", "parallelism.ep", "dense", "parallelism.ep=1"),
    (
        "model=qwen3_30b parallelism.pp=2 parallelism.last_stage_layers=48",
        "parallelism.last_stage_layers",
        "leave 0",
        "last_stage_layers=24",
    ),
    ("model=qwen3_235b parallelism.last_stage_layers=null", "parallelism.pp", "94 layers do not divide", "last_stage_layers=22"),
    ("model=qwen3_30b parallelism.last_stage_layers=4", "parallelism.last_stage_layers", "one pipeline stage", "null"),
    ("model=qwen3_30b parallelism.gpus_per_engine=3", "parallelism.gpus_per_engine", "engines of 3", "gpus_per_engine=2"),
    ("model=qwen3_235b parallelism.gpus_per_engine=12", "parallelism.gpus_per_engine", "nor on whole nodes", "gpus_per_engine=8"),
    (
        "rollout=sglang rollout.cpu_nodes=2 rollout.cpu_tp=2",
        "rollout.cpu_nodes",
        "do not divide the cluster's 1",
        "cluster.nodes=2",
    ),
    (
        "rollout=sglang cluster=ray cluster.nodes=2 trainer=megatron rollout.cpu_nodes=2",
        "rollout.cpu_tp",
        "1 ranks do not divide",
        "cpu_tp=2",
    ),
    ("trainer.device=gpu", "trainer.device", "none of auto, cpu, cuda", "trainer.device=cuda"),
    ("precision.base_dtype=bf16", "precision.base_dtype", "none of bfloat16", "precision.base_dtype=bfloat16"),
    ("model=qwen3_235b parallelism.engine_ep=3", "parallelism.engine_ep", "does not divide an engine", "engine_ep=2"),
    ("model=qwen3_30b parallelism.rollout_gpus=4", "parallelism.rollout_gpus", "colocated", "colocate=false"),
    ("model=qwen3_30b trainer=torch", "trainer", "one process", "trainer=megatron"),
    ("model=qwen3_30b rollout=local", "rollout", "one engine on one device", "rollout=sglang"),
    (
        "model=qwen3_30b parallelism.colocate=false",
        "rollout.weight_transport",
        "memory of one host",
        "weight_transport=distributed",
    ),
    ("model=qwen3_235b cluster.nodes=4", "cluster.nodes", "64 GPUs are needed", "cluster.nodes=8"),
    ("model=qwen3_235b cluster=local cluster.nodes=8", "cluster.nodes", "one machine", "cluster=ray"),
    (
        "cluster=ray cluster.nodes=2 rollout=sglang speculative=none",
        "trainer",
        "for one machine, the run has 2",
        "trainer=megatron",
    ),
    ("cluster=ray cluster.nodes=2 trainer=megatron", "rollout", "for one machine, the run has 2 nodes", "rollout=sglang"),
    # Megatron
    ("model=qwen3_30b trainer.router_fusion=true", "trainer.router_fusion", "ignores replayed routes", "router_fusion=false"),
    ("model=qwen3_30b trainer.moe_token_dispatcher=allgather", "trainer.moe_token_dispatcher", "packed", "alltoall"),
    ("model=qwen3_30b trainer.distributed_optimizer=false", "trainer.overlap_param_gather", "distributed", "=false"),
    ("model=qwen3_30b precision.qat_placement=forward", "precision.qat_placement", "no main_grad", "in_place"),
    ("trainer=megatron precision=nvfp4_qat", "precision", "a scale over a whole weight", "trainer=torch"),
    (
        "trainer=megatron rollout=sglang parallelism.ranks=2 parallelism.etp=2 precision.group_size=-1",
        "parallelism.etp",
        "cuts a group of 128",
        "parallelism.etp=1",
    ),
    ("model=qwen3_30b parallelism.tp=8", "parallelism.tp", "at least one", "parallelism.tp=4"),
    ("trainer=megatron precision=fp8 precision.fp8_param_gather=true", "precision.fp8_param_gather", "needs CUDA", "=false"),
    ("trainer=megatron precision=fp8 precision.fp8_matmul=scaled_mm", "precision.fp8_matmul", "of its own", "=simulated"),
    ("trainer=megatron precision=fp8 parallelism=cpu2", "parallelism.tp", "cuts a group of 128", "parallelism.tp=1"),
    ("trainer=megatron trainer.precision_aware_optimizer=true", "trainer.precision_aware_optimizer", "needs CUDA", "=false"),
    # the loop
    ("rollout.sampling.top_p=0.9", "rollout.sampling.top_p", "whole distribution", "top_p=1.0"),
    ("rollout.sampling.top_k=50", "rollout.sampling.top_k", "whole distribution", "top_k=-1"),
    ("rollout.sampling.temperature=0", "rollout.sampling.temperature", "above 0", "above 0"),
    (
        "rollout.sampling.max_response_tokens=4096",
        "rollout.sampling.max_response_tokens",
        "longer than the context",
        "max_response_tokens=",
    ),
    ("algorithm.updates_per_rollout=7", "algorithm.updates_per_rollout", "does not divide into 7", "divides"),
    (
        "model=qwen3_30b algorithm.prompts_per_step=3 algorithm.samples_per_prompt=5",
        "algorithm.prompts_per_step",
        "2 data-parallel",
        "prompts_per_step=4",
    ),
    ("algorithm.samples_per_prompt=1", "algorithm.samples_per_prompt", "compares the samples", "reinforce_pp"),
    (
        "algorithm=reinforce_pp algorithm.samples_per_prompt=1 algorithm.dynamic_sampling=true",
        "algorithm.dynamic_sampling",
        "equal rewards",
        "false",
    ),
    ("algorithm.oversample_prompts=64", "algorithm.oversample_prompts", "nothing is dropped", "dynamic_sampling=true"),
    ("algorithm.correction=tsi", "algorithm.correction", "none of", "algorithm.correction=tis"),
    ("algorithm.loss_aggregation=token", "algorithm.loss_aggregation", "none of", "algorithm.loss_aggregation=token_mean"),
    ("algorithm.dual_clip=-1", "algorithm.dual_clip", "at least 0", "algorithm.dual_clip=0"),
    ("algorithm.dual_clip=0.9", "algorithm.dual_clip", "no gradient", "algorithm.dual_clip=3.0"),
    ("algorithm=gspo algorithm.dual_clip=3", "algorithm.dual_clip", "second clip", "algorithm.dual_clip=0"),
    ("algorithm.correction=mis algorithm.correction_low=1.5", "algorithm.correction_low", "outside", "correction_low=0.5"),
    ("algorithm.correction=tis algorithm.correction_high=0.5", "algorithm.correction_high", "outside", "correction_high=2.0"),
    ("model=tiny_dense router_replay=r3", "router_replay", "dense", "router_replay=none"),
    ("router_replay.trainer=false", "router_replay.trainer", "both or neither", "router_replay=none"),
    ("model=qwen3_30b rollout.pause_mode=retract", "rollout.pause_mode", "loses its routes", "pause_mode=abort"),
    ("speculative=draft", "speculative.draft_model", "needs a draft model", "draft_model=<folder>"),
    ("speculative.ngram_min=9", "speculative.ngram_min", "longer than the longest", "ngram_min=4"),
    ("model=qwen3_30b speculative=mtp", "speculative.method", "no multi-token-prediction", "speculative=ngram"),
    (
        "speculative=eagle speculative.draft_model=x",
        "speculative.method",
        "in-process engine drafts by ngram, draft",
        "rollout=sglang",
    ),
    ("speculative.online_training=true", "speculative.online_training", "only MTP", "false"),
    ("task=gsm8k task.train_path=null model=qwen3_4b", "task.train_path", "from a file", "task.train_path=<file.jsonl>"),
    ("task=gsm8k task.prompt_template=hello model=qwen3_4b", "task.prompt_template", "{question}", "{question}"),
    ("evaluation.num_prompts=9999", "evaluation.num_prompts", "held out", "task.eval_problems=9999"),
    ("model.experts_top_k=9", "model.experts_top_k", "9 of 8 experts", "model.experts_top_k=8"),
    ("watch.rules.kl_jump.above=null", "watch.rules.kl_jump", "never fires", "jump_ratio"),
    ("mismatch.decompose_samples=0", "mismatch.decompose_samples", "0 samples", "decompose_interval_steps=0"),
]

# Keys that a value of BAD breaks in more than one way; every other mistake is told once, by one rule.
TWO_FACTS = {
    "precision.group_size",  # no group size at all, and none of the in-process engine's
    "precision.fp8_matmul",  # not this trainer's, and not these shapes
    "parallelism.tp",  # divides neither processes nor heads; cuts several kinds of weights
    "parallelism.ep",  # divides neither processes nor experts
    "parallelism.engine_ep",
    "parallelism.gpus_per_engine",
}


def problems_of(overrides: list[str]) -> list[UserError]:
    with pytest.raises(UserErrors) as caught:
        load(overrides)
    return caught.value.errors


@pytest.mark.parametrize(("overrides", "key", "problem", "fix"), BAD, ids=[case[0] for case in BAD])
def test_bad_config(overrides: str, key: str, problem: str, fix: str) -> None:
    found = problems(*overrides.split())
    about = [error for error in found if error.key == key]
    assert about, f"no problem is about {key}:\n" + "\n".join(map(str, found))
    told = Counter(error.key for error in found)
    assert {key for key, times in told.items() if times > 1} <= TWO_FACTS, "\n".join(map(str, found))
    match = [error for error in about if problem in error.problem and fix in (error.fix or "")]
    assert match, "\n".join(map(str, about))


def test_a_misspelt_choice_is_told_alone() -> None:
    for also in ("algorithm.dual_clip=3", "algorithm.samples_per_prompt=1"):
        assert [error.key for error in problems("algorithm.estimator=grop", also)] == ["algorithm.estimator"]


OVERRIDE = re.compile(r"^\+?[a-z_]+(\.\w+)*=\S*")


@pytest.mark.parametrize(
    "overrides",
    [
        "model=tiny_dense precision.roles=[routed_expert]",
        "task=gsm8k model=qwen3_4b task.prompt_template=hello",
        "rollout.server_args.x=[1,2] model=qwen3_30b",
        "gruop_size=a(b",
        "steps.x=1,2",
    ],
)
def test_fixes_can_be_typed_into_a_shell(overrides: str) -> None:
    """What a shell makes of the override in a fix is one word, and readable."""
    for error in problems(*overrides.split()):
        words = [word for word in shlex.split(error.fix or "") if OVERRIDE.match(word)]
        for word in words:
            shown = word.rstrip("?,")
            assert parse(readable([shown])[0]) is not None, error
            assert shell(shown) in (error.fix or ""), error


def test_everything_wrong_is_listed_at_once_with_its_source() -> None:
    found = problems_of(
        [
            "model=qwen3_30b",
            "precision=int5",
            "trainer.optimizer.lrr=1",
            "steps=x",
            "rollout.sampling.top_p=0.5",
            "parallelism.pp=7",
        ]
    )
    where = {error.key: error.where for error in found}
    assert {"precision", "trainer.optimizer.lrr", "steps", "rollout.sampling.top_p", "parallelism.tp"} <= set(where)
    assert where["steps"] == where["rollout.sampling.top_p"] == "the command line"
    assert where["parallelism.tp"].startswith("conf/parallelism/h200x8.yaml:")


def test_a_typo_in_a_yaml_file_names_file_and_line(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "recipes" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text(
        "# @package _global_\nrecipe: mine\ntrainer:\n  optimizer:\n    lrr: 1\nsteps: soon\nalgorithm:\n  clip_low: 0.1\n"
    )
    monkeypatch.setenv("RUNNER_CONFIG_DIR", str(tmp_path))
    found = {error.key: error for error in problems_of(["recipe=mine", "seed=x"])}
    assert found["trainer.optimizer.lrr"].where == f"{mine}:5"
    assert "trainer.optimizer.lr?" in (found["trainer.optimizer.lrr"].fix or "")
    assert found["steps"].where == f"{mine}:6"
    assert found["seed"].where == "the command line"
    mine.write_text("a: [1\nb: 2\n")
    with pytest.raises(UserErrors, match="mine"):
        load(["recipe=mine"])


def test_good_configs_have_no_problems() -> None:
    from runner.config import rules

    assert rules.check(load(["model=kimi_k2_thinking"], check_rules=False).config) == []
