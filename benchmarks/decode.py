"""Tokens a second of the Llama-8B shape at batch 1, int4 against bf16: python -m benchmarks.decode [--small]

Random weights, made on the GPU. Each model runs with a static KV cache and the whole step in one CUDA graph, tokens
chosen greedily inside it, twice: its blocks compiled by torch.compile (their code is shared), and with
``qat.kernels.decode_step`` between the matrix products, or ``int4_after_norm`` around the int4 ones. Beside the tokens:
the matrix products of a step alone, and how many tokens the bytes of the weights allow at the measured read ceiling.

Then the int4 model is saved, and read again by a process that has compiled no kernel before (cold start): once with its
kernels compiled while it is read (``qat.load(tokens=...)``), and once without, which tells reading from compiling.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import qat
from benchmarks.decoder import LLAMA_8B, CachedDecoder, Shape, random_decoder
from qat.broken_pipe import ends_quietly
from qat.outline import parameters_on_meta

SMALL = Shape(256, 2, 512, 4, 2, 1000)
PROMPT, POSITIONS = 32, 512


def quantize(model: CachedDecoder) -> CachedDecoder:
    """Freeze every linear layer, the head too, to int4 in groups of 128; the embedding stays."""
    policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=4, group_size=128))
    return qat.freeze(qat.prepare(model, policy, verbose=False))


def weight_bytes(model: CachedDecoder) -> int:
    """Return the bytes of a step's weights: of linear layers and norms, and not the embedding."""
    total = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("embedding"))
    for layer in model.linears():
        if getattr(layer, "packed_weight", None) is not None:
            tensor = layer.packed_weight
            total += tensor.columns * tensor.shape[0] // 2 + tensor.scale.nbytes
    return total


def generate(model: CachedDecoder, tokens: int, compiled: bool) -> tuple[Callable[[], None], torch.Tensor]:
    """Return a function that makes ``tokens`` more tokens after a prompt, and where it writes them.

    The parts between matrix products are ``compiled``, or those of ``qat.kernels.decode_step``.
    """
    device = model.norm.weight.device
    turns, caches = model.turns(POSITIONS), model.caches(1, POSITIONS)
    made = torch.zeros(1, POSITIONS, dtype=torch.long, device=device)
    prompt = torch.arange(PROMPT, device=device)
    token = model(prompt[None], prompt, turns, caches)
    at = torch.full((1,), PROMPT, device=device)
    model.fused = not compiled
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)

    def step() -> None:
        made.index_copy_(1, at, token)
        torch.argmax(model.logits(token, at, turns, caches), -1, keepdim=True, out=token)
        at.add_(1)

    start = token.clone()
    replay = _captured(step) if device.type == "cuda" else step

    def run() -> None:
        token.copy_(start)
        at.fill_(PROMPT)
        for _ in range(tokens):
            replay()

    return run, made


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Return the median time of three runs after one."""
    times = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def products(model: CachedDecoder) -> Callable[[], None]:
    """Return a function that runs a step's matrix products alone."""
    layers, like = model.linears(), model.norm.weight
    inputs = {layer.in_features: torch.randn(1, 1, layer.in_features).to(like) for layer in layers}

    def run() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return _captured(run) if model.norm.weight.is_cuda else run


def measure(model: CachedDecoder, name: str, compiled: bool, tokens: int, ceiling: float) -> dict[str, float | str]:
    """Return one row."""
    device = model.norm.weight.device
    run, made = generate(model, tokens, compiled)
    step = seconds(run, device) / tokens
    alone = products(model)
    floor = weight_bytes(model) / ceiling
    return {
        "model": name + (", compiled" if compiled else ", decode_step"),
        "tokens/s": 1 / step,
        "us/token": step * 1e6,
        "matrix products us": seconds(alone, device) * 1e6,
        "weights GB": weight_bytes(model) / 1e9,
        "us at the ceiling": floor * 1e6,
        "of what bytes allow": floor / step,
        "first tokens": made[0, PROMPT : PROMPT + 4].tolist(),
    }


def cold_start(folder: Path, shape: Shape, device: str, tokens: tuple[int, ...]) -> dict[str, float]:
    """Read an artifact in a process that has compiled nothing, and make one token after a prompt; seconds.

    ``tokens`` are those of calls whose kernels are compiled meanwhile.
    """
    torch.zeros(1, device=device)
    synchronize(torch.device(device))
    start = time.perf_counter()
    with parameters_on_meta():
        model = CachedDecoder(shape).to(torch.bfloat16)
    model = qat.load(folder, model=model, device=device, tokens=tokens)
    synchronize(torch.device(device))
    loaded = time.perf_counter()
    turns, caches = model.turns(POSITIONS), model.caches(1, POSITIONS)
    at = torch.arange(PROMPT, device=device)
    with torch.no_grad():
        token = model(at[None], at, turns, caches)
        first = token.item() * 0.0 + time.perf_counter()
        model(token, at[-1:] + 1, turns, caches).item()
    return {
        "load": loaded - start,
        "first token": first - loaded,
        "second token": time.perf_counter() - first,
        "sum": time.perf_counter() - start,
    }


def _in_new_process(folder: Path, small: bool, device: str, *more: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.decode", "--read", str(folder), "--device", device]
        begin = time.perf_counter()
        done = subprocess.run(
            command + ["--small"] * small + list(more),
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - begin}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@ends_quietly()
def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny shape, which runs on a CPU as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--no-cold-start", action="store_true")
    parser.add_argument("--read", type=Path, help="only read this artifact, as the cold start does")
    parser.add_argument("--not-ahead", action="store_true", help="with --read: compile no kernel before it is called")
    options = parser.parse_args()
    shape, device = SMALL if options.small else LLAMA_8B, torch.device(options.device)
    if options.read:
        print(json.dumps(cold_start(options.read, shape, options.device, () if options.not_ahead else (1, PROMPT))))
        return
    ceiling, name = 20e9, "a CPU, at 20 GB/s"
    if device.type == "cuda":
        from benchmarks.timing import read_ceiling

        ceiling, name = read_ceiling(), torch.cuda.get_device_name()
        torch.cuda.empty_cache()
    print(
        f"{datetime.date.today()}, {name}, torch {torch.__version__}, read ceiling {ceiling / 1e12:.2f} TB/s, {shape}"
    )
    with torch.no_grad():
        model = random_decoder(shape, torch.bfloat16, device)
        fastest = []
        for name in ("bf16", "int4 g128"):
            rates = []
            for compiled in (False, True):
                row = measure(model, name, compiled, options.tokens, ceiling)
                print(row, flush=True)
                rates.append(row["tokens/s"])
                _uncompiled(model)
            fastest.append(max(rates))
            if name == "bf16":
                model = quantize(model)
    print(f"int4 over bf16: {fastest[1] / fastest[0]:.2f} times the tokens/s, each at its faster")
    if not options.no_cold_start:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            qat.save(model, f"{folder}/model")
            print(f"saved in {time.perf_counter() - begin:.1f} s", flush=True)
            arguments = Path(folder) / "model", options.small, options.device
            print("cold start, seconds:", _in_new_process(*arguments), flush=True)
            print("without compiling ahead:", _in_new_process(*arguments, "--not-ahead"))


def _uncompiled(model: CachedDecoder) -> None:
    for block in model.blocks:
        block._compiled_call_impl = None
    torch._dynamo.reset()


if __name__ == "__main__":
    main()
