"""Small random language models of any kind that transformers has, frozen."""

import torch
from random_quantized import LLAMA, weight

import qat
from qat.frozen_model import from_model


def frozen(kind, spec=None, dtype=torch.float32, **options):
    """Return a frozen model's description; its norms and biases are random too, as ones and zeros would hide much."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**LLAMA, "pad_token_id": 0, "initializer_range": 0.1, **options})
    policy = qat.QuantPolicy(weight=spec or weight(group_size=32), rules=[{"match": "lm_head", "weight": None}])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return from_model(qat.freeze(qat.prepare(model, policy, verbose=False)))
