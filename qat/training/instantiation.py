"""What a config node names with ``_target_``, made; a value that does not fit is named by its key."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object, instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..arguments import wrong_types
from ..errors import QATError, TrainingError, first_line
from .hub import ask_once

OF_THE_HUB = ("transformers.", "qat.hf.")
TYPED = ("qat.", "lightning.", "torch.")  # whose hints are relied on; a user's own may be careless


def make(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a ``_target_``.

    Raises:
        QATError: as its own code raises it; a value that is missing, of the wrong type or out of range; or a file or a
            name on the Hub that cannot be read.
    """
    where = full_key(node)
    check_types(node)
    for key in node:  # Hydra would leave it to the default of what is called
        if OmegaConf.is_missing(node, key) and key not in arguments:
            raise TrainingError(f"{where}.{key} is not given: add {where}.{key}=VALUE")
    name = node.get("name") or node.get("pretrained_model_name_or_path") or ""
    if name and node._target_.startswith(OF_THE_HUB):
        ask_once(name)
    try:
        return instantiate(node, _partial_=True)(**arguments)
    except QATError:
        raise
    except (OSError, ImportError) as error:
        raise TrainingError(f"{node._target_}({name}): {first_line(error)}") from error
    except pickle.UnpicklingError:
        raise TrainingError(
            f"{node._target_}: the weights are a pickle with more than tensors, which is never executed: "
            "take a copy in safetensors"
        ) from None
    except MisconfigurationException as error:
        raise TrainingError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{where} ({node._target_}): {error} (HYDRA_FULL_ERROR=1 shows where)") from error


def check_types(node: DictConfig) -> None:
    """Compare a node's values with the type hints of what it names.

    Raises:
        TrainingError: what it names is not there, or a number stands where a text belongs, and the like; the message
            names the key.
    """
    try:
        target = get_object(node._target_)
    except (ImportError, ValueError) as error:
        reason = first_line(error.__cause__ or error)
        raise TrainingError(f"{full_key(node)}._target_={node._target_} cannot be found: {reason}") from error
    if not node._target_.startswith(TYPED):
        return
    keys = [str(key) for key in node if not str(key).startswith("_") and not OmegaConf.is_missing(node, key)]
    for key, instead in wrong_types(target, {key: _plain(node[key]) for key in keys}):
        raise TrainingError(f"{full_key(node)}.{key}={said(node[key])}: give {instead}")


def check_least(node: DictConfig, least: Mapping[str, float]) -> None:
    """Compare a node's numbers with the least that makes sense; null passes.

    Raises:
        TrainingError: the message names the key.
    """
    for key, lowest in least.items():
        if (value := node.get(key)) is not None and value < lowest:
            raise TrainingError(f"{full_key(node)}.{key}={value}: give {lowest} or more")


def full_key(node: DictConfig) -> str:
    """Return a node's place in the config, such as "callbacks.calibration"."""
    return node._get_full_key("").rstrip(".")


def said(value: Any) -> str:
    """Return a value as the command line has it, texts in quotes."""
    return repr(value) if isinstance(value, str) else json.dumps(_plain(value), default=str)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value
