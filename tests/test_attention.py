"""nn.MultiheadAttention split into linear layers: torch's own answers, quantized, frozen, and through the formats."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qat
from qat.errors import LayerError, PolicyError
from qat.frozen_model import from_model, to_model
from qat.layers import FrozenLinear, QuantLinear, SplitAttention, split_attentions_
from qat.numerics import fake_quantize

W4 = qat.QuantPolicy(weight=qat.QuantSpec(bits=4))
W4A8 = qat.QuantPolicy(weight=qat.QuantSpec(bits=4), activation=qat.QuantSpec(bits=8, granularity="tensor"))


def attention(seed=0, **options):
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(12, 3, **options)
    for parameter in module.parameters():  # biases are zero at first
        nn.init.normal_(parameter, std=0.3)
    return module


def split(module):
    module = copy.deepcopy(module)
    split_attentions_(module)
    return module


def close(found, expected):
    if expected is None:
        assert found is None
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@given(
    batch_first=st.booleans(),
    batched=st.booleans(),
    bias=st.booleans(),
    bias_kv=st.booleans(),
    zero_attn=st.booleans(),
    sizes=st.sampled_from([(None, None), (8, 8), (8, 12), (None, 5)]),
    need_weights=st.booleans(),
    average=st.booleans(),
    mask=st.sampled_from([None, "bool", "float", "3d", "causal"]),
    padding=st.sampled_from([None, "bool", "float"]),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_torchs(
    batch_first, batched, bias, bias_kv, zero_attn, sizes, need_weights, average, mask, padding, seed
):
    kdim, vdim = sizes
    options = {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero_attn, "kdim": kdim, "vdim": vdim}
    plain = attention(seed, batch_first=batch_first, **options)
    ours = split(plain)
    batch, length, keys = 2 if batched else 1, 4, 4 if mask == "causal" else 5
    widths = (12, kdim or 12, vdim or 12)
    inputs = [torch.randn(batch, n, k) for n, k in zip((length, keys, keys), widths, strict=True)]
    if not batched:
        inputs = [x[0] for x in inputs]
    elif not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    masks = {}
    if mask == "causal":
        masks = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(4), "is_causal": True}
    elif mask is not None:
        shape = (batch * 3, length, keys) if mask == "3d" else (length, keys)
        drawn = torch.rand(shape)
        drawn[..., 0] = 0  # somewhere to look
        masks["attn_mask"] = (drawn > 0.8) if mask == "bool" else drawn
    if padding is not None:
        drawn = torch.rand((batch, keys) if batched else (keys,))
        drawn[..., 0] = 0
        floats = padding == "float" or (masks and masks["attn_mask"].is_floating_point())
        masks["key_padding_mask"] = drawn if floats else drawn > 0.7
        if masks.get("attn_mask") is not None and floats:
            masks["attn_mask"] = masks["attn_mask"].float()
    options = {"need_weights": need_weights, "average_attn_weights": average, **masks}
    results = []
    for module in (plain, ours):
        x = [part.clone().requires_grad_() for part in inputs]
        y, weights = module(*x, **options)
        assert (weights is None) is not need_weights
        y.square().sum().backward()
        results.append((y, weights, *(part.grad for part in x)))
    for theirs, mine in zip(*results, strict=True):
        close(mine, theirs)
    if bias:
        joined = torch.cat([getattr(ours, name).bias.grad for name in ("q_proj", "k_proj", "v_proj")])
        close(joined, plain.in_proj_bias.grad)


def test_dropout_draws_torchs_numbers():
    plain = attention(dropout=0.5, batch_first=True)
    ours, x = split(plain), torch.randn(2, 5, 12)
    for need_weights in (False, True):
        torch.manual_seed(1)
        expected = plain(x, x, x, need_weights=need_weights)
        torch.manual_seed(1)
        for mine, theirs in zip(ours(x, x, x, need_weights=need_weights), expected, strict=True):
            close(mine, theirs)


def test_masks_of_another_shape_are_named():
    module, x = split(attention(batch_first=True)), torch.randn(2, 5, 12)
    with pytest.raises(LayerError, match=r"attn_mask is \[1, 5\], not \[5, 5\] or \[6, 5, 5\]"):
        module(x, x, x, attn_mask=torch.zeros(1, 5))
    with pytest.raises(LayerError, match=r"key_padding_mask is \[1, 5\], not \[2, 5\]"):
        module(x, x, x, key_padding_mask=torch.zeros(1, 5))
    with pytest.raises(LayerError, match="is_causal is a hint about attn_mask"):
        module(x, x, x, is_causal=True)


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 12}, {"bias": False}])
def test_a_state_dict_of_the_original_loads(options):
    plain, other = attention(**options), split(attention(1, **options))
    assert other.load_state_dict(plain.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    sizes = (12, options.get("kdim", 12), options.get("vdim", 12))
    x = [torch.randn(5, 2, size) for size in sizes]
    close(other(*x)[0], plain(*x)[0])


def test_four_projections_are_quantized_and_called():
    module = attention(batch_first=True)
    originals = [part.detach().clone() for part in (*module.in_proj_weight.chunk(3), module.out_proj.weight)]
    model = qat.prepare(nn.Sequential(module), W4, verbose=False)
    assert model[0] is module and isinstance(module, SplitAttention)
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert list(qat.quantized_tensors(model)) == [f"0.{name}" for name in names]
    x, rounded, expected = torch.randn(2, 5, 12), attention(batch_first=True), []
    with torch.no_grad():
        for name, original in zip(names, originals, strict=True):
            layer = getattr(module, name)
            assert type(layer) is QuantLinear and torch.equal(layer.weight, original)
            expected.append(fake_quantize(original, layer.weight_quantizer.scale(), layer.weight_quantizer.spec))
        rounded.in_proj_weight.copy_(torch.cat(expected[:3]))
        rounded.out_proj.weight.copy_(expected[3])
    close(module(x, x, x)[0], rounded(x, x, x)[0])
    module(x, x, x)[0].sum().backward()
    assert all(getattr(module, name).weight_quantizer.step_size.grad is not None for name in names)


class Vision(nn.Module):
    """The encoder of torchvision's ViT, smaller: its blocks call self_attention(x, x, x, need_weights=False)."""

    def __init__(self, layers=2):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, 32, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 17, 32) * 0.1)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.self_attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def vision(policy, **options):
    torch.manual_seed(0)
    model = qat.prepare(Vision(**options), policy, verbose=False)
    if isinstance(policy, str) or policy.activation is not None:
        qat.calibrate(model, [torch.rand(8, 3, 16, 16)])
    return qat.freeze(model)


