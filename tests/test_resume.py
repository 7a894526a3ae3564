"""A killed and resumed run ends as if nothing had happened: weights, step sizes, optimizer and log, bit by bit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import apart
import pytest
import torch

SMALL_IMAGES = (
    "data=digits data.crop_padding=1 policy=conv_w4a4 model.args.width=4 trainer.max_epochs=2 "
    "trainer.log_every_n_steps=4 callbacks.scales.every_n_logs=2 callbacks.checkpoints.every_n_steps=10"
)
SMALL_TEXT = (  # dropout: the random state matters; validation also in mid-epoch
    "experiment=topics_w4 data.seq_len=16 data.batch_size=8 data.val_fraction=0.02 model.args.width=32 "
    "model.args.depth=1 model.args.dropout=0.2 trainer.max_epochs=2 trainer.limit_train_batches=20 "
    "trainer.val_check_interval=7 trainer.limit_val_batches=2 trainer.log_every_n_steps=2 "
    "callbacks.checkpoints.every_n_steps=3"
)
KILLER = """
import os, signal
from lightning.pytorch import Callback

class Killer(Callback):
    def __init__(self, step, hook, how):
        self.step, self.how = step, signal.Signals[how]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background jobs ignore
        setattr(self, hook, self.kill)

    def kill(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.how)
"""
OWN_DATA = """
import random
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, RandomSampler

class Noisy(Dataset):
    def __len__(self):
        return 96
    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(1, 8, 8)
        return noise * (index % 2 - 0.5), index % 2

class Data(LightningDataModule):
    def __init__(self, generator: bool = False, workers: int = 0, size: int = 8):
        super().__init__()
        self.generator, self.workers, self.size = generator, workers, size
        self.sampler = RandomSampler(Noisy(), generator=torch.Generator().manual_seed(3)) if generator else None
    def train_dataloader(self):
        more = dict(sampler=self.sampler) if self.generator else dict(shuffle=True)
        return DataLoader(Noisy(), self.size, num_workers=self.workers, **more)
    def val_dataloader(self):
        return DataLoader(Noisy(), 48, num_workers=self.workers)
"""
OWN = (  # 12 steps an epoch; validation, which draws random numbers too, also in mid-epoch
    "--config-dir configs data=own policy=conv_w4a4 model.args.width=4 model.args.num_classes=2 "
    "trainer.accelerator=cpu trainer.max_epochs=3 trainer.val_check_interval=6 trainer.log_every_n_steps=1 "
    "callbacks.checkpoints.every_n_steps=5"
)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(train, tmp_path, monkeypatch, capsys):
    """Run the command line in this process, which takes a tenth of another's time, and return what it printed."""
    monkeypatch.syspath_prepend(tmp_path)

    def finish(overrides: str) -> str:
        capsys.readouterr()
        train(overrides)
        return capsys.readouterr().out

    return finish


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """Return what starts the command line in another process, which the end of the test kills."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    begun = []

    def run(overrides: str) -> BaseProcess:
        begun.append(apart.start(tmp_path / "printed", apart.train, overrides))
        return begun[-1]

    yield run
    for process in begun:
        process.kill()


def new_process(folder: Path, overrides: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own: Lightning starts other ranks by its words."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qat.train", *overrides.split()]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def compare(a, b, where: str) -> None:
    """Fail unless two nested values are equal, tensors bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            compare(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            compare(left, right, f"{where}[{index}]")
    else:
        assert a == b, where


@pytest.fixture
def check(run, begin, tmp_path):
    """Compare a run that is killed and resumed with one that is not; SIGTERM lets it go on for so many steps."""

    def compared(
        overrides: str, kills: list[tuple[int, str]], how: str = "SIGKILL", status: int = -9, steps_on: int = 1
    ) -> None:
        (tmp_path / "killer.py").write_text(KILLER)
        run(f"{overrides} name=whole")
        for step, hook in kills:
            name = f"killed_{step}_{hook}"
            arguments = {"_target_": "killer.Killer", "step": step, "hook": hook, "how": how}
            kill = " ".join(f"+callbacks.killer.{key}={value}" for key, value in arguments.items())
            process = begin(f"{overrides} name={name} {kill}")
            process.join()
            printed = (tmp_path / "printed").read_text()
            assert process.exitcode == status, printed
            if how == "SIGTERM":  # it saves the step that it was in
                assert f"stopped by SIGTERM at step {step + steps_on}" in printed
                saved = torch.load(tmp_path / "runs" / name / "last.ckpt", weights_only=True)
                assert saved["global_step"] == step + steps_on
            resume_and_compare(run, tmp_path, overrides, name)

    return compared


def resume_and_compare(run: Callable[[str], str], folder: Path, overrides: str, name: str) -> None:
    """Finish a run, and fail unless it ends as the run "whole" did."""
    assert "calibrated" not in run(f"{overrides} name={name} resume=auto")
    expected, found = (folder / "runs" / run / "metrics.csv" for run in ("whole", name))
    assert expected.read_text() == found.read_text(), name
    expected, found = (torch.load(folder / "runs" / run / "last.ckpt", weights_only=True) for run in ("whole", name))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "rng", "qat"):
        compare(expected[part], found[part], f"{name}: {part}")


