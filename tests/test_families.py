"""Model families of transformers, tiny and random: prepared by a shipped policy, trained a step, frozen, shipped."""

from pathlib import Path

import pytest
import torch
import transformers

import qat
import qat.hf
from qat.layers import FrozenConv1D, QuantConv1D

POLICIES = Path(__file__).parents[1] / "conf" / "policy"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LM = {**SMALL, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0}
TOKENS = torch.arange(1, 25).view(2, 12)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
# class -> (options of its config, policy, an input)
FAMILIES = {
    "LlamaForCausalLM": (LM, "lm_w4", TOKENS),
    "Qwen2ForCausalLM": (LM, "lm_w4", TOKENS),
    "Qwen3ForCausalLM": ({**LM, "head_dim": 16}, "lm_w4", TOKENS),
    "MistralForCausalLM": (LM, "lm_w4", TOKENS),
    "GemmaForCausalLM": ({**LM, "head_dim": 16}, "lm_w4", TOKENS),
    "Gemma2ForCausalLM": ({**LM, "head_dim": 16}, "lm_nf4", TOKENS),
    "Gemma3ForCausalLM": ({**LM, "head_dim": 16}, "lm_w4", TOKENS),
    "PhiForCausalLM": (LM, "lm_w4", TOKENS),
    "Phi3ForCausalLM": (LM, "lm_w4", TOKENS),
    "SmolLM3ForCausalLM": (LM, "lm_w4", TOKENS),
    "GPT2LMHeadModel": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}, "lm_w4", TOKENS),
    "BertForSequenceClassification": ({**SMALL, "vocab_size": 128}, "encoder_w4a8", TOKENS),
    "BertForMaskedLM": ({**SMALL, "vocab_size": 128}, "encoder_w4a8", TOKENS),
    "ViTForImageClassification": ({**SMALL, "image_size": 16, "patch_size": 4}, "vit_w4a8", IMAGES),
}
UNITS = {"lm_w4": 32, "lm_nf4": 64, "encoder_w4a8": 32, "vit_w4a8": 32}


def build(name):
    options, policy, inputs = FAMILIES[name]
    model_class = getattr(transformers, name)
    if UNITS[policy] == 64:
        options = {**options, "intermediate_size": 128}
    torch.manual_seed(0)
    return (
        model_class(model_class.config_class(**options)),
        qat.QuantPolicy.from_yaml(POLICIES / f"{policy}.yaml"),
        inputs,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_ships(tmp_path, name):
    model, policy, inputs = build(name)
    dense = sum(type(layer) in (torch.nn.Linear, torch.nn.Conv2d) for layer in model.modules())
    dense += sum(type(layer).__name__ == "Conv1D" for layer in model.modules())
    qat.calibrate(qat.prepare(model, policy, verbose=False), [inputs])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(inputs).logits.float().logsumexp(-1).mean().backward()
    optimizer.step()
    model.eval()
    trained = {layer: tensor.codes.clone() for layer, tensor in qat.quantized_tensors(model).items()}
    left_out = 0 if name.startswith("ViT") else 1  # the head
    assert len(trained) == dense - left_out
    with torch.no_grad():
        expected = model(inputs).logits
    qat.freeze(model).save_pretrained(tmp_path)
    for opened in (type(model).from_pretrained(tmp_path), qat.load(tmp_path)):
        assert type(opened) is type(model)
        codes = {layer: tensor.codes for layer, tensor in qat.quantized_tensors(opened).items()}
        assert codes.keys() == trained.keys()
        assert all(torch.equal(codes[layer], trained[layer]) for layer in trained)
        with torch.no_grad():
            torch.testing.assert_close(opened(inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_conv1d_is_a_linear_layer_with_its_weight_transposed():
    """Codes, gradients and outputs are those of nn.Linear with the transposed weight, input quantizer included."""
    conv = transformers.pytorch_utils.Conv1D(24, 64)
    linear = torch.nn.Linear(64, 24)
    torch.nn.init.normal_(conv.bias)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t()), linear.bias.copy_(conv.bias)
    spec = {"weight": {"bits": 3, "group_size": 16}, "activation": {"bits": 8, "granularity": "tensor"}}
    x = torch.randn(5, 64)
    pair = []
    for layer in (conv, linear):
        model = torch.nn.Sequential(layer)
        pair.append(qat.calibrate(qat.prepare(model, qat.QuantPolicy.from_dict(spec), verbose=False), [x]))
        model(x).square().sum().backward()
    ours, reference = pair
    assert type(ours[0]) is QuantConv1D
    torch.testing.assert_close(ours(x), reference(x))
    torch.testing.assert_close(ours[0].weight.grad.t(), reference[0].weight.grad)
    torch.testing.assert_close(ours[0].weight_quantizer.step_size.grad, reference[0].weight_quantizer.step_size.grad)
    codes = [qat.quantized_tensors(model)["0"].codes for model in pair]
    assert codes[0].shape == (24, 64) and torch.equal(*codes)
    before = ours(x)
    frozen = qat.freeze(ours)
    assert type(frozen[0]) is FrozenConv1D and torch.equal(frozen(x), before)
    assert "24x64" in qat.summary(frozen)


def test_conv1d_with_only_its_input_quantized(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    policy = qat.QuantPolicy(activation=qat.QuantSpec(bits=8, granularity="tensor"))
    model = qat.calibrate(qat.prepare(model, policy, verbose=False), [TOKENS])
    with torch.no_grad():
        expected = model(TOKENS).logits
        qat.freeze(model).save_pretrained(tmp_path)
        for opened in (type(model).from_pretrained(tmp_path), qat.load(tmp_path)):
            torch.testing.assert_close(opened(TOKENS).logits, expected)


def test_gpt2_is_quantized_while_loading(tmp_path):
    model, policy, _ = build("GPT2LMHeadModel")
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path, quantization_config=qat.hf.QATConfig(policy))
    frozen = qat.freeze(qat.prepare(model, policy, verbose=False))
    here, there = qat.quantized_tensors(opened), qat.quantized_tensors(frozen)
    assert here.keys() == there.keys() and all(torch.equal(here[k].codes, there[k].codes) for k in here)


@pytest.mark.parametrize("init", [init.value for init in qat.spec.Init if init.reads_data])
def test_inits_that_read_data_refuse_conv1d_before_anything_changes(init):
    model = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(24, 64))
    policy = qat.QuantPolicy(weight=qat.QuantSpec(), init=init)
    with pytest.raises(qat.QATError, match=rf"init={init} does not know Conv1D layers \('0'\): use init=mse"):
        qat.prepare(model, policy, verbose=False)
    assert type(model[0]) is transformers.pytorch_utils.Conv1D
