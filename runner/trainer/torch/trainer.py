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

from runner.config.choices import BaseDtype, DeviceKind
from runner.config.schema import Config, QatPlacement
from runner.cores import default_threads
from runner.data import Batch, Sample, WeightStream
from runner.errors import UserError
from runner.models import family_of, stacks, visual
from runner.models.build import build_model, disk_tensors, named_weights
from runner.models.images import Images
from runner.precision import cpu_matmul
from runner.precision.formats import spec_of
from runner.precision.plan import PrecisionPlan
from runner.routing import routes as route_checks
from runner.routing.replay import CurrentRoutes, RouterReplay
from runner.trainer import adapters, attention, experts, microbatch, mtp, policy_step
from runner.trainer.lora import AdapterOptimizer
from runner.trainer.microbatch import MicroBatch, TokenScores
from runner.trainer.mtp import Sequences
from runner.trainer.optimizer import MasterOptimizer
from runner.trainer.parking import Parking
from runner.trainer.policy import Loss, PolicyTrainer, PolicyUpdates, Updated, replays
from runner.trainer.protocol import Routes, Saved, Saving, Weights
from runner.trainer.recompute import install_recompute
from runner.trainer.share import Share, lessons, steps
from runner.trainer.torch import checkpoint, peft
from runner.trainer.torch.fp8 import install_fp8_matmuls
from runner.trainer.torch.option import TorchTrainerConfig
from runner.trainer.torch.qat import (
    ForwardFakeQuantization,
    WeightLayout,
    WeightQuantizer,
    export_weights,
)
from runner.weights.bits import digest_of

Named = list[tuple[str, nn.Parameter]]
DTYPES = {BaseDtype.bfloat16: torch.bfloat16, BaseDtype.float32: torch.float32}


