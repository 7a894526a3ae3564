"""The product of rounded operands: bits, gradients and saved tensors against the composition of single operators."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import qat
from qat import QuantPolicy, QuantSpec, traced
from qat.errors import LayerError
from qat.layers import product as products
from qat.quantizers import lsq_plus
from qat.spec import Dynamic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = [
    None,
    {"bits": 4, "group_size": 8},
    {"bits": 3, "granularity": "channel"},
    {"granularity": "tensor"},
    {"bits": 4, "group_size": 8, "symmetric": False},
    {"granularity": "channel", "symmetric": False, "zero_point_dtype": "float16"},
]
INPUTS = [None, {"bits": 8}, {"bits": 4, "signed": False}, {"bits": 4, "symmetric": False}, "pact"]
LEARNED = "step_size", "offset"
LINEAR_INPUTS = [*INPUTS, *Dynamic]


def prepared(layer, weight, activation, x):
    """Return the layer with step sizes off the stored grid."""
    if isinstance(activation, Dynamic):
        policy = QuantPolicy(weight=weight, dynamic=activation.value)
    elif activation == "pact":
        policy = QuantPolicy(weight=weight, activation={"bits": 4}, activation_quantizer="pact")
    else:
        policy = QuantPolicy(weight=weight, activation=activation)
    qat.calibrate(qat.prepare(layer, policy, verbose=False), [x.float().to(layer.weight.dtype)])
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(LEARNED):
                parameter.mul_(1.0123)
    return layer


def composed(layer, x):
    """Do what the layer does, by single operators that keep what each needs."""
    x = x if layer.activation_quantizer is None else layer.activation_quantizer(x)
    weight = layer.weight if layer.weight_quantizer is None else layer.weight_quantizer(layer.weight)
    return (
        layer._conv_forward(x, weight, layer.bias) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, layer.bias)
    )


def results(layer, run, x, autocast=False):
    """Return the output and every gradient."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = run(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    return y.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())


