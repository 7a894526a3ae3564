"""Quantized layers as modules that ExecuTorch's XNNPACK partitioner turns into its integer kernels.

    int4      a linear layer of at most 4 bits in groups of 32 and more: torchao's IntxUnpackedToInt8Tensor
    int8      any other linear layer, or a convolution, with one scale a channel: int8 codes (they hold fewer bits too)
    float32   what has no kernel there, such as a grouped convolution: weights q * s, exact but neither small nor fast

XNNPACK's int8 kernels with float32 outputs choose a scale from each input at run time. That is what ``int8_token``
trains for. An input with a trained scale is made exact in them nonetheless: its codes q = clamp(round(x / s)) are
computed in float32, and constants are put beside them, as one more input or channel with weights of 0, so that the
range is the same for any input and XNNPACK's scale is 255 / 255 = 1:

    unsigned   0 to 255      zero point -128
    signed     -128 to 127   zero point 0

Then the kernel adds up q_x * q_w in int32 and multiplies by s_x * s_w once: the trained integers, and one rounding. In
int4, where there is a scale a group, s_x is multiplied by last.
Sources: ``xnn_qd8_asymmetric_quantization_params``; executorch 1.5, backends/xnnpack, partition/config/gemm_configs.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import FrozenConv2d, FrozenLayer, matrix
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer
from ..spec import Granularity, QuantSpec
from .integer_linears import grid

GROUP_MULTIPLE = 32
INT4, INT8, FLOAT32 = "int4", "int8", "float32"
ROUND = 1.5 * 2**23  # added and taken off again, it rounds a float32 below 2^22 half to even; XNNPACK has no other way


def kind(entry: QuantizedLayer, layer: FrozenLayer | None = None) -> str:
    """Return how XNNPACK runs a layer; without ``layer``, a convolution is taken for a plain one."""
    spec = entry.weight
    symmetric = spec is not None and spec.symmetric
    channels = symmetric and spec.granularity is not Granularity.group
    if entry.type == "Linear":
        small = symmetric and spec.bits <= 4 and (spec.group_size or entry.shape[1]) % GROUP_MULTIPLE == 0
        if small and not (channels and entry.has_activation_scale):  # the constants need a group of their own
            return INT4
        if not entry.has_activation_scale:
            return INT8
    plain = not isinstance(layer, FrozenConv2d) or (layer.groups == 1 and layer.padding_mode == "zeros")
    return INT8 if channels and plain and entry.has_activation_scale else FLOAT32


def lowered(
    layer: FrozenLayer, entry: QuantizedLayer, tensor: QuantizedTensor | None, activation_scale: Tensor | None
) -> nn.Module:
    """Return a module that maps as a frozen layer does, for torch.export."""
    how = kind(entry, layer)
    if how == INT4 and entry.has_activation_scale:
        return Int4Layer(layer, tensor, entry.activation, activation_scale)
    if how == INT4:
        return torchao_linear(*int4_operands(tensor, ()), layer.bias)
    if how == INT8:
        return Int8Layer(layer, tensor, entry.activation, activation_scale)
    return Float32Layer(layer, tensor, entry.activation, activation_scale)


class TrainedInput(nn.Module):
    """Rounds an input to the codes that were trained: whole float32 numbers."""

    def __init__(self, spec: QuantSpec, scale: Tensor, dimensions: int) -> None:
        super().__init__()
        self.low, self.high = -spec.q_n, spec.q_p
        # Of the input's dimensions: XNNPACK reorders a convolution's, and broadcasts no others there.
        self.register_buffer("scale", scale.float().reshape([1] * dimensions))
        self.register_buffer("round", torch.full([1] * dimensions, ROUND))

    def forward(self, x: Tensor) -> Tensor:
        """Return clamp(round(x / s)), half to even."""
        return (torch.clamp(x / self.scale, self.low, self.high) + self.round) - self.round


class Int4Layer(nn.Module):
    """A linear layer in groups whose input has a trained scale; the constants fill one more group."""

    def __init__(self, layer: FrozenLayer, tensor: QuantizedTensor, spec: QuantSpec, scale: Tensor) -> None:
        super().__init__()
        self.input, self.constants = TrainedInput(spec, scale, 1), int8_constants(spec)
        self.rest = tensor.spec.group_size - len(self.constants)
        self.linear = torchao_linear(*int4_operands(tensor, self.constants), None)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x as the frozen layer does."""
        beside = [torch.full((*x.shape[:-1], 1), value) for value in self.constants]
        x = torch.cat([self.input(x), *beside, torch.zeros(*x.shape[:-1], self.rest)], -1)
        y = self.linear(x) * self.input.scale
        return y if self.bias is None else y + self.bias


