"""Memory of a training step before it runs: the step is played through with tensors that have no data.

Every operator allocates as it will on the device, in the order of the step: forward, backward with what it computes
again, optimizer. What is counted is live tensors; an allocator keeps some more for itself. Without data transformers
cannot see that a batch needs no attention mask, so that a batch without packed examples is estimated too large.
Modules that will be compiled keep less: they are played through as ``qat.partitioned`` has them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .layers import PackedWeight
from .outline import replace_
from .partitioned import partitioned


@dataclass
class Memory:
    """Bytes of a training step.

    Attributes:
        weights: parameters that do not train, and buffers such as packed codes.
        adapters: parameters that train.
        gradients: of these.
        optimizer: its states.
        activations: the rest of the peak: what the forward keeps, and what the backward needs beside it.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in vars(self).items())
        return f"{self.total / 2**30:.2f} GiB at the peak: {parts}"


def estimate(
    model: nn.Module,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    inputs: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    compiled: Iterable[nn.Module] = (),
) -> Memory:
    """Return the memory of one training step, without running it; the model is as before afterwards.

    Args:
        model: on its device, as it will train.
        optimizer: from parameters to an optimizer.
        inputs: a batch on the device: a tensor, or a dictionary of them; their values do not matter.
        loss: from the model and a batch to the loss; counted as eager.
        compiled: modules of the model that ``torch.compile`` will run, such as its blocks: ``partitioned``. Where torch
            cannot trace them, a warning says so, and the estimate is the eager one.
    """
    modules = list(compiled)
    try:
        return _played(model, optimizer, inputs, loss, modules)
    except Exception as error:  # whatever a compiler raises
        if not modules:
            raise
        memory = _played(model, optimizer, inputs, loss, [])
        reason = " ".join(str(error).splitlines()[:2]) or type(error).__name__
        warnings.warn(f"memory is estimated as if nothing were compiled, and may be too high: {reason}", stacklevel=2)
        return memory


def _played(model: nn.Module, optimizer: Callable, inputs: Any, loss: Callable, compiled: list[nn.Module]) -> Memory:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {id(tensor): tensor for tensor in _held(model)}
    weights = _bytes(t for t in state.values() if not t.requires_grad)
    adapters = _bytes(t for t in state.values() if t.requires_grad)
    live = LiveBytes()
    with _without_data(model, mode), partitioned(compiled, live.uncounted), mode:
        fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, inputs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        stepper = optimizer(trained)
        with live:
            loss(model, fake).backward()
            in_backward, live.most = live.most, live.now
            stepper.step()
        gradients = _bytes(parameter.grad for parameter in trained if parameter.grad is not None)
        states = _bytes(x for values in stepper.state.values() for x in values.values() if isinstance(x, Tensor))
        at_its_most = max(in_backward, live.most - states)  # states are there from the second step on
        del stepper
        for parameter in trained:
            parameter.grad = None
    return Memory(weights, adapters, gradients, states, max(0, at_its_most - gradients))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, while they live.

    Attributes:
        now: live bytes.
        most: their largest number so far.
    """

    supports_higher_order_operators = True  # in a compiled block attention is computed again through one

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch compile meanwhile, and count what its code makes when it runs."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()
        self._counts = True

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Let operators run whose results do not count."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator, and count the storages that are new."""
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out) if self._counts else ():
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in before and id(storage) not in self._seen:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and codes that lie in the order of a GPU's kernels in the place of a buffer."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, PackedWeight):
            for operands in module.gpu_operands.values():
                yield from (part for part in operands if isinstance(part, Tensor))
            if module.row_sums is not None:
                yield module.row_sums


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum({id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors}.values())


@contextmanager
def _without_data(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Put tensors without data in the place of a model's own for a while; what is tied stays tied.

    What torch's CPU operator reads is made at its first use, from these tensors: it is for this while, too.
    """
    packed = [(module, module.cpu_operands) for module in model.modules() if isinstance(module, PackedWeight)]
    for module, _ in packed:
        module.cpu_operands = None
    replaced = replace_(model, lambda *_: True, lambda tensor: mode.from_tensor(tensor.detach()))
    try:
        yield
    finally:
        for store, leaf, tensor in replaced:
            store[leaf] = tensor
        for module, operands in packed:
            module.cpu_operands = operands
