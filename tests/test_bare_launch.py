"""Run: python -m pytest tests/test_bare_launch.py: what Triton's C function is given, by its launcher and by ours."""

import pytest
import torch

pytest.importorskip("triton")
from qat.kernels import bare_launch, int4_batch
from qat.kernels.bare_launch import Described, describer, starter
from triton.backends.nvidia import driver

SIZES = 70, 128
META = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [64, 64], "fp4_padded": False}


@pytest.fixture
def maps(monkeypatch):
    """Let descriptors be what they are made of; keep them."""
    made = []

    def fill(*arguments):
        made.append(tuple(tuple(a) if isinstance(a, list | tuple) else a for a in arguments))
        return made[-1]

    utils = type("Utils", (), {"fill_tma_descriptor": fill, "fill_tma_descriptor_tiled": fill})
    monkeypatch.setattr(driver.triton.runtime, "driver", type("D", (), {"active": type("A", (), {"utils": utils})}))
    monkeypatch.setattr(bare_launch, "current_stream", lambda device: 1000 + device)
    return made


class InC:
    """Stands for the function in C: keeps what it is given."""

    def __init__(self):
        self.given = []

    def __call__(self, *arguments):
        flat = []
        for argument in arguments:  # Triton 3.7 gives a kernel's arguments in one
            flat.extend(argument if isinstance(argument, list | tuple) else [argument])
        self.given.append([a.data_ptr() if isinstance(a, torch.Tensor) else a for a in flat])


def compiled_kernel(signature, meta=META, scratch=0):
    """Return a kernel with Triton's own launcher around a function that keeps what it is given."""
    in_c = InC()
    launcher = object.__new__(driver.CudaLauncher)
    launcher.launch = driver.wrap_handle_tensordesc(in_c, signature, [meta] if meta else None)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, True
    launcher.global_scratch_size = launcher.profile_scratch_size = scratch
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    launcher.arg_annotations, launcher.kernel_signature = "annotations", b"signature"
    return type("Compiled", (), {"run": launcher, "function": 77, "packed_metadata": (4, 1, 512)}), in_c.given


def as_triton(compiled, grid, device, *arguments):
    """Launch as Triton does."""
    compiled.run(*grid, 1000 + device, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def test_tensors_and_sizes(maps):
    compiled, given = compiled_kernel({0: "*bf16", 1: "*bf16", 2: "i32", 3: "i32", 4: "constexpr"})
    x, y = torch.randn(SIZES), torch.randn(SIZES)
    as_triton(compiled, (5, 2, 1), 3, x, y, 70, 128, 64)
    starter(compiled, (5, 2, 1), 3, (128, 64))(x.data_ptr(), y.data_ptr(), 70)
    assert given[0] == given[1] and given[0][:5] == [5, 2, 1, 1003, 77] and not maps


def test_descriptors(maps):
    compiled, given = compiled_kernel({0: "tensordesc<bf16[64, 64]>", 1: "*bf16", 2: "i32", 3: "constexpr"})
    start, describe = starter(compiled, (3, 1, 1), 0, (64,)), describer(compiled, SIZES)
    inputs = [torch.randn(SIZES).bfloat16() for _ in range(3)]
    for x in (*inputs, *inputs):
        given.clear()
        as_triton(compiled, (3, 1, 1), 0, int4_batch.descriptor(x, 64), x, 70, 64)
        start(*describe(x, x.data_ptr()), x.data_ptr(), 70)
        assert given[0] == given[1]
    addresses = [made[0] for made in maps]
    assert bare_launch.VERSION not in bare_launch.KNOWN or sorted(addresses) == sorted(
        [x.data_ptr() for x in inputs] * 3
    )  # twice by Triton, once by us


def test_descriptors_of_addresses_long_past_are_dropped(maps, monkeypatch):
    monkeypatch.setattr(bare_launch, "MOST", 2)
    compiled, _ = compiled_kernel({0: "tensordesc<bf16[64, 64]>"})
    describe = describer(compiled, SIZES)
    inputs = [torch.randn(SIZES).bfloat16() for _ in range(3)]
    for x in (*inputs, *inputs):
        (first, *sizes) = describe(x, x.data_ptr())
        assert first[0] == x.data_ptr() and sizes == [70, 128, 128, 1]


@pytest.mark.parametrize("obstacle", ["version", "scratch", "no descriptor"])
def test_launchers_that_are_not_known_are_called_as_triton_does(maps, monkeypatch, obstacle):
    if obstacle == "version":
        monkeypatch.setattr(bare_launch, "VERSION", "3.99")
    monkeypatch.setattr(
        driver, "_allocation", type("No", (), {"_allocator": Allocator, "_profile_allocator": Allocator})
    )
    signature = {0: "tensordesc<bf16[64, 64]>", 1: "*bf16", 2: "i32"}
    meta = None if obstacle == "no descriptor" else META
    compiled, given = compiled_kernel(signature, meta, scratch=8 if obstacle == "scratch" else 0)
    x = torch.randn(SIZES).bfloat16()
    as_triton(compiled, (3, 1, 1), 0, int4_batch.descriptor(x, 64), x, 70)
    (described,) = arguments = describer(compiled, SIZES)(x, x.data_ptr())
    assert type(described) is Described
    starter(compiled, (3, 1, 1), 0, (70,))(*arguments, x.data_ptr())
    assert given[0] == given[1] and ("scratch" in given[0]) == (obstacle == "scratch")


class Allocator:
    """Of scratch memory."""

    @staticmethod
    def get():
        """Return what allocates."""
        return lambda size, align, stream: "scratch"
