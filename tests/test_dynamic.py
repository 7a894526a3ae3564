"""Inputs rounded as ExecuTorch and llama.cpp round them: the arithmetic, where it may be used, and what keeps it."""

import copy

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from torch import nn

import qat
from qat.errors import ArtifactError, LayerError, PolicyError, SpecError
from qat.formats import gguf, gguf_blocks, integer_linears, onnx
from qat.frozen_model import from_model
from qat.policy import QuantPolicy
from qat.quantized_model import QuantizedLayer
from qat.quantizers import DynamicActivation
from qat.quantizers.dynamic import dynamic_codes, reround_, round_dynamic, rounded
from qat.spec import Dynamic

W4 = {"bits": 4, "group_size": 32}
KINDS = list(Dynamic)
F = numpy.float32


def int8_token(row):
    """XNNPACK's arithmetic for one token, one number at a time."""
    low, high = min(F(0), row.min()), max(F(0), row.max())
    factor = F(1) if low == high else F(255) / F(high - low)
    least, most = F(low * factor), F(high * factor)
    nearer_the_minimum = F(F(-128) + least) + F(F(127) + most) > 0
    zero_point = F(-128) - least if nearer_the_minimum else F(127) - most
    zero_point = numpy.rint(min(max(zero_point, F(-128)), F(127)))
    codes = [min(max(numpy.rint(F(value * factor)) + zero_point, -128), 127) for value in row]
    step = F(1) / factor
    return codes, [F(F(code - zero_point) * step) for code in codes]


def q8_0(row):
    """ggml's arithmetic with AVX for one row, one number at a time."""
    codes, values = [], []
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        largest = abs(block).max()
        factor = F(0) if largest == 0 else F(127) / largest
        codes += [numpy.rint(F(value * factor)) for value in block]
        step = F(numpy.float16(F(largest / F(127))))
        values += [F(F(code) * step) for code in codes[start:]]
    return codes, values


ONE_BY_ONE = {Dynamic.int8_token: int8_token, Dynamic.q8_0: q8_0}
rows = st.tuples(st.integers(0, 2**31), st.sampled_from([1e-30, 1e-4, 1.0, 300.0, 1e4]), st.floats(-3, 3))


@pytest.mark.parametrize("kind", KINDS)
@given(rows)
def test_the_arithmetic_is_the_runtimes(kind, row):
    seed, size, offset = row
    x = (torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(seed)) + offset) * size
    codes, _, _ = dynamic_codes(x, kind)
    values = round_dynamic(x, kind)
    for token, code, value in zip(x.view(-1, 64).numpy(), codes.reshape(-1, 64), values.view(-1, 64), strict=True):
        expected_codes, expected_values = ONE_BY_ONE[kind](token)
        assert code.tolist() == [float(code) for code in expected_codes]
        assert value.tolist() == [float(value) for value in expected_values]


def test_int8_token_by_hand():
    """From -1 to 2 the factor is 85: the zero point is -43, and the ends have codes -128 and 127."""
    codes, scale, zero_point = dynamic_codes(torch.tensor([[-1.0, 0.0, 0.5 / 85, 1.5 / 85, 2.0]]), Dynamic.int8_token)
    assert zero_point.item() == -43 and scale.item() == pytest.approx(3 / 255)
    assert codes.tolist() == [[-128.0, -43.0, -43.0, -41.0, 127.0]]  # halves go to the even number