def test_images_killed_in_mid_epoch(check):
    check(SMALL_IMAGES, [(57, "on_train_batch_start")])


def test_images_stopped_by_sigterm(check):
    check(SMALL_IMAGES, [(53, "on_train_batch_start")], "SIGTERM", 128 + 15)


def own_data(folder: Path) -> None:
    """Write a data module of the user's own."""
    (folder / "noisy_data.py").write_text(OWN_DATA)
    (folder / "configs" / "data").mkdir(parents=True)
    (folder / "configs" / "data" / "own.yaml").write_text("_target_: noisy_data.Data\n")


@pytest.mark.parametrize(
    "more", ["", *(pytest.param(f"+data.{more}", marks=pytest.mark.slow) for more in ("generator=true", "workers=2"))]
)
def test_own_data_killed_in_mid_epoch_and_after_one(check, tmp_path, more):
    """It reads again what was read, so that order, augmentations and all that follows are those of the whole run."""
    own_data(tmp_path)
    check(f"{OWN} {more}", [(21, "on_train_batch_start"), (24, "on_train_epoch_start")])


def test_own_data_in_other_batches(run, tmp_path):
    own_data(tmp_path)
    run(f"{OWN} trainer.max_steps=17")
    printed = run(f"{OWN} resume=auto +data.size=16")
    assert "changed     batch size 8 -> 16, batches an epoch 12 -> 6: of this epoch some examples come twice" in printed
    assert "changed" not in run(f"{OWN} trainer.max_epochs=4 resume=auto +data.size=16")


@pytest.mark.slow
def test_own_data_killed_at_every_kind_of_moment(check, tmp_path):
    own_data(tmp_path)
    hooks = ["on_train_batch_end", "on_validation_start", "on_validation_end", "on_train_batch_start"]
    check(OWN, [(step, hook) for step in (18, 24) for hook in hooks])


@pytest.mark.parametrize(("step", "said"), [(5, "nothing was saved yet"), (15, "add resume=auto to go on from")])
def test_ctrl_c_says_what_is_left(run, tmp_path, capsys, step, said):
    (tmp_path / "killer.py").write_text(KILLER)
    more = f"+callbacks.killer={{_target_:killer.Killer,step:{step},hook:on_train_batch_end,how:SIGINT}}"
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            run(f"{SMALL_IMAGES} name=stopped {more}")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning has it ignored from then on
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and f"interrupted at step {step}: {said}" in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(("how", "status", "step"), [("SIGTERM", 143, 4), ("SIGKILL", -9, 5)])
def test_images_stopped_between_the_batches_of_a_step(check, how, status, step):
    """Four batches a step, and validation after each second one: gradients of some batches are in no checkpoint."""
    several = SMALL_IMAGES.replace("every_n_steps=10", "every_n_steps=2").replace("max_epochs=2", "max_epochs=1")
    several += " trainer.accumulate_grad_batches=4 trainer.val_check_interval=8"
    check(several, [(step, "on_train_batch_start")], how, status)


