"""Keys and values in int8 for ``generate``: half the memory of a bf16 cache, growing or of a fixed length.

    model.generate(**inputs, past_key_values=qat.hf.int8_cache(model))
    model.generate(**inputs, past_key_values=qat.hf.int8_cache(model, max_length=4096))

Each key and value vector, of one head and one token, has a scale of its own, max|x| / 127 in bf16: D + 2 bytes for D
numbers. A vector is rounded once, when it enters the cache, and attention sees the rounded one from then on, so that a
text does not depend on how it was cut into forwards. The scale's two bytes lie behind the codes in one int8 tensor:
what transformers does to its caches (windows, beams, cropping, offloading) it does to these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .errors import LayerError
from .numerics import dequantize, quantize, stored_scale
from .spec import QuantSpec

SPEC = QuantSpec(bits=8, granularity="channel", signed=True)  # a row is a vector of keys or values
SCALE_BYTES = 2


def int8_cache(model: PreTrainedModel, max_length: int | None = None) -> Cache:
    """Return an empty cache for one call of ``generate``, or to go on with a text in several.

    Args:
        model: a decoder of transformers, quantized or not.
        max_length: tokens of prompt and answer, for which memory is taken at once; None grows with the text.

    Raises:
        LayerError: the model has an encoder, or keeps something other than keys and values.
    """
    if model.config.is_encoder_decoder:
        raise LayerError(
            f"{type(model).__name__} has an encoder, whose keys and values are a second cache: no int8 cache for it, "
            "leave past_key_values out"
        )
    if max_length is None:
        plain = DynamicCache(config=model.config)
    else:
        plain = StaticCache(config=model.config, max_cache_len=max_length)
    return Cache(layers=[_int8_layer(layer, max_length) for layer in plain.layers])


def pack(x: Tensor) -> Tensor:
    """Return the codes and scales of vectors (..., D) as int8 (..., D + 2).

    NaN and infinity are not looked for, which would wait for the device at every token.
    """
    rows = x.flatten(0, -2)
    scale = stored_scale(rows.float().abs().amax(-1, keepdim=True) / SPEC.q_p, SPEC)
    codes = quantize(rows, scale, SPEC).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1).view(*x.shape[:-1], x.shape[-1] + SCALE_BYTES)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the vectors that ``pack`` rounded, (..., D), each value code * scale rounded once to ``dtype``."""
    rows = packed.flatten(0, -2)
    codes, scale = rows[:, :-SCALE_BYTES], rows[:, -SCALE_BYTES:].contiguous().view(torch.bfloat16)
    return dequantize(codes, scale, dtype).view(*packed.shape[:-1], codes.shape[-1])


class _Int8:
    """Puts packed vectors where a cache layer of transformers keeps its own."""

    is_compileable = False  # generate would compile the step on a GPU, which nobody has compared to the bit

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values (batch, heads, tokens, D), and return all that attention reads."""
        length = self._filled_after(keys.shape[-2])
        both = super().update(pack(keys), pack(values), *args, **kwargs)
        all_keys, all_values = (x[:, :, :length] for x in both)
        return unpack(all_keys, keys.dtype), unpack(all_values, values.dtype)

    def _filled_after(self, tokens: int) -> int | None:
        """Return how many vectors are there with so many more; None where a layer holds nothing else."""
        return None


class Int8DynamicLayer(_Int8, DynamicLayer):
    """Grows with the text."""


class Int8DynamicSlidingWindowLayer(_Int8, DynamicSlidingWindowLayer):
    """Grows to the size of the window."""


class Int8StaticLayer(_Int8, StaticLayer):
    """Has its size from the start; attention gets what is filled.

    For one new token transformers makes no mask that would hide the rest, unless the cache can be compiled.
    """

    _filled = 0

    def _filled_after(self, tokens: int) -> int:
        self._filled += tokens
        return self._filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many vectors attention will get with ``query_length`` more, and the first one's position."""
        return self._filled + query_length, 0

    def reset(self) -> None:
        """Empty it."""
        super().reset()
        self._filled = 0


class Int8StaticSlidingWindowLayer(_Int8, StaticSlidingWindowLayer):
    """Has the window's size from the start; attention gets what is filled, as in ``Int8StaticLayer``."""

    def _filled_after(self, tokens: int) -> int | None:
        length = self.cumulative_length_int + tokens
        return length if length <= self.max_cache_len else None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many vectors attention will get with ``query_length`` more, and the first one's position."""
        length = self.cumulative_length_int + query_length
        return (length, 0) if length <= self.max_cache_len else super().get_mask_sizes(query_length)


def _int8_layer(layer: Any, max_length: int | None) -> Any:
    if type(layer) is DynamicLayer:
        return Int8DynamicLayer()
    if type(layer) is DynamicSlidingWindowLayer:
        return Int8DynamicSlidingWindowLayer(layer.sliding_window)
    if type(layer) is StaticLayer:
        return Int8StaticLayer(max_length)
    if type(layer) is StaticSlidingWindowLayer:
        return Int8StaticSlidingWindowLayer(max_length, layer.max_cache_len)
    raise LayerError(f"this model caches more than keys and values ({type(layer).__name__}): no int8 cache for it")
