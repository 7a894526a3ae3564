"""QA-LoRA: the deployed weight is the training forward's, its codes are the base's, its gradients the composition's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qat
from qat import formats
from qat.errors import ArtifactError, LayerError, PolicyError, SpecError, StateError
from qat.frozen_model import from_model
from qat.joint_lora import joint_lora
from qat.layers import FrozenLinear, QALoraLinear
from qat.lora import lora
from qat.qa_lora import qa_lora

POLICY = {"weight": {"bits": 4, "group_size": 16}, "init": "mse"}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 16, bias=False)).to(dtype)


def trained(model=None, policy=POLICY, std=0.02, **options):
    model = qa_lora(model or net(), qat.QuantPolicy.from_dict(policy), rank=4, alpha=8.0, **options)
    for layer in model.modules():
        if isinstance(layer, QALoraLinear):
            nn.init.normal_(layer.weight_quantizer.lora_B, std=std)
    return model


def test_the_published_identity():
    """W' x is the base's W x plus scaling * B A of x summed over groups, up to the rounding of the zero points."""
    layer = trained()[0]
    quantizer, x = layer.weight_quantizer, torch.randn(7, 48)
    base = F.linear(x, layer.packed_weight.dequantize(torch.float32), layer.bias)
    sums = x.view(7, 3, 16).sum(-1)
    expected = base + quantizer.scaling * sums @ quantizer.lora_A.t() @ quantizer.lora_B.t()
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_published_forward(dtype):
    layer = trained(net(dtype))[0]
    quantizer = layer.weight_quantizer
    x = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 5, 32, dtype=dtype)
    layer(x).backward(grad)
    a, b = (p.detach().clone().requires_grad_() for p in (quantizer.lora_A, quantizer.lora_B))
    y = x.detach().float().requires_grad_()
    out = F.linear(y, layer.packed_weight.dequantize(torch.float32))
    (out + quantizer.scaling * y.unflatten(-1, (3, 16)).sum(-1) @ a.t() @ b.t()).backward(grad.float())
    tolerance = {"rtol": 1e-3, "atol": 3e-3} if dtype is torch.float32 else {"rtol": 4e-2, "atol": 8e-2}
    for here, there in ((quantizer.lora_A, a), (quantizer.lora_B, b), (x, y)):
        torch.testing.assert_close(here.grad.float(), there.grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [{"bits": 4, "group_size": 16}, {"bits": 3, "granularity": "channel"}])
def test_the_merge_is_exact(tmp_path, dtype, spec):
    policy = qat.QuantPolicy.from_dict({**POLICY, "weight": spec})
    base = qat.quantized_tensors(qat.freeze(qat.prepare(net(dtype), policy, verbose=False)))
    model = trained(net(dtype), policy.to_dict())
    x = torch.randn(7, 48, dtype=dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(x).float().square().mean().backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.weight_quantizer.lora_{part}" for layer in "02" for part in "AB"
    }
    with torch.no_grad():
        expected = model(x)
    weights = {name: t.dequantize(dtype) for name, t in qat.quantized_tensors(model).items()}
    qat.save(qat.freeze(model), tmp_path)
    loaded = qat.load(tmp_path, net(dtype))
    for frozen in (model, loaded):
        assert type(frozen[0]) is FrozenLinear
        with torch.no_grad():
            assert torch.equal(frozen(x), expected)
        for name, tensor in qat.quantized_tensors(frozen).items():
            assert torch.equal(tensor.codes, base[name].codes) and torch.equal(tensor.scale, base[name].scale)
            assert tensor.zero_point.dtype is torch.float16 and tensor.zero_point.any()
            assert torch.equal(tensor.dequantize(dtype), weights[name])
    assert "real zero points" in qat.summary(loaded)
    groups = 1 if "granularity" in spec else 3
    bits = qat.quantized_tensors(loaded)["0"].bits_per_weight
    assert bits == spec["bits"] + 32 * groups / 48


def test_it_starts_as_its_base_and_adds_to_zero_points_that_are_there():
    base = qat.freeze(qat.prepare(net(), qat.QuantPolicy.from_dict(POLICY), verbose=False))
    x = torch.randn(4, 48)
    expected = base(x)
    assert torch.equal(qa_lora(base)(x), expected)
    once = qat.freeze(trained())
    expected = once(x)
    assert torch.equal(qa_lora(once)(x), expected)


def test_a_model_in_training_is_not_saved(tmp_path):
    with pytest.raises(StateError, match="still trains"):
        qat.save(trained(), tmp_path)


@pytest.mark.parametrize("name", [name for name in formats.FORMATS if name != "native"])
def test_other_formats_refuse_real_zero_points_by_name(tmp_path, name):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    policy = {"weight": {"group_size": 32}, "rules": [{"match": "lm_head", "weight": None}]}
    model = from_model(qat.freeze(trained(llama, policy)))
    with pytest.raises(ArtifactError, match=r"int4 g32 real zero points weights, whose levels .*--to native holds it"):
        formats.module(name).write(model, tmp_path)


def test_refusals():
    with pytest.raises(StateError, match="give a frozen model"):
        qa_lora(net())
    with pytest.raises(PolicyError, match="'q_proj' matches no quantized linear layer"):
        trained(targets=["q_proj"])
    for spec in ({"codebook": "nf4", "group_size": 16}, {"granularity": "tensor"}):
        with pytest.raises(LayerError, match=r"'0'.*has no zero points to train"):
            trained(policy={"weight": spec})
    with pytest.raises(SpecError, match="is for symmetric=False"):
        qat.QuantSpec(zero_point_dtype="float16")
    with pytest.raises(SpecError, match="zero_point_dtype='float61' is unknown"):
        qat.QuantSpec(symmetric=False, zero_point_dtype="float61")


@pytest.mark.parametrize("adapter", [qa_lora, lora, joint_lora])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rank": 0}, "adapter.rank=0: give a whole number of 1 or more"),
        ({"rank": -3}, "adapter.rank=-3"),
        ({"rank": 2.5}, "adapter.rank=2.5"),
        ({"alpha": 0}, "adapter.alpha=0: give a number above 0, such as 32"),
        ({"alpha": float("nan")}, "adapter.alpha=nan"),
        ({"alpha": float("inf")}, "adapter.alpha=inf"),
    ],
)
def test_an_update_of_no_size_is_refused_and_the_model_left_alone(adapter, more, said):
    if adapter is lora:
        pytest.importorskip("peft")
    model = net()
    with pytest.raises(PolicyError, match=said):
        adapter(model, qat.QuantPolicy.from_dict(POLICY), **more)
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]


@pytest.mark.parametrize("adapter", [qa_lora, lora], ids=["qa_lora", "lora"])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"activation": {"bits": 8, "granularity": "tensor"}}, r"wait for some \('0', '2'\): set policy.activation"),
        ({"rules": [{"match": "2", "activation": {"bits": 8}}]}, r"wait for some \('2'\)"),
        ({"init": "gptq"}, "policy.init=gptq reads data, and the base of an adapter is frozen before any is seen"),
    ],
)
def test_a_base_that_waits_for_data_is_refused_and_left_alone(adapter, more, said):
    if adapter is lora:
        pytest.importorskip("peft")
    model = net()
    with pytest.raises(PolicyError, match=said):
        adapter(model, qat.QuantPolicy.from_dict({**POLICY, **more}))
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_it_trains_what_ships(backend, autocast):
    """Inductor would leave zero points in float32, where what ships has them in float16."""
    model, x, seen = trained(std=0.1)[0], torch.randn(5, 48), []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
        y.float().square().sum().backward()
        seen.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert torch.equal(seen[0][0], seen[1][0])
    for here, there in zip(*seen, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5 * there.abs().max().item())
