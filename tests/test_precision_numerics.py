"""INT4, INT8, FP8 and FP4 against compressed-tensors as an oracle, and the properties that QAT rests on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config.schema import Convention, Role
from runner.data import ExportedTensor
from runner.errors import UserError
from runner.models import Parameter
from runner.precision import fp4, fp8, int4
from runner.precision.codec import (
    TensorFormat,
    decode,
    encode,
    encode_all,
    integers,
    quantize_dequantize,
    quantize_dequantize_,
)
from runner.precision.plan import PrecisionPlan

ALL_FORMATS = [
    *(TensorFormat.int4(group, convention) for group in (32, -1) for convention in Convention),
    TensorFormat.int8(64, Convention.kimi),
    TensorFormat.int8(-1, Convention.llmcompressor),
    TensorFormat.fp8(),
    TensorFormat.fp8("channel"),
    TensorFormat.fp8("tensor"),
    TensorFormat.mxfp4(),
    TensorFormat.nvfp4(),
]
TRAINABLE = [tensor_format for tensor_format in ALL_FORMATS if tensor_format.format != "int8"]
every_trainable_format = pytest.mark.parametrize("tensor_format", TRAINABLE, ids=str)
every_format = pytest.mark.parametrize("tensor_format", ALL_FORMATS, ids=str)


def random_weight(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def spread_weight(rows: int, columns: int) -> torch.Tensor:
    """Rows of very different size, among them zero rows and single outliers."""
    weight = random_weight(rows, columns, seed=3).float() * (2.0 ** torch.randint(-20, 21, (rows, 1))).float()
    weight[1] = 0.0
    weight[2, : columns // 2] = 0.0
    weight[3, 5] = 100.0
    return weight.bfloat16()


def all_finite_bf16() -> torch.Tensor:
    """Every positive finite bf16, subnormals included."""
    return torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


# -- compressed-tensors as an oracle ---------------------------------------------------------------------------------


def oracle_scheme(tensor_format: TensorFormat) -> QuantizationScheme:
    fmt = tensor_format.format
    if fmt in ("mxfp4", "nvfp4"):
        return preset_name_to_scheme("MXFP4A16" if fmt == "mxfp4" else "NVFP4A16", ["Linear"])
    kind: dict[str, Any] = {"num_bits": tensor_format.bits, "type": "float" if fmt == "fp8" else "int", "symmetric": True}
    kind["strategy"] = tensor_format.strategy
    if tensor_format.strategy == "group":
        kind["group_size"] = tensor_format.group_size
    if tensor_format.strategy == "block":
        kind["block_structure"] = [128, 128]
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**kind))


def oracle_amax(weight: torch.Tensor, tensor_format: TensorFormat) -> torch.Tensor:
    """amax of what shares a scale, by plain loops, so that no code is shared with what is tested."""
    rows, columns = weight.shape
    match tensor_format.strategy:
        case "tensor":
            return weight.abs().max().reshape(1)
        case "channel":
            return weight.abs().amax(1, keepdim=True)
        case "group":
            size = tensor_format.group_size
            return torch.stack([weight[:, i : i + size].abs().amax(1) for i in range(0, columns, size)], 1)
    blocks = [[weight[r : r + 128, c : c + 128].abs().max() for c in range(0, columns, 128)] for r in range(0, rows, 128)]
    return torch.stack([torch.stack(row) for row in blocks])


@pytest.mark.parametrize("weight", [random_weight(256, 512), spread_weight(256, 512)], ids=["normal", "spread"])
@pytest.mark.parametrize(
    "tensor_format", [f for f in ALL_FORMATS if f.convention in (None, Convention.llmcompressor)] + [
        TensorFormat.int4(group, Convention.llmcompressor) for group in (16, 64, 128, 256)
    ], ids=str,
)  # fmt: skip
def test_same_bits_as_compressed_tensors(tensor_format: TensorFormat, weight: torch.Tensor) -> None:
    """Scales, packed integers and decompressed weights, from its own observers' arithmetic and its own compressor."""
    scheme = oracle_scheme(tensor_format)
    args = scheme.weights
    amax = oracle_amax(weight, tensor_format)
    amax = amax.float() if tensor_format.format == "fp8" else amax  # Hopper recipes keep fp32 scales
    state: dict[str, torch.Tensor] = {"weight": weight}
    if tensor_format.format == "nvfp4":
        state["weight_global_scale"] = generate_gparam(-weight.abs().max(), weight.abs().max())
    state["weight_scale"], _ = calculate_qparams(-amax, amax, args, global_scale=state.get("weight_global_scale"))
    formats = {"int4": "pack-quantized", "int8": "pack-quantized", "fp8": "naive-quantized"}
    name = formats.get(tensor_format.format, f"{tensor_format.format}-pack-quantized")
    compressor = BaseCompressor.get_value_from_registry(name)
    compressed = compressor.compress(state, scheme)
    effective = compressor.decompress(dict(compressed), scheme)["weight"].to(torch.bfloat16)

    ours = encode("m.weight", weight, tensor_format)
    mine = {key.removeprefix("m."): value for key, value in ours.parts.items()}
    if "weight_scale_inv" in mine:
        mine["weight_scale"] = mine.pop("weight_scale_inv")
    assert set(mine) == set(compressed)
    for key, value in compressed.items():
        expected = value.to(mine[key].dtype) if key == "weight_scale" else value
        assert torch.equal(bits(mine[key]), bits(expected.data)), key
    assert torch.equal(decode(ours, tensor_format), effective)


