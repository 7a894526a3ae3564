"""Make the folders beside this file, each by its own tool, once: ``python make.py gptqmodel`` or ``llmcompressor``.

Made on a CPU on 2026-11-25 with gptqmodel 7.7.0 (GPTQMODEL_CPU_WORKERS=2) and llmcompressor 0.14.0.1, transformers
5.23.0, torch 2.13.0. weights.json holds the SHA-256 of each quantized layer's weight, as the tool itself dequantizes
it: in float16 for gptqmodel, in float32 for llmcompressor.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SHAPE = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}


def plain(folder):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).half().save_pretrained(folder)
    sys.path.append(str(HERE.parent))
    from tiny_tokenizer import tiny_tokenizer  # gptqmodel wants one

    tiny_tokenizer().save_pretrained(folder)


def record(out, weights):
    digests = {
        name: hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest() for name, weight in weights.items()
    }
    (out / "weights.json").write_text(json.dumps(digests, indent=1))
    keep = ("config.json", "quantize_config.json", "weights.json")
    for file in out.iterdir():
        if file.name not in keep and file.suffix != ".safetensors":
            file.unlink()


def gptqmodel(folder, symmetric):
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    out = HERE / f"gptqmodel_{'sym' if symmetric else 'asym'}"
    shutil.rmtree(out, ignore_errors=True)
    config = QuantizeConfig(bits=4, group_size=32, sym=symmetric, desc_act=False)
    model = GPTQModel.load(folder, config, device="cpu")
    data = [{"input_ids": torch.randint(0, 64, (256,)).tolist(), "attention_mask": [1] * 256} for _ in range(8)]
    model.quantize(data, batch_size=1)
    model.save(str(out))
    again = GPTQModel.load(str(out), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    layers = {name: layer for name, layer in again.model.named_modules() if hasattr(layer, "dequantize_weight")}
    record(out, {name: layer.dequantize_weight().t().half() for name, layer in layers.items()})


def llmcompressor(folder, symmetric):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    out = HERE / f"llmcompressor_{'sym' if symmetric else 'asym'}"
    shutil.rmtree(out, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scheme = "W4A16" if symmetric else "W4A16_ASYM"
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
    model.save_pretrained(out, save_compressed=True)
    whole = CompressedTensorsConfig(dequantize=True)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=whole)
    layers = {name: layer for name, layer in again.named_modules() if isinstance(layer, torch.nn.Linear)}
    record(out, {name: layer.weight.detach().float() for name, layer in layers.items() if name != "lm_head"})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        plain(folder)
        for symmetric in (True, False):
            globals()[sys.argv[1]](folder, symmetric)
