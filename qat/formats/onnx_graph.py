"""A frozen model as an ONNX graph: values and nodes in place of the placeholders that ``onnx_trace`` left.

In the place of one ``insert_quantized`` puts (opset 21; ``onnx_weights`` has the layouts)

    a Linear's product   com.microsoft MatMulNBits
    an Embedding's rows  com.microsoft GatherBlockQuantized
    any other weight     DequantizeLinear, and Reshape where a convolution has groups
    an activation        Max with -Q_N s and Min with Q_P s where the type is wider than the codes, QuantizeLinear to
                         UINT4, INT4, UINT8 or INT8, DequantizeLinear: the same integers as x / s, round half to even,
                         clamp. Max too where it changes no integer and a runtime would: see ``_Builder.activation``
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel
from .onnx_weights import (
    DEQUANTIZE_PARTS,
    MATMUL_PARTS,
    ROW_PARTS,
    dequantize_operands,
    dequantize_shapes,
    matmul_block,
    matmul_operands,
    matmul_shapes,
    stored_bits,
)

# Over these OpenVINO 2026.4 moves an 8-bit QuantizeLinear, and errs; on its way over what is computed of one value,
# such as a product with a constant, and not over a layer.
JOINED = {"Concat", "ReduceMax", "ReduceMin"}
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
OF_TWO = {"Add", "Div", "Mul", "Sub"}


def fill(ir_model: Any, values: dict[str, Any], model: QuantizedModel) -> tuple[dict[str, str], dict[str, Any]]:
    """Let ``export``'s open values be read from the model when the file is written, one at a time.

    Returns:
        {dense tensor: its initialiser} and {scalar that the graph has no use for: its value}.

    Raises:
        ArtifactError: the graph has no use for a tensor.
    """
    shared: dict[str, list[str]] = {name: [name] for name in model.dense}
    for name, owner in model.tied.items():
        shared[owner].append(name)
    names, scalars, lost = {}, {}, []
    for name, others in shared.items():
        found = next((other for other in others if other in values), None)
        if found is not None:
            value = values.pop(found)
            names[name] = value.name
            _fill(ir_model.graph, value, lambda name=name: model.dense[name])
        elif (tensor := model.dense[name]).dim() == 0:
            scalars[name] = tensor.item()
        else:
            lost.append(name)
    if lost:
        raise ArtifactError(f"the forward does not use {', '.join(lost)}: remove these parameters")
    if values:
        raise ArtifactError(f"{', '.join(values)} have no values in {model.source}: build the network on a real device")
    return names, scalars


def insert_quantized(ir_model: Any, model: QuantizedModel) -> None:
    """Replace the placeholders by real nodes, in place; weights are made when the file is written, one at a time.

    Raises:
        ArtifactError: names the layers that the graph does not reach.
    """
    import onnx_ir

    reached = set()
    uses: Counter[tuple[str, str]] = Counter()
    graph = ir_model.graph
    for node in [node for node in graph.all_nodes() if node.domain == "qat"]:
        name = node.attributes["layer"].as_string()
        reached.add((name, node.op_type == "activation"))
        uses[name, node.op_type] += 1
        build = _Builder(graph, node, name, model, uses[name, node.op_type])
        value = getattr(build, node.op_type)()
        value.shape, value.dtype = node.outputs[0].shape, node.outputs[0].dtype
        is_output, output = node.outputs[0].is_graph_output(), node.outputs[0].name
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)
        if is_output:  # such as a head's without a bias, for which clients ask by name
            value.name = output
    wanted = {(name, False) for name, layer in model.layers.items() if layer.weight is not None}
    wanted |= {(name, True) for name, layer in model.layers.items() if layer.activation is not None}
    if wanted - reached:
        names = ", ".join(sorted({name for name, _ in wanted - reached}))
        raise ArtifactError(f"the forward does not reach {names}: remove these layers, or leave them in full precision")
    graph.opset_imports.pop("qat", None)
    graph.opset_imports["com.microsoft"] = 1


def _fill(graph: Any, value: Any, make: Callable[[], Tensor]) -> None:
    """Make a value an initialiser; ``make`` is called when the file is written."""
    import onnx_ir

    dtype, shape = value.dtype, value.shape

    def tensor() -> Any:
        made = make().detach().cpu().contiguous()
        if made.is_floating_point():
            made = made.float()
        if list(made.shape) != list(shape.numpy()):
            raise ArtifactError(
                f"{value.name} is {list(shape.numpy())} in the network and {list(made.shape)} elsewhere"
            )
        return onnx_ir.Tensor(made.numpy().astype(dtype.numpy(), copy=False), dtype=dtype, shape=shape)

    value.const_value = onnx_ir.LazyTensor(tensor, dtype=dtype, shape=shape, name=value.name)
    graph.register_initializer(value)


def strip_traces(ir_model: Any) -> None:
    """Remove what torch's exporter notes of the Python code, its paths included, from every node and value."""
    ir_model.graph.metadata_props.clear()
    for value in [*ir_model.graph.initializers.values(), *ir_model.graph.inputs]:
        value.metadata_props.clear()
    for node in ir_model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _keeps_weight(layer: QuantizedLayer) -> bool:
    """Return whether only the input of a layer is quantized."""
    return layer.weight is None and layer.activation is not None


