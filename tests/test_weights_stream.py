"""The sealed weight stream: any change on the way is found and named."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.data import ExportedTensor
from runner.weights.stream import SealedTensor, check, digest, seal, wire_bytes


def _sealed() -> SealedTensor:
    generator = torch.Generator().manual_seed(0)
    parts = {
        "up_proj.weight_packed": torch.randint(-(2**31), 2**31 - 1, (8, 4), dtype=torch.int32, generator=generator),
        "up_proj.weight_scale": torch.rand(8, 1, generator=generator).to(torch.bfloat16),
        "up_proj.weight_shape": torch.tensor([8, 32]),
    }
    return next(seal([ExportedTensor("up_proj.weight", "int4", parts)]))


def test_an_intact_tensor_has_no_problems() -> None:
    assert check(_sealed()) == []


@settings(max_examples=40, deadline=None)
@given(part=st.sampled_from(["up_proj.weight_packed", "up_proj.weight_scale"]), position=st.floats(0, 0.999))
def test_any_flipped_bit_is_found_and_named(part: str, position: float) -> None:
    sealed = _sealed()
    content = sealed.exported.parts[part].view(torch.uint8).flatten()
    bit = int(position * len(content) * 8)
    content[bit // 8] ^= 1 << (bit % 8)
    (problem,) = check(sealed)
    assert problem.startswith(f"{part}: bytes differ")


def test_missing_and_unexpected_parts_are_named() -> None:
    sealed = _sealed()
    del sealed.exported.parts["up_proj.weight_scale"]
    sealed.exported.parts["up_proj.bias"] = torch.zeros(2)
    assert check(sealed) == ["up_proj.weight_scale: did not arrive", "up_proj.bias: arrived without a hash"]


def test_a_digest_is_of_values_shape_and_dtype_not_of_strides() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert digest(matrix.t()) == digest(matrix.t().contiguous())
    assert digest(matrix) != digest(matrix.view(4, 3))
    assert digest(torch.zeros(4)) != digest(torch.zeros(4, dtype=torch.int32))
    assert digest(torch.zeros(2, 2, dtype=torch.float8_e4m3fn)) != digest(torch.zeros(2, 2, dtype=torch.uint8))


def test_wire_bytes() -> None:
    assert wire_bytes(_sealed().exported) == 8 * 4 * 4 + 8 * 2 + 16
