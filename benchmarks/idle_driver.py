"""A CUDA driver that does nothing, so that what a call costs the host can be measured where there is no GPU.

Tensors of the CPU pass for a GPU's: kernels are compiled for Hopper and go through Triton's own launcher, whose calls
of the driver return at once. What is left is Python, torch and Triton. It lasts until the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch

# The functions of CUDA's driver interface that Triton calls. Those with a result write one that Triton accepts.
_RESULTS = {
    "cuCtxGetCurrent(void **value)": "*value = (void *)1",
    "cuDeviceGet(int *value, int index)": "*value = 0",
    "cuDevicePrimaryCtxRetain(void **value, int device)": "*value = (void *)1",
    "cuDriverGetVersion(int *value)": "*value = 13000",
    "cuDeviceGetAttribute(int *value, int what, int device)": "*value = what == 97 ? 232448 : what == 8 ? 49152 : 132",
    "cuModuleLoadData(void **value, const void *image)": "*value = (void *)1",
    "cuModuleGetFunction(void **value, void *module, const char *name)": "*value = (void *)1",
    "cuFuncGetAttribute(int *value, int what, void *function)": "*value = what ? 0 : 1024",
    "cuPointerGetAttribute(void *value, int what, unsigned long at)": "*(unsigned long *)value = at",
    "cuGetErrorString(int error, const char **value)": '*value = ""',
}
_NO_RESULTS = (
    *("cuInit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuCtxGetLimit", "cuFuncSetAttribute", "cuFuncSetCacheConfig"),
    *("cuTensorMapEncodeTiled", "cuLaunchKernelEx"),
)


def install() -> None:
    """Let Triton and our kernels take CPU tensors for those of an H100; needs gcc, as Triton does."""
    folder = Path(tempfile.mkdtemp())
    lines = [f"int {head} {{ {body}; return 0; }}" for head, body in _RESULTS.items()]
    lines += [f"int {name}() {{ return 0; }}" for name in _NO_RESULTS]
    (folder / "driver.c").write_text("\n".join(lines))
    library = folder / "libcuda.so.1"
    flags = "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"
    subprocess.run(["gcc", *flags, "-o", library, folder / "driver.c"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # found by its name from now on

    import triton
    from qat.kernels import bare_launch, int4_linear, int4_recipe, int4_run
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    from qat import backend, traced
    from qat.layers import cpu_int4

    class Idle(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_current_device = self.get_current_stream = lambda *_: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Idle())
    torch.cuda.current_device = lambda: None  # the index that a tensor on a CPU has
    torch.accelerator.device_index = lambda index: contextlib.nullcontext()
    torch.accelerator.current_device_index = lambda: -1
    backend.fused, traced.takes = (lambda *tensors: True), (lambda *rounding: False)
    bare_launch.current_stream, int4_recipe.current_device = (lambda device: 0), (lambda: -1)
    cpu_int4.fits = lambda x, weight: False
    int4_linear.backend = lambda device: "triton"
    int4_run.limits = lambda index: ("NVIDIA H100 80GB HBM3", 90, 132)
    int4_run._on_nvidia = lambda x: True
