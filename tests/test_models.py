"""Models are built from plain values, and say how they were built."""

import json

import pytest
import torch

import qat
from qat.errors import ModelError
from qat.models import architecture_of, build

INPUTS = {
    "cnn": torch.rand(2, 1, 28, 28),
    "gpt": torch.randint(0, 256, (2, 16)),
    "resnet20": torch.rand(2, 3, 32, 32),
}


@pytest.mark.parametrize("builder", INPUTS)
def test_a_copy_can_be_built_from_what_the_model_says(builder):
    model = build({"builder": builder}).eval()
    copy = build(json.loads(json.dumps(architecture_of(model)))).eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(model(INPUTS[builder]), copy(INPUTS[builder]))


def test_resnet20_has_the_papers_size():
    model = build({"builder": "resnet20"})
    assert sum(isinstance(module, torch.nn.Conv2d | torch.nn.Linear) for module in model.modules()) == 20
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722  # 0.27 million, option A
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_resnet_shortcut_has_no_parameters_and_halves_the_image():
    block = build({"builder": "resnet20"}).stage2[0]
    x = torch.rand(1, 16, 8, 8)
    shortcut = block.shortcut(x)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert not shortcut[:, :8].any() and not shortcut[:, 24:].any()


def test_gpt_does_not_see_the_future():
    model = build({"builder": "gpt", "args": {"width": 32, "depth": 2}}).eval()
    tokens = torch.randint(0, 256, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = 0
    assert torch.equal(model(tokens)[:, :8], model(changed)[:, :8])


def test_gpt_ties_its_head_by_option():
    assert build({"builder": "gpt"}).lm_head.weight is not build({"builder": "gpt"}).tokens.weight
    tied = build({"builder": "gpt", "args": {"tie_embeddings": True}})
    assert tied.lm_head.weight is tied.tokens.weight


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ({"builder": "resnet2"}, "did you mean 'resnet20'?"),
        ({"builder": "cnn", "args": {"widht": 3}}, "cnn takes no argument 'widht' (did you mean 'width'?)"),
        ({"bilder": "cnn"}, "did you mean 'builder'?"),
        ({"builder": "os.system"}, "unknown model builder 'os.system'"),
        ({"transformers": {"model_type": "llama"}}, "architectures"),
    ],
)
def test_what_cannot_be_built_is_named(architecture, said):
    with pytest.raises(qat.QATError) as raised:
        build(architecture)
    assert said in str(raised.value)


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        (
            {"builder": "cnn", "args": {"num_classes": 2**40}},
            r"cnn with {'num_classes': 1099511627776} cannot be built",
        ),
        ({"builder": "cnn", "args": {"width": 10**23}}, "cnn with .* cannot be built"),
        ({"transformers": {**LLAMA, "vocab_size": 2**50}}, "LlamaForCausalLM cannot be built: RuntimeError"),
        ({"transformers": {**LLAMA, "hidden_size": "x"}}, "LlamaForCausalLM cannot be built: .*'hidden_size' expected"),
        ({"transformers": {**LLAMA, "num_attention_heads": 0}}, "LlamaForCausalLM cannot be built: ZeroDivisionError"),
        ({"transformers": {**LLAMA, "hidden_act": "no"}}, "LlamaForCausalLM cannot be built: KeyError: 'no'"),
        ({"transformers": {**LLAMA, "model_type": "no"}}, "transformers does not know model_type='no'"),
        ({"transformers": {**LLAMA, "num_hidden_layers": 2**70}}, f"says num_hidden_layers={2**70}: no model has more"),
        ({"transformers": {"text_config": {"n_layer": 10**6}, **LLAMA}}, "says n_layer=1000000: no model has more"),
        ({"builder": "gpt", "args": {"depth": 2**70}}, f"says depth={2**70}: no model has more"),
    ],
)
def test_values_from_a_file_that_no_model_has_are_one_error(architecture, said):
    pytest.importorskip("transformers")
    with pytest.raises(ModelError, match=said):
        build(architecture)


def test_transformers_model_round_trip_without_remote_code():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    architecture = json.loads(json.dumps(architecture_of(model)))
    architecture["transformers"]["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    copy = build(architecture).eval()
    copy.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 64, (1, 8))
    assert torch.equal(model(tokens).logits, copy(tokens).logits)
    with pytest.raises(qat.QATError, match="no model class 'Evil'"):
        build({"transformers": {**architecture["transformers"], "architectures": ["Evil"]}})
    with pytest.raises(qat.QATError, match="no model class 'pipeline'"):
        build({"transformers": {**architecture["transformers"], "architectures": ["pipeline"]}})