@pytest.mark.parametrize("convention", list(Convention))
def test_compressed_tensors_agrees_on_integers_for_given_scales(convention: Convention) -> None:
    """It has no `exact` or `kimi` observer, but given the scales, its integers and effective weights are ours."""
    weight = spread_weight(64, 256)
    q, scale = int4.quantize(weight, 32, convention)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    theirs = ct_quantize(weight, scale, zero, args, dtype=torch.int8)
    assert torch.equal(theirs.clamp(*int4.integer_range(convention)), q)
    assert torch.equal(ct_dequantize(q, scale, zero, args), int4.dequantize(q, scale))


def test_kimi_scales_are_bf16_of_amax_over_seven() -> None:
    amax = all_finite_bf16()
    expected = (amax.float() / 7.0).to(torch.bfloat16)
    scale = int4.scales_from_amax(amax, Convention.kimi)
    assert torch.equal(scale[expected > 0], expected[expected > 0])
    assert (scale[expected == 0] == int4.ZERO_GROUP_SCALE).all()


def test_asymmetric_checkpoints_are_read_as_compressed_tensors_reads_them() -> None:
    weight = random_weight(64, 128) + 0.01
    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    grouped = weight.unflatten(1, (-1, 32))
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    compressed = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(compressed), scheme)["weight"]
    exported = ExportedTensor("m.weight", "int4", {f"m.{key}": value for key, value in compressed.items()})
    foreign = TensorFormat("int4", 32, None, "group", symmetric=False)
    assert torch.equal(decode(exported, foreign), expected)
    assert zero_point.abs().max() > 0
    with pytest.raises(UserError, match="can be read but not written"):
        encode("m.weight", weight, foreign)


# -- properties -------------------------------------------------------------------------------------------------------


def test_every_product_under_exact_is_exact_in_bf16() -> None:
    """All bf16 amax: q * scale needs no rounding, so kernels that round products and those that do not agree."""
    scale = int4.scales_from_amax(all_finite_bf16(), Convention.exact).double().unsqueeze(1)
    products = scale * torch.arange(-7, 8).double()
    assert torch.equal(products.to(torch.bfloat16).double(), products)


def test_products_under_kimi_are_not_all_exact() -> None:
    """The test above can fail: another convention fails it."""
    scale = int4.scales_from_amax(all_finite_bf16(), Convention.kimi).double().unsqueeze(1)
    products = scale * torch.arange(-7, 8).double()
    assert (products.to(torch.bfloat16).double() != products).float().mean() > 0.1


