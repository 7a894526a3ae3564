"""torchao's quantization-aware training of a language model, for other recipes: the peer, in its own words.

    python recipes/torchao_qat.py '{"model": DIR, "train": [TEXT], "test": TEXT, "bits": 4, "seed": 0, ...}' --json FILE

Needs ``pip install torchao 'qat-lsq[hf]'``. Symmetric weights in groups of 64 on every linear layer but lm_head, with
torchao's fake quantization of weights, which takes max|w| of each group anew in every step. With "rank" and "alpha"
that is QAT + LoRA: peft's adapters on all these layers train beside the fake-quantized weights, FQ(W) x + B A x, and
are merged before the conversion. Batches, optimizer, schedule and protocol are those of the other rows; what is
measured is the model after torchao's own conversion.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from qat.broken_pipe import ends_quietly
from qat.training.evaluation import evaluate
from qat.training.metrics import cross_entropy
from qat.training.optimization import Schedule, learning_rate_factor
from qat.training.text_data import TextData


@ends_quietly()
def main() -> None:
    """Train, convert, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    try:
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
        from torchao.quantization.qat import QATConfig
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        sys.exit(f"error: this needs {error.name}: pip install torchao 'qat-lsq[hf]'")
    settings = options.settings
    torch.manual_seed(settings["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).to(device).train()
    grid = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{settings['bits']}"),
        granularity=PerGroup(settings.get("group_size", 64)),
        mapping_type=MappingType.SYMMETRIC,
    )

    def chosen(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    quantize_(model, QATConfig(grid, step="prepare"), filter_fn=chosen)
    if "rank" in settings:
        from peft import LoraConfig, get_peft_model

        ranks = {"r": settings["rank"], "lora_alpha": settings["alpha"], "lora_dropout": 0.0}
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", **ranks))
    train(model, settings, device)
    if "rank" in settings:
        model = model.merge_and_unload()
    quantize_(model, QATConfig(grid, step="convert"), filter_fn=chosen)
    reference = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    length = settings.get("seq_len", 512)
    test = {"val": settings["test"], "val_window": length, "val_windows": settings["windows"], "eval_batch_size": 4}
    data = TextData("files", length, 1, tokenizer=settings["model"], **test)
    metrics = evaluate(model, data, device, reference)
    print(metrics)
    options.json.write_text(json.dumps(metrics))


def train(model: torch.nn.Module, settings: dict, device: str) -> None:
    """Take the steps that python -m qat.train takes with optim=adamw and a cosine."""
    size, steps = settings["batch_size"], settings["steps"]
    options = {"train": settings["train"], "val_fraction": 0.002, "seed": settings["seed"]}
    loader = TextData("files", settings.get("seq_len", 512), size, tokenizer=settings["model"], **options).train_loader(
        device
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    factor = learning_rate_factor(Schedule.cosine, 0.05, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    epoch = step = 0
    while step < steps:
        loader.sampler.set_epoch(epoch)
        for inputs, targets in loader:
            with torch.autocast(device, torch.bfloat16) if settings["bf16"] else nullcontext():
                loss = cross_entropy(model(inputs).logits, targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 50 == 0 or step == steps:
                print(f"step {step}  loss {loss.item():.4f}", flush=True)
            if step == steps:
                break
        epoch += 1


if __name__ == "__main__":
    main()
