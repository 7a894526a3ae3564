"""Make the folders beside this file, each by its own tool, once: ``python make.py gptqmodel``, or another's name.

Made on a CPU on 2026-11-25 with gptqmodel 7.7.0 (GPTQMODEL_CPU_WORKERS=2), llmcompressor 0.14.0.1 and autoawq 0.2.9,
transformers 5.23.0, torch 2.13.0. weights.json holds the SHA-256 of each quantized layer's weight, as the tool itself
dequantizes it: in float32 for llmcompressor, in float16 for the others.

AutoAWQ (``pip install --no-deps autoawq==0.2.9``) is no longer maintained, and its package cannot be imported beside
transformers 5. What decides about a folder is taken from it all the same: what it rounds and packs a layer with, and
the config that it writes. It has no symmetric layout of this version.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import types
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
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


@torch.no_grad()
def autoawq(folder, symmetric):
    if symmetric:
        return
    package = types.ModuleType("awq")  # without its __init__, which imports all of its models
    package.__path__ = list(find_spec("awq").submodule_search_locations)
    for name in ("awq.quantize.scale", "awq.utils.calib_data"):  # not needed, and they import those models too
        sys.modules[name] = types.ModuleType(name)
    sys.modules["awq"] = package
    sys.modules["awq.quantize.scale"].apply_scale = sys.modules["awq.quantize.scale"].apply_clip = None
    sys.modules["awq.utils.calib_data"].get_calib_dataset = None
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    out, size = HERE / "autoawq_asym", 32
    shutil.rmtree(out, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    quantizer = types.SimpleNamespace(group_size=size, zero_point=True, w_bit=4)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    layers.pop("lm_head")
    weights = {}
    for name, layer in layers.items():  # as AwqQuantizer._apply_quant
        layer.weight.data, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(quantizer, layer.weight.data)
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
        packed = WQLinear_GEMM.from_linear(layer, 4, size, scales=scales, zeros=zeros)
        model.set_submodule(name, packed)
        weights[name] = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, size).t()
    model.config.quantization_config = AwqConfig(q_group_size=size).to_transformers_dict()
    model.config.save_pretrained(out)
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    record(out, weights)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        plain(folder)
        for symmetric in (True, False):
            globals()[sys.argv[1]](folder, symmetric)
