"""LoRA beside a frozen linear layer as one product with one backward.

    y = x W^T + s (x A^T) B^T            grad_x = g W + s (g B) A,  grad_A = s (g B)^T x,  grad_B = s g^T (x A^T)

peft composes the same of operators: x converted to the adapter's float32 and back, an output-sized product, its scaling
and its sum. Here x is read in the dtype it has, the low-rank products are added by the matmuls that make them, and what
is kept for the backward is x, which neighbours with the same input share, and x A^T. The weight is dequantized again in
the backward, as in the layer alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .layers import PackedWeight
from .layers.linear import FrozenLinear, compute_dtype


def lora_product(x: Tensor, layer: FrozenLinear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``layer(x) + scaling (x A^T) B^T`` in the dtype of x, or autocast's.

    Args:
        x: (..., K).
        layer: packed codes (N, K), without activation quantizer; its bias, if any, does not train.
        a, b: (r, K) and (N, r), used in the dtype of the product.
        scaling: alpha / r.
    """
    x = x.to(compute_dtype(x))
    if torch.compiler.is_compiling():  # whose graphs make a backward of their own
        y, low = layer(x), _rows(x) @ a.to(x.dtype).t()
        return torch.addmm(_rows(y), low, b.to(x.dtype).t(), alpha=scaling).view(y.shape)
    return _LoraProduct.apply(x, a, b, layer, scaling)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, layer: FrozenLinear, scaling: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, low = layer(x).contiguous(), _rows(x) @ a.to(x.dtype).t()
            _rows(y).addmm_(low, b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, low, a, b)
        ctx.weight, ctx.scaling = layer.packed_weight, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, low, a, b = ctx.saved_tensors
        weight: PackedWeight = ctx.weight
        rows, scaling = _rows(grad), ctx.scaling
        grad_x = grad_a = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            grad_low = rows @ b.to(grad.dtype)
            if ctx.needs_input_grad[0]:
                grad_x = rows @ weight.dequantize(grad.dtype)
                grad_x = grad_x.addmm_(grad_low, a.to(grad.dtype), alpha=scaling).view(x.shape)
            if ctx.needs_input_grad[1]:
                grad_a = (grad_low.t() @ _rows(x)).to(a.dtype) * scaling
            if ctx.needs_input_grad[2]:
                grad_b = (rows.t() @ low).to(b.dtype) * scaling
        return grad_x, grad_a, grad_b, None, None


def use_lora_product_(model: nn.Module) -> nn.Module:
    """Let peft's LoRA layers on frozen linear layers run ``lora_product``, in place, and return the model.

    What it does not cover runs as peft has it: dropout in training, DoRA and other variants, several adapters at once,
    batches that mix adapters, layers that round their input.
    """
    from peft.tuners.lora.layer import Linear

    for module in model.modules():
        if type(module) is Linear and isinstance(module.base_layer, FrozenLinear):
            module.__class__ = _layer_class()
    return model


@functools.cache
def _layer_class() -> type[nn.Module]:
    from peft.tuners.lora.layer import Linear

    class FrozenLoraLinear(Linear):
        """peft's LoRA layer on a frozen linear layer."""

        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            """Return the layer's product with the active adapter's beside it."""
            adapter = self._only_adapter() if not args and not kwargs else None
            if adapter is None:
                return super().forward(x, *args, **kwargs)
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            return lora_product(x, self.base_layer, a, b, self.scaling[adapter])

        def _only_adapter(self) -> str | None:
            """Return the name of the one adapter that runs, if ``lora_product`` has all that it does."""
            layer, active = self.base_layer, [name for name in self.active_adapters if name in self.lora_A]
            if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
                return None
            (name,) = active
            if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
                return None
            plain = layer.packed_weight is not None and layer.activation_quantizer is None
            still = layer.bias is None or not layer.bias.requires_grad
            return name if plain and still and self.lora_B[name].bias is None else None

    return FrozenLoraLinear
