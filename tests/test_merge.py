"""LoRA on frozen bases: where it starts, which base it belongs to, and what merging it costs."""

import dataclasses
import json

import pytest
import torch
from random_quantized import LLAMA
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qat
import qat.hf
from qat import merge
from qat.adapters import BASE, fingerprint, load_adapter, save_adapter, wrapping_layers
from qat.errors import ArtifactError, PolicyError, StateError
from qat.layers import FrozenLinear
from qat.lora import lora, split_weight
from qat.policy import Decision
from qat.ptq import Options
from qat.surgery import weight_quantizer

pytest.importorskip("peft")

TOKENS = torch.arange(1, 25).view(2, 12)
POLICY = {"weight": {"group_size": 64}, "rules": [{"match": "lm_head", "weight": None}], "init": "mse"}
NF4 = {**POLICY, "weight": {"codebook": "nf4", "group_size": 64}}
DOUBLE = {**POLICY, "weight": {"codebook": "nf4_double", "group_size": 64}}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})).eval()


def frozen(policy=POLICY):
    return qat.freeze(qat.prepare(llama(), qat.QuantPolicy.from_dict(policy), verbose=False))


def adapted(base, size, **options):
    """Return peft's model whose update has about ``size`` times the weight's own size."""
    model = lora(base, rank=4, alpha=8.0, **options).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size * 0.03)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("policy", [POLICY, NF4, DOUBLE])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_trains_saves_and_loads_on_its_base_alone(tmp_path, policy, dora):
    base = frozen(policy)
    qat.save(base, tmp_path / "base")
    model = lora(base, rank=4, alpha=8.0, dora=dora)
    assert torch.allclose(logits(model), logits(qat.load(tmp_path / "base")), atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    first = model(TOKENS, labels=TOKENS).loss
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
    assert loss < first
    save_adapter(model, tmp_path / "adapter")
    for opened in (qat.load(tmp_path / "base"), AutoModelForCausalLM.from_pretrained(tmp_path / "base")):
        again = load_adapter(opened, tmp_path / "adapter").eval()
        assert torch.equal(logits(again), logits(model.eval()))
    other = frozen(policy)
    other.model.layers[0].mlp.up_proj.packed_weight.packed[0, 0] ^= 1
    with pytest.raises(ArtifactError, match=r"was trained on codes .*open the base"):
        load_adapter(other, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="this base has codes None"):
        load_adapter(llama(), tmp_path / "adapter")
    (tmp_path / "adapter" / BASE).unlink()
    with pytest.raises(ArtifactError, match="on a base it does not name"):
        load_adapter(frozen(policy), tmp_path / "adapter")
    load_adapter(frozen(policy), tmp_path / "adapter", any_base=True)


def test_the_fingerprint_is_of_the_codes_alone():
    base = frozen()
    expected = fingerprint(base)
    assert fingerprint(base.to(torch.bfloat16)) == expected and fingerprint(lora(base)) == expected
    assert fingerprint(llama()) is None
    other = frozen()
    other.model.layers[0].mlp.up_proj.packed_weight.scale[3, 1] *= 2
    assert fingerprint(other) != expected


@pytest.mark.parametrize("policy", [POLICY, NF4, DOUBLE])
def test_what_a_merge_costs_is_measured(policy):
    """Against float64: the update is W + U before and after rounding."""
    shares = []
    for size in (0.01, 1.0):
        model = adapted(frozen(policy), size)
        before = {n: t.dequantize().double() for n, t in qat.quantized_tensors(model.get_base_model()).items()}
        updates = {
            name: layer.get_delta_weight("default").double()
            for name, layer in model.get_base_model().named_modules()
            if hasattr(layer, "lora_A")
        }
        base, costs = merge.merge(model)
        assert type(base) is LlamaForCausalLM and not any("lora" in name for name, _ in base.named_parameters())
        tensors = qat.quantized_tensors(base)
        assert len(costs) == 7 and {cost.name for cost in costs} == set(tensors)
        for cost in costs:
            start = before[f"{cost.name}.base_layer"]
            update, done = updates[cost.name], tensors[cost.name].dequantize().double() - start
            assert cost.survives == pytest.approx(((update * done).sum() / update.square().sum()).item(), abs=1e-4)
            assert cost.noise == pytest.approx(((done - update).norm() / update.norm()).item(), rel=1e-3)
            assert not cost.exact
        shares.append(sum(cost.survives for cost in costs) / len(costs))
    assert shares[0] < 0.6 and 0.8 < shares[1] < 1.1


@pytest.mark.parametrize("policy", [POLICY, NF4])
def test_a_lossy_merge_needs_the_flag(tmp_path, policy, capsys):
    base = frozen(policy)
    qat.save(base, tmp_path / "base")
    save_adapter(adapted(base, 0.02), tmp_path / "adapter")
    command = [str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert merge.main(command) == 1
    out = capsys.readouterr()
    assert "of the update survives" in out.out and "--lossy" in out.err and not (tmp_path / "out").exists()
    assert merge.main([*command, "--lossy"]) == 0
    assert qat.quantized_tensors(qat.load(tmp_path / "out")).keys() == qat.quantized_tensors(frozen(policy)).keys()


def test_a_merge_leaves_its_base_and_takes_it_first(tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    qat.save(frozen(), base)
    save_adapter(adapted(frozen(), 0.01), adapter)
    before = {path: path.read_bytes() for path in base.iterdir()}
    assert merge.main([str(base), str(adapter), "--out", str(base / ".." / "base"), "--lossy"]) == 1
    assert "is the base itself: choose another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    assert merge.main([str(adapter), str(base), "--out", str(tmp_path / "merged")]) == 1
    assert "the base comes first, then the adapter" in capsys.readouterr().err


def test_a_merge_leaves_the_adapter_beside_its_base_behind(tmp_path, capsys):
    """As a run ships it: the artifact, and in it the adapter, which does not fit the codes of the merge."""
    qat.save(adapted(frozen(), 0.02), tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    command = [str(tmp_path / "base"), str(tmp_path / "base" / "adapter"), "--out", str(tmp_path / "out"), "--lossy"]
    assert merge.main(command) == 0
    assert "left out: the adapter 'adapter'" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and not (tmp_path / "out" / "adapter").exists()


def test_an_update_that_fits_the_codes_is_merged_exactly(tmp_path):
    """One step of every second code of a row is an update of rank one that the grid holds."""
    torch.manual_seed(0)
    base = frozen()
    layer = base.model.layers[0].mlp.up_proj
    tensor = layer.packed_weight.quantized_tensor()
    tensor.codes[0] = tensor.codes[0].clamp(-7, 6)
    tensor.scale[0] = 0.25
    layer.packed_weight = type(layer.packed_weight).from_tensor(tensor)
    model = lora(base, rank=1, alpha=1.0, targets=["up_proj"])
    with torch.no_grad():
        adapter = model.get_base_model().model.layers[0].mlp.up_proj
        adapter.lora_A["default"].weight.copy_((torch.arange(256) % 2) * 0.25)
        adapter.lora_B["default"].weight.zero_()[0] = 1.0
    expected = logits(model.eval())
    merged, costs = merge.merge(model)
    assert merge.table(costs) == "merged 1 weights: exact" and costs[0].changed == 128
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_dora_is_merged_as_it_is_computed():
    model = adapted(frozen({**POLICY, "weight": {"bits": 8, "group_size": 64}}), 1.0, dora=True)
    expected = logits(model)
    base, costs = merge.merge(model)
    assert all(cost.survives > 0.95 for cost in costs)
    assert (logits(base) - expected).norm() < 0.05 * expected.norm()


def peft_model(base, kind="LoraConfig", **options):
    import peft

    torch.manual_seed(1)
    config = getattr(peft, kind)(target_modules=["q_proj", "v_proj"], **options)
    model = peft.get_peft_model(base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_bias_of_an_adapter_is_merged():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 1, "attention_bias": True})).eval()
    base = qat.freeze(qat.prepare(model, qat.QuantPolicy.from_dict(POLICY), verbose=False))
    model = peft_model(base, r=4, lora_alpha=8, lora_bias=True)
    for _, wrapper in wrapping_layers(model):  # no change to the codes
        wrapper.lora_A["default"].weight.data.zero_()
    expected = logits(model)
    assert not torch.allclose(expected, logits(frozen()), atol=0.1)
    merged, costs = merge.merge(model)
    assert all(cost.exact for cost in costs)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(StateError, match=r"q_proj' has no bias to merge the adapter's into \(lora_bias=True\)"):
        merge.merge(peft_model(frozen(), r=4, lora_bias=True))


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "VeraConfig"])
def test_another_kind_of_adapter_is_not_merged(kind):
    with pytest.raises(StateError, match="q_proj' has an adapter of another kind than LoRA"):
        merge.merge(peft_model(frozen(), kind))


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_loftq_and_pissa_split_a_weight(iterations):
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64, bias=False)
    spec = qat.QuantSpec(bits=3, group_size=32, signed=True)

    def quantize(rest):
        layer.weight.data = rest
        return weight_quantizer(Decision("", layer, spec, None), qat.QuantPolicy(init="mse").init).quantize(rest)

    weight = torch.randn(64, 128) + 3 * torch.randn(64, 1) @ torch.randn(1, 128)
    tensor, a, b = split_weight(weight, quantize, 8, iterations)
    error = (tensor.dequantize() + b @ a - weight).norm()
    assert error < 0.75 * (quantize(weight).dequantize() - weight).norm()
    if not iterations:  # PiSSA: the eight largest singular values are the adapter's
        u, s, v = torch.linalg.svd(weight)
        torch.testing.assert_close(b @ a, (u[:, :8] * s[:8]) @ v[:8], rtol=1e-3, atol=1e-3)
        assert torch.equal(tensor.codes, quantize(weight - b @ a).codes)
    else:  # LoftQ: the adapter is the best of its rank for what the codes leave
        rest = weight - tensor.dequantize()
        u, s, v = torch.linalg.svd(rest)
        torch.testing.assert_close(b @ a, (u[:, :8] * s[:8]) @ v[:8], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", ["loftq", "pissa"])
def test_a_base_split_so_is_closer_to_the_model(tmp_path, start):
    policy = qat.QuantPolicy.from_dict({**POLICY, "weight": {"bits": 3, "group_size": 64}})
    plain = llama()
    expected = logits(plain)
    rounded = logits(qat.freeze(qat.prepare(llama(), policy, verbose=False)))
    model = lora(plain, policy, rank=32, alpha=16.0, start=start).eval()
    assert (logits(model) - expected).norm() < 0.9 * (rounded - expected).norm()
    qat.save(model, tmp_path)
    again = load_adapter(qat.load(tmp_path), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "adapter" / BASE).read_text()) == {"sha256": fingerprint(model)}


