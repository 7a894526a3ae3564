"""transformers' own from_pretrained, generate and save_pretrained on our artifacts; other tools' models as a base."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_quantized import LLAMA
from smollm2 import DEVICES, smollm2
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

import qat
import qat.hf
from qat import formats
from qat.convert import convert
from qat.errors import ArtifactError, LayerError, ModelError, PolicyError
from qat.frozen_model import from_model
from qat.layers import FrozenLinear, frozen_layers, quant_layers

TOKENS = torch.arange(1, 25).view(2, 12)
HEAD = [{"match": "lm_head", "weight": None}]
GENERATE = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


def llama(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA, "tie_word_embeddings": True, **options})
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()  # .to(dtype) would round the rotary frequencies


def prepared(group_size=64, model=None, **policy):
    policy = {"weight": qat.QuantSpec(group_size=group_size), "rules": HEAD, "init": "minmax", **policy}
    return qat.prepare(model or llama(), qat.QuantPolicy(**policy), verbose=False)


def assert_same(model, expected):
    """Codes, weight bits and logits are the same."""
    here, there = qat.quantized_tensors(model), qat.quantized_tensors(expected)
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        assert torch.equal(here[name].codes, tensor.codes), name
        assert torch.equal(here[name].dequantize(), tensor.dequantize()), name
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_an_artifact_opens_with_the_auto_class(tmp_path, dtype, tied):
    frozen = qat.freeze(prepared(model=llama(dtype, tie_word_embeddings=tied)))
    qat.save(frozen, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(model) is LlamaForCausalLM and not model.training and model.dtype is dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same(model, frozen)


def test_static_activation_scales_and_a_quantized_tied_head(tmp_path):
    model = prepared(activation=qat.QuantSpec(bits=8, granularity="tensor"), rules=[])
    frozen = qat.freeze(qat.calibrate(model, [TOKENS]))
    qat.save(frozen, tmp_path / "a")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert_same(opened, frozen)
    scale = opened.lm_head.activation_quantizer.scale
    assert torch.equal(scale, frozen.lm_head.activation_quantizer.scale) and scale.dtype is torch.bfloat16


def test_no_warning_and_no_missing_key(tmp_path, caplog):
    qat.save(qat.freeze(prepared()), tmp_path / "a")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not caplog.records


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_gives_the_text_of_the_training_forward(tmp_path, cache, dtype):
    model = prepared(model=llama(dtype))
    expected = model.generate(TOKENS, **GENERATE)
    qat.save(qat.freeze(model), tmp_path / "a")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    text = opened.generate(TOKENS, **GENERATE, cache_implementation=cache)
    if dtype is torch.float32:
        assert torch.equal(text, expected)
    else:  # torch's int4 operator rounds its sums otherwise; a tie may go the other way
        assert (text == expected).float().mean() > 0.7


def test_save_pretrained_writes_an_artifact(tmp_path):
    frozen = qat.freeze(prepared())
    frozen.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=3)
    out = tmp_path / "a"
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")  # as tokenizer.save_pretrained(out) leaves it
    frozen.save_pretrained(out)
    assert formats.format_of(out) == "native"
    assert_same(qat.load(out), frozen)
    opened = AutoModelForCausalLM.from_pretrained(out)
    assert opened.generation_config.max_new_tokens == 7 and opened.generation_config.eos_token_id == 3
    opened.save_pretrained(tmp_path / "b")  # what travels with a model goes on travelling
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), frozen)
    opened.save_pretrained(out)  # over the files it was opened from
    assert_same(qat.load(out), frozen)
    with pytest.raises(ArtifactError, match="hf upload"):
        opened.save_pretrained(tmp_path / "c", push_to_hub=True)


def test_save_pretrained_leaves_strangers_and_other_models_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ArtifactError, match="choose another folder"):
        qat.freeze(prepared()).save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path / "plain")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_a_damaged_artifact_is_refused(tmp_path):
    qat.save(qat.freeze(prepared()), tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_without_the_head_takes_the_same_layers(tmp_path):
    frozen = qat.freeze(prepared())
    qat.save(frozen, tmp_path)
    opened = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(opened(TOKENS).last_hidden_state, frozen.model(TOKENS).last_hidden_state)


NF4 = {"codebook": "nf4", "group_size": 64}


@pytest.mark.parametrize(
    "method, spec",
    [
        ("bitsandbytes", NF4),
        ("bitsandbytes", {**NF4, "codebook": "nf4_double"}),
        ("gptq", {"group_size": 64}),
        ("awq", {"group_size": 64}),
        ("compressed-tensors", {"group_size": 64}),
        ("torchao", {"group_size": 64}),
    ],
)
def test_other_formats_open_as_a_frozen_base(tmp_path, method, spec):
    frozen = qat.freeze(prepared(weight=qat.QuantSpec(**spec)))
    formats.module(method).write(from_model(frozen), tmp_path)
    config = (tmp_path / "config.json").read_text()
    opened, info = qat.hf.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    read = formats.read(tmp_path)
    for name, tensor in qat.quantized_tensors(opened).items():
        assert torch.equal(tensor.codes, read.quantized(name).codes)
        assert torch.equal(tensor.dequantize(), qat.quantized_tensors(frozen)[name].dequantize())
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS).logits, frozen(TOKENS).logits, rtol=1e-5, atol=1e-5)
    half = qat.quantized_tensors(qat.hf.from_pretrained(tmp_path, dtype=torch.bfloat16))  # which is then the default
    for name, tensor in qat.quantized_tensors(opened).items():
        assert torch.equal(half[name].codes, tensor.codes)
        assert torch.equal(half[name].dequantize(), tensor.dequantize())
    opened.save_pretrained(tmp_path / "a")
    assert_same(qat.load(tmp_path / "a"), opened)
    assert (tmp_path / "config.json").read_text() == config


@pytest.mark.parametrize("method", ["gguf", "mlx"])
def test_a_format_that_transformers_does_not_open_is_converted_first(tmp_path, method):
    """And what the error says opens."""
    pytest.importorskip("gguf")
    frozen = qat.freeze(prepared(weight=qat.QuantSpec(group_size=32)))
    folder, out = tmp_path / "base", tmp_path / "out"
    folder.mkdir()
    formats.module(method).write(from_model(frozen), folder)
    with pytest.raises(ArtifactError, match=rf"is in the format {method}.* python -m qat.convert \S+base --out DIR"):
        qat.hf.from_pretrained(folder)
    convert(folder, out)
    codes = qat.quantized_tensors(qat.hf.from_pretrained(out))
    assert all(torch.equal(tensor.codes, codes[name].codes) for name, tensor in qat.quantized_tensors(frozen).items())


def test_other_methods_stay_with_their_own_packages():
    """Only qat.hf.from_pretrained takes them, and only while it runs."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    assert AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].__name__ == "GPTQConfig"


