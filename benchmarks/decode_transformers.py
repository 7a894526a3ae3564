"""Tokens a second of transformers' Llama at batch 1, int4 and bf16: python -m benchmarks.decode_transformers [--small]

What a user gets: LlamaForCausalLM of the 8B shape with random weights and a StaticCache, its forward compiled with
mode="reduce-overhead" (CUDA graphs), one token a call from a Python loop. The int4 model is frozen, and its projections
fused by ``qat.fuse_projections``. Takes minutes to compile.
"""

from __future__ import annotations

import argparse
import datetime
import time

import torch
import transformers

import qat
from benchmarks.decode import PROMPT, SMALL, synchronize
from benchmarks.decoder import LLAMA_8B, Shape
from qat.broken_pipe import ends_quietly


def random_llama(shape: Shape, device: torch.device) -> transformers.LlamaForCausalLM:
    """Return a bf16 model with random weights, made on its device."""
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
    )
    with device:
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def tokens_a_second(model: transformers.LlamaForCausalLM, tokens: int) -> float:
    """Return the median of three rounds after one: a prompt, and then tokens, whose time is taken."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=PROMPT + tokens)
    prompt = torch.arange(PROMPT, device=model.device)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    rates = []
    for _ in range(4):
        cache.reset()
        token = model(prompt[None], past_key_values=cache, cache_position=prompt).logits[:, -1:].argmax(-1)
        at = torch.full((1,), PROMPT, device=model.device)
        synchronize(model.device)
        start = time.perf_counter()
        for _ in range(tokens):
            torch.compiler.cudagraph_mark_step_begin()
            token = step(token, past_key_values=cache, cache_position=at).logits.argmax(-1)
            at = at + 1
        synchronize(model.device)
        rates.append(tokens / (time.perf_counter() - start))
    return sorted(rates[1:])[1]


@ends_quietly()
def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny shape, which runs on a CPU as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    shape, device = SMALL if options.small else LLAMA_8B, torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    print(
        f"{datetime.date.today()}, {name}, torch {torch.__version__}, transformers {transformers.__version__}, {shape}"
    )
    rates = []
    with torch.no_grad():
        model = random_llama(shape, device)
        for kind in ("bf16", "int4 g128"):
            if kind != "bf16":
                torch._dynamo.reset()
                policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=4, group_size=128))
                model = qat.fuse_projections(qat.freeze(qat.prepare(model, policy, verbose=False)))
            rates.append(tokens_a_second(model, options.tokens))
            print(f"{kind}: {rates[-1]:.1f} tokens/s", flush=True)
    print(f"int4 over bf16: {rates[1] / rates[0]:.2f}")


if __name__ == "__main__":
    main()
