"""prepare: swap a model's layers for their fake-quant twins as a policy says, and print what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .decisions import check_init, check_shapes, decide, is_embedding, require_any
from .errors import QATError, StateError
from .layers import is_frozen, is_prepared, make_fake_quant_, matrix, split_attentions_
from .policy import Decision, QuantPolicy
from .quantizers import (
    ActivationLSQ,
    ActivationLSQPlus,
    ActivationMinMax,
    ActivationPACT,
    ActivationRange,
    AsymmetricLSQ,
    DynamicActivation,
    LearnedActivation,
    OfWeight,
    WeightCodebook,
    WeightLSQ,
    WeightMinMax,
)
from .spec import ActivationQuantizer, Dynamic, Init, WeightQuantizer
from .table import table
from .unsaved_buffers import warn_of_rounded
from .wrappers import call_every_layer_, require_materialised


def prepare(model: nn.Module, policy: QuantPolicy | dict[str, Any] | str | Path, verbose: bool = True) -> nn.Module:
    """Make a model train as the quantized model it will be; in place.

    Every parameter exists afterwards; weight step sizes are initialised from the weights, activation step sizes, and
    weights whose init reads data, wait for ``qat.calibrate``. Tied weights stay tied and share one quantizer.

    Args:
        model: any module; its ``nn.Linear``, convolutions, transposed ones and transformers' ``Conv1D`` layers can be
            quantized, and ``nn.Embedding`` and ``nn.Conv1d`` layers are where a rule gives them a spec. An
            ``nn.MultiheadAttention`` becomes a ``SplitAttention`` with four linear layers, q_proj, k_proj, v_proj and
            out_proj, whatever the policy says.
        policy: a QuantPolicy; or its fields as a dict, a YAML file, or the name of one that ships ("conv_w4a4").
        verbose: print the summary.

    Returns:
        The same model.

    Raises:
        StateError: no module, or one that is prepared or frozen already.
        PolicyError: no policy, or a rule that matches nothing or asks for what its layer cannot do.
        LayerError: nothing to quantize, shapes that do not fit, a weight with NaN, or an init that does not know a
            layer; every such layer is listed with its fix.
    """
    policy = QuantPolicy.of(policy)
    if is_prepared(model):
        raise StateError("this model is prepared already: prepare a fresh one, or continue with it as it is")
    if is_frozen(model):
        raise StateError(
            "this model is frozen: qat.start_from(DIR, policy) trains on from the codes that it was saved with; of a "
            "network of your own, give it model=MyNet()"
        )
    require_materialised(model)
    warn_of_rounded(model)
    undo = split_attentions_(model)
    try:
        decisions = decide(model, policy)
        check_shapes(decisions)
        require_any(model, policy, decisions)
        check_init(decisions, policy.init)
    except QATError:
        undo()
        raise
    call_every_layer_(model)
    weight_quantizers: dict[int, OfWeight] = {}
    for decision in decisions:
        if decision.weight is None and decision.activation is None:
            continue
        layer, weight, activation = decision.layer, None, None
        if decision.weight is not None:
            weight = weight_quantizers.get(id(layer.weight))
            if weight is None:
                weight = weight_quantizer(decision, policy.init, policy.weight_quantizer)
                weight_quantizers[id(layer.weight)] = weight
        if isinstance(decision.activation, Dynamic):
            activation = DynamicActivation(decision.activation)
        elif decision.activation is not None:
            activation = activation_quantizer(decision, policy.init, policy.activation_quantizer)
        make_fake_quant_(layer, weight, activation)
    if verbose:
        print(table(model, decisions))
    return model


def weight_quantizer(decision: Decision, init: Init, kind: WeightQuantizer = WeightQuantizer.lsq) -> OfWeight:
    """Return the quantizer that a decision gives its layer, started from the weight's values."""
    weight = matrix(decision.layer)
    if init.reads_data and is_embedding(decision):
        init = init.of_activations  # methods that read data are for matrix products
    if decision.weight.codebook is not None:
        return WeightCodebook(decision.weight, weight, decision.name, init)
    if kind is WeightQuantizer.minmax:
        return WeightMinMax(decision.weight, decision.name)
    if not decision.weight.symmetric:
        return AsymmetricLSQ(decision.weight, weight, decision.name, init)
    return WeightLSQ(decision.weight, weight, decision.name, init)


def activation_quantizer(decision: Decision, init: Init, kind: ActivationQuantizer) -> LearnedActivation:
    """Return the quantizer that a decision gives its layer's input, which waits for ``qat.calibrate``."""
    spec, device = decision.activation, decision.layer.weight.device
    if kind is ActivationQuantizer.minmax:
        return (ActivationMinMax if spec.symmetric else ActivationRange)(spec, device, decision.name)
    learned = ActivationPACT if kind is ActivationQuantizer.pact else ActivationLSQ
    learned = learned if spec.symmetric else ActivationLSQPlus
    return learned(spec, device, decision.name, init.of_activations)
