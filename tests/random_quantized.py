"""What the tests of several formats share: random quantized tensors, a small Llama, mutations of stored files."""

import torch
from safetensors.torch import load_file, save_file

import qat
from qat.double_quantization import dynamic_map, nest
from qat.numerics import QuantizedTensor, scale_shape, zero_point_dtype

LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def random_tensor(rows, inputs, spec, seed=0):
    """Return any codes and zero points, with scales from 2^-17 to 8."""
    generator = torch.Generator().manual_seed(seed)
    shape = scale_shape((rows, inputs), spec)

    def integers(*size):
        return torch.randint(-spec.q_n, spec.q_p + 1, size, dtype=torch.int8, generator=generator)

    scale = torch.exp2(torch.rand(shape, generator=generator) * 20 - 17).to(getattr(torch, spec.scale_dtype))
    if spec.codebook == "nf4_double":
        nested = nest(scale, dynamic_map())
        return QuantizedTensor(integers(rows, inputs), nested.values(), spec, nested=nested)
    codes, zero_point = integers(rows, inputs), None if spec.symmetric else integers(*shape)
    if spec.zero_point_dtype is not None:
        zero_point = (zero_point + 0.25).to(zero_point_dtype(spec))
    return QuantizedTensor(codes, scale, spec, zero_point)


def weight(bits=4, group_size=None, **options):
    """Return the spec of a weight."""
    return qat.QuantSpec(bits=bits, group_size=group_size, signed=True, **options)


def rewrite(folder, change):
    """Apply a mutation to the stored tensors."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    stored = {name: value.contiguous() for name, value in stored.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
