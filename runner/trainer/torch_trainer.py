"""The torch trainer: one transformers model on one device, bf16 weights with fp32 masters, QAT, router replay.

Shape legend: T tokens of a sample, R response tokens, N response tokens of a micro-batch laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from runner.cores import available_cores
from runner.errors import UserError
from runner.images import PromptImage
from runner.models import family_of, visual
from runner.models.build import build_model, named_weights
from runner.precision import cpu_matmul
from runner.precision.plan import PrecisionPlan
from runner.routing import routes as route_checks
from runner.routing.replay import CurrentRoutes, RouterReplay
from runner.samples import Batch, Sample, WeightStream
from runner.schema import Config, QatPlacement, Role, TorchTrainerConfig
from runner.trainer import attention, checkpoint, experts, microbatch, mtp, policy_step
from runner.trainer.fp8 import install_fp8_matmuls
from runner.trainer.microbatch import MicroBatch, TokenScores
from runner.trainer.optimizer import MasterOptimizer, learning_rate, planned_steps
from runner.trainer.parking import Parking
from runner.trainer.protocol import Routes, Saved, Saving, Weights
from runner.trainer.recompute import install_recompute
from runner.trainer.torch_qat import (
    ForwardFakeQuantization,
    WeightLayout,
    WeightQuantizer,
    export_weights,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TorchTrainer:
    """`runner.trainer.protocol.Trainer` on one device.

    The fp32 masters are the truth. Model weights are derived from them: bf16(master), and under in-place QAT
    qdq(bf16(master)) for what the precision plan quantizes; `_write_weights` is the only place that writes them. A vision
    model's tower is trained along with its decoder, from the start: a tiny one starts at random.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.config = cast(TorchTrainerConfig, cfg.trainer)
        self.version = 0
        self._schedule_step = 0
        self.device = _device(self.config.device)
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.threads or available_cores())
            cpu_matmul.install(cfg.precision.cpu_matmul)
        self.family = family_of(cfg.model)
        self.dtype = _dtype(cfg.precision.base_dtype)
        self.model = build_model(
            cfg.model,
            dtype=self.dtype,
            seed=cfg.seed,
            device=self.device,
            attention=attention.register(),
            experts=experts.register(),
        )
        self.model.train()  # gradient checkpointing asks for it; there is no dropout
        install_recompute(self.model, self.config.recompute)
        shapes = {name: tensor.shape for name, tensor in named_weights(cfg.model, self.model)}
        train_plan = PrecisionPlan.build(cfg.model, cfg.precision, "train")
        rollout_plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
        self._train_layout = WeightLayout(self.family, cfg.model, train_plan, shapes)
        self._rollout_layout = WeightLayout(self.family, cfg.model, rollout_plan, shapes)
        self.quantizer = WeightQuantizer(self._train_layout)
        drafting = mtp.mtp_names(self.family, cfg.model)
        self.optimizer = MasterOptimizer(
            ((name, parameter) for name, parameter in self.model.named_parameters() if name not in drafting),
            self.config.optimizer,
            master_weights=self.config.master_weights,
        )
        self.mtp = self._build_mtp()
        self._buffers = {name: t for name, t in named_weights(cfg.model, self.model) if name not in self.optimizer.params}
        self._install_quantization()
        self._replay = self._build_replay()
        self._nan = policy_step.NanGuard(self.config.max_nan_steps)
        self._reference: dict[str, torch.Tensor] | None = None
        self._write_weights()
        self._freeze_reference()
        self._parking = Parking(self.device, self._kept, self._dropped)

    # ---- set-up

    def _install_quantization(self) -> None:
        """In place needs masters; without them the same bits come from fake quantization in the forward."""
        precision = self.cfg.precision
        quantized = bool(self._train_layout.quantized)
        in_place = precision.qat_placement is QatPlacement.in_place and self.optimizer.has_masters
        self._in_place = quantized and in_place
        if quantized and precision.train.format == "fp8":  # first: fake quantization wraps what it finds
            install_fp8_matmuls(self.model, self._train_layout, self.quantizer, precision, self.device)
        self._fake = ForwardFakeQuantization(self.model, self.quantizer) if quantized and not in_place else None

    def _build_replay(self) -> RouterReplay | None:
        if not self.family.moe_layers(self.cfg.model):
            return None
        routers = [
            parameter.name.removesuffix(".weight")
            for parameter in self.family.parameters(self.cfg.model)
            if parameter.role is Role.router and parameter.name.endswith(".weight")
        ]
        return RouterReplay(self.model, routers, self.cfg.model.router_score)

    def _build_mtp(self) -> mtp.NoMtp | mtp.MtpTraining:
        if not mtp.trained_online(self.cfg):
            return mtp.NoMtp()
        base, head = cast(Any, self.model.base_model), cast(nn.Linear, self.model.get_output_embeddings())

        def score(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            weight = head.weight.detach()
            chunk = self.config.logprob_chunk_tokens
            return microbatch.score_tokens(rows, lambda x: F.linear(x, weight), targets, 1.0, chunk, False).logprobs

        return mtp.MtpTraining(
            self.cfg,
            base.mtp_layers,
            base.rotary_emb,
            embed=lambda tokens: F.embedding(tokens, base.embed_tokens.weight.detach()),
            score=score,
            master_weights=self.config.master_weights,
        )

    @torch.no_grad()
    def _write_weights(self, *, quantize: bool = True) -> None:
        """masters -> model weights, quantized from the masters where the plan says so."""
        if self.optimizer.has_masters:
            for name, param in self.optimizer.params.items():
                param.copy_(self.optimizer.masters[name])
        if self._in_place and quantize:
            params = cast(dict[str, torch.Tensor], self.optimizer.params)
            if self.dtype is not torch.bfloat16:  # the grid is that of bf16(master) in every base dtype
                for name in self._train_layout.quantized:
                    params[name].copy_(params[name].to(torch.bfloat16))
            self.quantizer.quantize_(params)

    @contextmanager
    def _master_weights(self) -> Iterator[None]:
        """The model computes with bf16(master); afterwards its quantized weights are derived from the masters again."""
        if not self._train_layout.quantized:
            yield
            return
        if self._fake is not None:
            self._fake.enabled = False
            try:
                yield
            finally:
                self._fake.enabled = True
            return
        self._write_weights(quantize=False)
        try:
            yield
        finally:
            self._write_weights()

    # ---- forward

    def logprobs(self, batch: Batch, *, weights: Weights = "quantized", routes: Routes = "replayed") -> list[torch.Tensor]:
        """See the protocol. `replayed` means the recorded routes where router replay is on (`router_replay.trainer`) and
        the trainer's own where it is off or the model is dense; samples without routes are then an error only if it is on."""
        with self._master_weights() if weights == "master" else nullcontext():
            return self._logprobs(batch, replay=routes == "replayed" and self._replays(batch.samples))

    def _replays(self, samples: Sequence[Sample]) -> bool:
        if self._replay is None or not self.cfg.router_replay.trainer:
            return False
        model = self.cfg.model
        try:
            route_checks.validate_all(samples, len(self.family.moe_layers(model)), model.experts_top_k, model.num_experts)
        except route_checks.RouteError as error:
            raise UserError(
                str(error),
                key="router_replay",
                fix="both sides must record and replay: check router_replay.rollout and the engine, or set router_replay=none",
            ) from None
        return True

    @torch.no_grad()
    def _logprobs(self, batch: Batch, *, replay: bool) -> list[torch.Tensor]:
        result: list[torch.Tensor] = [torch.empty(0)] * len(batch)
        sequences = [(sample.tokens, sample.prompt_length) for sample in batch.samples]
        images = [sample.image for sample in batch.samples]
        for micro in self._micro_batches(sequences):
            with self._replaying(batch.samples, micro, replay) as current:
                if current is not None:
                    current.first_pass = False  # statistics come from the training pass
                scores = self._forward(micro, batch.temperature, images)
            for index, row in zip(micro.indices, scores.logprobs.split(micro.lengths), strict=True):
                result[index] = row
        return result

    def _micro_batches(self, sequences: Sequence[tuple[torch.Tensor, int]]) -> Iterator[MicroBatch]:
        lengths = [len(tokens) for tokens, _ in sequences]
        for indices in microbatch.split_by_tokens(lengths, self.config.max_tokens_per_gpu):
            yield microbatch.build(sequences, indices, self.device)

    def _forward(self, micro: MicroBatch, temperature: float, images: Sequence[PromptImage | None]) -> TokenScores:
        return self._scores(self._hidden(micro, images), micro, temperature)

    def _hidden(self, micro: MicroBatch, images: Sequence[PromptImage | None]) -> torch.Tensor:
        """Hidden states [B, W, H] behind the last norm; `images`: one per sequence that the micro-batch was cut from."""
        shown = [images[i] for i in micro.indices]
        if any(image is not None for image in shown):
            return visual.hidden_states(self.model, micro.tokens, shown)
        hidden: torch.Tensor = self.model.base_model(input_ids=micro.tokens, use_cache=False).last_hidden_state
        return hidden

    def _scores(self, hidden: torch.Tensor, micro: MicroBatch, temperature: float) -> TokenScores:
        if temperature <= 0:
            raise UserError(
                f"logprobs at temperature {temperature} are not defined",
                key="rollout.sampling.temperature",
                fix="rollout.sampling.temperature=1.0 (greedy decoding belongs to evaluation.sampling)",
            )
        rows = hidden.flatten(0, 1).index_select(0, micro.positions)
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        chunk, entropy_grad = self.config.logprob_chunk_tokens, self.cfg.algorithm.entropy_coef != 0
        return microbatch.score_tokens(rows, head, micro.targets, temperature, chunk, entropy_grad)

    @contextmanager
    def _replaying(self, samples: Sequence[Sample], micro: MicroBatch, replay: bool) -> Iterator[CurrentRoutes | None]:
        if not replay:
            yield None
            return
        assert self._replay is not None
        model, chosen = self.cfg.model, [samples[i] for i in micro.indices]
        layers, width = self._replay.num_layers, micro.tokens.shape[1]
        routes, recorded = route_checks.replay_layout(chosen, width, layers, model.experts_top_k, model.num_experts, self.device)
        with self._replay.replaying(routes, recorded) as current:
            yield current

    # ---- updates

    def step(self, batch: Batch) -> dict[str, float]:
        """`algorithm.updates_per_rollout` optimizer steps; fills in batch.old_logprobs (and ref_logprobs) where they are None.

        With one update the old logprobs are those of the training forward itself: no extra pass (policy_step.py says why
        that is exact). Raises UserError after trainer.max_nan_steps skipped updates in a row.
        """
        algorithm = self.cfg.algorithm
        replay = self._replays(batch.samples)
        if batch.old_version is None:
            batch.old_version = self.version
        if algorithm.kl_coef and batch.ref_logprobs is None:
            batch.ref_logprobs = self.reference_logprobs(batch)
        if batch.old_logprobs is None and algorithm.updates_per_rollout > 1:
            batch.old_logprobs = self._logprobs(batch, replay=replay)
        sums = policy_step.Sums()
        norms, collected = [], dict[int, torch.Tensor]()
        lr, skipped_before = self._learning_rate(), self._nan.total
        for indices in policy_step.split_updates(len(batch), algorithm.updates_per_rollout):
            part = batch if len(indices) == len(batch) else batch.select(indices)
            rows = self._accumulate(part, replay, sums)
            collected |= {indices[i]: row for i, row in rows.items()}
            lr = self._learning_rate()
            norms.append(self._update(sums, lr))
        if batch.old_logprobs is None:
            batch.old_logprobs = [collected[i] for i in range(len(batch))]
        metrics = sums.means() | {
            "train/grad_norm": sum(norms) / len(norms),
            "train/lr": lr,
            "train/nan_steps": float(self._nan.total - skipped_before),
            **self.mtp.take_metrics("train"),
        }
        if replay:
            assert self._replay is not None
            metrics |= self._replay.take_statistics()
        return metrics

    def _accumulate(self, batch: Batch, replay: bool, sums: policy_step.Sums) -> dict[int, torch.Tensor]:
        """Forward and backward of every micro-batch; returns the detached logprobs of each sample."""
        samples = batch.samples
        weights = policy_step.loss_weights(self.cfg, batch)
        images = [sample.image for sample in samples]
        collected: dict[int, torch.Tensor] = {}
        sequences, masks = mtp.sequences_of(batch)
        self.mtp.begin(sequences, masks)
        for micro in self._micro_batches(sequences):
            with self._replaying(samples, micro, replay) as current:
                hidden = self._hidden(micro, images)
                scores = self._scores(hidden, micro, batch.temperature)
                if current is not None:
                    current.first_pass = False  # the backward may recompute
                rows = policy_step.TokenRows.of(batch, micro, weights)
                loss = policy_step.micro_batch_loss(self.cfg.algorithm, scores.logprobs, scores.entropy, rows, weights, sums)
                loss.backward()
            self.mtp.learn(partial(_rows, hidden, sequences, micro), micro.indices)
            for index, row in zip(micro.indices, scores.logprobs.detach().split(micro.lengths), strict=True):
                collected[index] = row
        return collected

    def _update(self, sums: policy_step.Sums, lr: float) -> float:
        """Optimizer step and new model weights, unless something is not finite; returns the gradient norm."""
        norm = self.optimizer.grad_norm()
        loss = sums.values["loss"]
        if not bool(torch.isfinite(loss)) or norm != norm or norm == float("inf"):
            names = self.optimizer.non_finite()
            what = f"gradients of {', '.join(names[:3])} ({len(names)} parameters)" if names else "gradient norm"
            cause = what if bool(torch.isfinite(loss)) else f"loss, {what}"
            sums.values["loss"] = torch.nan_to_num(loss, 0.0, 0.0, 0.0)  # one bad update must not blacken the next one
            self.optimizer.zero_grad()
            self.mtp.skip()
            self._nan.skipped(f"{cause} not finite at optimizer step {self.version}")
            return norm
        self._nan.finite()
        self.optimizer.step(lr, norm)
        self._write_weights()
        self.mtp.update(lr)
        self.version += 1
        self._schedule_step += 1
        return norm

    def _learning_rate(self) -> float:
        return learning_rate(self.config.optimizer, self._schedule_step, planned_steps(self.cfg))

    def sft_step(
        self, samples: list[tuple[torch.Tensor, int]], lr: float, images: list[PromptImage | None] | None = None
    ) -> dict[str, float]:
        """See the protocol. Uses the same masters and moments as RL: call `reset_optimizer` between the two."""
        sums = policy_step.Sums()
        normalizer = float(sum(len(tokens) - prompt for tokens, prompt in samples))
        self.mtp.begin(samples, mtp.all_tokens(samples))
        for micro in self._micro_batches(samples):
            hidden = self._hidden(micro, images or [None] * len(samples))
            logprobs = self._scores(hidden, micro, 1.0).logprobs
            loss = -logprobs.sum() / normalizer
            loss.backward()
            self.mtp.learn(partial(_rows, hidden, samples, micro), micro.indices)
            sums.values["loss"] = sums.values.get("loss", torch.zeros((), device=self.device)) + loss.detach()
        loss_value = float(sums.values["loss"])
        norm = self._update(sums, lr)
        return {"sft/loss": loss_value, "sft/grad_norm": norm, "sft/lr": lr, **self.mtp.take_metrics("sft")}

    def reset_optimizer(self) -> None:
        """RL starts here: moments and schedule from zero, and the reference policy is the policy as it is now."""
        self.optimizer.reset()
        self.mtp.reset_optimizer()
        self._schedule_step = 0
        self._freeze_reference()

    # ---- reference policy

    def _freeze_reference(self) -> None:
        if self.cfg.algorithm.kl_coef:
            # copies: with base_dtype=float32 the masters have the weights' dtype, and a view would follow the policy
            self._reference = {name: row.detach().to(self.dtype, copy=True) for name, row in self.optimizer.masters.items()}

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> list[torch.Tensor]:
        """See the protocol. The reference routes by itself: the recorded routes belong to another policy."""
        if self._reference is None:
            raise UserError("there is no reference policy", key="algorithm.kl_coef", fix="algorithm.kl_coef=0.001")
        kept = {name: param.detach().clone() for name, param in self.optimizer.params.items()}
        with self._unfaked():
            for name, param in self.optimizer.params.items():
                param.copy_(self._reference[name])
            try:
                return self._logprobs(batch, replay=False)
            finally:
                for name, param in self.optimizer.params.items():
                    param.copy_(kept[name])

    @contextmanager
    def _unfaked(self) -> Iterator[None]:
        if self._fake is not None:
            self._fake.enabled = False
        try:
            yield
        finally:
            if self._fake is not None:
                self._fake.enabled = True

    # ---- weights out, checkpoints

    def unquantized_weights(self) -> dict[str, torch.Tensor]:
        """In-memory name -> bf16(master), copies; buffers (a router's selection bias) in their own dtype."""
        weights = {name: self.optimizer.masters[name].to(torch.bfloat16, copy=True) for name in self.optimizer.params}
        drafting = mtp.mtp_names(self.family, self.cfg.model)
        for name, other in self._buffers.items():
            weights[name] = other.detach().to(torch.bfloat16 if name in drafting else other.dtype, copy=True)
        return weights

    def export(self, format: Literal["rollout", "bf16"] = "rollout") -> WeightStream:
        """See the protocol. Quantized tensors are encoded from bf16(master), with the stored scales where training has the
        same grid: the integers and scales are those whose products the model weights hold."""
        layout = self._rollout_layout
        if format == "bf16":
            layout = self._train_layout.unquantized()
        same = {name for name in layout.quantized if self._train_layout.formats[name] == layout.formats[name]}
        return export_weights(
            layout,
            self.unquantized_weights(),
            lambda name, rows: self.quantizer.scales.get((name, rows)) if name in same else None,
        )

    def save(self, folder: Path) -> None:
        checkpoint.save(self, folder)

    def begin_save(self, folder: Path) -> Saving:
        self.save(folder)
        return Saved()

    def load(self, folder: Path) -> None:
        checkpoint.load(self, folder)

    def sleep(self) -> None:
        self._parking.sleep()

    def wake(self) -> None:
        self._parking.wake()

    def _kept(self) -> Iterator[torch.Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self.optimizer.kept()
        yield from self.mtp.kept()
        yield from (self._reference or {}).values()

    def _dropped(self) -> Iterator[torch.Tensor]:
        yield self.optimizer.gradient
        yield from self.mtp.dropped()

    def close(self) -> None:
        """Nothing outlives the object."""


def _rows(hidden: torch.Tensor, sequences: Sequence[tuple[torch.Tensor, int]], micro: MicroBatch) -> list[torch.Tensor]:
    """Hidden states [B, W, H] -> [T, H] of every sample of the micro-batch."""
    return [hidden[row, : len(sequences[index][0])] for row, index in enumerate(micro.indices)]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device", key="trainer.device", fix="trainer.device=auto")
    return torch.device(name)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"base_dtype '{name}' is not known", key="precision.base_dtype", fix="use bfloat16 or float32")
    return DTYPES[name]
