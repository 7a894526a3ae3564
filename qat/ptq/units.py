"""How a model is walked one part at a time: its decoder blocks in order, and what lies before and after them.

A unit is run again and again on the inputs that it gets from what is quantized already, while the rest of the model
waits. Blocks are the ModuleList that holds the most layers to quantize, if its members feed one another, as in every
transformer; a model without one is a single unit, which is run from the start for every layer in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..layers import QuantLayer
from .moments import rows_of

Layers = dict[str, QuantLayer]
Forward = Callable[[nn.Module, Any], Any]
Context = Callable[[], AbstractContextManager]


class _Stop(Exception):
    """Raised inside a forward when what it was run for is known."""


@dataclass
class Unit:
    """A part of the model, its layers that wait, and how to run it.

    Attributes:
        name: for messages and files.
        module: a block, or the whole model.
        layers: to quantize, by their names in the model.
        run: (module or its twin, batch index) -> output; the twin reads the stream of unquantized blocks.
        batches: how many there are.
        context: what parts of the model run in: the autocast that the caller is in, without its cache of weights.
        tied: ids of the model's parameters that are used in several places.
        twin: an unquantized copy of the module, for methods that ask for one.
        stages: the names of layers that read the same tensor in the same rows, in the order in which the unit reaches
            them; a layer that no batch reaches has none.
        calls: how often a layer ran on the batch that reached it first.
        reached: the index of that batch.
    """

    name: str
    module: nn.Module
    layers: Layers
    run: Callable[[nn.Module, int], Any]
    batches: int
    context: Context
    tied: set[int] = field(default_factory=set)
    twin: nn.Module | None = None
    stages: list[list[str]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    reached: dict[str, int] = field(default_factory=dict)

    def find_stages(self) -> None:
        """Set ``stages``, ``calls`` and ``reached``."""
        waiting = dict(self.layers)
        for index in range(self.batches):
            if not waiting:
                break
            seen: list[tuple[str, Tensor]] = []  # which keeps the tensors, so that no two have the same id
            with hooked(waiting, lambda name, x, seen=seen: seen.append((name, x))):
                self.run(self.module, index)
            by_input: dict[tuple, list[str]] = {}
            for name, x in seen:
                self.calls[name] = self.calls.get(name, 0) + 1
                self.reached[name] = index
                layer = waiting.pop(name, None)
                if layer is not None:
                    by_input.setdefault((id(x), *rows_of(layer)), []).append(name)
            self.stages += by_input.values()

    def inputs(self, name: str, twin: bool = False) -> Iterator[list[Tensor]]:
        """Yield what a layer gets in each batch, one tensor a call; the twin's layer of that name if asked for."""
        layer, once = self.layers[name], self.calls[name] == 1
        if twin:
            place = {id(module): path for path, module in self.module.named_modules()}[id(layer)]
            layer = self.twin.get_submodule(place)
        for index in range(self.batches):
            found: list[Tensor] = []

            def keep(_: str, x: Tensor, found=found) -> None:
                found.append(x)
                if once:
                    raise _Stop

            with hooked({name: layer}, keep), suppress(_Stop):
                self.run(self.twin if twin else self.module, index)
            yield found


@contextmanager
def hooked(layers: Layers, observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``observe(name, input)`` whenever one of the layers runs."""

    def hook(name: str) -> Callable:
        return lambda _, args, named: observe(name, args[0] if args else named["input"])

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, nn.ModuleList] | None:
    """Return the outermost ModuleList, of two members or more, that holds most of the layers; None without one."""
    waiting = {id(layer) for layer in layers.values()}
    best, most = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            held = sum(id(part) in waiting for part in module.modules())
            if held > most:
                best, most = (name, module), held
    return best


def repeated(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that most of a model's parameters are in, in order; the model itself if it repeats none."""
    owners = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters(False))}
    found = find_blocks(model, owners)
    return [model] if found is None else list(found[1])


