"""Start training from a quantized model of any format that can be read: from its codes and scales.

The weights are what the codes stand for, q * s, and the step sizes are the stored scales, so that the first forward
quantizes to the stored codes: what is trained on is the model that somebody shipped.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from . import formats
from .checkpoint import load_state
from .errors import ArtifactError, LayerError
from .frozen_model import matching_layer
from .layers import QuantLayer, matrix, quant_layers, turned
from .models import build
from .numerics import MIN_SCALE
from .policy import QuantPolicy
from .quantized_model import QuantizedLayer, QuantizedModel
from .quantizers import AsymmetricLSQ, LearnedActivation, LearnedStepSize, WeightCodebook, WeightMinMax
from .surgery import prepare


def start_from(
    source: str | Path, policy: QuantPolicy, model: nn.Module | None = None, verbose: bool = True
) -> nn.Module:
    """Return a prepared model that trains on from a quantized one, with the same codes.

    Args:
        source: our artifact, or a folder or file of GPTQ, AWQ, compressed-tensors, GGUF and the others, of any writer.
        policy: what to train; it has to have the grids of the source (the error says which) where both quantize.
        model: an untrained instance of the user's own architecture, in full precision.
        verbose: print ``prepare``'s summary, and how many codes were taken over.

    Raises:
        ArtifactError: the source cannot be read, or does not fit the model.
        LayerError: layers whose codes the policy would change; each is named with what fits.
        PolicyError, StateError: as ``qat.prepare``.
    """
    quantized = formats.read(Path(source))
    model = prepare(fill(plain_model(quantized) if model is None else model, quantized), policy, verbose)
    said = take_codes(model, quantized)
    if verbose:
        print(said)
    return model.train()


def plain_model(source: str | Path | QuantizedModel) -> nn.Module:
    """Return an untrained model of the source's architecture, in float32 and in full precision.

    Raises:
        ArtifactError: the source cannot be read, or does not name its architecture.
    """
    quantized = source if isinstance(source, QuantizedModel) else formats.read(Path(source))
    if quantized.architecture is None:
        raise ArtifactError(f"{quantized.source} does not name its architecture: give an untrained instance of it")
    return build(quantized.architecture).float()


def fill(model: nn.Module, quantized: QuantizedModel) -> nn.Module:
    """Give a full-precision model the values that a quantized one stands for, in the model's own dtypes; in place.

    Raises:
        ArtifactError: names and shapes that do not fit.
    """
    state = dict(quantized.dense) | {name: quantized.dense[owner] for name, owner in quantized.tied.items()}
    for name, entry in quantized.layers.items():
        layer = matching_layer(model, name, entry, quantized.source)
        if entry.weight is None:
            continue
        value = quantized.quantized(entry.tied or name).dequantize()
        state[f"{name}.weight"] = turned(layer, value).contiguous()
    own = model.state_dict()
    cast = {name: value.to(own[name].dtype) if name in own else value for name, value in state.items()}
    load_state(model, cast, quantized.source, ArtifactError)
    return model


def take_codes(model: nn.Module, quantized: QuantizedModel) -> str:
    """Set the step sizes of a filled and prepared model to the stored scales, in place; return a line to print.

    Raises:
        LayerError: layers whose codes are not the stored ones on the policy's grid; each is named with what fits.
    """
    total, taken, plain, problems = 0, 0, 0, []
    layers = dict(quant_layers(model))
    for name, entry in quantized.layers.items():
        layer = layers.get(name)
        activation = None if layer is None else layer.activation_quantizer
        symmetric = entry.activation.symmetric if entry.has_activation_scale else None
        if isinstance(activation, LearnedActivation) and activation.spec.symmetric == symmetric:
            zero_point = None if symmetric else quantized.activation_zero_point(name)
            activation.start(quantized.activation_scale(name), zero_point, entry.activation.signed is not False)
        if entry.weight is None:
            continue
        if layer is None or layer.weight_quantizer is None:
            plain += 1
        elif (problem := _take(layer, entry, quantized, name)) is not None:
            problems.append(f"{name!r} {problem}")
        else:
            total, taken = total + quantized.quantized(entry.tied or name).codes.numel(), taken + 1
    if problems:
        raise LayerError(f"training would not start from the codes of {quantized.source}:\n  " + "\n  ".join(problems))
    more = f"; {plain} layers that the policy leaves alone start from q * s" if plain else ""
    return f"{quantized.source}: 0 of {total:,} codes differ in {taken} layers{more}"


def _take(layer: QuantLayer, entry: QuantizedLayer, quantized: QuantizedModel, name: str) -> str | None:
    """Set one layer's step sizes; return what is wrong with its grid, or None."""
    tensor, quantizer = quantized.quantized(entry.tied or name), layer.weight_quantizer
    spec = quantizer.spec
    fix = f"has {entry.weight} and the policy {spec}: give it policy.weight.{_fields(entry)}, or a rule with these"
    small = int((tensor.scale < MIN_SCALE).sum())
    if small:
        return f"has {small} scales below 2^-17, which training does not keep: leave it out with weight: null"
    if isinstance(quantizer, WeightMinMax):
        return "would take its step sizes from the weight's range: use policy.weight_quantizer=lsq"
    if isinstance(quantizer, WeightCodebook) != (entry.weight.codebook is not None):
        return fix
    if isinstance(quantizer, LearnedStepSize):
        step_size = _spread(tensor.scale.float(), quantizer.step_size.shape)
        if step_size is None:
            return fix
        if isinstance(quantizer, AsymmetricLSQ):
            zero_point = torch.zeros_like(tensor.codes[:1, :1]) if tensor.zero_point is None else tensor.zero_point
            quantizer.start(step_size, _spread(zero_point, quantizer.step_size.shape))
        else:
            quantizer.set_step_size(step_size)
    elif tensor.levels is not None and tensor.levels.shape == quantizer.levels.shape:
        quantizer.set_levels(tensor.levels)
    found = quantizer.quantize(matrix(layer))
    same = torch.equal(found.codes.cpu(), tensor.codes.cpu())
    return None if same and torch.equal(found.dequantize().cpu(), tensor.dequantize().cpu()) else fix


def _spread(scale: Tensor, shape: torch.Size) -> Tensor | None:
    """Return scales (1, 1), (N, 1) or (N, G) repeated to finer groups; None where the shape is coarser."""
    rows, groups = shape
    if scale.shape[0] not in (1, rows) or groups % scale.shape[1]:
        return None
    return scale.expand(rows, -1).repeat_interleave(groups // scale.shape[1], 1)


def _fields(entry: QuantizedLayer) -> str:
    """Return the fields of a layer's spec that decide its codes, as overrides."""
    spec = entry.weight
    where = f"granularity={spec.granularity.value}" if spec.group_size is None else f"group_size={spec.group_size}"
    what = f"bits={spec.bits}" if spec.codebook is None else f"codebook={spec.codebook.value}"
    zero_points = "" if spec.symmetric else ", symmetric=false"
    if spec.zero_point_dtype is not None:
        zero_points += f", zero_point_dtype={spec.zero_point_dtype.value}"
    return f"{what}, {where}{zero_points} and scale_dtype={spec.scale_dtype.value}"
