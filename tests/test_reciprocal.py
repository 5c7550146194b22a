"""Why the Triton kernels may multiply by a group's reciprocal: bf16(w * (1 / s)) is bf16(w / s), for every pair that can meet.

The formula here is that of `kernels.gpu._quotients` in torch on the CPU; tests/test_precision_triton.py holds the kernels
themselves against the reference.
"""

from __future__ import annotations

import torch

from runner.config.schema import Convention
from runner.precision import int4


def quotients(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As the kernels do it: bf16(weight * shift * (1 / (scale * shift)))."""
    scale = scale.float()
    shift = torch.where(scale < 2.0**-60, 2.0**64, torch.where(scale > 2.0**60, 2.0**-64, 1.0))
    return ((weight.float() * shift) * (1.0 / (scale * shift))).to(torch.bfloat16)


def test_every_pair_of_significands() -> None:
    """Both have 8 bits (a subnormal number fewer, which is one of these with another exponent): 128 x 128 in each binade of w."""
    significands = torch.arange(128, 256, dtype=torch.float32)
    weight, scale = significands[:, None].bfloat16(), significands[None, :].bfloat16()
    assert torch.equal(weight.float()[:, 0], significands)
    for exponent in range(-6, 7):
        w = (weight.float() * 2.0**exponent).bfloat16()
        assert torch.equal(quotients(w, scale), w / scale)


def test_no_quotient_is_where_bf16_turns_and_each_is_far_from_it() -> None:
    """The distance that the proof names, in whole numbers: m * 2^k / n against B / 2^j with B odd and of 9 bits."""
    m, n = torch.arange(128, 256)[:, None, None], torch.arange(128, 256)[None, :, None]
    turns = torch.arange(257, 512, 2)[None, None, :]  # B
    for k in (8, 9):  # m * 2^k / n lies between 2^7 and 2^9 * 2: B's own binade is among them
        distance = (m * 2**k - turns * n).abs()
        assert int(distance.min()) >= 1
        assert float((distance / (m * 2**k)).min()) > 2.0**-18


def test_integers_for_every_scale() -> None:
    """Every positive bf16 scale, subnormal ones too, with all 128 significands from 2^-3 to 2^5 times it, and far away."""
    every = torch.arange(1, 0x7F80, dtype=torch.int32)
    for part in every.split(4096):
        scale = part.to(torch.uint16).view(torch.bfloat16)[:, None]
        exponent = scale.float().log2().floor().double()
        for offset in (-140, -40, -3, -2, -1, 0, 1, 2, 3, 4, 5, 40, 140):
            weight = torch.arange(128, 256).double() / 128 * torch.exp2((exponent + offset).clamp(-133, 127))
            weight = weight.float().bfloat16()
            q = quotients(weight, scale).float().clamp(-8, 7).round().to(torch.int8)
            reference, _ = int4.quantize(weight, -1, Convention.llmcompressor, scale)
            assert torch.equal(q, reference), (int(part[0]), offset)
