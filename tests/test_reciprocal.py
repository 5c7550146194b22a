"""Why the Triton kernels divide nowhere: bf16(w * (1 / s)) is bf16(w / s) for every pair that can meet, and the scale that comes
from amax * (1 / 7) is that of amax / 7 for every amax.

The formula here is that of `kernels.gpu._quotients` in torch on the CPU; tests/test_precision_triton.py holds the kernels
themselves against the reference.
"""

from __future__ import annotations

import torch

from runner.config.schema import Convention
from runner.precision import int4


def quotients(weight: torch.Tensor, scale: torch.Tensor, off: int = 0) -> torch.Tensor:
    """As the kernels do it: bf16(weight * shift * (1 / (scale * shift))), the reciprocal `off` units in the last place away."""
    scale = scale.float()
    shift = torch.where(scale < 2.0**-60, 2.0**64, torch.where(scale > 2.0**60, 2.0**-64, 1.0))
    reciprocal = ((1.0 / (scale * shift)).view(torch.int32) + off).view(torch.float32)
    return ((weight.float() * shift) * reciprocal).to(torch.bfloat16)


def test_every_pair_of_significands() -> None:
    """Both have 8 bits (a subnormal number fewer, which is one of these with another exponent): 128 x 128 in each binade of w."""
    significands = torch.arange(128, 256, dtype=torch.float32)
    weight, scale = significands[:, None].bfloat16(), significands[None, :].bfloat16()
    assert torch.equal(weight.float()[:, 0], significands)
    for exponent in range(-6, 7):
        w = (weight.float() * 2.0**exponent).bfloat16()
        for off in range(-3, 4):  # a GPU's fast 1 / x is within 2 units
            assert torch.equal(quotients(w, scale, off), w / scale)


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


def test_the_scale_of_every_amax() -> None:
    """bf16 numbers from 0 to the largest: the product with the rounded reciprocal rounds to the scale that division gives."""
    amax = torch.arange(0x7F80, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)[:, None]
    for convention, divisor, reciprocal in (
        (Convention.exact, 7.0, 0.1428571492433548),
        (Convention.kimi, 7.0, 0.1428571492433548),
        (Convention.llmcompressor, 7.5, 0.13333334028720856),
    ):
        assert float(torch.tensor(1.0) / torch.tensor(divisor)) == reciprocal
        product = (amax.float() * reciprocal).view(torch.int32)
        quotient = (amax.float() / divisor).view(torch.int32)
        keep = 19 if convention is Convention.exact else 16  # bits below the scale's last

        def rounded(bits: torch.Tensor, keep: int = keep) -> torch.Tensor:
            return (bits + (1 << (keep - 1)) - 1 + ((bits >> keep) & 1)) >> keep

        assert torch.equal(rounded(product), rounded(quotient))
