"""An optimizer's tensors and counters, by layer."""

from __future__ import annotations

from operator import is_
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, cast

from plarv.local.multi_tensor import Named
from plarv.tensors import local_part

__all__ = ["OptimizerState", "StateReader", "find_optimizer", "learning_rate_in"]

_COUNTER = "step"


class OptimizerState(NamedTuple):
    """What an optimizer remembers."""

    tensors: Dict[Tuple[int, str], Named]  # by a number of the parameter's state, and key; this
    # rank's parts of what is distributed
    counters: List[Tuple[str, Any]]  # by layer, the dictionary that holds a step counter

    def seconds(self) -> List[Named]:
        """Second moments: averages or sums of squares, never below zero."""
        return [
            named
            for (_, key), named in self.tensors.items()
            if ("sq" in key or key == "sum") and named.tensor.is_floating_point()
        ]

    def host_counters(self) -> Dict[str, float]:
        """Step counters that can be read without waiting."""
        found: Dict[str, float] = {}
        for name, state in self.counters:
            value = local_part(state[_COUNTER])
            if isinstance(value, (int, float)) or value.device.type == "cpu":
                found[name] = float(value)
        return found

    def device_counters(self) -> List[Named]:
        """Step counters on an accelerator."""
        values = [(name, local_part(state[_COUNTER])) for name, state in self.counters]
        return [
            Named(name, value)
            for name, value in values
            if not isinstance(value, (int, float)) and value.device.type != "cpu"
        ]


class _Entry(NamedTuple):
    state: Any
    key: Any
    value: Any


class StateReader:
    """Reads an optimizer's state; what lies where it lay is not gone through again.

    Of an optimizer that makes its state anew on each step no tensor is held from look to look.
    """

    def __init__(self, torch: Any, optimizer: Any, name_of: Callable[[Any], str]) -> None:
        self._tensor_type: Any = torch.Tensor
        self._optimizer = optimizer
        self._name_of = name_of
        self._makes_anew = False
        self._places: Dict[int, Tuple[int, int]] = {}  # of parameters: number, id of the state
        self._num_places = 0
        self.forget()

    def forget(self) -> None:
        """Lets go of all tensors."""
        self._every: Any = None
        self._states: List[Any] = []
        self._size = 0
        self._entries: List[_Entry] = []
        self._found = OptimizerState({}, [])

    def read(self) -> OptimizerState:
        """All state of all parameters; nothing is copied."""
        is_known = self._is_known()
        if is_known and all(state.get(key) is value for state, key, value in self._entries):
            return self._found
        self._makes_anew = self._makes_anew or is_known
        self._read()
        found = self._found
        if self._makes_anew:
            self.forget()
        return found

    def _is_known(self) -> bool:
        every = self._optimizer.state
        return (
            every is self._every
            and len(every) == len(self._states)
            and all(map(is_, every.values(), self._states))
            and _size(self._states) == self._size
        )

    def _read(self) -> None:
        self.forget()
        every = self._every = self._optimizer.state
        self._states = list(every.values())
        self._size = _size(self._states)
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = every.get(parameter)
                if state:
                    self._read_one(parameter, state, self._name_of(parameter))

    def _read_one(self, parameter: Any, state: Any, layer: str) -> None:
        place, layout = self._place(parameter, state), parameter.layout
        for key, value in state.items():
            is_tensor = isinstance(value, self._tensor_type)
            if key == _COUNTER:
                if (is_tensor and value.numel() == 1) or isinstance(value, (int, float)):
                    self._found.counters.append((f"{layer}|{place}", state))
                continue
            self._entries.append(_Entry(state, key, value))
            part = local_part(value)
            if is_tensor and part.numel() and part.layout == layout:
                self._found.tensors[place, str(key)] = Named(layer, part)

    def _place(self, parameter: Any, state: Any) -> int:
        """The same for as long as the parameter's state is: what was loaded or reset is another."""
        known = self._places.get(id(parameter))
        if known is None or (known[1] != id(state) and not self._makes_anew):
            self._num_places += 1
            known = self._places[id(parameter)] = (self._num_places, id(state))
        return known[0]


def _size(states: List[Any]) -> int:
    return sum(len(cast(Any, state)) for state in states if isinstance(state, dict))


def find_optimizer(optimizer: Any) -> Optional[Any]:
    """The optimizer of torch inside a wrapper (accelerate's), or None where there is none."""
    for _ in range(4):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or not hasattr(inner, "param_groups"):
            break
        optimizer = inner
    return optimizer if hasattr(optimizer, "param_groups") else None


def learning_rate_in(optimizer: Any) -> Optional[float]:
    """The first group's learning rate, where it can be read without waiting."""
    rate: Any = optimizer.param_groups[0].get("lr") if optimizer.param_groups else None
    if hasattr(rate, "device"):
        return float(rate) if rate.device.type == "cpu" else None
    return float(rate) if isinstance(rate, (int, float)) else None