def assert_like_the_composition(layer, x, autocast=False):
    """All bits; but the sums for step sizes, which fused kernels may add up in another order."""
    mine, theirs = results(layer, layer, x, autocast), results(layer, lambda x: composed(layer, x), x, autocast)
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    for name, one, other in zip(names, mine, theirs, strict=True):
        if name.endswith(LEARNED) and DEVICE != "cpu":
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
        else:
            assert one.dtype == other.dtype and torch.equal(one, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", LINEAR_INPUTS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_linear(weight, activation, dtype):
    if weight is None and activation not in INPUTS[1:]:
        return  # a policy has no such thing
    x = torch.randn(2, 5, 32, device=DEVICE, dtype=dtype)
    layer = prepared(nn.Linear(32, 6, device=DEVICE, dtype=dtype), weight, activation, x)
    assert_like_the_composition(layer, x)
    assert_like_the_composition(layer, x[0])


@pytest.mark.parametrize("weight", WEIGHTS[1:], ids=str)
@pytest.mark.parametrize("activation", INPUTS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups, channels_last, activation, weight):
    layer = nn.Conv2d(16, 6, 3, stride=2, padding=1, groups=groups, device=DEVICE)
    x = torch.randn(2, 16, 7, 6, device=DEVICE)
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert_like_the_composition(prepared(layer, weight, activation, x), x)


@pytest.mark.parametrize("padding", ["same", "valid", (1, 1)])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_padding(padding, mode):
    """On a CPU: the gradient of reflection padding is not deterministic on a GPU."""
    x = torch.randn(2, 8, 7, 7)
    layer = nn.Conv2d(8, 4, 3, padding=padding, padding_mode=mode)
    assert_like_the_composition(prepared(layer, {"bits": 4}, {"bits": 4}, x), x)


@pytest.mark.parametrize("activation", LINEAR_INPUTS, ids=str)
def test_autocast(activation):
    """fp32 weights: the rounded ones are made in bf16 at once, which is the same bits."""
    x = torch.randn(4, 32, device=DEVICE)
    layer = prepared(nn.Linear(32, 6, device=DEVICE), {"bits": 4, "group_size": 8}, activation, x)
    assert_like_the_composition(layer, x, autocast=True)
    conv = prepared(nn.Conv2d(8, 4, 3, device=DEVICE), {"bits": 4}, {"bits": 4}, torch.randn(2, 8, 6, 6, device=DEVICE))
    assert_like_the_composition(conv, torch.randn(2, 8, 6, 6, device=DEVICE), autocast=True)


def kept_bytes(run, x):
    """Return the bytes that autograd keeps for the backward of one forward, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x.clone().requires_grad_()).sum()
    return sum(storages.values())


@pytest.mark.parametrize("weight", [{"group_size": 32}, {"group_size": 32, "symmetric": False}], ids=str)
@pytest.mark.parametrize("activation", LINEAR_INPUTS, ids=str)
def test_it_keeps_what_the_plain_layer_keeps(activation, weight):
    x = torch.randn(64, 64, device=DEVICE)
    plain = nn.Linear(64, 64, device=DEVICE)
    plain_bytes = kept_bytes(plain, x)
    layer = prepared(plain, weight, activation, x)
    zero_points = layer.weight_quantizer.zero_points()
    small = [p for name, p in layer.named_parameters() if name.endswith(LEARNED)]
    small += [] if zero_points is None else [zero_points]
    assert kept_bytes(layer, x) == plain_bytes + sum(p.numel() * p.element_size() for p in small)
    assert kept_bytes(lambda x: composed(layer, x), x) > plain_bytes + x.numel() * 4


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_weight_lets_go_of_the_input(bias):
    """As the plain layer's does: only the weight's gradient takes it, and it may be changed."""
    x, layer = torch.randn(64, 64, device=DEVICE), nn.Linear(64, 64, device=DEVICE)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(bias)
    plain_bytes = kept_bytes(layer, x)
    layer = prepared(layer, {"group_size": 32}, None, x)
    layer.weight_quantizer.requires_grad_(False)
    steps = layer.weight_quantizer.step_size
    assert kept_bytes(layer, x) == plain_bytes + steps.numel() * 4 < x.numel() * 4 * 2
    start = x.clone().requires_grad_()
    x = start * 1
    y = layer(x)
    x += 1
    y.sum().backward()
    expected = layer.weight_quantizer(layer.weight).sum(0).expand(64, -1)
    torch.testing.assert_close(start.grad, expected)


@pytest.mark.parametrize("frozen", ["weight", "bias", "step_size", "x"])
def test_frozen_parameters(frozen):
    x = torch.randn(4, 32, device=DEVICE)
    layer = prepared(nn.Linear(32, 6, device=DEVICE), {"bits": 4, "group_size": 8}, {"bits": 8}, x)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in name)
    y = layer(x.requires_grad_(frozen != "x"))
    y.sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == [
        name for name, _ in layer.named_parameters() if frozen in name
    ]
    assert (x.grad is None) == (frozen == "x")


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast):
    """One graph, without a break, and the same bits as eager."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8), nn.Linear(8, 8), nn.Linear(8, 4)
    ).to(DEVICE)
    policy = QuantPolicy(
        weight=QuantSpec(bits=4, group_size=8),
        activation={"bits": 8},
        rules=[
            {"match": "0", "weight": {"granularity": "channel"}},
            {"match": "4", "weight": WEIGHTS[-1], "activation": None},
            {"match": "5", "weight": WEIGHTS[-2], "activation": INPUTS[3]},
        ],
    )
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    qat.calibrate(qat.prepare(model, policy, verbose=False), [x])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(results(model, model, x, autocast), results(model, compiled, x, autocast), strict=True):
        assert torch.equal(one, other)


def test_compiled_dynamic_rounding():
    model = nn.Linear(32, 8, device=DEVICE)
    x = torch.randn(3, 4, 32, device=DEVICE)
    for kind in Dynamic:
        layer = prepared(nn.Linear(32, 8, device=DEVICE), {"bits": 4, "group_size": 8}, kind, x)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for one, other in zip(results(layer, layer, x), results(layer, compiled, x), strict=True):
            assert torch.equal(one, other)
    assert products.product(x, model.weight, None, None, None).shape == (3, 4, 8)


