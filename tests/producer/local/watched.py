"""Trainings run twice, bare and watched: what the detector must not change, and what it must name.

A training is a function that takes a ``Watch``: it makes a model and an optimizer, gives them to
``watch.attach()``, goes through ``watch.steps()`` and calls ``watch.step(loss)`` on each.
``healthy()`` and ``faulty()`` run it.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch.nn import Module

from plarv.local import LocalDetector, LocalReport

__all__ = ["Fault", "Watch", "faulty", "flip_a_bit", "healthy", "hooks_of"]

_OF_AN_OLD_TORCH = ("attention: this torch is too old",)  # before 2.1
STEPS = 150
FOUND_WITHIN = 10
SHOWN = 5  # steps for which a fault may stay on show after another


class Fault(NamedTuple):
    """What ``act`` does before the step ``at`` must be named by ``check`` at ``layer``."""

    check: str
    layer: str
    act: Callable[[Any, Any], None]  # takes the model and the optimizer
    at: int = 80


class Watch:
    """Stands between a training and the detector, which may be left out."""

    def __init__(self, *, on: bool, steps: int = STEPS, fault: Optional[Fault] = None) -> None:
        self.reports: List[LocalReport] = []
        self.model: Any = None
        self.optimizer: Any = None
        self.detector: Optional[LocalDetector] = None
        self._on = on
        self._steps = steps
        self._fault = fault

    def attach(self, model: Any, optimizer: Any) -> None:
        """What is watched."""
        self.model, self.optimizer = model, optimizer
        if self._on:
            self.detector = LocalDetector(model, optimizer).attach()

    def steps(self) -> Iterator[int]:
        """The training's steps, the fault at its place."""
        for step in range(self._steps):
            if self._fault is not None and step == self._fault.at:
                with torch.no_grad():
                    self._fault.act(self.model, self.optimizer)
            yield step

    def step(self, loss: Any = None) -> None:
        """The detector's step."""
        if self.detector is not None:
            self.reports.append(self.detector.step(loss=loss))


Training = Callable[[Watch], None]


def healthy(
    training: Training,
    *,
    steps: int = STEPS,
    notes: Sequence[str] = (),
    loud: Sequence[str] = (),
) -> Watch:
    """Asserts the same bits with and without the detector, silence, and no hook left behind.

    ``notes`` are words that must each stand in one of the notes, and no other note may be there.
    ``loud`` are checks that must speak, and they alone.
    """
    bare, watched = (_run(training, Watch(on=on, steps=steps)) for on in (False, True))
    assert _bits(bare.model) == _bits(watched.model)
    _assert_silent(watched.reports, loud)
    last = [note for note in watched.reports[-1].notes if note not in _OF_AN_OLD_TORCH]
    assert all(any(words in note for note in last) for words in notes), last
    others = [note for note in last if not any(words in note for words in notes)]
    assert not others, others
    _assert_bare(watched, hooks_of(bare.model))
    return watched


def faulty(training: Training, fault: Fault) -> Watch:
    """Asserts silence up to the fault, and its name and place within ten steps."""
    watched = _run(training, Watch(on=True, steps=fault.at + FOUND_WITHIN, fault=fault))
    healthy_ones = watched.reports[: -(len(watched.reports) * FOUND_WITHIN) // watched._steps]
    _assert_silent(healthy_ones)
    found = [
        (check.level, check.layers)
        for report in watched.reports[len(healthy_ones) :]
        for check in [report.checks[fault.check]]
        if check.level != "ok"
    ]
    assert found, [report.summary() for report in watched.reports[len(healthy_ones) :]]
    assert any(fault.layer in layers for _, layers in found), found
    return watched


def flip_a_bit(name: str, *, bit: int = 3) -> Callable[[Any, Any], None]:
    """Changes one bit of the parameter of this name behind torch's back."""

    def act(model: Any, _optimizer: Any) -> None:
        parameter = dict(model.named_parameters())[name]
        local: Any = getattr(parameter, "_local_tensor", parameter)
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = local.detach().data.view(kinds[local.element_size()]).view(-1)
        bits[bits.numel() // 2] ^= 1 << bit

    return act


def hooks_of(model: Module) -> int:
    """All hooks of the forward."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def _run(training: Training, watch: Watch) -> Watch:
    everything: Any = torch
    everything.manual_seed(11)
    training(watch)
    if watch.detector is not None:
        watch.detector.detach()
    return watch


def _bits(model: Module) -> Dict[str, bytes]:
    parts: List[Tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: bytes(
            getattr(part, "_local_tensor", part).detach().contiguous().view(-1).view(torch.uint8)
            .numpy()
        )
        for name, part in parts
    }  # fmt: skip


def _assert_silent(reports: Sequence[LocalReport], but: Sequence[str] = ()) -> None:
    alarms = [
        f"{report.step}: {name}: {check.message} {check.layers}"
        for report in reports
        for name, check in report.checks.items()
        if check.level != "ok" and name not in but
    ]
    assert not alarms, alarms
    for name in but:
        assert any(report.checks[name].level != "ok" for report in reports), name


def _assert_bare(watched: Watch, own_hooks: int) -> None:
    assert hooks_of(watched.model) == own_hooks
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        assert not getattr(watched.optimizer, name, None)
    assert not torch._C._len_torch_function_stack()
