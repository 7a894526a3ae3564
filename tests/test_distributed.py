"""A prepared model under DDP and FSDP2, two processes on a CPU: the gradients of one process, and what ships."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import answers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import qat
from qat import QuantPolicy, QuantSpec
from qat.errors import StateError
from qat.numerics import MIN_SCALE
from qat.sharding import reshard
from qat.training.fingerprint import fingerprint

RANKS = 2
WAYS = "ddp", "ddp, minmax", "fsdp2", "own groups"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2))
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def prepared(how=""):
    torch.manual_seed(0)
    rules = [
        {"match": "head", "weight": {"granularity": "tensor"}},
        {"match": "blocks.1.*", "weight": {"granularity": "channel"}},
        {"match": "blocks.0.2", "activation": {"symmetric": False}},
    ]
    kind = {"activation_quantizer": "minmax" if "minmax" in how else "lsq"}
    policy = QuantPolicy(weight=QuantSpec(bits=4, group_size=8), activation={"bits": 8}, rules=rules, **kind)
    model = qat.prepare(Net(), policy, verbose=False)
    return model if how == "waiting" else qat.calibrate(model, [torch.randn(8, 16)])


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 * RANKS, 16, generator=generator) for _ in range(3)]


def train(model, rank, ranks, dtype=torch.float32):
    """Three steps; each rank sees its part of the batch. Return this part's losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    steps = [p for name, p in model.named_parameters() if name.endswith("step_size")]
    model.train()
    losses = []
    for batch in batches():
        loss = model(batch.to(dtype).chunk(ranks)[rank]).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for step in steps:
                step.clamp_(min=MIN_SCALE)
        losses.append(loss.detach())
    return torch.stack(losses)


def sharded(model, own_groups, **options):
    if own_groups:
        qat.shard_step_sizes(model)
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def work(folder):
    """Train in every way on one of the ranks, and let rank 0 save the losses and the whole state."""
    for how in WAYS:
        train_and_save(how, folder / how)


def train_and_save(how, file):
    model, own_groups = prepared(how), how == "own groups"
    wrapped = nn.parallel.DistributedDataParallel(model) if "ddp" in how else sharded(model, own_groups)
    before = fingerprint(model)
    losses = train(wrapped, dist.get_rank(), RANKS)
    assert len(before) == len(fingerprint(model)) and before != fingerprint(model)
    dist.all_reduce(losses)
    state = {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
        for name, tensor in model.state_dict().items()
    }
    if "ddp" not in how:
        check_around_training(wrapped)
        # Cast for the forward: the weights, and the step sizes too where they are in the same group.
        cast = sharded(prepared(), own_groups, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with pytest.raises(StateError, match=r"(weight|step size) of 'blocks\.0\.0' arrives as torch\.bfloat16"):
            cast(batches()[0])
    if own_groups:
        in_bf16 = sharded(prepared().bfloat16(), own_groups)
        assert train(in_bf16, dist.get_rank(), RANKS, torch.bfloat16).isfinite().all()
        assert {parameter.dtype for parameter in in_bf16.parameters()} == {torch.bfloat16, torch.float32}
    if dist.get_rank() == 0:
        torch.save({"losses": losses / RANKS, "state": state}, file)


def check_around_training(model):
    """FSDP2 would keep nothing of a calibration; what an evaluation has gathered can be given back."""
    with pytest.raises(StateError, match="before fully_shard"):
        qat.calibrate(sharded(prepared("waiting"), False), [batches()[0]])
    with torch.no_grad():
        model(batches()[0])
    assert not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    reshard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder with what each way came to."""
    folder = tmp_path_factory.mktemp("ranks")
    answers("from test_distributed import work\nanswer = work(folder)", folder)
    return folder


@pytest.mark.parametrize("how", WAYS)
def test_two_processes(how, trained):
    """The same losses and parameters as one process with the whole batch; then it freezes."""
    results, alone = torch.load(trained / how), prepared(how)
    model = copy.deepcopy(alone)
    model.load_state_dict(results["state"])
    torch.testing.assert_close(results["losses"], train(alone, 0, 1), rtol=1e-4, atol=1e-6)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(results["state"][name], tensor, rtol=1e-3, atol=1e-4)
    expected = qat.quantized_tensors(model)
    for name, tensor in qat.quantized_tensors(qat.freeze(model)).items():
        assert torch.equal(tensor.codes, expected[name].codes)