class Keeping(torch.fx.Interpreter):
    """Runs a graph, and keeps the operators of ours in it with what they are given."""

    def __init__(self, graph, calls):
        super().__init__(graph)
        self.calls = calls

    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", "") == "qat":
            self.calls.append((target, args))
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [(kind, activation) for kind in ("linear", "half linear") for activation in LINEAR_INPUTS]
    + [(kind, activation) for kind in ("convolution", "channels last") for activation in INPUTS],
    ids=str,
)
def test_operators(monkeypatch, kind, activation):
    """A compiled layer is an operator each way, which keep what torch asks of operators, and give the bits of eager."""
    monkeypatch.setattr(traced, "takes", lambda x, rounding: False)  # as on a GPU
    weight, x = {"granularity": "channel"}, torch.randn(2, 4, 6, 32, device=DEVICE)
    layer = nn.Conv2d(4, 6, 3, padding=1, device=DEVICE)
    if "linear" in kind:
        weight, layer = {"bits": 4, "group_size": 8, "symmetric": False}, nn.Linear(32, 8, bias=False, device=DEVICE)
    if kind == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if "half" in kind:
        x, layer = x.bfloat16(), layer.bfloat16()
    layer = prepared(layer, weight, activation, x)
    torch._dynamo.reset()
    calls = []
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(Keeping(graph, calls).run))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for one, other in zip(results(layer, layer, x), results(layer, compiled, x), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
    assert [operator.name() for operator, _ in calls] == ["qat::product_value", "qat::product_gradients"]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_mixed_dtypes_are_refused():
    x = torch.randn(4, 32, device=DEVICE)
    layer = prepared(nn.Linear(32, 6, device=DEVICE), {"bits": 4, "group_size": 8}, None, x)
    with pytest.raises(LayerError, match=r"torch\.bfloat16.*autocast"):
        layer(x.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
@pytest.mark.parametrize("activation", [None, *INPUTS[1::2], Dynamic.int8_token], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_on_a_gpu(symmetric, activation, mode):
    """Fused kernels in place of the reference, eager, compiled and replayed from a CUDA graph: the same bits."""
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    layer = nn.Linear(1024, 768, device="cuda", dtype=torch.bfloat16)
    layer = prepared(layer, {"bits": 4, "group_size": 128, "symmetric": symmetric}, activation, x)
    torch._dynamo.reset()
    run = layer if mode is None else torch.compile(layer, fullgraph=True, mode=mode)
    expected = results(layer, layer, x)
    assert_like_the_composition(layer, x)
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    for _ in range(3):
        for name, one, other in zip(names, results(layer, run, x), expected, strict=True):
            if name == "activation_quantizer.step_size":  # Inductor adds it up in its own order
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
            else:
                assert torch.equal(one, other), name


class NothingIsRead(TorchDispatchMode):
    """Fails where a value of a tensor becomes a number or a truth."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", LINEAR_INPUTS, ids=str)
def test_no_value_is_read(activation, monkeypatch):
    """On a GPU the host would wait for it. A CPU's bounds are read, and are left as they are here, as on a GPU."""
    monkeypatch.setattr(lsq_plus, "bounds", lambda low, high: (low, high))
    x = torch.randn(4, 32, device=DEVICE)
    layer = prepared(nn.Linear(32, 6, device=DEVICE), {"bits": 4, "group_size": 8}, activation, x)
    with NothingIsRead():
        layer(x.requires_grad_()).sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", LINEAR_INPUTS, ids=str)
def test_the_host_never_waits(activation):
    """From the second step on: a value read back from the GPU would be an error here."""
    x = torch.randn(64, 64, device="cuda")
    layer = prepared(nn.Linear(64, 64, device="cuda"), {"bits": 4, "group_size": 32}, activation, x)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            layer(x.clone().requires_grad_()).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_activation_checkpointing():
    """Rounded again in the recomputed forward, with the same bits."""
    x = torch.randn(4, 32, device=DEVICE)
    model = nn.Sequential(nn.Linear(32, 16, device=DEVICE), nn.ReLU(), nn.Linear(16, 8, device=DEVICE))
    policy = QuantPolicy(weight={"bits": 4, "group_size": 8}, activation={"bits": 8})
    qat.calibrate(qat.prepare(model, policy, verbose=False), [x])
    for reentrant in (False, True):
        checkpointed = lambda x, reentrant=reentrant: checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
        for one, other in zip(results(model, model, x), results(model, checkpointed, x), strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_inductor(channels_last):
    """Convolution and linear layers in one compiled graph with Inductor's own layouts: the bits of eager."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 8))
    policy = QuantPolicy(weight={"bits": 4}, activation={"bits": 8})
    x = torch.randn(2, 4, 6, 6)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    qat.calibrate(qat.prepare(model, policy, verbose=False), [x])
    torch._dynamo.reset()
    mine, compiled = results(model, model, x), results(model, torch.compile(model, fullgraph=True), x)
    for one, other in zip(mine, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
