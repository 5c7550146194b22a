"""The policy step, once for every trainer: what precedes it, its optimizer steps, and a supervised step like them.

`PolicyTrainer` is what the loop calls, `PolicyUpdates` what runs where the weights are: on every rank of a trainer that has
ranks, in the same object where there are none. Subclasses bring the verbs: how micro-batches go through the model, and how
gradients become weights.

Shape legend: T tokens of a sample, R response tokens, N response tokens of a micro-batch laid end to end.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from runner.config.schema import Config
from runner.data import Batch, Sample
from runner.errors import UserError
from runner.models.family import Family
from runner.models.images import Images
from runner.routing import routes as route_checks
from runner.trainer import policy_step
from runner.trainer.microbatch import MicroBatch, TokenScores
from runner.trainer.mtp import NoMtp, Sequences, all_tokens, sequences_of
from runner.trainer.optimizer import learning_rate, planned_steps
from runner.trainer.protocol import Routes, StepResult, Weights
from runner.trainer.share import Lesson, Share, Step

Rows = dict[int, torch.Tensor]  # sample index -> [R]
Loss = Callable[[MicroBatch, TokenScores], torch.Tensor]  # the scalar loss of a micro-batch


@dataclass(frozen=True)
class Updated:
    """What one rank knows after updates; the same on every rank but for `old_logprobs`, which those that report hold for
    their samples, and `busy`: its begin and end in seconds since the epoch, by the clock of its machine."""

    metrics: dict[str, float]
    old_logprobs: Rows
    version: int
    busy: list[tuple[float, float]] = field(default_factory=list)


class PolicyTrainer(ABC):
    """The half of a trainer that sees whole batches. What is wrong with one is said here, before anything is computed."""

    cfg: Config
    family: Family
    version: int

    @abstractmethod
    def _updates(self, batch: Batch) -> Updated:
        """`PolicyUpdates.updates` of all ranks together, each with its share."""

    @abstractmethod
    def _logprobs(self, batch: Batch, weights: Weights, routes: Routes) -> list[torch.Tensor]: ...

    @abstractmethod
    def _reference_logprobs(self, batch: Batch) -> list[torch.Tensor]: ...

    def step(self, batch: Batch) -> StepResult:
        """See the protocol.

        With one update the old logprobs are those of the training forward itself: no extra pass (policy_step.py says why
        that is exact). Raises UserError after trainer.max_nan_steps skipped updates in a row.
        """
        self._check(batch, routed=True)
        algorithm, version = self.cfg.algorithm, self.version
        if algorithm.kl_coef and batch.ref_logprobs is None:
            batch = replace(batch, ref_logprobs=self.reference_logprobs(batch))
        if batch.old_logprobs is None and algorithm.updates_per_rollout > 1:
            batch = replace(batch, old_logprobs=self.logprobs(batch))
        done = self._updates(batch)
        old = batch.old_logprobs
        if old is None:
            old = [done.old_logprobs[index] for index in range(len(batch))]
        return StepResult(done.metrics, old, version, done.busy)

    def logprobs(self, batch: Batch, *, weights: Weights = "quantized", routes: Routes = "replayed") -> list[torch.Tensor]:
        """See the protocol. `replayed` means the recorded routes where router replay is on (`router_replay.trainer`) and
        the trainer's own where it is off or the model is dense; samples without routes are then an error only if it is on."""
        self._check(batch, routed=routes == "replayed")
        return self._logprobs(batch, weights, routes)

    def reference_logprobs(self, batch: Batch) -> list[torch.Tensor]:
        """See the protocol. The reference routes by itself: the recorded routes belong to another policy."""
        if not self.cfg.algorithm.kl_coef:
            raise UserError("there is no reference policy", key="algorithm.kl_coef", fix="algorithm.kl_coef=0.001")
        self._check(batch, routed=False)
        return self._reference_logprobs(batch)

    def _check(self, batch: Batch, *, routed: bool) -> None:
        if batch.temperature <= 0:
            raise UserError(
                f"logprobs at temperature {batch.temperature} are not defined",
                key="rollout.sampling.temperature",
                fix="rollout.sampling.temperature=1.0 (greedy decoding belongs to evaluation.sampling)",
            )
        if not routed or not replays(self.cfg, self.family):
            return
        model = self.cfg.model
        layers = len(self.family.moe_layers(model))
        try:
            route_checks.validate_all(batch.samples, layers, model.experts_top_k, model.num_experts)
        except route_checks.RouteError as error:
            raise UserError(
                str(error),
                key="router_replay",
                fix="both sides must record and replay: check router_replay.rollout and the engine, or set router_replay=none",
            ) from None


def replays(cfg: Config, family: Family) -> bool:
    """Whether the trainer's routers obey the recorded routes."""
    return bool(cfg.router_replay.trainer and family.moe_layers(cfg.model))