def test_q8_0_by_hand():
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    codes, scale, _ = dynamic_codes(x, Dynamic.q8_0)
    assert codes[0, 0, :5].tolist() == [127.0, 0.0, 2.0, -2.0, 0.0] and not codes[0, 1].any()
    assert scale.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_edges(kind):
    """Zero stays zero, one-sided tokens hold zero too, nothing at all is nothing, and NaN is not hidden."""
    assert not round_dynamic(torch.zeros(2, 32), kind).any()
    assert (round_dynamic(torch.full((1, 32), 5.0), kind) - 5).abs().max() < 0.01
    assert round_dynamic(torch.empty(0, 32), kind).shape == (0, 32)
    assert round_dynamic(torch.full((1, 32), float("nan")), kind).isnan().all()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(4, 32).to(dtype)
        assert torch.equal(round_dynamic(x, kind), round_dynamic(x.float(), kind).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_rounds_again_as_the_forward_did(kind):
    """A clipped code, NaN, and a gradient that float32 cannot hold."""
    x = torch.randn(3, 64, dtype=torch.float64)
    x[0] = torch.linspace(-1.5, 253.5, 64)
    x[1, 3] = float("nan")
    grad = torch.ones_like(x) + 2.0**-40
    y, grad_x = reround_(grad.clone(), x, kind, True, torch.float32)
    wanted = grad.clone()
    if kind == Dynamic.int8_token:
        wanted[0, -1] = 0
    assert torch.equal(grad_x, wanted) and grad_x.dtype == torch.float64
    torch.testing.assert_close(y, rounded(x, kind, torch.float32), rtol=0, atol=0, equal_nan=True)
    assert y[1, 3].isnan() and y[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_passes_straight_through(kind):
    x = torch.randn(8, 64)
    x[0] = torch.linspace(-1.5, 253.5, 64)  # both ends lie half way, and the upper one is clipped
    x.requires_grad_()
    weight = torch.randn(8, 64)
    (round_dynamic(x, kind) * weight).sum().backward()
    expected = weight.clone()
    if kind == Dynamic.int8_token:
        assert int8_token(x[0].detach().numpy())[0][-1] == 127 and dynamic_codes(x, kind)[2][0] == -126
        expected[0, -1] = 0
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_the_same_to_the_bit(kind):
    module = DynamicActivation(kind)
    x, weight = torch.randn(2, 9, 64, requires_grad=True), torch.randn(2, 9, 64)
    (module(x) * weight).sum().backward()
    expected, x.grad = x.grad, None
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    (compiled(x) * weight).sum().backward()
    assert torch.equal(x.grad, expected)


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_trains_freezes_saves_and_loads(kind, tmp_path, capsys):
    model = qat.prepare(network(), QuantPolicy(weight=W4, activation=kind.value))
    assert capsys.readouterr().out.count(f"{kind.value} (dynamic)") == 2
    assert not any("activation" in name for name in model.state_dict())
    x = torch.randn(5, 64)
    expected = model(x)
    assert not torch.equal(expected, qat.prepare(copy.deepcopy(network()), QuantPolicy(weight=W4), verbose=False)(x))
    qat.calibrate(model, [x])  # has nothing to do
    qat.freeze(model)
    assert torch.equal(model(x), expected)
    qat.save(model, tmp_path / "artifact")
    loaded = qat.load(tmp_path / "artifact", model=network())
    assert torch.equal(loaded(x), expected)
    assert f"{kind.value} (dynamic)" in qat.summary(loaded)
    plain = from_model(loaded).layers["0"].to_dict()
    assert plain["activation"] == kind.value and QuantizedLayer.from_dict(plain).activation is kind


def test_the_input_that_a_layer_sees_is_rounded():
    model = qat.prepare(network(), QuantPolicy(weight=W4, dynamic="q8_0"), verbose=False)
    x = torch.randn(5, 64)
    weight = model[0].weight_quantizer(model[0].weight)
    rounded = torch.tensor(numpy.array([q8_0(row)[1] for row in x.numpy()]))
    assert torch.equal(model[0](x), nn.functional.linear(rounded, weight, model[0].bias))


def test_the_policy_takes_words_in_two_places():
    by_key = QuantPolicy(weight=W4, dynamic="q8_0")
    assert by_key == QuantPolicy(weight=W4, activation="q8_0") == QuantPolicy(weight=W4, activation=Dynamic.q8_0)
    assert by_key.specs_of(None)[1] is Dynamic.q8_0
    assert QuantPolicy.from_dict(by_key.to_dict()) == by_key
    mixed = QuantPolicy(weight=W4, rules=[{"match": "x", "activation": "int8_token"}])
    assert mixed.specs_of(mixed.rules[0])[1] is Dynamic.int8_token and mixed.specs_of(None)[1] is None
    assert QuantPolicy.from_dict(mixed.to_dict()) == mixed
    assert by_key.specs_of({"match": "x", "activation": None})[1] is None
    assert by_key.specs_of({"match": "x", "weight": None}) == (None, None)  # its runtime rounds no such layer's input
    assert by_key.specs_of({"match": "x", "activation": {"bits": 8}})[1].bits == 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": W4, "activation": "q80"}, SpecError, "did you mean 'q8_0'"),
        ({"weight": W4, "dynamic": "int8"}, SpecError, "dynamic='int8' is unknown"),
        ({"weight": W4, "dynamic": "q8_0", "activation": {"bits": 8}}, PolicyError, "set one to null"),
        ({"dynamic": "q8_0"}, PolicyError, "set weight too"),
        ({"rules": [{"match": "x", "activation": "q8_0"}]}, PolicyError, "set weight too"),
    ],
)
def test_policies_that_contradict_themselves(arguments, error, message):
    with pytest.raises(error, match=message):
        QuantPolicy(**arguments)


