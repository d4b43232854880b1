"""An update that learning rate and gradient no longer explain: the optimizer's state is damaged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Dict, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.detectors.local_evidence import in_layers, local_score
from plarv_processors.windows import RobustWindow
from plarv_schemas.events import LEVELS, LOCAL_CHECKS, Level, StepEvent, Verdict, VerdictState

__all__ = ["OptimizerCorruption"]

_HEALTH = LOCAL_CHECKS.index("optimizer_health")
_CRITICAL = LEVELS.index("critical")
_UNBROKEN = (0.0, 1.0, 0.0)


class OptimizerCorruption:
    """Fires when the size of the updates breaks the law that it followed in this run.

    Two laws are tracked, each in a window of its own: ``log u - log lr`` (Adam and its kin, whose
    updates do not scale with the gradient) and ``log u - log lr - log g`` (SGD). The more stable
    one judges; where their robust scales are within ``tie`` both must break, the same way, and the
    smaller break counts. That makes schedules, warm-up and loud gradients silent.

    - *poisoned_moments* (warn): off by ``z`` and a factor ``ratio``, either way, in ``patience``
      updates in a row; critical when off by ``severe_ratio`` for ``severe_after``.
    - *doubled_update* (warn): up by ``double_ratio`` to ``ratio`` for ``double_patience`` updates.
      Two Adam steps for one gradient make 2.6, since the momentum moves twice.
    - *skipped_update* (warn): an update of 0.0 with a new gradient in ``patience`` updates in a
      row, and ``outlast`` times as many as in any such row that ended by itself (accumulation
      logged by micro-step); ``never_moved`` before ``min_history`` updates. Critical after
      ``never_moved``.
    - *confirmed* (critical): any of these, or two broken updates in a row, with the local optimizer
      check critical.
    - *local_only* (warn): that check alone, in ``local_reports`` reports in a row.

    An update counts only where it was measured (it may be every few steps) and the learning rate is
    at least ``lr_share`` of its peak: below, rounding of the weights decides. After the learning
    rate jumped by ``lr_jump`` nothing counts for ``settle`` steps: where the momentum holds the
    learning rate (TensorFlow's SGD) it lags.

    Cost: O(1) a step, 64 doubles. Source: update-RMS against a dynamic threshold (arXiv
    2604.00726), SPAM's poisoned second moments; the two laws are ours, from traced AdamW, Adam,
    SGD, Adagrad and RMSprop runs, whose healthy scale is 0.02 to 0.12.

    >>> detector = OptimizerCorruption()
    >>> for step in range(60):
    ...     lr = 1e-3 * min(1.0, (step + 1) / 20)
    ...     update = lr * (60.0 + step % 5) * (0.1 if step >= 50 else 1.0)
    ...     event = StepEvent("r", "s", step, 0, step, grad_norm=1.0 + 0.1 * (step % 7),
    ...                       current_lr=lr, update_norm=update)
    ...     for found in detector.update(event):
    ...         print(found.step, found.onset_step, found.kind, found.level, found.state)
    54 50 poisoned_moments warn opened
    """

    name: ClassVar[str] = "optimizer_corruption"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: 29 traced healthy runs under five optimizers, and 15 with faults put in."""

        window: int = 32  # updates
        min_history: int = 20  # updates before a law may judge
        z: float = 10.0  # robust standard deviations
        ratio: float = 3.0  # times the median; healthy runs reached 1.9 after step 20
        patience: int = 5  # updates in a row
        severe_ratio: float = 10.0  # times the median
        severe_after: int = 20  # updates in a row
        double_ratio: float = 1.6  # times the median
        double_patience: int = 12  # updates in a row; fewer are a batch's doing
        tie: float = 2.0  # scales within this factor are equally stable
        other_share: float = 0.5  # of the break, that the other law must show on average
        outlast: int = 4  # times the longest row of zeros that ended by itself
        never_moved: int = 50  # zeros in a row
        lr_share: float = 1e-2  # of the peak learning rate
        lr_jump: float = 1.5  # times the learning rate of the update before
        settle: int = 20  # steps; a momentum of 0.9 has forgotten all but 12% of a drop then
        local_reports: int = 5  # local reports in a row
        calm_window: int = 10  # updates, or local reports, in a row, to resolve
        adopt_after: int = 200  # updates after which a law that stays is the new normal
        floor: float = 0.05  # smallest scale of either law, 5%

        def __post_init__(self) -> None:
            if not 8 <= self.min_history <= self.window:
                raise ValueError("min_history must be between 8 and window")
            if not self.severe_ratio >= self.ratio >= self.double_ratio > 1:
                raise ValueError("severe_ratio >= ratio >= double_ratio must be above 1")
            if not (self.z > 0 and self.tie >= 1 and self.floor > 0 and 0 <= self.lr_share < 1):
                raise ValueError("z, tie, floor or lr_share is out of range")
            if not 2 <= self.patience <= min(self.severe_after, self.never_moved):
                raise ValueError("patience must be at least 2 and at most the longer waits")
            if min(self.double_patience, self.outlast, self.local_reports, self.calm_window) < 1:
                raise ValueError("outlast and the numbers of updates and reports must be >= 1")
            if not (self.lr_jump > 1 and self.settle >= 0):
                raise ValueError("lr_jump must be above 1 and settle not negative")
            if not (0.0 <= self.other_share <= 1.0 and self.adopt_after >= 1):
                raise ValueError("other_share must be a share and adopt_after at least 1")

    _derived = ("_log_double",)
    __slots__ = (
        "config", "version", "_log_double", "_adam", "_sgd", "_peak", "_grad", "_kind",
        "_critical", "_onset", "_score", "_odd", "_large", "_severe", "_sign", "_since", "_zeros",
        "_longest", "_watched", "_calm", "_local", "_local_since", "_ratio", "_lr", "_settled",
        "_rises", "_others",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._log_double = math.log(self.config.double_ratio)
        self._adam = RobustWindow(self.config.window, refresh=16)  # log update - log lr
        self._sgd = RobustWindow(self.config.window, refresh=16)  # and less the log gradient
        self._peak = 0.0  # learning rate
        self._grad = 0.0  # of the last update, to know a skipped step's stale value
        self._lr = 0.0  # of the last update
        self._settled = 0  # step from which updates count again
        self._kind: Optional[str] = None  # of the open verdict
        self._critical = False  # level of the open verdict
        self._onset = 0
        self._score = 0.0  # z of the break, or the number of zeros or reports
        self._ratio = 1.0  # times the median, of the last update judged
        self._odd = 0  # broken updates in a row, all on the same side
        self._large = 0  # of these, at the end, by ``ratio``
        self._severe = 0  # of these, at the end, by ``severe_ratio``
        self._rises = 0.0  # sum over these, of the judging law's breaks in nats
        self._others = 0.0  # and of the other law's
        self._sign: int = 1  # of these breaks: 1 too large, -1 too small
        self._since = 0  # step of the first broken or missing update of the row
        self._zeros = 0  # in a row
        self._longest = 0  # row of zeros that ended without a verdict
        self._watched = 0  # updates since the onset
        self._calm = 0  # in a row
        self._local = 0  # local reports in a row with the optimizer check critical
        self._local_since = 0

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        if event.local_levels is not None:
            found = self._note_report(event)
            if found:
                return found
        size = event.update_norm
        lr = event.current_lr
        if size is None or lr is None or not (0.0 < lr < math.inf and 0.0 <= size < math.inf):
            return ()
        if lr > self._peak:
            self._peak = lr
        elif lr < self.config.lr_share * self._peak:
            return ()
        if lr != self._lr:
            if not self._lr / self.config.lr_jump <= lr <= self._lr * self.config.lr_jump:
                self._settled = event.step + self.config.settle
            self._lr = lr
        if size == 0.0:
            return self._note_zero(event)
        adam = self._adam
        by_lr = math.log(size) - math.log(lr)
        rise = by_lr - adam.median
        cut = self._log_double
        usual = -cut < rise < cut
        grad = event.grad_norm
        by_grad: Optional[float] = None
        if grad is not None and grad > 0.0 and grad - grad == 0.0:
            self._grad = grad
            by_grad = by_lr - math.log(grad)
            rise = by_grad - self._sgd.median
            usual = usual and -cut < rise < cut
        if not (usual and self._kind is None and not self._odd and not self._zeros):
            broken, found = self._judge(event, by_lr, by_grad)
            if broken or found or self._kind is not None:
                return found
        adam.push(by_lr)
        if by_grad is not None:
            self._sgd.push(by_grad)
        return ()

    def _judge(
        self, event: StepEvent, by_lr: float, by_grad: Optional[float]
    ) -> Tuple[bool, Tuple[Verdict, ...]]:
        """Whether the update breaks the law, and what follows from it."""
        if self._zeros and self._kind != "skipped_update":
            self._longest = max(self._longest, self._zeros)
        self._zeros = 0
        judged = self._break(by_lr, by_grad)
        if judged is not None and self._odd == 0 and abs(judged[0]) >= math.log(self.config.ratio):
            self._adam.refresh()  # a row may begin: judged by a past that is up to date
            self._sgd.refresh()
            judged = self._break(by_lr, by_grad)
        if judged is None:
            return self._odd > 0, ()
        rise, scale, other = judged
        broken = abs(rise) >= self._log_double and abs(rise) >= self.config.z * scale
        self._ratio = math.exp(min(rise, 700.0))
        if broken and event.step < self._settled:
            return True, ()
        if broken:
            self._note_odd(event, rise, other)
            self._score = abs(rise) / scale
        else:
            self._odd = self._large = self._severe = 0
        if self._kind is not None and self._kind != "local_only":
            return broken, self._follow(event, broken)
        kind = self._kind_of_row()
        return broken, (self._open(event, kind, self._since) if kind else ())

    def _break(
        self, by_lr: float, by_grad: Optional[float]
    ) -> Optional[Tuple[float, float, float]]:
        """How far off the judging law is, its scale, how far the other is; None if it can't say."""
        config, adam, sgd = self.config, self._adam, self._sgd
        if adam.count < config.min_history:
            return _UNBROKEN
        rise, scale = by_lr - adam.median, max(adam.scale, config.floor)
        if sgd.count < config.min_history:
            return rise, scale, rise
        sgd_scale = max(sgd.scale, config.floor)
        if by_grad is None:  # Adam's law may do alone, where it is the better one
            return (rise, scale, rise) if config.tie * scale < sgd_scale else None
        sgd_rise = by_grad - sgd.median
        if config.tie * scale < sgd_scale:
            return rise, scale, sgd_rise
        if config.tie * sgd_scale < scale:
            return sgd_rise, sgd_scale, rise
        if rise * sgd_rise <= 0.0:
            return _UNBROKEN
        if abs(rise) / scale < abs(sgd_rise) / sgd_scale:
            return rise, scale, sgd_rise
        return sgd_rise, sgd_scale, rise

    def _note_odd(self, event: StepEvent, rise: float, other: float) -> None:
        sign = 1 if rise > 0.0 else -1
        if self._odd == 0 or sign != self._sign:
            self._odd = self._large = self._severe = 0
            self._sign, self._since = sign, event.step
            self._rises = self._others = 0.0
        self._odd += 1
        self._rises += rise
        self._others += other
        self._large = self._large + 1 if abs(rise) >= math.log(self.config.ratio) else 0
        self._severe = self._severe + 1 if abs(rise) >= math.log(self.config.severe_ratio) else 0

    def _kind_of_row(self) -> Optional[str]:
        """What the broken updates in a row amount to, if anything."""
        config = self.config
        explained = self._others * self._sign < config.other_share * abs(self._rises)
        if explained or (self._sign < 0 and not self._large):
            if self._odd >= config.double_patience:
                self._adam.clear()  # a gradient of another size, or updates a bit smaller
                self._sgd.clear()
                self._odd = self._large = self._severe = 0
            return None
        if self._local and self._odd >= 2:
            return "confirmed"
        if self._large >= config.patience:
            return "poisoned_moments"
        if self._sign > 0 and self._odd >= config.double_patience:
            return "doubled_update"
        return None

    def _follow(self, event: StepEvent, broken: bool) -> Tuple[Verdict, ...]:
        """After the onset: harden, resolve, or wait."""
        config = self.config
        self._watched += 1
        self._calm = 0 if broken else self._calm + 1
        if self._calm >= config.calm_window:
            return self._resolve(event)
        if self._watched >= config.adopt_after:
            self._adam.clear()
            self._sgd.clear()
            return self._resolve(event)
        if self._kind == "doubled_update" and self._large >= config.patience:
            return self._open(event, "poisoned_moments", self._onset)
        if self._kind == "poisoned_moments" and not self._critical:
            if self._severe >= config.severe_after:
                return self._open(event, "poisoned_moments", self._onset)
        return ()

    def _note_zero(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """A step that left the weights where they were."""
        config, grad = self.config, event.grad_norm
        if grad is None or not grad > 0.0 or grad - grad != 0.0 or grad == self._grad:
            return ()  # a loss scaler's skip, or nothing to learn from
        self._grad = grad
        if self._zeros == 0:
            self._since = event.step
        self._zeros += 1
        self._calm = self._odd = self._large = self._severe = 0
        if self._kind == "skipped_update":
            self._score = float(self._zeros)
            if not self._critical and self._zeros >= config.never_moved:
                return self._open(event, "skipped_update", self._onset)
            return ()
        known = self._adam.count >= config.min_history
        needed = config.patience if known else config.never_moved
        if self._zeros < max(needed, config.outlast * self._longest) or (
            self._kind is not None and self._kind != "local_only"
        ):
            return ()
        self._ratio, self._score = 0.0, float(self._zeros)
        return self._open(event, "skipped_update", self._since)

    def _note_report(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """What the local report says of the optimizer's state."""
        levels = event.local_levels or ()
        if len(levels) <= _HEALTH:
            return ()
        if levels[_HEALTH] < _CRITICAL:
            self._local = 0
            self._calm += self._kind == "local_only"
            over = self._kind == "local_only" and self._calm >= self.config.calm_window
            return self._resolve(event) if over else ()
        if self._local == 0:
            self._local_since = event.step
        self._local += 1
        if self._kind == "local_only":
            self._calm = 0
        elif self._kind is not None and self._kind != "confirmed":
            return self._open(event, "confirmed", self._onset)
        elif self._kind is None and self._local >= self.config.local_reports:
            self._score = float(self._local)
            return self._open(event, "local_only", self._local_since)
        return ()

    def _open(self, event: StepEvent, kind: str, onset: int) -> Tuple[Verdict, ...]:
        """Opens a verdict, or hardens the open one."""
        state: VerdictState = "opened" if self._kind is None else "escalated"
        if self._local and kind != "local_only":
            kind = "confirmed"
        config = self.config
        self._critical = kind == "confirmed" or (
            self._severe >= config.severe_after
            if kind == "poisoned_moments"
            else kind == "skipped_update" and self._zeros >= config.never_moved
        )
        self._kind, self._onset = kind, onset
        self._calm = 0
        if state == "opened":
            self._watched = 0
        return (self._verdict(event, "critical" if self._critical else "warn", state),)

    def _resolve(self, event: StepEvent) -> Tuple[Verdict, ...]:
        resolved = self._verdict(event, "ok", "resolved")
        self._kind = None
        self._odd = self._large = self._severe = self._zeros = 0
        return (resolved,)

    def _verdict(self, event: StepEvent, level: Level, state: VerdictState) -> Verdict:
        config = self.config
        counts = {"skipped_update": config.patience, "local_only": config.local_reports}
        threshold = float(counts.get(self._kind or "", config.z))
        return verdict(
            self,
            event,
            kind=self._kind or "poisoned_moments",
            level=level,
            state=state,
            onset_step=self._onset,
            score=self._score,
            threshold=threshold,
            evidence=self._evidence(event),
            message=self._message(event, state),
        )

    def _evidence(self, event: StepEvent) -> Dict[str, float]:
        floor, adam, sgd = self.config.floor, self._adam, self._sgd
        evidence = {
            "ratio": self._ratio,
            "odd": float(self._odd),
            "zeros": float(self._zeros),
            "law_lr": math.exp(min(adam.median, 700.0)),
            "law_lr_scale": max(adam.scale, floor),
            "law_grad": math.exp(min(sgd.median, 700.0)),
            "law_grad_scale": max(sgd.scale, floor),
            "local_reports": float(self._local),
            **local_score(event, _HEALTH),
        }
        seen = {name: getattr(event, name) for name in ("update_norm", "current_lr", "grad_norm")}
        evidence.update((name, value) for name, value in seen.items() if value is not None)
        return evidence

    def _message(self, event: StepEvent, state: VerdictState) -> str:
        if state == "resolved":
            return f"updates follow lr and gradient again, the fault of step {self._onset} is over"
        if self._kind == "local_only":
            reports = f"{self._local} reports in a row"
            return f"the local optimizer check is critical in {reports}{in_layers(event)}"
        if self._zeros:
            what = f"{self._zeros} updates in a row since step {self._since} moved no weight"
        else:
            what = f"the update is {self._ratio:.3g} times what lr and gradient explain, "
            what += f"{max(self._odd, 1)} updates in a row since step {self._onset}"
        if self._kind == "confirmed":
            what += f"; the local optimizer check agrees{in_layers(event)}"
        return what