class TorchTrainer(PolicyUpdates, PolicyTrainer):
    """`runner.trainer.protocol.Trainer` on one device.

    The fp32 masters are the truth, or with trainer.lora the adapters that they are merged from (runner/trainer/lora.py). Model
    weights are derived from them: bf16(master), and under in-place QAT qdq(bf16(master)) for what the precision plan quantizes;
    `_write_weights` is the only place that writes them. A vision model's tower is trained along with its decoder, from the start:
    a tiny one starts at random.
    """

    def __init__(self, cfg: Config, run_dir: Path | None = None) -> None:
        super().__init__(cfg)
        self.config = cast(TorchTrainerConfig, cfg.trainer)
        self.device = _device(self.config.device)
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.threads or default_threads())
            cpu_matmul.install(cfg.precision.cpu_matmul)
        self.family = family_of(cfg.model)
        self.dtype = DTYPES[cfg.precision.base_dtype]
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
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if name not in drafting]
        self.optimizer = self._build_optimizer(named, train_plan)
        self.mtp = self._build_mtp()
        self._buffers = {name: t for name, t in named_weights(cfg.model, self.model) if name not in self.optimizer.params}
        self._install_quantization()
        self._replay = self._build_replay()
        self._reference: dict[str, torch.Tensor] | None = None
        self._base_digest: str | None = None
        self._write_weights()
        self._freeze_reference()
        self._parking = Parking(self.device, self._kept, self._dropped)

    # ---- set-up

    def _build_optimizer(self, named: Named, plan: PrecisionPlan) -> MasterOptimizer | AdapterOptimizer:
        config = self.config
        if not adapters.has_adapters(self.cfg):
            return MasterOptimizer(named, config.optimizer, master_weights=config.master_weights)
        pieces = self._train_layout.pieces
        targets = [name for name, _ in named if adapters.adapted(self.cfg, plan.parameters[pieces[name][0].name])]
        return AdapterOptimizer(named, targets, self._train_layout.quantized, config.optimizer, config.lora, self.cfg.seed)

    def _install_quantization(self) -> None:
        """In place needs masters; without them the same bits come from fake quantization in the forward."""
        precision = self.cfg.precision
        quantized = bool(self._train_layout.quantized)
        in_place = precision.qat_placement is QatPlacement.in_place and self.optimizer.has_masters
        self._in_place = quantized and in_place
        if quantized and spec_of(precision.train.format).quantizes_activations:  # first: fake quantization wraps what it finds
            install_fp8_matmuls(self.model, self._train_layout, self.quantizer, precision, self.device)
        self._fake = ForwardFakeQuantization(self.model, self.quantizer) if quantized and not in_place else None

    def _build_replay(self) -> RouterReplay | None:
        if not replays(self.cfg, self.family):
            return None
        model, family = self.cfg.model, self.family
        return RouterReplay(self.model, family.routers(model), model.router_score, normalizes=family.normalizes_top_k)

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
            list(self.model.get_submodule(mtp.layers_of(self.family).prefix.removesuffix(".")).children()),
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

    def _logprobs(self, batch: Batch, weights: Weights, routes: Routes) -> list[torch.Tensor]:
        with self._master_weights() if weights == "master" else nullcontext():
            return self._score(batch, batch.samples if routes == "replayed" else None)

    @torch.no_grad()
    def _score(self, batch: Batch, replayed: Sequence[Sample] | None) -> list[torch.Tensor]:
        result: list[torch.Tensor] = [torch.empty(0)] * len(batch)
        sequences = [(sample.tokens, sample.prompt_length) for sample in batch.samples]
        images = [sample.images for sample in batch.samples]
        for micro in self._micro_batches(sequences):
            with self._replaying(replayed, micro) as current:
                if current is not None:
                    current.first_pass = False  # statistics come from the training pass
                scores = self._scores(self._hidden(micro, images), micro, batch.temperature)
            for index, row in zip(micro.indices, scores.logprobs.split(micro.lengths), strict=True):
                result[index] = row
        return result

    def _micro_batches(self, sequences: Sequence[tuple[torch.Tensor, int]]) -> Iterator[MicroBatch]:
        lengths = [len(tokens) for tokens, _ in sequences]
        for indices in microbatch.split_by_tokens(lengths, self.config.max_tokens_per_gpu):
            yield microbatch.build(sequences, indices, self.device)

    def _hidden(self, micro: MicroBatch, images: Sequence[Images]) -> torch.Tensor:
        """Hidden states [B, W, H] behind the last norm; `images`: one per sequence that the micro-batch was cut from."""
        shown = [images[i] for i in micro.indices]
        if any(shown):
            return visual.hidden_states(self.model, micro.tokens, shown)
        hidden: torch.Tensor = self.model.base_model(input_ids=micro.tokens, use_cache=False).last_hidden_state
        return hidden

    def _scores(self, hidden: torch.Tensor, micro: MicroBatch, temperature: float) -> TokenScores:
        rows = hidden.flatten(0, 1).index_select(0, micro.positions)
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        chunk, entropy_grad = self.config.logprob_chunk_tokens, self.cfg.algorithm.entropy_coef != 0
        return microbatch.score_tokens(
            rows, head, micro.targets, temperature, chunk, entropy_grad, fused=self.config.fused_scores
        )

    @contextmanager
    def _replaying(self, samples: Sequence[Sample] | None, micro: MicroBatch) -> Iterator[CurrentRoutes | None]:
        if samples is None or self._replay is None:
            yield None
            return
        model, chosen = self.cfg.model, [samples[i] for i in micro.indices]
        layers, width = self._replay.num_layers, micro.tokens.shape[1]
        routes, recorded = route_checks.replay_layout(chosen, width, layers, model.experts_top_k, model.num_experts, self.device)
        with self._replay.replaying(routes, recorded) as current:
            yield current

    # ---- updates

    def _updates(self, batch: Batch) -> Updated:
        (mine,) = steps(self.cfg, batch)
        return self.updates(mine)

    def sft_step(
        self, samples: list[tuple[torch.Tensor, int]], lr: float, images: list[Images] | None = None
    ) -> dict[str, float]:
        """See the protocol. Uses the same masters and moments as RL: call `reset_optimizer` between the two."""
        (mine,) = lessons(self.cfg, samples, images)
        return self.supervised(mine, lr).metrics

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
        for micro in self._micro_batches(sequences):
            with self._replaying(replayed, micro) as current:
                hidden = self._hidden(micro, images)
                scores = self._scores(hidden, micro, temperature)
                if current is not None:
                    current.first_pass = False  # the backward may recompute
                loss(micro, scores).backward()
            self.mtp.learn(partial(_rows, hidden, sequences, micro), micro.indices)

    def _means(self, sums: policy_step.Sums) -> dict[str, float]:
        return sums.means()

    def _routing_metrics(self) -> dict[str, float]:
        return {} if self._replay is None else self._replay.take_statistics()

    def _grad_norm(self) -> float:
        return self.optimizer.grad_norm()

    def _non_finite(self) -> list[str]:
        return self.optimizer.non_finite()

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def _apply(self, lr: float, norm: float) -> None:
        self.optimizer.step(lr, norm)
        self._write_weights()

    def _reset_moments(self) -> None:
        self.optimizer.reset()

    # ---- reference policy

    def _freeze_reference(self) -> None:
        if self.cfg.algorithm.kl_coef:
            self._reference = self.optimizer.reference(self.dtype)

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> list[torch.Tensor]:
        assert self._reference is not None
        kept = {name: param.detach().clone() for name, param in self.optimizer.params.items()}
        with self._unfaked():
            for name, param in self.optimizer.params.items():
                param.copy_(self.optimizer.reference_weight(name, self._reference))
            try:
                return self._score(batch, replayed=None)
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

    def state(self) -> checkpoint.State:
        """All that a checkpoint holds: plain tensors, which may be the trainer's own, and counters."""
        optimizer = self.optimizer.state_tensors() | {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            optimizer["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {"masters": self._trained(), "optimizer": optimizer}
        if isinstance(self.optimizer, MasterOptimizer):
            tensors["model"] = self._as_published()
        if isinstance(self.mtp, mtp.MtpTraining):
            tensors["mtp"] = self.mtp.state_tensors()
        if self._reference is not None:
            tensors["reference"] = self._reference
        counters = {**self.counters(), "master_weights": self.optimizer.has_masters}
        if adapted := self._adapters_of():
            counters["lora"] = adapted
        return checkpoint.State(tensors, counters)

    def _as_published(self) -> dict[str, torch.Tensor]:
        """bf16(master) as folders of the family hold it."""
        weights = dict(disk_tensors(self.family, self.cfg.model, self.unquantized_weights().items()))
        parameters = {parameter.name: parameter for parameter in self.family.parameters(self.cfg.model)}
        published: dict[str, torch.Tensor] = {}
        for tensors in stacks.laid(({name: weight} for name, weight in weights.items()), parameters):
            published |= tensors
        return published

    def load_state(self, state: checkpoint.State) -> None:
        """Inverse of `state`; the model weights are derived from the masters. KeyError or RuntimeError where it does not fit."""
        optimizer = dict(state.tensors["optimizer"])
        rng, rng_cuda = optimizer.pop("rng"), optimizer.pop("rng_cuda", None)
        checkpoint.fill(self._trained(), state.tensors["masters"])
        self.optimizer.load_state_tensors(optimizer)
        if isinstance(self.mtp, mtp.MtpTraining):
            if "mtp" in state.tensors:
                self.mtp.load_state_tensors(state.tensors["mtp"])
            else:
                self.mtp.adopt_weights()
        if "reference" in state.tensors and self._reference is not None:
            checkpoint.fill(self._reference, state.tensors["reference"])
        self.load_counters(state.counters)
        torch.set_rng_state(rng)
        if rng_cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng_cuda, self.device)
        self._write_weights()

    def _trained(self) -> dict[str, torch.Tensor]:
        """Masters, and what lies beside them in the model; of adapters these alone, since everything else is frozen."""
        beside = self._buffers if isinstance(self.optimizer, MasterOptimizer) else {}
        return {**self.optimizer.trained(), **beside}

    def _adapters_of(self) -> dict[str, Any] | None:
        """What adapters in a checkpoint belong to; None without any."""
        if not isinstance(self.optimizer, AdapterOptimizer):
            return None
        lora = self.config.lora
        if self._base_digest is None:
            self._base_digest = digest_of([*self.optimizer.frozen(), *self._buffers.items()])
        roles = sorted(role.name for role in adapters.roles(self.cfg))
        return {"rank": lora.rank, "alpha": lora.alpha, "targets": roles, "base": self._base_digest}

    def save(self, folder: Path) -> None:
        checkpoint.save(self.state(), self.cfg.model, folder)

    def begin_save(self, folder: Path) -> Saving:
        self.save(folder)
        return Saved()

    def load(self, folder: Path) -> None:
        """See the protocol. Raises UserError naming the file that is missing or broken, or the weight that does not fit."""
        state = checkpoint.load(folder)
        if state.counters["master_weights"] != self.optimizer.has_masters:
            raise UserError(
                f"{folder} was saved with trainer.master_weights={str(state.counters['master_weights']).lower()}",
                key="trainer.master_weights",
                fix="resume with the same setting",
            )
        ours, theirs = self._adapters_of(), state.counters.get("lora")
        if ours != theirs:
            raise checkpoint.other_adapters(folder, ours, theirs)
        try:
            self.load_state(state)
        except (KeyError, RuntimeError) as error:
            problem = f"{folder} does not fit this model: {error}"
            raise UserError(problem, key="model", fix="resume with the same model") from error

    write_adapters = staticmethod(peft.write)

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


def _device(wanted: DeviceKind) -> torch.device:
    if wanted == DeviceKind.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == DeviceKind.cuda and not torch.cuda.is_available():
        raise UserError("there is no CUDA device", key="trainer.device", fix="trainer.device=auto")
    return torch.device(wanted.value)
