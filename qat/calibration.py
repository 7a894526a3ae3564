"""calibrate: set activation step sizes from a few batches, and weights whose init reads data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import StateError
from .inputs import unbound
from .layers import is_prepared, quant_layers
from .modes import in_eval_mode
from .quantizers import ActivationStatistics, LearnedActivation, WeightCodebook, WeightLSQ
from .quantizers.lsq import never_reached
from .sharding import sharded_modules
from .spec import Init
from .wrappers import unwrapped

if TYPE_CHECKING:
    from .ptq import Options


def activation_quantizers(model: nn.Module) -> list[LearnedActivation]:
    """Return a prepared model's activation quantizers that have a step size."""
    quantizers = (layer.activation_quantizer for _, layer in quant_layers(model))
    return [quantizer for quantizer in quantizers if isinstance(quantizer, LearnedActivation)]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    options: Options | None = None,
    verbose: bool = True,
) -> nn.Module:
    """Set every uninitialised step size from the given batches; in place.

    First the weights', where the policy's init reads data (GPTQ and its like: see ``qat.ptq``, which then keeps all
    batches in memory), then those of activations, with fake-quantized weights and without quantized activations.
    Statistics of activations are combined over ranks, so that each rank starts from the same scale. The model runs in
    eval mode without gradients.

    Args:
        model: a prepared model.
        batches: what ``forward`` takes; several are better than one.
        forward: how to run a batch; default ``model(batch)``, with ``batch[0]`` of a tuple or list.
        options: of an init that reads data.
        verbose: print what such an init did to the layers.

    Raises:
        StateError: the model is not prepared, or sharded already, one tensor or dict in place of batches, no batch at
            all, dicts that the model does not take, a layer that no batch reached, or one that saw NaN: no activation's
            step size is set then.
        CalibrationError: data that an init cannot work with.
    """
    if isinstance(batches, torch.Tensor | Mapping) or not isinstance(batches, Iterable):
        raise StateError(f"calibrate takes several batches, got one {type(batches).__name__}: give a list or a loader")
    if not is_prepared(model):
        raise StateError("nothing to calibrate: call qat.prepare(model, policy) first")
    waiting = [quantizer for quantizer in activation_quantizers(model) if not quantizer.is_initialised]
    if (waiting or weights_wait(model)) and sharded_modules(model):
        raise StateError(
            "the model is sharded already, and what calibration sets would be lost: call qat.calibrate before "
            "fully_shard; a task that shards itself in configure_model takes policy.activation=null or a dynamic one"
        )
    run = forward or run_inputs
    if weights_wait(model):
        from .ptq import initialise

        batches = list(batches)
        report = initialise(model, batches, run, options)
        if verbose:
            print(report)
    if not waiting:
        return model
    seen = 0
    with _observing(waiting), in_eval_mode(model), torch.no_grad():
        for batch in batches:
            run(model, batch)
            seen += 1
        for quantizer in waiting:
            quantizer.observer.all_reduce()
        if not seen and not any(quantizer.observer.sums[1] for quantizer in waiting):  # on no rank
            raise StateError("calibration got no batch: give it at least one")
        if never := [quantizer.name for quantizer in waiting if not quantizer.observer.sums[1]]:
            raise never_reached(never)
        for quantizer in waiting:
            quantizer.observed(quantizer.observer)  # raises before any of them is set
        for quantizer in waiting:
            quantizer.initialise(quantizer.observer)
    return model


def run_inputs(model: nn.Module, batch: Any) -> Any:
    """Return ``model(batch)``, with ``batch[0]`` of a tuple or list.

    Raises:
        StateError: a dict that the model does not take, or one tensor where it takes several.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    try:
        return model(inputs)
    except (AttributeError, TypeError) as error:
        if isinstance(inputs, Mapping | tuple | list):
            stars = "**" if isinstance(inputs, Mapping) else "*"
            what, how = f"a {type(inputs).__name__}", stars + ("batch" if inputs is batch else "batch[0]")
        elif isinstance(batch, tuple | list) and (how := _arguments(model, batch)) is not None:
            what = f"the first of {len(batch)} tensors alone"
        else:
            raise
        raise StateError(
            f"the model does not take {what} ({error}): say how to run a batch, such as "
            f"forward=lambda model, batch: model({how})"
        ) from error


def _arguments(model: nn.Module, batch: Sequence[Any]) -> str | None:
    """Return the arguments as which a model that does not take the first part of a batch takes all; None for none."""
    model = unwrapped(model)
    if unbound(model, batch[0]) is None:
        return None
    for how, part in (("*batch", batch), ("*batch[:-1]", batch[:-1])):  # the last may be targets
        if unbound(model, part) is None:
            return how
    named = dict(zip(inspect.signature(model.forward).parameters, batch, strict=False))
    fits = len(named) == len(batch) and unbound(model, named) is None
    return ", ".join(f"{name}=batch[{index}]" for index, name in enumerate(named)) if fits else None


def weights_wait(model: nn.Module) -> bool:
    """Return whether a prepared model has weights that ``calibrate`` is to set."""
    quantizers = [layer.weight_quantizer for _, layer in quant_layers(model)]
    learned = (quantizer for quantizer in quantizers if isinstance(quantizer, WeightLSQ | WeightCodebook))
    return any(quantizer.waits_for_data for quantizer in learned)


@contextmanager
def _observing(quantizers: list[LearnedActivation]) -> Iterator[None]:
    for quantizer in quantizers:
        quantizer.observer = ActivationStatistics(quantizer.step_size.device, keep_sample=quantizer.init is Init.mse)
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
