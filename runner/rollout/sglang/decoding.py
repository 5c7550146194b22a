"""SGLang's answers to samples: tokens, logprobs, weight spans and routes of a generation that may come in several pieces.

Shape legend: P prompt tokens, R response tokens, T = P + R, L MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import torch

from runner.config.schema import ModelConfig
from runner.data import Request, Sample, Status, WeightSpan
from runner.models import family_of
from runner.rollout.sglang.client import EngineFailure
from runner.routing.reference import RouteRef, joined
from runner.routing.routes import RouteError, compact, select_layers

Reply = dict[str, Any]


class RouteDecoder:
    """base64 of int32 [rows, all layers, K] -> compact [rows, L, K] by global layer id."""

    def __init__(self, model: ModelConfig) -> None:
        self.moe_layers = list(family_of(model).moe_layers(model))
        self.num_layers, self.top_k, self.num_experts = model.num_layers, model.experts_top_k, model.num_experts

    def decode(self, encoded: str, rows: int, where: str) -> torch.Tensor:
        """Raises RouteError for another number of rows, missing rows (all zeros), layers or ids than there can be."""
        flat = np.frombuffer(base64.b64decode(encoded), dtype=np.int32)
        width = self.num_layers * self.top_k
        if len(flat) != rows * width:
            raise RouteError(
                f"{where}: SGLang sent {len(flat)} expert ids; {rows} tokens x {self.num_layers} layers x "
                f"{self.top_k} experts are {rows * width}"
            )
        routes = torch.from_numpy(flat.reshape(rows, self.num_layers, self.top_k).copy())
        return compact(select_layers(routes, self.moe_layers, self.num_layers), self.num_experts)


class Generation:
    """One request on its way: what has come so far, and what to ask for next.

    A continued sample keeps its tokens, logprobs and earlier rows of routes, and asks only for the rows after them: the row of
    the last kept token does not exist yet (nothing had been predicted after it), so the next piece brings it.
    """

    def __init__(self, request: Request, context: int, routes: RouteDecoder | None, key: str) -> None:
        self.request, self.key, self.decoder = request, key, routes
        self.room = min(request.sampling.max_response_tokens, context - len(request.tokens))
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.routes: list[torch.Tensor | RouteRef] = []
        self.rows = request.known_routes
        self.cached = 0  # tokens of a later turn's prompt that the server did not compute again
        self.spans: list[WeightSpan] = []
        self.drafts = {"steps": 0, "accepted": 0, "proposed": 0}
        self.served: list[tuple[str, float, float]] = []

    @property
    def where(self) -> str:
        return f"sample {self.request.sample_index} of prompt {self.request.prompt_id}"

    @property
    def outstanding(self) -> int:
        """Tokens that this request may still cost an engine."""
        return len(self.request.tokens) + self.room

    def payload(self, attempt: int) -> Reply:
        """The body of /generate for what is missing."""
        sampling = self.request.sampling
        params: Reply = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_new_tokens": self.room - len(self.tokens),
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": not sampling.stop_token_ids,  # True would ignore stop_token_ids, too
            "sampling_seed": self.request.seed,
            "skip_special_tokens": False,
        }
        body: Reply = {
            "rid": f"{self.key}-{attempt}",
            "input_ids": [*self.request.tokens, *self.tokens],
            "sampling_params": params,
            "return_logprob": True,
            "logprob_start_len": -1,  # of sampled tokens only
        }
        if self.decoder:
            body |= {"return_routed_experts": True, "routed_experts_start_len": self.rows}
        return body

    def add(self, reply: Reply, version_of: Any) -> str:
        """Take one answer in; returns its finish reason: stop, length or abort. EngineFailure when it is not consistent.

        `version_of` turns SGLang's version label into ours.
        """
        meta = reply["meta_info"]
        reason = meta["finish_reason"] or {"type": "abort"}
        if reason["type"] == "abort" and reason.get("status_code"):
            raise EngineFailure(f"{self.where}: {reason.get('message')}")
        new = list(reply["output_ids"])
        logprobs = finite_logprobs(meta["output_token_logprobs"], self.where) if new else []
        if len(logprobs) != len(new):
            raise EngineFailure(f"{self.where}: {len(new)} tokens came with {len(logprobs)} logprobs")
        start = len(self.tokens)
        if self.request.conversation and self.request.known_routes:
            self.cached += int(meta.get("cached_tokens") or 0)
        if new and self.decoder:
            rows = len(self.request.tokens) + start + len(new) - 1 - self.rows
            encoded = meta.get("routed_experts")
            if encoded is None and reason["type"] == "abort":  # while it waited to be computed again: these tokens are lost
                return "abort"
            if encoded is None:
                raise RouteError(f"{self.where} has no routes, although router replay is on: the engine recorded none")
            self.routes.append(self._routes(encoded, rows))
            self.rows += rows
        for version, first, last in _spans(meta, len(new)):
            self._extend_span(version_of(version), start + first, start + last)
        self.tokens += new
        self.logprobs += logprobs
        if meta.get("spec_verify_ct"):  # engine steps with drafts; each gives the accepted drafts and one token more
            self.drafts["steps"] += int(meta["spec_verify_ct"])
            self.drafts["accepted"] += int(meta["spec_num_correct_drafts"])
            self.drafts["proposed"] += int(meta["spec_num_proposed_drafts"])
        return str(reason["type"])

    def _routes(self, given: str | RouteRef, rows: int) -> torch.Tensor | RouteRef:
        """Decoded here, unless that was done where the engine is."""
        assert self.decoder is not None
        if isinstance(given, str):
            return self.decoder.decode(given, rows, self.where)
        if len(given) != rows:
            raise RouteError(f"{self.where}: {len(given)} rows of routes came, {rows} tokens have some")
        return given

    def _extend_span(self, version: int, start: int, stop: int) -> None:
        if stop <= start:
            return
        if self.spans and self.spans[-1].version == version:
            self.spans[-1].stop = stop
        else:
            self.spans.append(WeightSpan(version, start, stop))

    def sample(self, status: Status, finish_reason: str) -> Sample:
        logprobs = torch.tensor(self.logprobs, dtype=torch.float32)
        temperature = self.request.sampling.temperature
        tokens = torch.tensor([*self.request.tokens, *self.tokens], dtype=torch.int64)
        return Sample(
            prompt_id=self.request.prompt_id,
            sample_index=self.request.sample_index,
            tokens=tokens,
            response_length=len(self.tokens),
            loss_mask=torch.ones(len(self.tokens), dtype=torch.bool),
            rollout_logprobs=logprobs,
            # SGLang divides logits by the temperature first; at 0 (greedy) and 1 that is the raw distribution
            raw_logprobs=logprobs.clone() if temperature in (0.0, 1.0) else None,
            status=status,
            finish_reason=finish_reason,
            routes=joined(self.routes) if self.routes else None,
            weight_spans=self.spans,
            served=self.served,
        )


def finite_logprobs(entries: list[Any], where: str) -> list[float]:
    """Of SGLang's [logprob, token, text] entries. It answers null for NaN, and goes on generating: EngineFailure."""
    values = [entry[0] for entry in entries]
    if any(value is None or not math.isfinite(value) for value in values):
        raise EngineFailure(f"{where}: a logprob is not a number: the engine computes with NaN or infinite values")
    return [float(value) for value in values]


def _spans(meta: Reply, count: int) -> list[tuple[str, int, int]]:
    """(version label, first token, end) of one answer's tokens."""
    spans = meta.get("weight_versions")
    if not spans:
        return [(meta["weight_version"], 0, count)]
    return [(span["version"], span["start"], span["end"]) if isinstance(span, dict) else tuple(span) for span in spans]
