"""Running sequences as rows of arrays: slot 0 .. running-1, without holes, so that a decode step has no Python loop over them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from runner.data import Request, Sample, Status, WeightSpan
from runner.models.images import Images
from runner.rollout.local.attention import LENGTH_BUCKET


class Slots:
    """State of up to `capacity` sequences.

    tokens     [slot, position] int64          length      tokens known (prompt and response)
    processed  tokens whose keys and values are cached; length - 1 between steps
    logprobs, raw  [slot, position] fp32 of the token at that position (response only)
    routes     [slot, position, L, K]; None when nothing is captured
    images     [slot, I, 3] `PlacedImage.extent` of a sequence's images; zeros where it has fewer than I, the most so far
    """

    def __init__(self, capacity: int, length: int, route_shape: tuple[int, int] | None, route_dtype: torch.dtype) -> None:
        self.capacity, self.max_length, self.running = capacity, length, 0
        self.tokens = np.zeros((capacity, length), dtype=np.int64)
        self.logprobs = np.zeros((capacity, length), dtype=np.float32)
        self.raw = np.zeros((capacity, length), dtype=np.float32)
        self.length = np.zeros(capacity, dtype=np.int64)
        self.processed = np.zeros(capacity, dtype=np.int64)
        self.limit = np.zeros(capacity, dtype=np.int64)  # total tokens at which a sequence is cut
        self.seed = np.zeros(capacity, dtype=np.int64)
        self.admitted = np.zeros(capacity)  # seconds since the epoch
        self.temperature = np.zeros(capacity)
        self.top_p = np.zeros(capacity)
        self.top_k = np.zeros(capacity, dtype=np.int64)
        self.stop_set = np.zeros(capacity, dtype=np.int64)
        self.images = np.zeros((capacity, 1, 3), dtype=np.int64)
        self.requests: list[Request | None] = [None] * capacity
        self.spans: list[list[WeightSpan]] = [[] for _ in range(capacity)]
        self.route_shape, self.route_dtype = route_shape, route_dtype
        self.routes: torch.Tensor | None = None
        self.stop_sets: dict[tuple[int, ...], int] = {}
        self._stop_table = np.zeros((0, 0), dtype=bool)

    def admit(self, request: Request, limit: int, version: int, vocab: int) -> int:
        """Put a request into the next slot; returns the slot."""
        slot = self.running
        self.running += 1
        prompt = len(request.tokens)
        self.grow(limit)
        self.tokens[slot, :prompt] = request.tokens
        self.length[slot], self.processed[slot], self.limit[slot] = prompt, 0, limit
        self.seed[slot], self.admitted[slot] = request.seed, time.time()
        sampling = request.sampling
        self.temperature[slot], self.top_p[slot], self.top_k[slot] = sampling.temperature, sampling.top_p, sampling.top_k
        self.stop_set[slot] = self._stop_index(sampling.stop_token_ids, vocab)
        self._place(slot, request.images)
        self.requests[slot] = request
        self.spans[slot] = [WeightSpan(version, 0, 0)]
        if request.capture_routes and self.routes is None and self.route_shape is not None:
            self.routes = torch.zeros(self.capacity, self.max_length, *self.route_shape, dtype=self.route_dtype)
        return slot

    def _place(self, slot: int, images: Images) -> None:
        if (more := len(images) - self.images.shape[1]) > 0:
            self.images = np.pad(self.images, ((0, 0), (0, more), (0, 0)))
        self.images[slot] = 0
        for number, image in enumerate(images):
            self.images[slot, number] = image.extent

    def images_of(self, slot: int, after: int = 0) -> Images:
        """Those of a slot's sequence that have tokens at `after` or behind it."""
        request = self.requests[slot]
        return () if request is None else tuple(image for image in request.images if image.start + image.tokens > after)

    def grow(self, length: int) -> None:
        """Room for `length` tokens per slot."""
        if length <= self.max_length:
            return
        more = -(-length // LENGTH_BUCKET) * LENGTH_BUCKET - self.max_length
        for name in ("tokens", "logprobs", "raw"):
            setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, more))))
        if self.routes is not None:
            self.routes = torch.cat([self.routes, self.routes.new_zeros(self.capacity, more, *self.routes.shape[2:])], 1)
        self.max_length += more

    def _stop_index(self, ids: tuple[int, ...], vocab: int) -> int:
        if ids not in self.stop_sets:
            row = np.zeros((1, vocab), dtype=bool)
            row[0, [token for token in ids if token < vocab]] = True
            self._stop_table = row if not self.stop_sets else np.concatenate([self._stop_table, row])
            self.stop_sets[ids] = len(self.stop_sets)
        return self.stop_sets[ids]

    def is_stop(self, tokens: np.ndarray) -> np.ndarray:
        """[running, j] token ids (-1: none) of all rows -> which of them end their sequence."""
        return self._stop_table[self.stop_set[: len(tokens), None], tokens] & (tokens >= 0)

    def append(self, emitted: np.ndarray, counts: np.ndarray, logprobs: np.ndarray, raw: np.ndarray) -> np.ndarray:
        """Add counts[r] of emitted[r] to every running row, cut after a stop token and at the limit; returns what was added."""
        n, width = emitted.shape
        column = np.arange(width)
        inside = column < counts[:, None]
        stops = self.is_stop(emitted) & inside
        first_stop = np.where(stops.any(1), stops.argmax(1) + 1, width)
        counts = np.minimum(np.minimum(counts, first_stop), self.limit[:n] - self.length[:n])
        keep = column < counts[:, None]
        row, place = np.nonzero(keep)
        at = self.length[row] + place
        self.tokens[row, at] = emitted[row, place]
        self.logprobs[row, at] = logprobs[row, place]
        self.raw[row, at] = raw[row, place]
        self.length[:n] += counts
        return counts

    def finished(self) -> np.ndarray:
        """Slots that are at a stop token or at their limit."""
        n = self.running
        last = self.tokens[np.arange(n), self.length[:n] - 1][:, None]
        prompt = np.array([len(request.tokens) for request in self.requests[:n] if request is not None])
        return np.nonzero((self.is_stop(last)[:, 0] & (self.length[:n] > prompt)) | (self.length[:n] >= self.limit[:n]))[0]

    def sample(self, slot: int) -> Sample:
        """The finished sequence of a slot as a Sample with its own memory."""
        request = self.requests[slot]
        assert request is not None
        total, prompt = int(self.length[slot]), len(request.tokens)
        stopped = total > prompt and int(self.tokens[slot, total - 1]) in request.sampling.stop_token_ids
        spans = self.spans[slot]
        spans[-1].stop = total - prompt
        routes = None
        if request.capture_routes and self.routes is not None:
            routes = self.routes[slot, request.known_routes : total - 1].clone()
            if routes.dtype == torch.int32:
                routes = routes.to(torch.uint16)
        return Sample(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            tokens=torch.from_numpy(self.tokens[slot, :total].copy()),
            response_length=total - prompt,
            loss_mask=torch.ones(total - prompt, dtype=torch.bool),
            rollout_logprobs=torch.from_numpy(self.logprobs[slot, prompt:total].copy()),
            status=Status.completed if stopped else Status.truncated,
            finish_reason="stop" if stopped else "length",
            raw_logprobs=torch.from_numpy(self.raw[slot, prompt:total].copy()),
            routes=routes,
            weight_spans=[span for span in spans if span.stop > span.start],
            images=request.images,
            served=[("engine 0", float(self.admitted[slot]), time.time())],
        )

    def release(self, slots: np.ndarray, move_cache: Callable[[np.ndarray, np.ndarray], None]) -> None:
        """Free finished slots: the last running rows move into the holes. move_cache(sources, targets) moves the caches."""
        left = self.running - len(slots)
        holes = slots[slots < left]
        movers = np.setdiff1d(np.arange(left, self.running), slots)
        if len(holes):
            for array in (
                self.tokens, self.logprobs, self.raw, self.length, self.processed, self.limit, self.seed,
                self.admitted, self.temperature, self.top_p, self.top_k, self.stop_set, self.images,
            ):  # fmt: skip
                array[holes] = array[movers]
            if self.routes is not None:
                self.routes[holes] = self.routes[movers]
            for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
                self.requests[hole], self.spans[hole] = self.requests[mover], self.spans[mover]
            move_cache(movers, holes)
        for slot in range(left, self.running):
            self.requests[slot] = None
        self.running = left
