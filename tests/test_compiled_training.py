"""What is compiled trains with the codes, masks and gradients that the papers define: convolutions, float32, on a CPU.

The reference takes codes and masks by one float32 division each, as they are defined, and all else in float64. Layers
stand side by side, not in a row: behind a sum in another order, as batch norm's, a code may be another one.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qat

WHOLE = {"bits": 4, "group_size": 9, "symmetric": False}
REAL = {"bits": 4, "granularity": "channel", "symmetric": False, "zero_point_dtype": "float16"}
CUSTOM = {"bits": 3, "granularity": "channel", "codebook": "custom"}
NF4 = {"granularity": "channel", "codebook": "nf4"}
LSQ = {"bits": 4, "granularity": "channel"}
INPUT = {"bits": 4}  # the same for all, so that Inductor's kernels are few
LAYERS = {  # how to make it, weight, activation
    "dense": (lambda: nn.Conv2d(16, 8, 3), LSQ, INPUT),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), REAL, INPUT),
    "table": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), CUSTOM, INPUT),
    "pointwise": (lambda: nn.Conv2d(16, 8, 1), None, INPUT),
    "grouped": (lambda: nn.Conv2d(16, 8, 3, stride=2, groups=4), NF4, None),
    "whole": (lambda: nn.Conv2d(16, 8, 3, groups=2), WHOLE, None),
    "twice": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), REAL, INPUT),
    "image": (lambda: nn.Conv2d(3, 8, 3), LSQ, {"bits": 8}),
}


class SideBySide(nn.Module):
    """Each layer with an input of its own, and relu6 before it, which a compiler fuses with its rounding."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: make() for name, (make, *_) in LAYERS.items()})

    def forward(self, inputs):
        outputs = {name: layer(F.relu6(inputs[name])) for name, layer in self.layers.items()}
        outputs["twice"] = outputs["twice"] + self.layers["twice"](F.relu6(inputs["again"]))
        return outputs


def prepared(layout):
    """Return the model and its inputs in a memory layout; the image needs no gradient."""
    torch.manual_seed(0)
    model = SideBySide()
    rules = [
        {"match": f"layers.{name}", "weight": weight, "activation": activation}
        for name, (_, weight, activation) in LAYERS.items()
    ]
    policy = {"weight": LSQ, "init": "minmax", "rules": rules}
    shapes = {name: (2, 3 if name == "image" else 16, 9, 9) for name in (*LAYERS, "again")}
    inputs = {name: (torch.randn(shape) * 32).round() / 8 for name, shape in shapes.items()}
    qat.calibrate(qat.prepare(model, policy, verbose=False), [inputs], verbose=False)
    with torch.no_grad():
        model.layers["pointwise"].activation_quantizer.step_size.fill_(0.25)  # many ties, and the upper bound itself
        dense, twice = model.layers["dense"], model.layers["twice"]
        dense.weight.copy_(torch.randint(-12, 13, dense.weight.shape) / 16)  # both bounds themselves
        dense.weight_quantizer.step_size.fill_(1 / 16)
        twice.weight_quantizer.step_size.mul_(0.6123)  # clips, and lies off the stored grid
    inputs = {name: x.to(memory_format=layout).requires_grad_(name != "image") for name, x in inputs.items()}
    return model.to(memory_format=layout).train(), inputs


def rounded(x, step_size, spec, elements, zero_point=None):
    """Return x (rows, groups, block) fake-quantized as LSQ defines it: float64, with its gradients.

    Args:
        x: float64, of float32 values.
        step_size: float64 (rows, groups).
        spec: bounds and stored dtypes.
        elements: that share a step size, as the paper counts them.
        zero_point: (rows, groups), added to x / s: before it is rounded where it is real.
    """
    low, high = -spec.q_n, spec.q_p
    scale = step_size.detach().to(getattr(torch, spec.scale_dtype.value)).float()[..., None]
    z = torch.zeros_like(scale) if zero_point is None else zero_point.float()[..., None]
    ratio = x.detach().float() / scale
    inside = (ratio > low - z) & (ratio < high - z)
    codes = (ratio + z).round() if spec.zero_point_dtype is not None else ratio.round() + z
    level = (codes.clamp(low, high) - z).double()  # as a multiple of the scale
    slope = (level - torch.where(inside, ratio.double(), 0)) / math.sqrt(elements * high)
    step = step_size[..., None]
    return level * scale.double() + torch.where(inside, x - x.detach(), 0) + slope * (step - step.detach())


def from_table(weight, levels):
    """Return the nearest level of each, times the channel's largest magnitude; the gradient passes straight through."""
    flat = weight.detach().flatten(1)
    scale = flat.abs().amax(1, keepdim=True)
    table = levels.double().expand(len(flat), -1)
    codes = (flat[..., None] / scale[..., None] - table[:, None]).abs().argmin(-1)
    return weight + (table.gather(1, codes) * scale - flat).view(weight.shape)


