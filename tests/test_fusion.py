"""Run: python -m pytest tests/test_fusion.py: projections that run as one, under Triton's interpreter."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import qat
from qat.backend import set_int8_products
from qat.errors import StateError
from qat.fusion import FusedProjections

pytest.importorskip("triton")


class Attention(nn.Module):
    def __init__(self, bias=False, width=64):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, 48, bias),
            nn.Linear(width, 16, bias),
            nn.Linear(width, 20, bias),
        )
        self.gate_proj, self.up_proj = nn.Linear(width, 32, bias), nn.Linear(width, 32, bias)

    def forward(self, x, other=None):
        other = x if other is None else other
        return torch.cat(
            [self.q_proj(x), self.k_proj(other), self.v_proj(other), self.gate_proj(x), self.up_proj(x)], -1
        )


def frozen(bias=False, dynamic=None, **spec):
    """Return a frozen module whose codes lie in the kernels' order, as on a GPU."""
    spec = spec if "granularity" in spec else {"group_size": 32} | spec
    policy = qat.QuantPolicy(weight=qat.QuantSpec(**spec), dynamic=dynamic)
    model = qat.freeze(qat.prepare(Attention(bias), policy, verbose=False))
    lay_out(model)
    return model.requires_grad_(False)


def lay_out(model):
    for module in model.modules():
        if isinstance(module, qat.layers.PackedWeight):
            module.prepack()


@pytest.fixture
def products(monkeypatch):
    """Record the outputs of every product."""
    from qat.kernels import int4_linear as module

    seen, plain = [], module.int4_linear
    monkeypatch.setattr(module, "int4_linear", lambda x, w, b=None: (seen.append(w.out_features), plain(x, w, b))[1])
    return seen


