"""What a `run` needs of this machine, found before anything starts: GPUs, packages, files. Imports no torch.

The config may be right and the machine wrong: `plan` and `--cfg job` then still work, and the message says what to type instead.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import psutil

from runner.cli.overrides import command
from runner.errors import UserError, UserErrors
from runner.models.config_file import CONFIG, architectures_of, check_model, read_json
from runner.rollout.sglang.arguments import takes_turns
from runner.rollout.sglang.interface import listen_address
from runner.schema import Config, JsonlTaskConfig, LocalRolloutConfig, Role, SglangRolloutConfig
from runner.weights import transfer_engine

PACKAGES = {  # option -> (module, what installs it, what needs it)
    "trainer=megatron": ("megatron.core", "make setup", "Megatron's trainer ranks need megatron-core"),
    "rollout=sglang": ("sglang", "make setup-sglang", "the servers need SGLang"),
}
REWRITTEN_DRAFTS = ("Qwen3MoeForCausalLM", "MiMoForCausalLM", "DeepseekV3ForCausalLM")  # of the families that runner knows


def check(cfg: Config) -> None:
    """Raises UserErrors with everything that this machine lacks for this run."""
    missing = [*_gpus(cfg), *_packages(cfg), *_files(cfg), *_checkpoint(cfg), *_engines(cfg), *_memory(cfg)]
    if missing:
        raise UserErrors(missing, advice=_instead(cfg))


def visible_gpus() -> int:
    """GPUs that this process may use: /dev/nvidia0, 1, ..., or fewer where CUDA_VISIBLE_DEVICES says so."""
    there = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(there)
    chosen = [item for item in visible.split(",") if item.strip() not in ("", "-1")]
    return min(len(there), len(chosen))


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _gpus(cfg: Config) -> list[UserError]:
    par, cluster = cfg.parallelism, cfg.cluster
    errors = []
    if cluster.launcher == "local":
        needed = max(par.gpus, par.rollout_gpus) if par.colocate else par.gpus + par.rollout_gpus
        if needed > visible_gpus():
            has = f"{visible_gpus()} GPUs" if visible_gpus() else "no GPU"
            errors.append(UserError(f"the run needs {needed} GPU{'s' * (needed > 1)}, this machine has {has}", key="parallelism"))
    for key, device in (
        ("trainer.device", getattr(cfg.trainer, "device", "auto")),
        ("rollout.device", getattr(cfg.rollout, "device", "auto")),
    ):
        if device == "cuda" and not visible_gpus():
            errors.append(UserError("this machine has no GPU", key=key, fix=f"{key}=cpu"))
    if cfg.precision.fp8_matmul == "scaled_mm" and not visible_gpus():  # which GPU it is, the trainer finds out
        key = "precision.fp8_matmul"
        errors.append(UserError("FP8 matmuls need a Hopper GPU, this machine has none", key=key, fix=f"{key}=simulated"))
    return errors


def _packages(cfg: Config) -> list[UserError]:
    """Parts of runner that `_target_` names, and the packages that they stand on."""
    errors = []
    for group, target in (("trainer", cfg.trainer._target_), ("rollout", cfg.rollout._target_), ("task", cfg.task._target_)):
        option, module = f"{group}={getattr(cfg, group).name}", target.rpartition(".")[0]
        if not installed(module):
            errors.append(UserError(f"this version of runner does not have it yet ({module})", key=option))
        elif option in PACKAGES and not installed(PACKAGES[option][0]):
            _, install, need = PACKAGES[option]
            errors.append(UserError(f"{need}, which is not installed", key=option, fix=install))
    if cfg.cluster.launcher != "local" and not installed(f"runner.cluster.{cfg.cluster.launcher}"):
        module = f"runner.cluster.{cfg.cluster.launcher}"
        errors.append(UserError(f"this version of runner does not have it yet ({module})", key=f"cluster={cfg.cluster.name}"))
    return errors


def _engines(cfg: Config) -> list[UserError]:
    """What the SGLang pool cannot do yet, though it can be planned.

    SGLang restores the weights of experts before a load; its linear layers keep the order of their kernel (Marlin), so that a
    live update of packed INT4 would be unpacked wrongly.
    """
    if not isinstance(cfg.rollout, SglangRolloutConfig):
        return []
    errors = []
    roles = cfg.precision.roles or [Role.routed_expert if cfg.model.num_experts else Role.dense_mlp]
    dense = [role.name for role in roles if role is not Role.routed_expert]
    if cfg.precision.rollout.format == "int4" and dense and cfg.parallelism.rollout_gpus:
        errors.append(
            UserError(
                f"SGLang 0.5.23 cannot update packed INT4 weights of {', '.join(dense)} while it runs",
                key="precision.roles",
                fix="precision=fp8 or bf16, rollout=local, or 'precision.roles=[routed_expert]' on a mixture of experts",
            )
        )
    if cfg.rollout.weight_transport == "p2p" and (missing := transfer_engine.obstacles(cfg.rollout.transfer_protocol)):
        errors.append(
            UserError(
                f"weights cannot be read peer to peer over {cfg.rollout.transfer_protocol} here: {'; '.join(missing)}",
                key="rollout.weight_transport",
                fix="rollout.weight_transport=distributed or disk_delta, or (slower than those) rollout.transfer_protocol=tcp",
            )
        )
    errors += _draft(cfg)
    if takes_turns(cfg) and not installed("torch_memory_saver"):
        errors.append(
            UserError(
                "engines that take turns with the trainer need torch-memory-saver to give memory back; it is not installed",
                key="parallelism.colocate",
                fix="pip install torch-memory-saver, or parallelism.colocate=false with GPUs of their own",
            )
        )
    if cfg.rollout.use_router and not installed("sglang_router"):
        errors.append(
            UserError(
                "sglang-router is not installed",
                key="rollout.use_router",
                fix="make setup-sglang, or rollout.use_router=false: the pool balances its engines itself",
            )
        )
    try:
        listen_address(cfg.cluster)
    except UserError as error:
        errors.append(error)
    if cfg.cluster.nodes > 1:
        errors.append(
            UserError(
                f"the SGLang pool starts its servers on one machine, the run has {cfg.cluster.nodes} nodes",
                key="cluster.nodes",
                fix="a parallelism of one node",
            )
        )
    return errors


def _draft(cfg: Config) -> list[UserError]:
    """What SGLang would load and then draft badly with, or not at all."""
    folder, method = cfg.speculative.draft_model, cfg.speculative.method
    if method not in ("draft", "eagle") or not folder:
        return []
    try:
        config = read_json(Path(folder).expanduser() / CONFIG)
        architectures_of(config, folder)
    except UserError:
        return []  # a hub id, or what `_files` and SGLang report
    return _whole_model(config) if method == "draft" else _eagle_head(cfg, config)


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


def _files(cfg: Config) -> list[UserError]:
    errors = []
    paths: dict[str, str | None] = {
        "model.hf_checkpoint": cfg.model.hf_checkpoint,
        "speculative.draft_model": cfg.speculative.draft_model,
        "watch.baseline_run": cfg.watch.baseline_run,
    }
    if isinstance(cfg.task, JsonlTaskConfig):
        paths |= {"task.train_path": cfg.task.train_path, "task.eval_path": cfg.task.eval_path}
    for key, path in paths.items():
        if path and _is_local(path) and not _exists(path):
            errors.append(UserError(f"{path} does not exist", key=key, fix=f"{key}=<an existing path>"))
    return errors


def _checkpoint(cfg: Config) -> list[UserError]:
    """What the config.json of a local checkpoint says about itself, before any library takes its numbers for true."""
    folder = Path(cfg.model.hf_checkpoint or "").expanduser()
    if not cfg.model.hf_checkpoint or not folder.is_dir():
        return []  # a hub id, or what `_files` reports
    try:
        check_model(cfg.model, read_json(folder / CONFIG), folder)
    except UserError as error:
        return [UserError(error.problem, key=error.key or "model.hf_checkpoint", fix=error.fix)]
    return []


def _memory(cfg: Config) -> list[UserError]:
    """What the in-process engine would allocate at its first request, on a CPU: its KV cache, and logits of every draft token."""
    rollout, model = cfg.rollout, cfg.model
    if not isinstance(rollout, LocalRolloutConfig) or rollout.device == "cuda" or visible_gpus():
        return []
    width = 2 if cfg.precision.base_dtype == "bfloat16" else 4
    tokens = cfg.task.max_prompt_tokens + max(
        cfg.rollout.sampling.max_response_tokens, cfg.evaluation.sampling.max_response_tokens
    )
    cache = model.num_layers * model.num_kv_heads * model.head_dim * 2 * width * tokens
    drafts = cfg.speculative.num_draft_tokens if cfg.speculative.method != "none" else 0
    there, wanted = psutil.virtual_memory().total, rollout.max_concurrency * (cache + (drafts + 1) * model.vocab_size * 4)
    if wanted <= there:
        return []
    fits = max(1, rollout.max_concurrency * there // (2 * wanted))
    problem = (
        f"{rollout.max_concurrency} sequences of {tokens} tokens, {drafts} of them drafts, take {wanted / 2**30:,.1f} GiB; "
        f"this machine has {there / 2**30:,.1f} GiB"
    )
    return [UserError(problem, key="rollout.max_concurrency", fix=f"rollout.max_concurrency={fits}")]


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # a name that is too long, a home that is not there
        return False


def _is_local(path: str) -> bool:
    """A path of this machine, as against a hub id `owner/name`."""
    return (
        path.startswith(("/", "./", "../", "~")) or path.count("/") != 1 or Path(path).suffix in (".json", ".jsonl", ".parquet")
    )


def _instead(cfg: Config) -> list[str]:
    """What works here."""
    choices = [f"{group}={getattr(cfg, group).name}" for group in ("precision", "model")]
    if cfg.recipe != "none":
        choices = [f"recipe={cfg.recipe}"]
    lines = [f"{command('plan', *choices)}    # what it needs and whether it fits; works here"]
    if cfg.scale != "laptop" and not cfg.model.name.startswith("tiny"):
        lines.append(f"{command(*choices, 'scale=laptop')}    # the same run at toy size, on this machine")
    elif cfg.trainer.name != "torch" or cfg.rollout.name != "local" or cfg.parallelism.gpus or cfg.cluster.launcher != "local":
        here = ("trainer=torch", "rollout=local", "parallelism=single", "cluster=local")
        lines.append(f"{command(*choices, *here)}    # on this machine")
    return lines