def _misread(value: Any) -> bool:
    """Return whether OpenVINO 2026.4 errs where a value is rounded to 8 bits.

    It does behind what was joined, and behind convolutions in groups that give several channels each, whatever was
    computed since of that one value.
    """
    node = value.producer()
    while node is not None and node.domain != "qat" and node.op_type not in {*JOINED, *LAYERS}:
        inputs = list(node.inputs[:1])  # what else there is says how, such as a Reshape's sizes
        if node.op_type in OF_TWO:
            inputs = [value for value in node.inputs if (made := value.producer()) and made.op_type != "Constant"]
        node = inputs[0].producer() if len(inputs) == 1 else None
    if node is None or node.op_type != "Conv":
        return node is not None and node.op_type in JOINED
    return 1 < node.attributes.get_int("group", 1) < node.inputs[1].shape[0]


class _Builder:
    """Makes the nodes and initialisers of one placeholder: one use of a layer, which the forward may call again."""

    def __init__(self, graph: Any, node: Any, name: str, model: QuantizedModel, use: int) -> None:
        self.graph, self.node, self.name, self.model = graph, node, name, model
        self.called = name if use == 1 else f"{name}#{use}"  # onnxruntime opens no file with two nodes of one name
        self.layer = model.layers[name]
        self.owner = self.layer.tied or name

    def activation(self) -> Any:
        spec, x = self.layer.activation, self.node.inputs[0]
        scale = self.model.activation_scale(self.name).float().reshape(())
        step = self._initialiser("activation_scale", "FLOAT", (), lambda: scale, self.name)
        kind = ("UINT" if spec.signed is False else "INT") + ("4" if spec.bits == 4 else "8")
        z = torch.zeros((), dtype=torch.int8)
        z = z if spec.symmetric else self.model.activation_zero_point(self.name).reshape(())
        zero = self._initialiser("activation_zero_point", kind, (), lambda: z, self.name)
        if spec.bits != 8 or _misread(x) or any(_keeps_weight(each) for each in self.model.layers.values()):
            # onnxruntime 1.32 moves QuantizeLinear before a MaxPool, which has no 4-bit type, and cannot open a graph
            # in which a Clip (ReLU6) comes before one to 4 bits; between two to 8 bits it rounds a weight in floats to
            # int8. OpenVINO errs on what ``_misread`` names. None of this happens with a Max between.
            low = self._initialiser("activation_low", "FLOAT", (), lambda: (-spec.q_n - z.float()) * scale, self.name)
            x = self._node("Max", [x, low])
        if spec.bits not in (4, 8):
            high = self._initialiser("activation_high", "FLOAT", (), lambda: (spec.q_p - z.float()) * scale, self.name)
            x = self._node("Min", [x, high])
        codes = self._node("QuantizeLinear", [x, step, zero])
        return self._node("DequantizeLinear", [codes, step, zero])

    def linear(self) -> Any:
        rows, inputs = self.layer.shape
        bits, block = stored_bits(self.layer.weight), matmul_block(self.layer)
        numbers = {"K": inputs, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 0}
        return self._node("MatMulNBits", [self.node.inputs[0], *self._blocks(MATMUL_PARTS)], "com.microsoft", **numbers)

    def embedding(self) -> Any:
        bits, block = stored_bits(self.layer.weight), matmul_block(self.layer)
        codes, *parameters = self._blocks(ROW_PARTS)
        numbers = {"gather_axis": 0, "quantize_axis": 1, "bits": bits, "block_size": block}
        operands = [codes, self.node.inputs[0], *parameters]
        return self._node("GatherBlockQuantized", operands, "com.microsoft", **numbers)

    def _blocks(self, parts: tuple[str, ...]) -> list[Any]:
        block, shapes = matmul_block(self.layer), matmul_shapes(self.layer)
        if parts == ROW_PARTS:  # the same bytes, as matrices
            shapes = [(self.layer.shape[0], math.prod(shape) // self.layer.shape[0]) for shape in shapes]
        kinds = ("UINT8", "FLOAT", "UINT8")[: 2 if self.layer.weight.symmetric else 3]

        def make(index: int) -> Callable[[], Tensor]:
            return lambda: matmul_operands(self._tensor(), block)[index].reshape(shapes[index])

        described = enumerate(zip(parts, kinds, shapes, strict=False))
        return [self._initialiser(part, kind, shape, make(index)) for index, (part, kind, shape) in described]

    def weight(self) -> Any:
        shape, spec = self.layer.shape, self.layer.weight
        stored, scale_shape = dequantize_shapes(self.layer)
        kind = "INT4" if stored_bits(spec) == 4 else "UINT8"
        shapes, kinds = (stored, scale_shape, scale_shape), (kind, "FLOAT", kind)
        count = 2 if spec.symmetric and kind == "INT4" else 3
        owners = self.owner, self.owner, self.called  # of a weight used twice, OpenVINO 2026.4 folds a norm into both
        operands = [
            self._initialiser(
                part, kind, size, lambda index=index: dequantize_operands(self._tensor(), self.layer)[index], owner
            )
            for index, (part, kind, size, owner) in enumerate(
                list(zip(DEQUANTIZE_PARTS, kinds, shapes, owners, strict=True))[:count]
            )
        ]
        blocks = {"axis": 1, "block_size": spec.group_size} if spec.granularity == "group" else {"axis": 0}
        weight = self._node("DequantizeLinear", operands, **blocks)
        if stored == tuple(shape):
            return weight
        target = self._initialiser("weight_shape", "INT64", (len(shape),), lambda: torch.tensor(shape))
        return self._node("Reshape", [weight, target])

    def _tensor(self) -> QuantizedTensor:
        return self.model.quantized(self.owner)

    def _node(self, kind: str, inputs: list[Any], domain: str = "", **attributes: int) -> Any:
        import onnx_ir

        node = onnx_ir.node(kind, inputs, attributes, domain=domain, name=f"{self.called}/{self.node.op_type}/{kind}")
        self.node.graph.insert_before(self.node, node)
        node.outputs[0].name = f"{node.name}/{self.node.outputs[0].name}"
        return node.outputs[0]

    def _initialiser(
        self, part: str, kind: str, shape: tuple[int, ...], make: Callable[[], Tensor], owner: str | None = None
    ) -> Any:
        """Return the value ``OWNER.PART``; ``make`` is called when the file is written."""
        import onnx_ir

        name = f"{owner or self.owner}.{part}"
        if name not in self.graph.initializers:
            kind = onnx_ir.TensorType(onnx_ir.DataType[kind])
            _fill(self.graph, onnx_ir.Value(name=name, type=kind, shape=onnx_ir.Shape(shape)), make)
        return self.graph.initializers[name]
