"""Run: python -m pytest tests/test_int4_ahead.py: what is compiled ahead is what calls then launch, with stand-ins."""

import contextlib

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from qat.kernels import int4_ahead, int4_batch, int4_decode, int4_few, int4_portable, int4_run, int4_stream
from qat.kernels.int4_ahead import Product, compile_ahead, meta_weight
from qat.kernels.int4_plans import Batch, Decode, Dequantize, Few, Stream

import qat
from qat.ahead import compiled_ahead, products
from qat.formats import native

PLANS = [
    Decode(4, 2, 8, 4, 3, 1),
    Stream(8, 1, 3, 132, 3),
    Few(8, 1, 3, 132, 1, 3),
    Few(8, 1, 3, 66, 2, 1),
    Batch(8, 64, 8, 2, 4, 1, 2),
    Batch(4, 64, 8, 2, 4, 2, 2),
    Dequantize(),
]


class Kernel:
    """Keeps what it is compiled and launched for."""

    def __init__(self):
        self.warm, self.cold, self.run = [], [], None

    def warmup(self, *arguments, grid, **options):
        self.warm.append((grid, *map(kind, arguments), options))
        return self

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.cold.append((grid, *map(kind, arguments), options))


def kind(argument):
    """Return what Triton compiles a kernel for, and the values of integers."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.data_ptr() % 16
    return argument


@pytest.fixture
def kernels(monkeypatch):
    """Stand in for every kernel, and let a CPU pass for a Hopper GPU."""
    found = {}
    owners = {
        "decode_kernel": int4_decode,
        "stream_kernel": int4_stream,
        "few_kernel": int4_few,
        "batch_kernel": int4_batch,
        "sum_parts_kernel": int4_portable,
        "dequantize_kernel": int4_portable,
    }
    for name, owner in owners.items():
        found[name] = Kernel()
        monkeypatch.setattr(owner, name, found[name])
    monkeypatch.setattr(int4_batch, "descriptor", lambda x, block_m: (kind(x), block_m))
    monkeypatch.setattr(int4_run, "limits", lambda index: ("a GPU", 90, 132))
    monkeypatch.setattr(int4_run, "_kernels", {})
    monkeypatch.setattr(int4_run, "_plans", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: contextlib.nullcontext())
    return found


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", [1024, 1032])
@pytest.mark.parametrize("scheme", ["symmetric", "zero points", "table"])
def test_the_kernels_that_a_call_launches(kernels, monkeypatch, scheme, inputs, bias, plan):
    monkeypatch.setattr(int4_run, "choose", lambda *shape: plan)
    table, zero_point = scheme == "table", torch.int8 if scheme == "zero points" else None
    scale = torch.float32 if table else torch.bfloat16
    product = Product(96, inputs, inputs, scale, zero_point, table, bias, torch.bfloat16)
    wanted = 2 if isinstance(plan, Batch | Few) and plan.split > 1 else 1
    tokens = 1 if isinstance(plan, Stream) else 5 if isinstance(plan, Few) else 70
    assert compile_ahead([product], [tokens], None) == wanted
    weight = meta_weight(product)
    weight = weight._replace(
        **{n: torch.zeros_like(t, device="cpu") for n, t in weight._asdict().items() if isinstance(t, torch.Tensor)}
    )
    x = torch.zeros(tokens, -(-inputs // 16) * 16).bfloat16()
    int4_run.run_plan(plan, x, weight, torch.zeros(96).bfloat16() if bias else None)
    launched = {name: kernel.cold for name, kernel in kernels.items() if kernel.cold}
    assert len(launched) == wanted
    for name, kernel in kernels.items():
        assert kernel.warm == kernel.cold, name


def test_one_kernel_for_each_product_and_number_of_tokens(kernels, monkeypatch):
    monkeypatch.setattr(int4_run, "choose", lambda tokens, *shape: PLANS[0] if tokens < 9 else PLANS[5])
    fits = Product(96, 1024, 32, torch.bfloat16, None, False, False, torch.bfloat16)
    compile_ahead([fits, fits._replace(out_features=32), fits._replace(scale=torch.float32)], [1, 70], None)
    assert [len(kernel.warm) for kernel in kernels.values()] == [
        2,
        0,
        0,
        2,
        2,
        0,
    ]  # a float32 scale is for another kernel


SPECS = [
    qat.QuantSpec(group_size=32),
    qat.QuantSpec(group_size=32, symmetric=False),
    qat.QuantSpec(granularity="channel", scale_dtype="float16"),
    qat.QuantSpec(codebook="nf4", group_size=64),
    qat.QuantSpec(codebook="nf4_double", group_size=64),
    qat.QuantSpec(group_size=24),
    qat.QuantSpec(bits=3, group_size=32),
]


@pytest.mark.parametrize("spec", SPECS)
def test_products_are_those_of_the_layers(tmp_path, spec):
    model = nn.Sequential(nn.Linear(192, 48), nn.Linear(48, 192, bias=False), nn.Linear(192, 48))
    rules = [{"match": "1", "weight": None}]
    frozen = qat.freeze(qat.prepare(model, qat.QuantPolicy(weight=spec, rules=rules), verbose=False))
    qat.save(frozen, tmp_path / "out")
    found = products(native.read(tmp_path / "out"))
    packed = frozen[0].packed_weight
    packed.prepack()
    if not packed.gpu_operands or spec.codebook == "nf4_double":
        assert not found
        return
    (product,) = found  # the third layer is like the first
    weight, meta = packed.gpu_operands[product.dtype], meta_weight(product)
    assert product.bias and product.dtype != torch.float32
    for one, other in zip(weight, meta, strict=True):
        if isinstance(one, torch.Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        else:
            assert one == other


def test_a_model_is_read_meanwhile(tmp_path, monkeypatch):
    frozen = qat.freeze(qat.prepare(nn.Sequential(nn.Linear(64, 32)), qat.QuantPolicy(weight=SPECS[0]), verbose=False))
    qat.save(frozen, tmp_path / "out")
    calls = []
    monkeypatch.setattr(int4_ahead, "compile_ahead", lambda *arguments: calls.append(arguments))
    like = nn.Sequential(nn.Linear(64, 32))
    assert torch.equal(qat.load(tmp_path / "out", like, tokens=(1, 8))[0].weight, frozen[0].weight)
    assert not calls  # there is nothing to compile for a CPU
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with compiled_ahead(native.read(tmp_path / "out"), (8, 1, 8), "cuda:3"):
        pass
    ((found, tokens, device),) = calls
    assert len(found) == 1 and tokens == [1, 8] and device == 3

    def fails(*arguments):
        raise ValueError("no such kernel")

    monkeypatch.setattr(int4_ahead, "compile_ahead", fails)
    with (
        pytest.raises(ValueError, match="no such kernel"),
        compiled_ahead(native.read(tmp_path / "out"), (1,), "cuda:0"),
    ):
        pass


@pytest.mark.gpu
def test_calls_on_a_gpu_after_compiling_ahead(tmp_path):
    """Nothing is compiled by calls, and repeats from other addresses, streams and graphs have the right values."""
    from qat.kernels.int4_linear import int4_dequantize, int4_linear

    tokens = (1, 32, 70, 300)
    layer = nn.Sequential(nn.Linear(1024, 1024, device="cuda", dtype=torch.bfloat16))
    frozen = qat.freeze(qat.prepare(layer, qat.QuantPolicy(weight=qat.QuantSpec(group_size=128)), verbose=False))
    qat.save(frozen, tmp_path / "out")
    loaded = qat.load(tmp_path / "out", nn.Sequential(nn.Linear(1024, 1024)), "cuda", tokens)[0]
    batch, decode = int4_batch.batch_kernel, int4_decode.decode_kernel
    count = [sum(len(kernels) for kernels, *_ in kernel.device_caches.values()) for kernel in (batch, decode)]
    weight, bias = loaded.packed_weight.gpu_operands[torch.bfloat16], loaded.bias
    matrix = int4_dequantize(weight, torch.bfloat16)
    assert torch.equal(matrix, loaded.packed_weight.quantized_tensor().dequantize(torch.bfloat16))
    assert torch.equal(int4_dequantize(weight, torch.bfloat16), matrix)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        for m in tokens:
            inputs = [torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(20)]
            first = [int4_linear(x, weight, bias) for x in inputs]
            for x, y in zip(inputs, first, strict=True):
                exact = x.double() @ matrix.double().T + bias.double()
                torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-7 * exact.abs().mean().item())
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                again = [loaded(x.clone()[None])[0] for x in inputs]
            torch.cuda.current_stream().wait_stream(stream)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
            static, graph = inputs[0].clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = int4_linear(static, weight, bias)
            for x, wanted in zip(inputs, first, strict=True):
                static.copy_(x)
                graph.replay()
                assert torch.equal(y, wanted)
    assert [sum(len(kernels) for kernels, *_ in kernel.device_caches.values()) for kernel in (batch, decode)] == count