@pytest.mark.parametrize("spec", [NF4, {"group_size": 64}, {"bits": 8}])
def test_quantized_while_loading_equals_prepare_and_freeze(tmp_path, spec):
    plain = llama()
    plain.save_pretrained(tmp_path)
    policy = qat.QuantPolicy(weight=qat.QuantSpec(**spec), rules=HEAD, init="mse")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=qat.hf.QATConfig(policy))
    assert all(type(layer) is FrozenLinear for _, layer in frozen_layers(opened))
    assert_same(opened, qat.freeze(qat.prepare(plain, policy, verbose=False)))
    opened.save_pretrained(tmp_path / "a")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), opened)


def test_what_cannot_be_quantized_while_loading_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)

    def load(policy):
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=qat.hf.QATConfig(policy))

    with pytest.raises(PolicyError, match=r"'model.layers.0.self_attn.q_proj'.*calibrate"):
        load(qat.QuantPolicy(weight=qat.QuantSpec(), activation=qat.QuantSpec(granularity="tensor")))
    with pytest.raises(LayerError, match=r"'model.layers.0.self_attn.q_proj'.*does not divide"):
        load({"weight": {"group_size": 48}})
    with pytest.raises(PolicyError, match="init=gptq reads data"):
        load({"weight": {"group_size": 64}, "init": "gptq"})
    with pytest.raises(PolicyError, match="give it a policy"):
        load(None)
    with pytest.raises(LayerError, match=r"'lm_head.weight'.*{match: lm_head, weight: null}"):
        load({"weight": {"group_size": 32}})