def test_cloq_is_closer_on_its_data_than_loftq_and_gptq():
    """The codes are GPTQ's own, and rank 32 of 256 takes a part of what they leave of the outputs."""
    policy = qat.QuantPolicy.from_dict({**NF4, "weight": {"codebook": "nf4", "group_size": 64}})
    torch.manual_seed(1)
    batches = [torch.randint(0, LLAMA["vocab_size"], (4, 48)) for _ in range(8)]
    expected = [llama()(batch).logits.detach() for batch in batches]

    def error(model):
        with torch.no_grad():
            return sum(float((model(b).logits - e).norm()) for b, e in zip(batches, expected, strict=True))

    gptq = qat.prepare(llama(), dataclasses.replace(policy, init="gptq"), verbose=False)
    gptq = qat.freeze(qat.calibrate(gptq, batches, verbose=False))
    cloq = lora(llama(), policy, rank=32, alpha=16.0, start="cloq", batches=batches).eval()
    assert fingerprint(cloq) == fingerprint(gptq)
    loftq = lora(llama(), policy, rank=32, alpha=16.0, start="loftq").eval()
    assert error(cloq) < 0.9 * error(gptq) and error(cloq) < 0.9 * error(loftq)


@pytest.mark.parametrize("start", ["loftq", "pissa", "cloq"])
def test_an_adapter_of_more_rank_than_a_layer_makes_up_for_all_of_the_rounding(start):
    policy, batches = qat.QuantPolicy.from_dict(NF4), [torch.randint(0, LLAMA["vocab_size"], (8, 64))]
    model = lora(llama(), policy, rank=320, alpha=320.0, start=start, batches=batches).eval()
    torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-3, atol=1e-3)


