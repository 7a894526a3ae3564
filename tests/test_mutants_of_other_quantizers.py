"""Wrong lines in PACT and min-max."""

import pytest
from mutants import Mutant, load_checks, modules, must_notice, must_pass

others = load_checks("test_other_quantizers")

PACT = "qat.quantizers.pact"
MINMAX = "qat.quantizers.minmax"

MUTANTS = [
    # PACT
    Mutant(
        "PACT: a bound of Q_P, not its square", PACT, "1 / self.spec.q_p**2", "1 / self.spec.q_p", others.check_pact
    ),
    Mutant("PACT: values passed on are rounded", PACT, "if self.passes(x):", "if False:", others.check_pact_waits),
    Mutant(
        "PACT: the mask includes the lower bound",
        PACT,
        "inside(grad, ratio, low, high)",
        "inside(grad, ratio, low - 1e-7, high)",
        others.check_pact,
    ),
    Mutant(
        "PACT: the mask includes the upper bound",
        PACT,
        "inside(grad, ratio, low, high)",
        "inside(grad, ratio, low, high + 1e-7)",
        others.check_pact,
    ),
    Mutant(
        "PACT: the bound learns from all", PACT, "clipped.sub_(inside(ratio, ratio, low, high))", "", others.check_pact
    ),
    Mutant(
        "PACT: the bound learns as the step size of LSQ does",
        PACT,
        "clipped = ratio.clamp(low, high)",
        "clipped = ratio.clamp(low, high).round()",
        others.check_pact,
    ),
    Mutant(
        "PACT: what is clipped counts for its size",
        PACT,
        "clipped = ratio.clamp(low, high)",
        "clipped = ratio.clone()",
        others.check_signed_pact,
    ),
    Mutant(
        "PACT: the lower end is always 0",
        PACT,
        "clipped = ratio.clamp(low, high)",
        "clipped = ratio.clamp(0, high)",
        others.check_signed_pact,
    ),
    Mutant(
        "PACT: the gradient without its scale", PACT, "step_size, grad_scale)", "step_size, 1.0)", others.check_pact
    ),
    Mutant(
        "PACT: clipped values pass their gradient", PACT, "inside(grad, ratio, low, high)", "grad", others.check_pact
    ),
    Mutant(
        "PACT: gradients of the unrounded step size",
        PACT,
        "stored_scale(step_size, spec).to(working)",
        "step_size.to(working)",
        others.check_pacts_stored_scale,
    ),
    Mutant(
        "PACT: the gradient summed in bf16",
        PACT,
        "clipped.mul_(grad)",
        "grad_output * clipped.to(grad_output.dtype)",
        others.check_pact_in_bf16,
    ),
    # Min-max
    Mutant("min-max: a tenth of each batch", MINMAX, "MOMENTUM = 0.01", "MOMENTUM = 0.1", others.check_minmax_input),
    Mutant(
        "min-max: follows evaluation too",
        MINMAX,
        "if self.training and not passes:",
        "if not passes:",
        others.check_minmax_input,
    ),
    Mutant(
        "min-max: follows what passes",
        MINMAX,
        "if self.training and not passes:",
        "if self.training:",
        others.check_minmax_input,
    ),
    Mutant(
        "min-max: what follows stays a parameter",
        MINMAX,
        "delattr(self, key)\n            self.register_buffer(key, parameter.detach())",
        "pass",
        others.check_minmax_input,
    ),
    Mutant(
        "min-max: the highest value, not magnitude",
        MINMAX,
        "torch.maximum(-low, high)",
        "high",
        others.check_minmax_input,
    ),
    Mutant(
        "min-max: an unsigned grid follows the magnitude",
        MINMAX,
        "torch.maximum(-low, high) if self.spec.q_n else high",
        "torch.maximum(-low, high)",
        others.check_unsigned_minmax_input,
    ),
    Mutant(
        "min-max: the range without 0",
        MINMAX,
        "ends = torch.maximum(ends, torch.stack([-low.float(), high.float()]))",
        "ends = torch.stack([-low.float(), high.float()])",
        others.check_minmax_input_with_an_offset,
    ),
    Mutant(
        "min-max: the offset jumps to each batch",
        MINMAX,
        "self.offset.lerp_(low.reshape(1, 1), MOMENTUM)",
        "self.offset.copy_(low.reshape(1, 1))",
        others.check_minmax_input_with_an_offset,
    ),
    Mutant(
        "min-max: the offset stays",
        MINMAX,
        "self.offset.lerp_(low.reshape(1, 1), MOMENTUM)",
        "pass",
        others.check_minmax_input_with_an_offset,
    ),
    Mutant(
        "min-max: the step size of an offset grid stays",
        MINMAX,
        "self.step_size.lerp_(step_of(low, high, self.spec).reshape(1, 1), MOMENTUM)",
        "pass",
        others.check_minmax_input_with_an_offset,
    ),
    Mutant(
        "min-max: weights start as LSQ's do",
        MINMAX,
        "weight_step_size(weight, spec, Init.minmax)",
        "weight_step_size(weight, spec, Init.lsq)",
        others.check_minmax_weights,
    ),
    Mutant(
        "min-max: a weight's gradient halved",
        MINMAX,
        "return grad_output, None",
        "return grad_output / 2, None",
        others.check_minmax_weights,
    ),
    Mutant(
        "min-max: a weight is rounded before its start",
        MINMAX,
        "if self.enabled else weight",
        "if True else weight",
        others.check_minmax_weights,
    ),
    Mutant(
        "min-max: integers of the unrounded step size",
        MINMAX,
        "quantize_tensor(weight, stored_scale(step_size, self.spec), self.spec, zero_point)",
        "quantize_tensor(weight, step_size, self.spec, zero_point)",
        others.check_minmax_weights,
    ),
    Mutant(
        "min-max: integers without a zero point",
        MINMAX,
        "stored_scale(step_size, self.spec), self.spec, zero_point)",
        "stored_scale(step_size, self.spec), self.spec, zero_point * 0)",
        others.check_asymmetric_minmax_weight,
    ),
    Mutant(
        "min-max: values without a zero point",
        MINMAX,
        "spec, weight.dtype, zero_point)",
        "spec, weight.dtype, zero_point * 0)",
        others.check_asymmetric_minmax_weight,
    ),
    Mutant(
        "min-max: a weight's sign stays open",
        MINMAX,
        'spec.override({"signed": True})',
        "spec",
        others.check_signed_minmax_weight,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong for mutant in MUTANTS])
def test_the_check_notices(monkeypatch, mutant):
    must_notice(monkeypatch, mutant)


@pytest.mark.parametrize("module", modules(MUTANTS))
def test_a_faithful_copy_passes_every_check(monkeypatch, module):
    must_pass(monkeypatch, module, MUTANTS)