class Int8Layer(nn.Module):
    """A linear layer or a convolution with int8 codes (O, ...), whose input XNNPACK quantizes as it comes."""

    def __init__(
        self, layer: FrozenLayer, tensor: QuantizedTensor, spec: QuantSpec | None, scale: Tensor | None
    ) -> None:
        super().__init__()
        self.convolution = isinstance(layer, FrozenConv2d)
        self.options = (layer.stride, layer.padding, layer.dilation) if self.convolution else ()
        trained = isinstance(spec, QuantSpec)
        self.input = TrainedInput(spec, scale, 4 if self.convolution else 1) if trained else None
        self.constants = int8_constants(spec) if trained else ()
        codes, scales = int8_operands(tensor, self.constants, scale if trained else None)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros(len(codes), dtype=torch.int64))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x as the frozen layer does."""
        if self.input is not None:
            x = self.input(x)
            axis = 1 if self.convolution else -1
            shape = (x.shape[0], 1, *x.shape[2:]) if self.convolution else (*x.shape[:-1], 1)
            x = torch.cat([x, *(torch.full(shape, value) for value in self.constants)], axis)
        ops = torch.ops.quantized_decomposed
        limits = (-128, 127, torch.int8)
        scale, zero_point = ops.choose_qparams.tensor(x, -128, 127, torch.finfo(torch.float32).tiny, torch.int8)
        x = ops.quantize_per_tensor.tensor(x, scale, zero_point, *limits)
        x = ops.dequantize_per_tensor.tensor(x, scale, zero_point, *limits)
        weight = ops.dequantize_per_channel.default(self.codes, self.scales, self.zero_points, 0, *limits)
        return F.conv2d(x, weight, self.bias, *self.options) if self.convolution else F.linear(x, weight, self.bias)


class Float32Layer(nn.Module):
    """A layer in floats, with the trained weight q * s, and its input rounded to the trained codes times s."""

    def __init__(
        self, layer: FrozenLayer, tensor: QuantizedTensor | None, spec: QuantSpec | None, scale: Tensor | None
    ) -> None:
        super().__init__()
        self.convolution = layer._conv_forward if isinstance(layer, FrozenConv2d) else None
        self.input = None if spec is None else TrainedInput(spec, scale, 1 if self.convolution is None else 4)
        weight = matrix(layer).detach() if tensor is None else tensor.dequantize()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x as the frozen layer does."""
        if self.input is not None:
            x = self.input(x) * self.input.scale
        return (self.convolution or F.linear)(x, self.weight, self.bias)


def int8_constants(spec: QuantSpec) -> tuple[float, ...]:
    """Return the numbers beside an input's codes that make XNNPACK choose the scale 1."""
    return (255.0,) if spec.q_n == 0 else (-128.0, 127.0)


def int8_operands(
    tensor: QuantizedTensor, constants: tuple[float, ...], activation_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return int8 codes (O, I + constants, ...) and float32 scales (O,), times the input's where that is trained."""
    padding = [0, 0] * (tensor.codes.dim() - 2) + [0, len(constants)]
    scales = grid(tensor, 1)[0][:, 0].float()
    if activation_scale is not None:
        scales = scales * activation_scale.float().item()
    return F.pad(tensor.codes, padding), scales


def int4_operands(tensor: QuantizedTensor, constants: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return int8 codes (N, K) and float32 scales (N, groups); with constants, of one more group, whose codes are 0."""
    scale = grid(tensor, tensor.scale.shape[1])[0].float()
    if not constants:
        return tensor.codes, scale
    return F.pad(tensor.codes, (0, tensor.spec.group_size)), F.pad(scale, (0, 1), value=1.0)


def torchao_linear(codes: Tensor, scale: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer whose weight is torchao's tensor with codes (N, K) and scales (N, groups)."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    rows, inputs = codes.shape
    weight = IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=torch.int4,
        block_size=(1, inputs // scale.shape[1]),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
    with torch.device("meta"):
        linear = nn.Linear(inputs, rows, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias
    return linear
