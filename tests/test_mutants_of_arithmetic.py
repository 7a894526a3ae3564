"""Wrong lines in the arithmetic: of evenly spaced grids, of codebooks, and of bytes."""

import pytest
from mutants import Mutant, load_checks, modules, must_notice, must_pass

numerics = load_checks("test_numerics")
gradients = load_checks("test_numerics_gradients")
packing = load_checks("test_packing")
codebook = load_checks("test_codebook")
traced = load_checks("test_traced")

NUMERICS = "qat.numerics"
PACKING = "qat.packing"
CODEBOOK = "qat.codebook"
NESTED = "qat.double_quantization"
EXACT = "qat.exact"
# how LSQ's strict mask is applied, on a grid that is symmetric
HARDTANH = "hardtanh_backward(values, ratio, low, high)", "grad_input(values, ratio, low, high,"

MUTANTS = [
    # Forward arithmetic
    Mutant(
        "floor(x + 0.5) for round-half-even",
        NUMERICS,
        "ratio.round_()\n",
        "(ratio + 0.5).floor()\n",
        numerics.check_ties,
    ),
    Mutant(
        "rounding away from zero on ties",
        NUMERICS,
        "ratio.round_()\n",
        "ratio.sign() * (ratio.abs() + 0.5).floor()\n",
        numerics.check_codes,
    ),
    Mutant(
        "x * (1 / s) for x / s",
        NUMERICS,
        "return exact.quotient(values, s), s",
        "return values * (1 / s), s",
        numerics.check_division,
    ),
    Mutant(
        "a reciprocal in float32, compiled",
        EXACT,
        "(a.double() * (1 / b.double())).float()",
        "a * (1 / b)",
        traced.check_quotient,
    ),
    Mutant("clamp missing", NUMERICS, "codes.clamp_(-spec.q_n, spec.q_p).add", "codes.add", numerics.check_codes),
    Mutant(
        "zero keeps its sign",
        NUMERICS,
        "codes.clamp_(-spec.q_n, spec.q_p).add_(0.0)",
        "codes.clamp_(-spec.q_n, spec.q_p)",
        numerics.check_zero_has_no_sign,
    ),
    Mutant(
        "lowest code one too high",
        NUMERICS,
        "codes.clamp_(-spec.q_n, spec.q_p)",
        "codes.clamp_(-spec.q_p, spec.q_p)",
        numerics.check_codes,
    ),
    Mutant(
        "clamp before the zero point",
        NUMERICS,
        "codes = ratio.round_().add",
        "codes = ratio.round_().clamp_(-spec.q_n, spec.q_p).add",
        numerics.check_zero_point,
    ),
    Mutant(
        "zero point added in dequantize",
        NUMERICS,
        "values.sub_(broad",
        "values.add_(broad",
        numerics.check_zero_point,
    ),
    Mutant(
        "scale not rounded to its stored dtype",
        NUMERICS,
        ".clamp_min(MIN_SCALE).to(scale_dtype(spec))",
        ".clamp_min(MIN_SCALE)",
        numerics.check_forward_uses_stored_scale,
    ),
    Mutant(
        "scale truncated to bf16",
        NUMERICS,
        ".clamp_min(MIN_SCALE).to(scale_dtype(spec))",
        ".clamp_min(MIN_SCALE).view(torch.int32).bitwise_and(-65536).view(torch.float32).to(scale_dtype(spec))",
        numerics.check_stored_scale,
    ),
    Mutant(
        "no lower limit of the scale",
        NUMERICS,
        "detach().clamp_min(MIN_SCALE)",
        "detach()",
        numerics.check_stored_scale,
    ),
    Mutant(
        "product rounded in bf16",
        NUMERICS,
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
        numerics.check_codes_of_bf16,
    ),
    Mutant(
        "dequantized through bf16",
        NUMERICS,
        "values.mul_(s).to(dtype)",
        "values.mul_(s).to(torch.bfloat16).to(dtype)",
        numerics.check_dequantize,
    ),
    Mutant(
        "group index transposed",
        NUMERICS,
        "x.contiguous().view(*scale.shape, -1), scale[..., None]",
        "x.reshape(scale.shape[1], scale.shape[0], -1), scale.t()[..., None]",
        numerics.check_codes,
    ),
    Mutant("NaN quantized", NUMERICS, "if not (x.isfinite().all() and", "if not (True and", numerics.check_refuses_nan),
    # Gradients
    Mutant(
        "mask missing",
        NUMERICS,
        "inside(grad, ratio, low, high).to(",
        "grad.to(",
        gradients.check_gradients,
    ),
    Mutant(
        "mask includes the lower bound",
        NUMERICS,
        HARDTANH,
        tuple(line.replace("low, high", "low - 1e-7, high") for line in HARDTANH),
        gradients.check_gradients,
    ),
    Mutant(
        "mask includes the upper bound",
        NUMERICS,
        HARDTANH,
        tuple(line.replace("low, high", "low, high + 1e-7") for line in HARDTANH),
        gradients.check_gradients,
    ),
    Mutant(
        "mask of a zero point includes the lower bound",
        NUMERICS,
        "(ratio > low)",
        "(ratio >= low)",
        gradients.check_bounds_of_a_zero_point,
    ),
    Mutant(
        "mask of a zero point includes the upper bound",
        NUMERICS,
        "(ratio < high)",
        "(ratio <= high)",
        gradients.check_bounds_of_a_zero_point,
    ),
    Mutant(
        "mask of the rounded ratio",
        NUMERICS,
        "ratio.nan_to_num_(math.inf)",
        "ratio, low, high = ratio.round(), low - 0.5, high + 0.5",
        gradients.check_surrogate,
    ),
    Mutant(
        "slope without the ratio",
        NUMERICS,
        "slope = rounded.sub_(inside(ratio, ratio, low, high, out=ratio))",
        "slope = rounded",
        gradients.check_surrogate,
    ),
    Mutant(
        "slope of clipped elements keeps the ratio",
        NUMERICS,
        "rounded.sub_(inside(ratio, ratio, low, high, out=ratio))",
        "rounded.sub_(ratio)",
        gradients.check_gradients,
    ),
    Mutant(
        "clipped elements give the scale no gradient",
        NUMERICS,
        "rounded = ratio.clamp(low, high).round_()",
        "rounded = inside(ratio, ratio, low, high).round_()",
        gradients.check_gradients,
    ),
    Mutant(
        "gradient with the unrounded step size",
        NUMERICS,
        "ratio, _ = _ratio(x, stored_scale(step_size, spec))",
        "ratio, _ = _ratio(x, step_size)",
        gradients.check_surrogate,
    ),
    Mutant(
        "scale gradient summed in bf16",
        NUMERICS,
        "slope.mul_(grad)",
        "grad_output.reshape(slope.shape) * slope.to(grad_output.dtype)",
        gradients.check_bf16_gradients,
    ),
    Mutant(
        "gradient scale dropped",
        NUMERICS,
        "(total.reshape(step_size.shape) * grad_scale)",
        "(total.reshape(step_size.shape))",
        gradients.check_gradients,
    ),
    Mutant(
        "a third tensor saved",
        NUMERICS,
        ("ctx.save_for_backward(x, step_size, zero_point)", "x, step_size, zero_point = ctx.saved_tensors"),
        ("ctx.save_for_backward(x, step_size, x / 2)", "x, step_size, zero_point = *ctx.saved_tensors[:2], None"),
        gradients.check_saved_tensors,
    ),
    # Codebooks
    Mutant(
        "a tie takes the upper level",
        CODEBOOK,
        "out_int32=True)\n    else",
        "out_int32=True, right=True)\n    else",
        codebook.check_by_hand,
    ),
    Mutant(
        "bounds at levels", CODEBOOK, "(levels[:, :-1] + levels[:, 1:]) / 2", "levels[:, 1:]", codebook.check_by_hand
    ),
    Mutant("the largest value, not magnitude", CODEBOOK, ".abs().amax(-1)", ".amax(-1)", codebook.check_by_hand),
    Mutant(
        "x / s for x * (1 / s)",
        CODEBOOK,
        "* factor[..., None]",
        "/ scale.to(working)[..., None]",
        codebook.check_reciprocal,
    ),
    Mutant("a level of NF4 rounded", CODEBOOK, "0.33791524171829224", "0.3379", codebook.check_levels_of_nf4),
    Mutant("1 / 0 for a block of zeros", CODEBOOK, ".clamp_min(SMALLEST)", "", codebook.check_zeros),
    Mutant("the first row's levels for all", CODEBOOK, "one = len(table) == 1", "one = True", codebook.check_rows),
    Mutant(
        "the gradient halved",
        CODEBOOK,
        "return grad_output, None, None, None",
        "return grad_output / 2, None, None, None",
        codebook.check_gradient,
    ),
    Mutant("the offset forgotten", NESTED, "(values + self.offset)", "values", codebook.check_nested),
    Mutant(
        "a factor for all scales", NESTED, ".amax(-1)\n", ".amax(-1) * 0 + blocks.abs().amax()\n", codebook.check_nested
    ),
    Mutant("a nested tie goes up", NESTED, "out_int32=True)", "out_int32=True, right=True)", codebook.check_nested),
    # Packing
    Mutant(
        "nibbles swapped, both ways",
        PACKING,
        ("<< (bits * position)\n    return packed", "unsigned[..., 0].clone()", "(packed >> (bits * position))"),
        (
            "<< (bits * (per_byte - 1 - position))\n    return packed",
            "unsigned[..., 0] << (bits * (per_byte - 1))",
            "(packed >> (bits * (8 // bits - 1 - position)))",
        ),
        packing.check_bytes,
    ),
    Mutant(
        "nibbles swapped when unpacking",
        PACKING,
        "(packed >> (bits * position))",
        "(packed >> (bits * (8 // bits - 1 - position)))",
        packing.check_unpacks_bytes,
    ),
    Mutant(
        "two's complement codes",
        PACKING,
        "codes.to(torch.int16) + _offset(bits, lowest)",
        "codes.to(torch.int16) & (2**bits - 1)",
        packing.check_bytes,
    ),
    Mutant(
        "rows rounded down to bytes",
        PACKING,
        "return -(-columns * bits // 8)",
        "return columns * bits // 8",
        packing.check_row_bytes,
    ),
    Mutant(
        "3-bit stream big-endian",
        PACKING,
        "((word >> (8 * byte)) & 255)",
        "((word >> (8 * (bits - 1 - byte))) & 255)",
        packing.check_bytes,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong for mutant in MUTANTS])
def test_the_check_notices(monkeypatch, mutant):
    must_notice(monkeypatch, mutant)


@pytest.mark.parametrize("module", modules(MUTANTS))
def test_a_faithful_copy_passes_every_check(monkeypatch, module):
    must_pass(monkeypatch, module, MUTANTS)
