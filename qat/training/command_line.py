"""Command lines that answer a mistake with one clear line. No torch in here: it is imported when the job starts."""

from __future__ import annotations

import errno
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from ..broken_pipe import ends_quietly
from ..errors import QATError, did_you_mean, first_line, one_line, some_of
from ..policy import QuantPolicy
from ..spec import QuantSpec

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # nothing that the code could have done
FULL_ERROR = "HYDRA_FULL_ERROR"
TRACEBACK_WANTED = os.environ.get(FULL_ERROR) == "1"
# Of conf/train.yaml; here, because this module is all of ours that the process of a sweep's launcher has imported.
OmegaConf.register_new_resolver("flat", lambda text: text.replace("/", "--"), replace=True)


class JobFailed(Exception):
    """A job of a sweep ended in an error, which has been printed; Hydra keeps this until the other jobs are done."""


def run_command(hydra_main: Callable[[], Any], config_name: str) -> None:
    """Run a Hydra entry point; a config that cannot be composed ends in one line ``error: ...`` and exit status 1.

    With HYDRA_FULL_ERROR=1 in the environment Python's traceback comes instead.
    """
    sys.argv[1:] = open_specs([as_it_stands(word) for word in overrides_first(sys.argv[1:], config_name)], config_name)
    if TRACEBACK_WANTED:
        with ends_quietly():
            hydra_main()
        return
    os.environ[FULL_ERROR] = "1"  # Hydra then raises, where it would print text of its own; taken back for a job
    try:
        with ends_quietly():
            hydra_main()
    except JobFailed as error:
        fail(f"a job of the sweep failed: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, config_name, sys.argv[1:]))
    except OSError as error:
        fail(_no_folder(error))
    except ValueError as error:
        if isinstance(error.__cause__, OSError):  # of logging, whose file Hydra opens there
            fail(_no_folder(error.__cause__))
        nulls = [word for word in sys.argv[1:] if word.endswith("=null")]
        if not nulls or "Config group override" not in str(error):
            raise
        fail(f"{nulls[0]}: a group of files takes the name of one of them, as in logger=none or callbacks.NAME=null")
    finally:
        os.environ.pop(FULL_ERROR, None)


def _no_folder(error: OSError) -> str:
    """Return what to say where Hydra cannot make a run's folder, or its files there; run_job answers for the job."""
    fix = "run_dir=DIR" if error.errno != errno.ENAMETOOLONG else "hydra.sweep.subdir='${hydra.job.num}'"
    which = "" if error.filename is None else f" {error.filename}"  # a write to a full disk names no file
    return f"the run folder{which} cannot be made: {error.strerror}; choose another with {fix}"


def overrides_first(words: list[str], config_name: str) -> list[str]:
    """Return a command line with the overrides before the flags: Hydra 1.3 takes no flag between two of them."""
    overrides = parse(get_args_parser(), words, config_name).overrides
    return [*overrides, *(word for word in words if word not in overrides)]


def parse(parser: ArgumentParser, words: Sequence[str], config_name: str) -> Namespace:
    """Return what a parser makes of a command line; a flag that is none ends in one line ``error: ...``."""
    given, rest = parser.parse_known_intermixed_args(words)
    flag = next((word.partition("=")[0] for word in rest if word.startswith("-")), None)
    if flag is None:
        return given
    if close := get_close_matches(flag, re.findall(r"--[\w-]+", parser.format_usage()), n=1, cutoff=0.8):
        fail(f"unknown flag {flag} (did you mean {close[0]!r}?)")
    key = flag.lstrip("-").replace("-", "_")
    near = _nearest(key, known_keys(config_name, words, without=key))
    fail(f"unknown flag {flag}: values are given as KEY=VALUE, without dashes{near}")


def as_it_stands(word: str) -> str:
    """Return an override in quotes of Hydra's grammar where its value is a plain text that Hydra would not take whole.

    Hydra reads neither =, ~ nor ( in a value, nor letters beyond ASCII, and takes a comma for a sweep. The folders
    of its own sweeps have = and commas in their names, as ``seed=0,width=4``.
    """
    key, _, value = word.partition("=")
    if not re.match(r"[+~]{0,2}\w", key) or not value or value[0] in "\"'[{$":
        return word
    try:
        whole = not OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        pass
    else:
        if whole or not os.path.exists(value):
            return word
    escaped = os.path.expanduser(value).replace('"', '\\"')
    return f'{key}="{escaped}"'


def open_specs(words: list[str], config_name: str) -> list[str]:
    """Return a command line in which ``policy.activation.bits=8`` also holds where that policy rounds no inputs.

    OmegaConf 2.3 sets no field of a typed node that is null (an AssertionError), but merges into it one level above.
    """
    starts = {"weight": "weight:{}", "activation": "activation:{granularity:tensor}"}
    asked = [part for part in starts if any(re.match(rf"policy\.{part}(\.|=\{{)", word) for word in words)]
    config = _chosen(config_name, words) if asked else None
    swept = any(re.match("policy=.*,", word) for word in words)  # some may have none, and in others nothing changes
    opened = [starts[part] for part in asked if swept or (config is not None and config.policy[part] is None)]
    if not opened:
        return words
    return [f"++policy={{{','.join(opened)}}}", *words]


def run_job(module: str, function: str, config: DictConfig) -> None:
    """Import a job and run it; an error raised on purpose ends in one line ``error: ...`` and exit status 1.

    Of a sweep, the other jobs run before it exits. Of several ranks, all exit, and the same line is printed once.
    """
    if TRACEBACK_WANTED:
        getattr(import_module(module), function)(config)
        return
    sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
    if not sweeps:
        os.environ.pop(FULL_ERROR, None)
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from ..ranks import print_last_line

    try:
        with ends_quietly():  # before Hydra, which prints a traceback of its own
            getattr(import_module(module), function)(config)
    except (QATError, MisconfigurationException, HydraException, OmegaConfBaseException, OSError) as error:
        ours = not isinstance(error, OSError) or isinstance(error, HydraException | PermissionError)
        if not ours and error.errno not in DISK:
            raise
        if not sweeps:
            print_last_line(f"error: {explain(error)}")
            sys.exit(1)
        print(f"error: {explain(error)}", file=sys.stderr)
        raise JobFailed(explain(error)) from None


def fail(message: str) -> NoReturn:
    """Print the line and exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def explain(error: Exception, config_name: str | None = None, overrides: Sequence[str] = ()) -> str:
    """Return what to tell the user: the key or value that is wrong, and the nearest one that is right."""
    text = str(error)
    if isinstance(error, QATError | PermissionError):
        return one_line(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return f"the run's folder cannot be written: {text}; resume=auto goes on from its last checkpoint"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override and not error.override.startswith("~"):
            return f"{error.override!r} is no KEY=VALUE, such as experiment=NAME or data=NAME"
        return f"{error.override}: {first_line(error.message)}; a text goes in quotes, as in KEY='\"TEXT\"'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"there is no {group}={name}{did_you_mean(name, error.options)}"
    if isinstance(error, InterpolationToMissingValueError) and (match := re.search(r"value: (\S+)", text)):
        return f"{match[1]} is not given: add {match[1]}=VALUE"
    if isinstance(error, MissingMandatoryValue):
        key = text.rsplit(" ", 1)[-1] if error.full_key is None else error.full_key
        return f"{key} is not given: add {key}=VALUE"
    if isinstance(error, InterpolationKeyError) and (match := re.match(r"Interpolation key '([^']+)'", text)):
        group = match[1].split(".")[0]
        return f"{error.full_key} is that of {match[1]}, which is not there: choose another {group}=NAME for this model"
    if match := re.match(r"Could not override '([^']+)'", text):
        key = match[1].split("@")[0]
        known = known_keys(config_name, overrides, without=key) if config_name else []
        if key in known:  # its value holds a key of its own that is not there
            return f"{key}: {first_line(error.__cause__ or text)}; give the keys one by one, new ones with a +"
        return f"unknown key {key!r}{_nearest(key, known)}; +{key}=VALUE adds a new key"
    if match := re.match(r"In '(.+)/(.+)': \w+ raised while composing config:\s*(.+)", text, re.DOTALL):
        return f"{match[1]}={match[2]}: {_in_a_file(match[3])}"
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and "is not a subclass of QuantSpec" in text + str(cause):
        return f"{cause.full_key} takes fields, such as {{bits: 8}}; a runtime's own rounding is policy.dynamic=q8_0"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key or text}: {first_line(cause.msg or cause)}"
    return " ".join(text.split())


def _in_a_file(text: str) -> str:
    """Return what OmegaConf says of a group's file, by the key."""
    where = re.search(r"full_key: (\S+)", text)
    key = where[1] if where else ""
    if match := re.match(r"Key '(.+?)' not in '(\w+)'", text):
        known = {kind.__name__: kind for kind in (QuantPolicy, QuantSpec)}.get(match[2])
        near = did_you_mean(match[1], [field.name for field in fields(known)]) if known else ""
        return f"unknown key {key!r}{near}"
    return f"{key}: {first_line(text)}"


def _nearest(key: str, known: list[str]) -> str:
    """Return the known key that is meant, by its last part: lr is optim.lr, and model.name the one with name in it.

    Where none is, the one that is near in the first part that is not there, or those beside it.
    """
    parent, _, last = key.rpartition(".")
    holding = [other for other in known if last in other.rpartition(".")[2]]
    if len(last) > 1 and holding:
        holding.sort(key=lambda other: (other.rpartition(".")[0] != parent, len(other)))
        return f" (did you mean {holding[0]!r}?)"
    start, parts = "", key.split(".")
    while start + parts[0] in known:
        start += f"{parts.pop(0)}."
    beside = [other for other in known if other.rpartition(".")[0] == start.rstrip(".")]
    near = get_close_matches(parts[0], [other.removeprefix(start) for other in beside], n=1)
    if near:
        return f" (did you mean {start + '.'.join([*near, *parts[1:]])!r}?)"
    return f" (known: {some_of([repr(other) for other in beside], 30)})" if beside else ""


def known_keys(config_name: str, overrides: Sequence[str], without: str) -> list[str]:
    """Return every key of the config whose groups are chosen by the words of a command line, also in own folders."""
    overrides = [word for word in overrides if not word.startswith(f"{without}=")]
    config = _chosen(config_name, overrides) or _chosen(config_name, [])
    return [] if config is None else list(_keys(config))


def _chosen(config_name: str, overrides: Sequence[str]) -> DictConfig | None:
    """Return the config whose groups are chosen by the words of a command line; None where that cannot be composed.

    Of a sweep it is the first job's.
    """
    chosen = [match[1] for word in overrides if (match := re.match(r"(\w+=[^,]*)(,[^\]})]*)?$", word))]
    chosen += [word for word in overrides if word.startswith("++policy=")]  # of open_specs
    places = [word for word in overrides if word.startswith("hydra.searchpath=")] or own_configs(_own_folder(overrides))
    GlobalHydra.instance().clear()
    with initialize_config_module("qat.conf", version_base="1.3"):
        try:
            return compose(config_name, overrides=[*places, *chosen])
        except (HydraException, OmegaConfBaseException):
            return None


def own_configs(folder: Path | None) -> list[str]:
    """Return the override that lets Hydra find the files of a folder, too."""
    return [] if folder is None else [f"hydra.searchpath=['file://{folder.absolute()}']"]


def _own_folder(words: Sequence[str]) -> Path | None:
    for word, following in pairwise([*words, ""]):
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            return Path(value or following)
    return None


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _keys(child, f"{prefix}{key}.")