def test_hydra_types_the_key(tmp_path):
    schema = OmegaConf.structured(QuantPolicy)
    made = OmegaConf.to_object(OmegaConf.merge(schema, {"weight": W4, "dynamic": "int8_token"}))
    assert made == QuantPolicy(weight=W4, activation="int8_token")
    with pytest.raises(ValidationError, match=r"expected one of \[int8_token, q8_0\]"):
        OmegaConf.merge(schema, {"dynamic": "int8"})
    file = tmp_path / "policy.yaml"
    file.write_text("weight: {bits: 4, group_size: 32}\nactivation: int8_token\n")
    assert QuantPolicy.from_yaml(file) == made


def test_layers_that_no_runtime_rounds_so_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(40, 8))
    with pytest.raises(LayerError) as error:
        qat.prepare(model, QuantPolicy(weight={"bits": 4}, dynamic="q8_0"))
    assert "'0': q8_0 is for linear layers, not for a Conv2d" in str(error.value)
    assert "'1': q8_0 rounds 32 inputs at a time, which do not divide its 40" in str(error.value)


def layer(activation, weight=None):
    spec = weight or qat.QuantSpec(group_size=32, signed=True)
    return QuantizedLayer("Linear", [8, 32], spec, activation)


def test_formats_take_their_own_rounding_and_refuse_the_others():
    assert gguf_blocks.block_type(layer(Dynamic.q8_0)) == "Q4_0"
    with pytest.raises(ArtifactError, match=r"int8_token, and llama\.cpp rounds as q8_0: use --to executorch"):
        gguf_blocks.block_type(layer(Dynamic.int8_token))
    for kind, fix in ((Dynamic.q8_0, "gguf"), (Dynamic.int8_token, "executorch")):
        model = from_model(qat.freeze(qat.prepare(network(), QuantPolicy(weight=W4, dynamic=kind), verbose=False)))
        with pytest.raises(ArtifactError, match=rf"'0' trained with its input rounded as {kind.value}.*--to {fix}"):
            onnx.write(model, None)
        model.architecture = {"transformers": {}}
        with pytest.raises(ArtifactError, match=rf"'2' trained with its input rounded as {kind.value}.*--to {fix}"):
            integer_linears.weight_only_layers(model, "awq")


@pytest.mark.clients
def test_torchao_rounds_alike_but_at_the_middle_of_two_codes():
    tensors = pytest.importorskip("torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor")
    x = torch.randn(4096, 64) * torch.logspace(-3, 3, 4096)[:, None]
    found = tensors._apply_int8_act_asym_per_token_quant_dequant(x)
    codes, scale, zero_point = dynamic_codes(x, Dynamic.int8_token)
    off = ((found / scale + zero_point).round() - codes).abs()
    assert off.max() <= 1 and off.count_nonzero() < 20
    assert ((found - round_dynamic(x, Dynamic.int8_token)).abs() <= 1e-5 * 255 * scale)[off == 0].all()
    halves = (x / scale - (x / scale).floor() - 0.5).abs()
    assert (halves[off > 0] < 1e-4).all()


@pytest.mark.clients
def test_llama_cpp_computes_what_was_trained(tmp_path):
    """Of a prompt of one token no other rounding stands between the two, with keys and values in float32."""
    xllamacpp = pytest.importorskip("xllamacpp")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config)
    policy = QuantPolicy(weight=W4, dynamic="q8_0", rules=[{"match": "lm_head", "weight": None}])
    model = qat.freeze(qat.prepare(model, policy, verbose=False))
    notes = gguf.write(from_model(model), tmp_path)
    assert any("7 of 7 were trained with exactly that" in note for note in notes)
    assert "transformers, gguf_file=" in dict(gguf.verify(tmp_path, from_model(model)))
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = str(tmp_path / gguf.FILE), 256, 0, False
    params.verbosity = -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    gaps = {True: [], False: []}
    for token in range(0, 96, 8):
        request = {"prompt": [token], "max_tokens": 1, "logprobs": 20, "temperature": 0.0, "cache_prompt": False}
        answer = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        for rounding in gaps:
            for module in model.modules():
                if isinstance(module, DynamicActivation):
                    module.enabled = rounding
            with torch.no_grad():
                ours = model(torch.tensor([[token]])).logits[0, -1].log_softmax(0)
            gaps[rounding].append(max(abs(ours[entry["id"]].item() - entry["logprob"]) for entry in answer))
    assert max(gaps[True]) < 0.1 * min(gaps[False]), gaps
