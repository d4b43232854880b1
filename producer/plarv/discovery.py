"""What can be known about a training job without asking: model shape, length, optimizer, scheduler.

Everything here answers ``None`` or an empty dict where it cannot tell, and never raises.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Set, Tuple, Union, cast

from plarv.tensors import loaded_torch

__all__ = [
    "OptimizerSearch",
    "batch_size_of",
    "describe_model",
    "find_optimizer",
    "scheduler_of",
    "total_steps_of",
    "unwrap",
]

Description = Dict[str, Union[int, str]]

# The names under which model families keep the same thing, the commonest first.
_CONFIG_NAMES: Tuple[Tuple[str, Tuple[str, ...]], ...] = (
    ("num_layers", ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")),
    ("hidden_dim", ("hidden_size", "n_embd", "d_model", "hidden_dim", "embed_dim", "dim")),
    ("vocab_size", ("vocab_size", "padded_vocab_size", "n_vocab")),
    (
        "sequence_length",
        (
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "max_sequence_length",
            "seq_length",
            "block_size",
            "n_ctx",
        ),
    ),
)
_NESTED_CONFIGS = ("text_config", "language_config", "llm_config", "decoder", "encoder")
_WRAPPERS = ("module", "_orig_mod")  # DDP, FSDP, DataParallel; torch.compile
_MAX_WRAPPERS = 8
_LONGEST_SEQUENCE = 100_000_000  # tokenizers say "no limit" with 1e30
_MAX_FOREIGN_STEPS = 10_000


def describe_model(model: object, tokenizer: Optional[object] = None) -> Description:
    """Shape and type of a model, as far as they can be seen.

    Of ``num_layers``, ``hidden_dim``, ``vocab_size``, ``sequence_length``, ``dtype`` ("bfloat16")
    and ``parameters`` (their number; with FSDP this rank's), those that are known. From a
    HuggingFace-style ``config``, else from the modules. O(modules).
    """
    found: Description = {}
    inner = unwrap(model)
    parts: Tuple[Tuple[Callable[[Any], Description], object], ...] = (
        (_from_config, inner),
        (_from_modules, inner),
        (_from_parameters, inner),
        (_from_tokenizer, tokenizer),
    )
    for part, source in parts:
        try:
            for name, value in part(source).items():
                found.setdefault(name, value)
        except Exception:  # noqa: BLE001 - one unusual part must not cost the others
            continue
    return found


def unwrap(model: object) -> object:
    """The model inside DDP, FSDP, DataParallel and ``torch.compile`` wrappers."""
    torch = loaded_torch()
    for _ in range(_MAX_WRAPPERS):
        inner = None
        for name in _WRAPPERS:
            candidate = _get(model, name)
            if torch is not None and isinstance(candidate, torch.nn.Module):
                inner = candidate
        if inner is None:
            return model
        model = inner
    return model


def total_steps_of(dataloader: object, epochs: Optional[int] = None) -> Optional[int]:
    """Batches of the loader times ``epochs`` (one, when not given), or ``None`` for a stream."""
    try:
        batches = len(dataloader)  # type: ignore[arg-type]
        return batches * (1 if epochs is None else epochs)
    except Exception:  # noqa: BLE001 - an IterableDataset has no length, some raise their own errors
        return None


def batch_size_of(dataloader: object) -> Optional[int]:
    """Samples in a batch as the loader, or its batch sampler, declares them."""
    for owner in (dataloader, _get(dataloader, "batch_sampler")):
        size: object = _get(owner, "batch_size")
        if isinstance(size, int) and size > 0:
            return size
    return None


def find_optimizer(parameters: Iterable[object]) -> Optional[OptimizerSearch]:
    """Start to look for the optimizer that trains any of ``parameters``: found when it next steps.

    ``None`` where torch is not loaded or has no such hook (before 2.0).
    """
    optimizers = sys.modules.get("torch.optim.optimizer")  # no longer an attribute of torch.optim
    register: Any = getattr(optimizers, "register_optimizer_step_post_hook", None)
    return None if register is None else OptimizerSearch(parameters, register)


class OptimizerSearch:
    """Waits, by a hook on all optimizers, for the one whose groups hold the given parameters.

    Holds parameters and optimizer weakly. The hook goes when ``optimizer()`` has answered, and
    after 10,000 steps of other optimizers.
    """

    def __init__(
        self, parameters: Iterable[object], register: Callable[[Callable[..., None]], Any]
    ) -> None:
        self._wanted = [weakref.ref(parameter) for parameter in parameters]
        self._found: Optional[weakref.ref[Any]] = None
        self._steps_left = _MAX_FOREIGN_STEPS
        search = weakref.ref(self)

        def stepped(optimizer: object, *_: object) -> None:
            alive = search()
            if alive is not None:
                alive._stepped(optimizer)

        self._handle: Optional[Any] = register(stepped)

    def optimizer(self) -> Optional[object]:
        """The optimizer, once it has made a step and while it is alive."""
        if self._found is not None or self._steps_left <= 0:
            self.close()
        return None if self._found is None else self._found()

    def close(self) -> None:
        """Stop looking."""
        # Never from within the hook: torch iterates over the hooks while it calls them.
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # noqa: BLE001 - at interpreter shutdown torch may be half gone
            pass

    def _stepped(self, optimizer: Any) -> None:
        if self._found is not None or self._steps_left <= 0:
            return
        self._steps_left -= 1
        try:
            wanted = {id(parameter) for parameter in (each() for each in self._wanted)}
            for group in optimizer.param_groups:
                if any(id(parameter) in wanted for parameter in group["params"]):
                    self._found = weakref.ref(optimizer)
                    return
        except Exception:  # noqa: BLE001 - an optimizer of an unusual make
            return


def scheduler_of(optimizer: object) -> Optional[object]:
    """The one torch learning-rate scheduler of ``optimizer``; ``None`` for none or several.

    Asks the garbage collector, which looks at every object: tens of milliseconds in a large
    process. For the rare moment in which a learning rate is changed.
    """
    schedulers = sys.modules.get("torch.optim.lr_scheduler")
    kind: Any = getattr(schedulers, "LRScheduler", getattr(schedulers, "_LRScheduler", None))
    if kind is None:
        return None
    found: Dict[int, object] = {}
    for referrer in gc.get_referrers(optimizer):
        owners: List[object] = [referrer]
        if type(referrer) is dict:  # up to 3.10 an object's __dict__ comes, and not the object
            attributes = cast(Dict[object, object], referrer)
            owners = gc.get_referrers(attributes) if "last_epoch" in attributes else []
        for owner in owners:
            if isinstance(owner, kind) and getattr(owner, "optimizer", None) is optimizer:
                found[id(owner)] = owner
    return next(iter(found.values())) if len(found) == 1 else None


def _from_config(model: Any) -> Description:
    config = getattr(model, "config", None)
    found: Description = {}
    for level in [config, *(_get(config, name) for name in _NESTED_CONFIGS)]:
        if level is None:
            continue
        for name, aliases in _CONFIG_NAMES:
            for alias in aliases:
                value = _get(level, alias)
                if name not in found and type(value) is int and value > 0:
                    found[name] = value
    return found


def _get(config: object, name: str) -> Any:
    if isinstance(config, Mapping):
        return cast(Mapping[object, object], config).get(name)
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 - lazy objects raise what they like
        return None


def _from_modules(model: Any) -> Description:
    torch = loaded_torch()
    if torch is None or not isinstance(model, torch.nn.Module):
        return {}
    found: Description = {}
    linears: List[Any] = []
    embeddings: List[Any] = []
    repeated = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            linears.append(module)
        elif isinstance(module, torch.nn.Embedding):
            embeddings.append(module)
        elif isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
            repeated = max(repeated, _count_blocks(module))
    if embeddings:
        largest = max(embeddings, key=lambda module: module.num_embeddings)
        found["vocab_size"] = int(largest.num_embeddings)
        found["hidden_dim"] = int(largest.embedding_dim)
    elif linears:
        found["hidden_dim"] = _commonest([int(module.out_features) for module in linears])
    if repeated or linears:
        found["num_layers"] = repeated or len(linears)
    return found


def _count_blocks(container: Any) -> int:
    """The length of a list of like blocks, each made of several modules; 0 for any other list."""
    blocks: List[Any] = list(container.children())
    kinds: Set[object] = {type(block) for block in blocks}
    composed = all(next(block.children(), None) is not None for block in blocks)
    return len(blocks) if len(blocks) > 1 and len(kinds) == 1 and composed else 0


def _commonest(numbers: List[int]) -> int:
    return max(numbers, key=lambda number: (numbers.count(number), number))


def _from_parameters(model: Any) -> Description:
    elements: Dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).rpartition(".")[2]
        elements[name] = elements.get(name, 0) + int(parameter.numel())
    if not elements:
        return {}
    dtype = max(elements, key=lambda name: elements[name])
    total = 0
    for count in elements.values():
        total += count
    return {"dtype": dtype, "parameters": total}


def _from_tokenizer(tokenizer: Any) -> Description:
    found: Description = {}
    if tokenizer is None:
        return found
    longest = getattr(tokenizer, "model_max_length", None)
    if type(longest) is int and 0 < longest <= _LONGEST_SEQUENCE:
        found["sequence_length"] = longest
    size = getattr(tokenizer, "vocab_size", None)
    found["vocab_size"] = size if type(size) is int and size > 0 else len(tokenizer)
    return found
