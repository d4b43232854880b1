"""Puts a checkpoint back into a model, its optimizer and scheduler, or leaves all as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

from plarv.checkpoints.contents import Training, join, model_tensors, set_rng_state, split
from plarv.checkpoints.snapshot import MODEL_FILE, OPTIMIZER_FILE, REST_FILE
from plarv.checkpoints.tensor_file import read_tensors
from plarv.discovery import unwrap
from plarv.tensors import loaded_torch, local_part

__all__ = ["Restored", "reset_optimizer", "restore"]


class Restored(NamedTuple):
    """What came of it."""

    step: int  # whose state everything has now
    passed_over: Tuple[str, ...]  # what the checkpoint has and the training was not given


class _Saved(NamedTuple):
    """A checkpoint's contents, read; None is what was not kept."""

    weights: Mapping[str, Any]
    optimizer: Any
    schedule: Any
    scaler: Any
    extra: Any
    step: int
    random_state: Any


def restore(folder: Path, training: Training) -> Restored:
    """Puts back weights, optimizer state, learning rates, schedule, scaler and random numbers;
    gradients become zero.

    All is checked before anything is changed: ValueError says what does not fit.
    """
    model, optimizer, scheduler = training.model, training.optimizer, training.scheduler
    torch: Any = loaded_torch()
    saved = _read(folder, torch)
    current, _ = model_tensors(model, [])
    _check(current, saved.weights, folder)
    if optimizer is not None and saved.optimizer is not None:
        _check_groups(optimizer, saved.optimizer, folder)
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(saved.weights[name])
    _set_extra(model, saved.extra or {})
    if optimizer is not None and saved.optimizer is not None:
        # weights of another type than were saved: moments must follow them
        same = all(each.dtype is saved.weights[name].dtype for name, each in current.items())
        _restore_optimizer(optimizer, saved.optimizer, keep_types=same)
    if scheduler is not None and saved.schedule is not None:
        scheduler.load_state_dict(saved.schedule)
    scaler = training.scaler()
    if scaler is not None and saved.scaler is not None:
        scaler.load_state_dict({key: _plain(value) for key, value in saved.scaler.items()})
    set_rng_state(saved.random_state)
    _zero_gradients(model)
    parts = {
        "the optimizer's state": (saved.optimizer, optimizer),
        "the schedule": (saved.schedule, scheduler),
        "the gradient scaler's state (scaler=)": (saved.scaler, scaler),
    }
    return Restored(saved.step, tuple(name for name, (a, b) in parts.items() if a and b is None))


def reset_optimizer(optimizer: Any) -> int:
    """Back to its state before the first step; the number of parameters that had some.

    torch's optimizers make their state anew at the next step where there is none. Adagrad alone
    makes it when it is constructed: there the sums get their first values back.
    """
    torch: Any = loaded_torch()
    states: List[Any] = list(optimizer.state.values())
    had = len([1 for state in states if any(value is not None for value in state.values())])
    if not isinstance(optimizer, torch.optim.Adagrad):
        optimizer.state.clear()
        return had
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state: Dict[str, Any] = optimizer.state[parameter]
            local_part(state["sum"]).fill_(group["initial_accumulator_value"])
            if isinstance(state["step"], torch.Tensor):
                state["step"].zero_()
            else:
                state["step"] = 0
    return had


