"""transformers opens, quantizes and saves our models: ``import qat.hf`` registers all of it.

    AutoModelForCausalLM.from_pretrained("out/")                       # an artifact of ours: frozen layers, our kernels
    AutoModelForCausalLM.from_pretrained(NAME, quantization_config=QATConfig(policy))   # quantized tensor by tensor
    qat.hf.from_pretrained(NAME)          # bitsandbytes NF4, GPTQ, AWQ, compressed-tensors or torchao: the same layers
    model.generate(**inputs, past_key_values=qat.hf.int8_cache(model))   # keys and values in int8: ``qat.kv_cache``
    model.save_pretrained("out/")         # of a frozen model: our artifact, tokenizer and generation config with it

The third is a function of its own, since a registration for those methods would take them from their own packages.
Layers are read by ``qat.formats``, everything else by transformers itself, with its device maps and its renamings.
"""

from __future__ import annotations

import json
import pickle
import re
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import formats, parameterless  # noqa: F401  what the latter sets is all it does
from .atomic import atomic_folder
from .decisions import check_shapes, decide
from .errors import ArtifactError, LayerError, PolicyError
from .formats import native
from .formats.companions import PATTERNS, copy_files
from .frozen_model import from_model, frozen_activation, matching_layer
from .kv_cache import int8_cache as int8_cache
from .layers import FrozenLayer, PackedWeight, is_frozen, make_frozen_, matrix, split_attentions_
from .models import require_layers_that_end
from .policy import Decision, QuantPolicy
from .quantizers import DynamicActivation, FrozenActivation
from .spec import Dynamic, QuantSpec
from .surgery import weight_quantizer
from .wrappers import call_every_layer_

FOREIGN = ("gguf", "mlx", "onnx")
METHODS = ("bitsandbytes_4bit", "gptq", "awq", "compressed-tensors", "torchao")  # as transformers calls them


@register_quantization_config(native.METHOD)
class QATConfig(QuantizationConfigMixin):
    """transformers' quantization config of our layers.

    Args:
        policy: quantizes a full-precision checkpoint while it is loaded: weights only, each rounded once and then
            frozen. None reads what a quantized checkpoint says of itself.
        stored: the rest of a checkpoint's own quantization config, which ``qat.formats`` reads from the file.
    """

    def __init__(self, policy: QuantPolicy | dict[str, Any] | str | Path | None = None, **stored: Any) -> None:
        self.quant_method = native.METHOD
        self.policy = None if policy is None else QuantPolicy.of(policy)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"quant_method": self.quant_method, "policy": self.policy and self.policy.to_dict()}


