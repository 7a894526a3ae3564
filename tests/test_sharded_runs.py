"""A task that shards itself by FSDP2 in Lightning's configure_model: two processes on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qat
from qat.checkpoint import read_checkpoint

TASK = """
from torch.distributed.fsdp import fully_shard
from qat.training.tasks import ImageClassification

class Sharded(ImageClassification):
    def configure_model(self):
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
"""
RUN = (
    "data=digits policy=conv_w4a4 policy.weight.granularity=tensor policy.rules=[] model.args.width=4 "
    "task.schedule=constant task.warmup=0 trainer.accelerator=cpu trainer.devices=2 trainer.log_every_n_steps=1"
)
SHARDED = (
    "task._target_=sharded_task.Sharded trainer.strategy={_target_:lightning.pytorch.strategies.ModelParallelStrategy,"
    "data_parallel_size:2,tensor_parallel_size:1,save_distributed_checkpoint:false}"
)


@pytest.fixture
def run(tmp_path):
    """Train in the empty folder, in processes of their own."""
    (tmp_path / "sharded_task.py").write_text(TASK)
    path = f"{Path(qat.__file__).parents[1]}{os.pathsep}{tmp_path}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def of(overrides: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-P", "-m", "qat.train", *RUN.split(), *overrides.split()]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    return of


@pytest.mark.slow
def test_a_sharded_run_goes_on_to_the_bit(run, tmp_path):
    """As DDP trains it. A rank without a part of a weight's one step size ended the run at its first save."""
    weights = "policy.activation=null"
    for overrides in (
        f"name=cut {weights} {SHARDED} trainer.max_steps=3",
        f"name=cut {weights} {SHARDED} trainer.max_steps=6 resume=auto",
        f"name=whole {weights} {SHARDED} trainer.max_steps=6",
        f"name=ddp {weights} trainer.strategy=ddp trainer.max_steps=6",
    ):
        done = run(overrides)
        assert done.returncode == 0, done.stderr
    cut, whole, ddp = (tmp_path / "runs" / name / "last.ckpt" for name in ("cut", "whole", "ddp"))
    found, expected = (torch.load(path, weights_only=True) for path in (cut, whole))
    assert found["global_step"] == 6
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor), name
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (found, expected)]
    for index, state in moments[1].items():
        assert torch.equal(moments[0][index]["momentum_buffer"], state["momentum_buffer"])
    trained, expected = (read_checkpoint(path).state_dict for path in (whole, ddp))
    torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-4)
    assert all(trained[name].min() > 0 for name in trained if name.endswith("step_size"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (SHARDED.replace("false", "true"), "give it save_distributed_checkpoint: false"),
        (SHARDED, "takes policy.activation=null or a dynamic one"),
    ],
)
def test_what_a_sharded_run_does_not_do_is_one_line(run, overrides, said):
    done = run(overrides)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