def _read(folder: Path, torch: Any) -> _Saved:
    """All of it. OSError, ValueError: it cannot be read, or lacks a part."""
    rest: Dict[str, Any] = _load(folder / REST_FILE, torch)
    weights = read_tensors(folder / MODEL_FILE, torch)
    states = read_tensors(folder / OPTIMIZER_FILE, torch)
    try:
        optimizer, schedule, scaler, extra = (
            join(rest.get(name), states) for name in ("optimizer", "scheduler", "scaler", "extra")
        )
        step = int(rest["step"])
        return _Saved(weights, optimizer, schedule, scaler, extra, step, rest["rng"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} lacks a part of the training's state: {error}") from error


def _zero_gradients(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.detach()
            local_part(parameter.grad).zero_()


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _load(path: Path, torch: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a pickle of another kind, or a damaged one
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check(current: Mapping[str, Any], saved: Mapping[str, Any], folder: Path) -> None:
    missing = [name for name in current if name not in saved]
    if missing:
        raise ValueError(f"{folder} has no {_some(missing)}: it is of another model")
    unknown = [name for name in saved if name not in current]
    if unknown:
        raise ValueError(f"{folder} has {_some(unknown)}, which this model has not")
    for name, tensor in current.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(saved[name].shape)}, "
                f"and {tuple(tensor.shape)} in this model"
            )


def _check_groups(optimizer: Any, packed: Mapping[str, Any], folder: Path) -> None:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in packed["param_groups"]]
    if sizes != saved:
        raise ValueError(
            f"{folder}: the optimizer has groups of {saved} parameters, and of {sizes} here"
        )


def _some(names: List[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _restore_optimizer(optimizer: Any, packed: Mapping[str, Any], *, keep_types: bool) -> None:
    """In place where the state has the same layout (whatever holds its tensors keeps them), else
    as ``load_state_dict()`` does it, ``keep_types``: but in the types that were saved.
    """
    torch: Any = loaded_torch()
    now: Dict[str, Any] = {}
    then: Dict[str, Any] = {}
    plain = split(optimizer.state_dict(), "", now, [])
    wanted = split(packed, "", then, [])
    same = list(now) == list(then) and all(now[name].shape == then[name].shape for name in now)
    if not same or _values(plain) != _values(wanted):
        packed = _as_sharded(optimizer, packed)
        optimizer.load_state_dict(packed)
        if keep_types:
            _keep_types(optimizer, packed)
        return
    with torch.no_grad():
        for name, tensor in now.items():
            tensor.copy_(then[name])
    for group, saved in zip(optimizer.param_groups, packed["param_groups"]):
        for name, value in saved.items():
            if name != "params" and not isinstance(value, torch.Tensor):
                group[name] = value


def _values(plain: Mapping[str, Any]) -> Any:
    """What is no tensor in the per-parameter state: a step counted in Python, for one."""
    return plain.get("state")


def _keep_types(optimizer: Any, packed: Mapping[str, Any]) -> None:
    """``load_state_dict()`` makes all of it the parameter's type, also float32 moments of bfloat16
    weights.
    """
    parameters: List[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    for number, saved in packed["state"].items():
        state: Any = optimizer.state[parameters[number]]
        for name, value in saved.items():
            loaded: Any = state.get(name)
            are_tensors = hasattr(loaded, "dtype") and hasattr(value, "dtype")
            if are_tensors and loaded.dtype is not value.dtype:
                state[name] = value.to(loaded.device)


def _as_sharded(optimizer: Any, packed: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parts of sharded parameters' state as what the optimizer keeps of them."""
    parameters: List[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(hasattr(parameter, "_local_tensor") for parameter in parameters):
        return packed
    states: Dict[Any, Any] = {}
    for number, state in packed["state"].items():
        parameter = parameters[number]
        part: Any = local_part(parameter)
        shards: Any = parameter.data
        sharded: Any = shards.__class__
        states[number] = {
            name: sharded.from_local(
                value.to(part.device),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),  # uneven parts do not tell it
            )
            if part is not parameter and getattr(value, "shape", None) == part.shape
            else value
            for name, value in state.items()
        }
    return {**packed, "state": states}


def _set_extra(model: Any, extra: Mapping[str, Any]) -> None:
    """``set_extra_state()`` of the modules that had some."""
    inner: Any = unwrap(model)
    modules: Dict[str, Any] = dict(inner.named_modules()) if extra else {}
    for name, value in extra.items():
        module: Any = modules.get(name[: -len("_extra_state")].rstrip("."))
        if module is not None:
            module.set_extra_state(value)
