"""What torch puts around a model, and shortcuts past the forwards of a model's layers."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import remove_parametrizations
from torch.optim.swa_utils import AveragedModel

import qat
import qat.hf
from qat.errors import LayerError, PolicyError, StateError

W4 = {"weight": {"bits": 4}}
WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "average": AveragedModel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_has_its_own_names(kind, tmp_path, capsys):
    wrap, x = WRAPPERS[kind], torch.randn(3, 8)
    policy = qat.QuantPolicy(weight=qat.QuantSpec(4), rules=[{"match": "2", "weight": {"bits": 8}}])
    model = wrap(mlp())
    assert qat.prepare(model, policy) is model
    assert capsys.readouterr().out.splitlines()[1].startswith("0  ")
    assert list(qat.quantized_tensors(model)) == ["0", "2"]
    expected = model.eval()(x)
    assert qat.freeze(model) is model
    assert torch.equal(model(x), expected)
    qat.save(model, tmp_path / "artifact")

    assert torch.equal(qat.load(tmp_path / "artifact", model=mlp())(x), expected)
    wrapped = wrap(mlp())
    assert qat.load(tmp_path / "artifact", model=wrapped) is wrapped
    assert torch.equal(wrapped(x), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_encoder_is_evaluated_with_rounded_weights(padded, tmp_path):
    """In eval mode without gradients torch would hand the raw weights to one fused operator."""

    def build():
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    def run(model):
        with torch.no_grad():
            return model(x, src_key_padding_mask=mask)

    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 4 + [padded]] * 3) if padded else None
    model = qat.prepare(build(), {"weight": {"bits": 2}}, verbose=False)
    trained = run(model.train())
    evaluated = run(model.eval())
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-5)  # raw weights are 0.1 away
    assert torch.equal(run(qat.freeze(model)), evaluated)
    qat.save(model, tmp_path / "artifact")
    assert torch.equal(run(qat.load(tmp_path / "artifact", model=build())), evaluated)


@pytest.mark.parametrize("ran_before", [False, True])
def test_rwkv_is_evaluated_with_the_weights_that_it_trained(ran_before, tmp_path):
    """In eval mode transformers divides those of its seventh block and later, in place: other codes, or none at all."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.RwkvConfig(hidden_size=32, num_hidden_layers=7, vocab_size=32, context_length=16)
    model, tokens = transformers.RwkvForCausalLM(config), torch.arange(16)[None]
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    last = model.rwkv.blocks[-1].attention.output
    weight = last.weight.detach().clone()
    if ran_before:
        model.eval()(tokens)
    rules = [{"match": "head", "weight": None}]
    model = qat.prepare(model, qat.QuantPolicy(weight=qat.QuantSpec(bits=8), rules=rules), verbose=False)
    assert torch.equal(last.weight, weight)
    trained = model.train()(tokens).logits
    codes = {name: tensor.codes for name, tensor in qat.quantized_tensors(model).items()}
    assert torch.equal(model.eval()(tokens).logits, trained)
    assert all(torch.equal(tensor.codes, codes[name]) for name, tensor in qat.quantized_tensors(model).items())
    assert torch.equal(qat.freeze(model)(tokens).logits, trained)
    qat.save(model, tmp_path / "artifact")
    for opened in (
        qat.load(tmp_path / "artifact"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "artifact"),
    ):
        assert torch.equal(opened.eval()(tokens).logits, trained)


def test_a_transformer_encoder_is_calibrated():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = qat.prepare(model, qat.QuantPolicy(activation={"bits": 8}), verbose=False)
    qat.freeze(qat.calibrate(model, [torch.randn(3, 5, 16)]))


COMPUTED = {
    "parametrized": (nn.utils.parametrizations.weight_norm, lambda layer: remove_parametrizations(layer, "weight")),
    "weight_norm of old": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight")),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_at_each_forward_is_named_with_what_undoes_it(kind, capsys):
    compute, undo = COMPUTED[kind]
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(3, 8)
    compute(model[0])
    with pytest.raises(PolicyError, match=r"match='0' matched no layer .*computed at each forward .*\(0\): make param"):
        qat.prepare(model, {**W4, "rules": [{"match": "0", "weight": {"bits": 8}}]})
    with pytest.raises(
        LayerError, match=r"no layer that can be quantized .*computed at each forward .*\(0\): make param"
    ):
        qat.prepare(model[:1], W4)
    qat.prepare(model, W4)
    assert "weights computed at each forward stay in full precision (0): " in capsys.readouterr().out
    expected = model.eval()(x)
    assert torch.equal(qat.freeze(model)(x), expected)

    model = qat.prepare(mlp(), W4, verbose=False)
    compute(model[0])
    model(x)
    with pytest.raises(LayerError, match=r"computed at each forward cannot be frozen \(0\): make parameters"):
        qat.freeze(model)
    undo(model[0])
    expected = model.eval()(x)
    assert torch.equal(qat.freeze(model)(x), expected)


def test_lazy_layers_are_named():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(LayerError, match=r"lazy layers .*\(0\): run one batch"):
        qat.prepare(model, W4)
    model(torch.randn(1, 3))
    qat.prepare(model, W4, verbose=False)


@pytest.mark.parametrize("wrong", [mlp, nn.Linear, {}, None])
def test_what_is_no_module(wrong, tmp_path):
    with pytest.raises(StateError, match=r"expected a torch.nn.Module, got"):
        qat.prepare(wrong, W4)
    with pytest.raises(StateError, match=r"expected a torch.nn.Module, got"):
        qat.freeze(wrong)
    qat.save(qat.freeze(qat.prepare(mlp(), W4, verbose=False)), tmp_path / "artifact")
    if wrong is not None:
        with pytest.raises(StateError, match=r"expected a torch.nn.Module, got"):
            qat.load(tmp_path / "artifact", model=wrong)
