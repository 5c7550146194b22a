"""The export stream with a seal: every part of every tensor carries a hash of its bytes from trainer to engine.

The sender seals what it sends, the receiver checks what arrived, in the packed layout of the checkpoint. A flipped
bit is found and named here; a probe's logprobs would not notice it (one low bit moves an output by less than bf16 noise).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from runner.data import ExportedTensor


@dataclass(frozen=True)
class SealedTensor:
    """`digests`: part name -> 16 hex digits over the part's dtype, shape and bytes, taken by the sender."""

    exported: ExportedTensor
    digests: dict[str, str]


def digest(tensor: torch.Tensor) -> str:
    """xxh3-64 (16 hex digits) of a tensor's dtype, shape and bytes in row-major order; any dtype, any device."""
    host = tensor.detach().cpu().contiguous()
    state = xxhash.xxh3_64()
    state.update(f"{host.dtype}{tuple(host.shape)}".encode())
    content: Any = host.reshape(-1).view(torch.uint8).numpy()  # a buffer, which numpy's types do not say
    state.update(content)
    return state.hexdigest()


def seal(stream: Iterable[ExportedTensor]) -> Iterator[SealedTensor]:
    """Hash every part as it leaves the trainer; one pass, nothing is held back."""
    for exported in stream:
        yield SealedTensor(exported, {name: digest(part) for name, part in exported.parts.items()})


def sealed(stream: Iterable[ExportedTensor | SealedTensor]) -> Iterator[SealedTensor]:
    """Seals what is not sealed yet, as it passes."""
    for item in stream:
        yield item if isinstance(item, SealedTensor) else next(seal([item]))


def check(sealed: SealedTensor) -> list[str]:
    """Problems of one arrived tensor, each naming the part: missing, unexpected or with other bytes than were sent."""
    parts, digests = sealed.exported.parts, sealed.digests
    problems = [f"{name}: did not arrive" for name in digests if name not in parts]
    for name, part in parts.items():
        if name not in digests:
            problems.append(f"{name}: arrived without a hash")
        elif (arrived := digest(part)) != digests[name]:
            problems.append(f"{name}: bytes differ from what the trainer sent (hash {arrived}, expected {digests[name]})")
    return problems


def wire_bytes(exported: ExportedTensor) -> int:
    """Bytes that one tensor takes on the wire."""
    return sum(part.numel() * part.element_size() for part in exported.parts.values())