def test_every_matrix_of_a_vision_transformer_is_quantized():
    model = vision("vit_w4a8")
    sizes = {name: tensor.codes.numel() for name, tensor in qat.quantized_tensors(model).items()}
    assert len(sizes) == 1 + 2 * 6 + 1
    kept = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert kept == 18 * 32  # the position embedding and the class token
    matrices = sum(parameter.numel() for parameter in Vision().parameters() if parameter.dim() > 1)
    assert sum(sizes.values()) == matrices - kept


@pytest.mark.parametrize("policy", [W4, W4A8])
def test_an_artifact_round_trips(policy, tmp_path):
    model, x = vision(policy), torch.rand(3, 3, 16, 16)
    attention = model.layers[1].self_attention
    assert all(type(getattr(attention, name)) is FrozenLinear for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    qat.save(model, tmp_path)
    loaded = qat.load(tmp_path, model=Vision())
    assert torch.equal(loaded(x), model(x))
    again = to_model(from_model(loaded), Vision())
    assert torch.equal(again(x), model(x))


def test_attention_left_alone_round_trips_too(tmp_path):
    policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=4), rules=[{"match": "*.self_attention.*", "weight": None}])
    model, x = vision(policy), torch.rand(3, 3, 16, 16)
    assert not any("self_attention" in name for name in qat.quantized_tensors(model))
    qat.save(model, tmp_path)
    assert torch.equal(qat.load(tmp_path, model=Vision())(x), model(x))


