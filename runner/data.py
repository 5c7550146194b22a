"""The data that flows through the loop: Request -> Sample -> Batch.

Shape legend: P prompt tokens, R response tokens, T = P + R, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from runner.models.images import Images
    from runner.routing.reference import RouteRef


class Status(Enum):
    """How a sample ended."""

    completed = "completed"  # a stop token
    truncated = "truncated"  # max_response_tokens or the context was reached
    aborted = "aborted"  # stopped from outside; may be continued
    failed = "failed"  # the engine or the environment failed


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k -1 and top_p 1 leave the distribution whole."""

    temperature: float
    max_response_tokens: int
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One sample to be generated. `seed` = f(run seed, step, prompt, sample): see `request_seed`."""

    prompt_id: str
    sample_index: int
    tokens: tuple[int, ...]  # [P]
    sampling: SamplingParams
    seed: int
    capture_routes: bool = False
    images: Images = ()  # what placeholders among `tokens` stand for; those of the prompt are shared by its samples
    conversation: str = ""  # turns of one conversation share it: an engine may keep what it computed between them
    known_routes: int = 0  # rows of routes that the asker has: only those after them come back


@dataclass
class WeightSpan:
    """Response tokens [start, stop) were sampled from weights of this version."""

    version: int
    start: int
    stop: int


@dataclass
class Sample:
    """A finished (or aborted) generation.

    tokens            [T] prompt and response ids
    response_length   R
    loss_mask         [R] bool; False where a token is not the model's own (an observation of an environment)
    rollout_logprobs  [R] fp32, at the sampling temperature (raw distribution when temperature is 0); 0 outside the mask
    raw_logprobs      [R] fp32, at temperature 1; None where the engine does not give them
    routes            [T - 1, L, K] uint8 (uint16 above 256 experts): row t holds the experts that token t went
                      through when token t + 1 was predicted; None without capture. An engine's answer to a request with
                      `known_routes` begins after those rows
    rewards           the parts of the reward by name, weighted: they add up to it; {} where it has none
    turn_rewards      (response tokens before it, part, value) of what was given after single turns, weighted as the parts are
    images            what placeholders among `tokens` stand for, in their order: the prompt's, which are the same objects in all
                      samples of a prompt, then those of observations
    served            (who, begin, end) of each time that an engine had it, in seconds since the epoch by the driver's clock
    """

    prompt_id: str
    sample_index: int
    tokens: torch.Tensor
    response_length: int
    loss_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    status: Status
    finish_reason: str
    raw_logprobs: torch.Tensor | None = None
    routes: torch.Tensor | RouteRef | None = None
    weight_spans: list[WeightSpan] = field(default_factory=list)
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    turn_rewards: list[tuple[int, str, float]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    images: Images = ()
    served: list[tuple[str, float, float]] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length

    @property
    def response_tokens(self) -> torch.Tensor:
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True)
class Batch:
    """Samples of one rollout with what the update needs, all lists in the order of `samples`.

    advantages        [R] fp32 per sample
    temperature       the trainer divides its logits by it
    old_logprobs      [R] fp32 per sample: the trainer's own, before the update; None: `Trainer.step` computes them
    ref_logprobs      [R] fp32 per sample, of the reference policy; None: computed where there is a KL term
    """

    samples: list[Sample]
    advantages: list[torch.Tensor]
    temperature: float
    old_logprobs: list[torch.Tensor] | None = None
    ref_logprobs: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)

    def select(self, indices: list[int]) -> Batch:
        """The sub-batch of these samples, in this order."""

        def pick(rows: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
            return None if rows is None else [rows[i] for i in indices]

        return Batch(
            samples=[self.samples[i] for i in indices],
            advantages=[self.advantages[i] for i in indices],
            temperature=self.temperature,
            old_logprobs=pick(self.old_logprobs),
            ref_logprobs=pick(self.ref_logprobs),
        )


@dataclass(frozen=True)
class ExportedTensor:
    """One HF weight in the rollout's format, as it travels from trainer to engine and into checkpoints.

    name    the HF on-disk name of the weight, per expert: `model.layers.0.mlp.experts.3.gate_proj.weight`
    format  the name of a format in runner/precision/formats
    parts   on-disk tensor name -> tensor. bf16: {name: [out, in]}. int4: `<module>.weight_packed` int32
            [out, in / 8], `.weight_scale` bf16 [out, in / group], `.weight_shape` int64 [2]. fp8: `<module>.weight`
            float8_e4m3fn, `.weight_scale_inv` fp32 [out / 128, in / 128].
    """

    name: str
    format: str
    parts: dict[str, torch.Tensor]


WeightStream = Iterator[ExportedTensor]


def request_seed(run_seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """63-bit seed of one sample's random stream, independent of batch, engine and Python's hash seed."""
    import hashlib

    text = f"{run_seed}/{step}/{prompt_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
