"""compressed-tensors: pinned by hand, every layer exact or refused, and the client's own reader agrees."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_quantized import LLAMA, random_tensor, rewrite, weight
from safetensors.torch import load_file

import qat
from qat.errors import ArtifactError
from qat.formats import awq, compressed_tensors, gptq, mlx, native
from qat.formats.comparison import compare_own
from qat.frozen_model import from_model
from qat.numerics import QuantizedTensor
from qat.quantized_model import QuantizedLayer, QuantizedModel

ONE, TWO = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}


def model_of(tensors, dtype=torch.float32, **options):
    layers = {name: QuantizedLayer("Linear", list(t.codes.shape), t.spec, None) for name, t in tensors.items()}
    dense = {
        "model.embed_tokens.weight": torch.randn(9, 4).to(dtype),
        "model.norm.weight": torch.randn(4),
        "lm_head.weight": torch.randn(9, 4),
        f"{ONE}.bias": torch.randn(3).to(dtype),
        "model.layers.0.mlp.gate_proj.weight": torch.randn(5, 4),
    }
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9, "eos_token_id": 2}
    values = {"dense": dense, "tied": {}, **options}
    architecture = {"transformers": config | values.pop("config", {})}
    return QuantizedModel(architecture, layers, tensors.__getitem__, {}.__getitem__, **values)


def written(folder, tensors, **options):
    """Return (model, stored tensors, quantization config, notes)."""
    model = model_of(tensors, **options)
    notes = compressed_tensors.write(model, folder)
    config = json.loads((folder / "config.json").read_text())
    return model, load_file(folder / "model.safetensors"), config["quantization_config"], notes


def edit(folder, change):
    """Apply a change to the quantization config."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def llama(policy, seed=0, dtype=torch.float32, **config):
    """Return a tiny frozen Llama whose step sizes are random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = qat.prepare(LlamaForCausalLM(LlamaConfig(**LLAMA | config)).to(dtype), policy, verbose=False)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("step_size"):
            parameter.data.mul_(1 + torch.rand_like(parameter))
    return qat.freeze(model)


def test_nibbles_zero_points_and_shape(tmp_path):
    codes = torch.tensor([range(-8, 8), range(7, -9, -1)], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0], [1.0, 4.0]]).bfloat16()
    zero_point = torch.tensor([[-8, 0], [7, -1]], dtype=torch.int8)
    tensor = QuantizedTensor(codes, scale, weight(group_size=8, symmetric=False), zero_point)
    _, stored, _, _ = written(tmp_path, {ONE: tensor})
    words = stored[f"{ONE}.weight_packed"].numpy().view("uint32").tolist()
    assert words == [[0x76543210, 0xFEDCBA98], [0x89ABCDEF, 0x01234567]]
    assert stored[f"{ONE}.weight_zero_point"].tolist() == [[0xF0, 0x78]]  # output 0 in the low nibble, one word a group
    assert stored[f"{ONE}.weight_scale"].tolist() == [[0.5, 2.0], [1.0, 4.0]]
    assert stored[f"{ONE}.weight_scale"].dtype == torch.float32  # the model's dtype
    assert stored[f"{ONE}.weight_shape"].tolist() == [2, 16]
    assert f"{ONE}.weight" not in stored


def test_the_config_names_schemes_and_dense_layers(tmp_path):
    tensors = {ONE: random_tensor(64, 128, weight(group_size=32)), TWO: random_tensor(64, 128, weight(8))}
    tensors["model.layers.0.a"] = random_tensor(64, 128, weight(3, group_size=32))
    _, _, quantization, notes = written(tmp_path, tensors)
    first, second = quantization["config_groups"].values()
    assert first["targets"] == ["Linear"] and first["weights"]["num_bits"] == 4  # 3 bits lie in 4
    assert (first["weights"]["strategy"], first["weights"]["group_size"]) == ("group", 32)
    assert second["targets"] == [TWO] and second["weights"]["num_bits"] == 8
    assert (second["weights"]["strategy"], second["weights"]["group_size"]) == ("channel", None)
    assert set(quantization["ignore"]) == {"model.embed_tokens", "lm_head", "model.layers.0.mlp.gate_proj"}
    assert "several config groups" in notes[1] and "activations stay" in notes[0]


@given(
    bits=st.lists(st.integers(2, 8), min_size=1, max_size=3),
    group=st.sampled_from([None, 3, 8, 32]),
    granularity=st.sampled_from([None, "tensor"]),
    symmetric=st.booleans(),
    rows=st.integers(1, 20),
    groups=st.integers(1, 3),
    scale=st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_any_layers_survive(tmp_path_factory, bits, group, granularity, symmetric, rows, groups, scale):
    folder = tmp_path_factory.mktemp("out")
    granularity = None if group else granularity
    tensors = {}
    for index, count in enumerate(bits):
        spec = weight(count, group, granularity=granularity, symmetric=symmetric, scale_dtype=scale)
        tensors[f"model.layers.{index}.a"] = random_tensor(rows + index, (group or 7) * groups, spec, index)
    model = model_of(tensors)
    compressed_tensors.write(model, folder)
    read = compressed_tensors.read(folder)
    compare_own(model, read)
    for name, tensor in tensors.items():
        made = read.quantized(name)
        assert torch.equal(made.codes, tensor.codes)
        assert torch.equal(made.scale, tensor.scale.float().expand_as(made.scale))
        assert made.scale.dtype == torch.float32 and made.spec.scale_dtype == "float32"
        assert made.spec.symmetric == symmetric
        if not symmetric:
            assert torch.equal(made.zero_point, tensor.zero_point.expand_as(made.zero_point))


def test_a_bf16_model_keeps_bf16_scales_and_refuses_finer_ones(tmp_path):
    tensor = random_tensor(8, 32, weight(group_size=32))
    _, stored, _, _ = written(tmp_path, {ONE: tensor}, dtype=torch.bfloat16)
    assert torch.equal(stored[f"{ONE}.weight_scale"], tensor.scale)
    fine = random_tensor(8, 32, weight(group_size=32, scale_dtype="float32"))
    with pytest.raises(ArtifactError, match=rf"'{ONE}' has \d+ of 8 scales or biases that bfloat16 cannot hold"):
        compressed_tensors.write(model_of({ONE: fine}, dtype=torch.bfloat16), tmp_path)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    model = model_of({ONE: random_tensor(8, 32, weight())})
    model.layers["conv"] = QuantizedLayer("Conv2d", [8, 3, 3, 3], weight(), None)
    model.layers[TWO] = QuantizedLayer("Linear", [8, 8], weight(), qat.QuantSpec(bits=8, granularity="tensor"))
    with pytest.raises(ArtifactError, match=r"(?s)'conv' is a Conv2d.*onnx.*down_proj' trained with its input.*onnx"):
        compressed_tensors.write(model, tmp_path)
    model.architecture = {"builder": "cnn", "args": {}}
    with pytest.raises(ArtifactError, match=r"models of transformers.*--to onnx.*--to native"):
        compressed_tensors.write(model, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "inputs", "group", "warned"),
    [(64, 128, 32, False), (64, 128, None, False), (32, 128, 32, True), (64, 96, 32, True), (64, 128, 16, True)],
)
def test_a_shape_that_marlin_refuses_is_said(tmp_path, rows, inputs, group, warned):
    _, _, _, notes = written(tmp_path, {ONE: random_tensor(rows, inputs, weight(group_size=group))})
    assert any("Marlin" in note and ONE in note for note in notes) == warned


def test_stacked_experts_are_said(tmp_path):
    """They stay dense; transformers alone knows their names, so other formats refuse them."""
    model = model_of({ONE: random_tensor(8, 32, weight())})
    model.dense["model.layers.0.mlp.experts.down_proj"] = torch.randn(2, 4, 4)
    assert (
        "only transformers reads 'model.layers.0.mlp.experts.down_proj'"
        in compressed_tensors.write(model, tmp_path)[-1]
    )
    for other in (awq, gptq, mlx):
        with pytest.raises(ArtifactError, match=r"'model\.layers\.0\.mlp\.experts\.down_proj' is a fused stack"):
            other.write(model, tmp_path)


def test_older_readers_find_the_rotary_base(tmp_path):
    rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    compressed_tensors.write(
        model_of({ONE: random_tensor(8, 32, weight())}, config={"rope_parameters": rope}), tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 5e5 and config["rope_parameters"] == rope
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_ties(tmp_path):
    """Tied embeddings are stored once; a head with codes of its own is untied; layers that share codes get copies."""
    model = model_of({ONE: random_tensor(8, 32, weight())}, config={"tie_word_embeddings": True})
    del model.dense["lm_head.weight"]
    model.tied = {"lm_head.weight": "model.embed_tokens.weight"}
    model.layers[TWO] = QuantizedLayer("Linear", [8, 32], weight(), None, tied=ONE)
    (tmp_path / "a").mkdir()
    compressed_tensors.write(model, tmp_path / "a")
    stored, config = load_file(tmp_path / "a/model.safetensors"), json.loads((tmp_path / "a/config.json").read_text())
    assert "lm_head.weight" not in stored and config["tie_word_embeddings"]
    assert "lm_head" in config["quantization_config"]["ignore"]
    assert torch.equal(stored[f"{ONE}.weight_packed"], stored[f"{TWO}.weight_packed"])
    untied = model_of({"lm_head": random_tensor(9, 32, weight())}, config={"tie_word_embeddings": True})
    del untied.dense["lm_head.weight"]
    (tmp_path / "b").mkdir()
    compressed_tensors.write(untied, tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["tie_word_embeddings"] is False
    compare_own(untied, compressed_tensors.read(tmp_path / "b"))


def test_what_travels_along(tmp_path):
    """Tokenizer files go from folder to folder, through our artifact too; other files and local paths do not."""
    source, artifact, out = (tmp_path / name for name in ("source", "artifact", "out"))
    for folder in (source, artifact, out):
        folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "thesis.txt", "a.py"):
        (source / name).write_text(name)
    tensors = {ONE: random_tensor(8, 32, weight())}
    native.write(model_of(tensors, files=source, config={"_name_or_path": str(source)}), artifact)
    compressed_tensors.write(native.read(artifact), out)
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"}
    ours = {"config.json", "generation_config.json", "README.md", "model.safetensors"}
    assert {file.name for file in out.iterdir()} == kept | ours
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    card = (out / "README.md").read_text()
    for word in ("LlamaForCausalLM", "int4 channel (1 layers)", "compressed-tensors", "vllm serve ."):
        assert word in card
    assert not any(str(tmp_path) in (out / name).read_text() for name in ours - {"model.safetensors"})
    assert compressed_tensors.read(out).files == out


def test_a_foreign_model_reads_by_its_groups(tmp_path):
    """Groups that target patterns, an unpacked zero point, and per-tensor scales, as other writers have them."""
    tensors = {ONE: random_tensor(8, 32, weight(group_size=8, symmetric=False)), TWO: random_tensor(8, 32, weight(8))}
    tensors[TWO].scale[:] = tensors[TWO].scale[0, 0]
    model, _, _, _ = written(tmp_path, tensors)

    def change(quantization):
        groups = quantization["config_groups"]
        for group in groups.values():
            asymmetric = not group["weights"]["symmetric"]
            group["targets"] = [r"re:.*up_proj$"] if asymmetric else ["Linear"]
            group["weights"].update({} if asymmetric else {"strategy": "tensor"})
            del group["format"]

    def unpack(stored):
        stored[f"{ONE}.weight_zero_point"] = tensors[ONE].zero_point
        stored[f"{TWO}.weight_scale"] = stored[f"{TWO}.weight_scale"][:1, 0].contiguous()

    edit(tmp_path, change)
    rewrite(tmp_path, unpack)
    read = compressed_tensors.read(tmp_path)
    compare_own(model, read)
    assert str(read.layers[TWO].weight) == "int8 tensor"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_activations": {"num_bits": 8}}, "its activations are quantized"),
        ({"format": "int-quantized"}, "its format is 'int-quantized'"),
        ({"targets": ["re:nothing"]}, "no config group targets it"),
        ({"weights": {"num_bits": 4, "type": "float", "strategy": "channel"}}, "type 'float'"),
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "block"}}, "strategy 'block'"),
        ({"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}, "packed in another way"),
        ({"weights": {"num_bits": 4, "type": "int", "group_size": 16}}, r"scales of shape \[8, 1\]"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, change, message):
    written(tmp_path, {ONE: random_tensor(8, 32, weight())})
    edit(tmp_path, lambda quantization: quantization["config_groups"]["group_0"].update(change))
    with pytest.raises(ArtifactError, match=rf"layer '{ONE}' cannot be read \({message}"):
        compressed_tensors.read(tmp_path)


def test_a_folder_of_another_kind_is_said(tmp_path):
    written(tmp_path, {ONE: random_tensor(8, 32, weight())})
    edit(tmp_path, lambda quantization: quantization.update(transform_config={"rotate": 1}))
    with pytest.raises(ArtifactError, match="transform_config"):
        compressed_tensors.read(tmp_path)
    edit(tmp_path, lambda quantization: quantization.update(quant_method="gptq"))
    with pytest.raises(ArtifactError, match="is a 'gptq' model"):
        compressed_tensors.read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="cannot be read as a compressed-tensors model"):
        compressed_tensors.read(tmp_path)


def flip_a_nibble(stored):
    stored[f"{ONE}.weight_packed"][3, 1] ^= 1 << 12


def round_the_scales_again(stored):
    stored[f"{ONE}.weight_scale"] = stored[f"{ONE}.weight_scale"].to(torch.float8_e4m3fn).float()


def store_zero_points_signed(stored):
    stored[f"{ONE}.weight_zero_point"] ^= 0x08080808


def change_a_dense_tensor(stored):
    stored["model.norm.weight"][0] += 1


MUTANTS = [flip_a_nibble, round_the_scales_again, store_zero_points_signed, change_a_dense_tensor]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_verify_notices_a_mutant(tmp_path, mutant):
    model, _, _, _ = written(tmp_path, {ONE: random_tensor(8, 32, weight(group_size=8, symmetric=False))})
    compare_own(model, compressed_tensors.read(tmp_path))
    rewrite(tmp_path, mutant)
    name = "model.norm" if mutant is change_a_dense_tensor else ONE
    with pytest.raises(ArtifactError, match=f"differ.*(?s:.*)'{name}"):
        compressed_tensors.verify(tmp_path, model)


def head(spec):
    return [{"match": "lm_head", "weight": spec}]


@pytest.mark.clients
@pytest.mark.parametrize(
    ("spec", "rules", "options"),
    [
        (weight(group_size=32), head(None), {}),
        (weight(group_size=64), head(None), {"tie_word_embeddings": True}),
        (weight(group_size=64), head(None), {"rope_parameters": LLAMA_3}),
        (weight(group_size=128), head({"bits": 8, "group_size": 128}), {"attention_bias": True, "dtype": "bfloat16"}),
        (weight(), [*head(None), {"match": "*.down_proj", "weight": {"bits": 8}}], {"tie_word_embeddings": True}),
        (weight(3, 32), [*head(None), {"match": "*.0.mlp.*", "weight": None}], {"intermediate_size": 320}),
        (weight(granularity="tensor"), [{"match": "*v_proj", "weight": {"bits": 6}}], {"hidden_size": 96}),
    ],
)
def test_transformers_runs_it_with_the_trained_logits(tmp_path, spec, rules, options):
    pytest.importorskip("compressed_tensors")
    options = dict(options)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    model = from_model(llama(qat.QuantPolicy(weight=spec, rules=rules), dtype=dtype, **options))
    compressed_tensors.write(model, tmp_path)
    rows = dict(compressed_tensors.verify(tmp_path, model))
    assert rows["codes, compressed-tensors"].startswith("0 of")
    assert rows["logits, transformers"].startswith("differ by at most 0 ")


@pytest.mark.clients
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 8, 32, 64, 128]),
    symmetric=st.booleans(),
    rows=st.integers(9, 24),  # the client's reader fails where zero points take a single word
    groups=st.integers(1, 3),
)
def test_the_clients_reader_gives_q_times_s(tmp_path_factory, bits, group, symmetric, rows, groups):
    pytest.importorskip("compressed_tensors")
    folder = tmp_path_factory.mktemp("out")
    tensor = random_tensor(rows, (group or 7) * groups, weight(bits, group, symmetric=symmetric))
    model = model_of({ONE: tensor}, config={"architectures": ["LlamaModel"]})
    compressed_tensors.write(model, folder)
    rows_of_table = dict(compressed_tensors.verify(folder, model))
    assert rows_of_table["weights, compressed-tensors"] == "equal to q*s in every float32 bit"


@pytest.mark.clients
@pytest.mark.parametrize(
    ("dtype", "how"), [(torch.float32, ""), (torch.bfloat16, ", with q*s rounded to bfloat16")], ids=["fp32", "bf16"]
)
def test_transformers_runs_zero_points(tmp_path, dtype, how):
    """By its dequantizing loader, the only one that takes them, and which rounds to the scales' dtype."""
    pytest.importorskip("compressed_tensors")
    policy = qat.QuantPolicy(weight=weight(group_size=32), rules=head(None))
    model = from_model(llama(policy, dtype=dtype, attention_bias=True))
    symmetric, spec = model.quantized, weight(group_size=32, symmetric=False)

    def quantized(name):
        tensor = symmetric(name)
        generator = torch.Generator().manual_seed(len(name))
        zero_point = torch.randint(-8, 8, tensor.scale.shape, dtype=torch.int8, generator=generator)
        return QuantizedTensor(tensor.codes, tensor.scale, spec, zero_point)

    model.quantized = quantized
    for layer in model.layers.values():
        layer.weight = spec
    compressed_tensors.write(model, tmp_path)
    rows = dict(compressed_tensors.verify(tmp_path, model))
    assert rows[f"logits, transformers{how}"].startswith("differ by at most 0 ")


