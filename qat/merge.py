"""``python -m qat.merge BASE ADAPTER --out DIR``: put an adapter into the codes of its base, and say what that costs.

Codes hold no small change: rounding W + B A again keeps a part of B A that can be nothing, and a weight of 16 bits that
is not quantized loses some of it, too. The share that survives is measured and printed, and a merge that loses any is
written only with --lossy. What loses nothing is to train inside the rounding (``qat.joint_lora``), or to ship the
adapter beside its base, as training saves it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .broken_pipe import ends_quietly
from .errors import ArtifactError, QATError, StateError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .numerics import QuantizedTensor


@dataclass
class Cost:
    """What merging an update into a weight left of it.

    Attributes:
        name: the quantized layer's, or that of a parameter which is not quantized.
        survives: <Q(W + U) - W, U> / <U, U>, with U the update and Q the rounding to codes, or to the parameter's
            dtype: 1 if all of it is there, 0 if nothing.
        noise: |Q(W + U) - W - U| / |U|: what is there instead, in sizes of the update.
        numbers: in the weight.
        changed: codes that changed; None where there are none.
    """

    name: str
    survives: float
    noise: float
    numbers: int
    changed: int | None

    @property
    def exact(self) -> bool:
        """Whether the merged weight is the sum, to rounding of float32."""
        return self.noise < 1e-6


def merge(model: nn.Module) -> tuple[nn.Module, list[Cost]]:
    """Put the adapter of peft's model into its frozen base; return the base and what it cost, by weight.

    Layers that are not quantized, such as stacked experts, take the update in float32, and keep their dtype.

    Raises:
        StateError: this is no peft model with a frozen base, its adapter is of another kind than LoRA or on no linear
            layer that is quantized, or on an embedding that is; a layer that is not quantized shares its weight, or one
            without a bias would get one.
    """
    from .adapters import wrapping_layers
    from .layers import FrozenLinear, PackedWeight, is_frozen

    wrapped = [(name, wrapper) for name, wrapper in wrapping_layers(model) if not name.endswith(".base_layer")]
    frozen = [(name, wrapper) for name, wrapper in wrapped if isinstance(wrapper.base_layer, FrozenLinear)]
    if not wrapped or not is_frozen(model):
        raise StateError("merge takes a frozen base with an adapter: adapters.load_adapter(qat.load(BASE), ADAPTER)")
    if not frozen:
        raise StateError(
            "this adapter is on no quantized linear layer: ship it beside its base, or let peft's merge_and_unload() "
            "put it into weights that are not quantized"
        )
    costs, base = [], model.get_base_model()
    for name, wrapper in wrapped:
        if not isinstance(wrapper.base_layer, FrozenLinear):
            costs += _merge_plain(name, wrapper, base)
    for name, wrapper in frozen:
        layer = wrapper.base_layer
        tensor = layer.packed_weight.quantized_tensor()
        weight = tensor.dequantize()
        target = _with_update(name, wrapper, weight)
        merged = requantize(tensor, target)
        changed = int((tensor.codes != merged.codes).sum())
        costs.append(_cost(_plain_name(name), weight, target, merged.dequantize(), changed))
        layer.packed_weight = PackedWeight.from_tensor(merged)
        costs += _merge_bias(name, wrapper)
    for name, wrapper in wrapped:
        base.set_submodule(_plain_name(name), wrapper.get_base_layer())
    return base, costs


def requantize(tensor: QuantizedTensor, weight: Tensor) -> QuantizedTensor:
    """Return the codes of another weight on a tensor's grid: its own scale, or for a codebook the new largest."""
    from .numerics import quantize_tensor
    from .quantizers import WeightCodebook
    from .spec import Codebook

    if tensor.spec.codebook is None:
        return quantize_tensor(weight, tensor.scale, tensor.spec, tensor.zero_point)
    quantizer = WeightCodebook(tensor.spec, weight, "")
    if tensor.spec.codebook is Codebook.custom:
        quantizer.set_levels(tensor.levels)
    return quantizer.quantize(weight)


def table(costs: list[Cost]) -> str:
    """Return what a merge cost: the whole, and the weights that lost most; codes first, then what is not quantized."""
    if all(cost.exact for cost in costs):
        return f"merged {len(costs)} weights: exact"
    quantized = [cost for cost in costs if cost.changed is not None]
    plain = [cost for cost in costs if cost.changed is None]
    codes, changed = sum(cost.numbers for cost in quantized), sum(cost.changed for cost in quantized)
    changes = f"{changed:,} of {codes:,} codes change ({changed / codes:.2%}), in {len(quantized)} layers"
    lines = [f"lossy: {_whole(quantized)}", f"{changes}; the worst:", *_worst(quantized)]
    if plain:
        lines += [f"in what is not quantized {_whole(plain)}; the worst:", *_worst(plain)]
    return "\n".join(lines)


def _whole(costs: list[Cost]) -> str:
    numbers = sum(cost.numbers for cost in costs)
    mean = sum(cost.survives * cost.numbers for cost in costs) / numbers
    noise = sum(cost.noise * cost.numbers for cost in costs) / numbers
    return f"{mean:.1%} of the update survives, with noise of {noise:.2f} times its size beside it"


def _worst(costs: list[Cost]) -> list[str]:
    return [f"  {cost.name}  {cost.survives:.1%}" for cost in sorted(costs, key=lambda cost: cost.survives)[:3]]


