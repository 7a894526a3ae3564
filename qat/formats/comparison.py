"""Comparing an export with the model it was made from: every code, every float32 weight, and logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..frozen_model import to_model
from ..layers import frozen_layers
from ..quantized_model import QuantizedModel
from .float_error import TOLERANCE
from .integer_linears import grid, tensors
from .outputs import ONLY, outputs

TOKENS = 16  # of a text whose logits are compared


def compare(model: QuantizedModel, other: Callable[[str], tuple[Tensor, Tensor]], reader: str) -> list[tuple[str, str]]:
    """Compare every code and every float32 weight with what a reader makes of the export; return rows of a table.

    Args:
        model: what was exported.
        other: layer name -> the codes less their zero point (any integer dtype), and the float32 weight, each (N, K).
        reader: who reads.

    Raises:
        ArtifactError: anything differs; the layers are named.
    """
    total, problems = 0, {}
    for name, tensor in tensors(model):
        codes, weight = other(name)
        expected = tensor.codes.int()
        if tensor.zero_point is not None:
            size = tensor.codes.shape[1] // tensor.zero_point.shape[1]
            expected = expected - tensor.zero_point.int().repeat_interleave(size, 1).expand_as(expected)
        off = int((codes.int() != expected).sum())
        weights_off = int((weight != tensor.dequantize(torch.float32)).sum())
        if off or weights_off:
            problems[name] = f"has {off} codes and {weights_off} weights of {expected.numel()} that differ"
        total += expected.numel()
    if problems:
        lines = "".join(f"\n  {name!r} {problem}" for name, problem in problems.items())
        raise ArtifactError(f"read by {reader}, the export differs from what was trained:{lines}")
    return [(f"codes, {reader}", f"0 of {total:,} differ"), (f"weights, {reader}", "equal to q*s in every float32 bit")]


def compare_own(model: QuantizedModel, read: QuantizedModel) -> list[tuple[str, str]]:
    """Compare an export read back by this package: codes, weights and dense tensors; as ``compare``.

    Raises:
        ArtifactError: anything differs.
    """

    def one(name: str) -> tuple[Tensor, Tensor]:
        tensor = read.quantized(read.layers[name].tied or name)
        scale, zero_point = grid(tensor, tensor.scale.shape[1])
        size = tensor.codes.shape[1] // scale.shape[1]
        return tensor.codes.int() - zero_point.int().repeat_interleave(size, 1), tensor.dequantize(torch.float32)

    if read.layers.keys() != model.layers.keys():
        differing = sorted(read.layers.keys() ^ model.layers.keys())
        raise ArtifactError(f"the export has other quantized layers: {', '.join(differing)}")
    rows = compare(model, one, "qat")
    names = {*model.dense, *model.tied}
    if names != {*read.dense, *read.tied}:
        raise ArtifactError(f"the export has other tensors: {', '.join(sorted(names ^ {*read.dense, *read.tied}))}")
    for name in names:
        here, there = model.dense[model.tied.get(name, name)], read.dense[read.tied.get(name, name)]
        if here.dtype != there.dtype or not torch.equal(here.cpu(), there):
            raise ArtifactError(f"the export differs from what was trained: {name!r}")
    return [*rows, ("other tensors, qat", f"{len(names)} equal")]


def compare_logits(
    model: QuantizedModel,
    client: Callable[[Tensor], Tensor],
    name: str,
    as_client: Callable[[nn.Module], str] | None = None,
    length: int = TOKENS,
) -> tuple[str, str]:
    """Compare a client's logits for random tokens with our frozen float32 model's; return a row of a table.

    Args:
        model: what was exported.
        client: tokens (1, length) int64 -> logits (1, length, vocabulary) float32.
        name: the client's, for the table.
        as_client: changes our frozen model to compute what the client is known to compute otherwise, and says it.
        length: how many tokens.

    Raises:
        ArtifactError: they differ by more than TOLERANCE, or our model does not run either.
    """
    tokens = torch.randint(0, vocabulary(model), (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network = to_model(model).float()
        how = (as_client(network) if as_client else "") + (f", {length} tokens" if length < TOKENS else "")
        with one_error(f"{type(network).__name__} of this config fails at {length} tokens, whatever the format"):
            expected = logits(network, tokens)
        gap = (client(tokens) - expected).abs().max().item()
    largest = expected.abs().max().item()
    if not gap <= TOLERANCE * largest:
        raise ArtifactError(
            f"the logits of {name}{how} differ by {gap:g} from the trained model's (largest {largest:g})"
        )
    return f"logits, {name}{how}", f"differ by at most {gap:g} (largest {largest:g})"


def logits(network: nn.Module, tokens: Tensor) -> Tensor:
    """Return a language model's logits, (batch, length, vocabulary)."""
    return outputs(network, tokens)[ONLY]


def rounding_weights(model: QuantizedModel, dtype: torch.dtype) -> Callable[[nn.Module], str]:
    """Return what lets a frozen network of ``model`` multiply in float32 with each q*s rounded to a dtype."""

    def change(network: nn.Module) -> str:
        for name, layer in list(frozen_layers(network)):
            network.set_submodule(name, _plain(model.quantized(name).dequantize(dtype), layer.bias))
        return f", with q*s rounded to {str(dtype).removeprefix('torch.')}"

    return change


def scaling_embeddings(exact: float, rounded: float) -> Callable[[nn.Module], str]:
    """Return what lets a network of a Gemma multiply its embedding by a client's rounded factor."""

    def change(network: nn.Module) -> str:
        for scale in _embedding_scales(network):
            scale.fill_(rounded)
        return f", with {rounded:g} for {exact:g}"

    return change


def as_stored_(opened: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round what a model of a dtype, opened in float32, would have rounded in its own: a Gemma's embedding scale."""
    for scale in _embedding_scales(opened):
        scale.copy_(scale.to(dtype))
    return opened


def _embedding_scales(network: nn.Module) -> list[Tensor]:
    scales = [getattr(module, "embed_scale", None) for module in network.modules()]
    return [scale for scale in scales if isinstance(scale, Tensor)]  # of others it is a number


@contextmanager
def one_error(what: str) -> Iterator[None]:
    """Say in one line what a client fails with in the block, which has no class in common with other failures.

    Args:
        what: who fails at what.

    Raises:
        ArtifactError: it failed.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # mlx-lm exits where it misses a package
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ArtifactError(f"{what}: {reason:.300}") from error


def not_compared(name: str, why: object = "this is no small language model") -> tuple[str, str]:
    """Return the row of a client whose logits are not looked at."""
    return f"logits, {name}", f"not compared: {why}"


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight, linear.bias = nn.Parameter(weight.float(), requires_grad=False), bias
    return linear


def vocabulary(model: QuantizedModel) -> int:
    """Return the vocabulary's size; 0 for a model without one."""
    return model.architecture["transformers"].get("vocab_size") or 0


def small(model: QuantizedModel) -> bool:
    """Return whether running the whole language model twice in float32 is cheap: under half a billion weights."""
    names = model.architecture["transformers"].get("architectures") or [""]
    weights = sum(layer.shape[0] * layer.shape[1] for layer in model.layers.values())
    return names[0].endswith("ForCausalLM") and vocabulary(model) > 0 and weights < 5e8
