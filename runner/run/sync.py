"""Weight sync: export -> seal -> load -> verify -> probe, with one retry before the run stops."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from runner.data import Batch, ExportedTensor, Sample, Status, WeightStream
from runner.errors import Failure
from runner.models.images import Images
from runner.rollout.protocol import RolloutPool, SyncReport
from runner.tracking.base import Tracker
from runner.trainer.protocol import Trainer

ATTEMPTS = 2  # a session, or its retry, sends every tensor of every quantized module


class WeightSync:
    """Brings the trainer's weights to the pool and says what it found.

    `probe` is a fixed list of token sequences [T], with the images of each, scored on both sides after every sync. A probe
    alone cannot see one flipped low bit (it moves an output by less than bf16 noise); the arrival hash and the residency
    check can.
    """

    def __init__(
        self,
        trainer: Trainer,
        pool: RolloutPool,
        probe: list[torch.Tensor],
        tracker: Tracker,
        images: list[Images] | None = None,
    ) -> None:
        self.trainer, self.pool, self.tracker = trainer, pool, tracker
        self.probe, self.images = probe, images or [()] * len(probe)
        self._batch = _probe_batch(probe, self.images) if probe else None

    def __call__(self) -> dict[str, float]:
        """Sync to `trainer.version`; returns `perf/*`, `sync/*` and `probe/*` metrics. Raises Failure naming the tensors.

        perf/update_weights_export_time is the part of perf/update_weights_time in which the trainer gathered and packed; the rest
        is hashing, carrying, loading, checking, and where both share GPUs, handing them over.
        """
        began, exporting = time.perf_counter(), 0.0
        ours = None if self._batch is None else torch.cat(self.trainer.logprobs(self._batch, routes="own"))
        asked = time.perf_counter()
        for attempt in range(ATTEMPTS):
            stream = _Timed(self.trainer.export("rollout"))
            report = self.pool.update_weights(self.trainer.version, stream)
            exporting += stream.seconds
            if not report.problems:
                loaded = time.perf_counter()
                metrics = _metrics(report) | self._probe_metrics(ours)
                metrics |= {"perf/update_weights_time": loaded - asked, "perf/update_weights_export_time": exporting}
                return metrics | {"perf/probe_time": asked - began + time.perf_counter() - loaded}
            self.tracker.event(
                "sync_failed",
                f"weight sync {report.version}, attempt {attempt + 1}: {report.problems[0]}",
                {"problems": report.problems[:20]},
            )
        listed = "\n".join(f"    - {problem}" for problem in report.problems[:10])
        raise Failure(
            f"the weights of version {report.version} did not arrive intact ({len(report.problems)} problems):\n{listed}",
            fix="check the memory and the network of the machine",
        )

    def _probe_metrics(self, ours: torch.Tensor | None) -> dict[str, float]:
        """`ours` is taken before the engines load: where both take turns on the GPUs, the trainer sleeps by now."""
        if ours is None:
            return {}
        theirs = torch.cat([row.to(ours.device) for row in self.pool.score(self.probe, self.images)])
        difference = (ours - theirs).abs()
        return {"probe/logprob_abs_diff": float(difference.mean()), "probe/logprob_abs_diff_max": float(difference.max())}


class _Timed(Iterator[ExportedTensor]):
    """A stream, and the `seconds` in which its tensors were waited for."""

    def __init__(self, stream: WeightStream) -> None:
        self._stream, self.seconds = iter(stream), 0.0

    def __next__(self) -> ExportedTensor:
        began = time.perf_counter()
        try:
            return next(self._stream)
        finally:
            self.seconds += time.perf_counter() - began


def _probe_batch(probe: list[torch.Tensor], images: list[Images]) -> Batch:
    """Teacher-forced sequences as samples whose response is everything after the first token."""
    samples = []
    for index, (tokens, shown) in enumerate(zip(probe, images, strict=True)):
        length = len(tokens) - 1
        samples.append(
            Sample(
                prompt_id="probe",
                sample_index=index,
                tokens=tokens,
                response_length=length,
                loss_mask=torch.ones(length, dtype=torch.bool),
                rollout_logprobs=torch.zeros(length),
                status=Status.completed,
                finish_reason="probe",
                images=shown,
            )
        )
    return Batch(samples=samples, advantages=[torch.zeros(s.response_length) for s in samples], temperature=1.0)


def _metrics(report: SyncReport) -> dict[str, float]:
    metrics = {
        "perf/update_weights_wire_bytes": float(report.wire_bytes),
        "sync/resident_checked": float(report.resident_checked),
    }
    if report.changed_integers is not None:
        metrics["sync/changed_integers"] = report.changed_integers
    if report.changed_scales is not None:
        metrics["sync/changed_scales"] = report.changed_scales
    return metrics
