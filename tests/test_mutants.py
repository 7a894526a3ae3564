"""Each check of the core can fail: it does so on a copy of the module with one line made wrong.

A mutant is a module's source with one substitution, executed under the module's own package. Its text must occur
exactly once: when the source moves on, the mutant fails until it is brought along. Unchanged copies pass every check.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import qat.layers.conv
import qat.layers.embedding
import qat.layers.linear
import qat.layers.packed

TESTS = Path(__file__).parent


def load_checks(name):
    """Import tests/<name>.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(f"checks_of_{name}", TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


numerics, lsq, packing = load_checks("test_numerics"), load_checks("test_lsq"), load_checks("test_packing")
policy, surgery, calibration = load_checks("test_policy"), load_checks("test_surgery"), load_checks("test_calibration")
freezing, layers, codebook = load_checks("test_freezing"), load_checks("test_layers"), load_checks("test_codebook")
embedding, traced = load_checks("test_embedding"), load_checks("test_traced")

NUMERICS, LSQ, PACKING = "qat.numerics", "qat.quantizers.lsq", "qat.packing"
POLICY, SURGERY, CALIBRATION = "qat.policy", "qat.surgery", "qat.calibration"
FREEZING, LINEAR, CONV = "qat.freezing", "qat.layers.linear", "qat.layers.conv"
PACKED, CPU_INT4 = "qat.layers.packed", "qat.layers.cpu_int4"
CODEBOOK, NESTED = "qat.codebook", "qat.double_quantization"
EMBEDDING, EXACT = "qat.layers.embedding", "qat.exact"


class Mutant(NamedTuple):
    """A wrong line, and the check that notices."""

    wrong: str
    module: str
    text: str | tuple[str, ...]
    replacement: str | tuple[str, ...]
    check: Callable[[types.ModuleType], None]


MUTANTS = [
    # Forward arithmetic
    Mutant(
        "floor(x + 0.5) for round-half-even",
        NUMERICS,
        "ratio.round()\n",
        "(ratio + 0.5).floor()\n",
        numerics.check_ties,
    ),
    Mutant(
        "rounding away from zero on ties",
        NUMERICS,
        "ratio.round()\n",
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
    Mutant("clamp missing", NUMERICS, "codes.clamp(-spec.q_n, spec.q_p) + 0.0", "codes + 0.0", numerics.check_codes),
    Mutant(
        "zero keeps its sign",
        NUMERICS,
        "codes.clamp(-spec.q_n, spec.q_p) + 0.0",
        "codes.clamp(-spec.q_n, spec.q_p)",
        numerics.check_zero_has_no_sign,
    ),
    Mutant(
        "lowest code one too high",
        NUMERICS,
        "codes.clamp(-spec.q_n, spec.q_p)",
        "codes.clamp(-spec.q_p, spec.q_p)",
        numerics.check_codes,
    ),
    Mutant(
        "clamp before the zero point",
        NUMERICS,
        "    codes = ratio.round()\n",
        "    codes = ratio.round().clamp(-spec.q_n, spec.q_p)\n",
        numerics.check_zero_point,
    ),
    Mutant(
        "zero point added in dequantize",
        NUMERICS,
        "values = values - _broad",
        "values = values + _broad",
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
        "(values * s).to(dtype)",
        "(values * s).to(torch.bfloat16).to(dtype)",
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
        "grad_output.masked_fill(~inside.reshape(x.shape), 0)",
        "grad_output",
        numerics.check_gradients,
    ),
    Mutant(
        "mask includes the lower bound",
        NUMERICS,
        "(ratio > low)",
        "(ratio >= low)",
        numerics.check_gradients,
    ),
    Mutant("mask includes the upper bound", NUMERICS, "(ratio < high)", "(ratio <= high)", numerics.check_gradients),
    Mutant(
        "mask of the rounded ratio",
        NUMERICS,
        "inside = (ratio > low) & (ratio < high)",
        "inside = (ratio.round() >= low) & (ratio.round() <= high)",
        numerics.check_surrogate,
    ),
    Mutant(
        "slope without the ratio",
        NUMERICS,
        ".round() - ratio.masked_fill(~inside, 0)",
        ".round()",
        numerics.check_surrogate,
    ),
    Mutant(
        "slope of clipped elements keeps the ratio",
        NUMERICS,
        "- ratio.masked_fill(~inside, 0)",
        "- ratio",
        numerics.check_gradients,
    ),
    Mutant(
        "clipped elements give the scale no gradient",
        NUMERICS,
        "slope = ratio.clamp(low, high).round()",
        "slope = ratio.masked_fill(~inside, 0).round()",
        numerics.check_gradients,
    ),
    Mutant(
        "gradient with the unrounded step size",
        NUMERICS,
        "ratio, _ = _ratio(x, stored_scale(step_size, spec))",
        "ratio, _ = _ratio(x, step_size)",
        numerics.check_surrogate,
    ),
    Mutant(
        "scale gradient summed in bf16",
        NUMERICS,
        "terms = grad_output.to(slope.dtype).reshape(slope.shape) * slope",
        "terms = grad_output.reshape(slope.shape) * slope.to(grad_output.dtype)",
        numerics.check_bf16_gradients,
    ),
    Mutant(
        "gradient scale dropped",
        NUMERICS,
        "(total.reshape(step_size.shape) * grad_scale)",
        "(total.reshape(step_size.shape))",
        numerics.check_gradients,
    ),
    Mutant(
        "a third tensor saved",
        NUMERICS,
        ("ctx.save_for_backward(x, step_size)", "x, step_size = ctx.saved_tensors"),
        ("ctx.save_for_backward(x, step_size, x / 2)", "x, step_size, _ = ctx.saved_tensors"),
        numerics.check_saved_tensors,
    ),
    # LSQ
    Mutant(
        "N of the whole tensor",
        LSQ,
        "weight.numel() // self.step_size.numel()",
        "weight.numel()",
        lsq.check_weight_gradient_scale,
    ),
    Mutant(
        "N counts the batch",
        LSQ,
        "x.numel() // x.shape[0] if x.dim() > 1",
        "x.numel() if x.dim() > 1",
        lsq.check_activation_gradient_scale,
    ),
    Mutant(
        "N is the last axis",
        LSQ,
        "x.numel() // x.shape[0] if x.dim() > 1",
        "x.shape[-1] if x.dim() > 1",
        lsq.check_activation_gradient_scale,
    ),
    Mutant(
        "Q_N in the weights' gradient scale",
        LSQ,
        "self.step_size.numel() * self.spec.q_p)",
        "self.step_size.numel() * self.spec.q_n)",
        lsq.check_weight_gradient_scale,
    ),
    Mutant(
        "fixed Q_P in the inputs' gradient scale",
        LSQ,
        "math.sqrt(features(x) * self.spec.q_p)",
        "math.sqrt(features(x) * 7)",
        lsq.check_unsigned_gradient_scale,
    ),
    Mutant(
        "no Q_P in the gradient scale",
        LSQ,
        "math.sqrt(features(x) * self.spec.q_p)",
        "math.sqrt(features(x))",
        lsq.check_activation_gradient_scale,
    ),
    Mutant(
        "weights start at the maximum",
        LSQ,
        "lsq_step_size(magnitude.mean(-1), spec)",
        "lsq_step_size(magnitude.amax(-1), spec)",
        lsq.check_weight_start,
    ),
    Mutant(
        "weights start without the factor 2",
        LSQ,
        "return 2 * mean_magnitude",
        "return mean_magnitude",
        lsq.check_weight_start,
    ),
    Mutant(
        "start divided by Q_P, not its root", LSQ, "/ math.sqrt(spec.q_p)\n", "/ spec.q_p\n", lsq.check_weight_start
    ),
    Mutant(
        "weights start from the mean, not the mean magnitude",
        LSQ,
        "weight.detach().abs().float()",
        "weight.detach().float()",
        lsq.check_weight_start,
    ),
    Mutant(
        "inputs start from the last batch",
        LSQ,
        "self.sums += torch.stack",
        "self.sums = torch.stack",
        lsq.check_activation_start,
    ),
    Mutant("sign detection inverted", LSQ, "negative > 0 if", "negative <= 0 if", lsq.check_sign_detection),
    Mutant(
        "sign detected from the last batch",
        LSQ,
        "self.extremes = self.extremes.maximum(",
        "self.extremes = torch.zeros_like(self.extremes).maximum(",
        lsq.check_sign_detection,
    ),
    Mutant(
        "a given sign ignored",
        LSQ,
        "negative > 0 if self.spec.signed is None else self.spec.signed",
        "negative > 0",
        lsq.check_sign_detection,
    ),
    Mutant("sign not saved", LSQ, "self.signed.fill_(signed)", "pass", lsq.check_sign_detection),
    Mutant("project missing", LSQ, "self.step_size.clamp_(min=MIN_SCALE)", "pass", lsq.check_project),
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
    # Policy
    Mutant(
        "the first rule wins",
        POLICY,
        "winners[index], matched = rule, True",
        "winners[index], matched = winners[index] or rule, True",
        policy.check_last_rule_wins,
    ),
    Mutant(
        "a rule's fields replace the whole spec",
        POLICY,
        "return base.override(value)",
        "return QuantSpec(**value)",
        policy.check_merging,
    ),
    Mutant(
        "a rule that leaves inputs out turns them off",
        POLICY,
        'if "activation" in rule:',
        "if True:\n                rule = {'activation': None, **rule}",
        policy.check_merging,
    ),
    Mutant("regular expressions match a part", POLICY, "re.fullmatch(", "re.search(", policy.check_patterns),
    Mutant(
        "@last counts every layer",
        POLICY,
        "for name, _, can in layers if can]",
        "for name, _, can in layers]",
        policy.check_patterns,
    ),
    Mutant("a rule may match nothing", POLICY, "if not matched:", "if False:", policy.check_every_rule_must_match),
    # Surgery
    Mutant(
        "tied weights get a quantizer each",
        SURGERY,
        "weight = weight_quantizers.get(id(layer.weight))",
        "weight = None",
        surgery.check_ties,
    ),
    Mutant(
        "the first bad shape hides the others",
        SURGERY,
        'problems.append(f"{decision.name!r}: {error}")',
        'problems[:] = problems or [f"{decision.name!r}: {error}"]',
        surgery.check_shapes_that_do_not_fit,
    ),
    Mutant(
        "shapes that do not fit are skipped",
        SURGERY,
        "        check_shapes(decisions)\n        _require_any",
        "        _require_any",
        surgery.check_shapes_that_do_not_fit,
    ),
    Mutant(
        "inputs follow the policy, not the rule",
        SURGERY,
        "activation_quantizer(decision, policy.init,",
        "activation_quantizer(Decision(decision.name, decision.layer, None, policy.activation), policy.init,",
        surgery.check_rules,
    ),
    Mutant("prepared twice", SURGERY, "if is_prepared(model) or", "if", surgery.check_prepared_twice),
    Mutant(
        "layers left alone are not printed",
        SURGERY,
        "[(name, layer) for name, layer in unwrapped(model).named_modules() if _holds_matrix(layer)]",
        "[(name, layer) for name, layer in unwrapped(model).named_modules() if type(layer) in (nn.Linear, nn.Conv2d)]",
        surgery.check_table,
    ),
    Mutant(
        "scales cost nothing",
        SURGERY,
        "bits = decision.weight.bits + parameter_bits(shape, decision.weight) / weights",
        "bits = float(decision.weight.bits)",
        surgery.check_table,
    ),
    # Calibration
    Mutant("calibrated again", CALIBRATION, " if not quantizer.is_initialised]", "]", calibration.check_only_once),
    Mutant(
        "calibrated in training mode", CALIBRATION, "    model.eval()\n", "", calibration.check_model_is_left_as_it_was
    ),
    Mutant(
        "modes not restored",
        CALIBRATION,
        "            module.training = training\n",
        "            pass\n",
        calibration.check_model_is_left_as_it_was,
    ),
    Mutant(
        "observers stay after an error",
        CALIBRATION,
        "quantizer.observer = None",
        "pass",
        calibration.check_after_an_error,
    ),
    Mutant(
        "calibrated from the first batch",
        CALIBRATION,
        "            seen += 1\n",
        "            seen += 1\n            break\n",
        calibration.check_closed_form,
    ),
    # Freezing
    Mutant(
        "tied weights are packed twice",
        FREEZING,
        "key = id(layer.weight_quantizer)",
        "key = id(layer)",
        freezing.check_ties_share_their_codes,
    ),
    Mutant(
        "layers freeze one by one",
        FREEZING,
        "frozen.append((layer, weight, activation))",
        "make_frozen_(layer, weight, activation)",
        freezing.check_all_or_nothing,
    ),
    Mutant(
        "a NaN input scale is frozen",
        FREEZING,
        "if not activation.scale.isfinite().all():",
        "if False:",
        freezing.check_all_or_nothing,
    ),
    Mutant(
        "frozen from the unrounded step size",
        FREEZING,
        ("import QuantizedTensor\n", "return layer.weight_quantizer.quantize(matrix(layer))"),
        (
            "import QuantizedTensor, quantize_tensor\n",
            "q = layer.weight_quantizer\n        return quantize_tensor(layer.weight, q.step_size, q.spec)",
        ),
        freezing.check_same_integers_and_output,
    ),
    Mutant(
        "input quantizers are dropped",
        FREEZING,
        "activation = layer.activation_quantizer\n",
        "activation = None\n",
        freezing.check_same_integers_and_output,
    ),
    # Layers
    Mutant(
        "the input is not quantized in training",
        LINEAR,
        "x, x_rounding = (x, None) if activation is None else activation.enter(x)",
        "x_rounding = None",
        layers.check_linear_forward,
    ),
    Mutant(
        "no bias in training",
        LINEAR,
        "product(x, weight, self.bias,",
        "product(x, weight, None,",
        layers.check_linear_forward,
    ),
    Mutant(
        "the frozen input is not quantized",
        LINEAR,
        "x = self.activation_quantizer(x) if self.fused is None",
        "x = x if self.fused is None",
        lambda m: layers.check_frozen_forward(m, qat.layers.conv),
    ),
    Mutant(
        "no frozen bias",
        LINEAR,
        "return F.linear(x, self.packed_weight.dequantize(x.dtype), bias)",
        "return F.linear(x, self.packed_weight.dequantize(x.dtype))",
        lambda m: layers.check_frozen_forward(m, qat.layers.conv),
    ),
    Mutant(
        "torch's int4 operator is never used",
        LINEAR,
        "if cpu_int4.fits(x, self.packed_weight):",
        "if False:",
        lambda m: layers.check_identity(m, qat.layers.packed),
    ),
    Mutant(
        "conv: the input is not quantized in training",
        CONV,
        "return product(x, weight, self.bias, x_rounding, ",
        "return product(x, weight, self.bias, None, ",
        layers.check_conv_forward,
    ),
    Mutant(
        "conv: no bias in training",
        CONV,
        "return product(x, weight, self.bias,",
        "return product(x, weight, None,",
        layers.check_conv_forward,
    ),
    Mutant(
        "conv: the frozen input is not quantized",
        CONV,
        "x = self.activation_quantizer(x)\n        if",
        "pass\n        if",
        lambda m: layers.check_frozen_forward(qat.layers.linear, m),
    ),
    Mutant(
        "conv: no frozen bias",
        CONV,
        "return self._conv_forward(x, weight, bias)",
        "return self._conv_forward(x, weight, None)",
        lambda m: layers.check_frozen_forward(qat.layers.linear, m),
    ),
    Mutant(
        "scales are stored in fp32",
        PACKED,
        "weight.scale = tensor.scale",
        "weight.scale = tensor.scale.float()",
        layers.check_packed_weight,
    ),
    Mutant(
        "an operand of torch's operator outlives a load",
        PACKED,
        "self.cpu_operands = None\n        super()._load",
        "super()._load",
        layers.check_cpu_operands_follow_the_weight,
    ),
    Mutant(
        "the kernels' scale is rounded to the dtype of x",
        PACKED,
        "if torch.equal(scale.float(), stored.scale.float()) and not one_table:",
        "if True:",
        layers.check_prepacked_scales,
    ),
    Mutant(
        "a state dict holds no codes while they lie in the kernels' order",
        PACKED,
        'destination[prefix + "packed"] = packed',
        "pass",
        layers.check_prepacked_weight,
    ),
    Mutant(
        "an operand of torch's operator outlives a cast",
        PACKED,
        "self.cpu_operands = None\n        super()._apply",
        "super()._apply",
        layers.check_cpu_operands_follow_the_weight,
    ),
    Mutant(
        "torch's operator gets groups it cannot take",
        CPU_INT4,
        "GROUP_SIZES = (32,",
        "GROUP_SIZES = (16, 32,",
        layers.check_operator_fits,
    ),
    Mutant(
        "torch's operator gets rows it cannot take",
        CPU_INT4,
        "ROW_MULTIPLE = 16",
        "ROW_MULTIPLE = 8",
        layers.check_operator_fits,
    ),
    Mutant(
        "torch's operator gets 3-bit codes", CPU_INT4, "spec.bits == 4", "spec.bits <= 4", layers.check_operator_fits
    ),
    Mutant(
        "torch's operator cuts the gradient",
        CPU_INT4,
        "and not (x.requires_grad and torch.is_grad_enabled())",
        "",
        layers.check_operator_fits,
    ),
    Mutant(
        "torch's operator reads codes off by one",
        CPU_INT4,
        "torch.int32) + 8",
        "torch.int32) + 7",
        layers.check_operator,
    ),
    Mutant(
        "torch's operator drops the bias",
        CPU_INT4,
        "return y if bias is None else y + bias",
        "return y",
        layers.check_operator,
    ),
    # Embeddings
    Mutant(
        "an embedding's N counts the rows that are looked up",
        EMBEDDING,
        "quantizer.grad_scale(self.weight)",
        "quantizer.grad_scale(rows)",
        embedding.check_rows_and_gradients,
    ),
    Mutant(
        "an embedding's padding learns its step size",
        EMBEDDING,
        "F.embedding(indices, step_size, *options)",
        "F.embedding(indices, step_size)",
        embedding.check_padding,
    ),
    Mutant(
        "rows take the first rows' scales",
        PACKED,
        "part[rows] for part",
        "part[: len(rows)] for part",
        embedding.check_frozen_rows,
    ),
]


def mutated(monkeypatch, name, texts=(), replacements=()):
    """Return a copy of a module, executed with its text substituted."""
    original = importlib.import_module(name)
    source = Path(original.__file__).read_text()
    for text, replacement in zip(texts, replacements, strict=True):
        assert source.count(text) == 1, f"{text!r} occurs {source.count(text)} times in {name}: bring the mutant along"
        source = source.replace(text, replacement)
    copy = types.ModuleType(f"{name}_mutant")
    copy.__package__, copy.__file__ = original.__package__, original.__file__
    monkeypatch.setitem(sys.modules, copy.__name__, copy)  # dataclasses look their module up
    exec(compile(source, f"{name} (mutant)", "exec"), copy.__dict__)
    return copy


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong for mutant in MUTANTS])
def test_the_check_notices(monkeypatch, mutant):
    one = isinstance(mutant.text, str)
    texts, replacements = ([mutant.text], [mutant.replacement]) if one else (mutant.text, mutant.replacement)
    module = mutated(monkeypatch, mutant.module, texts, replacements)
    with pytest.raises((AssertionError, pytest.fail.Exception)):  # the latter where pytest.raises sees no error
        mutant.check(module)


@pytest.mark.parametrize("module", sorted({mutant.module for mutant in MUTANTS}))
def test_a_faithful_copy_passes_every_check(monkeypatch, module):
    copy = mutated(monkeypatch, module)
    for check in {mutant.check for mutant in MUTANTS if mutant.module == module}:
        check(copy)


def test_a_mutant_whose_text_is_gone_fails(monkeypatch):
    with pytest.raises(AssertionError, match=r"occurs 0 times in qat.packing: bring the mutant along"):
        mutated(monkeypatch, PACKING, ["text that is not there"], [""])
