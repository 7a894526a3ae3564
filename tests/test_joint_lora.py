"""LoRA inside the rounding: gradients of the composition, and the deployed codes are the training forward's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qat
from qat.errors import LayerError, PolicyError, StateError
from qat.joint_lora import joint_lora
from qat.layers import FrozenLinear, JointLoraLinear

POLICY = {"weight": {"bits": 4, "group_size": 16}}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 16, bias=False)).to(dtype)


def joint(model=None, **options):
    model = joint_lora(model or net(), qat.QuantPolicy.from_dict(POLICY), 4, 8.0, verbose=False, **options)
    for layer in model.modules():
        if isinstance(layer, JointLoraLinear):
            nn.init.normal_(layer.lora_B, std=0.05)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("enabled", [True, False])
def test_value_and_gradients_are_those_of_the_composition(dtype, enabled):
    layer = joint(net(dtype))[0]
    layer.weight_quantizer.enabled = enabled
    x = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True)
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    ours = [p.grad.clone() for p in (x, layer.lora_A, layer.lora_B)]
    step = layer.weight_quantizer.step_size
    ours_step = None if step.grad is None else step.grad.clone()
    for p in (x, layer.lora_A, layer.lora_B, step):
        p.grad = None
    merged = layer.weight.float() + layer.scaling * layer.lora_B @ layer.lora_A
    expected = F.linear(x, layer.weight_quantizer(merged).to(dtype), layer.bias)
    expected.backward(grad)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(out, expected, **tolerance)
    for here, there in zip(ours, (x, layer.lora_A, layer.lora_B), strict=True):
        torch.testing.assert_close(here, there.grad, **tolerance)
    if enabled:
        torch.testing.assert_close(ours_step, step.grad, **tolerance)
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen_base", [False, True])
def test_what_is_deployed_is_the_rounded_sum(tmp_path, dtype, frozen_base):
    model = net(dtype)
    if frozen_base:
        policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=8, group_size=16), init="mse")
        model = qat.freeze(qat.prepare(model, policy, verbose=False))
    model = joint(model)
    x = torch.randn(7, 48, dtype=dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    start = {name: t.codes.clone() for name, t in qat.quantized_tensors(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        expected = model(x)
        sums = {name: layer.merged() for name, layer in model.named_modules() if isinstance(layer, JointLoraLinear)}
        weights = {name: model.get_submodule(name).weight_quantizer(value).to(dtype) for name, value in sums.items()}
    trained = {name: t.codes.clone() for name, t in qat.quantized_tensors(model).items()}
    assert any((trained[name] != start[name]).any() for name in start)
    qat.save(qat.freeze(model), tmp_path)
    assert type(model[0]) is FrozenLinear and not any("lora" in name for name in model.state_dict())
    loaded = qat.load(tmp_path, net(dtype))
    for name, tensor in qat.quantized_tensors(loaded).items():
        assert torch.equal(tensor.codes, trained[name])
        assert torch.equal(tensor.dequantize(dtype), weights[name])
    with torch.no_grad():
        if dtype is torch.float32:
            assert torch.equal(model(x), expected)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-2, atol=1e-2)


def test_it_starts_as_the_prepared_model_and_only_adapters_and_step_sizes_learn():
    plain = qat.prepare(net(), qat.QuantPolicy.from_dict(POLICY), verbose=False)
    model = joint_lora(net(), qat.QuantPolicy.from_dict(POLICY), 4, 8.0, targets=["0"], verbose=False)
    x = torch.randn(4, 48)
    torch.testing.assert_close(model(x), plain(x))
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    steps = {f"{layer}.weight_quantizer.step_size" for layer in "02"}
    assert learns == {"0.lora_A", "0.lora_B"} | steps
    assert "48" in qat.summary(model)


def test_gradient_checkpointing_and_autocast():
    model = joint()
    x = torch.randn(4, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None and model[0].lora_A.grad.dtype is torch.float32


def test_refusals():
    policy = qat.QuantPolicy.from_dict(POLICY)
    with pytest.raises(PolicyError, match=r"'q_proj' matches no quantized linear layer \(known: '0', '2'\)"):
        joint_lora(net(), policy, targets=["q_proj"], verbose=False)
    with pytest.raises(PolicyError, match=r"'0'.*on a symmetric grid"):
        joint_lora(net(), qat.QuantPolicy.from_dict({"weight": {"codebook": "nf4", "group_size": 16}}), verbose=False)
    for base in (net(), qat.freeze(qat.prepare(net(), policy, verbose=False))):
        with pytest.raises(PolicyError, match=r"'0'.*on a symmetric grid"):
            joint_lora(base, qat.QuantPolicy(weight=qat.QuantSpec(symmetric=False)), verbose=False)
    with pytest.raises(StateError, match="prepared already"):
        joint(qat.prepare(net(), policy, verbose=False))
    conv = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 16))
    assert type(joint_lora(conv, policy, verbose=False)[0]) is not JointLoraLinear
    frozen = qat.freeze(qat.prepare(nn.Sequential(nn.Conv2d(16, 16, 1)), policy, verbose=False))
    with pytest.raises(LayerError, match="'0': a FrozenConv2d takes no joint adapter"):
        joint_lora(frozen, policy, verbose=False)


@pytest.mark.parametrize("frozen_base", [False, True])
def test_compiled_it_is_the_same(frozen_base):
    model = net()
    if frozen_base:
        policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=8, group_size=16), init="mse")
        model = qat.freeze(qat.prepare(model, policy, verbose=False))
    layer = joint(model)[0]
    x, found = torch.randn(6, 48, requires_grad=True), []
    learned = [x, layer.lora_A, layer.lora_B, layer.weight_quantizer.step_size]
    torch._dynamo.reset()
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = call(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), learned)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
