"""tracking=mlflow: a store or a server of MLflow, through its own client. Composing imports no mlflow.

The store is a SQLite file unless `tracking.uri` names another: MLflow no longer writes folders of files. Metrics have their
names, but for characters that MLflow does not take: `eval/arithmetic_pass@4` is `eval/arithmetic_pass_at_4` there. A resumed run
keeps its id (mlflow_run_id in the run's folder); steps that were done twice after a kill are there twice, the later value last.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from runner.config.option import Need, Option
from runner.config.schema import Config, TrackingConfig
from runner.errors import Failure, UserError
from runner.redaction import redacted
from runner.storage import atomic_write
from runner.tracking.base import BaseTracker, State, said
from runner.tracking.folder import leaves, plain_config

ID_FILE = "mlflow_run_id"
PARAMETERS_PER_CALL = 100  # MLflow's own limits, this one and the next two
PARAMETER_CHARACTERS = 6000
TAG_CHARACTERS = 5000
STATES = {"completed": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


@dataclass
class MlflowTrackingConfig(TrackingConfig):
    uri: Optional[str] = MISSING


class MlflowTracker(BaseTracker):
    def __init__(self, cfg: Config, run_dir: Path, *, first_step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported; nobody asked it to send anything
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        assert isinstance(cfg.tracking, MlflowTrackingConfig)
        self.run_dir = run_dir
        self.uri = cfg.tracking.uri or f"sqlite:///{(Path(cfg.outputs_dir).expanduser() / 'mlflow.db').resolve()}"
        for name in ("mlflow.store.db.utils", "alembic"):  # say how they make tables, in the middle of the live table
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            self.client = MlflowClient(tracking_uri=self.uri)
            known = self._resumed(cfg)
            self.run_id = known or self._fresh(cfg)
        except MlflowException as error:
            problem = f"MLflow does not open {redacted(self.uri)}: {redacted(error.message)}"
            raise UserError(problem, key="tracking.uri", fix="tracking.uri=sqlite:////<folder>/mlflow.db") from error
        rows = [Param(name_of(key), str(value)[:PARAMETER_CHARACTERS]) for key, value in leaves(plain_config(cfg))]
        if known is None:  # parameters cannot be changed, and a resume may change some
            with self._told():
                for start in range(0, len(rows), PARAMETERS_PER_CALL):
                    self.client.log_batch(self.run_id, params=rows[start : start + PARAMETERS_PER_CALL])

    def _resumed(self, cfg: Config) -> str | None:
        """The id of the run that goes on; None where its file is not there, or names none of this store."""
        from mlflow.exceptions import MlflowException

        path = self.run_dir / ID_FILE
        known = path.read_bytes().decode(errors="replace").strip() if cfg.resume and path.is_file() else ""
        if not re.fullmatch("[0-9a-f]{32}", known):
            return None
        try:
            self.client.update_run(known, status="RUNNING")
        except MlflowException:
            return None
        return known

    def _fresh(self, cfg: Config) -> str:
        found = self.client.get_experiment_by_name(cfg.tracking.project)
        experiment = found.experiment_id if found else self.client.create_experiment(cfg.tracking.project)
        tags = dict.fromkeys(cfg.tracking.tags, "") | ({"group": cfg.tracking.group} if cfg.tracking.group else {})
        run_id: str = self.client.create_run(experiment, run_name=self.run_dir.name, tags=tags).info.run_id
        atomic_write(self.run_dir / ID_FILE, run_id + "\n")
        return run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name_of(name), value, now, step) for name, value in metrics.items()]
        with self._told():
            self.client.log_batch(self.run_id, metrics=rows)

    def event(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        with self._told():
            self.client.set_tag(self.run_id, name_of(f"event/{kind}"), message[:TAG_CHARACTERS])

    def finish(self, status: State, summary: dict[str, float], message: str = "") -> None:
        with self._told():
            self.client.set_tag(self.run_id, "status", said(status, message)[:TAG_CHARACTERS])
            self.client.set_terminated(self.run_id, STATES[status])
        print(f"mlflow: run {self.run_id} is in {redacted(self.uri)}")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the store or the server refuses ends the run, as a full disk does: metrics are never lost without a word."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            problem = f"MLflow takes no more of the run into {redacted(self.uri)}: {redacted(error.message)}"
            raise Failure(
                problem, key="tracking.uri", fix="resume=<the run> goes on; with tracking=none without MLflow"
            ) from error


def name_of(text: str) -> str:
    """`text` as MLflow takes it: letters, digits, and any of `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", text.replace("@", "_at_"))


NEEDED = (("mlflow-skinny", "mlflow"), ("sqlalchemy", "sqlalchemy"), ("alembic", "alembic"))
OPTION = Option(
    MlflowTrackingConfig,
    needs=tuple(
        Need(name, module, f"tracking=mlflow needs {name}", fix=f"pip install {name}, or tracking=none")
        for name, module in NEEDED
    ),
)
