"""ExecuTorch: a program for phones, ``model.pte``, whose linear layers XNNPACK runs in int4 on int8 inputs (8da4w).

Each quantized weight becomes torchao's IntxUnpackedToInt8Tensor, the network goes through torch.export, and
ExecuTorch's XNNPACK partitioner packs the weights into the file, where a layer of N outputs and K inputs has

    codes   uint8 (N, K/2)     u = code + 8, the even input in the low nibble
    scales  bf16 (N, K/g)      g a multiple of 32, or K

At run time XNNPACK rounds a layer's input to int8 for each token: what ``int8_token`` trains for. All else runs in
float32.
"""

from __future__ import annotations

import mmap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import refuse_beside
from ..errors import ArtifactError
from ..layers import FrozenLinear, frozen_layers
from ..numerics import QuantizedTensor
from ..packing import pack
from ..quantized_model import QuantizedLayer, QuantizedModel, to_model
from ..quantizers import DynamicActivation
from ..spec import Dynamic
from .companions import copy_companions
from .integer_linears import ROUNDS, exact, grid, other_grid, refuse, tensors
from .onnx import example_input
from .onnx_client import ROUNDING_TOLERANCE, TOLERANCE
from .onnx_graph import LogitsOnly

METHOD = "ExecuTorch"
FILE = "model.pte"
GROUP_MULTIPLE = 32
LONGEST = 512  # tokens: ExecuTorch plans its memory for the longest input


def write(model: QuantizedModel, folder: Path, network: nn.Module | None = None) -> list[str]:
    """Write ``model.pte`` into a folder; return notes to print.

    Args:
        model: what to write; it needs an example input, unless it is a transformers language model.
        folder: where to.
        network: an untrained instance of the user's own architecture, as for ``qat.load``.

    Raises:
        ArtifactError: names the layers that XNNPACK cannot hold exactly; or torch cannot export the model.
        OSError: the disk is full, or cannot be written.
    """
    refuse_beside(model, METHOD)
    refuse(METHOD, {name: problem for name, layer in model.layers.items() if (problem := _problem(layer))})
    scales = {name: exact(tensor.scale, torch.bfloat16, name, METHOD) for name, tensor in tensors(model)}
    _need()
    example = example_input(model, 1)
    wrapped = LogitsOnly(to_model(model, network).float()).eval()
    replaced = {}
    for name, layer in frozen_layers(wrapped.network):
        tensor = model.quantized(model.layers[name].tied or name)
        replaced[layer] = _torchao_linear(tensor, scales[name], layer.bias)
    for name, layer in list(wrapped.named_modules(remove_duplicate=False)):
        if layer in replaced:
            wrapped.set_submodule(name, replaced[layer])
    longest = _longest(model)
    program = _lower(wrapped, example, longest, model.source)
    copy_companions(model, folder)
    with (folder / FILE).open("wb") as stream:
        program.write_to_file(stream)
    trained = sum(layer.activation is Dynamic.int8_token for layer in model.layers.values())
    what = f"1 to {longest} tokens, without a cache" if longest else f"one input of shape {list(example.shape[1:])}"
    return [
        f"{FILE} takes {what}",
        "ExecuTorch rounds the inputs of these layers to int8 for each token at run time: "
        f"{trained} of {len(model.layers)} were trained with exactly that"
        + ("" if trained == len(model.layers) else " (policy: dynamic: int8_token)"),
    ]


def read(path: Path) -> QuantizedModel:
    """Refuse: a program holds a backend's own data, and no model.

    Raises:
        ArtifactError: always.
    """
    raise ArtifactError(f"{path} is an ExecuTorch program, which is not read back: use the artifact it was made from")


def verify(folder: Path, model: QuantizedModel, network: nn.Module | None = None) -> list[tuple[str, str]]:
    """Compare ``model.pte`` with the model; return (what, what was seen) rows.

    Every layer's packed codes and scales are looked for in the file. ExecuTorch's runtime then runs the first layer
    alone and the whole model, against our own with int8_token's rounding in every quantized layer.

    Raises:
        ArtifactError: codes or scales are not in the file, or outputs differ.
    """
    rows = _compare_file(folder / FILE, model)
    _need()
    frozen = to_model(model, network).float()
    for _, layer in frozen_layers(frozen):
        layer.activation_quantizer = DynamicActivation(Dynamic.int8_token)
    x = example_input(model, 8)
    with torch.no_grad():
        rows.append(_compare_layer(model, frozen))
        found = _run(folder / FILE, x)
        expected = LogitsOnly(frozen)(x)
    gap, largest = _gap(found, expected, ROUNDING_TOLERANCE, f"the outputs of {folder / FILE}")
    equal = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    seen = f"differ by at most {gap:.3g} (largest {largest:.3g}); argmax equal in {equal:.2%}"
    return [*rows, ("ExecuTorch, outputs", seen)]


