"""LoRA beside a frozen linear layer as one product with one backward.

    y = x W^T + s (x A^T) B^T            grad_x = g W + s (g B) A,  grad_A = s (g B)^T x,  grad_B = s g^T (x A^T)

peft composes the same of operators: x converted to the adapter's float32 and back, an output-sized product, its scaling
and its sum. Here x is read in the dtype it has, the low-rank products are added by the matmuls that make them, and what
is kept for the backward is x, which neighbours with the same input share, and x A^T. The weight is dequantized again in
the backward, as in the layer alone.

In a compiled graph, on a GPU, it is one operator each way, since a compiler adds to a copy of the layer's output what
here is added in place, and each operator of ours costs the host more than one of torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.kernels.int4_layout import SIZES, TENSORS, Int4Weight

from .layers import PackedWeight
from .layers.linear import FrozenLinear, compute_dtype
from .layers.product import in_a_graph, rows, without_autocast
from .once import Function, no_view, once


def lora_product(x: Tensor, layer: FrozenLinear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``layer(x) + scaling (x A^T) B^T`` in the dtype of x, or autocast's.

    Args:
        x: (..., K).
        layer: packed codes (N, K), without activation quantizer; its bias, if any, does not train.
        a, b: (r, K) and (N, r), used in the dtype of the product.
        scaling: alpha / r.
    """
    x = x.to(compute_dtype(x))
    if not in_a_graph():
        return _LoraProduct.apply(x, a, b, layer, scaling)
    a, b = a.to(x.dtype), b.to(x.dtype)
    if x.dtype in layer.packed_weight.gpu_operands and layer.fused is None:
        weight = layer.packed_weight.gpu_operands[x.dtype]
        bias = None if layer.bias is None else layer.bias.detach()
        return torch.ops.qat.lora_linear(x, a, b, bias, *weight.tensors(), *weight.sizes(), scaling)[0]
    y, low = layer(x), rows(x) @ a.t()
    return torch.addmm(rows(y), low, b.t(), alpha=scaling).view(y.shape)


def _forward(
    x: Tensor, a: Tensor, b: Tensor, scaling: float, base: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the product and x A^T; a and b are in the dtype of x."""
    y, low = base(x).contiguous(), rows(x) @ a.t()
    rows(y).addmm_(low, b.t(), alpha=scaling)
    return y, low


def _backward(
    grad: Tensor, x: Tensor, low: Tensor, a: Tensor, b: Tensor, scaling: float, weight: Callable[[], Tensor] | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of x, A and B; that of x where there is something to make the base's weight."""
    grad, grad_x = rows(grad), None
    grad_low = grad @ b
    if weight is not None:
        grad_x = (grad @ weight()).addmm_(grad_low, a, alpha=scaling).view(x.shape)
    return grad_x, (grad_low.t() @ rows(x)).mul_(scaling), (grad.t() @ low).mul_(scaling)


class _LoraProduct(Function):
    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, layer: FrozenLinear, scaling: float) -> Tensor:
        with without_autocast(x):
            y, low = _forward(x, a.to(x.dtype), b.to(x.dtype), scaling, layer)
        ctx.save_for_backward(x, low, a, b)
        ctx.weight, ctx.scaling = layer.packed_weight, scaling
        return no_view(y)

    @staticmethod
    @once
    def backward(ctx, grad: Tensor):
        x, low, a, b = ctx.saved_tensors
        packed: PackedWeight = ctx.weight
        weight = (lambda: packed.dequantize(grad.dtype)) if ctx.needs_input_grad[0] else None
        with without_autocast(grad):
            grads = _backward(grad, x, low, a.to(grad.dtype), b.to(grad.dtype), ctx.scaling, weight)
        return grads[0], grads[1].to(a.dtype), grads[2].to(b.dtype), None, None


_library = torch.library.Library("qat", "FRAGMENT")
_library.define(
    f"lora_linear(Tensor x, Tensor a, Tensor b, Tensor? bias, {TENSORS}, {SIZES}, float scaling) -> (Tensor, Tensor)"
)
_library.define(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor low, Tensor a, Tensor b, "
    f"{TENSORS}, {SIZES}, float scaling, bool of_x) -> Tensor[]"
)


@torch.library.impl(_library, "lora_linear", "CompositeExplicitAutograd")
def _linear(x, a, b, bias, *rest):
    from qat.kernels.int4_linear import int4_linear

    *parts, scaling = rest
    weight = Int4Weight.of(*parts)
    with without_autocast(x):
        return _forward(x, a, b, scaling, lambda x: int4_linear(x, weight, bias))


@torch.library.impl(_library, "lora_linear_backward", "CompositeExplicitAutograd")
def _linear_backward(grad, x, low, a, b, *rest):
    *parts, scaling, of_x = rest

    def weight() -> Tensor:
        from qat.kernels.int4_linear import int4_dequantize

        return int4_dequantize(Int4Weight.of(*parts), grad.dtype)

    with without_autocast(grad):
        grads = _backward(grad, x, low, a, b, scaling, weight if of_x else None)
    return [made for made in grads if made is not None]


@torch.library.register_fake("qat::lora_linear", lib=_library)
def _(x, a, b, bias, words, scale, zero_point, levels, nest, out_features, in_features, group_size, scaling):
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(x.shape[:-1].numel(), a.shape[0])


@torch.library.register_fake("qat::lora_linear_backward", lib=_library)
def _(grad, x, low, a, b, *rest):
    return [made.new_empty(made.shape) for made in ((x, a, b) if rest[-1] else (a, b))]


def _keep(ctx, inputs, output) -> None:
    x, a, b, _, *weight, out_features, in_features, group_size, ctx.scaling = inputs
    ctx.save_for_backward(x, output[1], a, b, *weight)
    ctx.sizes = out_features, in_features, group_size


def _gradients(ctx, grad: Tensor, _):
    of_x = ctx.needs_input_grad[0]
    backward = torch.ops.qat.lora_linear_backward
    *grad_x, grad_a, grad_b = backward(grad, *ctx.saved_tensors, *ctx.sizes, ctx.scaling, of_x)
    return (grad_x[0] if of_x else None), grad_a, grad_b, *(None,) * 10


torch.library.register_autograd("qat::lora_linear", _gradients, setup_context=_keep, lib=_library)


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