@register_quantizer(native.METHOD)
class QATQuantizer(HfQuantizer):
    """What transformers calls while it loads a model: frozen layers before, their codes after."""

    requires_calibration = False
    is_trainable = True  # adapters on top of it
    is_compileable = True

    def is_serializable(self, *args: Any) -> bool:
        """Return True: ``save_pretrained`` writes an artifact."""
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a tensor of a full-precision checkpoint becomes codes as it is loaded."""
        return not self.pre_quantized and param_name in self.decisions

    def get_quantize_ops(self) -> ConversionOps:
        """Return what makes codes of such a tensor."""
        return _Quantize(self)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        call_every_layer_(model)
        if not self.pre_quantized:
            self.decisions = _weight_decisions(model, self.quantization_config.policy)
            return
        if not checkpoint_files:
            raise ArtifactError("a quantized model is opened from its folder: from_pretrained(DIR) without state_dict")
        with torch.device("cpu"):  # transformers builds the model on the meta device
            self.source = formats.read(Path(checkpoint_files[0]).parent)
        prefix = f"{model.base_model_prefix}."
        names = [*self.source.layers, *self.source.dense, *self.source.tied]
        split_attentions_(model, [form for name in names for form in (name, name.removeprefix(prefix), prefix + name)])
        self.layers = _layers_in(model, list(self.source.layers))
        if not self.layers:
            raise ArtifactError(f"{self.source.source} does not fit {type(model).__name__}: no layer has a name in it")
        packed: dict[str, PackedWeight | None] = {}
        for stored, name in self.layers.items():
            entry = self.source.layers[stored]
            layer = matching_layer(model, name, entry, self.source.source)
            owner = entry.tied or stored
            if owner not in packed:
                packed[owner] = entry.weight and _placeholder(PackedWeight(entry.weight, entry.shape))
            activation = None
            if isinstance(entry.activation, Dynamic):
                activation = DynamicActivation(entry.activation)
            elif entry.activation is not None:
                activation = _placeholder(FrozenActivation(entry.activation))
            make_frozen_(layer, packed[owner], activation)
            layer._is_hf_initialized = True
        inside = {f"{name}.weight" for stored, name in self.layers.items() if self.source.layers[stored].weight}
        ties = model.all_tied_weights_keys.items()  # a quantized head has codes of its own
        model.all_tied_weights_keys = {name: owner for name, owner in ties if name not in inside}
        known = "|".join(re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in self.layers.values())
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"(^|\.)({known})\.(?!bias$)"}
        ignored = set(model._keys_to_ignore_on_load_missing or ())
        model._keys_to_ignore_on_load_missing = ignored | {rf"(^|\.)({known})\.(packed_weight|activation_quantizer)\."}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.qat_source = None
        if not self.pre_quantized:
            for name, decision in self.decisions.items():
                if not isinstance(decision.layer, FrozenLayer):
                    raise LayerError(
                        f"the checkpoint holds no {name!r}, or it cannot be quantized; where it is tied to the "
                        f"embedding, give it a rule: {{match: {decision.name}, weight: null}}"
                    )
                decision.layer.packed_weight.restore_levels()  # transformers empties buffers that no checkpoint holds
            return model
        del model._keys_to_ignore_on_load_unexpected  # the instance's, which hid the class's
        del model._keys_to_ignore_on_load_missing
        packed: dict[str, PackedWeight] = {}
        for stored, name in self.layers.items():
            layer, entry = model.get_submodule(name), self.source.layers[stored]
            if entry.weight is not None:
                owner = entry.tied or stored
                if owner not in packed:
                    device = _device(name, layer.packed_weight.packed)
                    packed[owner] = PackedWeight.from_tensor(self.source.quantized(owner)).to(device)
                layer.packed_weight = packed[owner]
            if entry.has_activation_scale:
                device = _device(name, layer.activation_quantizer.scale)
                layer.activation_quantizer = frozen_activation(self.source, stored).to(device)
        model.qat_source = self.source.files
        return model


def from_pretrained(
    name: str | Path,
    policy: QuantPolicy | dict[str, Any] | str | Path | None = None,
    auto_class: type = AutoModelForCausalLM,
    **options: Any,
) -> PreTrainedModel:
    """Open a quantized model of transformers in any format that ``qat.formats`` reads, with our frozen layers.

    The codes are the stored ones. No package of the format's own is needed.

    Args:
        name: a folder, or a name on the Hub.
        policy: as for ``prepare``, of a model in full precision, which is quantized tensor by tensor as it is loaded.
        auto_class: AutoModelForCausalLM or another of transformers' classes.
        options: of its ``from_pretrained``.

    Raises:
        ArtifactError: damaged, or a kind of its format that cannot be read, or a format that transformers does not
            open; the message says which.
        ModelError: a folder's config.json counts layers that would be built for ever.
    """
    config = None
    with suppress(OSError, ValueError):
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    require_layers_that_end(config)
    if policy is not None:
        options["quantization_config"] = QATConfig(policy)
    with patch.dict(AUTO_QUANTIZATION_CONFIG_MAPPING, dict.fromkeys(METHODS, QATConfig)):
        try:
            return auto_class.from_pretrained(name, **options)
        except pickle.UnpicklingError:
            raise ArtifactError(
                f"{name} holds a pickle with more than tensors, which is never executed: take a copy in safetensors"
            ) from None
        except (OSError, ValueError) as error:
            if (found := formats.format_of(Path(name))) not in FOREIGN:
                raise
            raise ArtifactError(
                f"{name} is in the format {found}, which transformers does not open: python -m qat.convert {name} "
                "--out DIR makes an artifact of the same codes, which it does"
            ) from error


class _Quantize(ConversionOps):
    """One tensor of a full-precision checkpoint becomes the packed codes of its layer."""

    def __init__(self, quantizer: QATQuantizer) -> None:
        self.decisions, self.init = quantizer.decisions, quantizer.quantization_config.policy.init

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        decision = self.decisions[full_layer_name]
        (value,) = input_dict.values()
        value, layer = value[0] if isinstance(value, list) else value, decision.layer
        if value.shape != layer.weight.shape:
            expected = list(layer.weight.shape)
            raise LayerError(f"{decision.name!r}: the checkpoint's weight is {list(value.shape)}, not {expected}")
        layer.weight = nn.Parameter(value, requires_grad=False)
        tensor = weight_quantizer(decision, self.init).quantize(matrix(layer))
        activation = decision.activation and DynamicActivation(decision.activation)
        make_frozen_(layer, PackedWeight.from_tensor(tensor), activation)
        layer._is_hf_initialized = True
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def _weight_decisions(model: nn.Module, policy: QuantPolicy | None) -> dict[str, Decision]:
    """Return {parameter name: what the policy means for it}."""
    if policy is None:
        raise PolicyError("QATConfig() quantizes nothing: give it a policy, such as QATConfig(qat.QuantPolicy(...))")
    if policy.init.reads_data:
        raise PolicyError(
            f"init={policy.init.value} reads data, which a model that is quantized while it is loaded never sees: use "
            "init=mse or minmax, or prepare the model and calibrate it"
        )
    decisions = decide(model, policy)
    for decision in decisions:
        if isinstance(decision.activation, QuantSpec):
            raise PolicyError(
                f"{decision.name!r}: a model that is quantized while it is loaded never sees the data its activation "
                "scale is set from: drop the activation spec, or prepare the model and calibrate it"
            )
    check_shapes(decisions)
    return {f"{decision.name}.weight": decision for decision in decisions if decision.weight is not None}


def _layers_in(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Return {stored name: the model's own}, which differ by the base model's prefix where the head differs."""
    own, prefix = dict(model.named_modules(remove_duplicate=False)), f"{model.base_model_prefix}."
    found = {}
    for name in names:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        match = next((candidate for candidate in candidates if candidate in own), None)
        if match is not None:
            found[name] = match
    return found


