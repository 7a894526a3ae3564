"""SplitAttention: ``nn.MultiheadAttention`` with its four projections as linear layers that can be quantized.

torch keeps the weights of q, k and v in one parameter that no layer owns, and reads ``out_proj``'s weight without
calling it. Here ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are linear layers, with those weights, and called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LayerError

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SplitAttention(nn.MultiheadAttention):
    """Computes what ``nn.MultiheadAttention`` does, in the order of its slow path; its fused fast path is never taken.

    A state dict of the original loads, its ``in_proj_weight`` and ``in_proj_bias`` in three parts.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: linear layers, plain, fake-quant or frozen.
    """

    @property
    def in_proj_weight(self) -> Tensor | None:
        """A copy, for code that asks for its dtype or starts it anew; None where q, k and v have other widths."""
        weights = [self._modules[name].weight for name in PROJECTIONS]
        return torch.cat(weights) if len({weight.shape[1] for weight in weights}) == 1 else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """A copy of the three biases, or None."""
        biases = [self._modules[name].bias for name in PROJECTIONS]
        return None if biases[0] is None else torch.cat(biases)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output and, if asked for, its weights: shapes and masks as ``nn.MultiheadAttention``.

        Raises:
            LayerError: a mask of another shape, or ``is_causal`` without the mask that it is a hint about.
        """
        if is_causal and attn_mask is None:
            raise LayerError("is_causal is a hint about attn_mask: give that mask too, as to nn.MultiheadAttention")
        batched, axis = query.dim() == 3, 0 if self.batch_first else 1
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (part.transpose(0, axis) if batched else part[None] for part in (q, k, v))  # (B, L or S, E)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        (batch, length, width), heads = q.shape, self.num_heads
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        mask = _merged(attn_mask, key_padding_mask, (batch, heads, length, k.shape[1]), query.dtype)
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], 1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, L or S, D)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            products = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
            weights = (products if mask is None else products + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = self.out_proj(y.transpose(1, 2).reshape(batch, length, width))
        return y.transpose(0, axis) if batched else y[0], weights

    def _reset_parameters(self) -> None:
        """Leave the projections to themselves: transformers calls this while it loads a model."""
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        for kind in ("weight", "bias"):
            joined = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            for index, name in enumerate(PROJECTIONS):
                part = joined.chunk(3)[index] if joined is not None else state_dict.pop(f"{prefix}{name}_{kind}", None)
                if part is not None:
                    state_dict[f"{prefix}{name}.{kind}"] = part
        super()._load_from_state_dict(state_dict, prefix, *args)


def split_attentions_(model: nn.Module, names: Iterable[str] | None = None) -> Callable[[], None]:
    """Turn every ``nn.MultiheadAttention`` into a ``SplitAttention``, in place; parameters that were tied still are.

    Subclasses, whose forward may be their own, are left alone.

    Args:
        model: any module.
        names: tensors or layers of a model that was split; only attentions with such names in there are. None for all.

    Returns:
        What undoes it, for an error that has to leave the model as it was.
    """
    inside = None if names is None else {name.rpartition(".q_proj")[0] for name in names if ".q_proj" in f".{name}"}
    parts: dict[Tensor, list[nn.Parameter]] = {}  # it holds the old ones, so that no new one takes their identity
    undo = []
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention and _has_plain_weights(module) and (inside is None or name in inside):
            before = dict(module._parameters), dict(module._modules), type(module.out_proj)
            _split_(module, parts)
            undo.append((module, *before))

    def undone() -> None:
        for module, parameters, modules, out_type in undo:
            module.__class__ = nn.MultiheadAttention
            module._parameters, module._modules = parameters, modules
            module._qkv_same_embed_dim = module.in_proj_weight is not None
            module.out_proj.__class__ = out_type

    return undone


def _has_plain_weights(module: nn.MultiheadAttention) -> bool:
    """Whether its weights are parameters of its own, not pruned or otherwise made in the forward."""
    names = ["in_proj_weight"] if module._qkv_same_embed_dim else [f"{name}_weight" for name in PROJECTIONS]
    return all(module._parameters.get(name) is not None for name in names)


def _split_(module: nn.MultiheadAttention, parts: dict[Tensor, list[nn.Parameter]]) -> None:
    def thirds(parameter: nn.Parameter) -> list[nn.Parameter]:
        if parameter not in parts:
            made = [nn.Parameter(part.clone(), parameter.requires_grad) for part in parameter.detach().chunk(3)]
            parts[parameter] = made
        return parts[parameter]

    bias = module.in_proj_bias
    biases = [None] * 3 if bias is None else thirds(bias)
    separate = [module._parameters[f"{name}_weight"] for name in PROJECTIONS]
    weights = thirds(module.in_proj_weight) if module._qkv_same_embed_dim else separate
    for name in ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in PROJECTIONS)):
        module._parameters[name] = None
    for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight, layer.bias = weight, bias
        module._modules[name] = layer.train(module.training)
    module._modules["out_proj"] = module._modules.pop("out_proj")  # the last, as it is called
    module.out_proj.__class__ = nn.Linear
    module._qkv_same_embed_dim = False
    module.__class__ = SplitAttention


def _merged(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor | None:
    """Return the sum of both masks as floats, which broadcasts to (B, H, L, S); None without any."""
    batch, heads, length, keys = shape
    mask = None
    if attn_mask is not None:
        expected = {2: (length, keys), 3: (batch * heads, length, keys)}.get(attn_mask.dim())
        if tuple(attn_mask.shape) != expected:
            raise LayerError(
                f"attn_mask is {list(attn_mask.shape)}, not {[length, keys]} or {[batch * heads, length, keys]}"
            )
        mask = _additive(attn_mask, dtype)
        mask = mask if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, keys):
            raise LayerError(f"key_padding_mask is {list(key_padding_mask.shape)}, not {[batch, keys]}")
        padding = _additive(key_padding_mask, dtype)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    return mask
