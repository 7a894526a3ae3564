"""Run: python -m pytest tests/test_int4_after_norm.py; ``-m gpu`` needs a Hopper GPU for the kernel itself."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from qat.kernels import int4_after_norm as module
from qat.kernels.int4_layout import prepack
from qat.kernels.int4_plans import Decode, Stream, heuristic

from qat.errors import LayerError
from qat.numerics import dequantize
from qat.packing import pack

DTYPES = [torch.bfloat16, torch.float16]


def make(n, k, group, dtype, with_zero=False, device="cpu"):
    """Return a weight for the kernels, and its values in float64."""
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    scale = (torch.rand(n, k // group, device=device) * 0.01 + 0.01).bfloat16().to(dtype)
    zero_point = torch.randint(-8, 8, scale.shape, device=device).to(torch.int8) if with_zero else None
    dense = dequantize(codes, scale, dtype, zero_point).double()
    return prepack(pack(codes, 4), scale, zero_point, k, group), dense


def in_float64(x, update, norm, dense, bias, gated, dtype):
    """Return h, the input of the product rounded to ``dtype`` as a kernel rounds it, and what is made of it."""
    h = x if update is None else x + update
    y = F.rms_norm(h.double(), norm.shape, norm.double(), 1e-5).to(dtype).double() @ dense.T
    y = y if bias is None else y + bias.double()
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return h, y


def check(n, k, group, dtype, tokens, device, with_zero, with_bias, with_update, gated):
    weight, dense = make(n, k, group, dtype, with_zero, device)
    x, update = (torch.randn(tokens, k, device=device).to(dtype) for _ in range(2))
    norm, bias = (torch.rand(size, device=device).to(dtype) for size in (k, n))
    bias, update = bias if with_bias else None, update if with_update else None
    function = module.norm_gated if gated else module.norm_linear
    h, y = function(x, update, norm, 1e-5, weight, bias)
    exact_h, exact = in_float64(x, update, norm, dense, bias, gated, dtype)
    assert torch.equal(h, exact_h) and y.shape == exact.shape and y.dtype == dtype
    # Gate and up are rounded before they are multiplied, and an input may be rounded to its other neighbour.
    bound = (3 if gated else 1.5) * torch.finfo(dtype).eps
    assert (y.double() - exact).norm() <= bound * exact.norm()
    again = function(x, update, norm, 1e-5, weight, bias)
    assert torch.equal(again[0], h) and torch.equal(again[1], y)
    if gated:
        product = module.norm_linear(x, update, norm, 1e-5, weight, bias)[1]
        assert torch.equal(y, module.gated_silu(product))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_one_after_the_other(tokens, with_update, gated):
    check(64, 96, 32, torch.bfloat16, tokens, "cpu", False, with_update, with_update, gated)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "group", "with_zero", "with_bias", "with_update"),
    [
        (6144, 4096, 128, False, False, True),
        (28672, 4096, 128, False, True, False),
        (992, 14336, 128, True, False, True),
        (4256, 2048, 32, True, True, True),
        (224, 1504, 1504, False, True, True),
    ],
)
def test_in_one_kernel_on_gpu(monkeypatch, n, k, group, with_zero, with_bias, with_update, dtype, gated):
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if hopper:  # whatever a table says
        monkeypatch.setattr(module.int4_run, "_plans", {})
        monkeypatch.setattr(module.int4_run, "choose", lambda *shape: heuristic(*shape[:3], *shape[4:6]))
    torch.manual_seed(0)
    weight, _ = make(n, k, group, dtype, with_zero, "cuda")
    x = torch.zeros(1, k, dtype=dtype, device="cuda")
    assert not hopper or module._plan(x, (), weight, gated) is not None
    check(n, k, group, dtype, 1, "cuda", with_zero, with_bias, with_update, gated)


@pytest.mark.gpu
def test_a_codebook_on_gpu():
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (992, 4096), dtype=torch.int8, device="cuda")
    levels = torch.randn(16, device="cuda").sort().values
    weight = prepack(pack(codes, 4), torch.rand(992, 64, device="cuda"), None, 4096, 64, levels)
    x, norm = torch.randn(1, 4096, device="cuda").bfloat16(), torch.rand(4096, device="cuda").bfloat16()
    for function, gated in ((module.norm_linear, False), (module.norm_gated, True)):
        made = function(x, x, norm, 1e-5, weight)
        torch.testing.assert_close(made, module.reference(x, x, norm, 1e-5, weight, None, gated))


def test_the_operator_is_registered_as_torch_wants_it():
    weight, _ = make(32, 64, 32, torch.bfloat16)
    x, norm = torch.randn(2, 64).bfloat16(), torch.rand(64).bfloat16()
    for gated in (False, True):
        arguments = x, None, norm, 1e-5, *weight.tensors(), None, *weight.sizes(), gated
        checks = "test_schema", "test_faketensor"  # it has no gradient
        torch.library.opcheck(torch.ops.qat.norm_linear.default, arguments, test_utils=checks)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("with_update", [False, True])
def test_arguments_are_in_the_kernels_order(monkeypatch, with_update, gated):
    pytest.importorskip("triton")
    from stand_in_kernels import Kernel, pass_for_a_gpu

    pass_for_a_gpu(monkeypatch)
    names, kernel, plan = module.norm_stream_kernel.arg_names, Kernel(), Stream(8, 2, 3, 4, 3)
    monkeypatch.setattr(module, "norm_stream_kernel", kernel)
    monkeypatch.setattr(module, "_plan", lambda *arguments: plan)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    weight, _ = make(96, 128, 32, torch.bfloat16, True)
    x, update, norm, bias = (torch.zeros(size).bfloat16() for size in ((1, 128), (1, 128), 128, 96))
    function = module.norm_gated if gated else module.norm_linear
    h, y = function(x, update if with_update else None, norm, 0.5, weight, bias)
    ((grid, arguments, options, _),) = kernel.launches
    named = dict(zip(names, arguments, strict=True))
    tensors = {"x": x, "update": update if with_update else x, "norm": norm, "words": weight.words}
    tensors |= {"scale": weight.scale, "zero": weight.zero_point, "bias": bias, "h": h, "y": y}
    assert all(named[f"{name}_ptr"].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    assert grid == (4, 1, 1) and options == {"num_warps": 8, "launch_pdl": True} and named["eps"] == 0.5
    assert h.shape == (1, 128) and y.shape == (1, 48 if gated else 96)
    sizes = {"N": 96, "K": 128, "row_blocks": 6, "tiles": 2, "groups": 4, "GROUP": 32, "HALVES": 2}
    flags = {"HAS_UPDATE": with_update, "PARTS": 1 + gated, "HAS_ZERO": True, "HAS_LEVELS": False, "HAS_BIAS": True}
    constants = {"WHOLE": False, "STEPS": 1, "WARPS": 8, "TILES": 2, "STAGES": 3, "EARLY": 3}
    assert {name: named[name] for name in (*sizes, *flags, *constants)} == sizes | flags | constants


def test_what_does_not_fit_is_named():
    weight, _ = make(32, 64, 32, torch.bfloat16)
    x, norm, short = torch.zeros(2, 64).bfloat16(), torch.ones(64).bfloat16(), torch.ones(63).bfloat16()
    for message, arguments in (
        ("x has shape .* in_features=64", (x[:, :32], None, norm, None)),
        (r"x has shape \(1, 2, 64\): .*\(tokens, 64\)", (x[None], None, norm, None)),
        ("x is torch.float64", (x.double(), None, norm, None)),
        (r"update is .*\(1, 64\).*\(2, 64\)", (x, x[:1], norm, None)),
        ("update is torch.float32 .*torch.bfloat16", (x, x.float(), norm, None)),
        (r"norm is .*\(63,\).*\(64,\)", (x, None, short, None)),
        ("norm is torch.float32 .*torch.bfloat16", (x, None, norm.float(), None)),
        (r"norm is .*on meta: .*on cpu", (x, None, norm.to("meta"), None)),
        (r"bias has shape \(63,\): 32 outputs", (x, None, norm, short)),
        ("bias is on meta and x on cpu", (x, None, norm, norm[:32].to("meta"))),
    ):
        with pytest.raises(LayerError, match=message):
            module.norm_linear(*arguments[:3], 1e-5, weight, arguments[3])
    with pytest.raises(LayerError, match="31 outputs"):
        module.norm_gated(x, None, norm, 1e-5, make(31, 64, 32, torch.bfloat16)[0])


def test_a_compiled_call_is_checked_as_well():
    weight, _ = make(32, 64, 32, torch.bfloat16)
    x, norm = torch.zeros(2, 64).bfloat16(), torch.ones(64)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(LayerError, match="norm is"):
        module.norm_linear(x, None, norm, 1e-5, weight)


def test_when_the_kernel_runs(monkeypatch):
    pytest.importorskip("triton")
    from stand_in_kernels import pass_for_a_gpu

    pass_for_a_gpu(monkeypatch)
    weight, _ = make(96, 128, 32, torch.bfloat16)
    x = torch.zeros(1, 128).bfloat16()
    stream = Stream(8, 1, 2, 132, 1)
    monkeypatch.setattr(module.int4_run, "choose", lambda *shape: stream)

    def plan(x=x, others=(x, None), weight=weight, gated=False):
        return module._plan(x, others, weight, gated)

    assert plan() == plan(gated=True) == stream._replace(early=3)
    assert plan(x=torch.zeros(2, 128).bfloat16()) is None  # two tokens
    assert plan(weight=weight._replace(out_features=80), gated=True) is None  # a gate's row block is cut in the middle
    assert plan(weight=weight._replace(nest=torch.zeros(1))) is None  # scales are made just before
    assert plan(others=(torch.zeros(1, 129).bfloat16()[:, 1:],)) is None  # no multiple of 16 bytes
    assert plan(x=torch.zeros(1, 136).bfloat16(), weight=make(96, 136, 136, torch.bfloat16)[0]) is None
    for other in (stream._replace(early=0), Decode(4, 2, 8, 4, 3, 1)):
        monkeypatch.setattr(module.int4_run, "_plans", {})
        monkeypatch.setattr(module.int4_run, "choose", lambda *shape, other=other: other)
        assert plan() is None
    monkeypatch.setattr(module.int4_run, "suits_nvidia", lambda x, weight: False)  # a GPU of AMD, say
    monkeypatch.setattr(module.int4_run, "_plans", {})
    monkeypatch.setattr(module.int4_run, "choose", lambda *shape: stream)
    assert plan() is None
