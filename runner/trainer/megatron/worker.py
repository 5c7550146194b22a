"""One rank of the Megatron trainer: a plain class whose methods are collective calls. Who carries the calls is not its concern.

Shape legend: T tokens of a sample, R response tokens, N response tokens of a micro-batch laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from runner.cluster.placement import placement
from runner.config.choices import Recompute
from runner.config.schema import Config, QatPlacement
from runner.data import Batch, ExportedTensor, Sample
from runner.errors import UserError
from runner.models.images import Images
from runner.precision import cpu_matmul
from runner.precision.plan import PrecisionPlan
from runner.trainer import policy_step
from runner.trainer.megatron import arguments, checkpoint, export, model, mtp, qat, sharded
from runner.trainer.megatron.fp8 import simulate_fp8
from runner.trainer.megatron.masters import Masters
from runner.trainer.megatron.packing import Packed, pack
from runner.trainer.megatron.publish import Publisher
from runner.trainer.megatron.replay import Replay
from runner.trainer.megatron.scores import response_scores
from runner.trainer.megatron.shares import Geometry
from runner.trainer.megatron.sources import open_weights
from runner.trainer.microbatch import TokenScores
from runner.trainer.mtp import MtpTraining, Sequences
from runner.trainer.parking import Parking, tensors_of_optimizer
from runner.trainer.policy import Loss, PolicyUpdates, Rows, Updated, replays
from runner.trainer.protocol import Routes, Weights
from runner.trainer.share import Share, Step
from runner.weights.published import Published
from runner.weights.transports import kept_by_ranks
from runner.weights.transports.ranks import Order, send_parts


class Worker(PolicyUpdates):
    """Model, optimizer and quantization of one rank. torch.distributed must be initialized (`initialize`)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.config = arguments.trainer_config(cfg)
        self.family = arguments.check(cfg)
        self.device = torch.device("cuda", torch.cuda.current_device()) if arguments.Device.of(cfg).cuda else torch.device("cpu")
        read, hf_config = open_weights(cfg, self.family)
        self.transformer = model.transformer_config(cfg, hf_config)
        self.model = model.build_gpt(cfg, self.transformer, hf_config)
        self.places = model.places(cfg, self.family, self.model)
        model.load_weights(cfg, self.model, self.places, read)
        self.mtp = mtp.build(cfg, self.model, read, self.device)
        self.passengers = mtp.weights(self.mtp) or {
            name: read(name).to(torch.bfloat16) for name in export.passengers(cfg, self.family)
        }
        self.ddp = model.wrap(cfg, self.transformer, self.model)
        self.ddp.train()  # recomputation asks for it; there is no dropout
        self.optimizer = model.build_optimizer(cfg, self.ddp)
        self.masters = Masters(self.optimizer)
        self.quantization = self._build_quantization()
        self.replay = self._build_replay()
        self.transformer.finalize_model_grads_func = _finalize
        self.reference: list[torch.Tensor] | None = None
        self.quantization.resync()
        self._freeze_reference()
        self.parking = Parking(self.device, self._kept, self._dropped)
        self.geometry = Geometry.of(cfg)
        self.publisher: Publisher | None = None

    # ---- set-up

    def _build_quantization(self) -> qat.NoQuantization | qat.InPlaceQuantization:
        precision = self.cfg.precision
        plan = PrecisionPlan.build(self.cfg.model, precision, "train")
        fp8 = precision.train.format == "fp8"
        if not plan.quantized or (fp8 and self.device.type == "cuda"):  # there Transformer Engine quantizes in its matmuls
            return qat.NoQuantization(self.ddp, self.masters)
        quantized = qat.quantized_parameters(self.places, plan, self.cfg.model)
        if fp8:  # first: fake quantization wraps what it finds
            simulate_fp8(self.model, quantized, backward=precision.fp8_backward)
        if self.masters.has_masters and precision.qat_placement is QatPlacement.in_place:
            return qat.InPlaceQuantization(self.ddp, self.masters, quantized)
        return qat.ForwardFakeQuantization(self.ddp, self.masters, self.model, quantized)

    def _build_replay(self) -> Replay | None:
        if not replays(self.cfg, self.family):
            return None
        layers = self.family.moe_layers(self.cfg.model)
        return Replay(self.model, self.cfg.model, layers, recomputes=self.config.recompute != Recompute.none)

    @property
    def reporter(self) -> bool:
        """Whether this rank's logprobs are the ones to report: one per data-parallel rank."""
        first = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0
        return first and parallel_state.is_pipeline_last_stage()

    # ---- forward

    def logprobs(self, batch: Batch, share: Share, weights: Weights, routes: Routes) -> Rows:
        """Logprobs [R] of this data-parallel rank's samples, which `batch` holds, on reporters, {} on others. Collective."""
        replayed = batch.samples if routes == "replayed" else None
        self.quantization.settle()
        with self.quantization.unquantized() if weights == "master" else nullcontext():
            return self._score(batch, share, replayed)

    @torch.no_grad()
    def _score(self, batch: Batch, share: Share, replayed: Sequence[Sample] | None) -> Rows:
        sequences = [(sample.tokens, sample.prompt_length) for sample in batch.samples]
        found: Rows = {}

        def collect(packed: Packed, scores: TokenScores) -> None:
            for index, row in zip(packed.micro.indices, scores.logprobs.split(packed.micro.lengths), strict=True):
                found[share.indices[index]] = row.cpu()

        try:
            self._run(sequences, share, replayed, batch.temperature, collect=collect)
        finally:
            if self.replay is not None:
                self.replay.clear()  # the targets of a no-grad pass would be a later recomputation's routes
        return found if self.reporter else {}

    def _run(
        self,
        sequences: Sequences,
        share: Share,
        samples: Sequence[Sample] | None,
        temperature: float,
        *,
        collect: Callable[[Packed, TokenScores], None] | None = None,
        loss: Loss | None = None,
    ) -> None:
        """All micro-batches through Megatron's schedule. `samples` gives the routes to replay; None: routers choose.

        `loss` makes it a training pass; otherwise `collect(packed, scores)` sees the scores of each micro-batch.
        """
        assert share.micro_batches is not None
        micros = [pack(sequences, places, self.geometry, self.device) for places in share.micro_batches]
        training = loss is not None
        replay = None if samples is None else self.replay

        def scored(packed: Packed, hidden: torch.Tensor, non_loss_data: bool = False) -> Any:
            if training:
                self._learn_mtp(hidden, packed, sequences)
            scores = self._scores(hidden, packed, temperature)
            if loss is None:
                assert collect is not None and non_loss_data
                collect(packed, scores)
                return 0
            return loss(packed.micro, scores), torch.zeros((), dtype=torch.int, device=self.device), {}

        def forward(iterator: Iterator[Packed], ddp: Any) -> tuple[torch.Tensor, Any]:
            packed = next(iterator)
            if samples is not None and replay is not None:
                replay.begin(samples, packed, counting=training)
            tokens = packed.micro.tokens[:, packed.rows]
            places = torch.arange(tokens.shape[1], device=self.device).unsqueeze(0)
            keep = {"fp32_output": False} if self.transformer.bf16 else {}  # the output layer is a bf16 matmul
            hidden = ddp(tokens, places, None, packed_seq_params=packed.sequences, **keep)
            if replay is not None:
                replay.forward_done()
            return hidden, partial(scored, packed)

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micros),
            model=[self.ddp],
            num_microbatches=len(micros),
            seq_length=max(packed.micro.tokens.shape[1] for packed in micros),
            micro_batch_size=1,
            forward_only=not training,
            collect_non_loss_data=not training,
        )

    def _learn_mtp(self, hidden: torch.Tensor, packed: Packed, sequences: Sequences) -> None:
        lengths = [len(sequences[index][0]) for index in packed.micro.indices]
        parallel = self.transformer.sequence_parallel
        self.mtp.learn(partial(mtp.sample_states, hidden, packed, lengths, sequence_parallel=parallel), packed.micro.indices)

    def _scores(self, hidden: torch.Tensor, packed: Packed, temperature: float) -> TokenScores:
        if self.ddp.ddp_config.overlap_param_gather and not self.cfg.model.tied_embeddings:
            # the output layer is used as a matrix, so no forward hook completes its gather
            self.ddp.param_to_bucket_group[self.model.output_layer.weight].finish_param_sync()
        return response_scores(
            self.model,
            hidden,
            packed,
            vocab_size=self.cfg.model.vocab_size,
            temperature=temperature,
            chunk=self.config.logprob_chunk_tokens,
            entropy_grad=self.cfg.algorithm.entropy_coef != 0,
        )

    # ---- updates

    def updates(self, steps: Sequence[Step]) -> Updated:
        done = super().updates(steps)
        return done if self.reporter else replace(done, old_logprobs={})

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
        """`images` are all None: rules refuse vision models."""
        self._run(sequences, share, replayed, temperature, loss=loss)
        if replayed is not None and self.replay is not None:
            self.replay.end_of_step()

    def _means(self, sums: policy_step.Sums) -> dict[str, float]:
        """Token means over every data-parallel rank's samples, on all ranks. Only last pipeline stages have sums."""
        gathered: list[Any] = [None] * dist.get_world_size()
        mine = {name: float(value) for name, value in sums.values.items()} if self.reporter else {}
        dist.all_gather_object(gathered, (mine, float(sums.tokens) if self.reporter else 0.0))
        total: dict[str, float] = {}
        for values, _ in gathered:
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + value
        count = max(sum(tokens for _, tokens in gathered), 1.0)
        return {f"train/{name}": value / count for name, value in total.items()}

    def _routing_metrics(self) -> dict[str, float]:
        return {} if self.replay is None else self.replay.take_statistics()

    def _grad_norm(self) -> float:
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def _apply(self, lr: float, norm: float) -> None:
        clip = self.config.optimizer.clip_grad_norm
        for optimizer in self.masters.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if clip > 0:
                precise = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), clip, norm, use_decoupled_grad=precise)
        self.quantization.step(self.optimizer.step_with_ready_grads)
        self._zero_grad()

    def _everywhere(self, value: bool) -> bool:
        flag = torch.tensor([int(value)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def _non_finite(self) -> list[str]:
        grads = {place.name: getattr(place.tensor, "main_grad", None) for place in self.places}
        names = [name for name, grad in grads.items() if grad is not None and not bool(torch.isfinite(grad).all())]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, names)
        return sorted({name for part in gathered for name in part})

    def _zero_grad(self) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _reset_moments(self) -> None:
        self.masters.reset_moments()

    def set_version(self, version: int) -> None:
        self.version = version

    # ---- reference policy

    def _freeze_reference(self) -> None:
        """bf16(master) of every local parameter, in host memory unless trainer.resident_reference."""
        if not self.cfg.algorithm.kl_coef:
            return
        device = self.device if self.config.resident_reference else torch.device("cpu")
        with self.quantization.unquantized():
            self.reference = [p.tensor.detach().to(device, copy=True) for p in self._swappable()]

    def _swappable(self) -> Iterator[model.Place]:
        return (place for place in self.places if place.parameter)

    def reference_logprobs(self, batch: Batch, share: Share) -> Rows:
        """Logprobs under the reference, whose routers choose by themselves. Collective."""
        assert self.reference is not None
        with self._reference_weights():
            return self._score(batch, share, replayed=None)

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Reference weights in the model, one parameter at a time: no second copy on the GPU. Afterwards weights are derived
        from the masters again, or, without masters, put back from host memory."""
        assert self.reference is not None
        with self.quantization.unquantized(), torch.no_grad():
            kept = []
            for place, reference in zip(self._swappable(), self.reference, strict=True):
                kept.append(None if self.masters.has_masters else place.tensor.detach().to("cpu", copy=True))
                place.tensor.data.copy_(reference)
            self._share_tied_embedding()
            try:
                yield
            finally:
                for place, before in zip(self._swappable(), kept, strict=True):
                    if before is not None:
                        place.tensor.data.copy_(before)
                if self.masters.has_masters:
                    self.masters.write()
                    if self.ddp.ddp_config.use_distributed_optimizer:
                        qat.gather_now(self.ddp, again=True)
                else:
                    self._share_tied_embedding()

    def _share_tied_embedding(self) -> None:
        """The last stage's copy of a tied embedding follows the first stage's."""
        if self.cfg.model.tied_embeddings and self.cfg.parallelism.pp > 1 and parallel_state.is_rank_in_embedding_group():
            weight = self.model.shared_embedding_or_output_weight()
            group = parallel_state.get_embedding_group()
            dist.broadcast(weight.data, src=dist.get_process_group_ranks(group)[0], group=group)

    # ---- weights out, checkpoints

    def export(self, format: Literal["rollout", "bf16"]) -> Iterator[ExportedTensor]:
        """This rank's part of the export stream; every HF weight comes from exactly one rank. Collective: exhaust it."""
        self.quantization.settle()
        with self.quantization.unquantized():
            yield from export.local_weights(self.cfg, self.places, self.passengers, format)

    def publish(self) -> Published:
        """Write the export in rollout format, this rank's part by this rank: on every node, or on its own where ranks send it.
        Collective."""
        if self.publisher is None:
            self.publisher = Publisher(placement(self.cfg), self.device, everywhere=not kept_by_ranks(self.cfg))
        return self.publisher.publish(self.export("rollout"))

    def send_published(self, order: Order | None) -> str:
        """Send engines what the order names of this rank's published parts; "" or what went wrong. Ranks without an order do not
        wait for the others."""
        assert self.publisher is not None
        return "" if order is None else send_parts(order, self.publisher.root, self.device)

    def compare_published(self, owner: int, digests: dict[str, str], files: list[str]) -> list[str]:
        """Parts of a rank's whose copy on this node differs."""
        return [] if self.publisher is None else self.publisher.compare(owner, digests, files)

    def state(self) -> checkpoint.State:
        """All that a checkpoint holds. Weights are bf16(master) now. Collective."""
        par = self.cfg.parallelism
        counters = {
            **self.counters(),
            "adam_step": sharded.adam_step(self.masters, self.device),
            "master_weights": self.masters.has_masters,
            "reference": self.reference is not None,
            "mtp": isinstance(self.mtp, MtpTraining),
            "layout": {name: getattr(par, name) for name in ("ranks", "tp", "pp", "cp", "ep", "etp")},
        }
        return checkpoint.State(self._tensors(counters, filled=True), counters)

    def _tensors(self, counters: dict[str, Any], *, filled: bool) -> dict[str, sharded.Sharded]:
        """What a checkpoint with these counters holds and this rank takes. Collective where `filled`."""
        stepped = bool(counters["adam_step"])
        tensors = {
            "model": sharded.model_weights(self.model),
            "passengers": sharded.replicated("passenger", self.passengers),
            "optimizer": sharded.optimizer(self.model, self.ddp, self.masters, stepped=stepped, filled=filled),
        }
        if self.reference is not None and counters["reference"]:
            tensors["reference"] = sharded.reference(self.model, zip(self._swappable(), self.reference, strict=True))
        if isinstance(self.mtp, MtpTraining) and counters["mtp"]:
            if not filled:
                self.mtp.prepare_to_load(stepped)
            tensors["mtp"] = sharded.replicated("mtp", self.mtp.state_tensors())
        return tensors

    @torch.no_grad()
    def load_state(self, state: checkpoint.State) -> None:
        """Inverse of `state`, with tensors in place of their places; the model weights are derived from the masters."""
        tensors = state.tensors
        sharded.restore_masters(self.model, self.masters, tensors["optimizer"], state.counters["adam_step"])
        sharded.restore_buffers(self.model, self.places, tensors["model"])
        for name, tensor in self.passengers.items():
            tensor.copy_(tensors["passengers"][name])
        if isinstance(self.mtp, MtpTraining):
            if "mtp" in tensors:
                self.mtp.load_state_tensors(tensors["mtp"])
            else:
                self.mtp.adopt_weights()
        if "reference" in tensors and self.reference is not None:
            for place, tensor in zip(self._swappable(), self.reference, strict=True):
                tensor.copy_(tensors["reference"][place.name])
        self.load_counters(state.counters)
        self.quantization.resync()

    def save(self, folder: Path) -> None:
        """Model (bf16(master)), masters, moments and counters into an existing folder. Collective."""
        self.quantization.settle()
        with self.quantization.unquantized():
            checkpoint.save(self.state(), self.cfg.model, folder)

    def begin_save(self, folder: Path) -> None:
        """`save` beside what comes next. One at a time: `finish_save` before another one. Collective."""
        self.quantization.settle()
        with self.quantization.unquantized():
            self.saving = checkpoint.AsyncSave(self.state(), self.cfg.model, folder)

    def save_finished(self) -> bool:
        """Whether every rank has written the save that was begun. Collective."""
        return self.saving.finished()

    def finish_save(self) -> None:
        """Wait for the save that was begun. Collective."""
        self.saving.wait()

    # ---- turns on a GPU

    def sleep(self) -> int:
        """Device memory back until `wake`; its bytes. Collective: gathers that are under way end first."""
        if self.parking.full:
            return 0
        self.quantization.settle()
        return self.parking.sleep()

    def wake(self) -> None:
        self.parking.wake()

    def _kept(self) -> Iterator[torch.Tensor]:
        yield from self.ddp.parameters()
        yield from self.model.buffers()
        for optimizer in self.masters.optimizers:
            yield from tensors_of_optimizer(optimizer.optimizer)
        yield from self.mtp.kept()
        yield from self.reference or ()

    def _dropped(self) -> Iterator[torch.Tensor]:
        yield from (buffer.grad_data for buffer in self.ddp.buffers + self.ddp.expert_parallel_buffers)
        yield from self.mtp.dropped()

    def load(self, folder: Path) -> int:
        """Restore what `save` wrote, from any layout; returns the version. Collective."""
        counters = checkpoint.read_counters(folder)
        if counters["master_weights"] != self.masters.has_masters:
            raise UserError(
                f"{folder} was saved {'with' if counters['master_weights'] else 'without'} fp32 masters beside the weights",
                key="precision.base_dtype",
                fix="resume with the same base dtype",
            )
        tensors = checkpoint.load(self._tensors(counters, filled=False), folder)
        self.load_state(checkpoint.State(tensors, counters))
        return self.version

    def start_from(self, folder: Path) -> None:
        """Masters and weights of another run's checkpoint; its moments and counters are not taken over. Collective."""
        self.load(folder)
        self.version = 0
        self.nan = policy_step.NanGuard(self.config.max_nan_steps)
        self.reset_optimizer()


def _finalize(chunks: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Losses are already divided by the step's normalizer, so gradients are summed and not scaled again."""
    finalize_model_grads(chunks, None, **kwargs)


def initialize(cfg: Config, rank: int, rendezvous: str, local_rank: int = 0) -> None:
    """Join the process group at `rendezvous` (torch's init_method) and build Megatron's groups."""
    device = arguments.Device.of(cfg)
    if device.cuda:
        torch.cuda.set_device(local_rank)
    else:
        from runner.trainer.megatron import cpu_shim

        torch.set_num_threads(max(arguments.trainer_config(cfg).threads, 1))
        cpu_shim.install()
        way, reason = cpu_matmul.install(cfg.precision.cpu_matmul)
        print(f"bf16 matrices on this CPU: {way.name}, {reason}", flush=True)
    timeout = timedelta(seconds=arguments.trainer_config(cfg).rank_timeout_seconds)
    dist.init_process_group(device.backend, init_method=rendezvous, rank=rank, world_size=cfg.parallelism.ranks, timeout=timeout)
    parallel_state.initialize_model_parallel(
        **arguments.parallel_state(cfg), distributed_timeout_minutes=timeout.total_seconds() / 60
    )
    model_parallel_cuda_manual_seed(cfg.seed)