@pytest.mark.parametrize("convention", [Convention.exact, Convention.kimi])
def test_largest_weight_keeps_its_grid(convention: Convention) -> None:
    """Re-deriving the scale from dequantized weights gives the same scale, for all normal scales."""
    amax = all_finite_bf16()
    scale = int4.scales_from_amax(amax, convention)
    normal = (scale >= torch.finfo(torch.bfloat16).tiny) & torch.isfinite(scale * 7) & (amax > int4.BF16_MAX * 2.0**-250)
    again = int4.scales_from_amax((scale * 7).to(torch.bfloat16), convention)
    assert (again[normal] != scale[normal]).sum() == 0


@every_trainable_format
def test_kept_scales_make_requantization_a_no_op(tensor_format: TensorFormat) -> None:
    weight = torch.stack([spread_weight(256, 256), random_weight(256, 256)])
    effective, scales = quantize_dequantize(weight, tensor_format)
    again, _ = quantize_dequantize(effective, tensor_format, scales)
    assert torch.equal(again, effective)


@every_trainable_format
def test_export_after_in_place_quantization_has_the_integers_of_the_master(tensor_format: TensorFormat) -> None:
    """The closed loop of QAT: encode(master) == encode(effective weight, kept scales), part by part."""
    master = spread_weight(128, 256)
    direct = encode("m.weight", master, tensor_format)
    weight = master.clone()
    scales = quantize_dequantize_(weight, tensor_format)
    through = encode("m.weight", weight, tensor_format, scales)
    assert direct.parts.keys() == through.parts.keys()
    for key, value in direct.parts.items():
        assert torch.equal(bits(value), bits(through.parts[key])), key
    assert torch.equal(decode(through, tensor_format), weight)


@every_format
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-60, 60))
def test_error_bound_per_group(tensor_format: TensorFormat, seed: int, exponent: int) -> None:
    """|w - effective| stays within half a step of the grid, plus the roundings of quotient, scale and product."""
    weight = random_weight(16, 256, seed=seed, scale=2.0**exponent)
    effective, _ = quantize_dequantize(weight, tensor_format)
    error = (weight.double() - effective.double()).abs()
    size = weight.shape[1] if tensor_format.group_size in (-1, 0) else tensor_format.group_size
    groups = weight.double().abs().unflatten(1, (-1, size))
    amax = groups.amax(-1, keepdim=True)
    if tensor_format.strategy in ("block", "tensor"):
        amax = amax.max() if tensor_format.strategy == "tensor" else groups.amax((0, 2), keepdim=True)
    largest = 2 ** (tensor_format.bits - 1) - 1
    match tensor_format.format:
        case "int4" | "int8":
            # half a step, the scale's relative rounding (2^-5 with 5 bits, else 2^-8) at the group's largest weight,
            # and bf16's rounding of quotient and product
            scale_rounding = 2.0**-5 if tensor_format.convention is Convention.exact else 2.0**-8
            bound = amax * (0.5 / largest * (1 + scale_rounding) + scale_rounding + 2 * 2.0**-8)
        case "fp8":  # 3 mantissa bits; below 2^-6 steps of 2^-9; the product's rounding
            bound = groups * (2.0**-4 + 2.0**-8) + amax / 448 * 2.0**-10
        case _:  # steps up to 2 between 4 and 6, in units of amax / 6; a scale rounded down clamps its largest weights
            bound = amax * (1.0 / 4.0)
    assert (error.unflatten(1, (-1, size)) <= bound).all()


@pytest.mark.parametrize("bits_", [4, 8])
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_pack_and_unpack_are_inverse(bits_: int, rows: int, columns: int, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    half = 2 ** (bits_ - 1)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-half, half, (2, rows, columns), generator=generator, dtype=torch.int8)
    packed = int4.pack(q, bits_)
    assert torch.equal(int4.unpack(packed, columns, bits_), q)
    assert torch.equal(packed[1], pack_to_int32(q[1], bits_))
    assert torch.equal(unpack_from_int32(packed[1], bits_, q[1].shape), q[1])
    along_rows = pack_to_int32(q[1], bits_, packed_dim=0)  # zero points
    assert torch.equal(int4.unpack(along_rows, rows, bits_, dim=-2), q[1])


