"""What proposes tokens: the sample's own text (prompt lookup) or a draft model; and the decision to stop proposing.

Shape legend: B running rows, k proposals per row.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from runner.data import Request
from runner.rollout.local.attention import KVCache
from runner.rollout.local.model import EngineModel
from runner.rollout.local.sampling import DRAFT, distribution, draw, uniforms
from runner.rollout.local.slots import Slots
from runner.rollout.local.verify import Proposal


class Speculation:
    """Plain decoding, and what every method shares: counters and the recorded decision.

    While it is undecided (auto_disable), engine steps alternate between proposing and plain decoding, so that both are
    timed on the same batch; after `decide_after` steps of each kind the seconds per emitted token are compared. The
    verdict takes effect when `decide` is called, at the end of a step of the run, and is final. All but the seconds is
    counted, so that a resumed run alternates as the first one did; it repeats the recorded decision (decisions.py).
    """

    max_tokens = 0

    def __init__(self, auto_disable: bool = False, decide_after: int = 0) -> None:
        self.auto_disable, self.decide_after = auto_disable, decide_after
        self.decision: dict[str, Any] | None = None
        self.verdict: dict[str, Any] | None = None  # a decision that is not yet in effect
        self.counters: dict[str, float] = defaultdict(float)
        self._timed: dict[bool, list[Any]] = {True: [0, 0, 0.0], False: [0, 0, 0.0]}  # proposing: steps, tokens, seconds

    # -- what a method implements ------------------------------------------------------------------------------------

    def _propose(self, slots: Slots) -> Proposal | None:
        return None

    def begin(self, slots: Slots) -> None:
        """A run starts with these (empty) slots."""

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Rows have moved to other slots."""

    def weights_changed(self) -> None:
        """The policy has new weights."""

    # -- shared ------------------------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        return self.max_tokens > 0 and not (self.decision is not None and self.decision["disabled"])

    @property
    def _measuring(self) -> bool:
        return self.auto_disable and self.decision is None and self.verdict is None and self.max_tokens > 0

    def propose(self, slots: Slots) -> Proposal | None:
        """Proposals for the running rows, cut so that none reaches past a row's limit; None: decode plainly."""
        if not self.enabled:
            return None
        if self._measuring and self._timed[True][0] > self._timed[False][0]:
            self._plain_turn = True
            return None
        self._plain_turn = False
        return self._propose(slots)

    _plain_turn = False

    def record(self, proposal: Proposal | None, kept: np.ndarray, tokens: int, seconds: float) -> None:
        """One decode step: emitted tokens kept [B] before cuts, tokens after them, seconds of the whole step."""
        if proposal is not None:
            self.counters["steps"] += 1
            self.counters["proposed"] += float(proposal.counts.sum())
            self.counters["accepted"] += float((kept - 1).sum())
            proposing = proposal.counts > 0
            self.counters["rows"] += float(proposing.sum())
            self.counters["row_tokens"] += float(kept[proposing].sum())
        if not self._measuring:
            return
        timed = self._timed[not self._plain_turn]
        timed[0] += 1
        timed[1] += tokens
        timed[2] += seconds
        if min(self._timed[True][0], self._timed[False][0]) >= self.decide_after:
            self._compare()

    def _compare(self) -> None:
        per_token = {kind: seconds / max(tokens, 1) for kind, (_, tokens, seconds) in self._timed.items()}
        disabled = per_token[True] > per_token[False]
        times = f"{1e6 * per_token[True]:.1f} us per token with it, {1e6 * per_token[False]:.1f} without"
        self.verdict = {
            "summary": f"speculation {'off' if disabled else 'stays on'}: {times}",
            "disabled": disabled,
            "seconds_per_token_speculative": per_token[True],
            "seconds_per_token_plain": per_token[False],
            "steps_of_each_kind": self.decide_after,
        }

    def decide(self) -> dict[str, Any] | None:
        """Put the verdict into effect, if there is one that is not; returns it."""
        if self.verdict is None:
            return None
        self.apply(self.verdict)
        return self.decision

    def apply(self, decision: dict[str, Any]) -> None:
        self.decision, self.verdict = dict(decision), None

    def state(self) -> dict[str, Any]:
        timed = {"speculative": list(self._timed[True]), "plain": list(self._timed[False])}
        return {"decision": self.decision, "verdict": self.verdict, "timed": timed}

    def load_state(self, state: dict[str, Any]) -> None:
        self.decision, self.verdict = state["decision"], state["verdict"]
        self._timed = {True: list(state["timed"]["speculative"]), False: list(state["timed"]["plain"])}

    def metrics(self) -> dict[str, float]:
        """`rollout/spec_*` since the last call; accept_length counts the tokens of a step of a row that had proposals."""
        if not self.max_tokens:
            return {}
        counters, self.counters = self.counters, defaultdict(float)
        metrics = {"rollout/spec_enabled": float(self.enabled), "rollout/spec_proposed_tokens": counters["proposed"]}
        if counters["proposed"]:
            metrics["rollout/spec_accept_rate"] = counters["accepted"] / counters["proposed"]
            metrics["rollout/spec_accept_length"] = counters["row_tokens"] / counters["rows"]
        return metrics


