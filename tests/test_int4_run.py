"""Run: python -m pytest tests/test_int4_run.py: how int4 kernels are launched, with stand-ins for a Hopper GPU."""

import pytest
import torch

pytest.importorskip("triton")
from qat.kernels import int4_batch, int4_few, int4_portable, int4_recipe, int4_run, int4_stream, int8_run
from qat.kernels import int4_linear as module
from qat.kernels.int4_layout import prepack
from qat.kernels.int4_plans import Batch, Decode, Dequantize, Few, Int8, Stream
from qat.kernels.int8_codes import int8_codes
from stand_in_kernels import BATCH_NAMES, FEW_NAMES, INT8_NAMES, NAMES, STREAM_NAMES, Kernel, pass_for_a_gpu, weight

from qat import codebook
from qat.packing import pack


@pytest.fixture
def kernel(monkeypatch):
    return pass_for_a_gpu(monkeypatch)


def test_a_product_with_a_dequantized_weight_ignores_autocast(kernel, monkeypatch):
    monkeypatch.setattr(int4_run, "choose", lambda *shape: Dequantize())
    monkeypatch.setattr(int4_run, "dequantized", module.int4_dequantize_reference)
    w, x, bias = weight(), torch.randn(2, 35, 128).half(), torch.randn(96)
    w = w._replace(scale=w.scale.half())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = module.int4_linear(x, w, bias)
        wanted = torch.nn.functional.linear(x, module.int4_dequantize_reference(w, x.dtype), bias.half())
        assert y.dtype == torch.float16 and torch.equal(y, wanted)
    assert len(int4_recipe._products) == 1


def check_arguments(names, launch, w, x, bias, plan):
    """Check every argument against the kernel's own names for them."""
    _, arguments, options, _ = launch
    named = dict(zip(names, arguments, strict=True))
    constants = plan._asdict()
    if isinstance(plan, Few):
        del constants["split"]
    for name, value in constants.items():
        assert name in ("programs", "unsplit") or named[name.upper()] == value, name
    assert options == {"num_warps": plan.warps, "launch_pdl": plan.early > 0}
    assert (named["M"], named["N"], named["K"]) == (x.shape[0], w.out_features, w.in_features)
    assert (named["row_blocks"], named["tiles"], named["groups"]) == (*w.words.shape[:2], w.scale.shape[1])
    assert (named["GROUP"], named["HALVES"]) == (w.group_size, 1 if w.group_size % 64 == 0 else 2)
    flags = w.zero_point is not None, w.levels is not None, bias is not None
    assert tuple(named[name] for name in ("HAS_ZERO", "HAS_LEVELS", "HAS_BIAS")) == flags
    for name, tensor in (("zero_ptr", w.zero_point), ("levels_ptr", w.levels), ("bias_ptr", bias)):
        assert tensor is None or named[name] is tensor
    assert named["words_ptr"] is w.words and named["scale_ptr"] is w.scale
    assert named["y_ptr"].shape == (x.shape[0], w.out_features)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["symmetric", "zero points", "codebook"])
