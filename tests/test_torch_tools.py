"""Prepared and frozen models under torch's own tools: traces, exports, copies, the meta device, averages."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from frozen_linears import frozen_linear, random_tensor
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import qat
from qat.joint_lora import joint_lora
from qat.lora_product import lora_product
from qat.qa_lora import qa_lora

POLICIES = {
    "weights": {"weight": {"bits": 4}},
    "groups of zero points": {"weight": {"bits": 4, "group_size": 8, "symmetric": False}},
    "3 bits and inputs": {"weight": {"bits": 3}, "activation": {"bits": 8}},
    "LSQ+": {"weight": {"bits": 8}, "activation": {"bits": 4, "symmetric": False}},
    "int8_token": {"weight": {"bits": 4}, "activation": "int8_token"},
    "NF4": {"weight": {"codebook": "nf4_double", "group_size": 8}},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 6)

    def forward(self, x):
        x = self.embedding(x)
        return self.head(torch.relu(self.attention(x, x, x)[0]))


def tokens(batch=4):
    return torch.randint(0, 11, (batch, 5), generator=torch.Generator().manual_seed(batch))


def prepared(policy):
    torch.manual_seed(0)
    embedding = {"match": "Embedding", "weight": {"bits": 8, "codebook": None, "symmetric": True}}
    model = qat.prepare(Net(), {**POLICIES[policy], "rules": [embedding]}, verbose=False)
    qat.calibrate(model, [tokens(16)])
    return model.eval()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_of_a_frozen_model_has_its_bits_for_other_batches_and_after_a_file(policy, grad):
    model, file = qat.freeze(prepared(policy)), io.BytesIO()
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.save(torch.jit.trace(model, tokens()), file)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    for batch in (4, 3):
        assert torch.equal(loaded(tokens(batch)), model(tokens(batch)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_meta_device_gives_shapes_and_the_model_comes_back_from_its_state(policy, frozen):
    model = qat.freeze(prepared(policy)) if frozen else prepared(policy)
    empty = copy.deepcopy(model).to("meta")
    assert empty(tokens().to("meta")).shape == (4, 5, 6)
    back = empty.to_empty(device="cpu")
    back.load_state_dict(model.state_dict())
    assert torch.equal(back(tokens()), model(tokens()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frozen", [False, True])
def test_copies_pickles_and_exports_have_the_same_bits(policy, frozen):
    model = qat.freeze(prepared(policy)) if frozen else prepared(policy)
    expected = model(tokens())
    with torch.no_grad():
        exported = torch.export.export(copy.deepcopy(model), (tokens(),)).module()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), exported):
        assert torch.equal(other(tokens()), expected)


def test_a_frozen_model_that_reads_a_weight_is_exported():
    """As T5 asks for its dtype."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, x):
            return self.linear(x.to(self.linear.weight.dtype)) @ self.linear.weight

    model = qat.freeze(qat.prepare(Net(), {"weight": {"bits": 4}}, verbose=False))
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("signed", [True, False])
def test_an_average_made_before_calibration_takes_part_in_it(signed, tmp_path):
    """It copies buffers in place, those that say that step sizes are set and on which grid among them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    qat.prepare(model, {"weight": {"bits": 4}, "activation": {"bits": 4}}, verbose=False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    x = torch.randn(4, 16) if signed else torch.rand(4, 16)
    qat.calibrate(model, [x])
    for _ in range(2):
        with torch.no_grad():
            model[0].activation_quantizer.step_size.mul_(2)
        average.update_parameters(model)
    steps = [part[0].activation_quantizer.step_size.item() for part in (average.module, model)]
    assert steps[0] == pytest.approx(0.75 * steps[1])
    expected = average.eval()(x)
    assert average.module[0].activation_quantizer.spec.signed is signed
    qat.save(qat.freeze(average), tmp_path / "out")
    assert torch.equal(qat.load(tmp_path / "out", model=nn.Sequential(nn.Linear(16, 8)))(x), expected)


def test_a_trace_of_weights_that_lie_as_a_gpu_reads_them_calls_the_operator():
    """A kernel that was launched past torch's dispatcher would leave its first result in the trace."""
    torch.manual_seed(0)
    layer = frozen_linear(random_tensor())
    layer.packed_weight.prepack()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, torch.randn(3, 64))
    assert "qat::int4_linear" in str(traced.graph)
    x = torch.randn(5, 64)
    assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize("averaging", [None, 0.9, 0.999])