class NgramSpeculation(Speculation):
    """Prompt lookup (Saxena 2023): the longest suffix of n tokens that stood earlier in the sample's own text, most recent
    place first; what followed it is proposed."""

    def __init__(self, tokens: int, shortest: int, longest: int, auto_disable: bool, decide_after: int) -> None:
        super().__init__(auto_disable, decide_after)
        self.max_tokens, self.shortest, self.longest = tokens, shortest, longest

    def _propose(self, slots: Slots) -> Proposal | None:
        n = slots.running
        proposal = lookup(slots.tokens[:n], slots.length[:n], self.max_tokens, self.shortest, self.longest)
        proposal.counts = np.minimum(proposal.counts, slots.limit[:n] - slots.length[:n] - 1)
        return _trimmed(proposal)


def lookup(tokens: np.ndarray, length: np.ndarray, most: int, shortest: int, longest: int) -> Proposal:
    """tokens [B, T] of which length [B] are known -> up to `most` tokens that followed the longest matching suffix."""
    rows = np.arange(len(length))
    width = int(length.max())
    text = tokens[:, :width]
    start = np.full(len(length), -1, dtype=np.int64)  # where the continuation begins
    matched = np.ones((len(length), width), dtype=bool)  # column e: the n tokens that end at e equal the suffix
    ends = np.arange(width)
    for n in range(1, longest + 1):
        suffix = text[rows, np.maximum(length - n, 0)][:, None]
        equal = np.zeros_like(matched)
        equal[:, n - 1 :] = text[:, : width - n + 1] == suffix
        matched &= equal
        if n < shortest:
            continue
        usable = matched & (ends < (length - 1)[:, None]) & (length > n)[:, None]
        found = usable.any(1)
        latest = width - 1 - usable[:, ::-1].argmax(1)
        start = np.where(found, latest + 1, start)
    counts = np.where(start >= 0, np.minimum(length - start, most), 0)
    places = np.minimum(np.maximum(start, 0)[:, None] + np.arange(most), tokens.shape[1] - 1)
    return Proposal(tokens[rows[:, None], places], counts, None)


def _trimmed(proposal: Proposal) -> Proposal | None:
    """Without columns that no row uses; None when there is no proposal at all."""
    proposal.counts = np.maximum(proposal.counts, 0)
    most = int(proposal.counts.max())
    if not most:
        return None
    weights = None if proposal.weights is None else proposal.weights[:, :most]
    return Proposal(proposal.tokens[:, :most], proposal.counts, weights)


class DraftSpeculation(Speculation):
    """A smaller model of the same vocabulary samples k tokens at each row's temperature; its distribution goes along."""

    def __init__(self, model: EngineModel, tokens: int, auto_disable: bool, decide_after: int) -> None:
        super().__init__(auto_disable, decide_after)
        self.model, self.max_tokens = model, tokens
        self.cache: KVCache | None = None
        self.filled = np.zeros(0, dtype=np.int64)  # cached positions per slot that still are the sample's own text
        self._owner: list[Request | None] = []

    def begin(self, slots: Slots) -> None:
        self.cache = None
        self.filled = np.zeros(slots.capacity, dtype=np.int64)
        self._owner = [None] * slots.capacity

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self.filled[targets] = self.filled[sources]
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._owner[target] = self._owner[source]
        if self.cache is not None:
            device = self.cache.device
            self.cache.copy(torch.from_numpy(sources).to(device), torch.from_numpy(targets).to(device), self.cache.length)

    def _propose(self, slots: Slots) -> Proposal | None:
        n, k = slots.running, self.max_tokens
        if self.cache is None:
            self.cache = KVCache(slots.capacity, slots.max_length, self.model.dtype, self.model.device)
        self.cache.grow(slots.max_length)
        for slot in range(n):  # a slot that holds another request starts over
            if self._owner[slot] is not slots.requests[slot]:
                self._owner[slot] = slots.requests[slot]
                self.filled[slot] = 0
        length = slots.length[:n]
        counts = np.minimum(k, slots.limit[:n] - length - 1)
        starts, fresh = self.filled[:n].copy(), length - self.filled[:n]
        row = np.repeat(np.arange(n), fresh)
        column = np.arange(len(row)) - np.repeat(np.cumsum(fresh) - fresh, fresh) + starts[row]
        hidden = self.model.forward(self.cache, slots.tokens[row, column], starts, fresh)
        hidden = hidden[torch.from_numpy(np.cumsum(fresh) - 1).to(hidden.device)]
        tokens = np.zeros((n, k), dtype=np.int64)
        weights = []
        for j in range(k):
            dist = distribution(self.model.logits(hidden), slots.temperature[:n], slots.top_p[:n], slots.top_k[:n])
            q = dist.weights / dist.weights.sum(-1, keepdim=True)
            weights.append(q)
            tokens[:, j] = draw(q, uniforms(slots.seed[:n], length + j, DRAFT)).cpu().numpy()
            if j + 1 < k:
                hidden = self.model.forward(self.cache, tokens[:, j], length + j, np.ones(n, dtype=np.int64))
        # what is cached past the known text may be refused: only the known text counts as filled
        self.filled[:n] = length
        return _trimmed(Proposal(tokens, counts, torch.stack(weights, 1)))