def _placeholder(module: nn.Module) -> nn.Module:
    """Keep buffers out of the state dict, so that transformers gives them a place and looks for no value."""
    module._non_persistent_buffers_set.update(module._buffers)
    module._is_hf_initialized = True
    return module


def _device(name: str, placeholder: torch.Tensor) -> torch.device:
    if placeholder.is_meta:
        raise ArtifactError(f"{name!r} is offloaded by the device map: a frozen layer needs a device of its own")
    return placeholder.device


def _save_frozen(model: PreTrainedModel, out: Path) -> None:
    quantized = from_model(model)
    quantized.files = getattr(model, "qat_source", None)
    with atomic_folder(out, _may_be_replaced) as folder:
        native.write(quantized, folder)
        copy_files(out, folder)  # a tokenizer that was saved there first
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def _may_be_replaced(folder: Path) -> bool:
    companions = {file for pattern in PATTERNS for file in folder.glob(pattern)}
    return native.is_artifact(folder) or set(folder.iterdir()) <= companions


_save_plain = PreTrainedModel.save_pretrained


@wraps(_save_plain)
def _save_pretrained(self: PreTrainedModel, save_directory: str | Path, *args: Any, **options: Any) -> None:
    if not is_frozen(self) or getattr(self, "_hf_peft_config_loaded", False):  # adapters are saved alone
        return _save_plain(self, save_directory, *args, **options)
    if options.get("push_to_hub"):
        raise ArtifactError("push_to_hub is not for artifacts: save it, then run hf upload NAME FOLDER")
    if options.get("is_main_process", True):
        _save_frozen(self, Path(save_directory))
    return None


PreTrainedModel.save_pretrained = _save_pretrained
