"""The nodes of one layer of an ONNX file, alone in onnxruntime: its weight as that computes it.

DequantizeLinear and GatherBlockQuantized give a weight. MatMulNBits gives it as its product with an identity, which
costs K * K * N: with 14,336 inputs and 4,096 outputs half a minute of a core. So the product of a wide layer is cut
into slices of ROWS inputs, each a MatMulNBits of its own with those bytes and scales and no others, and an identity of
ROWS: every weight, bit for bit. That the whole product finds each block's codes and scale where they lie among the
others of its row, which a slice cannot show, is seen at its full width: bit for bit where one input of a block is a
one, at another place in each block, and within float32's error on random inputs, which every weight changes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError
from .float_error import TOLERANCE

ROWS = 256  # of the identity matrix at a time: two blocks or more, so that a slice begins at a whole byte
WIDE = 2048  # inputs, above which the identity is cut
RANDOM = 8  # rows of random inputs
EXACT_ROWS = 4096  # of a weight that are in float64 at a time


def session(model: Any) -> Any:
    """Return an onnxruntime session, on the CPU, of a file or of a serialised model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    model = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Parts:
    """The nodes of a file's quantized layers, each part of which can run alone; tensors are read when it does."""

    def __init__(self, file: Path) -> None:
        import onnx

        graph = onnx.load(file, load_external_data=False).graph
        self.file, self._folder = file, str(file.parent)
        self._held = {value.name: value for value in graph.initializer}
        self._nodes: dict[str, dict[str, Any]] = {}
        for node in graph.node:
            part, _, kind = node.name.rpartition("/")
            self._nodes.setdefault(part, {})[kind] = node

    def __contains__(self, part: str) -> bool:
        return part in self._nodes

    def open(self, part: str, dtype: torch.dtype = torch.float32, axes: int = 0) -> Callable[..., Tensor]:
        """Return what runs the nodes called PART/KIND, up to what they give to the rest of the graph.

        Args:
            part: LAYER/ROLE.
            dtype: of its input, if it has one.
            axes: how many that has.
        """
        nodes = list(self._nodes[part].values())
        names = dict.fromkeys(name for node in nodes for name in node.input)
        return _runs(nodes, [self._tensor(name) for name in names if name in self._held], dtype, axes)

    def slices(self, part: str) -> list[Callable[..., Tensor]]:
        """Return what runs each ROWS inputs of a MatMulNBits, called PART/KIND, as a product of their own."""
        from onnx import NodeProto, numpy_helper

        (node,) = self._nodes[part].values()
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        inputs, rows, bits, block = (sizes[name] for name in ("K", "N", "bits", "block_size"))
        codes, scales, *zero_points = (numpy_helper.to_array(self._tensor(name)) for name in node.input[1:])
        scales = scales.reshape(rows, -1)
        zero_points = [values.reshape(rows, -1) for values in zero_points]
        made = []
        for start in range(0, inputs, ROWS):
            first, last = start // block, -(-min(start + ROWS, inputs) // block)
            cut = NodeProto()
            cut.CopyFrom(node)
            (width,) = (attribute for attribute in cut.attribute if attribute.name == "K")
            width.i = min(ROWS, inputs - start)
            held = [codes[:, first:last], scales[:, first:last].flatten()]
            held += [values[:, first * bits // 8 : -(-last * bits // 8)].flatten() for values in zero_points]
            named = zip(held, node.input[1:], strict=True)
            made.append(_runs([cut], [numpy_helper.from_array(array.copy(), name) for array, name in named], axes=2))
        return made

    def block(self, part: str) -> int:
        """Return the block size of a MatMulNBits, called PART/KIND."""
        (node,) = self._nodes[part].values()
        return next(attribute.i for attribute in node.attribute if attribute.name == "block_size")

    def _tensor(self, name: str) -> Any:
        from onnx import TensorProto
        from onnx.external_data_helper import load_external_data_for_tensor

        stored = self._held[name]
        if stored.data_location != TensorProto.EXTERNAL:
            return stored
        tensor = TensorProto()
        tensor.CopyFrom(stored)
        load_external_data_for_tensor(tensor, self._folder)
        return tensor


def weight(parts: Parts, name: str, shape: list[int]) -> Tensor:
    """Return a layer's weight as onnxruntime computes it; that of a wide product slice by slice."""
    if f"{name}/weight" in parts:
        return parts.open(f"{name}/weight")().view(shape)
    if f"{name}/embedding" in parts:
        return parts.open(f"{name}/embedding", torch.int64, 1)(torch.arange(shape[0]))
    part, inputs = f"{name}/linear", shape[1]
    found = torch.empty(inputs, shape[0])
    if inputs > WIDE:
        for start, run in zip(range(0, inputs, ROWS), parts.slices(part), strict=True):
            found[start : start + ROWS] = run(torch.eye(min(ROWS, inputs - start)))
    else:
        run = parts.open(part, torch.float32, 2)
        for at in torch.arange(inputs).split(ROWS):
            found[at] = run(_identity(at, inputs))
    return found.t()


def compare_wide(parts: Parts, name: str, expected: Tensor) -> None:
    """Run a wide layer's MatMulNBits at its full width, where single inputs are ones and on random inputs.

    Args:
        parts: where it lies.
        name: the layer.
        expected: its weight, float32 (N, K).

    Raises:
        ArtifactError: it gives something else than the weight does.
    """
    inputs = expected.shape[1]
    run, block = parts.open(f"{name}/linear", torch.float32, 2), parts.block(f"{name}/linear")
    random = torch.Generator().manual_seed(0)
    starts = torch.arange(0, inputs, block)
    ones = (starts + torch.randint(block, starts.shape, generator=random)).clamp(max=inputs - 1)
    for at in ones.split(ROWS):
        if not torch.equal(run(_identity(at, inputs)), expected[:, at].t()):
            raise ArtifactError(f"{name}: onnxruntime's product of {inputs} inputs takes other weights than its slices")
    x = torch.randn(RANDOM, inputs, generator=random)
    exact = torch.cat([x.double() @ rows.double().t() for rows in expected.split(EXACT_ROWS)], 1)
    gap, largest = (run(x) - exact).abs().max().item(), exact.abs().max().item()
    if not gap <= TOLERANCE * largest:
        raise ArtifactError(f"{name}: onnxruntime's product of {inputs} inputs is {gap:g} off (largest {largest:g})")


def _identity(at: Tensor, inputs: int) -> Tensor:
    """Return rows of an identity matrix."""
    return torch.zeros(len(at), inputs).scatter_(1, at[:, None], 1)


def _runs(
    nodes: list[Any], held: list[Any], dtype: torch.dtype = torch.float32, axes: int = 0
) -> Callable[..., Tensor]:
    """Return what runs nodes with the tensors that they hold; ``dtype`` and ``axes`` are of their input."""
    from onnx import TensorProto, helper

    known = {name for node in nodes for name in node.output} | {tensor.name for tensor in held}
    inputs = list(dict.fromkeys(name for node in nodes for name in node.input if name not in known))
    kind = TensorProto.INT64 if dtype == torch.int64 else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info(name, kind, [None] * axes) for name in inputs],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        held,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    running = session(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return lambda *x: torch.from_numpy(
        running.run(None, {name: value.numpy() for name, value in zip(inputs, x, strict=True)})[0]
    )
