"""One part of a model after another: quantized on inputs from parts that are quantized already.

The memory that is needed beside the model is one block's, its unquantized twin's for methods that compare with it, and
the activations between two blocks for all batches. Several ranks do the same work on their own batches; rank 0's result
counts.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import CalibrationError, StateError
from ..float32 import in_float32
from ..layers import QuantLayer, quant_layers
from ..modes import in_eval_mode
from ..quantizers import LearnedStepSize, Quantizer, WeightCodebook, WeightLSQ
from ..ranks import several_ranks
from ..spec import Init
from . import awq, block_training, error_compensation, squeezellm
from .error_compensation import AfterLayer, fall_back
from .options import Options
from .report import Report
from .resume import Finished
from .units import Chain, Context, Forward, Layers, Unit, find_blocks, probe

METHODS: dict[Init, Callable[[Unit, Options, Report], None]] = {
    Init.gptq: error_compensation.quantize_unit,
    Init.gptaq: error_compensation.quantize_unit,
    Init.awq: awq.quantize_unit,
    Init.signround: block_training.quantize_unit,
    Init.blockwise: block_training.quantize_unit,
    Init.squeezellm: squeezellm.quantize_unit,
}
NEED_TWIN = (Init.gptaq, Init.signround, Init.blockwise)


def waiting_layers(model: nn.Module) -> Layers:
    """Return the layers whose weights wait for calibration data, by name; of tied ones the first."""
    found: dict[int, tuple[str, Any]] = {}
    for name, layer in quant_layers(model):
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, WeightLSQ | WeightCodebook) and quantizer.waits_for_data:
            found.setdefault(id(quantizer), (name, layer))
    return dict(found.values())


def initialise(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    options: Options | None = None,
    after_layer: AfterLayer | None = None,
) -> Report:
    """Set the weights and step sizes of every layer that waits for data, in place; the model ends in the mode it had.

    Afterwards the codes of ``qat.quantized_tensors`` are the method's. Inputs are not quantized meanwhile, unless a
    runtime's own rounding is (``policy.dynamic``).

    Args:
        model: prepared, with an init that reads data.
        batches: what ``forward`` takes; all are kept.
        forward: (model, batch) -> output.
        options: see there.
        after_layer: of GPTQ: see ``error_compensation.quantize_unit``. It sees every layer: ``options.folder`` must
            then be None.

    Raises:
        CalibrationError: data that a layer cannot be quantized with; its message names the layer and the fix.
        StateError: nothing waits.
    """
    options = options or Options()
    layers, batches = waiting_layers(model), list(batches)
    if not layers:
        raise StateError("no weight waits for calibration data: it is set already, or its init reads none")
    check_batches(batches)
    init = next(iter(layers.values())).weight_quantizer.init
    report = Report(init)
    tied = tied_parameters(model)
    refuse_tied(model, layers, options, report)
    if not layers:
        return report
    device = torch.device(options.device or next(model.parameters()).device).type
    context = ambient_autocast(device)

    def run(module: nn.Module, batch: Any) -> Any:
        with context():
            return forward(module, batch)

    with calibrating(model), torch.no_grad(), torch.autocast(device, enabled=False):
        finished = Finished(options, init, batches)
        units = walk(model, layers, batches, run, options, context, init in NEED_TWIN)
        bar = tqdm(total=len(layers), desc=init.value, unit="layer", disable=not sys.stderr.isatty())
        with bar, closing(units):
            for unit in units:
                unit.tied = tied
                if not finished.load(unit, report):
                    if after_layer is None:
                        METHODS[init](unit, options, report)
                    else:
                        error_compensation.quantize_unit(unit, options, report, after_layer)
                    broadcast(unit)
                    finished.save(unit, report)
                for layer in unit.layers.values():
                    layer.weight_quantizer.enabled = True
                bar.update(len(unit.layers))
    return report


def walk(
    model: nn.Module,
    layers: Layers,
    batches: list[Any],
    forward: Forward,
    options: Options,
    context: Context,
    twins: bool,
) -> Iterator[Unit]:
    """Yield the units in order; each is finished by the consumer before the next one is asked for."""

    def on_batch(module: nn.Module, batch: int) -> Any:
        return forward(module, batches[batch])

    def whole(name: str, part: Layers) -> Unit:
        twin = unquantized_copy(model) if twins else None
        return Unit(name, model, part, on_batch, len(batches), context, twin=twin)

    found = find_blocks(model, layers)
    seen = found and probe(model, found[1], layers, batches[0], forward)
    if not seen or not seen.chained:
        yield whole("model", layers)
        return
    path, blocks = found
    inside = {id(module) for module in blocks.modules()}
    outside = {name: layer for name, layer in layers.items() if id(layer) not in inside}
    before = {name: layer for name, layer in outside.items() if name in seen.early}
    after = {name: layer for name, layer in outside.items() if name not in seen.early}
    if before:
        yield whole("before", before)
    chain = Chain(model, blocks, seen.rest, batches, forward, context)
    for index, block in enumerate(blocks):
        home = next(block.parameters()).device
        block.to(options.device or home)
        try:
            members = {id(module) for module in block.modules()}
            twin = unquantized_copy(block) if twins else None
            part = {name: layer for name, layer in layers.items() if id(layer) in members}
            run = chain.runner(index, twin, options.device)
            unit = Unit(f"{path}.{index}", block, part, run, len(batches), context, twin=twin)
            if part:
                yield unit
            chain.advance(unit)
        finally:
            block.to(home)
    if after:
        twin = unquantized_copy(model, blocks) if twins else None
        with chain.finished(batches, forward, twin) as run:
            yield Unit("after", model, after, run, len(batches), context, twin=twin)


def tied_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that are used in several places."""
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {key for key, count in counts.items() if count > 1}


