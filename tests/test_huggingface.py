"""config.json of a folder: transformers reads it as it was, whatever older keys stand there for other readers."""

import json

import pytest
import torch
from random_families import frozen
from random_quantized import weight

from qat.formats import bitsandbytes, compressed_tensors, huggingface, torchao
from qat.quantized_model import QuantizedModel

SCALED = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize(
    "kind", ["gemma3_text", "olmo3", "gemma4_text", "laguna", "mellum", "modernbert-decoder", "llama", "stablelm"]
)
def test_transformers_reads_the_rotation_back(tmp_path, kind, scaled):
    """Of Gemma 4 and others whose layers turn in two ways it was read as one rotation for all, or not at all."""
    from transformers import AutoConfig

    rope = json.loads(json.dumps(AutoConfig.for_model(kind).rope_parameters))
    rope.get("full_attention", rope).update(SCALED[scaled])
    config = json.loads(json.dumps(AutoConfig.for_model(kind, rope_parameters=rope).to_dict(), default=str))
    dense = {"model.embed_tokens.weight": torch.zeros(2, 2)}
    model = QuantizedModel({"transformers": config}, {}, {}.__getitem__, {}.__getitem__, dense)
    huggingface.write_config(model, tmp_path, {})
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config["rope_parameters"]


@pytest.mark.clients
@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(
    ("method", "spec"),
    [
        (compressed_tensors, weight(group_size=32)),
        (torchao, weight(group_size=32)),
        (bitsandbytes, weight(codebook="nf4", group_size=64)),
    ],
)
def test_a_gemma_in_bf16_scales_its_embedding_in_bf16(tmp_path, kind, method, spec):
    """transformers, asked to open it in float32, makes the factor anew in float32."""
    pytest.importorskip(method.__name__.removeprefix("qat.formats."))
    model = frozen(kind, spec, torch.bfloat16, hidden_size=128, head_dim=64, num_hidden_layers=2)
    method.write(model, tmp_path)
    assert dict(method.verify(tmp_path, model))["logits, transformers"].startswith("differ by at most ")
