"""JointLoraLinear: a low-rank update inside the rounding, so that what is deployed is Q(W + B A): L4Q.

    y = Q(W + scaling * B A) x + bias          L4Q, arXiv:2402.04902, section 3

W is frozen, in full precision or as packed codes of more bits than Q's; A (r, K), B (N, r) and Q's step sizes learn.
Freezing takes the codes of Q(W + scaling * B A), which are those of the training forward, on any device
(``qat.kernels.joint_weight``): nothing is merged after the fact. The sum is made in float32, since a bf16 sum would
lose small updates before Q sees them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..once import Function, no_view, once
from ..quantizers import WeightLSQ
from ..quantizers.rounding import Rounding
from .linear import QuantLinear, match_dtypes
from .packed import Frozen
from .product import rows, widened, without_autocast

if TYPE_CHECKING:
    from qat.kernels.joint_weight import LowRankSum


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
        from qat.kernels.joint_weight import joint_weight  # loads Triton

        with torch.no_grad():
            return joint_weight(self._sum(self.lora_A, self.lora_B), None, self.weight_quantizer.spec, torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of the fake-quantized sum, in the dtype of the input (autocast's, where it is on)."""
        x = input if self.activation_quantizer is None else self.activation_quantizer(widened(input))
        x, bias = match_dtypes(x, self.bias)
        rounding = self.weight_quantizer.rounding(torch.empty(self.out_features, self.in_features, device="meta"))
        step_size = None if rounding is None else rounding.step_size
        return _JointProduct.apply(x, bias, self.lora_A, self.lora_B, step_size, self, rounding)

    def _sum(self, a: Tensor, b: Tensor) -> LowRankSum:
        """Return what ``joint_weight`` adds up: W, its scales where it is 8-bit codes, A, and scaling * B."""
        from qat.kernels.joint_weight import LowRankSum

        packed, update = self.packed_weight, (a.float(), b.float() * self.scaling)
        if packed is None:
            return LowRankSum(self.weight.detach(), None, *update)
        if packed.spec.bits == 8 and packed.spec.symmetric and packed.levels is None:
            return LowRankSum(packed.packed, packed.scale, *update)
        return LowRankSum(packed.dequantize(torch.float32), None, *update)


def make_joint_(layer: nn.Linear, quantizer: WeightLSQ, rank: int, scaling: float) -> None:
    """Turn a linear layer, plain, fake-quant or frozen, into a JointLoraLinear, in place."""
    packed = getattr(layer, "packed_weight", None)
    like = {"dtype": torch.float32, "device": layer.weight.device}
    layer.__class__ = JointLoraLinear
    layer.packed_weight, layer.scaling = packed, scaling
    layer.weight_quantizer = quantizer
    layer.activation_quantizer = getattr(layer, "activation_quantizer", None)
    layer.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, **like))
    layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, **like))
    nn.init.kaiming_uniform_(layer.lora_A, a=5**0.5)  # as peft does


class _JointProduct(Function):
    """Keeps x, A, B and the step size; the backward makes the sum and its rounding again."""

    @staticmethod
    def forward(ctx, x, bias, a, b, step_size, layer: JointLoraLinear, rounding: Rounding | None) -> Tensor:
        from qat.kernels.joint_weight import joint_weight

        ctx.save_for_backward(x, a, b, step_size)
        ctx.layer, ctx.grad_scale = layer, 1.0 if rounding is None else rounding.grad_scale
        with without_autocast(x):
            weight = joint_weight(layer._sum(a, b), step_size, layer.weight_quantizer.spec, x.dtype)
            return no_view(F.linear(x, weight, bias))

    @staticmethod
    @once
    def backward(ctx, grad: Tensor):
        from qat.kernels.joint_weight import joint_weight, joint_weight_backward

        x, a, b, step_size = ctx.saved_tensors
        layer, spec = ctx.layer, ctx.layer.weight_quantizer.spec
        grad_bias = rows(grad).sum(0) if ctx.needs_input_grad[1] else None
        grad_weight, parts = rows(grad).t() @ rows(x), layer._sum(a, b)
        grad_step = None
        if step_size is None:
            weight = joint_weight(parts, None, spec, x.dtype)
        else:
            made = joint_weight_backward(grad_weight, parts, step_size, spec, ctx.grad_scale)
            weight, grad_weight, grad_step = made
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_a = (b.to(x.dtype).t() @ grad_weight).to(a.dtype) * layer.scaling
        grad_b = (grad_weight @ a.to(x.dtype).t()).to(b.dtype) * layer.scaling
        return grad_x, grad_bias, grad_a, grad_b, grad_step, None, None
