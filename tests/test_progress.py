"""What a run prints while it trains."""

import functools
import sys

from small_training import SGD, data, task, trainer

from qat.training.checkpointing import Checkpoints
from qat.training.progress import ProgressBar, Report


def test_lines_on_a_terminal_stand_above_the_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    def fit(epochs: int, lr: float, resume=None) -> str:
        callbacks = [ProgressBar(refresh_rate=1), Report(), Checkpoints(tmp_path)]
        limits = {"limit_train_batches": 2, "limit_val_batches": 1, "max_steps": -1, "max_epochs": epochs}
        network = task(optimizer=functools.partial(SGD, lr=lr))
        trainer(*callbacks, enable_progress_bar=True, **limits).fit(
            network, datamodule=data(), ckpt_path=resume, weights_only=True
        )
        return capsys.readouterr().out

    first, second = fit(2, 0.05), fit(3, 0.02, tmp_path / "last.ckpt")
    seen = [line.rsplit("\r", 1)[-1] for line in (first + second).splitlines() if "  step " in line or "ed  " in line]
    assert [line.split("  ")[0] for line in seen] == ["epoch 1", "epoch 2", "resumed", "changed", "epoch 3"]
    assert seen[2].split() == ["resumed", "at", "step", "4"]
    assert "Epoch 1:  50%" in first
    assert "Epoch 0:  50%" not in first
