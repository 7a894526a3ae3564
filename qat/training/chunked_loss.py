"""The cross-entropy of a language model whose logits are never all there: a few rows at a time, gradients at once.

The logits of 4096 tokens and a vocabulary of 128,256 take 1 GB in bf16, and the loss in float32 some 6 GB more: more
than an 8B model's 4-bit weights. Here the head's product, softmax and gradient are made of ``rows`` predictions at a
time, as in Liger Kernel's fused linear cross-entropy (arXiv:2410.10989), in plain torch, which runs everywhere. torch
2.13 has it as ``linear_cross_entropy``; older releases, which we support, do not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import TrainingError
from ..inputs import Inputs, mapped
from ..modes import in_eval_mode
from .metrics import IGNORED, logits_of, run

TRIED = 8  # tokens that the head is tried on


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
    """Return what ``metrics.cross_entropy`` returns for the logits x weight^T + bias: a float32 mean.

    Args:
        x: hidden states (..., H); the product runs in autocast's dtype, where it is on.
        weight: (V, H).
        bias: (V,), or None.
        targets: (...) int64; IGNORED ones do not count.
        rows: of logits at a time.
    """
    return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, bias, targets.flatten(), rows)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes all gradients in the forward, when a chunk's logits are there, and scales them in the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        counted = targets != IGNORED
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        share = counted.to(total.dtype) / counted.sum()
        wanted = ctx.needs_input_grad[:3]
        grad_x = torch.zeros_like(x) if wanted[0] else None
        grad_weight, grad_bias = (  # sums over chunks
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) if want else None
            for tensor, want in zip((weight, bias), wanted[1:], strict=True)
        )
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            logits = F.linear(x[part], weight, bias)
            dtype, logits = logits.dtype, logits.to(torch.promote_types(logits.dtype, torch.float32))
            labels = targets[part].clamp_min(0)[:, None]
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += ((log_sum - logits.gather(1, labels))[:, 0] * share[part]).sum()
            if not any(wanted):
                continue
            slope = logits.sub_(log_sum).exp_()  # softmax, then minus the one-hot labels
            slope.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=slope.dtype))
            slope = slope.mul_(share[part][:, None]).to(dtype)
            if grad_x is not None:
                grad_x[part] = slope @ weight.to(dtype)
            if grad_weight is not None:
                grad_weight += slope.t() @ x[part].to(dtype)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        made = grad_x, grad_weight, grad_bias
        given = zip((x, weight, bias), made, strict=True)
        ctx.save_for_backward(*(None if grad is None else grad.to(tensor.dtype) for tensor, grad in given))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *(None if made is None else made * grad for made in ctx.saved_tensors), None, None


def chunked_loss(model: nn.Module, inputs: Inputs, targets: Tensor, rows: int) -> Tensor:
    """Return a transformers model's mean cross-entropy: ``linear_cross_entropy`` of what its head gets.

    Raises:
        TrainingError: a model without a plain linear head.
    """
    head = head_of(model)
    return linear_cross_entropy(headless(model, head, inputs), head.weight, head.bias, targets, rows)


def check_head(model: nn.Module, inputs: Inputs) -> None:
    """Raise TrainingError unless the model's logits are what its head makes of its input, and nothing else.

    Some models scale or cap them afterwards. Tried on the first few tokens of a batch.
    """
    head = head_of(model)
    few = mapped(inputs, lambda x: x[:1, :TRIED])
    with in_eval_mode(model), torch.no_grad():
        logits = logits_of(run(model, few)).float()
        found = F.linear(headless(model, head, few), head.weight, head.bias).float()
    if logits.shape != found.shape or (logits - found).abs().max() > 1e-2 * logits.abs().max():
        raise TrainingError(
            f"task.loss_rows: {type(model).__name__} does more than its head to make logits, such as scaling them: "
            "leave task.loss_rows at null"
        )


def head_of(model: nn.Module) -> nn.Linear:
    """Return the layer that makes logits.

    Raises:
        TrainingError: there is none, or it is quantized.
    """
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        what = "none" if head is None else f"a {type(head).__name__}"
        raise TrainingError(
            f"task.loss_rows takes a transformers model with a plain linear head, and this one has {what}: leave it at "
            "null, or leave the head in full precision by a rule with weight null"
        )
    return head


def headless(model: nn.Module, head: nn.Module, inputs: Inputs) -> Tensor:
    """Return what the head gets, (B, T, H)."""
    head.forward = lambda x: x
    try:
        return logits_of(run(model, inputs))
    finally:
        del head.forward
