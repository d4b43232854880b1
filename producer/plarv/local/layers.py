"""Which modules there are to look at, and what to call them."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple

__all__ = ["Hook", "Site", "SiteHook", "find_sites", "is_out_of_reach", "layer_names", "unwrapped"]

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "OptimizedModule")
_WRAPPED_IN = (  # parts of a name that wrappers within the model put in
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
)  # fmt: skip
_LINEAR = ("Linear", "Conv1D")
_ACTIVATIONS = ("ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "ELU", "Mish", "Softplus", "Activation")


class Site(NamedTuple):
    """A module whose activations are looked at."""

    name: str
    module: Any
    channels_first: bool
    centre: float  # what its values lie around
    has_weights: bool


class Hook:
    """A module's hook that a pickled or copied model does not take along."""

    __slots__ = ("_call", "_is_compiling")

    def __init__(self, call: Callable[..., None], is_compiling: Callable[[], bool]) -> None:
        self._call = call
        self._is_compiling = is_compiling

    def __call__(self, *arguments: Any) -> None:
        """Goes on, but not in a graph that is being compiled."""
        if not self._is_compiling():
            self._call(*arguments)

    def __reduce__(self) -> Any:
        return (_no_hook, ())


class SiteHook:
    """The forward hook of one site: as few steps as can be, for it runs in every call.

    ``probe`` is a weak reference to what has a ``saw(index, arguments, output)``.
    """

    __slots__ = ("_index", "_is_compiling", "_probe")

    def __init__(
        self, probe: Callable[[], Any], index: int, is_compiling: Callable[[], bool]
    ) -> None:
        self._probe = probe
        self._index = index
        self._is_compiling = is_compiling

    def __call__(self, module: Any, arguments: Any, output: Any) -> None:
        """Goes on, but not in a graph that is being compiled."""
        if not self._is_compiling():
            probe = self._probe()
            if probe is not None:
                probe.saw(self._index, arguments, output)

    def __reduce__(self) -> Any:
        return (_no_hook, ())


def unwrapped(model: Any) -> Any:
    """The model inside DDP, DataParallel and ``torch.compile``'s wrapper."""
    for _ in range(4):
        if type(model).__name__ not in _WRAPPERS:
            return model
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def layer_names(model: Any) -> Dict[int, str]:
    """The layer (module) of each parameter, by ``id``; tied parameters belong to the first."""
    found: Dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), _plain(name) or type(module).__name__)
    return found


def find_sites(torch: Any, model: Any) -> List[Site]:
    """Linear and convolution layers and activation modules that no compiler has taken over."""
    convolution = torch.nn.modules.conv._ConvNd
    closed: List[str] = []
    sites: List[Site] = []
    for full_name, module in model.named_modules():
        if _is_compiled(module):
            closed.append(full_name)
        if any(not each or f"{full_name}.".startswith(f"{each}.") for each in closed):
            continue
        name = _plain(full_name)
        kind = type(module).__name__
        if next(module.children(), None) is not None:
            continue
        if isinstance(module, convolution):
            sites.append(Site(name or kind, module, True, 0.0, True))
        elif _is_linear(torch, module, kind) and getattr(module, "weight", None) is not None:
            sites.append(Site(name or kind, module, False, 0.0, True))
        elif any(word in kind for word in _ACTIVATIONS) and not module._parameters:
            centre = 0.5 if kind == "Sigmoid" else 0.0
            sites.append(Site(name or kind, module, False, centre, False))
    return sites


def is_out_of_reach(torch: Any) -> bool:
    """Whether operations of ours would be recorded by somebody: a tracer, a graph, a mode."""
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return True
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED_IN)


def _is_linear(torch: Any, module: Any, kind: str) -> bool:
    return isinstance(module, torch.nn.Linear) or kind.endswith(_LINEAR)


def _is_compiled(module: Any) -> bool:
    return (
        type(module).__name__ in ("OptimizedModule", "RecursiveScriptModule")
        or getattr(module, "_compiled_call_impl", None) is not None
    )


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    """What a copied model has in the place of our hook."""
