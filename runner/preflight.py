"""What a `run` needs of this machine, found before anything starts: GPUs, packages, files. Imports no torch.

The config may be right and the machine wrong: `plan` and `--cfg job` then still work, and the message says what to type instead.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from runner.errors import UserError, UserErrors
from runner.schema import Config, JsonlTaskConfig

PACKAGES = {  # option -> (module, name to install, what it is for)
    "trainer=megatron": ("megatron.core", "megatron-core", "the Megatron trainer"),
    "rollout=sglang": ("sglang", "sglang", "the SGLang servers"),
}


def check(cfg: Config) -> None:
    """Raises UserErrors with everything that this machine lacks for this run."""
    missing = [*_gpus(cfg), *_packages(cfg), *_parts(cfg), *_files(cfg)]
    if missing:
        missing[-1].fix = "\n".join(part for part in (missing[-1].fix, *_instead(cfg)) if part)
        raise UserErrors(missing)


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
    for key, device in (("trainer.device", getattr(cfg.trainer, "device", "auto")), ("rollout.device", getattr(cfg.rollout, "device", "auto"))):
        if device == "cuda" and not visible_gpus():
            errors.append(UserError("this machine has no GPU", key=key, fix=f"{key}=cpu"))
    return errors


def _packages(cfg: Config) -> list[UserError]:
    errors = []
    for option, (module, name, purpose) in PACKAGES.items():
        group, _, choice = option.partition("=")
        if getattr(cfg, group).name == choice and not installed(module):
            errors.append(UserError(f"{purpose} needs the package {name}, which is not installed", key=option))
    return errors


def _parts(cfg: Config) -> list[UserError]:
    """Classes that `_target_` names must be there: a part of runner that this version does not have is no traceback."""
    errors = []
    for group, target in (("trainer", cfg.trainer._target_), ("rollout", cfg.rollout._target_), ("task", cfg.task._target_)):
        module = target.rpartition(".")[0]
        if not target.startswith("runner."):
            errors.append(UserError(f"{target} is not a part of runner", key=f"{group}._target_", fix=f"{group}=<one of its options>"))
        elif not installed(module):
            errors.append(UserError(f"this version of runner has no {module}", key=f"{group}={getattr(cfg, group).name}"))
    if cfg.cluster.launcher not in ("local",):
        module = f"runner.cluster.{cfg.cluster.launcher}"
        if not installed(module):
            errors.append(UserError(f"this version of runner has no {module}", key=f"cluster={cfg.cluster.name}"))
    return errors


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
        if path and _is_local(path) and not Path(path).expanduser().exists():
            errors.append(UserError(f"{path} does not exist", key=key, fix=f"{key}=<an existing path>"))
    return errors


def _is_local(path: str) -> bool:
    """A path of this machine, as against a hub id `owner/name`."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") != 1 or Path(path).suffix in (".json", ".jsonl", ".parquet")


def _instead(cfg: Config) -> list[str]:
    """What works here."""
    choices = [f"{group}={getattr(cfg, group).name}" for group in ("precision", "model")]
    if cfg.recipe != "none":
        choices = [f"recipe={cfg.recipe}"]
    shown = " ".join(choices)
    lines = [f"python -m runner plan {shown}    # what it needs and whether it fits; works here"]
    toy = "" if cfg.scale == "laptop" or cfg.model.name.startswith("tiny") else " scale=laptop"
    engines = "" if cfg.trainer.name == "torch" and cfg.rollout.name == "local" else " trainer=torch rollout=local"
    gpu = " parallelism=single cluster=local" if not toy and cfg.parallelism.gpus else ""
    if toy or engines or gpu:
        lines.append(f"python -m runner {shown}{toy}{engines}{gpu}    # the same run at toy size, on this machine")
    return lines
