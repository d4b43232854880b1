"""The detector that people attach: hooks in, ten checks a step, hooks out."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Any, Callable, Deque, List, Optional, Set, Type

from plarv.faults import Faults, Guard
from plarv.local.activations import ActivationProbe
from plarv.local.attention import AttentionProbe
from plarv.local.checks import Checks
from plarv.local.gradient_flow import StepContext
from plarv.local.layers import find_sites, unwrapped
from plarv.local.optimizer_state import find_optimizer
from plarv.local.readings import Readings
from plarv.local.report import LocalReport, Trend
from plarv.local.step_probe import StepProbe
from plarv_schemas.events import LEVELS, LOCAL_CHECKS

__all__ = ["LocalDetector"]

_TREND_STEPS = 6
_FOLLOWED_EVERY = 16  # steps: whether parameters came or went


class LocalDetector:
    """Looks inside a model while it trains: ten checks against the run's own past.

    ``step()`` once a training step, after backward; before ``optimizer.step()`` a fault is named
    earliest. Nothing here raises, waits for a device, opens a connection or changes a result of the
    training, and ``detach()`` removes every hook. What cannot be seen stands in the report's
    ``notes``. Cost: about 3% of a step of a small GPT on a CPU; no copy of the weights.

    >>> LocalDetector(None).step(loss=0.5).worst_level
    'ok'
    """

    def __init__(self, model: Any, optimizer: Any = None) -> None:
        self._model = model
        self._given_optimizer = optimizer
        self._faults = Faults()
        self._guard = Guard("the local detector", self._faults)
        self._loss_guard = Guard("the loss could not be read", self._faults)
        self._checks = Checks()
        self._step = 0
        self._attached = False
        self._notes: List[str] = []
        self._severities: Deque[int] = deque(maxlen=_TREND_STEPS)
        self._num_layers = 0
        self._readings: Optional[Readings] = None
        self._activations: Optional[ActivationProbe] = None
        self._attention: Optional[AttentionProbe] = None
        self._probe: Optional[StepProbe] = None

    def attach(self) -> LocalDetector:
        """Installs the hooks; once is enough."""
        if not self._attached:
            self._attached = True
            self._notes = []
            with self._guard:
                self._attach()
            if self._num_layers == 0:
                self._note("there is no torch model with parameters to look at")
        return self

    def detach(self) -> None:
        """Removes every hook. It can be attached again, and remembers its baselines."""
        for probe in (self._activations, self._attention, self._probe, self._readings):
            if probe is not None:
                with self._guard:
                    probe.close() if isinstance(probe, Readings) else probe.detach()
        self._activations = self._attention = self._probe = self._readings = None
        self._attached = False

    def __enter__(self) -> LocalDetector:
        return self.attach()

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.detach()

    def step(self, loss: Any = None) -> LocalReport:
        """The report of this step; ``loss`` a number or a tensor, read without waiting."""
        with self._loss_guard:
            self._take_loss(loss)
        if self._probe is not None:
            self._probe.look()
        if self._activations is not None:
            self._activations.send()
        if self._readings is not None:
            with self._guard:
                self._readings.deliver()
        report = LocalReport(self._step, {})
        with self._guard:
            report = self._report()
        self._step += 1
        with self._guard:
            if self._step % _FOLLOWED_EVERY == 0 and self._probe is not None:
                if self._probe.is_outdated():
                    self.detach()
                    self.attach()
            self._begin()
        return report

    # -- small parts

    def _attach(self) -> None:
        import torch

        model = unwrapped(self._model)
        if not isinstance(model, torch.nn.Module):
            return
        if self._given_optimizer is None:
            self._note("optimizer: none was given")
        optimizer = find_optimizer(self._given_optimizer)
        if optimizer is None and self._given_optimizer is not None:
            self._note("optimizer: it is none of torch's")
        readings = self._readings = Readings(torch, self._guard)
        guard = Guard("the optimizer's step could not be seen", self._faults)
        self._checks.optimizer_health.forget_counters()
        probe = StepProbe(torch, model, optimizer, self._checks, readings, guard)
        self._probe = probe
        self._num_layers = len(probe.layers)
        if not probe.attach(self._context) and optimizer is not None:
            self._note("the optimizer has no hooks: its state between steps and erosion")
        compiling = _is_compiling(torch)
        is_compiled = model is not self._model and type(self._model).__name__ == "OptimizedModule"
        sites = [] if is_compiled else find_sites(torch, model)
        if not sites:
            self._note("activations: no layer is known, or the model is compiled")
        activations = ActivationProbe(
            torch, sites, readings, Guard("activations could not be seen", self._faults)
        )
        self._activations = activations
        activations.attach([self._checks.take_activations], compiling)
        if sites:
            self._attach_attention(torch, model, activations, compiling)
        self._begin()

    def _attach_attention(
        self,
        torch: Any,
        model: Any,
        activations: ActivationProbe,
        compiling: Callable[[], bool],
    ) -> None:
        readings = self._readings
        if readings is None:
            return
        guard = Guard("attention could not be seen", self._faults)
        attention = AttentionProbe(torch, activations, readings, guard)
        try:
            attention.attach(model, self._checks.attention_collapse.take, compiling)
            self._attention = attention
        except TypeError:
            self._note("attention: this torch is too old")

    def _context(self, trainable: Set[str]) -> StepContext:
        loss = self._checks.loss_spike
        idle: Set[str] = set()
        if self._activations is not None:
            idle = self._activations.idle()
        return StepContext(trainable, idle, loss.is_finite, loss.fell)

    def _take_loss(self, loss: Any) -> None:
        if loss is None:
            return
        spike = self._checks.loss_spike
        if self._readings is not None and hasattr(loss, "detach") and hasattr(loss, "numel"):
            if loss.numel() == 1 and not loss.is_complex() and loss.device.type != "meta":
                self._readings.put(loss.detach(), lambda values: spike.take(values[0]))
            else:
                self._faults.count(self._loss_guard.cause)
            return
        spike.take(float(loss))

    def _report(self) -> LocalReport:
        results = self._checks.results(self._step)
        checks = {key: results[key] for key in LOCAL_CHECKS}
        severity = sum(LEVELS.index(check.level) for check in checks.values())
        self._severities.append(severity)
        notes = list(self._notes)
        if not self._attached:
            notes.append("anything but the loss: the detector is not attached")
        if self._probe is not None and self._probe.is_unheard:
            notes.append("the optimizer's steps were not heard of: its state between steps")
        unseen = list(self._activations.unseen) if self._activations is not None else []
        if unseen:
            more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
            notes.append(f"activations of {', '.join(unseen[:3])}{more}: they give no tensor")
        notes.extend(f"{cause} ({count} times)" for cause, count in self._faults.counts.items())
        return LocalReport(self._step, checks, self._num_layers, self._trend(), tuple(notes))

    def _trend(self) -> Trend:
        first, last = self._severities[0], self._severities[-1]
        return "worsening" if last > first else "recovering" if last < first else "stable"

    def _begin(self) -> None:
        if self._probe is not None:
            self._probe.begin(self._step)
        if self._activations is not None:
            self._activations.begin(self._step, self._checks.suspects())
        if self._attention is not None:
            self._attention.begin(self._step, self._checks.attention_collapse.suspects())

    def _note(self, note: str) -> None:
        self._notes.append(note)


def _is_compiling(torch: Any) -> Callable[[], bool]:
    """The compiler's own question, by which it folds our hooks away."""
    compiler = getattr(torch, "compiler", None)
    found: Optional[Callable[[], bool]] = getattr(compiler, "is_compiling", None)
    return found if found is not None else _never


def _never() -> bool:
    return False
