"""What a checkpoint holds: tensors of model and optimizer by name, and the rest as plain data."""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple, cast

from plarv.discovery import unwrap
from plarv.tensors import loaded_torch, local_part

__all__ = [
    "Contents", "Training", "collect", "join", "model_tensors", "rng_state", "set_rng_state",
    "split",
]  # fmt: skip

_MARK = "__tensor__"
_COUNTER = "__counter__"
_LEFT_OUT = "__left_out__"
_EXTRA = "_extra_state"
_FLAT = "FullyShardedDataParallel"  # its state_dict() is a collective


def no_scaler() -> None:
    """Training without one."""


class Training(NamedTuple):
    """What a checkpoint is taken of, and put back into; all but the model may be None."""

    model: Any
    optimizer: Any = None
    scheduler: Any = None
    scaler: Callable[[], Any] = no_scaler  # gives it: it is mostly found in the first steps
    tokenizer: Any = None


class Contents(NamedTuple):
    """References to live tensors, and copies of what is small."""

    model: Dict[str, Any]  # name -> tensor
    optimizer: Dict[str, Any]
    rest: Dict[str, Any]  # plain data: numbers, strings, lists, dicts and small tensors
    left_out: Tuple[str, ...]  # what cannot be kept


def collect(training: Training) -> Contents:
    """What there is now. No tensor is copied and no collective is started."""
    left_out: List[str] = []
    tensors, extra = model_tensors(training.model, left_out)
    states: Dict[str, Any] = {}
    rest: Dict[str, Any] = {
        "extra": {
            name: split(own, f"extra.{name}", states, left_out) for name, own in extra.items()
        }
    }
    if training.optimizer is not None:
        rest["optimizer"] = split(training.optimizer.state_dict(), "", states, left_out)
    if callable(getattr(training.scheduler, "state_dict", None)):
        rest["scheduler"] = split(training.scheduler.state_dict(), "scheduler", states, left_out)
    scaler = training.scaler()
    if scaler is not None:
        try:
            rest["scaler"] = split(_scaler_state(scaler), "scaler", states, left_out)
        except AttributeError:  # it looks like torch's from afar only
            left_out.append("the gradient scaler")
    return Contents(tensors, states, rest, tuple(left_out))


def model_tensors(model: Any, left_out: List[str]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Name -> tensor, and name -> extra state as it is, named as by ``state_dict()``.

    Wrappers leave no trace in the names. A sharded parameter is this rank's part of it.
    """
    torch: Any = loaded_torch()
    inner: Any = unwrap(model)
    if any(type(module).__name__ == _FLAT for module in inner.modules()):
        named = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    else:
        named = inner.state_dict(keep_vars=True)
    tensors: Dict[str, Any] = {}
    extra: Dict[str, Any] = {}
    for name, value in named.items():
        if name.endswith(_EXTRA) or not isinstance(value, torch.Tensor):
            extra[name] = value
        elif _is_strided(value, torch):
            tensors[name] = local_part(value)
        else:
            left_out.append(name)
    return tensors, extra


def split(value: Any, path: str, tensors: Dict[str, Any], left_out: List[str]) -> Any:
    """``value`` as plain data; its tensors go into ``tensors`` by their path."""
    torch: Any = loaded_torch()
    if isinstance(value, torch.Tensor):
        if not _is_strided(value, torch):
            left_out.append(path)
            return {_LEFT_OUT: True}
        tensors[path] = local_part(value)
        return {_MARK: path}
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, Counter):
        counts = cast(Any, value)
        return {_COUNTER: dict(counts)}
    if isinstance(value, Mapping):
        table = cast(Any, value)
        items: Any = table.items()
        return {
            key: split(item, f"{path}.{key}" if path else str(key), tensors, left_out)
            for key, item in items
        }
    if isinstance(value, (list, tuple)):
        row = cast(Any, value)
        found = [split(each, f"{path}.{at}", tensors, left_out) for at, each in enumerate(row)]
        return tuple(found) if isinstance(value, tuple) else found
    number = _number(value)
    if number is None:  # a function, an object of anybody's
        left_out.append(path)
        return {_LEFT_OUT: True}
    return number


def join(value: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of :func:`split`. KeyError: a tensor is missing."""
    if isinstance(value, dict):
        packed = cast(Any, value)
        found: Dict[Any, Any] = packed
        if _MARK in found:
            return tensors[found[_MARK]]
        if _COUNTER in found:
            counts: Counter[Any] = Counter(found[_COUNTER])
            return counts
        return {k: join(item, tensors) for k, item in found.items() if not _is_left_out(item)}
    if isinstance(value, list):
        row = cast(Any, value)
        return [join(item, tensors) for item in row]
    if isinstance(value, tuple):
        several = cast(Any, value)
        return tuple([join(item, tensors) for item in several])
    return value


def rng_state() -> Dict[str, Any]:
    """Of torch on the CPU and on each accelerator in use, of ``random``, and of numpy if loaded."""
    torch: Any = loaded_torch()
    state: Dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (str(kind), [int(key) for key in keys], *[float(x) for x in rest])
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts all of them back; one that is not in use here any more is passed over."""
    torch: Any = loaded_torch()
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    cuda: Optional[List[Any]] = state.get("cuda")
    if cuda is not None and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, keys, int(position), int(has_gauss), cached))


def _scaler_state(scaler: Any) -> Dict[str, Any]:
    """What its ``state_dict()`` gives, which would wait for the device; before the first step it
    has no tensors yet.
    """
    scale, tracker = scaler._scale, scaler._growth_tracker
    return {
        "scale": scaler._init_scale if scale is None else scale,
        "growth_factor": scaler._growth_factor,
        "backoff_factor": scaler._backoff_factor,
        "growth_interval": scaler._growth_interval,
        "_growth_tracker": scaler._init_growth_tracker if tracker is None else tracker,
    }


def _number(value: Any) -> Any:
    """A numpy scalar, or what else behaves as a number, as Python's own; None: it is none."""
    item = getattr(value, "item", None)
    try:
        plain = item() if callable(item) else None
    except Exception:  # noqa: BLE001 - anybody's object
        return None
    return plain if type(plain) in (bool, int, float) else None


def _is_left_out(item: Any) -> bool:
    return isinstance(item, dict) and _LEFT_OUT in item


def _is_strided(tensor: Any, torch: Any) -> bool:
    dense = tensor.layout is torch.strided and not tensor.is_quantized
    return bool(dense and tensor.device.type != "meta")
