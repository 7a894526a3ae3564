"""What the tests of frozen layers and of their packed weights share: random ones, and equality to the bit."""

import torch
from torch import nn

import qat.layers.linear
import qat.layers.packed
import qat.numerics
from qat import QuantSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_tensor(shape=(32, 64), bits=4, group=32, seed=0, scale_dtype=torch.bfloat16):
    """Return a QuantizedTensor of random codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, generator=generator)
    spec = QuantSpec(bits=bits, group_size=group, signed=True, scale_dtype=str(scale_dtype)[6:])
    scale = (torch.rand(qat.numerics.scale_shape(shape, spec), generator=generator) + 0.01).to(scale_dtype)
    return qat.numerics.QuantizedTensor(codes, scale, spec)


def frozen_linear(tensor, bias=True, linear=qat.layers.linear, packed=qat.layers.packed):
    """Return a FrozenLinear that holds the given tensor."""
    rows, columns = tensor.codes.shape
    layer = nn.Linear(columns, rows, bias=bias)
    del layer.weight
    layer.__class__ = linear.FrozenLinear
    layer.packed_weight, layer.activation_quantizer = packed.PackedWeight.from_tensor(tensor), None
    return layer


def same_bits(one, other):
    """Return whether two tensors without NaN are the same, signs of zeros included."""
    return one.dtype == other.dtype and torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())
