"""A gradient that vanishes against its own past, or layers that stop receiving it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.detectors.local_evidence import in_layers, local_score
from plarv_processors.windows import RobustWindow
from plarv_schemas.events import LEVELS, LOCAL_CHECKS, Level, StepEvent, Verdict, VerdictState

__all__ = ["GradientCollapse"]

_SPARSITY = LOCAL_CHECKS.index("activation_sparsity")
_FLOW = LOCAL_CHECKS.index("gradient_flow")
_CRITICAL = LEVELS.index("critical")


class GradientCollapse:
    """Fires when training goes on without a gradient.

    *vanished* (critical; warn without a loss): the gradient norm is below ``ratio`` times its
    rolling median for ``patience`` points, or for ``sparse_points`` points over ``sparse_steps``
    steps, while the learning rate is not 0 and the loss has not converged. Converged is a loss that
    fell to ``solved_share`` of its first level, or one that lies on its best level without any
    noise; batches that differ in loss and not in gradient are no convergence. The window (one
    gradient in ``thin`` once it is full) takes no gradient while one is that low.

    *blocked_layers* (warn): the local check of gradient flow is critical in ``local_reports``
    reports in a row, with that of dead activations or with a gradient norm of at most
    ``local_calm`` times its median (that check fires on gradients that explode, too); critical when
    the norm is below ``local_ratio`` of its median.

    A norm of exactly 0.0 from the start was not computed; later it counts as low, unless the loss
    is 0.0 too (a policy step without advantage) or such runs of zeros have come and gone before: it
    must then outlast the longest ``outlast`` times. An exact repeat of a normal norm is a skipped
    step's stale value and is not read.

    Cost: O(1) a step, 80 doubles. Source: AutoTrainer's and SageMaker Debugger's vanishing-gradient
    rules made relative; no healthy public run's norm falls below 0.012 of its highest median.

    >>> detector = GradientCollapse()
    >>> for step in range(150):
    ...     grad = 1.0 + 0.01 * (step % 7) if step < 80 else 1e-5
    ...     event = StepEvent("r", "s", step, 0, step, loss=2.0 + 0.01 * (step % 5), grad_norm=grad)
    ...     for found in detector.update(event):
    ...         print(found.step, found.onset_step, found.kind, found.level, found.state)
    129 80 vanished critical opened
    """

    name: ClassVar[str] = "gradient_collapse"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: the replay over 74 public runs with gradients, none of which collapses."""

        window: int = 64  # gradients
        thin: int = 4  # one gradient in so many enters a full window: it spans 256 points
        min_history: int = 20  # gradients other than 0.0 before it may fire
        ratio: float = 1e-3  # of the median; public runs of any label stay above 0.010
        patience: int = 50  # gradients in a row that low
        sparse_points: int = 8  # gradients in a row that low, when they span sparse_steps
        sparse_steps: int = 400  # a log in 50 steps needs 8 points, one in 10 steps 40
        outlast: int = 4  # times the longest low run that ended by itself
        recover_ratio: float = 1e-2  # of the median, to count as recovered
        recover_window: int = 10  # gradients in a row, or local reports, to resolve
        local_reports: int = 5  # local reports in a row
        local_ratio: float = 0.1  # of the median: the run's own evidence for blocked layers
        local_calm: float = 2.0  # times the median: more is no gradient that vanishes
        loss_window: int = 16  # losses whose median is the level of the loss
        solved_share: float = 0.02  # of the first level of a positive loss
        learned_share: float = 0.1  # of the first level, that a loss fell by to have learned at all
        floor_share: float = 0.02  # of the fall so far: a loss as near to its best level is on it
        noise_share: float = 1e-3  # of the fall so far: a loss with less scatter has no batch noise

        def __post_init__(self) -> None:
            if not 8 <= self.min_history <= self.window:
                raise ValueError("min_history must be between 8 and window")
            if not 0 < self.ratio <= self.recover_ratio <= self.local_ratio < 1:
                raise ValueError("ratio <= recover_ratio <= local_ratio must lie in (0, 1)")
            if not self.local_calm >= 1.0:
                raise ValueError("local_calm must be at least 1")
            if not 1 <= self.sparse_points <= self.patience:
                raise ValueError("sparse_points must be between 1 and patience")
            if min(self.thin, self.outlast, self.recover_window, self.local_reports) < 1:
                raise ValueError(
                    "thin, outlast, recover_window and local_reports must be at least 1"
                )
            if self.loss_window < 8:
                raise ValueError("loss_window must be at least 8")
            if not (0.0 <= self.solved_share < 1.0 and 0.0 <= self.learned_share < 1.0):
                raise ValueError("solved_share and learned_share must lie in [0, 1)")
            if not (self.floor_share >= 0.0 and self.noise_share >= 0.0 and self.sparse_steps >= 1):
                raise ValueError("floor_share, noise_share >= 0 and sparse_steps >= 1")

    __slots__ = (
        "config", "version", "_grads", "_seen", "_cut", "_last", "_low", "_low_since", "_longest",
        "_losses", "_first", "_best", "_blocked", "_blocked_since", "_clean", "_kind", "_critical",
        "_onset",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._grads = RobustWindow(self.config.window, refresh=16)
        self._seen = 0  # gradients that were not low
        self._cut = 0.0  # a gradient at or below this is low
        self._last = -1.0  # gradient, to know a repeat
        self._low = 0  # low gradients in a row
        self._low_since = 0  # step of the first of them
        self._longest = 0  # of such rows that ended without a verdict
        self._losses = RobustWindow(self.config.loss_window)
        self._first: Optional[float] = None  # level of the loss
        self._best = 0.0  # lowest level of the loss
        self._blocked = 0  # local reports in a row that say so
        self._blocked_since = 0
        self._clean = 0  # in a row towards a resolution: gradients, or local reports
        self._kind: Optional[str] = None  # of the open verdict
        self._critical = False  # level of the open verdict
        self._onset = 0

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        loss = event.loss
        if loss is not None and loss - loss == 0.0:
            losses = self._losses
            losses.push(loss)
            if not losses.count & 7:
                self._note_level()
        grad = event.grad_norm
        if grad is not None and grad != self._last and grad > self._cut and grad - grad == 0.0:
            self._last = grad
            seen = self._seen + 1
            self._seen = seen
            if self._low or self._kind == "vanished":
                found = self._end_low(event, grad)
                if found or self._kind == "vanished":
                    return found
            if seen <= self.config.window or not seen % self.config.thin:
                self._grads.push(grad)
                if seen >= self.config.min_history:
                    self._cut = self.config.ratio * self._grads.median
        elif grad is not None and 0.0 <= grad <= self._cut:
            found = self._note_low(event, grad)
            if found:
                return found
        if event.local_levels is not None:
            return self._note_report(event)
        return ()

    def _note_low(self, event: StepEvent, grad: float) -> Tuple[Verdict, ...]:
        """One more gradient that is next to nothing."""
        config = self.config
        self._last = grad
        if event.current_lr == 0.0 or (grad == 0.0 and event.loss == 0.0):
            return ()
        if self._low == 0:
            self._low_since = event.step
        self._low += 1
        self._clean = 0
        long_enough = self._low >= config.patience or (
            self._low >= config.sparse_points
            and event.step - self._low_since >= config.sparse_steps
        )
        if (
            not long_enough
            or self._kind == "vanished"
            or self._seen < config.min_history
            or self._low < config.outlast * self._longest
            or self._converged()
        ):
            return ()
        state: VerdictState = "opened" if self._kind is None else "escalated"
        self._kind, self._onset = "vanished", self._low_since
        self._critical = self._first is not None
        return (self._verdict(event, "critical" if self._critical else "warn", state),)

    def _end_low(self, event: StepEvent, grad: float) -> Tuple[Verdict, ...]:
        """A gradient that is not low, after some that were."""
        if self._kind != "vanished":
            self._longest = max(self._longest, self._low)
            self._low = 0
            return ()
        self._clean = self._clean + 1 if grad >= self.config.recover_ratio * self._median() else 0
        if self._clean < self.config.recover_window:
            return ()
        return self._resolve(event)

    def _note_report(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """What the local report says of layers that receive no gradient."""
        levels = event.local_levels or ()
        if len(levels) <= max(_SPARSITY, _FLOW):
            return ()
        config = self.config
        if levels[_FLOW] < _CRITICAL or not (
            levels[_SPARSITY] >= _CRITICAL or self._is_calm(event.grad_norm)
        ):
            self._blocked = 0
            if self._kind != "blocked_layers":
                return ()
            self._clean += 1
            return self._resolve(event) if self._clean >= config.recover_window else ()
        if self._blocked == 0:
            self._blocked_since = event.step
        self._blocked += 1
        if self._kind == "vanished" or self._blocked < config.local_reports:
            return ()
        self._clean = 0
        critical = 0.0 <= self._last < config.local_ratio * self._median()
        if self._kind is not None and not (critical and not self._critical):
            return ()
        state: VerdictState = "opened" if self._kind is None else "escalated"
        self._kind, self._critical = "blocked_layers", critical
        self._onset = self._blocked_since
        return (self._verdict(event, "critical" if critical else "warn", state),)

    def _is_calm(self, grad: Optional[float]) -> bool:
        """Whether the gradient is known, and no larger than usual."""
        return grad is not None and 0.0 <= grad <= self.config.local_calm * self._median()

    def _resolve(self, event: StepEvent) -> Tuple[Verdict, ...]:
        resolved = self._verdict(event, "ok", "resolved")
        self._kind = None
        self._low = self._clean = self._blocked = 0
        return (resolved,)

    def _note_level(self) -> None:
        losses = self._losses
        if losses.count < self.config.loss_window:
            return
        if self._first is None:
            self._best = losses.median
            self._first = max(losses.median, losses.ordered()[0])
        elif losses.median < self._best:
            self._best = losses.median

    def _converged(self) -> bool:
        """Whether the loss says that there is nothing left to learn."""
        config, first, level = self.config, self._first, self._losses.median
        if first is None:
            return False
        if 0.0 <= level <= config.solved_share * first:
            return True
        fall = first - self._best
        return (
            fall > config.learned_share * abs(first)
            and level - self._best <= config.floor_share * fall
            and self._losses.scale <= config.noise_share * fall
        )

    def _median(self) -> float:
        return self._grads.median if self._seen >= self.config.min_history else 0.0

    def _verdict(self, event: StepEvent, level: Level, state: VerdictState) -> Verdict:
        median, grad = self._median(), max(self._last, 0.0)
        blocked = self._kind == "blocked_layers"
        evidence = {
            "grad_norm": grad,
            "median": median,
            "low": float(self._low),
            "longest": float(self._longest),
            "reports": float(self._blocked),
        }
        if self._first is not None:
            evidence["loss_level"] = self._losses.median
            evidence["loss_best"] = self._best
            evidence["loss_first"] = self._first
            evidence["loss_scale"] = self._losses.scale
        if state == "resolved":
            what = f"gradient norm {grad:.4g}, the collapse of step {self._onset} is over"
        elif blocked:
            what = (
                f"layers receive no gradient in {self._blocked} local reports in a row since step "
                f"{self._onset}; gradient norm {grad:.4g}, median {median:.4g}{in_layers(event)}"
            )
            evidence.update(local_score(event, _FLOW))
        else:
            what = (
                f"gradient norm {grad:.4g} has been below {self.config.ratio:g} of its median "
                f"{median:.4g} for {self._low} points since step {self._onset}"
            )
        return verdict(
            self,
            event,
            kind=self._kind or "vanished",
            level=level,
            state=state,
            onset_step=self._onset,
            score=float(self._blocked if blocked else self._low),
            threshold=float(self.config.local_reports if blocked else self.config.sparse_points),
            evidence=evidence,
            message=what,
        )
