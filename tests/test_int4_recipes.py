"""Run: python -m pytest tests/test_int4_recipes.py: int4 calls like one before are launched as the first was."""

import contextlib
import weakref

import pytest
import torch

pytest.importorskip("triton")
from qat.kernels import int4_linear as module
from qat.kernels import int4_portable, int4_recipe, int4_run
from qat.kernels.int4_plans import Batch, Decode, Dequantize, Few
from stand_in_kernels import (
    BATCH_NAMES,
    FEW_NAMES,
    NAMES,
    SUM_NAMES,
    Kernel,
    pass_for_a_gpu,
    stand_in_for_many_tokens,
    variants,
    weight,
)

from qat import backend as qat_backend


@pytest.fixture
def kernel(monkeypatch):
    return pass_for_a_gpu(monkeypatch)


@pytest.fixture
def batch_kernels(kernel, monkeypatch):
    return stand_in_for_many_tokens(monkeypatch)


def check_again(launch, names, new, number=0):
    """Check that a launch by a recipe is the first one but for the tensors that are new, and return those addresses."""
    grid, first, _, compiled = launch
    again = compiled.runs[number]
    assert again[:9] == (*grid, "stream", "function", "metadata", None, None, None)
    found = {}
    for name, one, other in zip(names, first, again[9:], strict=True):
        if name in new:
            found[name] = other
        else:
            assert other == (one.data_ptr() if isinstance(one, torch.Tensor) else one), name
    return found


