"""Wrong lines in what is done to a model: policy, surgery, calibration, freezing, and its layers."""

import pytest
from mutants import Mutant, load_checks, modules, must_notice, must_pass

import qat.layers.conv
import qat.layers.linear
import qat.layers.packed
import qat.surgery

policy = load_checks("test_policy")
surgery = load_checks("test_surgery")
table = load_checks("test_table")
calibration = load_checks("test_calibration")
freezing = load_checks("test_freezing")
layers = load_checks("test_layers")
packed = load_checks("test_packed_weight")
embedding = load_checks("test_embedding")
modes = load_checks("test_modes")
stored = load_checks("test_stored_weight")

POLICY = "qat.policy"
SURGERY, DECISIONS, TABLE = "qat.surgery", "qat.decisions", "qat.table"
CALIBRATION = "qat.calibration"
MODES = "qat.modes"
FREEZING = "qat.freezing"
LINEAR = "qat.layers.linear"
CONV = "qat.layers.conv"
PACKED = "qat.layers.packed"
STORED = "qat.stored_weight"
CPU_INT4 = "qat.layers.cpu_int4"
EMBEDDING = "qat.layers.embedding"


def prepare_with(check):
    """Return a check of ``prepare`` that takes what decides in its place."""

    def run(decisions):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("decide", "check_shapes", "require_any", "check_init"):
                patch.setattr(qat.surgery, name, getattr(decisions, name))
            check(qat.surgery)

    return run