def test_averages_of_buffers_leave_those_of_equal_models_alone(averaging):
    """As Lightning's WeightAveraging makes them; None is the plain mean."""
    torch.manual_seed(0)
    policy = {"weight": {"bits": 4, "group_size": 8, "symmetric": False}, "activation": {"bits": 4}}
    model = qat.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), policy, verbose=False)
    qat.calibrate(model, [torch.rand(4, 64)])
    how = None if averaging is None else get_ema_multi_avg_fn(averaging)
    average = AveragedModel(model, multi_avg_fn=how, use_buffers=True)
    for _ in range(20):
        average.update_parameters(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], tensor), name


@pytest.mark.parametrize("policy", ["weights", "3 bits and inputs", "LSQ+", "int8_token"])
def test_a_gradient_of_a_gradient_is_one_error(policy):
    """Also where it would run through nothing but a layer's saved tensors, and torch would leave it out."""
    torch.manual_seed(0)
    model = qat.prepare(nn.Sequential(nn.Linear(16, 4)), POLICIES[policy], verbose=False)
    qat.calibrate(model, [torch.randn(8, 16)])
    x = torch.randn(8, 16, requires_grad=True)
    loss = model(x).sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(qat.QATError, match="no second derivatives"):
        (loss + slope.square().sum()).backward()


def test_a_frozen_layer_has_second_derivatives():
    layer = frozen_linear(random_tensor())
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("policy", POLICIES)
def test_transforms_of_torch_func_are_one_error_and_traces_say_that_they_cannot_be_saved(policy):
    model = prepared(policy)
    with pytest.raises(qat.QATError, match=r"torch.func's transforms \(vmap"):
        torch.vmap(model.head)(torch.randn(4, 16))
    with pytest.raises(qat.QATError, match=r"torch.func's transforms \(vmap"):
        torch.func.grad(lambda x: model.head(x).sum())(torch.randn(4, 16))
    with pytest.warns(UserWarning, match=r"cannot be saved: trace the model after qat\.freeze"):
        torch.jit.trace(model, tokens())


def test_an_average_a_little_off_whole_zero_points_ships_what_it_computes():
    torch.manual_seed(0)
    policy = {"weight": {"bits": 4, "group_size": 8, "symmetric": False}}
    model = qat.prepare(nn.Sequential(nn.Linear(64, 32)), policy, verbose=False)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(50):
        average.update_parameters(model)
    off, x = average.module[0].weight_quantizer.zero_point, torch.randn(4, 64)
    assert not torch.equal(off, off.round())
    trained = average.module(x)
    assert torch.equal(qat.freeze(average.module)(x), trained)


def test_the_mean_of_two_models_states_ships_what_it_computes():
    torch.manual_seed(0)
    policy, x = {"weight": {"bits": 4, "group_size": 8, "symmetric": False}}, torch.randn(4, 64)
    model, other = (qat.prepare(nn.Sequential(nn.Linear(64, 32)), policy, verbose=False) for _ in range(2))
    states = model.state_dict(), other.state_dict()
    mean = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    assert (mean["0.weight_quantizer.zero_point"] % 1 == 0.5).any()
    model.load_state_dict(mean)
    trained = model(x)
    assert torch.equal(qat.freeze(model)(x), trained)


@pytest.mark.parametrize("kind", ["prepared", "frozen", "joint", "qa_lora"])
def test_one_vector_has_the_gradients_of_a_batch_of_one(kind):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 4))
    policy = qat.QuantPolicy.from_dict({"weight": {"bits": 4, "group_size": 8}})
    if kind == "joint":
        joint_lora(layer, policy, rank=2, alpha=4.0)
    elif kind == "qa_lora":
        qa_lora(layer, policy, rank=2, alpha=4.0)
    else:
        qat.prepare(layer, policy, verbose=False)
        layer = qat.freeze(layer) if kind == "frozen" else layer
    layer[0].bias.requires_grad_()
    x, found = torch.randn(16, requires_grad=True), []
    for shape in ((16,), (1, 16)):
        layer(x.view(shape)).square().sum().backward()
        learning = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        found.append([parameter.grad for parameter in learning])
        for parameter in learning:
            parameter.grad = None
    assert len(found[0]) == {"prepared": 4, "frozen": 2, "joint": 5, "qa_lora": 4}[kind]
    torch.testing.assert_close(*found)


def test_transforms_of_torch_func_run_a_frozen_weight():
    layer, x = frozen_linear(random_tensor()), torch.randn(3, 64, dtype=torch.float64)
    weight = layer.packed_weight.dequantize(torch.float64)
    assert torch.equal(torch.func.jacrev(layer)(x[0]), weight)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), weight)
    slopes = torch.vmap(torch.func.grad(lambda row: layer(row).square().sum() / 2))(x)
    torch.testing.assert_close(slopes, layer(x) @ weight)
    whole = torch.autograd.functional.jacobian(layer, x[0], vectorize=True)
    torch.testing.assert_close(whole, weight)