@pytest.mark.parametrize("spec", [{}, {"codebook": "nf4"}, {"dynamic": "int8_token"}, {"dynamic": "q8_0"}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_product_a_group_and_the_same_values(products, spec, bias, dtype, capsys, monkeypatch):
    monkeypatch.setattr("qat.layers.cpu_int4.fits", lambda *_: False)
    model = frozen(bias, **spec)
    x = torch.randn(2, 3, 64).to(dtype)
    expected = model(x)
    assert products == [48, 16, 20, 32, 32]
    products.clear()
    qat.fuse_projections(model)
    assert "2 groups of projections" in capsys.readouterr().out
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert products == [84, 64] * 2
    assert model.q_proj.fused.x is None and not model.q_proj.fused.parts  # nothing is kept alive


@pytest.mark.parametrize("spec", [{}, {"codebook": "nf4"}])
def test_codes_and_state_stay_and_memory_is_shared(spec):
    model = frozen(**spec)
    state, tensors = model.state_dict(), qat.quantized_tensors(model)
    qat.fuse_projections(model, verbose=False)(torch.randn(1, 64))
    for name, tensor in qat.quantized_tensors(model).items():
        assert torch.equal(tensor.codes, tensors[name].codes) and torch.equal(tensor.scale, tensors[name].scale)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    words = [getattr(model, name).packed_weight.gpu_operands[torch.float32].words for name in ("q_proj", "k_proj")]
    assert words[0].untyped_storage().data_ptr() == words[1].untyped_storage().data_ptr()


def test_other_inputs_give_other_results_and_end_the_group(products):
    model = qat.fuse_projections(frozen(), verbose=False)
    plain = copy.deepcopy(model)
    for layer in plain.children():
        layer.fused = None
    x, other = torch.randn(1, 64), torch.randn(1, 64)
    with pytest.warns(UserWarning, match="q_proj and its neighbours have different inputs"):
        y = model(x, other)
    assert torch.equal(y, plain(x, other))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        products.clear()
        assert torch.equal(model(x), plain(x)) and products[:3] == [48, 16, 20]


def test_a_call_that_is_cut_off_does_not_end_the_group(products):
    """As recomputation for gradients is, once it has what it needs."""
    model = qat.fuse_projections(frozen(), verbose=False)
    x = torch.randn(1, 64)
    expected = model(x)
    model.q_proj(torch.randn(1, 64))
    products.clear()
    assert torch.equal(model(x), expected) and products == [84, 64]


def test_a_copy_and_a_moved_model_join_their_own_weights():
    model = qat.fuse_projections(frozen(), verbose=False)
    x = torch.randn(1, 64)
    expected = model(x)
    twin = copy.deepcopy(model)
    for layer in twin.children():
        layer.packed_weight.gpu_operands[torch.float32].words.zero_()
    assert torch.equal(model(x), expected) and not torch.equal(twin(x), expected)
    model.to("cpu")  # undoes the layout, as any move does
    lay_out(model)
    model.q_proj.packed_weight.gpu_operands[torch.float32].words.zero_()
    assert not torch.equal(model(x)[:, :48], expected[:, :48]) and torch.equal(model(x)[:, 48:], expected[:, 48:])


def test_inputs_are_rounded_once_and_anew_for_each_call(monkeypatch):
    rounds, plain = [], qat.quantizers.DynamicActivation.forward
    monkeypatch.setattr(qat.quantizers.DynamicActivation, "forward", lambda self, x: rounds.append(x) or plain(self, x))
    model = frozen(dynamic="int8_token")
    single = copy.deepcopy(model)
    qat.fuse_projections(model, verbose=False)
    x, other = torch.randn(2, 64), torch.randn(2, 64)
    for values in (x.clone(), other):
        expected = single(values)
        rounds.clear()
        model.q_proj(x)  # a call that is cut off
        x.copy_(values)
        assert torch.equal(model(x), expected) and len(rounds) == 3
    group = model.q_proj.fused
    assert group.unrounded is None and group.rounding is None  # nothing is kept alive
    with pytest.warns(UserWarning, match="different inputs"):
        y = model(x, other)
    rounds.clear()
    assert torch.equal(y, single(x, other)) and torch.equal(model(x, other), y) and len(rounds) == 5 + 4


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_multiply_integers_do_so_as_one(products, monkeypatch, bias):
    from qat.kernels import int8_linear as module

    seen, plain = [], module.int8_linear
    monkeypatch.setattr(module, "int8_linear", lambda x, w, *rest: (seen.append(w.out_features), plain(x, w, *rest))[1])
    model = frozen(bias, dynamic="int8_token", granularity="channel")
    x = torch.randn(2, 64)
    set_int8_products(2)
    try:
        expected = model(x)
        assert seen == [48, 16, 20, 32, 32]
        seen.clear()
        qat.fuse_projections(model, verbose=False)
        assert torch.equal(model(x), expected) and not products and seen == [84, 64]
        assert (model(x[:1]) - expected[:1]).abs().max() < 1e-5 and products == [84, 64]
        assert torch.equal(model(x), expected)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            assert y.dtype == torch.bfloat16 and (y - expected).abs().max() < 0.01
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    finally:
        set_int8_products(None)


@pytest.mark.parametrize("dynamic", [None, "int8_token"])
def test_gradients(dynamic):
    model = frozen(dynamic=dynamic)
    x = torch.randn(2, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    qat.fuse_projections(model, verbose=False)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dynamic", [None, "int8_token"])
def test_compiles_into_one_graph(dynamic):
    model = qat.fuse_projections(frozen(dynamic=dynamic), verbose=False)
    x = torch.randn(2, 64)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_what_is_not_fused_is_told(capsys):
    qat.fuse_projections(frozen(bits=3))
    out = capsys.readouterr().out
    assert out.startswith("0 groups") and "not q_proj: not 4 bits on an even grid or NF4" in out
    policy = qat.QuantPolicy(
        weight=qat.QuantSpec(group_size=32), rules=[{"match": "up_proj", "weight": {"group_size": 64}}]
    )
    qat.fuse_projections(qat.freeze(qat.prepare(Attention(), policy, verbose=False)))
    assert "not gate_proj: its layers differ in their specs" in capsys.readouterr().out
    policy = qat.QuantPolicy(weight=qat.QuantSpec(group_size=32), activation={"bits": 8, "granularity": "tensor"})
    model = qat.prepare(Attention(), policy, verbose=False)
    qat.calibrate(model, [torch.randn(4, 64)])
    qat.fuse_projections(qat.freeze(model))  # whose layers have scales of their own
    assert capsys.readouterr().out.count("each layer rounds its input by itself") == 2
    with pytest.raises(StateError, match="frozen model"):
        qat.fuse_projections(Attention())


@torch.no_grad()
def test_transformers_decodes_in_one_compiled_graph():
    """Generation with a static cache, as CUDA graphs take it: fused, one graph, compiled once for all positions."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    policy = qat.QuantPolicy(weight=qat.QuantSpec(group_size=32))
    model = qat.freeze(qat.prepare(model, policy, verbose=False))
    lay_out(model)
    prompt = torch.randint(50, (1, 5))
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    qat.fuse_projections(model, verbose=False)
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "fused", None), FusedProjections)]
    assert len(layers) == 10 and len({id(layer.fused) for layer in layers}) == 4
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    token = model(prompt, past_key_values=cache, cache_position=torch.arange(5)).logits[:, -1:].argmax(-1)
    counter = CompileCounter()
    step, made = torch.compile(model.forward, backend=counter, fullgraph=True, dynamic=False), [prompt, token]
    for at in range(5, 9):
        out = step(made[-1], past_key_values=cache, cache_position=torch.tensor([at]))
        made.append(out.logits.argmax(-1))
    assert torch.equal(torch.cat(made, 1), expected) and counter.frame_count == 1