def test_a_prepared_state_dict_loads_into_another(tmp_path):
    first, second = (qat.prepare(Vision(), W4, verbose=False) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(first(x), second(x))


def test_an_error_leaves_the_model_as_it_was():
    model = Vision()
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    for policy, error in (({"weight": {"group_size": 7}}, LayerError), ({"rules": [{"match": "no"}]}, PolicyError)):
        with pytest.raises(error):
            qat.prepare(model, policy, verbose=False)
    assert list(model.state_dict()) == names and type(model.layers[0].self_attention) is nn.MultiheadAttention
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model.eval()(torch.rand(3, 3, 16, 16))


def test_tied_weights_stay_tied_and_subclasses_alone(capsys):
    class Own(nn.MultiheadAttention):
        pass

    a, b, own = attention(), attention(), Own(12, 3)
    b.in_proj_weight = a.in_proj_weight
    qat.prepare(nn.ModuleList([a, b, own]), W4)
    assert a.q_proj.weight is b.q_proj.weight and a.q_proj.weight_quantizer is b.q_proj.weight_quantizer
    assert type(own) is Own
    assert "parameter of Own, stays in full precision" in capsys.readouterr().out


def test_decoders_attend_to_another_sequence():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
    plain, x, memory = copy.deepcopy(layer), torch.randn(2, 4, 12), torch.randn(2, 6, 12)
    policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=4), rules=[{"match": "*", "weight": None}])
    qat.prepare(layer, policy, verbose=False)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    for module in (layer, plain):
        module.eval()
    with torch.no_grad():
        close(layer(x, memory, tgt_mask=causal), plain(x, memory, tgt_mask=causal))


def test_other_code_reads_the_joined_weight():
    """Such as torch's encoder layer, which must not take its fast path, and transformers, which starts it anew."""
    plain = attention(batch_first=True)
    module = qat.prepare(nn.Sequential(split(plain)), W4, verbose=False)[0]
    assert torch.equal(module.in_proj_weight, plain.in_proj_weight)
    assert torch.equal(module.in_proj_bias, plain.in_proj_bias)
    nn.init.zeros_(module.in_proj_weight)
    assert torch.equal(module.in_proj_weight, plain.in_proj_weight)
    assert split(attention(kdim=8)).in_proj_weight is None and split(attention(bias=False)).in_proj_bias is None


def test_a_transformers_model_that_holds_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    import qat.hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=4)
    model = qat.prepare(transformers.SiglipVisionModel(config).eval(), W4, verbose=False)
    assert "head.attention.v_proj" in qat.quantized_tensors(model)
    qat.save(qat.freeze(model), tmp_path)
    x = torch.rand(2, 3, 16, 16)
    expected = model(pixel_values=x).pooler_output
    for loaded in (qat.load(tmp_path), transformers.SiglipVisionModel.from_pretrained(tmp_path)):
        assert torch.equal(loaded(pixel_values=x).pooler_output, expected)


@pytest.mark.clients
@pytest.mark.parametrize("policy", [W4, W4A8, "vit_w4a8"])
def test_onnx_runs_a_vision_transformer(policy, tmp_path):
    onnx = qat.formats.module("onnx")
    for client in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(client)
    model = from_model(vision(policy))
    model.example = {"shape": [3, 16, 16], "dtype": "float32", "low": 0, "high": 1}
    onnx.write(model, tmp_path, Vision())
    rows = dict(onnx.verify(tmp_path, model, Vision()))
    assert rows["onnxruntime, weights"].startswith("14 layers equal q*s in every bit")
    assert rows["onnxruntime, outputs"].endswith("argmax equal in 100.00%"), rows