class InPlace(nn.Module):
    """Changes what each layer gives, or a copy of it."""

    def __init__(self, copied):
        super().__init__()
        self.copied = copied
        self.embedding, self.first, self.last = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 6)

    def forward(self, x):
        for layer in (self.embedding, self.first, self.last):
            x = layer(x)
            x = x.clone() if self.copied else x
            x += 1
            x.relu_()
        return x


class Lora(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.a, self.b = layer, nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return lora_product(x, self.layer, self.a, self.b, 0.5)


@pytest.mark.parametrize("kind", [*POLICIES, "frozen", "joint", "qa_lora", "lora"])
def test_what_a_layer_gives_may_be_changed_in_place(kind):
    """Of three dimensions it is a view inside, which torch would not let anybody change."""
    found = []
    for copied in (False, True):
        torch.manual_seed(0)
        model = InPlace(copied)
        rules = [{"match": "Embedding", "weight": {"bits": 8, "codebook": None, "symmetric": True}}]
        made = POLICIES.get(kind, POLICIES["weights"]) | {"rules": [] if kind == "qa_lora" else rules}
        policy = qat.QuantPolicy.from_dict(made)
        if kind in ("joint", "qa_lora"):
            adapt = joint_lora if kind == "joint" else qa_lora
            adapt(model, policy, rank=2, alpha=4.0)
        else:
            qat.prepare(model, policy, verbose=False)
            model.copied = True
            qat.calibrate(model, [tokens(16)])
            model.copied = copied
        if kind in ("frozen", "lora"):
            qat.freeze(model)
        if kind == "lora":
            model.last = Lora(model.last)
        x = torch.randn(4, 5, 16, requires_grad=True)
        model.embedding.register_forward_hook(lambda *call, x=x: call[-1].add_(x))
        y = model(tokens())
        y.square().sum().backward()
        found.append([y, x.grad, *(each.grad for each in model.parameters() if each.requires_grad)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_a_compiled_layer_gives_may_be_changed_in_place(backend):
    torch.manual_seed(0)
    model, x = qat.prepare(InPlace(copied=False), POLICIES["weights"], verbose=False), tokens()
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend=backend)(x)
    assert torch.equal(found, model(x))
    found.sum().backward()


QUANTIZERS = [
    *POLICIES.values(),
    {"weight": {"codebook": "custom", "bits": 3}},
    {"weight": {"bits": 2, "symmetric": False, "zero_point_dtype": "float16"}, "init": "hqq"},
    {"weight": {"bits": 3}, "activation": {"bits": 3}, "init": "mse"},
    {"weight": {"bits": 3}, "activation": {"bits": 3, "symmetric": False}, "init": "mse"},
    {"weight": {"bits": 3}, "activation": {"bits": 3}, "activation_quantizer": "minmax"},
    {"weight": {"bits": 3}, "activation": {"bits": 3, "symmetric": False}, "activation_quantizer": "minmax"},
    {"weight": {"bits": 3, "group_size": 8}, "init": "awq"},
    {"weight": {"bits": 3}, "init": "blockwise"},
    "joint",
    "qa_lora",
]


def shipped(policy, folder, set_default):
    """Train a model that was built in float32 on the CPU, where torch then has other defaults; return its artifact."""
    torch.manual_seed(0)
    model, fresh = (nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4)) for _ in range(2))
    x, adapt = torch.randn(16, 16), {"joint": joint_lora, "qa_lora": qa_lora}.get(str(policy))
    set_default()
    try:
        if adapt:
            adapt(model, qat.QuantPolicy.from_dict({"weight": {"bits": 4, "group_size": 8}}), rank=2, alpha=4.0)
        else:
            qat.calibrate(qat.prepare(model, policy, verbose=False), [x], verbose=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
        qat.save(qat.freeze(model), folder, example=x)
        assert torch.equal(qat.load(folder, model=fresh)(x), model(x))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", QUANTIZERS, ids=str)
def test_torchs_default_dtype_changes_nothing(policy, dtype, tmp_path):
    found = shipped(policy, tmp_path / "found", lambda: torch.set_default_dtype(dtype))
    assert found == shipped(policy, tmp_path / "expected", lambda: None)


@pytest.mark.parametrize("policy", QUANTIZERS, ids=str)
def test_torchs_default_device_changes_nothing(policy, tmp_path):
    """The meta device stands for a GPU: what is made there by mistake is missed."""
    found = shipped(policy, tmp_path / "found", lambda: torch.set_default_device("meta"))
    assert found == shipped(policy, tmp_path / "expected", lambda: None)
