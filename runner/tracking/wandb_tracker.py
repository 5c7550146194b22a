"""tracking=wandb: Weights & Biases, offline by default.

A resumed run keeps its id (wandb_id in the run's folder). Offline, every attempt writes a folder of its own under
<run>/wandb, and `wandb sync` merges those of one id; `runner/step` is the x axis of every chart, so the steps that
were done twice after a kill lie on top of each other.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from runner.config.choices import WandbMode
from runner.config.option import Need, Option
from runner.config.schema import Config, TrackingConfig
from runner.errors import UserError
from runner.findings import Finding, Status
from runner.storage import atomic_write
from runner.tracking.base import BaseTracker, State
from runner.tracking.folder import plain_config

STEP_METRIC = "runner/step"


@dataclass
class WandbTrackingConfig(TrackingConfig):
    wandb_mode: WandbMode = MISSING
    entity: Optional[str] = MISSING


class WandbTracker(BaseTracker):
    def __init__(self, cfg: Config, run_dir: Path, *, first_step: int) -> None:
        import wandb

        assert isinstance(cfg.tracking, WandbTrackingConfig)
        self.run_dir = run_dir
        self.offline = cfg.tracking.wandb_mode == WandbMode.offline
        settings = wandb.Settings(
            silent=True,  # we print the one line that matters at the end
            console="off",  # does not take over stdout, which the live table draws on
            save_code=False,
            disable_git=True,  # environment.json has the commit
            x_disable_meta=True,  # keeps host, user and command line out
            init_timeout=60,
        )
        try:
            self.run = wandb.init(
                mode=cfg.tracking.wandb_mode.value,
                project=cfg.tracking.project,
                entity=cfg.tracking.entity,
                group=cfg.tracking.group,
                tags=list(cfg.tracking.tags),
                name=run_dir.name,
                id=self._run_id(bool(cfg.resume)),
                resume="allow",
                dir=str(run_dir),
                config=plain_config(cfg),
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb did not start: {error}", key="tracking", fix="tracking.wandb_mode=offline") from error
        self.run.define_metric(STEP_METRIC, hidden=True)
        self.run.define_metric("*", step_metric=STEP_METRIC)

    def _run_id(self, resumed: bool) -> str:
        path = self.run_dir / "wandb_id"
        known = path.read_bytes().decode(errors="replace").strip() if resumed and path.is_file() else ""
        if re.fullmatch(r"[0-9A-Za-z_-]{1,64}", known):  # else it is damaged, and wandb begins a run of its own
            return known
        run_id = hashlib.blake2b(f"{self.run_dir.resolve()}/{time.time_ns()}".encode(), digest_size=6).hexdigest()
        atomic_write(path, run_id + "\n")
        return run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log({**metrics, STEP_METRIC: step})

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        self.run.summary[f"event/{kind}"] = message

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        self.run.summary.update({**summary, "status": status})
        self.run.finish(exit_code=0 if status in ("completed", "stopped") else 1)
        if self.offline:
            folder = self.run_dir / "wandb"
            print(f"wandb: upload this run with\n    wandb sync {shlex.quote(str(folder))}/offline-run-*")


def login(cfg: Config) -> Iterator[Finding]:
    assert isinstance(cfg.tracking, WandbTrackingConfig)
    mode = os.environ.get("WANDB_MODE", cfg.tracking.wandb_mode)
    logged_in = "WANDB_API_KEY" in os.environ or (Path.home() / ".netrc").is_file()
    if mode == WandbMode.online and not logged_in:
        yield Finding("wandb mode", Status.warn, "online, but no login was found", "wandb login, or tracking.wandb_mode=offline")
    else:
        yield Finding("wandb mode", Status.ok, mode)


OPTION = Option(
    WandbTrackingConfig,
    needs=(Need("wandb", "wandb", "tracking=wandb needs wandb", fix="pip install wandb, or tracking=none"),),
    checks=(login,),
)
