"""GPTQ and AWQ: pinned by hand, every layer exact or refused, and onnxruntime-genai agrees."""

import json

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_quantized import LLAMA, random_tensor, rewrite, weight
from safetensors.torch import load_file, save_file

import qat
from qat.errors import ArtifactError
from qat.formats import awq, gptq
from qat.formats.comparison import compare_own
from qat.frozen_model import from_model
from qat.numerics import QuantizedTensor
from qat.quantized_model import QuantizedLayer, QuantizedModel

ONE, TWO = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
FORMATS = {"gptq": gptq, "awq": awq}


def model_of(tensors, config=()):
    layers = {name: QuantizedLayer("Linear", list(t.codes.shape), t.spec, None) for name, t in tensors.items()}
    dense = {"model.embed_tokens.weight": torch.randn(9, 4), "lm_head.weight": torch.randn(9, 4)}
    dense |= {f"{ONE}.bias": torch.randn(3), "model.layers.0.mlp.gate_proj.weight": torch.randn(5, 4)}
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9, **dict(config)}
    return QuantizedModel({"transformers": values}, layers, tensors.__getitem__, {}.__getitem__, dense)


def written(method, folder, tensors):
    """Return (model, stored tensors, quantization config, notes)."""
    model = model_of(tensors)
    notes = FORMATS[method].write(model, folder)
    config = json.loads((folder / "config.json").read_text())
    return model, load_file(folder / "model.safetensors"), config["quantization_config"], notes