def test_cloq_leaves_layers_that_are_no_targets_to_their_codes():
    policy, batches = qat.QuantPolicy.from_dict(NF4), [torch.randint(0, LLAMA["vocab_size"], (8, 64))]
    model = lora(llama(), policy, targets=["q_proj"], start="cloq", batches=batches)
    assert [name.rpartition(".")[2] for name, _ in wrapping_layers(model)] == ["q_proj"]
    assert float(model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.abs().max()) > 0


def test_refusals(tmp_path):
    policy = qat.QuantPolicy.from_dict(POLICY)
    with pytest.raises(StateError, match="trains its own weights"):
        lora(qat.prepare(llama(), policy, verbose=False))
    with pytest.raises(StateError, match="this base is frozen"):
        lora(frozen(), policy)
    with pytest.raises(PolicyError, match="give a policy"):
        lora(llama(), start="pissa")
    with pytest.raises(StateError, match="start=cloq reads calibration data: give batches"):
        lora(llama(), policy, start="cloq")
    with pytest.raises(StateError, match="leave the folder 'blocks' out"):
        lora(llama(), policy, start="cloq", batches=[TOKENS], options=Options(folder="blocks"))
    with pytest.raises(PolicyError, match="is quantized and no target"):
        lora(llama(), policy, targets=["q_proj"], start="pissa")
    with pytest.raises(PolicyError, match=r"'0': only linear layers .* can be split .* or take adapter.start=zero"):
        lora(torch.nn.Sequential(torch.nn.Conv2d(16, 16, 1)), qat.QuantPolicy(qat.QuantSpec()), start="pissa")
    with pytest.raises(StateError, match="merge takes a frozen base"):
        merge.merge(lora(llama()))
    with pytest.raises(ArtifactError, match=r"no adapter_config.json"):
        load_adapter(frozen(), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("base.json", "{bad", "base.json is damaged: Expecting property name"),
        ("base.json", "[1]", "base.json is damaged: it names no base"),
        ("adapter_config.json", "{bad", "is damaged, or fits another model: Expecting property name"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 3}', "is damaged, or fits another model: Error"),
        ("adapter_model.safetensors", "short", "is damaged, or fits another model: Error while deserializing header"),
        ("adapter_model.safetensors", None, "there is no adapter_model.safetensors"),  # peft would ask the Hub for it
    ],
)
def test_a_damaged_adapter_is_one_line(tmp_path, name, content, said):
    save_adapter(adapted(frozen(), 0.02), tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(ArtifactError, match=said):
        load_adapter(frozen(), tmp_path)


@pytest.mark.parametrize(
    ("rules", "targets", "said"),
    [
        (POLICY["rules"], ["lm_head"], "on no quantized linear layer: ship it beside its base, or let peft's merge_"),
        (
            [{"match": "Embedding", "weight": {"bits": 8, "granularity": "channel"}}],
            ["embed_tokens", "v_proj"],
            "embed_tokens': merge does not know a FrozenEmbedding: ship its adapter beside its base",
        ),
    ],
)
def test_an_adapter_on_what_merge_does_not_know_is_named(rules, targets, said):
    policy = qat.QuantPolicy.from_dict({**POLICY, "rules": rules})
    with pytest.raises(StateError, match=said):
        merge.merge(lora(llama(), policy, targets=targets))


def test_layers_that_are_not_quantized_take_the_update_in_their_own_dtype(tmp_path):
    """A dense projection and stacked experts merge as peft does; their weight is W + B A."""
    import transformers

    config = transformers.MixtralConfig(
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 32},
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")  # by which peft knows of the stacked experts
    rules = [{"match": name, "weight": None} for name in ("lm_head", "*.o_proj")]
    policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=8, group_size=32), rules=rules, init="minmax")
    tuned = lora(qat.freeze(qat.prepare(model, policy, verbose=False)), rank=4)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.01)
    wrappers = {name: layer for name, layer in wrapping_layers(tuned) if not isinstance(layer.base_layer, FrozenLinear)}
    assert any(name.endswith("experts") for name in wrappers)
    dense = next(layer for name, layer in wrappers.items() if name.endswith("o_proj"))
    expected = dense.base_layer.weight + dense.get_delta_weight("default")
    tokens = torch.arange(1, 17).view(1, 16)
    with torch.no_grad():
        before = tuned(tokens).logits
    merged, costs = merge.merge(tuned)
    assert not list(wrapping_layers(merged)) and costs
    torch.testing.assert_close(merged.model.layers[0].self_attn.o_proj.weight, expected)
    qat.save(merged, tmp_path / "a")
    with torch.no_grad():
        after = qat.load(tmp_path / "a")(tokens).logits
    assert (after - before).norm() < 0.01 * before.norm()


