"""From a network to an ExecuTorch program: torch.export, then XNNPACK's partitioner and compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..layers import FrozenLayer
from ..modes import masks_as_given
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel
from .executorch_disk import OnDisk, share_when_copied_
from .executorch_layers import lowered


def lower(network: nn.Module, example: tuple[Tensor, ...], longest: int | None, source: str, disk: OnDisk) -> Any:
    """Return an ExecuTorch program; with ``longest``, for any number of tokens up to it.

    Its constants lie in files of ``disk``: it must be written while these are there.

    Raises:
        ArtifactError: torch cannot export the network, or XNNPACK leaves a quantized layer out.
        OSError: the disk is full, or cannot be written.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    shapes = None
    if longest is not None:
        tokens = torch.export.Dim("tokens", min=2, max=longest)
        shapes = (tuple({1: tokens} if part.dim() == 2 else {} for part in example),)
    with disk.compiled():
        try:
            # To this form ExecuTorch brings a program anyway; from here on its tensors stay the same objects.
            with masks_as_given():
                exported = torch.export.export(network, example, dynamic_shapes=shapes).run_decompositions({})
            share_when_copied_(exported)
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        except OSError:
            raise
        except Exception as error:  # torch.export's and ExecuTorch's own, which share no base
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"{source} cannot become an ExecuTorch program: {reason}") from error
        nodes = [str(node.target) for node in edge.exported_program().graph.nodes]
        left = [name for name in nodes if any(kind in name for kind in ("quantize_affine", "quantized_decomposed"))]
        if left:
            raise ArtifactError(f"XNNPACK does not take {len(left)} operations of quantized layers of {source}")
        return edge.to_executorch()


def lowered_layer(model: QuantizedModel, name: str, layer: FrozenLayer) -> nn.Module:
    """Return the module that a frozen layer becomes."""
    entry = model.layers[name]
    tensor = None if entry.weight is None else model.quantized(entry.tied or name)
    return lowered(layer, entry, tensor, model.activation_scale(name) if entry.has_activation_scale else None)


def quantized_weights(model: QuantizedModel) -> Iterator[tuple[str, QuantizedLayer, QuantizedTensor]]:
    """Yield (name, layer, weight) of each layer with a quantized weight, one at a time."""
    for name, layer in model.layers.items():
        if layer.weight is not None:
            tensor = model.quantized(layer.tied or name)
            yield name, layer, QuantizedTensor(tensor.codes.cpu(), tensor.scale.cpu(), tensor.spec, tensor.zero_point)
