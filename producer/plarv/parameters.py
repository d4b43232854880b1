"""The constructor's arguments, checked: a wrong one is an error that says which, why, and what to
write.
"""

from __future__ import annotations

import math
import operator
import os
from typing import Any, Optional

from plarv.columns import MAX_STEP
from plarv.exceptions import ArgusConfigurationError

__all__ = ["MODES", "check_arguments", "resolve_mode"]

MODES = ("MANUAL", "AUTO")

_COUNTS = ("sequence_length", "vocab_size", "num_layers", "hidden_dim", "total_steps")
_TEXTS = ("api_key", "run_id", "project", "url", "run_key")
_FLAGS = ("fail_open", "catch_exceptions", "raise_checkpoint")


def check_arguments(given: Any) -> None:
    """Raises ArgusConfigurationError for the first argument in the mapping ``given`` that is
    wrong.
    """
    for name in _COUNTS:
        value = given[name]
        if value is not None and (isinstance(value, bool) or not _is_int(value) or value < 1):
            raise ArgusConfigurationError(name, "must be a whole number of at least 1", value)
    start = given["start_step"]
    if isinstance(start, bool) or not _is_int(start) or not 0 <= start <= MAX_STEP:
        raise ArgusConfigurationError("start_step", "must be a whole number of at least 0", start)
    for name in _TEXTS:
        if given[name] is not None and not isinstance(given[name], str):
            raise ArgusConfigurationError(name, "must be text", given[name])
    if isinstance(given["dtype"], (int, float, list, tuple, dict)):
        rule = "must be a dtype or its name"  # torch.bfloat16 is as welcome as "bfloat16"
        raise ArgusConfigurationError("dtype", rule, given["dtype"])
    for name in _FLAGS:
        if not isinstance(given[name], bool):
            raise ArgusConfigurationError(name, "must be True or False", given[name])
    for name in ("silent", "accept_operator"):
        if given[name] is not None and not isinstance(given[name], bool):
            raise ArgusConfigurationError(name, "must be True or False", given[name])
    timeout = given["step0_timeout"]
    if (
        isinstance(timeout, bool)
        or not isinstance(timeout, (int, float))
        or not 0 < timeout < math.inf
    ):
        raise ArgusConfigurationError(
            "step0_timeout", "must be a number of seconds above 0", timeout
        )
    if given["on_pause"] is not None and not callable(given["on_pause"]):
        raise ArgusConfigurationError("on_pause", "must be callable", given["on_pause"])
    brokers = given["brokers"]
    if brokers is not None and not isinstance(brokers, (str, list, tuple)):
        raise ArgusConfigurationError("brokers", "must be 'host:port' or a list of them", brokers)
    folder = given["checkpoint_dir"]
    if folder is not None and not isinstance(folder, (str, os.PathLike)):
        raise ArgusConfigurationError("checkpoint_dir", "must be a path", folder)
    _check_objects(given)


def resolve_mode(value: Optional[str], parameter: str = "mode") -> str:
    """MANUAL or AUTO, in any case."""
    mode = value.upper() if isinstance(value, str) else value
    if mode not in MODES:
        raise ArgusConfigurationError(parameter, "must be 'MANUAL' or 'AUTO'", value)
    return str(mode)


def _check_objects(given: Any) -> None:
    optimizer, model = given["optimizer"], given["model"]
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise ArgusConfigurationError(
            "optimizer", "must have param_groups, as torch's have", optimizer
        )
    if model is not None and not callable(getattr(model, "parameters", None)):
        raise ArgusConfigurationError("model", "must have parameters(), as torch's have", model)
    scheduler = given["scheduler"]
    if scheduler is not None and not hasattr(scheduler, "step"):
        raise ArgusConfigurationError("scheduler", "must have step(), as torch's have", scheduler)
    scaler = given["scaler"]
    if scaler is not None and not hasattr(scaler, "unscale_"):
        raise ArgusConfigurationError("scaler", "must be a GradScaler, as torch's are", scaler)


def _is_int(value: Any) -> bool:
    try:
        operator.index(value)
        return True
    except Exception:  # noqa: BLE001 - an array of several, for one
        return False
