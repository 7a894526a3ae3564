"""What one eager call costs the host: python -m benchmarks.launch_cost

Microseconds of Python, dispatcher and driver for a matrix product so small that the GPU is never behind: the operator
as a frozen layer calls it, the layer, and torch's dense ones beside them; then layers that train, forward and backward,
beside the plain one, and the operators that a compiled layer is. The median of several batches of calls.
Without a GPU, what is left of it with a driver that does nothing (``idle_driver``): the processor's time, of this
thread alone, in the fastest batch.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import qat
from qat.broken_pipe import ends_quietly

from . import idle_driver


def host_times(called: dict[str, Callable[[], object]], calls: int = 300, batches: int = 9) -> dict[str, float]:
    """Return the microseconds until each call returns, without waiting for the GPU inside a batch.

    They take turns, a batch each: what else the machine does for a second or two falls on all of them.
    """
    if not torch.cuda.is_available():
        times = [[_idle_time(call, 200) for call in called.values()] for _ in range(100)]
        return dict(zip(called, map(min, zip(*times, strict=True)), strict=True))
    times = [[_time(call, calls) for call in called.values()] for _ in range(batches + 1)][1:]
    return dict(zip(called, map(statistics.median, zip(*times, strict=True)), strict=True))


def _time(call: Callable[[], object], calls: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    microseconds = (time.perf_counter() - start) / calls * 1e6
    torch.cuda.synchronize()
    return microseconds


def _idle_time(call: Callable[[], object], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls * 1e6


def rows(width: int = 1024) -> dict[str, float]:
    """Return microseconds by what is called."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    from qat.kernels.int4_linear import int4_dequantize, int4_linear

    dense = nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16)
    policy = qat.QuantPolicy(weight=qat.QuantSpec(group_size=128))
    layer = nn.Sequential(nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16))
    frozen = qat.freeze(qat.prepare(layer, policy, verbose=False))[0]
    if device == "cpu":
        frozen.packed_weight.prepack()
    weight = frozen.packed_weight.gpu_operands[torch.bfloat16]
    called = {}
    with torch.no_grad():
        for tokens in (1, 32, 128):
            x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
            calls = {
                "int4_linear": lambda x=x: int4_linear(x, weight),
                "frozen layer": lambda x=x: frozen(x),
            }
            if device == "cuda":  # a CPU would multiply
                calls["F.linear"] = lambda x=x: nn.functional.linear(x, dense.weight)
                calls["nn.Linear"] = lambda x=x: dense(x)
            called |= {f"{name}, {tokens} tokens": call for name, call in calls.items()}
        called["int4_dequantize"] = lambda: int4_dequantize(weight, torch.bfloat16)
        called["torch.empty of the same"] = lambda: torch.empty_like(dense.weight)
        return host_times(called)


def training_rows(width: int = 64) -> dict[str, float]:
    """Return microseconds of a float32 layer's forward and backward, eager, and in the graph that a compiler gets."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, grad = (torch.randn(width, width, device=device) for _ in range(2))
    tensor = qat.QuantSpec(bits=8, granularity="tensor")
    called = {}
    for name, activation in (("plain", None), ("W4", None), ("W4A8", tensor), ("W4A8 int8_token", "int8_token")):
        model = nn.Sequential(nn.Linear(width, width, device=device))
        if name != "plain":
            policy = qat.QuantPolicy(weight=qat.QuantSpec(group_size=32), activation=activation)
            qat.calibrate(qat.prepare(model, policy, verbose=False), [x])
        leaf = x.clone().requires_grad_()
        for mode, layer in (("eager", model[0]), ("traced", torch.compile(model[0], backend="aot_eager"))):
            step = lambda layer=layer, leaf=leaf: layer(leaf).backward(grad)  # noqa: E731
            called[f"{name}, forward and backward, {mode}"] = step
    return host_times(called)


@ends_quietly()
def main() -> None:
    """Measure and print."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, a driver that does nothing"
    if not torch.cuda.is_available():
        idle_driver.install()
        torch.set_num_threads(1)  # the time of others is not counted
    print(f"{datetime.date.today()}, {device}, torch {torch.__version__}: host us a call, eager")
    for part in (rows, training_rows):  # either takes half a minute
        for name, microseconds in part().items():
            print(f"{microseconds:8.1f}  {name}", flush=True)


if __name__ == "__main__":
    main()
