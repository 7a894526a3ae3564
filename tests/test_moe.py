"""Mixtures of experts, which transformers 5 stacks into one parameter: exact in every format, or refused by name."""

import pytest
import torch

import qat
from qat import formats
from qat.errors import ArtifactError
from qat.frozen_model import from_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
}
STACK = "model.layers.0.mlp.experts.gate_up_proj"
NEEDS = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes", "torchao": "torchao"}


def mixture(kind, **options):
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind]))
    spec = qat.QuantSpec(group_size=32, **options)
    qat.prepare(model, qat.QuantPolicy(weight=spec, rules=[{"match": "lm_head", "weight": None}]), verbose=False)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_names_what_stays_in_full_precision(kind):
    table = qat.summary(mixture(kind))
    assert f"{STACK} " in table and "stays in full precision" in table
    assert f"{STACK.rsplit('.', 2)[0]}.gate " in table  # the router


@pytest.mark.parametrize("options", [{}, {"codebook": "nf4"}])
def test_an_artifact_runs_as_it_trained(tmp_path, options):
    model = mixture("mixtral", **options).eval()
    tokens = torch.arange(12)[None]
    trained = model(tokens).logits
    qat.save(qat.freeze(model), tmp_path / "out")
    assert torch.equal(qat.load(tmp_path / "out")(tokens).logits, trained)


@pytest.mark.parametrize("to", ["gptq", "awq", "mlx"])
@pytest.mark.parametrize("kind", KINDS)
def test_formats_without_stacks_name_them_and_the_one_that_holds_them(tmp_path, to, kind):
    message = f"'{STACK}' is a fused stack of experts.*--to compressed-tensors holds it"
    with pytest.raises(ArtifactError, match=message):
        formats.module(to).write(from_model(qat.freeze(mixture(kind))), tmp_path)


@pytest.mark.clients
@pytest.mark.parametrize("to", NEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_runs_them_exactly(tmp_path, to, kind):
    pytest.importorskip(NEEDS[to])
    options = {"codebook": "nf4"} if to == "bitsandbytes" else {}
    quantized = from_model(qat.freeze(mixture(kind, **options)))
    notes = formats.module(to).write(quantized, tmp_path)
    assert any(f"only transformers reads '{STACK}'" in note for note in notes)
    assert dict(formats.module(to).verify(tmp_path, quantized))["logits, transformers"].startswith(
        "differ by at most 0 "
    )


@pytest.mark.clients
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runs_them(tmp_path, kind):
    pytest.importorskip("onnxruntime")
    quantized = from_model(qat.freeze(mixture(kind)))
    notes = formats.module("onnx").write(quantized, tmp_path)
    assert any("copies a token's experts" in note for note in notes)
    rows = dict(formats.module("onnx").verify(tmp_path, quantized))
    assert rows["codes in the file"].startswith("0 of")
    assert "argmax equal in 100.00%" in rows["onnxruntime, outputs"]


@pytest.mark.clients
@pytest.mark.parametrize("kind", KINDS)
def test_gguf_refuses_the_architecture(tmp_path, kind):
    with pytest.raises(ArtifactError, match="has no GGUF writer here"):
        formats.module("gguf").write(from_model(qat.freeze(mixture(kind))), tmp_path)
