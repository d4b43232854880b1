"""An optimizer's tensors and counters, by layer."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from plarv.local.multi_tensor import Named

__all__ = ["OptimizerState", "find_optimizer", "learning_rate_in", "read_state"]

_COUNTER = "step"


class OptimizerState(NamedTuple):
    """What an optimizer remembers."""

    tensors: Dict[Tuple[int, str], Named]  # by parameter's id and key
    counters: Dict[str, float]  # step counters that lie on the host, by layer
    device_counters: List[Named]

    def seconds(self) -> List[Named]:
        """Second moments: averages or sums of squares, never below zero."""
        return [
            named
            for (_, key), named in self.tensors.items()
            if ("sq" in key or key == "sum") and named.tensor.is_floating_point()
        ]


def find_optimizer(optimizer: Any) -> Optional[Any]:
    """The optimizer of torch inside a wrapper (accelerate's), or None where there is none."""
    for _ in range(4):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or not hasattr(inner, "param_groups"):
            break
        optimizer = inner
    return optimizer if hasattr(optimizer, "param_groups") else None


def read_state(
    optimizer: Any, name_of: Callable[[Any], str], is_tensor: Callable[[Any], bool]
) -> OptimizerState:
    """All state of all parameters; nothing is copied but counters on the host."""
    found = OptimizerState({}, {}, [])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                _read(parameter, state, name_of(parameter), found, is_tensor)
    return found


def learning_rate_in(optimizer: Any) -> Optional[float]:
    """The first group's learning rate, where it can be read without waiting."""
    rate: Any = optimizer.param_groups[0].get("lr") if optimizer.param_groups else None
    if hasattr(rate, "device"):
        return float(rate) if rate.device.type == "cpu" else None
    return float(rate) if isinstance(rate, (int, float)) else None


def _read(
    parameter: Any,
    state: Any,
    layer: str,
    found: OptimizerState,
    is_tensor: Callable[[Any], bool],
) -> None:
    place = f"{layer}|{id(parameter)}"
    for key, value in state.items():
        if not is_tensor(value):
            if key == _COUNTER and isinstance(value, (int, float)):
                found.counters[place] = float(value)
        elif key == _COUNTER:
            if value.numel() == 1 and value.device.type == "cpu":
                found.counters[place] = float(value)
            elif value.numel() == 1:
                found.device_counters.append(Named(place, value))
        elif value.numel() > 0 and value.layout == parameter.layout:
            found.tensors[id(parameter), str(key)] = Named(layer, value)
