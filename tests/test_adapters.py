"""Adapters of peft on a quantized model: they train beside the codes, ship beside them, and are never merged unseen."""

import json

import pytest
import torch
from random_quantized import LLAMA

import qat
from qat import adapters, formats
from qat.convert import convert
from qat.errors import ArtifactError, QATError, StateError
from qat.formats.integer_linears import tensors
from qat.frozen_model import from_model, to_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.clients

WRAPPED = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def plain(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA | options))


def policy(**options):
    return qat.QuantPolicy(
        weight=qat.QuantSpec(group_size=64, **options), rules=[{"match": "*lm_head", "weight": None}]
    )


def lora(model, **options):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def tokens():
    return torch.randint(0, 512, (1, 12), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def quantized_with_lora(order, **options):
    """Return a frozen model with LoRA on it, which was put on before, between or after prepare and freeze."""
    model = plain()
    for step in order:
        if step == "l":
            model = lora(model)
        elif step == "p":
            qat.prepare(model, policy(**options), verbose=False)
        else:
            qat.freeze(model)
    return model.eval()


@pytest.mark.parametrize("order", ["lpf", "plf", "pfl"])
def test_adapters_stay_beside_the_codes_in_any_order(order):
    model = quantized_with_lora(order)
    expected = {name: t.codes for name, t in tensors(from_model(qat.freeze(qat.prepare(plain(), policy(), False))))}
    quantized = from_model(model)
    assert quantized.layers.keys() == expected.keys() and len(expected) == 14
    assert all(torch.equal(tensor.codes, expected[name]) for name, tensor in tensors(quantized))
    assert not any("lora" in name or "base_layer" in name for name in quantized.dense)
    assert quantized.architecture["transformers"]["architectures"] == ["LlamaForCausalLM"]
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(to_model(quantized)))
    assert not torch.equal(logits(model), logits(to_model(quantized)))


def test_only_the_adapter_trains_on_a_frozen_model():
    model = quantized_with_lora("pfl")
    before = {name: t.codes.clone() for name, t in qat.quantized_tensors(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if "lora_" in name
    }
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model(tokens(), labels=tokens()).loss < loss
    assert all(torch.equal(t.codes, before[name]) for name, t in qat.quantized_tensors(model).items())


@pytest.mark.parametrize("options", [{}, {"codebook": "nf4"}])
def test_an_artifact_with_its_adapter_has_the_same_logits(tmp_path, options):
    model = quantized_with_lora("plf", **options)
    qat.save(model, tmp_path / "out")
    again = peft.PeftModel.from_pretrained(qat.load(tmp_path / "out"), tmp_path / "out" / adapters.FOLDER)
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.parametrize(
    ("to", "options"),
    [("bitsandbytes", {"codebook": "nf4"}), ("torchao", {}), ("compressed-tensors", {}), ("gptq", {})],
)
def test_exports_carry_the_adapter(tmp_path, capsys, to, options):
    model = quantized_with_lora("plf", **options)
    qat.save(model, tmp_path / "artifact")
    convert(tmp_path / "artifact", tmp_path / "out", to)
    assert "the adapter lies beside: peft.PeftModel.from_pretrained" in capsys.readouterr().out
    if to == "gptq":
        assert (tmp_path / "out" / adapters.FOLDER / "adapter_model.safetensors").is_file()
        return
    pytest.importorskip(to.replace("-", "_"))
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if to == "compressed-tensors" else {}
    client = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu", **options)
    client = peft.PeftModel.from_pretrained(client, tmp_path / "out" / adapters.FOLDER).eval()
    for module in client.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' kernel there multiplies in bf16
    gap = (logits(client) - logits(model)).abs().max()
    assert gap <= 1e-5 * logits(model).abs().max()


def test_adapters_keep_their_names(tmp_path):
    model = quantized_with_lora("pf")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config, adapter_name="mine").eval()
    model.add_adapter("other", config)
    qat.save(model, tmp_path / "artifact")
    convert(tmp_path / "artifact", tmp_path / "out", "torchao")
    again = peft.PeftModel.from_pretrained(
        qat.load(tmp_path / "artifact"), tmp_path / "out" / adapters.FOLDER / "mine", adapter_name="mine"
    )
    assert torch.equal(logits(again.eval()), logits(model))
    assert (tmp_path / "out" / adapters.FOLDER / "other" / adapters.CONFIG).is_file()


def test_an_adapter_is_written_in_one_order(tmp_path):
    """A set's order, in which peft writes them, is another in each process."""
    names = [f"layers.{index}.q_proj" for index in range(20)]
    model = lora(plain())
    model.peft_config["default"].target_modules |= set(names)
    model.peft_config["default"].exclude_modules = set(names)
    adapters.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / adapters.CONFIG).read_text())
    assert config["target_modules"] == sorted([*names, "q_proj", "up_proj"])
    assert config["exclude_modules"] == sorted(names)


@pytest.mark.parametrize("to", ["gguf", "onnx", "mlx", "executorch"])
def test_formats_that_would_drop_the_adapter_refuse_it(tmp_path, to):
    qat.save(quantized_with_lora("plf"), tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"has an adapter beside it .'adapter'., which runtimes of"):
        formats.module(to).write(formats.read(tmp_path / "artifact"), tmp_path)


@pytest.mark.parametrize("safe", [True, False])
def test_merging_into_codes_is_refused(safe):
    model = quantized_with_lora("pfl")
    before = logits(model)
    with pytest.raises(QATError, match="frozen"):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(model), before)


def test_a_merged_adapter_is_not_rounded_unseen():
    model = quantized_with_lora("pl")
    model.merge_adapter()
    message = f"the adapter 'default' is merged into .*{WRAPPED[0]}.*unmerge_adapter"
    with pytest.raises(StateError, match=message):
        qat.freeze(model)
    model.unmerge_adapter()
    qat.freeze(model)


def test_merging_first_and_training_on_is_exact(tmp_path):
    model = lora(plain()).merge_and_unload()
    qat.prepare(model, policy(), verbose=False)
    expected = logits(model.eval())
    qat.save(qat.freeze(model), tmp_path / "out")
    assert not (tmp_path / "out" / adapters.FOLDER).exists()
    assert torch.equal(logits(qat.load(tmp_path / "out")), expected)


def test_adapters_that_cannot_lie_beside_are_refused():
    whole = lora(qat.prepare(plain(), policy(), verbose=False), modules_to_save=["lm_head"])
    with pytest.raises(StateError, match=r"lm_head' is trained whole .modules_to_save."):
        from_model(qat.freeze(whole))
    injected = qat.freeze(qat.prepare(plain(), policy(), verbose=False))
    injected.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(StateError, match=f"'{WRAPPED[0]}' holds an adapter that was put into the model: use peft.get"):
        from_model(injected)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = peft.get_peft_model(qat.freeze(qat.prepare(plain(), policy(), verbose=False)), prompts)
    with pytest.raises(StateError, match="only adapters that wrap layers"):
        from_model(prompted)


def test_rules_leave_adapters_alone():
    model = lora(plain())
    every = qat.QuantPolicy(weight=qat.QuantSpec(), rules=[{"match": "Linear", "weight": {"bits": 8}}])
    qat.prepare(model, every, verbose=False)
    assert not any("lora_" in name for name in qat.quantized_tensors(model))