def edit(folder, **changes):
    """Apply changes to the quantization config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def words(tensor):
    return tensor.numpy().view("uint32").tolist()


def counting(symmetric):
    """Eight outputs of 16 inputs: output n counts up from code n - 8 along K."""
    codes = ((torch.arange(8)[:, None] + torch.arange(16)) % 16 - 8).to(torch.int8)
    scale = torch.exp2(torch.arange(8.0))[:, None].bfloat16()
    zero_point = None if symmetric else torch.arange(-8, 8, 2, dtype=torch.int8)[:, None]
    return QuantizedTensor(codes, scale, weight(symmetric=symmetric), zero_point)


def test_gptq_to_the_nibble(tmp_path):
    _, stored, quantization, _ = written("gptq", tmp_path, {ONE: counting(symmetric=True)})
    assert words(stored[f"{ONE}.qweight"])[0][:3] == [
        0x76543210,
        0x87654321,
        0x98765432,
    ]  # inputs 0 to 7 of outputs 0...
    assert words(stored[f"{ONE}.qweight"])[1][0] == 0xFEDCBA98
    assert words(stored[f"{ONE}.qzeros"]) == [[0x77777777]]  # version 1: zero point 8, less one
    assert stored[f"{ONE}.scales"].tolist() == [[1, 2, 4, 8, 16, 32, 64, 128]]
    assert stored[f"{ONE}.scales"].dtype == torch.float16
    assert stored[f"{ONE}.g_idx"].tolist() == [0] * 16
    assert quantization["group_size"] == -1 and quantization["sym"] and not quantization["desc_act"]
    assert quantization["checkpoint_format"] == "gptq"
    assert quantization["dynamic"] == {r"-:^model\.layers\.0\.mlp\.gate_proj$": {}}


def test_awq_to_the_nibble(tmp_path):
    tensor = counting(symmetric=False)
    packed = awq.pack_outputs(tensor.codes.t())
    assert words(packed)[0] == [0x75316420]  # nibbles 0 2 4 6 1 3 5 7, low first: input 0 of outputs 0 to 7
    assert words(packed)[1] == [0x86427531]
    assert words(awq.pack_outputs(tensor.zero_point.t())) == [[0xEA62C840]]
    _, stored, quantization, notes = written("awq", tmp_path, {ONE: random_tensor(16, 64, weight(group_size=32))})
    assert stored[f"{ONE}.qweight"].shape == (64, 2)
    assert words(stored[f"{ONE}.qzeros"]) == [[0x88888888] * 2] * 2
    assert stored[f"{ONE}.scales"].shape == (2, 16) and stored[f"{ONE}.scales"].dtype == torch.float16
    assert quantization["group_size"] == 32 and quantization["zero_point"] and quantization["version"] == "gemm"
    assert quantization["modules_to_not_convert"] == ["model.layers.0.mlp.gate_proj"]
    assert not quantization["lm_head"]
    assert "skips layers (model.layers.0.mlp.gate_proj)" in notes[1] and "Marlin" in notes[2]


@pytest.mark.parametrize("method", FORMATS)
@given(
    bits=st.integers(2, 4),
    grids=st.lists(st.sampled_from([None, "tensor", 32, 64, 96, 256]), min_size=1, max_size=3),
    symmetric=st.booleans(),
    rows=st.integers(1, 4),
    scale=st.sampled_from(["bfloat16", "float16"]),
)
def test_any_layers_survive(tmp_path_factory, method, bits, grids, symmetric, rows, scale):
    folder = tmp_path_factory.mktemp("out")
    symmetric = symmetric or method == "gptq"
    tensors = {}
    for index, group in enumerate(grids):
        options = {"granularity": group} if group == "tensor" else {"group_size": group}
        spec = weight(bits, **options, symmetric=symmetric, scale_dtype=scale)
        tensors[f"model.layers.{index}.a"] = random_tensor(8 * (rows + index), 768, spec, index)
    model = model_of(tensors)
    FORMATS[method].write(model, folder)
    read = FORMATS[method].read(folder)
    compare_own(model, read)
    for name, tensor in tensors.items():
        made = read.quantized(name)
        assert torch.equal(made.codes, tensor.codes)
        repeats = made.scale.shape[1] // tensor.scale.shape[1]
        assert torch.equal(made.scale.float(), tensor.scale.float().repeat_interleave(repeats, 1).expand_as(made.scale))
        assert made.spec.scale_dtype == "float16"


@pytest.mark.parametrize("method", FORMATS)
def test_what_does_not_fit_is_refused_by_name(tmp_path, method):
    for spec, shape, message in (
        (weight(8), (8, 64), f"'{TWO}' has 8 bits, and {method} 4 for all; --to compressed-tensors"),
        (weight(), (12, 64), rf"'{TWO}' is \[12, 64\], and {method} packs eight"),
        (weight(group_size=24), (8, 48), f"'{TWO}' has groups of 24"),
        (weight(scale_dtype="float32", group_size=64), (8, 64), rf"'{TWO}' has \d of 8 scales or biases that float16"),
    ):
        tensors = {ONE: random_tensor(8, 64, weight(group_size=64)), TWO: random_tensor(*shape, spec)}
        with pytest.raises(ArtifactError, match=message):
            FORMATS[method].write(model_of(tensors), tmp_path)
    small = random_tensor(8, 64, weight(group_size=64))
    small.scale[3] = 2.0**-26
    with pytest.raises(ArtifactError, match=f"'{ONE}' has 1 of 8 scales .* at least 2\\^-17"):
        FORMATS[method].write(model_of({ONE: small}), tmp_path)


def test_gptq_refuses_zero_points(tmp_path):
    tensor = random_tensor(8, 64, weight(group_size=64, symmetric=False))
    with pytest.raises(ArtifactError, match=f"'{ONE}' is asymmetric.*--to awq"):
        gptq.write(model_of({ONE: tensor}), tmp_path)


def foreign_gptq(folder, version, bits=4, zero_points=None):
    """Write an asymmetric GPTQ model as other tools do; return its codes less zero points times scales."""
    generator = torch.Generator().manual_seed(0)
    per_word = 32 // bits
    u = torch.randint(0, 2**bits, (64, 16), generator=generator)
    zeros = torch.randint(1, 2**bits, (2, 16), generator=generator) if zero_points is None else zero_points
    scales = torch.rand(2, 16, generator=generator).half()

    def pack(values):  # (rows, columns) along columns
        shifts = torch.arange(per_word) * bits
        packed = (values.unflatten(1, (-1, per_word)) << shifts).sum(-1)
        return torch.from_numpy(packed.numpy().astype(numpy.uint32).view(numpy.int32))

    stored = {
        f"{ONE}.qweight": pack(u.t()).t().contiguous(),
        f"{ONE}.qzeros": pack(zeros - int(version == "gptq")),
        f"{ONE}.scales": scales,
        f"{ONE}.g_idx": torch.arange(64, dtype=torch.int32) // 32,
        "lm_head.weight": torch.ones(2, 2),
    }
    save_file(stored, folder / "model.safetensors")
    config = {"bits": bits, "group_size": 32, "desc_act": False, "sym": False, "checkpoint_format": version}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "quantize_config.json").write_text(json.dumps(config))
    return ((u - zeros.repeat_interleave(32, 0)) * scales.float().repeat_interleave(32, 0)).t()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_foreign_gptq_reads(tmp_path, version, bits):
    expected = foreign_gptq(tmp_path, version, bits)
    tensor = gptq.read(tmp_path).quantized(ONE)
    assert tensor.spec.bits == bits and not tensor.spec.symmetric and tensor.spec.group_size == 32
    assert torch.equal(tensor.dequantize(), expected)


def test_gptq_that_cannot_be_read_is_said(tmp_path):
    written("gptq", tmp_path, {ONE: random_tensor(8, 64, weight(group_size=64))})
    rewrite(tmp_path, lambda stored: stored[f"{ONE}.g_idx"].copy_(torch.arange(64).flip(0) // 32))
    with pytest.raises(ArtifactError, match=f"'{ONE}' cannot be read: its inputs are in the order of activations"):
        gptq.read(tmp_path)
    edit(tmp_path, bits=3)
    with pytest.raises(ArtifactError, match="has bits 3"):
        gptq.read(tmp_path)
    edit(tmp_path, bits=4, dynamic={"+:.*down.*": {"bits": 8}})
    with pytest.raises(ArtifactError, match="2, 4 or 8 bits for the whole model"):
        gptq.read(tmp_path)
    zero_points = torch.full((2, 16), 16)
    foreign_gptq(tmp_path, "gptq", zero_points=zero_points)
    with pytest.raises(ArtifactError, match="which clients read as that or as 0"):
        gptq.read(tmp_path)


def test_awq_that_cannot_be_read_is_said(tmp_path):
    written("awq", tmp_path, {ONE: random_tensor(8, 64, weight(group_size=64))})
    edit(tmp_path, version="gemv")
    with pytest.raises(ArtifactError, match="version 'gemv'"):
        awq.read(tmp_path)
    edit(tmp_path, version="gemm")
    rewrite(tmp_path, lambda stored: stored.pop(f"{ONE}.qzeros"))
    with pytest.raises(ArtifactError, match=f"layer '{ONE}' cannot be read: .*qzeros.* is missing"):
        awq.read(tmp_path)


def flip_a_nibble(stored):
    stored[f"{ONE}.qweight"][1, 1] ^= 1 << 9


def round_the_scales_again(stored):
    stored[f"{ONE}.scales"] = stored[f"{ONE}.scales"].to(torch.float8_e5m2).half()


def swap_the_version_of_the_zero_points(stored):
    stored[f"{ONE}.qzeros"] += 0x11111111


def order_outputs_as_gptq_does(stored):
    values = awq.unpack_outputs(stored[f"{ONE}.qweight"])
    stored[f"{ONE}.qweight"] = awq.pack_words(values, 4)


MUTANTS = [flip_a_nibble, round_the_scales_again, swap_the_version_of_the_zero_points]


@pytest.mark.parametrize(
    ("method", "mutant"),
    [*((method, mutant) for method in FORMATS for mutant in MUTANTS), ("awq", order_outputs_as_gptq_does)],
)
def test_verify_notices_a_mutant(tmp_path, method, mutant):
    model, _, _, _ = written(method, tmp_path, {ONE: random_tensor(16, 64, weight(group_size=32))})
    compare_own(model, FORMATS[method].read(tmp_path))
    rewrite(tmp_path, mutant)
    with pytest.raises(ArtifactError, match=f"(?s)read by qat, the export differs.*'{ONE}'"):
        FORMATS[method].verify(tmp_path, model)


def llama(spec, rules=(), kind="Llama", **config):
    """Return a tiny frozen Llama, or a model of another kind, whose step sizes are random, and its description."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**LLAMA | config)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    policy = qat.QuantPolicy(weight=spec, rules=[{"match": "lm_head", "weight": None}, *rules])
    model = qat.prepare(model, policy, verbose=False)
    for name, parameter in model.named_parameters():
        if name.endswith("step_size"):
            parameter.data.mul_(1 + torch.rand_like(parameter))
    model = from_model(qat.freeze(model))
    model.architecture["transformers"].update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model