def _problem(layer: QuantizedLayer) -> str | None:
    """Return what keeps a layer from being exact in XNNPACK, and the fix; None for nothing."""
    spec, activation = layer.weight, layer.activation
    if layer.type != "Linear":
        return f"is a {layer.type}, and only linear layers have int4 here; --to onnx holds it"
    if activation not in (None, Dynamic.int8_token):
        fix = f"--to {ROUNDS[activation] if isinstance(activation, Dynamic) else 'onnx'} keeps that"
        return f"trained with its input rounded as {activation}, and {METHOD} rounds as int8_token; {fix}"
    if not spec.holds_integers:
        return other_grid(layer, METHOD)
    if spec.bits > 4:
        return f"has {spec.bits} bits, and XNNPACK's groups 4; --to onnx holds it"
    if not spec.symmetric:
        return "has zero points, which XNNPACK has no place for; --to onnx or awq holds them"
    size = spec.group_size or layer.shape[1]
    if size % GROUP_MULTIPLE:
        return f"has groups of {size}, and XNNPACK multiples of {GROUP_MULTIPLE}; --to onnx holds it"
    return None


def _torchao_linear(tensor: QuantizedTensor, scale: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer whose weight is torchao's tensor with these codes and scales."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    rows, inputs = tensor.codes.shape
    scale = grid(QuantizedTensor(tensor.codes, scale, tensor.spec), scale.shape[1])[0].float()
    weight = IntxUnpackedToInt8Tensor(
        qdata=tensor.codes,
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=torch.int4,
        block_size=(1, inputs // scale.shape[1]),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
    with torch.device("meta"):
        linear = nn.Linear(inputs, rows, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias
    return linear


def _lower(network: nn.Module, example: Tensor, longest: int | None, source: str) -> Any:
    """Return an ExecuTorch program; with ``longest``, for any number of tokens up to it.

    Raises:
        ArtifactError: torch cannot export the network, or XNNPACK leaves a quantized layer out.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    shapes = None if longest is None else ({1: torch.export.Dim("tokens", min=2, max=longest)},)
    try:
        exported = torch.export.export(network, (example,), dynamic_shapes=shapes)
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    except Exception as error:  # torch.export's and ExecuTorch's own, which share no base
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{source} cannot become an ExecuTorch program: {reason}") from error
    left = [str(node.target) for node in edge.exported_program().graph.nodes if "quantize_affine" in str(node.target)]
    if left:
        raise ArtifactError(f"XNNPACK does not take {len(left)} operations of quantized layers of {source}")
    return edge.to_executorch()


def _longest(model: QuantizedModel) -> int | None:
    """Return the longest input of a transformers language model; None for another."""
    config = (model.architecture or {}).get("transformers") or {}
    return min(LONGEST, config.get("max_position_embeddings") or LONGEST) if "vocab_size" in config else None


def _compare_file(file: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Look for every layer's packed codes and scales.

    Raises:
        ArtifactError: some are not there; the layers are named.
    """
    total, missing = 0, []
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name, tensor in tensors(model):
            scale = grid(tensor, tensor.scale.shape[1])[0].bfloat16()
            parts = (pack(tensor.codes, 4), scale.contiguous().view(torch.uint8))
            if any(content.find(part.numpy().tobytes()) < 0 for part in parts):
                missing.append(name)
            total += tensor.codes.numel()
    if missing:
        raise ArtifactError(f"{file} lacks the codes or scales of {', '.join(missing)}")
    return [("codes and scales in the file", f"{len(model.layers)} layers, {total:,} codes, equal in every bit")]


def _compare_layer(model: QuantizedModel, frozen: nn.Module) -> tuple[str, str]:
    """Run the first layer alone in ExecuTorch, on 64 random tokens.

    Raises:
        ArtifactError: it differs from our layer by more than the order of summation explains.
    """
    name, layer = next(frozen_layers(frozen))
    x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
    found = _run(_layer_program(model, name, layer, x), x, batched=True)
    gap, largest = _gap(found, layer(x), TOLERANCE, f"the outputs of {name!r} in ExecuTorch")
    return f"ExecuTorch, {name}", f"differs by at most {gap:.3g} (largest {largest:.3g}) on {len(x)} tokens"


def _layer_program(model: QuantizedModel, name: str, layer: FrozenLinear, x: Tensor) -> bytes:
    tensor = model.quantized(model.layers[name].tied or name)
    return bytes(_lower(_torchao_linear(tensor, tensor.scale, layer.bias).eval(), x, None, name).buffer)


def _run(program: Path | bytes, x: Tensor, batched: bool = False) -> Tensor:
    """Return what ExecuTorch's runtime makes of x, one row at a time unless the program takes the batch."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(program).load_method("forward")
    return torch.cat([method.execute([part])[0].clone() for part in ([x] if batched else x.split(1))])


def _gap(found: Tensor, expected: Tensor, tolerance: float, what: str) -> tuple[float, float]:
    if found.shape != expected.shape:
        raise ArtifactError(f"{what} have the shape {list(found.shape)}, not {list(expected.shape)}")
    gap, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not gap <= tolerance * largest:
        raise ArtifactError(f"{what} differ by {gap:g} (largest {largest:g})")
    return gap, largest


def _need() -> None:
    if find_spec("executorch") is None:
        raise ArtifactError("this needs executorch: pip install executorch, in an environment with this torch")
