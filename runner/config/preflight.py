"""What a `run` needs of this machine, found before anything starts: GPUs, packages, files. Imports no torch.

The config may be right and the machine wrong: `plan` and `--cfg job` then still work, and the message says what to type instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from runner.config.choices import DeviceKind, LauncherKind, Scale
from runner.config.option import chosen, one_process
from runner.config.overrides import command
from runner.config.packages import LOCK_GPU, failures, from_lock, installed
from runner.config.schema import Config
from runner.config.searchpath import groups
from runner.errors import UserError, UserErrors
from runner.models.auto import is_path
from runner.models.config_file import CONFIG, check_model, read_json


def check(cfg: Config) -> None:
    """Raises UserErrors with everything that this machine lacks for this run."""
    lacking = [*_gpus(cfg), *_packages(cfg), *_files(cfg), *_checkpoint(cfg)]
    lacking += [
        problem for choice in chosen(cfg) for rule in (*choice.option.unbuilt, *choice.option.machine) for problem in rule(cfg)
    ]
    if lacking:
        raise UserErrors(lacking, advice=_instead(cfg))


def visible_gpus() -> int:
    """GPUs that this process may use: /dev/nvidia0, 1, ..., or fewer where CUDA_VISIBLE_DEVICES says so."""
    there = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(there)
    chosen = [item for item in visible.split(",") if item.strip() not in ("", "-1")]
    return min(len(there), len(chosen))


def _gpus(cfg: Config) -> list[UserError]:
    par, cluster = cfg.parallelism, cfg.cluster
    errors = []
    if cluster.launcher == LauncherKind.local:
        needed = max(par.gpus, par.rollout_gpus) if par.colocate else par.gpus + par.rollout_gpus
        if needed > visible_gpus():
            has = f"{visible_gpus()} GPUs" if visible_gpus() else "no GPU"
            errors.append(UserError(f"the run needs {needed} GPU{'s' * (needed > 1)}, this machine has {has}", key="parallelism"))
    return errors


def device(key: str, wanted: DeviceKind) -> Iterator[UserError]:
    """For the `machine` rules of options with a device of their own: cuda needs a GPU."""
    if wanted == DeviceKind.cuda and not visible_gpus():
        yield UserError("this machine has no GPU", key=key, fix=f"{key}=cpu")


def missing(paths: dict[str, str | None]) -> Iterator[UserError]:
    """Key -> path: those of this machine that do not exist. A hub id is read when the run starts."""
    for key, path in paths.items():
        if path and _is_local(path) and not _exists(path):
            yield UserError(f"{path} does not exist", key=key, fix=f"{key}=<an existing path>")


def _packages(cfg: Config) -> Iterator[UserError]:
    to_load = {}
    for choice in chosen(cfg):
        for need in choice.option.needs:
            if need.when(cfg) and not installed(need.module):
                yield UserError(need.problem, key=need.key or str(choice), fix=need.fix)
            elif need.when(cfg) and need.loads and visible_gpus() and max(cfg.parallelism.gpus, cfg.parallelism.rollout_gpus):
                to_load[need.loads] = (need, need.key or str(choice))
    for module, error in failures(to_load):  # there, and built for another torch, say
        need, key = to_load[module]
        problem = f"{module} does not load ({from_lock(need.distribution, LOCK_GPU)}; {from_lock('torch', LOCK_GPU)}): {error}"
        yield UserError(problem, key=key, fix="make setup-gpu")
    if cfg.cluster.plan_only:
        yield UserError(
            f"cluster={cfg.cluster.name} is a scheduler, which starts a job",
            key="cluster",
            fix=f"{command('submit', '...', f'cluster={cfg.cluster.name}')} writes the job, cluster=ray is what it runs on",
        )
    if cfg.cluster.launcher == LauncherKind.ray and not installed("ray"):
        yield UserError("ray is not installed", key="cluster=ray", fix="pip install ray")


def _files(cfg: Config) -> Iterator[UserError]:
    paths = {"model.hf_checkpoint": cfg.model.hf_checkpoint, "speculative.draft_model": cfg.speculative.draft_model}
    yield from missing(paths | {"watch.baseline_run": cfg.watch.baseline_run})


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


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # a name that is too long, a home that is not there
        return False


def _is_local(path: str) -> bool:
    """A path of this machine, as against a hub id `owner/name`."""
    return is_path(path) or Path(path).suffix in (".json", ".jsonl", ".parquet")


def _instead(cfg: Config) -> list[str]:
    """What works here."""
    of_checkpoint = cfg.model.name not in groups()["model"]  # model=auto
    model = ["model=auto", f"model.hf_checkpoint={cfg.model.hf_checkpoint}"] if of_checkpoint else [f"model={cfg.model.name}"]
    choices = [f"precision={cfg.precision.name}", *model]
    if cfg.recipe != "none":
        choices = [f"recipe={cfg.recipe}"]
    lines = [f"{command('plan', *choices)}    # what it needs and whether it fits; works here"]
    if cfg.scale != Scale.laptop and not of_checkpoint and not cfg.model.name.startswith("tiny"):
        lines.append(f"{command(*choices, 'scale=laptop')}    # the same run at toy size, on this machine")
    elif not one_process(cfg) or cfg.parallelism.gpus or cfg.cluster.launcher != LauncherKind.local:
        here = ("trainer=torch", "rollout=local", "parallelism=single", "cluster=local")
        lines.append(f"{command(*choices, *here)}    # on this machine")
    return lines