@pytest.mark.parametrize("group", [32, 128])
def test_arguments_are_in_the_kernels_order(kernel, monkeypatch, group, kind, with_bias):
    w = weight(group=group, levels=torch.tensor(codebook.NF4) if kind == "codebook" else None)
    if kind == "zero points":
        w = w._replace(zero_point=torch.zeros(w.scale.shape, dtype=torch.int8))
    bias = torch.randn(96).bfloat16() if with_bias else None
    x = torch.randn(3, 128).bfloat16()
    plan = Decode(4, 2, 8, 4, 3, 1)
    int4_run.run_plan(plan, x, w, bias)
    check_arguments(NAMES, kernel.launches[0], w, x, bias, plan)
    assert kernel.launches[0][0] == (3, 1, 1)
    assert dict(zip(NAMES, kernel.launches[0][1], strict=True))["MASK_K"]  # 2 tiles are not 4 warps' 4 each

    stream, names = Kernel(), STREAM_NAMES
    monkeypatch.setattr(int4_stream, "stream_kernel", stream)
    for tiles, programs, whole, steps in ((1, 5, False, 1), (2, 132, False, 1)):
        plan = Stream(8, tiles, 3, programs, 3)
        int4_run.run_plan(plan, x[:1], w, bias)
        check_arguments(names, stream.launches[-1], w, x[:1], bias, plan)
        named = dict(zip(names, stream.launches[-1][1], strict=True))
        assert stream.launches[-1][0] == (min(programs, 6), 1, 1)
        assert (named["WHOLE"], named["STEPS"]) == (whole, steps)  # of 2 tiles
    wide = weight(k=64 * 32, group=group, levels=w.levels)
    int4_run.run_plan(Stream(8, 2, 3, 132, 3), torch.randn(1, 64 * 32).bfloat16(), wide, None)
    named = dict(zip(names, stream.launches[-1][1], strict=True))
    assert (named["WHOLE"], named["STEPS"]) == (True, 2)

    batch, sums = Kernel(), Kernel()
    monkeypatch.setattr(int4_batch, "batch_kernel", batch)
    monkeypatch.setattr(int4_batch, "descriptor", lambda x, block_m: ("x", block_m))
    monkeypatch.setattr(int4_portable, "sum_parts_kernel", sums)
    w, x = weight(k=1536, group=group, levels=w.levels), torch.randn(70, 1536).bfloat16()
    if kind == "zero points":
        w = w._replace(zero_point=torch.zeros(w.scale.shape, dtype=torch.int8))
    for split in (1, 2):
        plan = Batch(8, 64, 8, 2, 4, split, 2)
        int4_run.run_plan(plan, x, w, bias)
        check_arguments(BATCH_NAMES, batch.launches[-1], w, x, bias, plan)
        assert batch.launches[-1][0] == (2 * split, 1, 1)
    parts = dict(zip(BATCH_NAMES, batch.launches[-1][1], strict=True))["parts_ptr"]
    ((grid, arguments, _, _),) = sums.launches
    assert parts.shape == (2, 70, 96) and parts.dtype == torch.float32 and grid == (70, 1, 1)
    assert arguments[0] is parts and arguments[1] is bias and arguments[3:] == (70, 96, 0, 2, 1024, True)

    int4_run.run_plan(Batch(4, 32, 8, 2, 4, 3, 2, 1, 7), x, w, bias)  # of two blocks of outputs, the second in parts
    grid, arguments, _, _ = batch.launches[-1]
    named = dict(zip(BATCH_NAMES, arguments, strict=True))
    assert grid == (7, 1, 1) and (named["unsplit"], named["first_n"], named["band"]) == (3, 64, 3)
    assert named["parts_ptr"].shape == (3, 70, 32) and named["WHOLE"] and named["SEVERAL"]
    grid, arguments, _, _ = sums.launches[-1]
    assert grid == (70, 1, 1) and arguments[3:] == (70, 96, 64, 3, 1024, True)
    for k in (1504, 1600):  # which end in the middle of a tile, and of a round
        long = torch.randn(70, k).bfloat16()
        int4_run.run_plan(Batch(4, 32, 8, 2, 4, 3, 2, 3), long, weight(n=1200, k=k, group=32), None)
        named = dict(zip(BATCH_NAMES, batch.launches[-1][1], strict=True))
        assert batch.launches[-1][0] == (3 * 3 + 3 * 16 * 3, 1, 1) and not named["WHOLE"] and not named["SEVERAL"]
        assert sums.launches[-1][0] == (70, 1, 1)  # of 1008 outputs
    with pytest.raises(ValueError, match="K is 24 tiles"):  # three rounds of 8
        int4_run.run_plan(Batch(4, 32, 8, 2, 4, 4, 2), x, w, bias)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "tiles, split, programs, whole", [(1, 1, 5, False), (8, 1, 132, True), (1, 8, 16, True), (2, 3, 9, False)]
)
def test_arguments_for_few_tokens(kernel, monkeypatch, tiles, split, programs, whole, with_bias):
    few, sums = Kernel(), Kernel()
    monkeypatch.setattr(int4_few, "few_kernel", few)
    monkeypatch.setattr(int4_portable, "sum_parts_kernel", sums)
    w, x, bias = weight(k=4096), torch.randn(5, 4096).bfloat16(), torch.randn(96).bfloat16() if with_bias else None
    plan = Few(8, tiles, 3, programs, split, 3)
    y = int4_run.run_plan(plan, x, w, bias)
    (launch,) = few.launches
    check_arguments(FEW_NAMES, launch, w, x, bias if split == 1 else None, plan)
    named = dict(zip(FEW_NAMES, launch[1], strict=True))
    assert launch[0] == (min(programs, 6), split, 1) and named["WHOLE"] == whole and named["x_ptr"] is x
    parts = named["parts_ptr"]
    if split == 1:
        assert parts is y and not sums.launches
        return
    ((grid, arguments, _, _),) = sums.launches
    assert parts.shape == (split, 5, 96) and parts.dtype == torch.float32 and grid == (5, 1, 1)
    assert arguments[0] is parts and arguments[1] is bias and arguments[2] is y
    assert arguments[3:] == (5, 96, 0, split, 1024, True)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize(
    ("k", "group", "part"), [(128, 64, 1), (384, 128, 2), (384, 192, 1), (128, 128, 2), (192, 192, 2)]
)
def test_arguments_of_int8_products(kernel, monkeypatch, k, group, part, with_zero, with_bias):
    batch = Kernel()
    monkeypatch.setattr(int8_run.int8_batch, "int8_batch_kernel", batch)
    monkeypatch.setattr(int8_run.int8_batch, "descriptors", lambda codes, words, block_m: ((codes, block_m), words))
    w = weight(k=k, group=group)
    if with_zero:
        w = w._replace(zero_point=torch.zeros(w.scale.shape, dtype=torch.int8))
    bias = torch.randn(96).bfloat16() if with_bias else None
    codes, sums = int8_codes(torch.randn(70, k), None), torch.randn(96)
    for plan, programs in ((Int8(64, 8, 132), 2), (Int8(128, 6, 132), 1), (Int8(64, 4, 1), 1)):
        int8_run.run_plan(plan, codes, w, sums, bias, torch.float16)
        ((grid, arguments, options, _),) = batch.launches[-1:]
        named = dict(zip(INT8_NAMES, arguments, strict=True))
        assert grid == (programs, 1, 1)  # of six row blocks, eight make an item
        assert options == {"num_warps": 4, "launch_pdl": True}
        assert [named[name.upper()] for name in plan._fields[:-1]] == [*plan[:-1]]
        assert named["codes_desc"] == (codes.codes, plan.block_m) and named["words_desc"] is w.words
        tensors = {"step": codes.step, "shift": codes.shift, "scale": w.scale, "sums": sums}
        tensors |= {"zero": w.zero_point, "bias": bias}
        assert all(named[f"{name}_ptr"] is tensor for name, tensor in tensors.items() if tensor is not None)
        assert named["y_ptr"].shape == (70, 96) and named["y_ptr"].dtype == torch.float16
        sizes = [named[name] for name in ("M", "N", "row_blocks", "tiles", "groups")]
        assert sizes == [70, 96, *w.words.shape[:2], w.scale.shape[1]]
        assert (named["HAS_ZERO"], named["HAS_BIAS"], named["PART"]) == (
            with_zero,
            with_bias,
            part,
        )
        assert named["GROUP"] == group if group < k else named["GROUP"] >= k
        assert all(t.data_ptr() % 16 == 0 for t in codes)


