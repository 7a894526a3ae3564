"""Run: python -m pytest tests/test_bare_launch.py: what Triton's C function is given, by its launcher and by ours."""

from unittest.mock import ANY

import pytest
import torch

pytest.importorskip("triton")
from qat.kernels import bare_launch, int4_batch, launching
from qat.kernels.bare_launch import Described, describer, starter
from triton import knobs
from triton.backends.nvidia import driver
from triton.compiler import CompiledKernel, LazyDict

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
    where = {
        "get_current_device": lambda: torch.accelerator.current_device_index(),
        "get_current_stream": lambda device: 1000 + device,
    }
    active = type("A", (), {"utils": utils} | {name: staticmethod(call) for name, call in where.items()})
    monkeypatch.setattr(driver.triton.runtime, "driver", type("D", (), {"active": active}))
    monkeypatch.setattr("triton.compiler.compiler.driver", driver.triton.runtime.driver)
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
    compiled = object.__new__(CompiledKernel)
    compiled._run, compiled.function, compiled.packed_metadata = launcher, 77, (4, 1, 512)
    compiled.module, compiled.name, compiled.src = "loaded", "kernel", None
    return compiled, in_c.given


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


class Kernel:
    """Is compiled at each call, launched as Triton does, and keeps the options."""

    def __init__(self, **how):
        self.compiled, self.options, self.how = [], [], how

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            compiled, given = compiled_kernel({}, None, **self.how)
            self.compiled.append(given)
            self.options.append(options)
            compiled[grid](*arguments)
            return compiled

        return launch


@pytest.fixture
def gpu(maps, monkeypatch):
    """Let tensors of the CPU pass for the current GPU's, and launches be done as there."""
    monkeypatch.setattr(launching, "INTERPRETED", type("No", (), {"value": False}))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(
        driver, "_allocation", type("A", (), {"_allocator": Allocator, "_profile_allocator": Allocator})
    )


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU: the fourth, unless it has another index."""

    index = 3

    def get_device(self):
        """Return its index."""
        return self.index


def on_gpu(*shape, dtype=torch.float32, index=3, offset=0):
    made = torch.empty(torch.Size(shape).numel() + 16, dtype=dtype)[offset:].as_subclass(OnGpu)
    made.index = index
    return made


def test_a_launch_is_done_again_with_the_arguments_it_had(gpu):
    """Addresses anew, numbers, constants and missing tensors as they were; only the first goes through Triton."""
    kernel = Kernel()
    launch = launching.Launch(kernel, (5, 2), (70, 0.25, 8.0, "whole", 64), num_warps=8, enable_fp_fusion=False)
    for_hooks = knobs.HookChain, LazyDict  # in whose places we give None
    tensors = [(on_gpu(70), None, on_gpu(70), None) for _ in range(3)]
    for x, _, y, _ in (tensors[0], *tensors):
        launch(x, None, y, None)
    ((first, *again),) = kernel.compiled
    first = [None if isinstance(a, for_hooks) else a for a in first]
    assert first[:7] == [5, 2, 1, 1003, 77, False, True] and first[-9:-5] == [tensors[0][0].data_ptr(), None, ANY, None]
    for (x, _, y, _), given in zip(tensors, again, strict=True):
        assert given == [*first[:-9], x.data_ptr(), None, y.data_ptr(), None, *first[-5:]]
    assert first[-5:] == [70, 0.25, 8.0, "whole", 64]
    assert kernel.options == [{"num_warps": 8, "enable_fp_fusion": False}]


def test_another_dtype_alignment_device_or_a_missing_tensor_goes_through_triton(gpu):
    kernel = Kernel()
    launch = launching.Launch(kernel, (1,), (4,))
    x = on_gpu(4)
    kinds = [(x, x), (x, None), (x, on_gpu(4, offset=1)), (on_gpu(4, offset=1), x), (x, on_gpu(4, dtype=torch.half))]
    kinds.append((x, torch.empty(4)))  # on a CPU, which Triton refuses and its function in C would read
    for count, tensors in enumerate(kinds * 2):
        launch(*tensors)
        assert len(kernel.compiled) == min(count + 1, len(kinds))
    launch(x, on_gpu(4, offset=4))  # 16 bytes on: as aligned as before
    assert len(kernel.compiled) == len(kinds) and [len(given) for given in kernel.compiled] == [3, 2, 2, 2, 2, 2]


def test_each_device_has_its_own_kernel_and_is_made_the_current_one(gpu, monkeypatch):
    current = [3]

    class Switch:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current[-1])
    monkeypatch.setattr(torch.accelerator, "device_index", Switch)
    kernel = Kernel()
    launch = launching.Launch(kernel, (1,), (4,))
    for index in (3, 0, 3, 0, 0):
        launch(on_gpu(4, index=index))
    third, first = kernel.compiled
    assert len(third) == 2 and len(first) == 3 and current == [3]
    assert all(1003 in given for given in third) and all(1000 in given for given in first)  # their streams


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_hears_of_every_launch(gpu, hook):
    """And of none that comes after it has left."""

    def heard(metadata):
        raise AssertionError("only the function in C calls it, which does not run here")

    kernel = Kernel()
    launch, x = launching.Launch(kernel, (1,), (4,)), on_gpu(4)
    launch(x)
    launch(x)
    getattr(knobs.runtime, hook).add(heard)
    try:
        launch(x)
    finally:
        getattr(knobs.runtime, hook).remove(heard)
    launch(x)
    (given,) = kernel.compiled
    chains = [[a for a in one if isinstance(a, knobs.HookChain)] for one in given]
    assert [len(chain) for chain in chains] == [2, 0, 2, 0]


@pytest.mark.parametrize("obstacle", ["version", "scratch", "another launcher"])
def test_launches_of_other_kernels_go_through_tritons_launcher(gpu, monkeypatch, obstacle):
    """Of versions that are not known, for scratch memory, and of other backends."""
    if obstacle == "version":
        monkeypatch.setattr(bare_launch, "VERSION", "3.99")
    if obstacle == "another launcher":
        monkeypatch.setattr(driver.CudaLauncher, "__module__", "triton.backends.amd.driver")
    monkeypatch.setattr(launching.bare_launch, "starter", None)
    kernel = Kernel(scratch=8 if obstacle == "scratch" else 0)
    launch = launching.Launch(kernel, (2,), (4, 64))
    for _ in range(2):
        launch(on_gpu(4), None)
    ((first, second),) = kernel.compiled
    assert len(first) == len(second) and ("scratch" in second) == (obstacle == "scratch")
    assert any(isinstance(a, knobs.HookChain) for a in second)