def test_an_artifact_needs_the_import(tmp_path):
    """Without it transformers warns of an unknown method: README says to import qat.hf first."""
    qat.save(qat.freeze(prepared()), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "qat"
    code = f"import qat.hf, transformers as t; print(t.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).lm_head)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "Linear(in_features=256, out_features=512" in done.stdout


@pytest.mark.clients
@pytest.mark.parametrize("double", [False, True])
def test_what_bitsandbytes_wrote_opens_without_it(tmp_path, double):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "bnb")
    weights = {
        name: bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in theirs.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    }
    torch.save(weights, tmp_path / "weights.pt")
    code = (
        "import sys; sys.modules['bitsandbytes'] = None; import torch, qat, qat.hf\n"
        f"model = qat.hf.from_pretrained({str(tmp_path / 'bnb')!r})\n"
        f"theirs = torch.load({str(tmp_path / 'weights.pt')!r})\n"
        "ours = {name: t.dequantize() for name, t in qat.quantized_tensors(model).items()}\n"
        "assert ours.keys() == theirs.keys() and len(ours) == 14\n"
        "print(sum(int((ours[name] != theirs[name]).sum()) for name in ours))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.timeout(3600)  # a minute on an idle core, far more on a busy one: codes are dequantized for every token
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("device", DEVICES)
def test_smollm2_writes_the_text_of_its_training_forward(tmp_path, device, cache):
    """200 greedy tokens in float32, from the artifact and from the fake-quant model: the same."""
    model, tokenizer = smollm2()
    model, tokens = model.to(device), tokenizer("The history of the village", return_tensors="pt").to(device)
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False, "cache_implementation": cache}
    options["disable_compile"] = True  # which a static cache on a GPU would ask for
    prepared(32, model)
    with torch.no_grad():
        logits = model(**tokens).logits
        weights = {name: layer.weight_quantizer(layer.weight) for name, layer in quant_layers(model)}
        qat.freeze(copy.deepcopy(model)).save_pretrained(tmp_path)
        for name, layer in quant_layers(model):  # rounded once and not for every token, which takes minutes
            layer.weight.copy_(weights[name])
            layer.weight_quantizer.enabled = False
        assert torch.equal(model(**tokens).logits, logits)
    expected = model.generate(**tokens, **options)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
    text = opened.generate(**tokens, **options)
    assert text.shape[1] == tokens["input_ids"].shape[1] + 200
    assert torch.equal(text, expected)


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("policy", [None, {"weight": {"group_size": 64}, "rules": HEAD}])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, monkeypatch, policy):
    monkeypatch.chdir(tmp_path)
    llama().config.save_pretrained(tmp_path / "m")
    torch.save({"lm_head.weight": Hostile()}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="a pickle with more than tensors, which is never executed"):
        qat.hf.from_pretrained(tmp_path / "m", policy=policy)
    assert not Path("executed").exists()


@pytest.mark.parametrize("policy", [None, {"weight": {"group_size": 64}, "rules": HEAD}])
def test_layers_without_end_are_one_error(tmp_path, policy):
    """transformers would build them until memory ends."""
    model = llama() if policy else qat.freeze(prepared())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(ModelError, match="num_hidden_layers=1000000000: no model has more"):
        qat.hf.from_pretrained(tmp_path, policy=policy)


def test_several_shards_are_quantized_while_loading(tmp_path):
    plain = llama()
    plain.save_pretrained(tmp_path / "m", max_shard_size="500KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    policy = {"weight": {"group_size": 64}, "rules": HEAD, "init": "minmax"}
    assert_same(qat.hf.from_pretrained(tmp_path / "m", policy=policy), qat.freeze(prepared(model=plain)))


def test_a_policy_that_ships_is_taken_by_its_name(tmp_path):
    llama().save_pretrained(tmp_path)
    opened = qat.hf.from_pretrained(tmp_path, policy="lm_w4")
    assert_same(opened, qat.freeze(qat.prepare(llama(), "lm_w4", verbose=False)))
    with pytest.raises(PolicyError, match="did you mean 'lm_w4'"):
        qat.hf.from_pretrained(tmp_path, policy="lm_w5")


def test_a_model_quantized_to_its_last_parameter_is_saved_and_generates(tmp_path):
    """OLMo's norms have no weights, and its head is the embedding: no parameter is left to tell the dtype by."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = OlmoForCausalLM(OlmoConfig(vocab_size=64, **sizes, tie_word_embeddings=True, dtype="float32"))
    rules = [{"match": "re:.*(lm_head|embed_tokens)", "weight": {"bits": 8}}]
    policy = {"weight": {"bits": 4, "group_size": 32}, "rules": rules}
    model = qat.freeze(qat.prepare(model, policy, verbose=False)).eval()
    assert not list(model.parameters())
    tokens = torch.arange(8)[None]
    qat.save(model, tmp_path / "out")
    loaded, opened = qat.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    first, *others = (one.generate(tokens, max_new_tokens=4, do_sample=False) for one in (model, loaded, opened))
    assert first.shape == (1, 12) and all(torch.equal(first, other) for other in others)
    assert opened.device == torch.device("cpu") and opened.to(torch.bfloat16).dtype == torch.bfloat16
    assert qat.hf.int8_cache(opened) is not None
