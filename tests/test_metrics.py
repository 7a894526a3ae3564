"""How far a quantized language model is from another: perplexity, divergence, agreement."""

import json
import math
import sys

import pytest
import torch

from qat import evaluate as evaluate_command
from qat import train as train_command
from qat.errors import DataError
from qat.models import build
from qat.training.evaluation import evaluate
from qat.training.image_data import ImageData
from qat.training.metrics import ClassificationMetrics, LanguageMetrics, first_logits
from qat.training.text_data import TextData


def test_divergence_and_agreement_over_batches():
    """Against the definition in float64, over batches of different size, bf16 logits and more than one slice."""
    generator = torch.Generator().manual_seed(0)
    metrics, kl, same, loss, count = LanguageMetrics(compared=True), 0.0, 0, 0.0, 0
    for rows in (3, 700):
        logits, reference = (torch.randn(rows, 2, 11, generator=generator).bfloat16() * 3 for _ in range(2))
        reference[::2] = logits[::2] + 0.25
        targets = torch.randint(0, 11, (rows, 2), generator=generator)
        metrics.update(logits, targets, reference)
        p, q = (values.double().softmax(-1) for values in (reference, logits))
        kl += (p * (p / q).log()).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        loss -= q.gather(-1, targets[..., None]).log().sum().item()
        count += 2 * rows
    values = metrics.compute()
    assert values["kl"].item() == pytest.approx(kl / count, rel=1e-5)
    assert values["agreement"].item() == pytest.approx(same / count)
    assert values["loss"].item() == pytest.approx(loss / count, rel=1e-5)
    assert values["perplexity"].item() == pytest.approx(math.exp(loss / count), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["to", "method"])
def test_metrics_of_a_half_precision_run_are_sums_in_float32(dtype, cast):
    """bf16-true casts the task and all in it: a sum in bf16 stops growing, one in fp16 ends at 65504."""
    generator = torch.Generator().manual_seed(0)
    for metrics in (LanguageMetrics(), ClassificationMetrics()):
        holder = torch.nn.ModuleDict({"metrics": metrics})
        half = {torch.bfloat16: holder.bfloat16, torch.float16: holder.half}[dtype]
        holder.to(dtype) if cast == "to" else half()
        right, loss = 0, 0.0
        for batch in range(600):  # the first ones are the worst
            targets = torch.randint(0, 5, (4, 32), generator=generator)
            logits = torch.randn(4, 32, 5, generator=generator) * (3 if batch < 300 else 0.1)
            if isinstance(metrics, ClassificationMetrics):
                logits, targets = logits.flatten(0, 1), targets.flatten()
            metrics.update(logits.to(dtype), targets)
            log_p = logits.to(dtype).double().log_softmax(-1)
            loss -= log_p.gather(-1, targets[..., None]).sum().item()
            right += (logits.to(dtype).argmax(-1) == targets).sum().item()
        values = metrics.compute()
        assert values["loss"].dtype == torch.float32
        assert values["loss"].item() == pytest.approx(loss / (600 * 128), rel=1e-5)
        if "accuracy" in values:
            assert values["accuracy"].item() == pytest.approx(right / (600 * 128), rel=1e-6)


def test_a_model_agrees_with_itself():
    model = build({"builder": "gpt", "args": {"width": 16, "depth": 1, "heads": 2, "context": 32}})
    data = TextData("topics", 32, 4, val_windows=2)
    values = evaluate(model, data, reference=model)
    assert values["kl"] == 0 and values["agreement"] == 1
    assert set(evaluate(model, data)) == {"perplexity", "loss"}
    with pytest.raises(DataError, match="only language models"):
        evaluate(model, ImageData("digits", [0.3], [0.4], 4), reference=model)


def test_perplexity_of_windows_that_share_no_token(tmp_path):
    """The stated protocol, written out: non-overlapping windows, all but the first token of each predicted."""
    (tmp_path / "a.txt").write_text("".join(chr(97 + i * i % 23) for i in range(200)))
    model = build({"builder": "gpt", "args": {"width": 16, "depth": 1, "heads": 2, "context": 32}}).eval()
    data = TextData("files", 32, 4, val=str(tmp_path / "a.txt"), val_window=32, val_windows=5)
    tokens = torch.tensor(list((tmp_path / "a.txt").read_bytes()))[:160].view(5, 32)
    with torch.no_grad():
        logits = model(tokens)[:, :-1].double()
    losses = [
        torch.nn.functional.cross_entropy(row, window[1:]).item() for row, window in zip(logits, tokens, strict=True)
    ]
    assert evaluate(model, data)["perplexity"] == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)


def test_from_the_command_line(tmp_path, monkeypatch):
    """An artifact-to-be against the checkpoint that it came from, and against a folder of transformers."""
    monkeypatch.chdir(tmp_path)
    small = "model.args.depth=1 model.args.width=16 model.args.heads=2 trainer.accelerator=cpu trainer.max_steps=0"
    for name, more in (("fp", "experiment=topics_fp"), ("w2", "experiment=topics_w4 policy.weight.bits=2")):
        start = "" if name == "fp" else " init_from=runs/fp/last.ckpt policy.weight.group_size=16"
        monkeypatch.setattr(sys, "argv", ["train", *f"{more} {small} name={name}{start}".split()])
        train_command.main()
    data = ["data=topics", "data.val_windows=2", "--json", "out.json", "--reference", "runs/fp/last.ckpt"]
    evaluate_command.main(["runs/w2/last.ckpt", *data])
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["kl"] > 0 and values["agreement"] < 1

    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 256}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    data[-1] = "llama"
    evaluate_command.main(["llama", *data])
    assert json.loads((tmp_path / "out.json").read_text())["kl"] == 0


class Precision(torch.nn.Module):
    """Notes what cuDNN may do to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def forward(self, x):
        self.seen.add(torch.backends.cudnn.conv.fp32_precision)
        return x.flatten(1)[:, :10]


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_is_measured_in_float32(allowed):
    """TF32, which cuDNN uses unless told otherwise, moved a 2-bit network's accuracy by up to 0.4 points."""
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = allowed
        chosen, model = torch.backends.cudnn.conv.fp32_precision, Precision()
        assert (chosen == "tf32") == allowed
        evaluate(model, ImageData("digits", mean=[0.5], std=[0.3], batch_size=8))
        assert "tf32" not in model.seen
        assert torch.backends.cudnn.conv.fp32_precision == chosen
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_chosen_precision_is_left_alone():
    """torch refuses its older name once somebody has used the newer one for convolutions alone."""
    before, model = torch.backends.cudnn.conv.fp32_precision, Precision()
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        evaluate(model, ImageData("digits", mean=[0.5], std=[0.3], batch_size=8))
        assert model.seen == {"ieee"}
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_a_network_that_says_nothing_is_named_by_its_error():
    class Silent(torch.nn.Module):
        def forward(self, x):
            raise ValueError

    with pytest.raises(DataError, match=r"cannot run on these data, shape \[2, 3\]: ValueError \("):
        first_logits(Silent(), torch.randn(2, 3))