MUTANTS = [
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
        DECISIONS,
        'problems.append(f"{decision.name!r}: {error}")',
        'problems[:] = problems or [f"{decision.name!r}: {error}"]',
        prepare_with(surgery.check_shapes_that_do_not_fit),
    ),
    Mutant(
        "shapes that do not fit are skipped",
        SURGERY,
        "        check_shapes(decisions)\n        require_any",
        "        require_any",
        surgery.check_shapes_that_do_not_fit,
    ),
    Mutant(
        "inputs follow the policy, not the rule",
        SURGERY,
        "activation_quantizer(decision, policy.init,",
        "activation_quantizer(Decision(decision.name, decision.layer, None, policy.activation), policy.init,",
        surgery.check_rules,
    ),
    Mutant("prepared twice", SURGERY, "if is_prepared(model):", "if False:", surgery.check_prepared_twice),
    Mutant(
        "layers left alone are not printed",
        DECISIONS,
        "[(name, layer) for name, layer in unwrapped(model).named_modules() if holds_matrix(layer)]",
        "[(name, layer) for name, layer in unwrapped(model).named_modules() if type(layer) in (nn.Linear, nn.Conv2d)]",
        prepare_with(table.check_table),
    ),
    Mutant(
        "scales cost nothing",
        TABLE,
        "bits = decision.weight.bits + parameter_bits(shape, decision.weight) / weights",
        "bits = float(decision.weight.bits)",
        table.check_summary,
    ),
    # Calibration
    Mutant("calibrated again", CALIBRATION, " if not quantizer.is_initialised]", "]", calibration.check_only_once),
    Mutant(
        "calibrated in training mode",
        CALIBRATION,
        "in_eval_mode(model), ",
        "",
        calibration.check_model_is_left_as_it_was,
    ),
    Mutant("no eval mode", MODES, "    model.eval()\n", "", modes.check_each_module_gets_its_mode_back),
    Mutant(
        "modes not restored",
        MODES,
        "            module.training = training\n",
        "            pass\n",
        modes.check_each_module_gets_its_mode_back,
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
        ("import QuantizedTensor\n", "tensor = quantizer.quantize(weight)"),
        (
            "import QuantizedTensor, quantize_tensor\n",
            "tensor = quantize_tensor(weight, quantizer.step_size, quantizer.spec)",
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
        "x_rounding = None if activation is None else activation.rounding(x)",
        "x_rounding = None",
        layers.check_linear_forward,
    ),
    Mutant(
        "no bias in training",
        LINEAR,
        "product(input, weight, self.bias,",
        "product(input, weight, None,",
        layers.check_linear_forward,
    ),
    Mutant(
        "the frozen input is not quantized",
        LINEAR,
        "x = activation(widened(x)) if fused is None",
        "x = x if fused is None",
        lambda m: layers.check_frozen_forward(m, qat.layers.conv),
    ),
    Mutant(
        "no frozen bias",
        LINEAR,
        "return F.linear(x, packed.dequantize(x.dtype), bias)",
        "return F.linear(x, packed.dequantize(x.dtype))",
        lambda m: layers.check_frozen_forward(m, qat.layers.conv),
    ),
    Mutant(
        "torch's int4 operator is never used",
        LINEAR,
        "if not x.is_cuda and cpu_int4.fits(x, packed):",
        "if False:",
        lambda m: layers.check_identity(m, qat.layers.packed),
    ),
    Mutant(
        "conv: the input is not quantized in training",
        CONV,
        "return product(input, weight, self.bias, x_rounding, ",
        "return product(input, weight, self.bias, None, ",
        layers.check_conv_forward,
    ),
    Mutant(
        "conv: no bias in training",
        CONV,
        "return product(input, weight, self.bias,",
        "return product(input, weight, None,",
        layers.check_conv_forward,
    ),
    Mutant(
        "conv: the frozen input is not quantized",
        CONV,
        "x = input if self.activation_quantizer is None else self.activation_quantizer(widened(input))\n        if",
        "x = input\n        if",
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
        STORED,
        'parts["scale"] = tensor.scale',
        'parts["scale"] = tensor.scale.float()',
        stored.check_parts,
    ),
    Mutant(
        "zero points are read as scales",
        STORED,
        'parts.get("zero_point")',
        'parts.get("scale")',
        stored.check_nothing_is_lost,
    ),
    Mutant(
        "an operand of torch's operator outlives a load",
        PACKED,
        "self.cpu_operands = None\n        super()._load",
        "super()._load",
        packed.check_cpu_operands_follow_the_weight,
    ),
    Mutant(
        "the kernels' scale is rounded to the dtype of x",
        PACKED,
        "if torch.equal(scale.float(), stored.scale.float()) and not one_table:",
        "if True:",
        packed.check_prepacked_scales,
    ),
    Mutant(
        "a state dict holds no codes while they lie in the kernels' order",
        PACKED,
        'destination[prefix + "packed"] = packed',
        "pass",
        packed.check_prepacked_weight,
    ),
    Mutant(
        "an operand of torch's operator outlives a cast",
        PACKED,
        "self.cpu_operands = None\n        super()._apply",
        "super()._apply",
        packed.check_cpu_operands_follow_the_weight,
    ),
    Mutant(
        "torch's operator gets groups it cannot take",
        CPU_INT4,
        "GROUP_SIZES = (32,",
        "GROUP_SIZES = (16, 32,",
        packed.check_operator_fits,
    ),
    Mutant(
        "torch's operator gets rows it cannot take",
        CPU_INT4,
        "ROW_MULTIPLE = 16",
        "ROW_MULTIPLE = 8",
        packed.check_operator_fits,
    ),
    Mutant(
        "torch's operator gets 3-bit codes", CPU_INT4, "spec.bits == 4", "spec.bits <= 4", packed.check_operator_fits
    ),
    Mutant(
        "torch's operator cuts the gradient",
        CPU_INT4,
        "and not (x.requires_grad and torch.is_grad_enabled())",
        "",
        packed.check_operator_fits,
    ),
    Mutant(
        "torch's operator reads codes off by one",
        CPU_INT4,
        "torch.int32) + 8",
        "torch.int32) + 7",
        packed.check_operator,
    ),
    Mutant(
        "torch's operator drops the bias",
        CPU_INT4,
        "return y if bias is None else y + bias",
        "return y",
        packed.check_operator,
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
        "F.embedding(input, step_size, *options)",
        "F.embedding(input, step_size)",
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


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong for mutant in MUTANTS])
def test_the_check_notices(monkeypatch, mutant):
    must_notice(monkeypatch, mutant)


@pytest.mark.parametrize("module", modules(MUTANTS))
def test_a_faithful_copy_passes_every_check(monkeypatch, module):
    must_pass(monkeypatch, module, MUTANTS)