def test_fp4_codes_and_bytes_are_those_of_compressed_tensors() -> None:
    """All 16 values in all pairs, and every byte back."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8

    values = fp4.decode_fp4(torch.arange(16, dtype=torch.uint8))
    pairs = torch.cartesian_prod(values, values)
    packed = fp4.pack(fp4.encode_fp4(pairs))
    assert torch.equal(packed, pack_fp4_to_uint8(pairs)) and len(packed.unique()) == 256
    every = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    assert torch.equal(fp4.decode_fp4(fp4.unpack(every)), unpack_fp4_from_uint8(every, 256, 2, dtype=torch.float32))


def test_integers_in_memory_are_what_was_packed() -> None:
    weight = random_weight(32, 128)
    exported = encode("m.weight", weight, TensorFormat.int4(32, Convention.exact))
    q, _ = int4.quantize(weight, 32, Convention.exact)
    assert torch.equal(integers(exported, TensorFormat.int4(32, Convention.exact)), q)


@every_format
def test_stacked_experts_equal_one_by_one(tensor_format: TensorFormat) -> None:
    stack = torch.stack([random_weight(256, 256, seed=i, scale=0.01 * (i + 1)) for i in range(3)])
    effective, scales = quantize_dequantize(stack, tensor_format)
    for i in range(3):
        one, one_scales = quantize_dequantize(stack[i], tensor_format)
        assert torch.equal(effective[i], one)
        assert torch.equal(bits(scales.scale[i]), bits(one_scales.scale))


FUSED = ["m.gate_proj.weight", "m.up_proj.weight"]


def fused_plan() -> PrecisionPlan:
    parameters = {name: Parameter(name, Role.dense_mlp, (64, 256), fused="m.gate_up_proj") for name in FUSED}
    parameters["m.down_proj.weight"] = Parameter("m.down_proj.weight", Role.dense_mlp, (64, 256))
    return PrecisionPlan(dict.fromkeys(parameters, TensorFormat.nvfp4()), parameters)


@pytest.mark.parametrize("size", [0.0, 0.01, 3.0])
def test_weights_that_engines_fuse_share_their_nvfp4_global_scale(size: float) -> None:
    """Together they have the scales and codes of the two stacked into one matrix, whatever the other one's size is."""
    gate, up, down = (random_weight(64, 256, seed=seed) for seed in range(3))
    weights = {FUSED[0]: gate, "m.down_proj.weight": down, FUSED[1]: (up.float() * size).bfloat16()}
    encoded = {exported.name: exported for exported in encode_all(weights.items(), fused_plan())}
    whole = encode("m.weight", torch.cat([weights[name] for name in FUSED]), TensorFormat.nvfp4()).parts
    for start, name in zip((0, 64), FUSED, strict=True):
        parts = encoded[name].parts
        assert torch.equal(parts[f"{name}_global_scale"], whole["m.weight_global_scale"])
        for part in ("packed", "scale"):
            assert torch.equal(bits(parts[f"{name}_{part}"]), bits(whole[f"m.weight_{part}"][start : start + 64]))
    alone = encode("m.down_proj.weight", down, TensorFormat.nvfp4())
    assert all(torch.equal(bits(part), bits(encoded["m.down_proj.weight"].parts[key])) for key, part in alone.parts.items())


def test_fused_weights_that_are_bad_or_missing_are_named() -> None:
    gate, up = random_weight(64, 256), random_weight(64, 256)
    with pytest.raises(UserError, match=r"m\.gate_proj\.weight: what shares a global scale with it is missing"):
        list(encode_all([(FUSED[0], gate)], fused_plan()))
    up[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"m\.up_proj\.weight: holds NaN"):
        list(encode_all(zip(FUSED, (gate, up), strict=True), fused_plan()))


@every_format
def test_all_zero_weights_give_zeros_and_finite_scales(tensor_format: TensorFormat) -> None:
    weight = torch.zeros(128, 256, dtype=torch.bfloat16)
    effective, scales = quantize_dequantize(weight, tensor_format)
    assert torch.count_nonzero(effective) == 0
    assert torch.isfinite(scales.scale.float()).all()
    assert torch.count_nonzero(decode(encode("m.weight", weight, tensor_format), tensor_format)) == 0


