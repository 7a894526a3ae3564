"""A name of Hugging Face's Hub where it cannot be reached: refused at once, unless it lies in the cache."""

import time
from unittest.mock import Mock

import pytest
from huggingface_hub import constants
from omegaconf import OmegaConf
from tiny_tokenizer import tiny_tokenizer

from qat.errors import QATError
from qat.training.hub import ask_once
from qat.training.instantiation import make
from qat.training.tokenizer import load_tokenizer

MODELS = [
    {"_target_": "transformers.AutoModelForCausalLM.from_pretrained", "pretrained_model_name_or_path": "org/typo"},
    {"_target_": "qat.hf.from_pretrained", "name": "org/typo"},
]
REFUSED = r"org/typo.*: We couldn't connect to .* and couldn't find them in the cached files"


@pytest.fixture(autouse=True)
def out_of_reach(monkeypatch):
    """Huggingface_hub alone asks six times for each file, and sleeps in between."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))


@pytest.mark.parametrize("model", MODELS)
def test_a_mistyped_model_is_refused_at_once(model):
    with pytest.raises(QATError, match=REFUSED):
        make(OmegaConf.create(model))


def test_a_mistyped_tokenizer_is_refused_at_once():
    with pytest.raises(QATError, match=REFUSED):
        load_tokenizer("org/typo")


def test_a_path_asks_nobody(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token == "<eos>" and not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: Mock())
    ask_once("org/name")
    assert not constants.HF_HUB_OFFLINE
