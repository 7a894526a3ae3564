"""The fused kernels alone: gigabytes a second next to a copy's, and what a call costs the host."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

import qat
from qat import QuantSpec
from qat.numerics import arithmetic
from qat.quantizers import dynamic, lsq_plus
from qat.spec import Dynamic

SETS = 4  # of tensors, taken in turns, so that none is left in the 50 MB cache
CALLS = 24  # in one CUDA graph, whose replays are timed: no launch gaps
SECTOR = 32  # bytes: what a GPU writes at least


def microseconds(call: Callable[[int], None]) -> float:
    """Return the median time of ``call(set)`` over replays of a CUDA graph."""
    for index in range(SETS):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _, index in zip(range(CALLS), itertools.cycle(range(SETS))):
            call(index)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in times[2:]) / CALLS


def masked_share(grad_x: Tensor, grad: Tensor) -> float:
    """Return the share of a tensor's sectors that a mask in place writes: those where it takes an element."""
    taken = (grad_x == 0) & (grad != 0)
    return taken.view(-1, SECTOR // grad.element_size()).any(1).float().mean().item()


def calls(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Callable, float]]:
    """Return {name: (call of a set, passes over the tensor it cannot do without)}."""
    xs, grads = ([torch.randn(shape, device=device).to(dtype) * size for _ in range(SETS)] for size in (0.02, 1e-3))
    outs = [torch.empty_like(x) for x in xs]
    group, tensor = QuantSpec(bits=4, group_size=128), QuantSpec(bits=4, granularity="tensor")
    unsigned, positive = QuantSpec(bits=4, granularity="tensor", signed=False), [x.relu() for x in xs]
    steps = 0.008 * (0.5 + torch.rand(shape[0], shape[1] // 128, device=device))
    step = torch.full((1, 1), 0.008, device=device)
    shifted, offset = QuantSpec(bits=4, granularity="tensor", symmetric=False, signed=True), -5.3 * step
    zeros = torch.randint(-8, 8, steps.shape, device=device, dtype=torch.int8)
    zero_points = QuantSpec(bits=4, group_size=128, symmetric=False, signed=True)
    kernels = arithmetic(xs[0], step)
    rounding = dynamic.arithmetic(xs[0])
    token = Dynamic.int8_token
    taken_by_group, taken_by_tensor = (
        masked_share(kernels.fake_quantize_gradients(grads[0], xs[0], sizes, spec, 0.1)[0], grads[0])
        for spec, sizes in ((group, steps), (tensor, step))
    )
    taken_by_offset = masked_share(lsq_plus.gradients(grads[0], xs[0], step, offset, shifted, 0.1)[0], grads[0])
    return {
        "copy": (lambda i: outs[i].copy_(xs[i]), 2),
        "group 128 forward": (lambda i: kernels.fake_quantized(xs[i], steps, group), 2),
        "group 128 backward": (lambda i: kernels.fake_quantize_gradients(grads[i], xs[i], steps, group, 0.1), 3),
        "group 128 backward in place": (
            lambda i: kernels.requantize_(grads[i], xs[i], steps, group, 0.1, (True, True), None),
            2 + taken_by_group,
        ),
        "group 128 with zero points forward": (
            lambda i: kernels.fake_quantized(xs[i], steps, zero_points, None, zeros),
            2,
        ),
        "group 128 with zero points backward": (
            lambda i: kernels.fake_quantize_gradients(grads[i], xs[i], steps, zero_points, 0.1, (True, True), zeros),
            3,
        ),
        "tensor forward": (lambda i: kernels.fake_quantized(xs[i], step, tensor), 2),
        "tensor backward": (lambda i: kernels.fake_quantize_gradients(grads[i], xs[i], step, tensor, 0.1), 3),
        "tensor backward in place, value again": (
            lambda i: kernels.requantize_(grads[i], xs[i], step, tensor, 0.1, (True, True), dtype),
            3 + taken_by_tensor,
        ),
        "tensor backward in place behind a ReLU, value again": (
            lambda i: kernels.requantize_(grads[i], positive[i], step, unsigned, 0.1, (True, True), dtype),
            4,
        ),
        "LSQ+ forward": (lambda i: lsq_plus.fake_quantized(xs[i], step, offset, shifted), 2),
        "LSQ+ backward": (lambda i: lsq_plus.gradients(grads[i], xs[i], step, offset, shifted, 0.1), 3),
        "LSQ+ backward in place, value again": (
            lambda i: lsq_plus.requantize_(grads[i], xs[i], step, offset, shifted, 0.1, (True,) * 3, dtype),
            3 + taken_by_offset,
        ),
        "int8_token forward": (lambda i: rounding.rounded(xs[i], token), 2),
        "int8_token backward in place, value again": (
            lambda i: rounding.reround_(grads[i], xs[i], token, True, dtype),
            2,
        ),
    }


def kernel_rows(device: torch.device, small: bool) -> Iterator[dict]:
    """Yield rows: microseconds, GB/s, and the share of a copy's GB/s."""
    shapes = [(64, 256)] if small else [(4096, 4096), (8192, 8192)]
    for shape, dtype in itertools.product(shapes, (torch.bfloat16, torch.float32)):
        copy = None
        for name, (call, passes) in calls(shape, dtype, device).items():
            if device.type != "cuda":
                call(0)
                continue
            us = microseconds(call)
            rate = passes * shape[0] * shape[1] * dtype.itemsize / us / 1e3
            copy = copy or rate
            row = {
                "kernel": name,
                "passes": round(passes, 3),
                "shape": "x".join(map(str, shape)),
                "dtype": str(dtype).removeprefix("torch."),
            }
            yield row | {"us": round(us, 1), "GB/s": round(rate), "share of copy": round(rate / copy, 3)}
    yield from layer_rows(device, small)
    yield from host_rows(device)


def layer_rows(device: torch.device, small: bool) -> Iterator[dict]:
    """Yield what the backward of one linear layer takes, in microseconds: two products, and two passes over its weight.

    "beside" runs the passes in a second stream, next to the product that does not wait for them: is it worth having?
    """
    spec = QuantSpec(bits=4, group_size=128)
    tokens, sizes = (16, [(128, 128)]) if small else (8192, [(2048, 2048), (8192, 2048), (2048, 8192)])
    for n, k in sizes:
        sets = [
            [torch.randn(shape, device=device).bfloat16() for shape in ((tokens, n), (tokens, k), (n, k))]
            for _ in range(SETS)
        ]
        step_size = torch.full((n, k // 128), 0.6, device=device)
        kernels = arithmetic(sets[0][2], step_size)

        def plain(i: int, sets=sets) -> None:
            grad, x, weight = sets[i]
            grad.t() @ x, grad @ weight

        def one_after_another(i: int, sets=sets, step_size=step_size, kernels=kernels) -> None:
            grad, x, weight = sets[i]
            how = step_size, spec, 0.1, (True, True), torch.bfloat16
            grad @ kernels.requantize_(grad.t() @ x, weight, *how)[0]

        def beside(i: int, sets=sets, step_size=step_size, kernels=kernels) -> None:
            grad, x, weight = sets[i]
            main, side = torch.cuda.current_stream(), second_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                rounded = kernels.fake_quantized(weight, step_size, spec)
            grad_weight = grad.t() @ x
            main.wait_stream(side)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                kernels.requantize_(grad_weight, weight, step_size, spec, 0.1, (True, True), None)
            grad @ rounded
            main.wait_stream(side)

        for name, call in {"plain": plain, "one after another": one_after_another, "beside": beside}.items():
            row = {"kernel": f"backward of a linear layer of {tokens} tokens, {name}", "shape": f"{n}x{k}"}
            if device.type == "cuda":
                yield row | {"us": round(microseconds(call), 1)}
            elif call is not beside:
                call(0)


@cache
def second_stream() -> torch.cuda.Stream:
    """Return one stream next to the current one."""
    return torch.cuda.Stream()


def host_rows(device: torch.device) -> Iterator[dict]:
    """Yield what one forward and backward of a tiny layer costs, in microseconds by the clock."""
    x = torch.randn(8, 64, device=device, requires_grad=True)
    policies = {
        "plain": None,
        "W4": qat.QuantPolicy(weight=QuantSpec(bits=4, group_size=32)),
        "W4A8": qat.QuantPolicy(weight=QuantSpec(bits=4, group_size=32), activation={"bits": 8}),
    }
    for name, policy in policies.items():
        layer = nn.Linear(64, 64, device=device)
        if policy is not None:
            qat.calibrate(qat.prepare(layer, policy, verbose=False), [x.detach()])
        us = _clock(lambda layer=layer: layer(x).sum().backward(), device)
        yield {"kernel": f"host, one linear layer forward and backward, {name}", "us": round(us, 1)}


def _clock(call: Callable[[], Tensor], device: torch.device) -> float:
    for _ in range(20):
        call()
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 50)
    return 1e6 * min(times)