def reference(layer, inputs, grad):
    """Return the sum of a layer's outputs for inputs, and all gradients, by name: of the inputs under their numbers."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    leaves |= {str(i): x.detach().double().requires_grad_() for i, x in enumerate(inputs)}
    weight, of_weight, of_x = leaves["weight"], layer.weight_quantizer, layer.activation_quantizer
    if hasattr(of_weight, "levels"):
        weight = from_table(weight, of_weight.levels)
    elif of_weight is not None:
        step_size = leaves["weight_quantizer.step_size"]
        blocks = weight.reshape(*step_size.shape, -1)
        zero_point = getattr(of_weight, "zero_point", None)
        rows = rounded(blocks, step_size, of_weight.spec, blocks.shape[-1], zero_point)
        weight = rows.reshape(weight.shape)
    total = 0
    for i, x in enumerate(inputs):
        value = leaves[str(i)]
        if of_x is not None:
            step_size = leaves["activation_quantizer.step_size"]
            value = rounded(value.reshape(1, 1, -1), step_size, of_x.spec, x[0].numel()).reshape(x.shape)
        total = total + F.conv2d(
            value, weight, leaves.get("bias"), layer.stride, layer.padding, layer.dilation, layer.groups
        )
    total.backward(grad.double())
    return total.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_near(found, expected, what, tolerance=3e-6):
    """Within what sums in float32 come to: a code or a mask that is another one is a thousand times as far."""
    close = {"rtol": 0, "atol": tolerance * expected.abs().max().item()}
    torch.testing.assert_close(found.double(), expected, **close, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(
    ("layout", "backend"), [(torch.contiguous_format, "aot_eager"), (torch.channels_last, "inductor")], ids=str
)
def test_codes_masks_and_gradients(layout, backend):
    model, inputs = prepared(layout)
    torch._dynamo.reset()
    outputs = torch.compile(model, fullgraph=True, backend=backend)(inputs)
    grads = {name: torch.randn_like(y) for name, y in outputs.items()}
    torch.autograd.backward(list(outputs.values()), list(grads.values()))
    for name, layer in model.layers.items():
        given = [inputs[name], *([inputs["again"]] if name == "twice" else [])]
        y, expected = reference(layer, [F.relu6(x.detach()) for x in given], grads[name])
        assert_near(outputs[name], y, f"{name}: y")
        for kind, parameter in layer.named_parameters():
            cancelled = kind == "activation_quantizer.step_size"  # terms of either sign, a thousand times their sum
            assert_near(parameter.grad, expected[kind], f"{name}: {kind}", 1e-4 if cancelled else 3e-6)
        for i, x in enumerate(given):
            if x.requires_grad:
                passed = expected[str(i)] * ((x > 0) & (x < 6))
                assert_near(x.grad, passed, f"{name}: x")
    assert inputs["image"].grad is None


@pytest.mark.parametrize("weight", [NF4, CUSTOM], ids=str)
def test_a_compiled_operator_says_how_its_weight_lies(weight):
    """As Inductor asserts: of a weight in channels_last it gives one that is not."""
    model = qat.prepare(nn.Sequential(nn.Conv2d(4, 8, 3)), {"weight": weight}, verbose=False)
    weight, levels = model[0].weight.detach(), model[0].weight_quantizer.levels
    for laid_out in (weight, weight.to(memory_format=torch.channels_last), weight.transpose(2, 3)):
        arguments = laid_out, 8, 1, levels, None
        torch.library.opcheck(torch.ops.qat.round_to_codebook.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("activation", [None, INPUT], ids=str)
def test_a_compiled_layer_whose_weight_does_not_train_lets_go_of_its_rounded_input(activation):
    """Only the weight's gradient takes it: what is kept is the weight, and of an input with a step size its mask's."""
    policy = {"weight": {"bits": 4, "group_size": 8}, "activation": activation}
    model, x = qat.prepare(nn.Sequential(nn.Linear(16, 6)), policy, verbose=False), torch.randn(2, 5, 16)
    qat.calibrate(model, [x], verbose=False).requires_grad_(False)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    grads, kept = [], []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        kept.clear()
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            y = run(leaf)
        y.square().sum().backward()
        grads.append(leaf.grad)
    assert len([tensor for tensor in kept if tensor.data_ptr() not in parameters]) == (activation is not None)
    assert torch.equal(*grads)
    of_weight = model[0].weight, None, model[0].weight_quantizer.step_size, None, None
    how = ";4,1,bfloat16,,;;float32", 1.0, 1.0, "1000000"
    for grad in (y, y.transpose(0, 1), y[0, 0]):
        arguments = grad.detach(), None, *of_weight, *how
        torch.library.opcheck(torch.ops.qat.product_gradients.default, arguments, test_utils="test_faketensor")
