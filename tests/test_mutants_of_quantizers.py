"""Wrong lines in LSQ and LSQ+."""

import pytest
from mutants import Mutant, load_checks, modules, must_notice, must_pass

lsq = load_checks("test_lsq")
lsq_plus = load_checks("test_lsq_plus")

LSQ = "qat.quantizers.lsq"
OBSERVER = "qat.quantizers.observer"
LSQ_PLUS = "qat.quantizers.lsq_plus"

MUTANTS = [
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
        "Q_N in the gradient scale",
        LSQ,
        "math.sqrt(elements * spec.q_p)",
        "math.sqrt(elements * spec.q_n)",
        lsq.check_weight_gradient_scale,
    ),
    Mutant(
        "fixed Q_P in the gradient scale",
        LSQ,
        "math.sqrt(elements * spec.q_p)",
        "math.sqrt(elements * 7)",
        lsq.check_unsigned_gradient_scale,
    ),
    Mutant(
        "no Q_P in the gradient scale",
        LSQ,
        "math.sqrt(elements * spec.q_p)",
        "math.sqrt(elements)",
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
        OBSERVER,
        "self.sums += torch.stack",
        "self.sums = torch.stack",
        lsq.check_observed_start,
    ),
    Mutant("sign detection inverted", LSQ, "negative > 0 if", "negative <= 0 if", lsq.check_sign_detection),
    Mutant(
        "sign detected from the last batch",
        OBSERVER,
        "self.extremes = self.extremes.maximum(",
        "self.extremes = torch.zeros_like(self.extremes).maximum(",
        lsq.check_observed_sign,
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
    # LSQ+
    Mutant(
        "LSQ+: Q_P alone in the gradient scale",
        LSQ_PLUS,
        "features(x) * (self.spec.q_n + self.spec.q_p)",
        "features(x) * self.spec.q_p",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: the range starts over Q_P steps",
        LSQ_PLUS,
        "return (high - low) / (spec.q_n + spec.q_p)",
        "return (high - low) / spec.q_p",
        lsq_plus.check_start_at_the_range,
    ),
    Mutant(
        "LSQ+: the offset starts at the high end",
        LSQ_PLUS,
        "self.offset.copy_(low)",
        "self.offset.copy_(high)",
        lsq_plus.check_start_at_the_range,
    ),
    Mutant(
        "LSQ+: the offset does not start",
        LSQ_PLUS,
        "self.offset.copy_(low)",
        "pass",
        lsq_plus.check_start_at_the_range,
    ),
    Mutant(
        "LSQ+: starts from the magnitude of the lowest value",
        LSQ_PLUS,
        "[[-negative]]",
        "[[negative]]",
        lsq_plus.check_start_at_the_range,
    ),
    Mutant(
        "LSQ+: starts at the range where the least error is asked for",
        LSQ_PLUS,
        "if self.init is Init.mse:",
        "if False:",
        lsq_plus.check_start_at_the_least_error,
    ),
    Mutant(
        "LSQ+: a stored zero point counts from 0",
        LSQ_PLUS,
        "(zero_point.float() + self.spec.q_n)",
        "(zero_point.float())",
        lsq_plus.check_start,
    ),
    Mutant(
        "LSQ+: zero points rounded down",
        LSQ_PLUS,
        "/ scale.float()).round()",
        "/ scale.float()).floor()",
        lsq_plus.check_zero_has_a_code,
    ),
    Mutant(
        "LSQ+: zero points outside the codes",
        LSQ_PLUS,
        "(steps - spec.q_n).clamp(-spec.q_n, spec.q_p)",
        "(steps - spec.q_n)",
        lsq_plus.check_zero_has_a_code,
    ),
    Mutant(
        "LSQ+: zero points count from 0",
        LSQ_PLUS,
        "(steps - spec.q_n).clamp",
        "steps.clamp",
        lsq_plus.check_zero_has_a_code,
    ),
    Mutant(
        "LSQ+: zero points of the sign of the offset",
        LSQ_PLUS,
        "(-offset.detach()",
        "(offset.detach()",
        lsq_plus.check_zero_has_a_code,
    ),
    Mutant(
        "LSQ+: the grid keeps an open sign",
        LSQ_PLUS,
        "self._set_signed(True)",
        "pass",
        lsq_plus.check_grid_is_signed,
    ),
    Mutant(
        "LSQ+: values passed on are rounded",
        LSQ_PLUS,
        "if self.passes(x):",
        "if False:",
        lsq_plus.check_enabled,
    ),
    Mutant(
        "LSQ+: zero points of the unrounded step size",
        LSQ_PLUS,
        "zero = zero_point(stored_scale(step_size, spec), offset, spec)",
        "zero = zero_point(step_size, offset, spec)",
        lsq_plus.check_stored_zero_point,
    ),
    Mutant(
        "LSQ+: gradients of the unrounded step size",
        LSQ_PLUS,
        "scale = stored_scale(step_size, spec)\n    working",
        "scale = step_size\n    working",
        lsq_plus.check_stored_scale,
    ),
    Mutant(
        "LSQ+: the mask includes the lower bound",
        LSQ_PLUS,
        "passed = inside(grad, ratio, low, high)",
        "passed = inside(grad, ratio, low - 1e-7, high)",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: the mask includes the upper bound",
        LSQ_PLUS,
        "passed = inside(grad, ratio, low, high)",
        "passed = inside(grad, ratio, low, high + 1e-7)",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: the slope at the upper bound is that of inside",
        LSQ_PLUS,
        "ratio.neg_(), -high, -low)",
        "ratio.neg_(), -high - 1e-7, -low)",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: the slope above is that of below",
        LSQ_PLUS,
        "-high, -low)",
        "-high, -high)",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: values below keep their ratio in the slope",
        LSQ_PLUS,
        "return torch.threshold_(torch.threshold_(ratio.neg_(), -high, -low).neg_(), low, low)",
        "return torch.threshold_(ratio.neg_(), -high, -low).neg_()",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: of bounds that are tensors the slope below is that of above",
        LSQ_PLUS,
        "(ratio > low) & (ratio < high), ratio, low)",
        "(ratio > low) & (ratio < high), ratio, high)",
        lsq_plus.check_bounds_that_are_tensors,
    ),
    Mutant(
        "LSQ+: of bounds that are tensors all is inside",
        LSQ_PLUS,
        "torch.where((ratio > low) & (ratio < high), ratio, low)",
        "ratio",
        lsq_plus.check_bounds_that_are_tensors,
    ),
    Mutant(
        "LSQ+: the mask of a grid without an offset",
        LSQ_PLUS,
        "bounds(-spec.q_n - zero, spec.q_p - zero)",
        "bounds(-spec.q_n - 0 * zero, spec.q_p - 0 * zero)",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: codes of the step size's gradient count from the middle",
        LSQ_PLUS,
        "rounded.sub_(_or_low_(ratio, low, high))",
        "rounded.sub_(inside(ratio, ratio, low, high))",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: slope without the ratio",
        LSQ_PLUS,
        "rounded.sub_(_or_low_(ratio, low, high))",
        "rounded.sub_(low)",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: NaN moves the step size",
        LSQ_PLUS,
        "ratio.nan_to_num_(-math.inf)",
        "ratio.nan_to_num_(math.inf)",
        lsq_plus.check_nan,
    ),
    Mutant(
        "LSQ+: NaN passes its gradient",
        LSQ_PLUS,
        "ratio.nan_to_num_(-math.inf)",
        "ratio.nan_to_num_((low + high) / 2)",
        lsq_plus.check_nan,
    ),
    Mutant(
        "LSQ+: the step size's gradient without its scale",
        LSQ_PLUS,
        "summed_by_scale(slope.mul_(grad), step_size, grad_scale)",
        "summed_by_scale(slope.mul_(grad), step_size, 1.0)",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: the offset's gradient without its scale",
        LSQ_PLUS,
        "out=slope), step_size, grad_scale)",
        "out=slope), step_size, 1.0)",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: the offset learns from what is not clipped",
        LSQ_PLUS,
        "summed_by_scale(torch.sub(grad, passed, out=slope),",
        "summed_by_scale(passed,",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: clipped values pass their gradient",
        LSQ_PLUS,
        "return passed.to(x.dtype),",
        "return grad_output,",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: gradients swapped",
        LSQ_PLUS,
        "grad_step, grad_offset\n",
        "grad_offset, grad_step\n",
        lsq_plus.check_values_and_gradients,
    ),
    Mutant(
        "LSQ+: gradients summed in bf16",
        LSQ_PLUS,
        "slope.mul_(grad), step_size",
        "slope.to(grad_output.dtype) * grad_output, step_size",
        lsq_plus.check_bf16_inputs,
    ),
    Mutant(
        "LSQ+: ratios in bf16",
        LSQ_PLUS,
        "working = torch.promote_types(x.dtype, torch.float32)",
        "working = x.dtype",
        lsq_plus.check_bf16_inputs,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong for mutant in MUTANTS])
def test_the_check_notices(monkeypatch, mutant):
    must_notice(monkeypatch, mutant)


@pytest.mark.parametrize("module", modules(MUTANTS))
def test_a_faithful_copy_passes_every_check(monkeypatch, module):
    must_pass(monkeypatch, module, MUTANTS)