def forget_nothing(monkeypatch):
    """Keep every tensor that a recipe allocates, so that addresses tell them apart; return them."""
    made = []

    def keeping(allocate):
        def kept(*args, **kwargs):
            made.append(allocate(*args, **kwargs))
            return made[-1]

        return kept

    monkeypatch.setattr(torch.Tensor, "new_empty", keeping(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", keeping(torch.empty))
    return made


@pytest.mark.parametrize("leading", [(3,), (1, 3)])
def test_a_second_call_passes_on_what_the_first_did(kernel, monkeypatch, leading):
    monkeypatch.setattr(int4_run, "choose", lambda *shape: Decode(4, 2, 8, 4, 3, 1))
    for w, bias in variants():
        kernel.launches.clear()
        module.int4_linear(torch.randn(*leading, 128).bfloat16(), w, bias)
        x = torch.randn(*leading, 128).bfloat16()
        y = module.int4_linear(x, w, bias)
        (launch,) = kernel.launches
        new = {"x_ptr", "y_ptr"} | ({"bias_ptr"} if bias is None else set())  # x stands for a bias that is not there
        at = check_again(launch, NAMES, new)
        assert at["x_ptr"] == x.data_ptr() and at["y_ptr"] == y.data_ptr() and y.shape == (*leading, 96)


@pytest.mark.parametrize("leading", [(70,), (2, 35)])
@pytest.mark.parametrize("split", [1, 2])
def test_a_second_call_of_many_tokens_too(batch_kernels, monkeypatch, split, leading):
    batch, sums = batch_kernels
    made = forget_nothing(monkeypatch)
    plan = Batch(4, 64, 8, 2, 4, split, 2, split - 1)
    monkeypatch.setattr(int4_run, "choose", lambda *shape: plan)
    for w, bias in variants(k=1024):
        batch.launches.clear(), sums.launches.clear(), int4_recipe._products.clear(), int4_run._kernels.clear()
        module.int4_linear(torch.randn(*leading, 1024).bfloat16(), w, bias)
        made.clear()
        x = torch.randn(*leading, 1024).bfloat16()
        y = module.int4_linear(x, w, bias)
        (launch,) = batch.launches
        new = {"x_desc", "y_ptr", "parts_ptr"} | ({"bias_ptr"} if bias is None else set())
        at = check_again(launch, BATCH_NAMES, new)
        described = at["x_desc"]
        assert described.base is x and (described.shape, described.strides) == ((70, 1024), (1024, 1))
        assert described.padding == "zero" and not described.round_f32_to_tf32
        assert at["y_ptr"] == y.data_ptr() and y.shape == (*leading, 96) and y.dtype == x.dtype
        if split == 1:
            assert not sums.launches and len(made) == 1
            continue
        (parts,) = (tensor for tensor in made if tensor.dtype == torch.float32)
        assert parts.shape == (2, 70, 32) and at["parts_ptr"] == parts.data_ptr()
        (launch,) = sums.launches
        at = check_again(launch, SUM_NAMES, {"parts_ptr", "y_ptr"})
        assert at == {"parts_ptr": parts.data_ptr(), "y_ptr": y.data_ptr()}


@pytest.mark.parametrize("split", [1, 2])
def test_a_second_call_of_few_tokens_too(batch_kernels, kernel, monkeypatch, split):
    _, sums = batch_kernels
    made = forget_nothing(monkeypatch)
    monkeypatch.setattr(int4_run, "choose", lambda *shape: Few(8, 1, 3, 132, split, 1))
    for w, bias in variants():
        kernel.launches.clear(), sums.launches.clear(), int4_recipe._products.clear(), int4_run._kernels.clear()
        module.int4_linear(torch.randn(3, 128).bfloat16(), w, bias)
        made.clear()
        x = torch.randn(3, 128).bfloat16()
        y = module.int4_linear(x, w, bias)
        (launch,) = kernel.launches
        at = check_again(launch, FEW_NAMES, {"x_ptr", "y_ptr", "parts_ptr"} | ({"bias_ptr"} if bias is None else set()))
        assert at["x_ptr"] == x.data_ptr() and at["y_ptr"] == y.data_ptr() and y.shape == (3, 96)
        if split == 1:
            assert at["parts_ptr"] == y.data_ptr() and not sums.launches and len(made) == 1
            continue
        (parts,) = (tensor for tensor in made if tensor.dtype == torch.float32)
        assert parts.shape == (2, 3, 96) and at["parts_ptr"] == parts.data_ptr()
        (launch,) = sums.launches
        assert check_again(launch, SUM_NAMES, {"parts_ptr", "y_ptr"}) == {
            "parts_ptr": parts.data_ptr(),
            "y_ptr": y.data_ptr(),
        }


def test_a_dequantized_weight_is_launched_again(kernel, monkeypatch):
    dequantize = Kernel()
    monkeypatch.setattr(int4_portable, "dequantize_kernel", dequantize)
    monkeypatch.setattr(int4_run, "_on_nvidia", lambda tensor: True)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: contextlib.nullcontext())
    for w, _ in variants():
        for dtype in (torch.bfloat16, torch.float32):
            dequantize.launches.clear(), int4_recipe._matrices.clear()
            int4_run.dequantized(w, dtype)
            other = w._replace(words=w.words.clone(), scale=w.scale.clone())
            matrix = int4_run.dequantized(other, dtype)
            ((grid, first, options, compiled),) = dequantize.launches
            assert grid == (1, 6, 1) and options == {"num_warps": 4} and len(compiled.runs) == 1
            again = compiled.runs[0]
            assert again[:9] == (*grid, "stream", "function", "metadata", None, None, None)
            assert again[9:11] == (other.words.data_ptr(), other.scale.data_ptr())
            others = w.zero_point, w.levels
            assert again[11:13] == tuple(None if t is None else t.data_ptr() for t in others)
            assert again[13] == matrix.data_ptr() and (matrix.shape, matrix.dtype) == ((96, 128), dtype)
            assert again[14:] == first[5:] == (96, 128, 6, 2, 2, 64, 1, 2)


def misaligned(tensor):
    """Return equal values that do not start at a multiple of 16 bytes."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].copy_(tensor.flatten()).view(tensor.shape)


def test_what_a_recipe_does_not_cover_is_not_launched_by_it(kernel, monkeypatch):
    w, x, bias = weight(), torch.randn(4, 128).bfloat16(), torch.randn(96).bfloat16()
    module.int4_linear(x, w, bias)
    assert int4_recipe.repeat(x, w, bias) is not None
    odd = [
        (torch.randn(128, 4).bfloat16().t(), w, bias),
        (misaligned(x), w, bias),
        (x, w, misaligned(bias)),
        (x, w, bias.new_empty(192)[::2]),
        (x, w._replace(scale=misaligned(w.scale)), bias),
        (x, w._replace(scale=w.scale.float()), bias),
        (x, w._replace(scale=w.scale[:, :1]), bias),
        (x, w._replace(words=w.words[:3]), bias),
        (x, w._replace(group_size=32), bias),
        (x.half(), w, bias),
        (x[:3], w, bias),
        (x[None], w, bias),
        (x, w, None),
        (x, w, bias.float()),
    ]
    for call in odd:
        assert int4_recipe.repeat(*call) is None
    monkeypatch.setattr(int4_recipe, "current_device", lambda: 0)
    assert int4_recipe.repeat(x, w, bias) is None
    monkeypatch.undo()


def test_results_that_do_not_depend_on_the_batch_have_recipes_of_their_own(batch_kernels, kernel):
    w, x = weight(), torch.randn(3, 128).bfloat16()
    module.int4_linear(x, w)
    qat_backend.set_batch_invariant(True)
    try:
        for _ in range(2):
            module.int4_linear(x, w)
    finally:
        qat_backend.set_batch_invariant(False)
    module.int4_linear(x, w)
    (decode,), (batch,) = kernel.launches, batch_kernels[0].launches
    assert len(decode[-1].runs) == len(batch[-1].runs) == 1


def test_a_recipe_keeps_no_tensor_alive(batch_kernels, kernel, monkeypatch):
    for plan in (Decode(4, 2, 8, 4, 3, 1), Batch(4, 64, 8, 2, 4, 2, 2, 1, 5), Dequantize()):
        monkeypatch.setattr(int4_run, "choose", lambda *shape, plan=plan: plan)
        monkeypatch.setattr(int4_run, "dequantized", module.int4_dequantize_reference)
        int4_run._plans.clear(), int4_recipe._products.clear()
        w, x = weight(k=1024), torch.randn(3, 1024).bfloat16()
        module.int4_linear(x, w)
        for stand_in in (kernel, *batch_kernels):
            stand_in.launches.clear()
        assert len(int4_recipe._products) == 1
        kept = [weakref.ref(tensor) for tensor in (w.words, w.scale, x)]
        del w, x
        assert not any(ref() is not None for ref in kept)


def test_so_many_recipes_are_kept(kernel, monkeypatch):
    monkeypatch.setattr(int4_recipe, "MOST", 3)
    w = weight()
    for tokens in range(1, 9):
        module.int4_linear(torch.randn(tokens, 128).bfloat16(), w)
        assert len(int4_recipe._products) <= 3