def asymmetric(model, group_size):
    """Give every layer random zero points, near enough to 0 that the untrained model's activations stay small."""
    spec, symmetric = weight(group_size=group_size, symmetric=False), model.quantized

    def quantized(name):
        tensor = symmetric(name)
        generator = torch.Generator().manual_seed(len(name))
        zero_point = torch.randint(-3, 4, tensor.scale.shape, dtype=torch.int8, generator=generator)
        return QuantizedTensor(tensor.codes, tensor.scale, spec, zero_point)

    model.quantized = quantized
    for layer in model.layers.values():
        layer.weight = spec
    return model


def with_tokenizer(model, folder):
    """Give a model a tokenizer to carry along: onnxruntime-genai's builder wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"word{index}": index for index in range(512)}, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="word1", eos_token="word2").save_pretrained(folder)
    model.files = folder
    return model


@pytest.mark.clients
@pytest.mark.parametrize(
    ("method", "group_size", "symmetric"),
    [("gptq", 32, True), ("gptq", 128, True), ("awq", 32, True), ("awq", 64, False), ("awq", 128, False)],
)
def test_onnxruntime_genai_runs_it_with_the_trained_logits(tmp_path, method, group_size, symmetric):
    pytest.importorskip("onnxruntime_genai")
    model = llama(weight(group_size=group_size), rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    if not symmetric:
        model = asymmetric(model, group_size)
    folder = tmp_path / "out"
    folder.mkdir()
    FORMATS[method].write(with_tokenizer(model, tmp_path / "tokenizer"), folder)
    rows = dict(FORMATS[method].verify(folder, model))
    assert rows["weights, onnxruntime-genai"] == "equal to q*s in every float32 bit"
    assert rows["logits, onnxruntime-genai"].startswith("differ by at most ")


@pytest.mark.clients
def test_rows_that_are_no_block_of_onnxruntimes_are_said(tmp_path):
    """One scale a row: the builder makes a block of it, and onnxruntime does not open one of 192."""
    pytest.importorskip("onnxruntime_genai")
    model = llama(weight(granularity="channel"), hidden_size=192, intermediate_size=320)
    folder = tmp_path / "out"
    folder.mkdir()
    gptq.write(with_tokenizer(model, tmp_path / "tokenizer"), folder)
    rows = dict(gptq.verify(folder, model))
    assert rows["weights, onnxruntime-genai"] == "equal to q*s in every float32 bit"
    assert rows["logits, onnxruntime-genai"].startswith("not compared: its builder makes a block of 192 inputs")


@pytest.mark.clients
@pytest.mark.parametrize(("method", "kind"), [("gptq", "Phi3"), ("awq", "Phi3"), ("gptq", "Gemma2"), ("awq", "Gemma2")])
def test_onnxruntime_genai_takes_projections_apart_and_has_a_loop_of_its_own(tmp_path, method, kind):
    """Phi-3's q, k and v are one layer; a sliding window's cache is one that only its own loop makes."""
    pytest.importorskip("onnxruntime_genai")
    model = llama(weight(group_size=32), kind=kind, pad_token_id=0)
    folder = tmp_path / "out"
    folder.mkdir()
    FORMATS[method].write(with_tokenizer(model, tmp_path / "tokenizer"), folder)
    rows = dict(FORMATS[method].verify(folder, model))
    assert rows["weights, onnxruntime-genai"] == "equal to q*s in every float32 bit"
    said = "not compared: its model does not run without its own loop" if kind == "Gemma2" else "differ by at most "
    assert rows["logits, onnxruntime-genai"].startswith(said)


@pytest.mark.clients
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_model_that_onnxruntime_genai_fails_to_load_is_said(tmp_path, method):
    """It looks for attention in RWKV's blocks, which was a traceback."""
    pytest.importorskip("onnxruntime_genai")
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    config = RwkvConfig(hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, vocab_size=64, context_length=64)
    policy = qat.QuantPolicy(weight=weight(group_size=32), rules=[{"match": "head", "weight": None}])
    model = from_model(qat.freeze(qat.prepare(RwkvForCausalLM(config), policy, verbose=False)))
    FORMATS[method].write(model, tmp_path)
    said = dict(FORMATS[method].verify(tmp_path, model))["onnxruntime-genai"]
    assert said.startswith("not compared: its loader does not take this model (IndexError")


@pytest.mark.clients
def test_onnxruntime_genai_reads_version_2_wrongly_which_verify_notices(tmp_path):
    """Why version 1 is written."""
    pytest.importorskip("onnxruntime_genai")
    model = llama(weight(group_size=32))
    gptq.write(model, tmp_path)
    edit(tmp_path, checkpoint_format="gptq_v2")
    rewrite(tmp_path, lambda stored: [stored[key].add_(0x11111111) for key in stored if key.endswith("qzeros")])
    with pytest.raises(ArtifactError, match="read by onnxruntime-genai, the export differs"):
        gptq.verify(tmp_path, model)
