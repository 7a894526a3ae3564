"""What the tests of GGUF share: a Llama's config, random tensors, and models made of them."""

import torch

from qat.numerics import QuantizedTensor, scale_shape
from qat.quantized_model import QuantizedLayer, QuantizedModel

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 7,
}
QWEN2 = {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def random_tensor(rows, inputs, spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = scale_shape((rows, inputs), spec)

    def integers(*size):
        return torch.randint(-spec.q_n, spec.q_p + 1, size, dtype=torch.int8, generator=generator)

    scale = (torch.rand(shape, generator=generator) * 0.1 + 2**-12).to(getattr(torch, spec.scale_dtype))
    return QuantizedTensor(integers(rows, inputs), scale, spec, None if spec.symmetric else integers(*shape))


def model_of(tensors, config=CONFIG, activation=None):
    layers = {name: QuantizedLayer("Linear", list(t.codes.shape), t.spec, activation) for name, t in tensors.items()}
    return QuantizedModel({"transformers": config}, layers, tensors.__getitem__, {}.__getitem__, {})