class PolicyUpdates(ABC):
    """Optimizer steps on one rank. Where there are several, every method is collective."""

    device: torch.device
    mtp: NoMtp

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.version = self.schedule_step = 0  # optimizer steps taken: in all, and since `reset_optimizer`
        self.nan = policy_step.NanGuard(cfg.trainer.max_nan_steps)

    # ---- the verbs

    @abstractmethod
    def _train(
        self,
        sequences: Sequences,
        share: Share,
        loss: Loss,
        *,
        images: Sequence[Images],
        temperature: float = 1.0,
        replayed: Sequence[Sample] | None = None,
    ) -> None:
        """Forward and backward of this rank's samples, MTP layers included. `replayed`: samples whose recorded routes are taken
        where replay is on; None: routers choose."""

    @abstractmethod
    def _means(self, sums: policy_step.Sums) -> dict[str, float]:
        """`Sums.means` over all ranks."""

    @abstractmethod
    def _routing_metrics(self) -> dict[str, float]:
        """Of the routes that were replayed since the last call."""

    @abstractmethod
    def _grad_norm(self) -> float: ...

    @abstractmethod
    def _non_finite(self) -> list[str]:
        """Names of parameters whose gradient holds NaN or infinity, on any rank."""

    @abstractmethod
    def _zero_grad(self) -> None: ...

    @abstractmethod
    def _apply(self, lr: float, norm: float) -> None:
        """Clipped gradients -> masters -> model weights; gradients are zero afterwards."""

    @abstractmethod
    def _reset_moments(self) -> None: ...

    @abstractmethod
    def _freeze_reference(self) -> None:
        """The reference policy is the policy as it is now, where there is a KL term."""

    def _everywhere(self, value: bool) -> bool:
        """Whether it is true on all ranks."""
        return value

    # ---- what they make

    def updates(self, steps: Sequence[Step]) -> Updated:
        """The optimizer steps that are made from one rollout."""
        began = time.time()
        sums = policy_step.Sums()
        norms: list[float] = []
        collected: Rows = {}
        lr, skipped_before = self._learning_rate(), self.nan.total
        for step in steps:
            collected |= self._accumulate(step, sums)
            lr = self._learning_rate()
            norms.append(self._update(sums, lr))
        metrics = self._means(sums) | {
            "train/grad_norm": sum(norms) / len(norms),
            "train/lr": lr,
            "train/nan_steps": float(self.nan.total - skipped_before),
            **self.mtp.take_metrics("train"),
            **self._routing_metrics(),
        }
        return Updated(metrics, collected, self.version, [(began, time.time())])

    def _accumulate(self, step: Step, sums: policy_step.Sums) -> Rows:
        """Gradients of one optimizer step; returns detached logprobs of this rank's samples by their places in the rollout."""
        batch, weights, places = step.batch, step.weights, step.share.indices
        collected: Rows = {}

        def loss(micro: MicroBatch, scores: TokenScores) -> torch.Tensor:
            if not micro.indices:
                return scores.logprobs.sum()  # padding only: no tokens, but a graph for every collective of the backward
            for index, row in zip(micro.indices, scores.logprobs.detach().split(micro.lengths), strict=True):
                collected[places[index]] = row
            rows = policy_step.TokenRows.of(batch, micro, weights)
            return policy_step.micro_batch_loss(self.cfg.algorithm, scores.logprobs, scores.entropy, rows, weights, sums)

        sequences, masks = sequences_of(batch)
        images = [sample.images for sample in batch.samples]
        self.mtp.begin(sequences, masks, step.predictions)
        self._train(sequences, step.share, loss, images=images, temperature=batch.temperature, replayed=batch.samples)
        return collected

    def supervised(self, lesson: Lesson, lr: float) -> Updated:
        """One step on the mean loss over response tokens, with the masters and moments of RL."""
        sums = policy_step.Sums()
        normalizer = float(lesson.response_tokens)

        def loss(micro: MicroBatch, scores: TokenScores) -> torch.Tensor:
            value = -scores.logprobs.sum() / normalizer
            sums.values["loss"] = sums.values.get("loss", torch.zeros((), device=self.device)) + value.detach()
            return value

        self.mtp.begin(lesson.sequences, all_tokens(lesson.sequences), lesson.predictions)
        self._train(lesson.sequences, lesson.share, loss, images=lesson.images)
        total = self._means(sums).get("train/loss", 0.0)  # a mean over 0 counted tokens: the plain sum
        norm = self._update(sums, lr)
        metrics = {"sft/loss": total, "sft/grad_norm": norm, "sft/lr": lr, **self.mtp.take_metrics("sft")}
        return Updated(metrics, {}, self.version)

    def _update(self, sums: policy_step.Sums, lr: float) -> float:
        """Optimizer step and new model weights, unless something is not finite; returns the gradient norm."""
        norm = self._grad_norm()
        loss = sums.values.get("loss")  # a rank may have none: an earlier pipeline stage
        loss_is_finite = self._everywhere(loss is None or bool(torch.isfinite(loss)))
        if not loss_is_finite or norm != norm or norm == float("inf"):
            names = self._non_finite()
            what = f"gradients of {', '.join(names[:3])} ({len(names)} parameters)" if names else "gradient norm"
            if loss is not None:
                sums.values["loss"] = torch.nan_to_num(loss, 0.0, 0.0, 0.0)  # one bad update must not blacken the next one
            self._zero_grad()
            self.mtp.skip()
            cause = what if loss_is_finite else f"loss, {what}"
            self.nan.skipped(f"{cause} not finite at optimizer step {self.version}")
            return norm
        self.nan.finite()
        self._apply(lr, norm)
        self.mtp.update(lr)
        self.version += 1
        self.schedule_step += 1
        return norm

    def _learning_rate(self) -> float:
        return learning_rate(self.cfg.trainer.optimizer, self.schedule_step, planned_steps(self.cfg))

    def reset_optimizer(self) -> None:
        """RL starts here: moments and schedule from zero, and the reference policy is the policy as it is now."""
        self._reset_moments()
        self.mtp.reset_optimizer()
        self.schedule_step = 0
        self._freeze_reference()

    def counters(self) -> dict[str, Any]:
        """What a checkpoint holds of this beside tensors."""
        return {
            "version": self.version,
            "schedule_step": self.schedule_step,
            "nan_in_a_row": self.nan.in_a_row,
            "nan_total": self.nan.total,
        }

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Inverse of `counters`."""
        self.version, self.schedule_step = counters["version"], counters["schedule_step"]
        self.nan.in_a_row, self.nan.total = counters["nan_in_a_row"], counters["nan_total"]