@pytest.mark.parametrize("size", [0.002, 0.5])
def test_what_rounding_takes_of_layers_that_are_not_quantized_is_measured(tmp_path, capsys, size):
    """Against float64; bf16 has 8 bits, and a small update is lost in them."""
    policy = {**POLICY, "rules": [*POLICY["rules"], {"match": "*.o_proj", "weight": None}]}
    base = qat.freeze(qat.prepare(llama().bfloat16(), qat.QuantPolicy.from_dict(policy), verbose=False))
    qat.save(base, tmp_path / "base")
    model = adapted(base, size)
    save_adapter(model, tmp_path / "adapter")
    before = base.model.layers[0].self_attn.o_proj.weight.double()
    update = model.get_base_model().model.layers[0].self_attn.o_proj.get_delta_weight("default").double()
    merged, costs = merge.merge(model)
    after = merged.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(after, (before + update).bfloat16())
    (cost,) = [cost for cost in costs if cost.changed is None]
    done = after.double() - before
    assert cost.name == "model.layers.0.self_attn.o_proj.weight" and not cost.exact
    assert cost.survives == pytest.approx(((update * done).sum() / update.square().sum()).item(), rel=1e-4)
    assert cost.noise == pytest.approx(((done - update).norm() / update.norm()).item(), rel=1e-4)
    assert (cost.survives < 0.9 and cost.noise > 0.5) if size < 0.1 else (cost.survives > 0.999 and cost.noise < 0.1)
    command = [str(tmp_path / part) for part in ("base", "adapter")]
    assert merge.main([*command, "--out", str(tmp_path / "out"), "--lossy"]) == 0
    said = f"not quantized {cost.survives:.1%} of the update survives, with noise of {cost.noise:.2f} times its size"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("layer", ["q_proj", "o_proj"])
def test_an_adapter_that_holds_nan_is_named(layer):
    """On a quantized layer, and on one that is not, of which peft raises its own error."""
    policy = {**POLICY, "rules": [*POLICY["rules"], {"match": "*.o_proj", "weight": None}]}
    model = adapted(frozen(policy), 0.02)
    getattr(model.get_base_model().model.layers[0].self_attn, layer).lora_A["default"].weight.data[0] = float("nan")
    with pytest.raises(StateError, match=f"{layer}.*': its adapter holds NaN or infinity"):
        merge.merge(model)


def test_what_peft_refuses_is_said_in_one_line():
    with pytest.raises(PolicyError, match=r"peft refuses this adapter: .*adapter\.targets"):
        lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), targets=["nowhere"])
