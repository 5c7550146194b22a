"""Composition: every option and recipe is a valid config, recipes resolve to their golden files, laptop twins are toys.

Golden files: tests/goldens.py.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from runner.config import compose, preflight
from runner.config.schema import Convention, Correction, ModelConfig
from runner.config.searchpath import CONFIG_DIR, groups
from runner.errors import UserError, UserErrors
from runner.rollout.local.option import LocalRolloutConfig
from runner.rollout.sglang.config import SglangRolloutConfig
from runner.sweep import sweep_overrides
from runner.trainer.megatron.config import MegatronTrainerConfig
from tests import goldens
from tests.configs import MODELS

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = "qwen3_30b_int4"
OPTIONS = groups()
RECIPES = [name for name in OPTIONS["recipe"] if name != "none"]
BIG = [name for name in MODELS if not name.startswith("tiny")]
# What a model's own run refuses of a precision, the words of that rule, and what mends it.
EXTRA = {
    # the published engine of 4 GPUs would cut blocks of 128 of Moonlight's shared experts
    **{
        ("moonlight_16b", precision): (
            "shared_expert.*cuts a group of 128",
            ["parallelism.gpus_per_engine=2", "parallelism.engine_ep=2"],
        )
        for precision in ("fp8", "fp8_rollout")
    },
    # published models train with Megatron, which fuses what NVFP4 gives one scale
    **{
        (model, "nvfp4_qat"): ("NVFP4 has a scale over a whole weight", ["trainer=torch", "parallelism=h200x1"])
        for model in BIG
        if model not in ("qwen3_4b", "qwen3_vl_2b")
    },
}


def test_default_run_is_the_one_the_readme_promises() -> None:
    loaded = compose.load([])
    cfg = loaded.config
    assert loaded.raw.recipe == "none"
    assert (cfg.model.name, cfg.precision.name, cfg.trainer.name, cfg.rollout.name) == ("tiny_moe", "int4_qat", "torch", "local")
    assert (cfg.router_replay.name, cfg.speculative.name, cfg.task.name) == ("r3", "ngram", "arithmetic")
    assert cfg.model.num_layers >= 4 and cfg.model.num_experts == 8 and cfg.model.experts_top_k == 2
    assert cfg.precision.train.format == "int4" and cfg.precision.rollout.convention is Convention.exact
    assert cfg.precision.rollout.group_size == 32 and cfg.tracking.wandb_mode == "offline"
    assert isinstance(cfg.rollout, LocalRolloutConfig)


def test_a_model_alone_means_its_published_run() -> None:
    cfg = compose.load(["precision=int4_qat", "model=qwen3_30b"]).config
    par = cfg.parallelism
    assert isinstance(cfg.trainer, MegatronTrainerConfig) and isinstance(cfg.rollout, SglangRolloutConfig)
    assert (par.gpus, par.tp, par.pp, par.cp, par.ep, par.etp, par.gpus_per_engine) == (8, 4, 1, 1, 8, 1, 1)
    assert cfg.cluster.nodes * cfg.cluster.gpus_per_node == 8
    assert cfg.precision.train.group_size == cfg.precision.rollout.group_size == 128
    assert (cfg.algorithm.prompts_per_step, cfg.algorithm.samples_per_prompt) == (32, 8)
    assert cfg.algorithm.correction is Correction.tis and cfg.trainer.optimizer.cpu_offload
    assert cfg.trainer.max_tokens_per_gpu == 8192 and cfg.rollout.sampling.temperature == 0.8
    assert cfg.task.name == "dapo_math" and cfg.speculative.method == "none" and not cfg.warm_start.enabled


def test_command_line_beats_model_recipe_and_scale() -> None:
    cfg = compose.load(
        ["recipe=qwen3_30b_int4", "scale=laptop", "precision.group_size=64", "rollout.sampling.temperature=0.7"]
    ).config
    assert cfg.precision.rollout.group_size == 64 and cfg.rollout.sampling.temperature == 0.7
    assert compose.load(["model=qwen3_30b", "speculative=ngram"]).config.speculative.method == "ngram"


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_in_int4_and_fp8(model: str) -> None:
    _compose(model, "int4_qat", "fp8")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_with_every_precision(model: str) -> None:
    _compose(model, *OPTIONS["precision"])


def _compose(model: str, *precisions: str) -> None:
    for precision in precisions:
        cfg = compose.load([f"model={model}", f"precision={precision}", *EXTRA.get((model, precision), ("", []))[1]]).config
        assert (cfg.model.name, cfg.precision.name) == (model, precision)


@pytest.mark.parametrize("key", EXTRA)
def test_exceptions_of_the_matrix_are_real(key: tuple[str, str]) -> None:
    with pytest.raises(UserErrors, match=EXTRA[key][0]):
        compose.load([f"model={key[0]}", f"precision={key[1]}"])


@pytest.mark.parametrize(
    "override",
    [
        f"{group}={option}"
        for group in ("algorithm", "cluster", "tracking", "speculative", "task", "router_replay")
        for option in OPTIONS[group]
        if (group, option) not in (("speculative", "draft"), ("speculative", "eagle"), ("speculative", "mtp"))
        and not (group == "task" and option != "arithmetic")  # too long for a tiny model's context
    ],
)
def test_every_option_composes_with_the_defaults(override: str) -> None:
    group, _, option = override.partition("=")
    assert getattr(compose.load([override]).config, group).name == option


@pytest.mark.parametrize("task", ["gsm8k", "dapo_math"])
def test_word_problems_compose_with_a_model_that_can_read(task: str) -> None:
    assert compose.load(["model=qwen3_4b", f"task={task}"]).config.task.name == task


def test_options_of_engines_that_can_speculate() -> None:
    cfg = compose.load(["model=mimo_7b", "speculative=mtp"]).config
    assert cfg.speculative.online_training and cfg.model.num_mtp_layers == 1
    assert (
        compose.load(["model=qwen3_30b", "speculative=eagle", "speculative.draft_model=/models/e"]).config.speculative.name
        == "eagle"
    )


@pytest.mark.parametrize("option", OPTIONS["parallelism"])
def test_every_parallelism_composes_with_a_model_it_is_for(option: str) -> None:
    model = (
        "kimi_k2_thinking"
        if option == "h200x256"
        else "qwen3_235b"
        if option == "h200x64"
        else "mimo_7b"
        if option == "h200x8_tp2"
        else "qwen3_30b"
    )
    if option.startswith("cpu") or option == "single":
        model = "tiny_moe"
    overrides = [f"model={model}", f"parallelism={option}"]
    overrides += ["trainer=megatron"] if option.startswith("cpu") else []
    overrides += ["cluster=ray"] if option == "h200x16" else []
    assert compose.load(overrides).config.parallelism.name == option


@pytest.mark.parametrize("recipe", ["none", PUBLISHED, *(name for name in RECIPES if name != PUBLISHED)])
def test_recipes_resolve_to_their_golden_files(recipe: str) -> None:
    """`none`, the default run, stands there in full."""
    loaded = compose.load([f"recipe={recipe}"])
    assert loaded.config.recipe == recipe
    near_default = recipe == PUBLISHED or recipe.startswith("laptop")
    base = None if recipe == "none" else "none" if near_default else PUBLISHED
    goldens.check(GOLDEN / f"{recipe}.yaml", yaml.safe_load(compose.to_yaml(loaded.raw, resolve=True)), base)


def test_no_golden_file_is_left_over() -> None:
    assert sorted(file.stem for file in GOLDEN.glob("*.yaml")) == sorted([*RECIPES, "none"])


@pytest.mark.parametrize("model", BIG)
def test_laptop_puts_the_toy_twin_in_a_models_place(model: str) -> None:
    full = compose.load([f"model={model}"]).config
    cfg = compose.load([f"model={model}", "scale=laptop"]).config
    assert cfg.model.name == full.model.toy_twin and cfg.model.family == full.model.family
    assert cfg.model == compose.load([f"model={cfg.model.name}"]).config.model  # not a mixture of the two
    assert (cfg.cluster.gpus_per_node, cfg.parallelism.gpus, cfg.task.name) == (0, 0, full.task.toy_twin)
    assert cfg.router_replay == full.router_replay and cfg.precision.convention == full.precision.convention
    assert cfg.rollout.sampling.max_response_tokens < cfg.model.max_context_tokens and cfg.warm_start.enabled
    preflight.check(cfg)  # a laptop can run it


def test_the_twin_is_the_one_that_the_key_names() -> None:
    assert compose.load(["model=qwen3_30b", "model.toy_twin=tiny_mla", "scale=laptop"]).config.model.name == "tiny_mla"
    with pytest.raises(UserErrors, match="no_such_model"):
        compose.load(["model=qwen3_30b", "model.toy_twin=no_such_model", "scale=laptop"])


def test_laptop_means_toy_sizes_whatever_the_model_chose() -> None:
    cfg = compose.load(["model=tiny_vlm", "scale=laptop"]).config
    assert cfg.model.name == "tiny_vlm" and cfg.task.name == "visual_count"
    assert (cfg.trainer.optimizer.lr, cfg.algorithm.prompts_per_step) == (8.0e-4, 32)


def test_the_tasks_twin_takes_its_place_unless_the_command_line_names_a_task() -> None:
    assert compose.load(["recipe=qwen3_vl_2b_geo3k", "scale=laptop"]).config.task.name == "visual_zoom"
    assert compose.load(["model=qwen3_4b", "task=calculator", "scale=laptop"]).config.task.name == "calculator"
    assert compose.load(["model=qwen3_4b", "scale=laptop", "task.toy_twin=calculator"]).config.task.name == "calculator"


@pytest.mark.parametrize("model", MODELS)
def test_a_model_file_holds_an_architecture_and_names_its_run(model: str) -> None:
    text = yaml.safe_load((CONFIG_DIR / "model" / f"{model}.yaml").read_text())
    entries = [item for item in text.pop("defaults") if item not in ("/shared/model@_here_", "_self_")]
    assert [list(item) for item in entries] in ([], [["override /run@_global_.run"]])
    assert text.keys() <= {field.name for field in fields(ModelConfig)}


def test_options_of_the_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(
        (CONFIG_DIR / "model" / "qwen3_30b.yaml").read_text().replace("name: qwen3_30b", "name: mine")
    )
    (tmp_path / "recipes" / "ours.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: mine\n  - _self_\nrecipe: ours\nsteps: 7\n"
    )
    monkeypatch.setenv("RUNNER_CONFIG_DIR", str(tmp_path))
    assert {"mine", "qwen3_30b"} <= set(groups()["model"]) and {"ours", "qwen3_30b_int4"} <= set(groups()["recipe"])
    cfg = compose.load(["recipe=ours"]).config
    assert (cfg.model.name, cfg.steps, cfg.parallelism.name) == ("mine", 7, "h200x8")
    assert compose.load(["recipe=ours", "scale=laptop"]).config.model.name == "tiny_moe"


def test_a_folder_that_holds_no_configs_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UserError, match="neither conf/ nor recipes/"):
        compose.load([])


@pytest.mark.parametrize("recipe", ["qwen3_235b_int4", "kimi_k2_int4", "qwen3_30b_fp8", "qwen3_4b_fp8", "qwen3_vl_2b_geo3k"])
def test_recipes_at_laptop_scale_run_here(recipe: str) -> None:
    cfg = compose.load([f"recipe={recipe}", "scale=laptop"]).config
    assert cfg.recipe == recipe and cfg.scale == "laptop" and cfg.model.name.startswith("tiny")
    preflight.check(cfg)


def test_schedulers_say_that_submit_writes_a_job_for_them() -> None:
    for name in OPTIONS["cluster"]:
        cfg = compose.load([f"cluster={name}", "cluster.gpus_per_node=0"], check_rules=False).config
        refused = [str(error) for error in preflight._packages(cfg) if error.key == "cluster"]
        assert cfg.cluster.plan_only == (name in ("slurm", "k8s")) == bool(refused)


def test_targets_are_ours() -> None:
    for file in CONFIG_DIR.rglob("*.yaml"):
        target = (yaml.safe_load(file.read_text()) or {}).get("_target_")
        assert target is None or target.startswith("runner."), file


def test_every_default_is_mandatory_in_the_schema() -> None:
    """A config without its YAML would be full of missing values: no default hides in the code."""
    from runner.config.schema import Config

    missing = OmegaConf.missing_keys(OmegaConf.structured(Config))
    assert {"steps", "model.num_layers", "precision.group_size", "trainer.optimizer.lr", "watch.window_steps"} <= missing


def write_run(outputs: Path, name: str, overrides: list[str]) -> Path:
    run = outputs / name
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "overrides.yaml").write_text("".join(f"- '{item}'\n" for item in overrides))
    return run


def test_resume_recomposes_the_runs_own_overrides(tmp_path: Path) -> None:
    run = write_run(tmp_path, "first", ["seed=7", "steps=5", "precision=bf16"])
    loaded = compose.load([f"resume={run}", "steps=9"])
    assert (loaded.config.seed, loaded.config.steps, loaded.config.precision.name) == (7, 9, "bf16")
    assert loaded.config.resume == str(run)
    by_name = compose.load(["resume=first", f"outputs_dir={tmp_path}"])
    assert by_name.config.resume == str(run) and by_name.config.seed == 7
    assert by_name.config.steps == 5


def test_sweeps_come_from_the_flag_or_from_a_recipe() -> None:
    assert sweep_overrides(["seed=1"], multirun=False) is None
    assert sweep_overrides(["seed=1,2"], multirun=True) == ["seed=1,2"]
    swept = sweep_overrides(["recipe=laptop_group_size", "steps=3"], multirun=False)
    assert swept == ["recipe=laptop_group_size", "steps=3", "precision.group_size=32,64", "seed=1,2,3", "hydra.mode=RUN"]
    assert sweep_overrides(["recipe=laptop_group_size", "hydra.mode=RUN"], multirun=False) is None  # a job of it


def test_an_entry_of_a_typed_dictionary_is_added_key_by_key() -> None:
    part = ["+task.rewards.short.weight=0.5", "+task.rewards.short._target_=json.dumps"]
    rule = ["+watch.rules.mine={metric: a, above: 1}", "+watch.rules.mine.patience_steps=2"]
    cfg = compose.load([*part, *rule]).config
    assert cfg.task.rewards["short"].weight == 0.5 and cfg.task.rewards["short"]._target_ == "json.dumps"
    assert cfg.watch.rules["mine"].metric == "a" and cfg.watch.rules["mine"].patience_steps == 2
    with pytest.raises(UserErrors, match="weigth"):
        compose.load(["+task.rewards.short.weigth=0.5"])


@pytest.mark.parametrize(
    "overrides", [[], ["recipe=kimi_k2_int4"], ["recipe=qwen3_235b_int4", "scale=laptop"], ["task=calculator"]]
)
def test_the_replay_composes_what_hydra_does(overrides: list[str]) -> None:
    raw, composed_from = compose._with_twin(overrides)
    found = compose.diagnosed(composed_from)
    assert found.problems == [] and OmegaConf.to_container(found.raw, resolve=True) == OmegaConf.to_container(raw, resolve=True)
