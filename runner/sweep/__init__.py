"""`python -m runner sweep key=a,b,c` and `-m`: one fresh process per job, a summary, a comparison; restartable.

    outputs/<sweep>/<key=value,...>/   a run's folder per job, with logs/sweep.log
    outputs/<sweep>/summary.{md,csv}   comparison.html   sweep.json

Hydra's own multirun runs every job in one process, where CUDA, Ray and wandb leak from one to the next, and it cannot be
continued. The sweep's folder is named by a hash of its overrides and of every job's composed config, so the same command
finds the same folder: jobs that completed, or that a watch rule stopped, are skipped, those that were interrupted, killed or
failed go on from their last checkpoint, and those without a checkpoint start again.
"""

from __future__ import annotations

import sys


def sweep_overrides(overrides: list[str], *, multirun: bool) -> list[str] | None:
    """The overrides of a sweep, or None when this is a single run.

    A sweep is `-m`, the verb `sweep`, `hydra.mode=MULTIRUN`, or a recipe that sets `hydra.mode: MULTIRUN` and
    `hydra.sweeper.params`. Its jobs get `hydra.mode=RUN`, so that a recipe's job does not start the sweep again.
    """
    if not multirun and not any(item.startswith(("recipe=", "hydra.")) for item in overrides):
        return None
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from runner.config.compose import hydra_settings
    from runner.config.overrides import override_key, parse, readable

    overrides = readable(overrides)
    parsed = [parse(item) for item in overrides]
    fixed = [item for item, read in zip(overrides, parsed, strict=True) if read is not None and not read.is_sweep_override()]
    if None in parsed:
        return overrides if multirun else None  # every problem is reported when the config is composed
    try:
        settings = hydra_settings(fixed)
    except (HydraException, OmegaConfBaseException, ValueError):
        return overrides if multirun else None
    if not multirun and settings.mode != RunMode.MULTIRUN:
        return None
    given = {override_key(item) for item in overrides}
    params = [f"{key}={value}" for key, value in (settings.sweeper.get("params") or {}).items() if key not in given]
    kept = [item for item in overrides if override_key(item) != "hydra.mode"]
    return [*kept, *params, *(["hydra.mode=RUN"] if settings.mode == RunMode.MULTIRUN else [])]


def run(overrides: list[str]) -> int:
    """Expand, check every job, run. Raises UserError before anything starts when a job's config is wrong."""
    from runner.config.compose import load_config
    from runner.sweep import jobs
    from runner.sweep.supervise import Sweep

    folder, planned = jobs.plan(overrides, load_config)
    for note in jobs.merged(overrides):
        print(f"note: {note}", file=sys.stderr, flush=True)
    return Sweep(folder, planned).run()
