"""The decoder that benchmarks time computes what Llama computes: python -m pytest tests/test_benchmark_decode.py."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch

import qat

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def decode():
    """Import benchmarks.decode without the repository root on sys.path, where ``kernels`` would be found."""
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = package
    yield importlib.import_module("benchmarks.decode")
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_logits_are_those_of_transformers_token_by_token_and_at_once(decode, fused):
    transformers = pytest.importorskip("transformers")
    ours = decode.random_decoder(decode.Shape(128, 2, 96, 4, 2, 50), torch.float32, "cpu")
    ours.fused = fused
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    peer = transformers.LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": ours.embedding.weight, "lm_head.weight": ours.lm_head.weight}
    state["model.norm.weight"] = ours.norm.weight
    for index, block in enumerate(ours.blocks):
        at = f"model.layers.{index}"
        q, k, v = block.qkv.weight.split([128, 64, 64])
        gate, up = block.gate_up.weight.chunk(2)
        state |= {f"{at}.self_attn.{n}_proj.weight": w for n, w in zip("qkvo", (q, k, v, block.o.weight), strict=True)}
        state |= {f"{at}.mlp.gate_proj.weight": gate, f"{at}.mlp.up_proj.weight": up}
        state[f"{at}.mlp.down_proj.weight"] = block.down.weight
        state[f"{at}.input_layernorm.weight"] = block.norm1.weight
        state[f"{at}.post_attention_layernorm.weight"] = block.norm2.weight
    peer.load_state_dict(state)
    tokens = torch.randint(50, (3, 9))
    expected = peer(tokens).logits
    turns, caches = ours.turns(12), ours.caches(3, 12)
    first = ours.logits(tokens[:, :5], torch.arange(5), turns, caches)  # a prompt, then a token at a time
    torch.testing.assert_close(first, expected[:, 4], rtol=1e-4, atol=1e-4)
    for position in range(5, 9):
        step = ours.logits(tokens[:, position : position + 1], torch.tensor([position]), turns, caches)
        torch.testing.assert_close(step, expected[:, position], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_is_greedy_and_starts_anew_each_time(decode):
    model = decode.quantize(decode.random_decoder(decode.SMALL, torch.float32, "cpu"))
    run, made = decode.generate(model, 5, compiled=False)
    run()
    once = made.clone()
    run()
    assert torch.equal(made, once)
    tokens = torch.arange(decode.PROMPT)[None]
    for _ in range(5):
        at = torch.arange(tokens.shape[1])
        tokens = torch.cat([tokens, model(tokens, at, model.turns(64), model.caches(1, 64))], 1)
    assert torch.equal(once[0, decode.PROMPT : decode.PROMPT + 5], tokens[0, decode.PROMPT :])


def test_bytes_of_a_step(decode):
    model = decode.random_decoder(decode.Shape(64, 2, 96, 4, 2, 50), torch.bfloat16, "cpu")
    weights = sum(layer.weight.numel() for layer in model.linears())
    norms = 5 * 64
    assert decode.weight_bytes(model) == 2 * (weights + norms)
    model = decode.random_decoder(decode.SMALL, torch.bfloat16, "cpu")
    weights = sum(layer.weight.numel() for layer in model.linears())
    assert decode.weight_bytes(decode.quantize(model)) == weights / 2 + 2 * weights / 128 + 2 * 5 * 256


def test_cold_start_reads_the_artifact(decode, tmp_path, monkeypatch, capsys):
    model = decode.quantize(decode.random_decoder(decode.SMALL, torch.bfloat16, "cpu"))
    qat.save(model, tmp_path / "model")
    arguments = ["decode", "--small", "--device", "cpu", "--read", str(tmp_path / "model")]
    monkeypatch.setattr("sys.argv", arguments)
    decode.main()
    found = json.loads(capsys.readouterr().out)
    assert found["load"] > 0 and found["sum"] >= found["load"] + found["first token"]


@torch.no_grad()
def test_a_model_on_the_meta_device_is_filled(decode, tmp_path):
    model = decode.quantize(decode.random_decoder(decode.SMALL, torch.bfloat16, "cpu"))
    qat.save(model, tmp_path / "model")
    with torch.device("meta"):
        empty = decode.CachedDecoder(decode.SMALL).to(torch.bfloat16)
    loaded = qat.load(tmp_path / "model", model=empty)
    arguments = torch.tensor([[3]]), torch.tensor([0]), model.turns(8)
    expected, logits = (m.logits(*arguments, m.caches(1, 8)) for m in (model, loaded))
    assert torch.equal(logits, expected)
    assert loaded.lm_head.weight.dtype is torch.bfloat16 and loaded.lm_head.weight.device.type == "cpu"