class Chain:
    """Runs blocks one at a time on stored activations.

    Attributes:
        stream: each batch's input of the block that comes next, behind quantized blocks.
        unquantized: the same behind unquantized ones, where units have a twin.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        rest: tuple | None,
        batches: list[Any],
        forward: Forward,
        context: Context,
    ) -> None:
        self.blocks, self.rest, self.context = blocks, rest, context
        self.stream: list[Tensor] = []
        self._calls: list[list[tuple[tuple, dict]]] = []  # of a batch, of a block: what else it is called with
        with self._replaced(self._record):  # no block runs, nor what follows them
            for batch in batches:
                with suppress(_Stop):
                    forward(model, batch)
        self.unquantized = list(self.stream)

    def runner(self, index: int, twin: nn.Module | None, device: torch.device | str | None) -> Callable:
        """Return how to run block ``index``, or its twin, on a batch."""

        def run(module: nn.Module, batch: int) -> Tensor:
            args, kwargs = _to(self._calls[batch][index], device)
            hidden = (self.unquantized if module is twin else self.stream)[batch]
            with self.context():
                return module(_to(hidden, device), *args, **kwargs)

        return run

    def advance(self, unit: Unit) -> None:
        """Let a block that is done make the inputs of the next."""
        for batch, hidden in enumerate(self.stream):
            self.stream[batch] = first(unit.run(unit.module, batch)).to(hidden.device)
            if unit.twin is not None:
                self.unquantized[batch] = first(unit.run(unit.twin, batch)).to(hidden.device)

    @contextmanager
    def finished(self, batches: list[Any], forward: Forward, twin: nn.Module | None) -> Iterator[Callable]:
        """Yield how to run the whole model, or its twin, on a batch once all blocks are done: none runs again."""
        made: list[Tensor] = []  # by the last block

        def pass_on(index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
            return made[-1] if index == len(self.blocks) - 1 else hidden

        def run(module: nn.Module, batch: int) -> Any:
            made[:] = [(self.unquantized if module is twin else self.stream)[batch]]
            return forward(module, batches[batch])

        with self._replaced(pass_on):
            yield run

    def _record(self, index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        if index == 0:
            self.stream.append(hidden)
            self._calls.append([])
        self._calls[-1].append((args, kwargs))
        if index == len(self.blocks) - 1:
            raise _Stop
        return hidden

    @contextmanager
    def _replaced(self, function: Callable[[int, Tensor, tuple, dict], Tensor]) -> Iterator[None]:
        """Let a function of (block index, hidden states, the call's other arguments) stand for every block."""

        def stub(index: int) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = function(index, *split_call(args, kwargs))
                return hidden if self.rest is None else (hidden, *self.rest)

            return forward

        try:
            for index, block in enumerate(self.blocks):
                block.forward = stub(index)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


@dataclass
class Probe:
    """What one forward shows of blocks.

    Attributes:
        chained: whether each is called once, on what the one before it returned.
        rest: what a block returns beside its main output; None where it returns only that.
        early: the names of layers that run before the first block.
    """

    chained: bool
    rest: tuple | None
    early: set[str]


def probe(model: nn.Module, blocks: nn.ModuleList, layers: Layers, batch: Any, forward: Forward) -> Probe:
    """Run a batch through the whole model and look."""
    outputs: list[Any] = []
    fits: list[bool] = []
    early: set[str] = set()

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = split_call(args, kwargs)[0]
        fits.append(isinstance(hidden, Tensor) and (not outputs or hidden is first(outputs[-1])))

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(lambda *given: outputs.append(given[-1])) for block in blocks]
    try:
        with hooked(layers, lambda name, _: None if fits else early.add(name)):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    rest = outputs[0][1:] if outputs and isinstance(outputs[0], tuple) else None
    return Probe(len(fits) == len(blocks) and all(fits), rest, early)


def split_call(args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """Return the hidden states of a block's call, and the rest of its arguments."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states", None), args, kwargs


def first(output: Any) -> Any:
    """Return a module's main output: a tensor, the first of several, or of named ones the logits or the first."""
    if isinstance(output, Mapping):
        output = output["logits"] if "logits" in output else next(iter(output.values()))
    elif isinstance(output, tuple | list):
        output = output[0]
    else:
        return getattr(output, "logits", output)
    return first(output)


def floats_of(output: Any) -> list[Tensor]:
    """Return every float tensor with elements in what a module gives, however nested."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]


def _to(value: Any, device: torch.device | None) -> Any:
    """Move the tensors of a block's call, whatever they are in."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(part, device) for part in value)
    return {key: _to(part, device) for key, part in value.items()} if isinstance(value, dict) else value
