"""Statistics of sampled activations, taken by forward hooks, a few layers a step."""

from __future__ import annotations

import weakref
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple, cast

from plarv.faults import Guard
from plarv.local.layers import Site, SiteHook, is_out_of_reach
from plarv.local.readings import Readings

__all__ = ["ActivationProbe", "ActivationStatistics"]

_EVERY = 6  # steps from one look at a layer to the next
_FEATURES = 128  # of twice as many or more
_BLOCK = 16
_MIN_ROWS = 8
_SEARCHED = 8  # values of a container
_CLUMPED = 0.98  # of the largest magnitude
_DEAD = 1e-3  # of the layer's RMS


class ActivationStatistics(NamedTuple):
    """What one look at a layer gives."""

    dead: float  # fraction of the features without activity
    clumped: float  # fraction of the values at the largest magnitude
    variance_share: float  # of the variance over the batch in the mean square; NaN if all is 0
    size: float  # RMS


Taker = Callable[[int, str, ActivationStatistics], None]


class ActivationProbe:
    """Hooks every site; each is measured every sixth step, in its first call of that step.

    Sampled are at most 144 rows of 128 to 255 features of the output and, for layers with weights,
    of the input, which shows activations that are no modules. What comes right from the data is
    left out.
    Cost: about 1 us a hook, 0.2 ms a sampled tensor.
    """

    def __init__(self, torch: Any, sites: List[Site], readings: Readings, guard: Guard) -> None:
        self._torch = torch
        self._sites = sites
        self._readings = readings
        self._guard = guard
        self._due: Set[int] = set()
        self._called: Set[int] = set()
        self._ever: Set[int] = set()
        self._handles: List[Any] = []
        self._samples: Dict[Any, List[Tuple[str, Any]]] = {}
        self._takers: List[Taker] = []
        self._step = 0
        self.unseen: Dict[str, None] = {}  # sites whose output is no tensor, in order
        self.last_name = ""  # of the site that was called last: attention is named by it

    def attach(self, takers: List[Taker], is_compiling: Callable[[], bool]) -> None:
        """Installs the hooks."""
        self._takers = takers
        probe = weakref.ref(self)
        for index, site in enumerate(self._sites):
            hook = SiteHook(probe, index, is_compiling)
            self._handles.append(site.module.register_forward_hook(hook))
        self.begin(0, set())

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._samples = {}

    def begin(self, step: int, suspects: Set[str]) -> None:
        """A new step: whose turn it is, and layers that shall be looked at again."""
        self._step = step
        self._ever |= self._called
        self._called = set()
        self._due = {
            index
            for index, site in enumerate(self._sites)
            if index % _EVERY == step % _EVERY or site.name in suspects
        }

    def idle(self) -> Set[str]:
        """Layers that have been called before and were not in this step."""
        return {self._sites[index].name for index in self._ever - self._called}

    def saw(self, index: int, arguments: Any, output: Any) -> None:
        """A site was called."""
        # most calls end early: in a real step each touch of an object is a cache miss
        site = self._sites[index]
        self.last_name = site.name
        torch = self._torch
        without_gradient = not torch.is_grad_enabled()
        if without_gradient and not site.module.training:
            return  # an evaluation
        # checkpointing comes again with gradients; what does not is an evaluation in training mode
        if without_gradient or index not in self._due:
            if type(output) is not torch.Tensor or output.numel():
                self._called.add(index)
            return
        if self._guard.failures > 8:
            return
        with self._guard, torch.no_grad():
            if is_out_of_reach(torch):
                return
            self._called.add(index)
            tensor = _tensor_of(torch, output)
            if tensor is None:
                self.unseen[site.name] = None
                return
            if tensor.numel() == 0:
                self._called.discard(index)
                return
            self.unseen.pop(site.name, None)
            self._due.discard(index)
            self._measure(site, tensor, site.name + "|output")
            given = _tensor_of(torch, arguments) if site.has_weights else None
            if given is not None and given.requires_grad:
                self._measure(site, given, site.name + "|input")

    def _measure(self, site: Site, tensor: Any, name: str) -> None:
        sample = _sample(tensor.detach(), site.channels_first)
        if sample is None:
            return
        if site.centre:
            sample = sample - site.centre
        self._samples.setdefault((sample.shape, sample.device), []).append((name, sample))

    def send(self) -> None:
        """Brings the step's samples to statistics, all of one shape together."""
        found, self._samples = self._samples, {}
        with self._guard, self._torch.no_grad():
            for group in found.values():
                together = self._torch.stack([sample for _, sample in group])
                self._send([name for name, _ in group], _statistics(self._torch, together))

    def _send(self, names: List[str], vector: Any) -> None:
        step = self._step

        def take(values: List[float]) -> None:
            count = len(names)
            for place, name in enumerate(names):
                statistics = ActivationStatistics(*values[place::count])
                for taker in self._takers:
                    taker(step, name, statistics)

        self._readings.put(vector, take)


