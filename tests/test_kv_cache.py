"""Keys and values in int8: what is stored, and what attention and generate make of it."""

import itertools

import pytest
import torch
import transformers
from random_quantized import LLAMA
from smollm2 import DEVICES, smollm2

import qat
from qat.errors import LayerError
from qat.kv_cache import int8_cache, pack, unpack
from qat.training.metrics import divergence

TOKENS = torch.arange(1, 25).view(2, 12)
SIZES = {**LLAMA, "head_dim": 64, "pad_token_id": 0}
WINDOWS = {**SIZES, "sliding_window": 7, "num_hidden_layers": 2}
FAMILIES = {
    "Llama": SIZES,
    "Mistral": WINDOWS,
    "Gemma3Text": {**WINDOWS, "layer_types": ["sliding_attention", "full_attention"]},
}


def model_of(family, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **options})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vector_is_rounded_as_the_formula_says(dtype):
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0], x[0, 0, 1, 3] = 0.0, 300.0
    packed = pack(x)
    assert packed.shape == (2, 3, 5, 66) and packed.dtype is torch.int8
    scale = (x.float().abs().amax(-1, keepdim=True) / 127).clamp_min(2**-17).to(torch.bfloat16).double()
    codes = (x.double() / scale).round().clamp(-128, 127)
    assert torch.equal(packed[..., :64].double(), codes)
    assert torch.equal(unpack(packed, dtype), (codes * scale).to(dtype))
    error = (unpack(packed, torch.float64) - x.double()).abs()
    assert (error <= scale).all()  # half a step, and another half where the bf16 scale is below max / 127
    assert not unpack(packed, dtype)[0, 0, 0].any()


@pytest.mark.parametrize("max_length", [None, 12])
def test_attention_reads_the_rounded_vectors_and_each_is_rounded_once(max_length):
    """In float64: the cache's answer to six tokens at once and to one after another is softmax(q K^T) V of them."""
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(1, 2, 6, 64, dtype=torch.float64, generator=generator) for _ in range(3))
    rounded = [unpack(pack(x), torch.float64) for x in (keys, values)]
    model = model_of("Llama")
    whole, stepwise = int8_cache(model, max_length), int8_cache(model, max_length)
    found = whole.update(keys, values, 0)
    for token in range(6):
        steps = stepwise.update(keys[:, :, token : token + 1], values[:, :, token : token + 1], 0)
    for ours, again, expected in zip(found, steps, rounded, strict=True):
        assert torch.equal(ours[:, :, :6], expected) and torch.equal(again, ours)
    scores = (queries @ rounded[0].mT / 8).softmax(-1) @ rounded[1]
    ours = torch.nn.functional.scaled_dot_product_attention(queries, found[0][:, :, :6], found[1][:, :, :6])
    torch.testing.assert_close(ours, scores)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("static", [False, True])
def test_generate_with_windows_and_padding(family, static):
    """Logits within 1 % of the plain cache's; a static cache and a growing one give the same text."""
    model = model_of(family)
    policy = qat.QuantPolicy(weight=qat.QuantSpec(group_size=64), rules=[{"match": "lm_head", "weight": None}])
    qat.freeze(qat.prepare(model, policy, verbose=False))
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "attention_mask": mask}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(TOKENS, **options)
    cache = int8_cache(model, 22 if static else None)
    found = model.generate(TOKENS, **options, past_key_values=cache)
    assert all(layer.keys.dtype is torch.int8 for layer in cache.layers)
    expected, ours = (torch.stack(answer.logits) for answer in (plain, found))
    same = (found.sequences[:, 12:] == plain.sequences[:, 12:]).T.cumprod(0).bool()  # before a text goes its own way
    same = torch.cat([torch.ones_like(same[:1]), same[:-1]])
    assert (ours - expected)[same].norm() < 0.01 * expected[same].norm()
    growing = model.generate(TOKENS, **options, past_key_values=int8_cache(model))
    assert torch.equal(found.sequences, growing.sequences)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_length", [9, 40])  # less and more than the window and the text
def test_a_fixed_cache_hides_what_is_not_filled(family, max_length):
    """A prompt, single tokens and several at once, without padding: logits of the growing cache, which has no rest."""
    model = model_of(family)
    fixed, growing = int8_cache(model, max_length), int8_cache(model)
    cuts = [0, 3, 4, 5, 7, 8] if max_length == 9 else [0, 3, 4, 7, 8, 9, 12]
    for _ in range(2):
        for start, stop in itertools.pairwise(cuts):
            part = TOKENS[:, start:stop]
            with torch.no_grad():
                ours, expected = (model(part, past_key_values=cache).logits for cache in (fixed, growing))
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        fixed.reset()
        growing = int8_cache(model)


def test_beams_and_memory():
    model = model_of("Llama", torch.bfloat16)
    cache = int8_cache(model)
    model.generate(TOKENS, max_new_tokens=4, num_beams=3, do_sample=False, past_key_values=cache)
    keys = cache.layers[0].keys
    plain = keys.shape[:-1].numel() * 64 * 2
    assert keys.shape[0] == 6 and keys.numel() * keys.element_size() == plain * 66 // 128


def test_a_model_with_an_encoder_is_refused():
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(LayerError, match=r"T5ForConditionalGeneration has an encoder.* leave past_key_values out"):
        int8_cache(model)


def test_other_caches_are_refused():
    config = transformers.Qwen3NextConfig(
        **{"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64, "head_dim": 32}
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(LayerError, match="caches more than keys and values"):
        int8_cache(model)


@pytest.mark.timeout(3600)  # two minutes on one core: codes are dequantized for every token
@pytest.mark.parametrize("device", DEVICES)
def test_smollm2_diverges_by_less_than_its_rounded_weights_do(device, capsys):
    """SmolLM2-135M, int4 g32 by minmax: what the cache changes of its predictions, and of 200 greedy tokens."""
    from pydoc_data.topics import topics

    model, tokenizer = smollm2()
    text = topics["async"] + topics["if"] + topics["class"]
    model, tokens = model.to(device), tokenizer(text, return_tensors="pt").input_ids[:, :512].to(device)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        policy = qat.QuantPolicy(
            weight=qat.QuantSpec(group_size=32), rules=[{"match": "lm_head", "weight": None}], init="minmax"
        )
        qat.freeze(qat.prepare(model, policy, verbose=False))
        plain = model(tokens, use_cache=False).logits
        cached = model(tokens, past_key_values=int8_cache(model)).logits
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    text = model.generate(tokens[:, :32], **options)
    fixed = model.generate(tokens[:, :32], **options, cache_implementation="static", disable_compile=True)
    caches = {length: int8_cache(model, length) for length in (None, 232)}
    found = {length: model.generate(tokens[:, :32], **options, past_key_values=c) for length, c in caches.items()}
    weights, cache = (divergence(a, b).item() / 512 for a, b in ((full, plain), (plain, cached)))
    agreement = (plain.argmax(-1) == cached.argmax(-1)).float().mean().item()
    same = {}
    for length, answer in found.items():
        without = text if length is None else fixed
        same["growing" if length is None else "fixed"] = int((answer == without)[0].int().cumprod(0).sum()) - 32
    with capsys.disabled():
        print(
            f"\nKL int4 {weights:.5f}, int8 cache {cache:.6f} nats; agreement {agreement:.4f}; tokens as without {same}"
        )
    assert cache < 0.05 * weights and agreement > 0.95 and min(same.values()) > 20