def refuse_tied(model: nn.Module, layers: Layers, options: Options, report: Report) -> None:
    """Take layers out that share their weight with a part that is not quantized, which would be moved along.

    Raises:
        CalibrationError: there is one, and options allow no fallback.
    """
    plain = {
        id(module._parameters["weight"]): path
        for path, module in model.named_modules()
        if module._parameters.get("weight") is not None and not isinstance(module, QuantLayer)
    }
    for name, layer in list(layers.items()):
        if id(layer.weight) in plain:
            reason = f"the weight of {name!r} is also that of {plain[id(layer.weight)]!r}, which it would change"
            error = CalibrationError(f"{reason}: leave {name!r} out by a rule with weight null, or untie the two")
            fall_back({name: layer}, error, options, report)
            del layers[name]


def ambient_autocast(device: str) -> Context:
    """Return the autocast that is on here, for the model's forwards: the algebra around them stays in float32.

    Its cache would keep casts of weights that change between two forwards.
    """
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def unquantized_copy(module: nn.Module, shared: nn.Module | None = None) -> nn.Module:
    """Return a copy that computes in full precision; a part of it that does not run may be shared."""
    twin = copy.deepcopy(module, {} if shared is None else {id(shared): shared})
    for part in twin.modules():
        if isinstance(part, Quantizer):
            part.enabled = False
    return twin


def check_batches(batches: list[Any]) -> None:
    """Raise CalibrationError for no batch, empty ones, or tokens that are all the same."""
    tensors = [tensor for batch in batches for tensor in tensors_of(batch)]
    if not batches or (tensors and not any(tensor.numel() for tensor in tensors)):
        raise CalibrationError("calibration got no data: give it at least one batch that is not empty")
    tokens = [tensor for tensor in tensors if not tensor.is_floating_point() and tensor.numel()]
    if tokens and len(tokens) == len(tensors):
        values = {int(value) for tensor in tokens for value in (tensor.min(), tensor.max())}
        if len(values) == 1:
            raise CalibrationError(f"the calibration data is one token, {values.pop()}, repeated: give it real text")


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors in a batch, whatever they are in."""
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def broadcast(unit: Unit) -> None:
    """Give every rank what rank 0 came to: other ranks may have had other data."""
    if several_ranks():
        for tensor in unit.module.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
        for layer in unit.layers.values():
            if isinstance(layer.weight_quantizer, WeightLSQ):
                layer.weight_quantizer.set_step_size(layer.weight_quantizer.step_size)


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no key-value cache, exact float32 products, quantizers that have no step size yet switched off."""
    quantizers = [module for module in model.modules() if isinstance(module, LearnedStepSize | WeightCodebook)]
    enabled = {quantizer: quantizer.enabled for quantizer in quantizers}
    configs = {id(config): config for part in model.modules() if (config := part.__dict__.get("config")) is not None}
    configs = {key: config for key, config in configs.items() if getattr(config, "use_cache", False)}
    for config in configs.values():  # T5's decoder has one of its own
        config.use_cache = False  # blocks that run again and again would add to it
    for quantizer in quantizers:
        waits = quantizer.waits_for_data if isinstance(quantizer, WeightCodebook) else not quantizer.is_initialised
        quantizer.enabled = quantizer.enabled and not waits
    try:
        with in_eval_mode(model), in_float32(matmul=True):
            yield
    finally:
        for quantizer, value in enabled.items():
            quantizer.enabled = value
        for config in configs.values():
            config.use_cache = True
