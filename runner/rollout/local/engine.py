"""Continuous batching: admit, prefill, decode (with or without proposals), release."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from runner.data import Request, Sample, WeightSpan
from runner.errors import UserError
from runner.models.images import Images
from runner.rollout.feed import Feed
from runner.rollout.local.attention import LENGTH_BUCKET, KVCache
from runner.rollout.local.model import EngineModel
from runner.rollout.local.sampling import SAMPLE, Draws, distribution, draws_of, uniforms
from runner.rollout.local.slots import Slots
from runner.rollout.local.speculation import Speculation
from runner.rollout.local.verify import Proposal, verify_drawn, verify_sampled


@dataclass
class _Kept:
    """What is left of a turn: its tokens and images, and the keys and values of all of them."""

    tokens: np.ndarray
    images: Images
    cache: dict[tuple[int, str], torch.Tensor]


class Engine:
    """Decodes requests with one model. One `run` at a time; it may be abandoned at any sample."""

    def __init__(
        self,
        model: EngineModel,
        speculation: Speculation,
        *,
        max_concurrency: int,
        kv_cache_tokens: int,
        prefill_chunk_tokens: int,
        kv_dtype: torch.dtype,
    ) -> None:
        self.model, self.speculation = model, speculation
        self.max_concurrency, self.kv_cache_tokens, self.prefill_chunk = max_concurrency, kv_cache_tokens, prefill_chunk_tokens
        self.kv_dtype = kv_dtype
        self.version = -1
        self.busy = False
        self.counters: dict[str, float] = defaultdict(float)
        self.cache: KVCache | None = None
        self.kept: dict[str, _Kept] = {}  # of conversations whose next turn has not come yet
        self._stale = False

    def weights_changed(self, version: int) -> None:
        """Cached keys and values belong to other weights now: they are recomputed before the next step."""
        self.version = version
        self._stale = True
        self.kept.clear()
        if not self.busy:
            self.cache = None
        self.speculation.weights_changed()

    @torch.inference_mode()
    def run(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
        """Samples as they finish. `requests` may be a Feed, from which requests come while others run: they join the batch.
        RuntimeError when another run has not ended (exhaust it or close it)."""
        if self.busy:
            raise RuntimeError("this engine is generating already: exhaust or close the other generator first")
        self.busy, self._stale = True, False
        began = time.perf_counter()
        try:
            yield from self._run(iter(requests))
        finally:
            self.busy = False
            self.kept.clear()
            self.counters["seconds"] += time.perf_counter() - began

    def _run(self, requests: Iterator[Request | None]) -> Iterator[Sample]:
        shape = None
        if self.model.moe_layers:
            shape = (len(self.model.moe_layers), self.model.config.experts_top_k)
        route_dtype = torch.uint8 if self.model.config.num_experts <= 256 else torch.int32
        slots = Slots(self.max_concurrency, LENGTH_BUCKET, shape, route_dtype)
        self.speculation.begin(slots)
        waiting: list[Request] = []
        while True:
            first_new = slots.running
            for conversation in requests.forgotten() if isinstance(requests, Feed) else ():
                self.kept.pop(conversation, None)
            self._admit(requests, waiting, slots)
            if not slots.running:
                return
            if self._stale:
                self._refresh(slots, first_new)
            if slots.running > first_new:
                self._prefill(slots, first_new)
            else:
                self._decode(slots)
            done = slots.finished()
            if len(done):
                with torch.inference_mode(False):  # the trainer computes gradients with these tensors
                    finished = [slots.sample(slot) for slot in done.tolist()]
                self._keep(slots, done)
                slots.release(done, self._move)
                self.counters["samples"] += len(finished)
                yield from finished

    # -- admission and prefill ---------------------------------------------------------------------------------------

    def _admit(self, requests: Iterator[Request | None], waiting: list[Request], slots: Slots) -> None:
        context = self.model.config.max_context_tokens
        extra = self.speculation.max_tokens
        while slots.running < self.max_concurrency:
            if not waiting:
                following = next(requests, None)
                if following is None:
                    return
                waiting.append(following)
            request = waiting[0]
            prompt = len(request.tokens)
            if not 0 < prompt < context:
                raise UserError(
                    f"prompt {request.prompt_id} has {prompt} tokens, the model's context is {context}",
                    key="task.max_prompt_tokens",
                    fix="lower task.max_prompt_tokens, or choose a model with a longer context",
                )
            limit = min(prompt + request.sampling.max_response_tokens, context)
            length = -(-max(limit + extra, slots.max_length) // LENGTH_BUCKET) * LENGTH_BUCKET
            if self.kv_cache_tokens and length > self.kv_cache_tokens:
                raise UserError(
                    f"prompt {request.prompt_id} may need {length} cache positions, more than {self.kv_cache_tokens}",
                    key="rollout.kv_cache_tokens",
                    fix="raise rollout.kv_cache_tokens, or 0 to size it from max_concurrency",
                )
            if self.kv_cache_tokens and (slots.running + 1) * length > self.kv_cache_tokens and slots.running:
                return
            waiting.pop(0)
            slots.admit(request, limit, self.version, self.model.config.vocab_size)
            slots.grow(length)

    def _cache_for(self, slots: Slots) -> KVCache:
        if self.cache is None:
            capacity = self.max_concurrency
            if self.kv_cache_tokens:
                capacity = min(capacity, max(1, self.kv_cache_tokens // slots.max_length))
            self.cache = KVCache(capacity, slots.max_length, self.kv_dtype, self.model.device)
        self.cache.grow(slots.max_length)
        return self.cache

    def _prefill(self, slots: Slots, first: int) -> None:
        """Fill the cache of new slots (each distinct prompt once) and draw their first tokens."""
        cache = self._cache_for(slots)
        # prompts differ in their tokens or in their images; one whose beginning was kept is filled by itself
        owners: dict[tuple[tuple[int, ...], tuple[int, ...], str], int] = {}
        source = np.zeros(slots.running - first, dtype=np.int64)
        begin = np.zeros(slots.running, dtype=np.int64)
        for slot in range(first, slots.running):
            request = slots.requests[slot]
            assert request is not None
            begin[slot] = self._put_back(cache, slot, request)
            own = request.conversation if begin[slot] else ""
            source[slot - first] = owners.setdefault((request.tokens, tuple(map(id, request.images)), own), slot)
        last: dict[int, torch.Tensor] = {}
        for group in self._chunks(slots, sorted(owners.values())):
            last.update(self._fill(slots, cache, group, slots.length, keep_routes=True, begin=begin))
        fresh = np.arange(first, slots.running)
        copies = source != fresh
        if copies.any():
            longest = int(slots.length[fresh].max())
            to = torch.from_numpy(fresh[copies]), torch.from_numpy(source[copies])
            cache.copy(to[1].to(cache.device), to[0].to(cache.device), longest)
            if slots.routes is not None:
                slots.routes[to[0], :longest] = slots.routes[to[1], :longest]
            slots.processed[fresh[copies]] = slots.processed[source[copies]]
        place = {slot: number for number, slot in enumerate(last)}
        logits = self.model.logits(torch.stack(list(last.values())))[[place[slot] for slot in source.tolist()]]
        dist = distribution(logits, slots.temperature[fresh], slots.top_p[fresh], slots.top_k[fresh])
        draws = draws_of(dist, uniforms(slots.seed[fresh], slots.length[fresh], SAMPLE))
        # rows before `first` get nothing in this step
        emitted = np.full((slots.running, 1), -1, dtype=np.int64)
        emitted[first:, 0] = draws.picked
        counts = (emitted[:, 0] >= 0).astype(np.int64)
        logprobs, raw = np.zeros((slots.running, 1), np.float32), np.zeros((slots.running, 1), np.float32)
        logprobs[first:, 0], raw[first:, 0] = draws.tempered, draws.raw
        self.counters["tokens"] += int(slots.append(emitted, counts, logprobs, raw).sum())

    def _keep(self, slots: Slots, done: np.ndarray) -> None:
        """Keys and values of finished turns, which their conversations may go on from."""
        for slot in done.tolist():
            request = slots.requests[slot]
            assert request is not None
            if request.conversation and self.cache is not None:
                cached = int(slots.processed[slot])
                self.kept[request.conversation] = _Kept(
                    slots.tokens[slot, :cached].copy(), request.images, self.cache.keep(slot, cached)
                )

    def _put_back(self, cache: KVCache, slot: int, request: Request) -> int:
        """Positions of the request's prompt that its conversation had left, and are in the slot's cache now; 0: none.

        At least one token is left to compute, because its hidden state is what the next token is drawn from; and, where routes
        are recorded, all those whose rows the conversation does not have yet.
        """
        kept = self.kept.pop(request.conversation, None)
        if kept is None:
            return 0
        most = min(len(kept.tokens), len(request.tokens) - 1)
        if request.capture_routes:
            most = min(most, request.known_routes)
        differs = np.nonzero(kept.tokens[:most] != np.array(request.tokens[:most]))[0]
        length = int(differs[0]) if len(differs) else most
        for image in (*kept.images, *request.images):
            if image not in kept.images or image not in request.images:  # equal placeholders, another image
                length = min(length, image.start)
        if length:
            cache.put_back(slot, kept.cache, length)
        self.counters["cached_tokens"] += length
        return length

    def _chunks(self, slots: Slots, owners: list[int]) -> Iterator[list[int]]:
        """Slots whose prompts go through the model together; the padded attention makes equal lengths cheap."""
        group: list[int] = []
        for slot in sorted(owners, key=lambda slot: int(slots.length[slot])):
            if group and (len(group) + 1) * int(slots.length[slot]) > self.prefill_chunk:
                yield group
                group = []
            group.append(slot)
        if group:
            yield group

    def _fill(
        self,
        slots: Slots,
        cache: KVCache,
        group: list[int],
        until: np.ndarray,
        keep_routes: bool,
        begin: np.ndarray | None = None,
    ) -> dict[int, torch.Tensor]:
        """Cache positions begin (0 by default) .. until-1 of these slots, in pieces of at most the chunk size; last hidden state
        of each slot."""
        last: dict[int, torch.Tensor] = {}
        rows = np.array(sorted(group))
        at = np.zeros(len(rows), dtype=np.int64) if begin is None else begin[rows]
        slots.processed[rows] = until[rows]
        # images whose tokens are all cached are not encoded again
        new = {slot: slots.images_of(slot, int(start)) for slot, start in zip(rows.tolist(), at, strict=True)}
        features = self.model.encode(list(new.values()))
        any_image = any(slots.images_of(slot) for slot in rows.tolist())
        while len(rows):
            counts = np.minimum(until[rows] - at, max(1, self.prefill_chunk // len(rows)))
            row = np.repeat(rows, counts)
            column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(at, counts)
            images = slots.images[rows] if any_image else None
            placed = None
            if features is not None:
                shown = [new[slot] for slot in rows.tolist()]
                placed = features.placed(shown, at.tolist(), (at + counts).tolist(), (np.cumsum(counts) - counts).tolist())
            hidden = self.model.forward(cache, slots.tokens[row, column], at, counts, rows, images, placed)
            self.counters["prefill_tokens"] += len(row)
            if keep_routes:
                self._keep_routes(slots, row, column)
            at = at + counts
            ends = np.cumsum(counts) - 1
            going = at < until[rows]
            last.update({int(slot): hidden[end] for slot, end, more in zip(rows, ends, going, strict=True) if not more})
            rows, at = rows[going], at[going]
        return last

    def _keep_routes(self, slots: Slots, row: np.ndarray, column: np.ndarray) -> None:
        if slots.routes is None:
            return
        routes = self.model.routes()
        assert routes is not None
        slots.routes[torch.from_numpy(row), torch.from_numpy(column)] = routes.to("cpu", slots.route_dtype)

    def _refresh(self, slots: Slots, rows: int) -> None:
        """After a weight sync in the middle of a run: recompute the caches of running sequences, start a new weight span."""
        self._stale = False
        if self.cache is not None:
            self.cache.clear()
        cache = self._cache_for(slots)
        for group in self._chunks(slots, list(range(rows))):
            self._fill(slots, cache, group, slots.length - 1, keep_routes=False)
        for slot in range(rows):
            request = slots.requests[slot]
            assert request is not None
            generated = int(slots.length[slot]) - len(request.tokens)
            slots.spans[slot][-1].stop = generated
            slots.spans[slot].append(WeightSpan(self.version, generated, generated))

    # -- decode ------------------------------------------------------------------------------------------------------

    def _decode(self, slots: Slots) -> None:
        began = time.perf_counter()
        cache = self._cache_for(slots)
        n = slots.running
        proposal = self.speculation.propose(slots)
        counts = proposal.counts + 1 if proposal is not None else np.ones(n, dtype=np.int64)
        tokens, row, column = _decode_tokens(slots, proposal, counts)
        starts = slots.length[:n] - 1
        if proposal is None or proposal.weights is None:
            sampling = slots.temperature[:n], slots.top_p[:n], slots.top_k[:n], slots.seed[:n]
            draws = self.model.draws(cache, tokens, starts, counts, sampling, self._images(slots))
            emitted, kept, logprobs, raw = _kept_of_drawn(draws, proposal, row, column)
        else:
            hidden = self.model.forward(cache, tokens, starts, counts, images=self._images(slots))
            emitted, kept, logprobs, raw = self._verify_sampled(slots, hidden, proposal, row, counts)
        self._keep_routes(slots, row, starts[row] + column)
        slots.processed[:n] = slots.length[:n]
        added = slots.append(emitted, kept, logprobs, raw)
        slots.processed[:n] = slots.length[:n] - 1
        total = int(added.sum())
        self.counters["tokens"] += total
        self.counters["decode_steps"] += 1
        seconds = time.perf_counter() - began
        self.counters["decode_seconds"] += seconds
        self.speculation.record(proposal, kept, total, seconds)

    def _images(self, slots: Slots) -> np.ndarray | None:
        """Extents [running, I, 3] of the images of running rows; None for a model that sees none."""
        return None if self.model.visual is None else slots.images[: slots.running]

    def _verify_sampled(
        self, slots: Slots, hidden: torch.Tensor, proposal: Proposal, row: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What is kept of a draft model's proposals: emitted [B, k + 1], kept [B], and logprobs of what was emitted."""
        n = slots.running
        logits = self.model.logits(hidden)
        dist = distribution(logits, slots.temperature[row], slots.top_p[row], slots.top_k[row])
        offsets = np.cumsum(counts) - counts
        emitted, kept = verify_sampled(dist.weights, offsets, proposal, slots.seed[:n], slots.length[:n])
        place = np.minimum(np.arange(emitted.shape[1]), counts[:, None] - 1) + offsets[:, None]
        at = torch.from_numpy(place).to(logits.device)
        chosen = torch.from_numpy(np.maximum(emitted, 0)).to(logits.device)
        logprobs = dist.tempered[at, chosen].cpu().numpy()
        return emitted, kept, logprobs, logprobs if dist.tempered is dist.raw else dist.raw[at, chosen].cpu().numpy()

    def _move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        if self.cache is not None:
            device = self.cache.device
            self.cache.copy(torch.from_numpy(sources).to(device), torch.from_numpy(targets).to(device), self.cache.length)
        self.speculation.move(sources, targets)


def _kept_of_drawn(
    draws: Draws, proposal: Proposal | None, row: np.ndarray, column: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """emitted [B, k + 1], kept [B] and logprobs of one draw after every token; without proposals k is 0."""
    if proposal is None:
        ones = np.ones(len(row), dtype=np.int64)
        return draws.picked[:, None], ones, draws.tempered[:, None], draws.raw[:, None]
    rows, most = proposal.tokens.shape
    emitted = np.full((rows, most + 1), -1, dtype=np.int64)
    logprobs, raw = np.zeros(emitted.shape, np.float32), np.zeros(emitted.shape, np.float32)
    emitted[row, column], logprobs[row, column], raw[row, column] = draws.picked, draws.tempered, draws.raw
    return emitted, verify_drawn(emitted, proposal), logprobs, raw


def _decode_tokens(slots: Slots, proposal: Proposal | None, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, row, column) of a decode step: each row's last token, then its proposals."""
    n = slots.running
    last = slots.tokens[np.arange(n), slots.length[:n] - 1]
    row = np.repeat(np.arange(n), counts)
    if proposal is None:
        return last, row, np.zeros(n, dtype=np.int64)
    column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.concatenate([last[:, None], proposal.tokens], 1)[row, column], row, column
