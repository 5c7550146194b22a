"""tracking=none: nothing beside the run's own files."""

from __future__ import annotations

from pathlib import Path

from runner.config.option import Option
from runner.config.schema import Config, TrackingConfig
from runner.tracking.base import BaseTracker


class NoTracker(BaseTracker):
    def __init__(self, cfg: Config, run_dir: Path, *, first_step: int) -> None:
        return


OPTION = Option(TrackingConfig)
