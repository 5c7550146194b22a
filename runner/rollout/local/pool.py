"""The in-process rollout pool: protocol surface, weight sync and its verification."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from runner.config.choices import DeviceKind, Drafting, KvDtype
from runner.config.schema import Config, SpeculativeConfig
from runner.data import ExportedTensor, Request, Sample
from runner.errors import UserError
from runner.models.images import Images, extents
from runner.precision import cpu_matmul
from runner.precision.plan import PrecisionPlan
from runner.rollout.local.attention import LENGTH_BUCKET, KVCache
from runner.rollout.local.engine import Engine
from runner.rollout.local.model import EngineModel
from runner.rollout.local.option import LocalRolloutConfig
from runner.rollout.local.speculation import DraftSpeculation, NgramSpeculation, Speculation
from runner.rollout.local.store import WeightStore
from runner.rollout.protocol import EngineDescription, SyncReport
from runner.weights.stream import SealedTensor, sealed

KV_DTYPES = {KvDtype.fp8_e4m3: torch.float8_e4m3fn}


class LocalPool:
    """transformers' modules in this process with our KV cache, continuous batching and packed weights.

    Weights are dummies until the first `update_weights`; generating or scoring before it is a UserError.
    """

    def __init__(self, cfg: Config, run_dir: Path | None = None) -> None:
        rollout = cast(LocalRolloutConfig, cfg.rollout)
        self.version = -1
        self._residency_tensors = cfg.mismatch.residency_tensors
        self._device = torch_device(rollout.device)
        if self._device.type == "cpu":
            cpu_matmul.install(cfg.precision.cpu_matmul)
        dtype = getattr(torch, cfg.precision.base_dtype.value)
        self.plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
        self.model = EngineModel(cfg.model, self.plan, dtype, self._device)
        self.store = WeightStore(self.model, self.plan)
        self.engine = Engine(
            self.model,
            _speculation(cfg, dtype, self._device),
            max_concurrency=rollout.max_concurrency,
            kv_cache_tokens=rollout.kv_cache_tokens,
            prefill_chunk_tokens=rollout.prefill_chunk_tokens,
            kv_dtype=KV_DTYPES.get(cfg.precision.kv_cache, dtype),
        )
        self._grid = cfg.precision.rollout
        self._counters: dict[str, float] = defaultdict(float)

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
        """Samples as they finish; `requests` is pulled as room appears. May be closed at any sample."""
        self._need_weights()
        return self.engine.run(requests)

    def update_weights(self, version: int, stream: Iterable[ExportedTensor | SealedTensor]) -> SyncReport:
        """Load every tensor of the plan, verified. Tensors that are not sealed yet are sealed as they leave the stream.

        Problems (named in the report): bytes that differ from what was sent, tensors that are missing, unexpected, doubled
        or in another format, and residency: a rotating sample (all at the first sync) of what was received is repacked
        again and its bits compared with what is resident. With problems the version stays what it was.
        """
        began = time.perf_counter()
        first = self.version < 0
        with torch.inference_mode():
            outcome = self.store.load(sealed(stream), check_all=first, check_tensors=self._residency_tensors, turn=version)
        if not outcome.problems:
            self.version = version
        self.engine.weights_changed(self.version)
        return SyncReport(
            version=version,
            seconds=time.perf_counter() - began,
            wire_bytes=outcome.wire_bytes,
            arrived=outcome.arrived,
            resident_checked=outcome.resident_checked,
            changed_integers=None if first else outcome.changes.share("integers"),
            changed_scales=None if first else outcome.changes.share("scales"),
            problems=outcome.problems,
        )

    def check_resident(self, stream: Iterable[ExportedTensor]) -> list[str]:
        """Compare resident bits with a fresh repack of these tensors, without loading them; names what differs."""
        with torch.inference_mode():
            return self.store.check_resident(stream)

    @torch.inference_mode()
    def score(self, sequences: list[torch.Tensor], images: list[Images] | None = None) -> list[torch.Tensor]:
        """Teacher-forced logprobs [T - 1] fp32 at temperature 1, through the decoding kernels and a cache of its own."""
        self._need_weights()
        shown = images or [()] * len(sequences)
        rows = zip(sequences, shown, strict=True)
        return [self._score(sequence.cpu().numpy().astype(np.int64), images) for sequence, images in rows]

    def _score(self, tokens: np.ndarray, images: Images) -> torch.Tensor:
        total = len(tokens)
        features = self.model.encode([images])
        extent = extents([images]) if images else None
        cache = KVCache(1, -(-total // LENGTH_BUCKET) * LENGTH_BUCKET, self.engine.kv_dtype, self._device)
        rows, chunk = [], self.engine.prefill_chunk
        for start in range(0, total - 1, chunk):
            piece = tokens[start : min(start + chunk, total - 1)]
            placed = None if features is None else features.placed([images], [start], [start + len(piece)], [0])
            hidden = self.model.forward(cache, piece, np.array([start]), np.array([len(piece)]), images=extent, placed=placed)
            logprobs = self.model.logits(hidden).log_softmax(-1)
            targets = torch.from_numpy(tokens[start + 1 : start + 1 + len(piece)]).to(logprobs.device)
            rows.append(logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
        scored = torch.cat(rows) if rows else torch.zeros(0, device=self._device)
        with torch.inference_mode(False):
            return torch.empty(len(scored), dtype=torch.float32).copy_(scored)

    @torch.no_grad()
    def effective_weight(self, name: str) -> torch.Tensor:
        """The weight [out, in] that the kernel computes with, from one-hot inputs, as it comes out in the activations' dtype.

        Works in any packed layout, because nothing but the kernel is asked. UserError for a name that is no matmul weight.
        """
        return self.store.effective_weight(name)

    def describe(self) -> list[EngineDescription]:
        """Formats of the resident weights; `info`: how quantized ones are computed with, and why not with the int4 kernel."""
        return [
            EngineDescription(
                formats=self.store.formats(),
                group_size=self._grid.group_size,
                convention=self._grid.convention.name,
                product_rounding=self.store.product_rounding(),
                info={"engine": "local", "device": str(self._device), **self.store.kernels()},
            )
        ]

    def metrics(self) -> dict[str, float]:
        """`rollout/spec_*` and `perf/rollout_*` since the last call."""
        counters, self.engine.counters = self.engine.counters, defaultdict(float)
        metrics = self.engine.speculation.metrics()
        if counters["seconds"]:
            metrics["perf/rollout_tokens_per_second"] = counters["tokens"] / counters["seconds"]
        if counters["decode_steps"]:
            metrics["perf/rollout_decode_step_ms"] = 1e3 * counters["decode_seconds"] / counters["decode_steps"]
        metrics["perf/rollout_tokens"] = counters["tokens"]
        metrics["perf/rollout_prefill_tokens"] = counters["prefill_tokens"]
        if counters["cached_tokens"]:
            metrics["perf/rollout_cached_tokens"] = counters["cached_tokens"]
        return metrics

    def notices(self) -> list[str]:
        return []

    def state(self) -> dict[str, Any]:
        return {"speculation": self.engine.speculation.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.engine.speculation.load_state(state["speculation"])

    def decide(self) -> dict[str, Any] | None:
        """Whether speculation goes on, once both kinds of steps have been timed."""
        return self.engine.speculation.decide()

    def apply(self, decision: dict[str, Any]) -> None:
        self.engine.speculation.apply(decision)

    def close(self) -> None:
        self.engine.cache = None

    def _need_weights(self) -> None:
        if self.version < 0:
            raise UserError("the local engine has no weights yet", fix="call update_weights with the trainer's export first")


def torch_device(wanted: DeviceKind) -> torch.device:
    if wanted == DeviceKind.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == DeviceKind.cuda and not torch.cuda.is_available():
        raise UserError("rollout.device=cuda, but torch sees no GPU", key="rollout.device", fix="rollout.device=cpu")
    return torch.device(wanted.value)


def _speculation(cfg: Config, dtype: torch.dtype, device: torch.device) -> Speculation:
    spec: SpeculativeConfig = cfg.speculative
    match spec.method:
        case Drafting.none:
            return Speculation()
        case Drafting.ngram:
            return NgramSpeculation(
                spec.num_draft_tokens, spec.ngram_min, spec.ngram_max, spec.auto_disable, spec.auto_disable_after_steps
            )
        case Drafting.draft:
            draft = _draft_model(cfg, dtype, device)
            return DraftSpeculation(draft, spec.num_draft_tokens, spec.auto_disable, spec.auto_disable_after_steps)
    raise UserError(
        f"the local engine does not draft with speculative={spec.method}",
        key="speculative",
        fix="speculative=ngram, or rollout=sglang",
    )


def _draft_model(cfg: Config, dtype: torch.dtype, device: torch.device) -> EngineModel:
    """The model of speculative.draft_model (a folder in HF format) in bf16, with its own weights."""
    from runner.rollout.local.draft import load_draft

    return load_draft(cfg, dtype, device)