@pytest.mark.clients
def test_what_transformers_fails_at_is_one_error(tmp_path):
    """Its Mamba-2 asks for weights that its own reader has taken away, which was a traceback."""
    pytest.importorskip("compressed_tensors")
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=64, **sizes))
    qat.prepare(model, qat.QuantPolicy(weight=weight(group_size=32), rules=head(None)), verbose=False)
    model = from_model(qat.freeze(model))
    compressed_tensors.write(model, tmp_path)
    with pytest.raises(ArtifactError, match=r"transformers fails to open .* or to run it .*: AttributeError: 'Linear'"):
        compressed_tensors.verify(tmp_path, model)


@pytest.mark.clients
def test_a_config_that_the_model_itself_fails_at_is_one_error(tmp_path):
    """MiniCPM3's attention has no groups of heads, whatever num_key_value_heads says."""
    pytest.importorskip("compressed_tensors")
    from transformers import MiniCPM3Config, MiniCPM3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
    model = MiniCPM3ForCausalLM(MiniCPM3Config(**sizes, q_lora_rank=32, kv_lora_rank=32, pad_token_id=0))
    qat.prepare(model, qat.QuantPolicy(weight=weight(group_size=32), rules=head(None)), verbose=False)
    model = from_model(qat.freeze(model))
    compressed_tensors.write(model, tmp_path)
    with pytest.raises(ArtifactError, match=r"MiniCPM3ForCausalLM of this config fails at 16 tokens.*: RuntimeError: "):
        compressed_tensors.verify(tmp_path, model)