@every_format
def test_subnormal_weights_stay_finite_and_do_not_grow(tensor_format: TensorFormat) -> None:
    weight = (torch.arange(-128, 128).float() * 2.0**-133).bfloat16().repeat(128, 1)
    effective, _ = quantize_dequantize(weight, tensor_format)
    assert torch.isfinite(effective.float()).all()
    assert effective.float().abs().max() <= weight.float().abs().max() * 1.2


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_weights_are_an_error_naming_the_tensor(tensor_format: TensorFormat, bad: float) -> None:
    weight = random_weight(128, 256)
    weight[100, 200] = bad
    name = "model.layers.3.mlp.experts.7.down_proj.weight"
    with pytest.raises(UserError, match=f"{name}: holds (NaN|infinite)"):
        encode(name, weight, tensor_format)
    with pytest.raises(UserError, match=name):
        quantize_dequantize_(weight, tensor_format, name)


@every_format
def test_non_contiguous_and_fp32_inputs(tensor_format: TensorFormat) -> None:
    base = random_weight(256, 384)
    for weight in (base.t()[:, :256], base[:, ::2][:, :128], base[1::2, 128:].float()):
        direct, _ = quantize_dequantize(weight.contiguous().bfloat16(), tensor_format)
        assert torch.equal(quantize_dequantize(weight, tensor_format)[0], direct)
        changed = weight.clone(memory_format=torch.preserve_format)
        quantize_dequantize_(changed, tensor_format)
        assert changed.dtype is weight.dtype and torch.equal(changed.bfloat16(), direct)


def test_masters_are_rounded_to_bf16_before_anything_else() -> None:
    master = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)) * 0.02
    for tensor_format in ALL_FORMATS:
        a, b = encode("m.weight", master, tensor_format), encode("m.weight", master.bfloat16(), tensor_format)
        assert all(torch.equal(bits(a.parts[key]), bits(b.parts[key])) for key in a.parts)


@pytest.mark.parametrize("shape", [(130, 200), (1, 128), (127, 129), (300, 5)])
def test_fp8_blocks_at_the_border(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    q, scale = fp8.quantize(weight)
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    padded = torch.zeros(-(-shape[0] // 128) * 128, -(-shape[1] // 128) * 128, dtype=torch.bfloat16)
    padded[: shape[0], : shape[1]] = weight
    whole, whole_scale = fp8.quantize(padded)
    assert torch.equal(scale, whole_scale)
    assert torch.equal(bits(q), bits(whole[: shape[0], : shape[1]]))


def test_fp8_activations_share_a_scale_per_token_and_group() -> None:
    x = random_weight(3, 5, 300, scale=2.0)
    q, scale = fp8.quantize_activations(x)
    assert q.shape == x.shape and scale.shape == (3, 5, 3)
    for group in range(3):
        part = x[..., group * 128 : (group + 1) * 128].float()
        assert torch.equal(scale[..., group], part.abs().amax(-1) / 448)
    error = (fp8.quantize_dequantize_activations(x).float() - x.float()).abs()
    assert (error <= x.float().abs() * (2.0**-4 + 2.0**-8) + scale.repeat_interleave(128, -1)[..., :300] * 2.0**-10).all()


def test_groups_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(UserError, match=r"m\.weight: in dimension 100 is not a multiple of group_size 32"):
        encode("m.weight", random_weight(8, 100), TensorFormat.int4(32, Convention.exact))
    with pytest.raises(UserError, match="group_size 48"):
        TensorFormat.int4(48, Convention.exact)
    with pytest.raises(UserError, match="exact does not exist for int8"):
        TensorFormat.int8(32, Convention.exact)


def test_decode_refuses_another_format_and_missing_parts() -> None:
    exported = encode("m.weight", random_weight(32, 64), TensorFormat.int4(32, Convention.exact))
    with pytest.raises(UserError, match="arrived as int4, the plan says"):
        decode(exported, TensorFormat.fp8())
    del exported.parts["m.weight_shape"]
    with pytest.raises(UserError, match=r"m\.weight_shape"):
        decode(exported, TensorFormat.int4(32, Convention.exact))
