"""Buffers that no file holds, such as rotary frequencies, are in training what they are in what ships."""

import warnings
from functools import partial

import pytest
import torch
import transformers

import qat
from qat.training.tasks import CausalLanguageModel

TOKENS = torch.arange(1, 97).view(1, 96)
POLICY = qat.QuantPolicy(weight=qat.QuantSpec(group_size=32), rules=[{"match": "lm_head", "weight": None}])


def llama():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_run_trains_what_ships(tmp_path, dtype):
    """As Lightning's bf16-true casts a task: rotary frequencies stay as the artifact's are."""
    model = llama()
    expected = model.model.rotary_emb.inv_freq.clone()
    CausalLanguageModel(model, POLICY, partial(torch.optim.AdamW, lr=1e-3)).to(dtype)
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == dtype
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    with torch.no_grad(), warnings.catch_warnings(action="error"):
        qat.save(qat.freeze(model), tmp_path / "out")
        frozen, shipped = model(TOKENS).logits, qat.load(tmp_path / "out")(TOKENS).logits
    assert torch.equal(shipped, frozen)


@pytest.mark.parametrize("when", ["before prepare", "before freeze"])
def test_a_cast_that_rounds_them_is_said(when):
    model = llama()
    if when == "before prepare":
        with pytest.warns(UserWarning, match=r"rounded what no file holds \('model.rotary_emb.inv_freq'"):
            qat.prepare(model.bfloat16(), POLICY, verbose=False)
        return
    qat.prepare(model, POLICY, verbose=False).half()
    with pytest.warns(UserWarning, match="in place of model.bfloat16"):
        qat.freeze(model)


def test_a_model_that_transformers_builds_in_half_precision_is_silent():
    """Gemma 3 scales its embedding by a buffer in the model's dtype, which is made so again."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 32}
    gemma = transformers.Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    for config in (gemma, llama().config):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with warnings.catch_warnings(action="error"):
            qat.freeze(qat.prepare(model, POLICY, verbose=False))
