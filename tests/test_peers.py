"""Folders that other tools wrote (peers/make.py) open here with the weights that those tools compute."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import qat
import qat.hf

PEERS = Path(__file__).parent / "peers"
DTYPES = {"gptqmodel": torch.float16, "llmcompressor": torch.float32, "autoawq": torch.float16}
FOLDERS = [f"{tool}_{kind}" for tool in DTYPES for kind in ("sym", "asym") if (tool, kind) != ("autoawq", "sym")]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_peers_folder_opens_with_its_weights(tmp_path, name):
    expected = json.loads((PEERS / name / "weights.json").read_text())
    model = qat.hf.from_pretrained(PEERS / name, dtype=torch.float32)
    tensors = qat.quantized_tensors(model)
    assert tensors.keys() == expected.keys() and len(expected) == 7
    dtype = DTYPES[name.partition("_")[0]]
    for layer, tensor in tensors.items():
        weight = tensor.dequantize(dtype).contiguous()
        assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == expected[layer], layer
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        tokens = torch.arange(16).view(1, 16)
        assert torch.equal(qat.load(tmp_path).float()(tokens).logits, model(tokens).logits)
