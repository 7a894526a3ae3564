"""JointLoraLinear: a low-rank update inside the rounding, so that what is deployed is Q(W + B A): L4Q.

    y = Q(W + scaling * B A) x + bias          L4Q, arXiv:2402.04902, section 3

W is frozen, in full precision or as packed codes of more bits than Q's; A (r, K), B (N, r) and Q's step sizes learn.
Freezing takes the codes of Q(W + scaling * B A), which are those of the training forward: nothing is merged after the
fact. The sum is made in float32, since a bf16 sum would lose small updates before Q sees them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..quantizers import WeightLSQ
from ..quantizers.rounding import Rounding
from .linear import QuantLinear, match_dtypes
from .packed import Frozen


class JointLoraLinear(Frozen, QuantLinear):
    """A fake-quant linear layer whose weight is frozen and gets a trained low-rank update before it is rounded.

    Attributes:
        packed_weight: W as codes; None where it is the frozen parameter ``weight``.
        lora_A, lora_B: float32 (r, K) and (N, r); B starts at zero.
        scaling: alpha / r.
    """

    weight_quantizer: WeightLSQ
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float

    def merged(self) -> Tensor:
        """Return W + scaling * B A, float32 (N, K)."""
        return _merged(self._base(), self.lora_A, self.lora_B, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear map of the fake-quantized sum, in the dtype of x (autocast's, where it is on)."""
        if self.activation_quantizer is not None:
            x = self.activation_quantizer(x)
        x, bias = match_dtypes(x, self.bias)
        rounding = self.weight_quantizer.rounding(torch.empty(self.out_features, self.in_features, device="meta"))
        step_size = None if rounding is None else rounding.step_size
        return _JointProduct.apply(x, bias, self.lora_A, self.lora_B, step_size, self, rounding)

    def _base(self) -> Tensor:
        return self.weight if self.packed_weight is None else self.packed_weight.dequantize(torch.float32)


def make_joint_(layer: nn.Linear, quantizer: WeightLSQ, rank: int, scaling: float) -> None:
    """Turn a linear layer, plain, fake-quant or frozen, into a JointLoraLinear, in place."""
    packed = getattr(layer, "packed_weight", None)
    device = layer.weight.device
    layer.__class__ = JointLoraLinear
    layer.packed_weight, layer.scaling = packed, scaling
    layer.weight_quantizer = quantizer
    layer.activation_quantizer = getattr(layer, "activation_quantizer", None)
    layer.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
    layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
    nn.init.kaiming_uniform_(layer.lora_A, a=5**0.5)  # as peft does


def _merged(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return torch.addmm(base.float(), b.float(), a.float(), alpha=scaling)


class _JointProduct(torch.autograd.Function):
    """Keeps x, A, B and the step size; the backward makes the sum and its rounding again."""

    @staticmethod
    def forward(ctx, x, bias, a, b, step_size, layer: JointLoraLinear, rounding: Rounding | None) -> Tensor:
        ctx.save_for_backward(x, a, b, step_size)
        ctx.layer, ctx.rounding = layer, rounding and rounding._replace(step_size=None)
        merged = _merged(layer._base(), a, b, layer.scaling)
        weight = merged.to(x.dtype) if rounding is None else rounding.value(merged, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, a, b, step_size = ctx.saved_tensors
        scaling = ctx.layer.scaling
        rounding = ctx.rounding and ctx.rounding._replace(step_size=step_size)
        merged = _merged(ctx.layer._base(), a, b, scaling)
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_weight = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        grad_step = None
        if rounding is None:
            weight = merged.to(x.dtype)
        else:
            wanted = (True, ctx.needs_input_grad[4])
            weight, grad_weight, grad_step = rounding.backward_(grad_weight, merged, wanted, x.dtype)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_a = scaling * (b.t() @ grad_weight) if ctx.needs_input_grad[2] else None
        grad_b = scaling * (grad_weight @ a.t()) if ctx.needs_input_grad[3] else None
        return grad_x, grad_bias, grad_a, grad_b, grad_step, None, None
