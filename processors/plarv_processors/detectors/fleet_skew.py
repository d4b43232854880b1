"""Ranks that differ: one is slow, one has other gradients, one has failing hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Dict, List, Mapping, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.detectors.local_evidence import in_layers, local_score
from plarv_processors.fleet_statistics import Pace, PeerTimes, Replicas, Slowness
from plarv_schemas.events import LOCAL_CHECKS, Level, StepEvent, Verdict, VerdictState

__all__ = ["FleetSkew"]

_HARDWARE = LOCAL_CHECKS.index("hardware_integrity")
_CRITICAL = 2  # index into LEVELS
_GRAVITY = {
    "slowdown": 1,
    "straggler": 2,
    "replica_mismatch": 3,
    "replica_disagreement": 4,
    "hardware": 5,
}


class FleetSkew:
    """Fires on what one rank does and the others do not, and on a run that became slow as a whole.

    All times are judged in reports of ``report_steps`` complete steps, by medians, so that
    evaluation and checkpoint steps do not count; the first ``warmup_steps`` are not looked at.

    *straggler* (warn, names the rank): in ``reports`` reports in a row its median step time is
    ``straggler_ratio`` times the cross-rank (lower) median, or its forward time is, by at least
    ``forward_excess`` of a step (where steps end together the forward pass alone shows who is
    late). *slowdown* (warn): in ``reports`` reports in a row the median step time of the run is
    ``slowdown_ratio`` times the median of the reports before, 6 standard errors above it, with 80%
    of the steps above. It resolves when a report is back, or is adopted after ``adopt_reports``.

    *replica_mismatch* (warn): grad_norm differs between the ranks although it agreed in each of the
    first ``learn_steps`` steps, as it does after an all-reduce; where it does not agree by design
    (sharded or local norms) this is off. A second such step within ``confirm_steps`` makes it
    *replica_disagreement* (critical). With three ranks or more the odd one is named.

    *hardware* (critical): a rank's local hardware_integrity check is critical.

    One verdict is open at a time, the gravest: on the same rank it escalates, on another the lesser
    one is closed first.

    Cost: 0.5 us a step with one rank, 1 us a rank with several; 200 bytes a rank. Source: Minder's
    and NVRx's peer comparison at a tenth of their thresholds, Greyhound's verified shift,
    TrainCheck's consistency invariant.

    >>> detector = FleetSkew()
    >>> for step in range(90):
    ...     parts = tuple(
    ...         StepEvent("run", f"s{rank}", step, rank, step, world_size=4,
    ...                   step_time_ms=130.0 if rank == 2 and step >= 40 else 100.0)
    ...         for rank in range(4)
    ...     )
    ...     for found in detector.update(parts[0]._replace(parts=parts)):
    ...         print(found.step, found.kind, found.rank, found.level, found.state)
    87 straggler 2 warn opened
    """

    name: ClassVar[str] = "fleet_skew"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: public runs shift by 3 to 10% on their own; one of 19 does by 14%."""

        warmup_steps: int = 8  # complete steps: compilation, caches
        report_steps: int = 16  # complete steps with a time
        reports: int = 3  # in a row
        straggler_ratio: float = 1.10  # to the cross-rank median
        forward_excess: float = 0.03  # of the step time
        slowdown_ratio: float = 1.15  # to the run's own past
        min_reports: int = 2  # of that past
        standard_errors: float = 6.0  # of the median
        share_above: float = 0.8  # of the steps of a slow report
        adopt_reports: int = 60  # slow ones, after which the new pace is the run's own
        learn_steps: int = 16  # complete steps in which grad_norm must agree
        agreement: float = 1e-3  # relative; all-reduced norms agree to 1e-6
        confirm_steps: int = 32  # complete steps
        calm_steps: int = 100  # complete steps that agree, or 3 local reports without a finding

        def __post_init__(self) -> None:
            if self.warmup_steps < 0 or self.report_steps < 4 or self.reports < 1:
                raise ValueError("warmup_steps >= 0, report_steps >= 4, reports >= 1")
            if not (self.straggler_ratio > 1.0 and self.slowdown_ratio > 1.0):
                raise ValueError("straggler_ratio and slowdown_ratio must be above 1")
            if not self.forward_excess >= 0.0:
                raise ValueError("forward_excess must be at least 0")
            if self.min_reports < 1 or self.adopt_reports < self.reports:
                raise ValueError("min_reports >= 1, adopt_reports >= reports")
            if not (self.standard_errors >= 0.0 and 0.0 <= self.share_above <= 1.0):
                raise ValueError("standard_errors >= 0, share_above between 0 and 1")
            if self.learn_steps < 4 or not 0.0 < self.agreement < 0.1:
                raise ValueError("learn_steps >= 4, agreement between 0 and 0.1")
            if self.confirm_steps < 1 or self.calm_steps < 1:
                raise ValueError("confirm_steps and calm_steps must be at least 1")

    __slots__ = (
        "config", "version", "_warmup", "_pace", "_slow_reports", "_slow_since", "_step_times",
        "_forward_times", "_streaks", "_straggling_since", "_replicas", "_since_mismatch", "_kind",
        "_rank", "_level", "_onset", "_calm",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config = config or self.Config()
        self.version = fingerprint(self.name, config)
        self._warmup = config.warmup_steps  # timed steps still to be passed over
        self._pace = Pace(config.report_steps)
        self._slow_reports = 0  # in a row
        self._slow_since = 0  # step
        self._step_times = PeerTimes(config.report_steps)
        self._forward_times = PeerTimes(config.report_steps)
        self._streaks: Dict[int, int] = {}  # slow rank -> slow reports in a row, only such ranks
        self._straggling_since = 0  # step at which the last report without a straggler ended
        self._replicas = Replicas(config.learn_steps, config.agreement)
        self._since_mismatch = 0  # complete steps since the last one that disagreed; 0: none did
        self._kind: Optional[str] = None  # of the open verdict
        self._rank: Optional[int] = None
        self._level: Level = "ok"
        self._onset = 0
        self._calm = 0  # steps or reports since the open fault was last seen

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        parts = event.parts
        time = event.step_time_ms
        found: List[Verdict] = []
        if event.local_levels:
            self._watch_hardware(event, parts or (event,), found)
        if parts:
            self._watch_replicas(event, parts, found)
        if time is not None and 0.0 < time < math.inf:
            if self._warmup:
                self._warmup -= 1
                return tuple(found)
            if len(parts) > 1:  # first, since a straggler explains a slowdown
                self._watch_peers(event, parts, found)
            report = self._pace.add(time, event.batch_size)
            if report is not None:
                self._judge_pace(event, report, found)
        return tuple(found)

    # A rank, or the run, that is slow.

    def _watch_peers(
        self, event: StepEvent, parts: Tuple[StepEvent, ...], found: List[Verdict]
    ) -> None:
        ranks = [part.rank for part in parts]
        steps = self._step_times.add(ranks, [part.step_time_ms for part in parts])
        forwards = self._forward_times.add(ranks, [part.forward_ms for part in parts])
        if steps is None or forwards is None:
            return
        config = self.config
        excess = config.forward_excess * (steps[0].reference_ms if steps else 0.0)
        slowness = {slow.rank: slow for slow in steps}
        for slow in forwards:
            known = slowness.get(slow.rank)
            late = slow.median_ms - slow.reference_ms >= excess
            if late and (known is None or slow.ratio > known.ratio):
                slowness[slow.rank] = slow
        before = self._streaks
        if not before:
            self._straggling_since = event.step
        self._streaks = {
            rank: before.get(rank, 0) + 1
            for rank, slow in slowness.items()
            if rank is not None and slow.ratio >= config.straggler_ratio
        }
        if self._kind == "straggler":
            own = slowness.get(self._rank)
            if own is not None and own.ratio >= 0.5 * (1.0 + config.straggler_ratio):
                self._calm = 0
            elif self._is_calm(config.reports):
                self._close(event, f"rank {self._rank} keeps pace again", found)
        else:
            worst = max(
                (slow for slow in slowness.values() if self._persists(slow)),
                key=lambda slow: slow.ratio,
                default=None,
            )
            if worst is not None:
                self._straggler(event, worst, found)

    def _persists(self, slow: Slowness) -> bool:
        return slow.rank is not None and self._streaks.get(slow.rank, 0) >= self.config.reports

    def _straggler(self, event: StepEvent, slow: Slowness, found: List[Verdict]) -> None:
        message = (
            f"rank {slow.rank} takes {slow.median_ms:.4g} ms where the ranks' median is "
            f"{slow.reference_ms:.4g} ms, {slow.ratio - 1.0:.1%} longer"
        )
        onset, threshold = self._straggling_since, self.config.straggler_ratio
        evidence = {"median_ms": slow.median_ms, "reference_ms": slow.reference_ms}
        self._raise(
            event, "straggler", slow.rank, onset, slow.ratio, threshold, evidence, message, found
        )

    def _judge_pace(self, event: StepEvent, report: Slowness, found: List[Verdict]) -> None:
        config, pace = self.config, self._pace
        slow = pace.reports >= config.min_reports and pace.is_slow(
            report, config.slowdown_ratio, config.standard_errors, config.share_above
        )
        if not slow:
            self._slow_reports = 0
            self._slow_since = event.step
            if self._kind != "slowdown":
                pace.accept(report)
            elif report.ratio < 0.5 * (1.0 + config.slowdown_ratio):
                self._close(event, f"steps take {report.median_ms:.4g} ms again", found)
            return
        self._slow_reports += 1
        if self._slow_reports >= config.adopt_reports:
            self._slow_reports = 0
            pace.clear()
            if self._kind == "slowdown":
                self._close(event, f"{report.median_ms:.4g} ms is now the run's usual step", found)
        elif self._slow_reports >= config.reports and self._kind is None:
            message = (
                f"steps take {report.median_ms:.4g} ms, {report.ratio - 1.0:.1%} more than the "
                f"{report.reference_ms:.4g} ms of this run before step {self._slow_since}"
            )
            evidence = {"median_ms": report.median_ms, "reference_ms": report.reference_ms}
            onset, threshold = self._slow_since, config.slowdown_ratio
            self._raise(
                event, "slowdown", None, onset, report.ratio, threshold, evidence, message, found
            )

    # Replicas that no longer are the same.

    def _watch_replicas(
        self, event: StepEvent, parts: Tuple[StepEvent, ...], found: List[Verdict]
    ) -> None:
        replicas = self._replicas
        norms = [part.grad_norm for part in parts]
        spread = replicas.spread(norms)
        if spread is None:
            return
        if self._since_mismatch:
            self._since_mismatch += 1
        config = self.config
        if replicas.disagrees(spread):
            self._disagree(event, parts, spread, found)
            return
        if self._kind == "replica_mismatch" and self._is_calm(config.confirm_steps):
            self._close(event, "the ranks' gradient norms agree again, once they did not", found)
        elif self._kind == "replica_disagreement" and self._is_calm(config.calm_steps):
            why = "the ranks' gradient norms agree again; their weights may differ all the same"
            self._close(event, why, found)

    def _disagree(
        self, event: StepEvent, parts: Tuple[StepEvent, ...], spread: float, found: List[Verdict]
    ) -> None:
        place = self._replicas.odd([part.grad_norm for part in parts])
        rank = None if place is None else parts[place].rank
        norms = [part.grad_norm or 0.0 for part in parts]
        again = 0 < self._since_mismatch <= self.config.confirm_steps
        kind = "replica_disagreement" if again else "replica_mismatch"
        self._since_mismatch = 1
        if self._kind == kind:
            self._calm = 0
            return
        odd = "" if place is None else f", rank {rank} with {norms[place]:.6g} stands alone"
        message = (
            f"the ranks' gradient norms lie between {min(norms):.6g} and {max(norms):.6g}{odd}; "
            f"they agreed to {self._replicas.tolerance:.1g} before"
        )
        if self._kind == "replica_mismatch":
            onset = self._onset
        else:
            onset = event.step
        evidence = {"smallest": min(norms), "largest": max(norms), "ranks": float(len(norms))}
        tolerance = self._replicas.tolerance
        self._raise(event, kind, rank, onset, spread, tolerance, evidence, message, found)

    # Hardware, as the rank's own check sees it.

    def _watch_hardware(
        self, event: StepEvent, parts: Tuple[StepEvent, ...], found: List[Verdict]
    ) -> None:
        ill = [part for part in parts if _hardware_level(part) >= _CRITICAL]
        if not ill:
            if self._kind == "hardware" and self._is_calm(self.config.reports):
                self._close(event, "the hardware check finds nothing any more", found)
            return
        if self._kind == "hardware":
            self._calm = 0
            return
        rank = ill[0].rank
        evidence = {"ranks": float(len(ill)), **local_score(ill[0], _HARDWARE)}
        message = f"the hardware check of rank {rank} is critical{in_layers(ill[0])}"
        message += f", as on {len(ill) - 1} more" if len(ill) > 1 else ""
        level = float(_hardware_level(ill[0]))
        self._raise(
            event, "hardware", rank, event.step, level, float(_CRITICAL), evidence, message, found
        )

    # What all of them share.

    def _raise(
        self,
        event: StepEvent,
        kind: str,
        rank: Optional[int],
        onset_step: int,
        score: float,
        threshold: float,
        evidence: Mapping[str, float],
        message: str,
        found: List[Verdict],
    ) -> None:
        """Opens a verdict, or hardens the open one; a graver one that is open stays alone."""
        state: VerdictState = "opened"
        if self._kind is not None:
            if _GRAVITY[kind] <= _GRAVITY[self._kind]:
                return
            if rank == self._rank:
                state = "escalated"
            else:
                self._close(event, f"{kind} on {_who(rank)} comes first", found)
        self._kind, self._rank, self._onset, self._calm = kind, rank, onset_step, 0
        self._level = "critical" if kind in ("replica_disagreement", "hardware") else "warn"
        found.append(self._verdict(event, state, score, threshold, evidence, message))

    def _is_calm(self, enough: int) -> bool:
        self._calm += 1
        return self._calm >= enough

    def _close(self, event: StepEvent, message: str, found: List[Verdict]) -> None:
        self._level = "ok"
        calm = {"calm": float(self._calm)}
        found.append(self._verdict(event, "resolved", 0.0, 0.0, calm, message))
        self._kind = self._rank = None

    def _verdict(
        self,
        event: StepEvent,
        state: VerdictState,
        score: float,
        threshold: float,
        evidence: Mapping[str, float],
        message: str,
    ) -> Verdict:
        return verdict(
            self,
            event,
            kind=self._kind or "",
            level=self._level,
            state=state,
            onset_step=self._onset,
            score=score,
            threshold=threshold,
            evidence=evidence,
            message=message,
            rank=self._rank,
        )


def _who(rank: Optional[int]) -> str:
    return "the run" if rank is None else f"rank {rank}"


def _hardware_level(part: StepEvent) -> int:
    levels = part.local_levels
    return levels[_HARDWARE] if levels is not None and len(levels) > _HARDWARE else 0