TWO_RANKS = (
    "data=digits policy=conv_w4a4 model.args.width=4 trainer.accelerator=cpu trainer.devices=2 trainer.strategy=ddp "
    "trainer.log_every_n_steps=1 trainer.max_steps=9"
)
OF_ONE_RANK = """
class OfOneRank(Killer):
    def __init__(self, rank, **how):
        super().__init__(**how)
        self.rank = rank

    def kill(self, trainer, *_):
        if trainer.global_rank == self.rank:
            super().kill(trainer)
"""


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_ranks_stopped_by_sigterm(tmp_path, rank):
    """All of them stop after the same step, and save it: Lightning's broadcast from the handler met other broadcasts.

    The step that the signal comes in, and the next one, which begins when all know of it.
    """
    (tmp_path / "killer.py").write_text(KILLER + OF_ONE_RANK)
    how = f"{{_target_:killer.OfOneRank,step:3,hook:on_train_batch_start,how:SIGTERM,rank:{rank}}}"
    done = new_process(tmp_path, f"{TWO_RANKS} name=stopped +callbacks.killer={how}")
    assert done.returncode == 128 + 15 and "stopped by SIGTERM at step 5: add resume=auto" in done.stdout, done.stderr
    assert torch.load(tmp_path / "runs" / "stopped" / "last.ckpt", weights_only=True)["global_step"] == 5
    if rank == 0:
        return
    for arguments in ("name=stopped resume=auto", "name=whole"):
        assert new_process(tmp_path, f"{TWO_RANKS} {arguments}").returncode == 0
    expected, found = (torch.load(tmp_path / f"runs/{name}/last.ckpt") for name in ("whole", "stopped"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "rng"):
        compare(expected[part], found[part], part)


@pytest.mark.slow
def test_two_ranks_that_are_spawned(tmp_path):
    """Everything that a run is made of is pickled for them."""
    done = new_process(tmp_path, f"{TWO_RANKS} trainer.strategy=ddp_spawn")
    assert done.returncode == 0 and "metrics     accuracy" in done.stdout, done.stderr


def test_two_runs_in_one_folder(begin, train, fails, tmp_path):
    """The second is refused while the first goes on, and not when it has been killed."""
    (tmp_path / "waiting.py").write_text(
        "import time, pathlib\nfrom lightning.pytorch import Callback\n\n"
        "class Wait(Callback):\n"
        "    def on_train_start(self, *_):\n"
        "        pathlib.Path('waits').touch()\n"
        "        time.sleep(600)\n"
    )
    short = "data=digits model.args.width=4 trainer.accelerator=cpu trainer.max_steps=2 name=a"
    first = begin(f"{short} +callbacks.wait._target_=waiting.Wait")
    while not (tmp_path / "waits").exists():
        assert first.is_alive(), (tmp_path / "printed").read_text()
        time.sleep(0.1)
    assert f"another run is at work in {tmp_path / 'runs' / 'a'}: wait for its end" in fails(short)
    assert first.is_alive()
    first.kill()
    first.join()
    train(short)


def test_images_stopped_by_sigterm_during_validation(check):
    """It ends first; the step before it is then saved."""
    check(f"{SMALL_IMAGES} data.eval_batch_size=50", [(44, "on_validation_batch_start")], "SIGTERM", 143, 0)


@pytest.mark.slow
def test_text_stopped_by_sigterm_during_validation_in_mid_epoch(check):
    check(SMALL_TEXT, [(7, "on_validation_batch_start"), (14, "on_validation_batch_end")], "SIGTERM", 143)


@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        (SMALL_IMAGES, 33),  # between two saves
        pytest.param(SMALL_TEXT, 10, marks=pytest.mark.slow),
        pytest.param(SMALL_TEXT, 14, marks=pytest.mark.slow),  # with a validation due
        pytest.param(SMALL_TEXT, 20, marks=pytest.mark.slow),  # at the end of an epoch
    ],
)
def test_max_steps_in_mid_epoch_and_on_from_there(run, tmp_path, overrides, step):
    overrides += " task.schedule=constant task.warmup=0"  # others depend on the number of all steps
    for arguments in ("name=whole", f"name=cut trainer.max_steps={step}"):
        run(f"{overrides} {arguments}")
    assert torch.load(tmp_path / "runs" / "cut" / "last.ckpt", weights_only=True)["global_step"] == step
    resume_and_compare(run, tmp_path, overrides, "cut")


@pytest.mark.slow
def test_images_killed_at_every_kind_of_moment(check):
    steps_an_epoch = 44
    moments = [
        (20, "on_train_batch_end"),  # with a checkpoint due at this step, not saved yet
        (21, "on_train_batch_start"),
        (steps_an_epoch, "on_validation_start"),
        (steps_an_epoch, "on_validation_end"),
        (steps_an_epoch, "on_train_epoch_end"),
        (steps_an_epoch, "on_train_epoch_start"),
        (steps_an_epoch + 1, "on_train_batch_start"),
        (2 * steps_an_epoch, "on_validation_end"),
        (2 * steps_an_epoch, "on_train_end"),
    ]
    check(SMALL_IMAGES, moments)


@pytest.mark.slow
def test_text_with_dropout_killed_around_validation(check):
    moments = [(step, hook) for step in (7, 8, 14, 20, 27) for hook in ("on_train_batch_end", "on_train_batch_start")]
    check(SMALL_TEXT, [*moments, (7, "on_validation_end"), (14, "on_validation_start")])
