"""Perplexity of an exported language model, measured by the runtime that it was exported for, on the CPU.

    python recipes/client_perplexity.py CLIENT FOLDER --tokenizer DIR --text FILE [--windows 4]

CLIENT is one of the names in CLIENTS; FOLDER is what ``python -m qat.convert`` wrote for it. The text's lines are
tokenised at once; of its first non-overlapping windows of 512 tokens, the mean cross-entropy of 511 predictions each is
taken, and e to the mean of these. The last line printed is JSON: perplexity, the windows' cross-entropies, and the
tokens a second of the fastest window. All run on one thread, as a busy machine makes several wait for each other, and
in float32; but llama.cpp and ExecuTorch round the inputs of their quantized products to int8, and so do qat_q8_0 and
qat_int8_token, which are our own runtime with that rounding.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # read when torch and mlx are imported

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.broken_pipe import ends_quietly

LENGTH = 512
Logits = Callable[[Tensor], Tensor]  # tokens (1, T) -> (1, T, vocabulary)
Result = dict[str, float | list[float]]


def qat_load(folder: Path) -> Logits:
    """Our own runtime."""
    import qat

    model = qat.load(folder).float()
    return lambda tokens: model(tokens).logits


def qat_q8_0(folder: Path) -> Logits:
    """Our own runtime, with inputs rounded as llama.cpp does it."""
    return rounded_as(folder, "q8_0")


def qat_int8_token(folder: Path) -> Logits:
    """Our own runtime, with inputs rounded as ExecuTorch does it."""
    return rounded_as(folder, "int8_token")


def rounded_as(folder: Path, dynamic: str) -> Logits:
    """Our own runtime, with each quantized layer's input rounded to int8."""
    import qat
    from qat.layers import frozen_layers
    from qat.quantizers import DynamicActivation
    from qat.spec import Dynamic

    model = qat.load(folder).float()
    for _, layer in frozen_layers(model):
        layer.activation_quantizer = DynamicActivation(Dynamic(dynamic))
    return lambda tokens: model(tokens).logits


def executorch(folder: Path) -> Logits:
    """Of a program, which takes one text at a time."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(folder / "model.pte").load_method("forward")
    return lambda tokens: method.execute([tokens])[0]


def transformers(folder: Path) -> Logits:
    """Of a Hugging Face folder, through compressed-tensors, torchao or bitsandbytes, or of a GGUF file."""
    from transformers import AutoModelForCausalLM

    options = {"gguf_file": "model.gguf"} if (folder / "model.gguf").is_file() else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # read by bitsandbytes, whose kernel there multiplies in bf16
    return lambda tokens: model(tokens).logits


def mlx_lm(folder: Path) -> Logits:
    """Of an MLX or an AWQ folder; scales are taken to float32, which changes no value."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return lambda tokens: torch.from_numpy(numpy.array(model(mx.array(tokens.numpy()))))


def onnxruntime(folder: Path, cache: tuple[int, int] = (0, 0)) -> Logits:
    """Of an ONNX file; one of onnxruntime-genai's also takes a mask and an empty cache of so many heads of a size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def logits(tokens: Tensor) -> Tensor:
        feeds = {"input_ids": tokens.numpy(), "attention_mask": numpy.ones(tokens.shape, numpy.int64)}
        for value in session.get_inputs():
            if value.name.startswith("past_key_values"):
                feeds[value.name] = numpy.zeros((1, cache[0], 0, cache[1]), numpy.float32)
        wanted = {value.name: feeds[value.name] for value in session.get_inputs()}
        return torch.from_numpy(session.run(["logits"], wanted)[0])

    return logits


def onnxruntime_genai(folder: Path) -> Logits:
    """Of a GPTQ or an AWQ folder, whose builder makes an ONNX file, and would round the embedding too."""
    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", made]
        command += ["-c", made, "-p", "int4", "-e", "cpu", "--extra_options"]
        command += ["accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return onnxruntime(Path(made), (config["num_key_value_heads"], config["head_dim"]))


def openvino(folder: Path) -> Logits:
    """Of an ONNX file; without the hint ACCURACY it would round the inputs of 4-bit products to int8."""
    import openvino

    hints = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(folder / "model.onnx", "CPU", hints)
    return lambda tokens: torch.from_numpy(compiled([tokens.numpy()])[0].copy())


def measure(logits: Logits, windows: Tensor) -> Result:
    """Return the perplexity and the speed."""
    losses, seconds = [], []
    with torch.inference_mode():
        logits(windows[:1, :8])  # the first call is slower
        for window in windows:
            start = time.perf_counter()
            found = logits(window[None])
            seconds.append(time.perf_counter() - start)
            losses.append(F.cross_entropy(found[0, :-1].float(), window[1:]).item())
    return result(losses, LENGTH / min(seconds))


def result(losses: list[float], speed: float) -> Result:
    """Return what is printed."""
    return {"perplexity": math.exp(sum(losses) / len(losses)), "losses": losses, "tokens_per_second": speed}


def llama_cpp(folder: Path, windows: Tensor) -> Result:
    """Of a GGUF file: one request a prediction, whose bias makes llama.cpp choose, and so report, the token that comes.

    The probability is reported before the bias. Tokens read before stay in its cache, so that a request reads one.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.n_parallel = str(folder / "model.gguf"), 640, 0, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_ram_mib, params.verbosity = 0, -1
    server = xllamacpp.Server(params)
    losses, seconds = [], []
    for window in windows.tolist():
        window_losses = []
        for length in range(LENGTH - 1, 0, -1):  # the first request reads the whole window
            start = time.perf_counter()
            request = {"prompt": window[:length], "max_tokens": 1, "logprobs": 1, "temperature": 0.0}
            request |= {"cache_prompt": length < LENGTH - 1, "logit_bias": [[window[length], 1e4]]}
            (answer,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
            if length == LENGTH - 1:
                seconds.append(time.perf_counter() - start)
            if answer["id"] != window[length]:
                sys.exit(f"error: llama.cpp chose token {answer['id']} in spite of the bias")
            window_losses.append(-answer["logprob"])
        losses.append(sum(window_losses) / len(window_losses))
    return result(losses, (LENGTH - 1) / min(seconds))


OURS = (qat_load, qat_q8_0, qat_int8_token)
OTHERS = (transformers, mlx_lm, onnxruntime, onnxruntime_genai, openvino, llama_cpp, executorch)
CLIENTS = {client.__name__: client for client in (*OURS, *OTHERS)}


@ends_quietly()
def main() -> None:
    """Measure, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(arguments.tokenizer)(arguments.text.read_text(encoding="utf-8"))["input_ids"]
    windows = torch.tensor(tokens[: LENGTH * arguments.windows]).view(-1, LENGTH)
    client = CLIENTS[arguments.client]
    found = client(arguments.folder, windows) if client is llama_cpp else measure(client(arguments.folder), windows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
