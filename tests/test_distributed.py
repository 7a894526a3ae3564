"""A prepared model under DDP and FSDP2, two processes on a CPU: the gradients of one process, and what ships."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import qat
from qat import QuantPolicy, QuantSpec
from qat.numerics import MIN_SCALE

RANKS = 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2))
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def prepared():
    torch.manual_seed(0)
    rules = [
        {"match": "head", "weight": {"granularity": "tensor"}},
        {"match": "blocks.1.*", "weight": {"granularity": "channel"}},
    ]
    policy = QuantPolicy(weight=QuantSpec(bits=4, group_size=8), activation={"bits": 8}, rules=rules)
    return qat.calibrate(qat.prepare(Net(), policy, verbose=False), [torch.randn(8, 16)])


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 * RANKS, 16, generator=generator) for _ in range(3)]


def train(model, rank, ranks):
    """Three steps; each rank sees its part of the batch. Return the losses of the whole batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    steps = [p for name, p in model.named_parameters() if name.endswith("step_size")]
    losses = []
    for batch in batches():
        loss = model(batch.chunk(ranks)[rank]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for step in steps:
                step.clamp_(min=MIN_SCALE)
        losses.append(loss.detach())
    return torch.stack(losses)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(how, file):
    """What torchrun starts on each rank: train, and let rank 0 save the losses and the whole state."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = prepared()
    if how == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if how == "fsdp2-bf16" else MixedPrecisionPolicy()
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        wrapped = fully_shard(model, mp_policy=policy)
    losses = train(wrapped, dist.get_rank(), RANKS)
    dist.all_reduce(losses)
    state = {name: full(tensor).detach().clone() for name, tensor in model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save({"losses": losses / RANKS, "state": state}, file)
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "fsdp2-bf16"])
def test_two_processes(how, tmp_path):
    """The same losses and parameters as one process with the whole batch; then it freezes."""
    file = tmp_path / "rank0.pt"
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = subprocess.run([*command, __file__, how, file], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(file)
    losses, state = results["losses"], results["state"]
    alone = prepared()
    model = copy.deepcopy(alone)
    model.load_state_dict(state)
    if how == "fsdp2-bf16":
        assert losses[-1] < losses[0] and all(tensor.isfinite().all() for tensor in state.values())
    else:
        torch.testing.assert_close(losses, train(alone, 0, 1), rtol=1e-4, atol=1e-6)
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4)
    expected = qat.quantized_tensors(model)
    for name, tensor in qat.quantized_tensors(qat.freeze(model)).items():
        assert torch.equal(tensor.codes, expected[name].codes)


if __name__ == "__main__":
    work(*sys.argv[1:])