@ends_quietly()
def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 where it is refused."""
    parser = argparse.ArgumentParser(prog="python -m qat.merge", description=__doc__)
    parser.add_argument("base", type=Path, help="a quantized model, in any format that can be read")
    parser.add_argument("adapter", type=Path, help="a folder of peft's, trained on it")
    parser.add_argument("--out", type=Path, required=True, help="the artifact to write")
    parser.add_argument("--lossy", action="store_true", help="write it even if the update does not survive whole")
    parser.add_argument("--any-base", action="store_true", help="take an adapter that was trained on other codes")
    arguments = parser.parse_args(argv)
    try:
        run(arguments.base, arguments.adapter, arguments.out, arguments.lossy, arguments.any_base)
    except (QATError, PermissionError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def run(source: Path, adapter: Path, out: Path, lossy: bool = False, any_base: bool = False) -> None:
    """Merge, print what it costs, and write it.

    Raises:
        ArtifactError: it loses something and ``lossy`` is not set; a folder cannot be read or written, or ``out`` is
            the base.
    """
    from . import formats
    from .adapters import CONFIG, load_adapter, stored
    from .atomic import atomic_folder, require_other
    from .formats import native
    from .formats.companions import copy_files
    from .frozen_model import from_model, to_model

    if (source / CONFIG).is_file():
        raise ArtifactError(f"{source} is an adapter of peft: the base comes first, then the adapter")
    require_other(out, source, "base")
    quantized = formats.read(source)
    base, costs = merge(load_adapter(to_model(quantized), adapter, any_base=any_base))
    print(table(costs))
    if not lossy and not all(cost.exact for cost in costs):
        raise ArtifactError(
            "this merge loses part of the adapter: --lossy writes it all the same; train with adapter=joint to lose "
            "nothing, or ship the adapter beside its base"
        )
    merged = from_model(base)
    merged.example = quantized.example
    with atomic_folder(out, native.is_artifact) as folder:
        native.write(merged, folder)
        if quantized.files is not None:  # without adapters, which belong to the codes of before
            copy_files(quantized.files, folder)
    for name in stored(quantized.files):
        print(f"left out: the adapter {name!r} beside {source}, which was trained on its codes")
    print(f"wrote {out}")


def _merge_plain(name: str, wrapper: nn.Module, base: nn.Module) -> list[Cost]:
    """Let peft merge into a layer that is not quantized; stacked experts have a wrapper inside a wrapper."""
    import torch

    from .layers import FrozenLayer

    if isinstance(layer := wrapper.get_base_layer(), FrozenLayer):
        raise StateError(f"{name!r}: merge does not know a {type(layer).__name__}: ship its adapter beside its base")
    inside = {id(parameter) for parameter in layer.parameters()}
    shared = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    if any(shared[key] > 1 for key in inside):
        raise StateError(f"{name!r} shares its weight with another layer, which a merge would change as well")
    before = {part: parameter.data for part, parameter in layer.named_parameters()}
    for part, weight in before.items():  # to whose dtype peft would round first the update, then the sum
        layer.get_parameter(part).data = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    while hasattr(wrapper, "base_layer"):
        wrapper.merge()
        wrapper = wrapper.base_layer
    costs = []
    for part, weight in before.items():
        parameter = layer.get_parameter(part)
        target, parameter.data = parameter.data, weight
        costs += _put(f"{_plain_name(name)}.{part}", parameter, target)
    return costs


def _put(name: str, held: Tensor, target: Tensor) -> list[Cost]:
    """Put a sum into a tensor of its own dtype; return what rounding to that took of the update, if there is one."""
    before, held.data = held.data, target.to(held.dtype)
    _require_finite(name, held.data)
    return [] if (target == before).all() else [_cost(name, before, target, held.data, None)]


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _require_finite(name: str, weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise StateError(f"{name!r}: its adapter holds NaN or infinity")


def _with_update(name: str, wrapper: nn.Module, weight: Tensor) -> Tensor:
    """Return the float32 weight that base and active adapters make together."""
    if not hasattr(wrapper, "lora_variant"):
        raise StateError(
            f"{name!r} has an adapter of another kind than LoRA ({type(wrapper).__module__}), which merge does not "
            "know: ship it beside its base"
        )
    for adapter in wrapper.active_adapters:
        if adapter not in wrapper.lora_A:
            continue
        variant = wrapper.lora_variant.get(adapter)
        if variant is None:
            weight = weight + wrapper.get_delta_weight(adapter).float()
        else:  # DoRA, which scales the sum
            weight = variant.merge_safe(wrapper, adapter, weight)
    _require_finite(name, weight)
    return weight.detach()


def _merge_bias(name: str, wrapper: nn.Module) -> list[Cost]:
    """Add what active adapters with lora_bias=True add to every output."""
    layer, costs = wrapper.base_layer, []
    for adapter in wrapper.active_adapters:
        if not wrapper.lora_bias.get(adapter):
            continue
        if layer.bias is None:
            raise StateError(
                f"{name!r} has no bias to merge the adapter's into (lora_bias=True): ship it beside its base"
            )
        target = layer.bias.data.float() + wrapper.lora_B[adapter].bias.data.float() * wrapper.scaling[adapter]
        costs += _put(f"{_plain_name(name)}.bias", layer.bias, target)
    return costs


def _cost(name: str, weight: Tensor, target: Tensor, merged: Tensor, changed: int | None) -> Cost:
    update, done = target.double() - weight, merged.double() - weight
    size = update.square().sum()
    if not size:
        return Cost(name, 1.0, 0.0, weight.numel(), changed)
    survives, noise = (done * update).sum() / size, ((done - update).square().sum() / size).sqrt()
    return Cost(name, survives.item(), noise.item(), weight.numel(), changed)


if __name__ == "__main__":
    sys.exit(main())
