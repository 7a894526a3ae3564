"""Modules as ``torch.compile`` runs them but for its kernels, to see what a compiled step allocates (``qat.memory``).

A compiled module keeps less for its backward than an eager one: torch's partitioner chooses what is computed again.
Here Dynamo, autograd and that partitioner do what they will do, seconds of it, and what they made runs an operator at a
time. Inductor would fuse operators, so that most results never lie in memory. By the partitioner's list of those that
fuse, such a result counts nothing, but what it is computed from stays until its reader is done, like a kernel's inputs.
Which buffers Inductor uses again in place, and in which order it computes again, is not known here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def partitioned(modules: list[nn.Module], fused: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Let modules run so for a while; those that are alike are traced once.

    What torch has compiled before in this process is compiled again at its next call.

    Args:
        modules: of a model, in place.
        fused: makes the context of an operator whose result is no tensor in memory.
    """
    if not modules:
        yield
        return
    from functorch.compile import min_cut_rematerialization_partition  # seconds of imports, as the next ones
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    compiler = partial(_by_operator, fused)
    split = partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, decompositions=select_decomp_table(), partition_fn=split
    )
    before = [(module, module._compiled_call_impl) for module in modules]
    try:
        for module in modules:
            module.compile(backend=backend, dynamic=False)
        yield
    finally:
        for module, implementation in before:
            module._compiled_call_impl = implementation
        torch.compiler.reset()  # these graphs would count towards torch's recompile_limit


def _by_operator(
    fused: Callable[[], AbstractContextManager], graph: fx.GraphModule, inputs: list[Tensor]
) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import boxed_nop

    for node in set(graph.graph.nodes) - _in_memory(graph.graph):
        node.target = _within(fused, node.target)
    return boxed_nop(graph, inputs)


def _in_memory(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that a kernel has to write: those that do not fuse with everything that reads them."""
    from torch._functorch.partitioners import get_default_op_list

    operators, found = get_default_op_list(), set()

    def fuses(node: fx.Node) -> bool:
        return node.op == "call_function" and node.target is not operator.getitem and operators.is_fusible(node)

    def needs_it(user: fx.Node) -> bool:
        return not fuses(user) or (operators.is_view(user) and user in found)

    for node in reversed(graph.nodes):
        if not fuses(node) or any(needs_it(user) for user in node.users):
            found.add(node)
    return found


def _within(context: Callable[[], AbstractContextManager], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with context():
            result = function(*arguments, **options)
        for part in tree_leaves(result):
            if isinstance(part, Tensor):
                part.computed_from = arguments, options  # lies in memory until the kernel that reads it is done
        return result

    return run
