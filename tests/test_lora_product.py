"""LoRA beside a frozen layer in one product: the formula's values and gradients, what is kept, when peft's own runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import qat
from qat.lora_product import lora_product, use_lora_product_


def frozen(codebook=None, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    spec = qat.QuantSpec(codebook=codebook, group_size=16) if codebook else qat.QuantSpec(bits=4, group_size=16)
    model = nn.Sequential(nn.Linear(48, 32, bias=bias)).to(dtype)
    return qat.freeze(qat.prepare(model, qat.QuantPolicy(weight=spec), verbose=False))[0].requires_grad_(False)


def adapter(requires_grad=True):
    a, b = 0.3 * torch.randn(4, 48), 0.3 * torch.randn(32, 4)
    return a.requires_grad_(requires_grad), b.requires_grad_(requires_grad)


def composed(x, layer, a, b, scaling):
    """The formula in float64."""
    x, a, b, weight = (tensor.double() for tensor in (x, a, b, layer.packed_weight.dequantize(x.dtype)))
    return F.linear(x, weight, layer.bias.double() if layer.bias is not None else None) + scaling * x @ a.t() @ b.t()


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,)])
@pytest.mark.parametrize("codebook", [None, "nf4"])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_the_formula(shape, codebook, bias):
    layer = frozen(codebook, bias)
    x, (a, b) = torch.randn(shape, requires_grad=True), adapter()
    out = lora_product(x, layer, a, b, 2.5)
    exact = composed(x, layer, a, b, 2.5)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (x, a, b), grad)
    expected = torch.autograd.grad(exact, (x, a, b), grad.double())
    for here, there in zip(ours, expected, strict=True):
        assert here.dtype == torch.float32
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_bf16_is_rounded_once_and_gradients_of_the_adapter_are_of_its_dtype():
    layer = frozen(dtype=torch.bfloat16)
    x, (a, b) = torch.randn(7, 48).bfloat16().requires_grad_(), adapter()
    out = lora_product(x, layer, a, b, 2.0)
    exact = composed(x, layer, a.bfloat16(), b.bfloat16(), 2.0)
    assert out.dtype == torch.bfloat16
    # x A^T, the base's product and the sum each end in bf16.
    size = (
        x.abs() @ layer.weight.abs().t()
    ).double() + 2.0 * x.double().abs() @ a.double().abs().t() @ b.double().abs().t()
    assert ((out - exact).abs() <= 2 * 2.0**-8 * size).all()
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and a.grad.dtype == b.grad.dtype == torch.float32


def test_autocast_takes_its_dtype():
    layer, (a, b) = frozen(), adapter()
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_product(torch.randn(3, 48), layer, a, b, 1.0)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert a.grad.dtype == torch.float32


def test_an_input_without_gradient_and_a_frozen_adapter():
    layer, x = frozen(), torch.randn(3, 48)
    a, b = adapter()
    lora_product(x, layer, a, b, 1.0).sum().backward()
    assert a.grad is not None and x.grad is None
    x.requires_grad_()
    a, b = adapter(requires_grad=False)
    lora_product(x, layer, a, b, 1.0).sum().backward()
    torch.testing.assert_close(x.grad, (layer.weight + b @ a).sum(0).expand(3, -1))


def test_only_x_and_its_image_are_kept():
    layer, x, (a, b) = frozen(), torch.randn(64, 48, requires_grad=True), adapter()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lora_product(x, layer, a, b, 1.0)
    sizes = sorted(tensor.numel() for tensor in kept if all(tensor is not given for given in (a, b)))
    assert sizes == [64 * 4, 64 * 48] and any(tensor is x for tensor in kept)


def test_compiled_it_is_the_same():
    layer, x, (a, b) = frozen(), torch.randn(6, 48, requires_grad=True), adapter()
    grads = []
    for call in (lora_product, torch.compile(lora_product, backend="aot_eager", fullgraph=True)):
        grads.append(torch.autograd.grad(call(x, layer, a, b, 0.5).square().sum(), (x, a, b)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("codebook", [None, "nf4", "nf4_double"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_kernel_operands_it_compiles_to_one_operator_each_way(device, codebook, bias):
    torch.manual_seed(0)
    spec = qat.QuantSpec(codebook=codebook, group_size=32) if codebook else qat.QuantSpec(bits=4, group_size=32)
    model = qat.prepare(nn.Sequential(nn.Linear(64, 32, bias=bias)), qat.QuantPolicy(weight=spec), verbose=False)
    layer = qat.freeze(model)[0].requires_grad_(False).to(device)
    layer.packed_weight.prepack()
    x, a, b = torch.randn(2, 3, 64, device=device), torch.randn(4, 64, device=device), torch.randn(32, 4, device=device)
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "qat" in str(node.target)])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    for leaves in ([x.requires_grad_(), a.requires_grad_(), b.requires_grad_()], [a, b]):
        given = x if leaves[0] is x else x.detach()
        exact = composed(given, layer, a, b, 0.5)
        out = torch.compile(lora_product, backend=backend, fullgraph=True)(given, layer, a, b, 0.5)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(out)
        ours, expected = (torch.autograd.grad(y, leaves, grad.to(y.dtype)) for y in (out, exact))
        for here, there in zip(ours, expected, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    assert graphs == [["qat.lora_linear.default"], ["qat.lora_linear_backward.default"]] * 2


def test_operators_are_registered_as_torch_wants_them():
    x, (a, b) = torch.randn(5, 48, requires_grad=True), adapter()
    spec = qat.QuantSpec(bits=4, granularity="channel")
    model = qat.prepare(nn.Sequential(nn.Linear(48, 32, bias=False)), qat.QuantPolicy(weight=spec), verbose=False)
    layer = qat.freeze(model)[0]
    layer.packed_weight.prepack()
    words, scale, zero_point, *sizes, levels, nest = layer.packed_weight.gpu_operands[torch.float32]
    torch.library.opcheck(
        torch.ops.qat.lora_linear, (x, a, b, None, words, scale, zero_point, levels, nest, *sizes, 2.0)
    )


def with_lora(**options):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(frozen(), nn.ReLU(), nn.Linear(32, 32))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.clients
@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.5}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str
)
def test_pefts_model_gives_the_same_in_either_way(options):
    """With dropout in training, DoRA and a bias of B peft's own forward runs: then the bits are equal."""
    model, x = with_lora(**options), torch.randn(3, 48)
    for training in (False, True):
        model.train(training)
        found = []
        for _ in range(2):
            torch.manual_seed(1)
            model.zero_grad()
            out = model(x)
            out.square().sum().backward()
            found.append([out, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
            use_lora_product_(model)
        names = [type(module).__name__ for module in model.modules()]
        assert names.count("FrozenLoraLinear") == 1, "the one on a frozen layer"
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.clients
def test_what_it_does_not_cover_is_left_to_peft():
    model, x = use_lora_product_(with_lora()).eval(), torch.randn(2, 48)
    peft_model = with_lora().eval()
    peft_model.load_state_dict(model.state_dict())
    with model.disable_adapter(), peft_model.disable_adapter():
        assert torch.equal(model(x), peft_model(x))
    mixed = ["default", "__base__"]
    torch.testing.assert_close(model(x, adapter_names=mixed), peft_model(x, adapter_names=mixed))
    for each in (model, peft_model):
        each.add_adapter("second", each.peft_config["default"])
        each.base_model.set_adapter(["default", "second"])
        for name, parameter in each.named_parameters():
            if "second" in name:
                nn.init.constant_(parameter, 0.1)
    torch.testing.assert_close(model(x), peft_model(x))