def test_what_a_kernel_is_compiled_for_is_told_apart(kernel):
    x, bias = torch.randn(3, 128).bfloat16(), torch.randn(96).bfloat16()
    levels = torch.tensor(codebook.NF4)
    zeros = weight()._replace(zero_point=torch.zeros(6, 2, 16, dtype=torch.int8))
    calls = [
        (x, weight(), None),
        (x, weight(), bias),
        (x, weight(), bias.float()),
        (x, weight(group=128), None),
        (x, zeros, None),
        (x, weight(levels=levels), None),
        (x.half(), weight(), None),
        (x, weight(n=112), None),
        (torch.randn(3, 192).bfloat16(), weight(k=192), None),
    ]
    for count, call in enumerate(calls, 1):
        module.int4_linear(*call)
        module.int4_linear(*call)
        assert len(kernel.launches) == count
        assert len(kernel.launches[-1][-1].runs) == 1


def test_the_number_of_tokens_is_passed_on_and_does_not_compile_again(kernel):
    w, position = weight(), FEW_NAMES.index("M")
    for tokens in (2, 3, 3, 5):
        module.int4_linear(torch.randn(tokens, 128).bfloat16(), w)
    ((_, first, _, compiled),) = kernel.launches
    assert first[position] == 2 and [run[9:][position] for run in compiled.runs] == [3, 3, 5]


def test_odd_numbers_of_inputs_are_padded_every_time(kernel):
    codes = torch.randint(-8, 8, (32, 33), dtype=torch.int8)
    w = prepack(pack(codes, 4), torch.rand(32, 1).bfloat16(), None, 33, 33)
    x = torch.randn(2, 33).bfloat16()
    module.int4_linear(x, w)
    module.int4_linear(x, w)
    ((_, first, _, compiled),) = kernel.launches
    for padded in (first[0], compiled.runs[0][9]):  # through ``launch``, which takes tensors
        assert padded.shape == (2, 48) and torch.equal(padded[:, :33], x) and not padded[:, 33:].any()


def test_subclasses_modes_and_transforms_go_through_the_dispatcher():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += (str(func),)
            return func(*args, **kwargs or {})

    x, w = torch.randn(2, 128), weight()
    assert module._is_plain(x)
    with Mode() as mode:
        module.int4_linear(x, w)
    assert any("int4_linear" in name for name in mode.seen)
    assert not module._is_plain(torch.nn.Parameter(x))
    seen = []
    torch.vmap(lambda t: (seen.append(module._is_plain(t)), t)[1])(x)
    assert seen == [False]


def test_a_table_of_levels_gives_way_to_the_library_earlier(kernel):
    plain, table = weight(), weight(levels=torch.tensor(codebook.NF4))
    for tokens, dequantizes in (
        (2048, (False, False)),
        (2049, (False, True)),
        (4096, (False, True)),
        (4097, (True, True)),
    ):
        x = torch.empty(tokens, plain.in_features, dtype=torch.bfloat16)
        assert tuple(isinstance(int4_run.plan_for(x, w, None), Dequantize) for w in (plain, table)) == dequantizes