def _tensor_of(torch: Any, value: Any, depth: int = 2) -> Optional[Any]:
    """The first plain floating-point tensor in what a module takes or returns."""
    if isinstance(value, torch.Tensor):
        plain = type(value) in (torch.Tensor, torch.nn.Parameter)
        usable = plain and value.is_floating_point() and value.layout is torch.strided
        wrapped = getattr(torch._C, "_functorch", None)
        if usable and wrapped is not None and wrapped.is_functorch_wrapped_tensor(value):
            return None
        return value if usable and value.device.type != "meta" else None
    if depth:
        for each in _inside(value):
            found = _tensor_of(torch, each, depth - 1)
            if found is not None:
                return found
    return None


def _inside(value: Any) -> List[Any]:
    """What a tuple, list, dict or dataclass holds, the first few of it."""
    if isinstance(value, dict):
        value = list(cast(Any, value).values())
    elif not isinstance(value, (tuple, list)):
        fields = getattr(cast(Any, type(value)), "__dataclass_fields__", ())
        value = [getattr(value, name, None) for name in fields]
    found: List[Any] = list(cast(Any, value))[:_SEARCHED]
    return found


def _sample(tensor: Any, channels_first: bool) -> Optional[Any]:
    """(batch, positions, features) in float32, or None for too few rows."""
    if tensor.dim() < 2:
        return None
    if tensor.dim() > 2 and (channels_first or tensor.dim() > 3):
        tensor = tensor.movedim(1, -1)
    inner: int = tensor.dim() - 2
    rows: int = (64, 8, 16, 16)[min(inner, 3)]
    tensor = tensor[:: max(1, tensor.shape[0] // rows)][:rows]
    positions: int = (1, 8, 3, 2)[min(inner, 3)]
    for dim in range(1, inner + 1):
        stride = max(1, tensor.shape[dim] // positions)
        tensor = tensor.narrow(dim, 0, min(tensor.shape[dim], stride * positions))
        tensor = tensor[(slice(None),) * dim + (slice(None, None, stride),)]
    features = tensor.shape[-1]
    if features >= 2 * _FEATURES:  # blocks of a cache line each: single ones would miss as often
        blocks = _FEATURES // _BLOCK
        apart = features // blocks
        tensor = tensor.narrow(-1, 0, apart * blocks).unflatten(-1, (blocks, apart))
        tensor = tensor[..., :_BLOCK].flatten(-2)
    sample = tensor.float().reshape(tensor.shape[0], -1, tensor.shape[-1])
    return sample if sample.shape[0] * sample.shape[1] >= _MIN_ROWS else None


def _statistics(torch: Any, samples: Any) -> Any:
    """The four statistics, each for all of (samples, batch, positions, features)."""
    sizes = samples.abs()
    of_feature = sizes.amax((1, 2))
    largest = of_feature.amax(1)
    mean_square = (samples * samples).mean((1, 2, 3))
    size = mean_square.sqrt()
    dead = (of_feature <= _DEAD * size[:, None]).float().mean(1)
    clumped = (sizes >= _CLUMPED * largest[:, None, None, None]).float().mean((1, 2, 3))
    over = 1 if samples.shape[1] >= 4 else (1, 2)
    apart = samples - samples.mean(over, keepdim=True)
    share = (apart * apart).mean((1, 2, 3)) / mean_square
    return torch.cat((dead, clumped * (largest > 0), share, size))
