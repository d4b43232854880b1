"""What a detector is, and how it words a verdict."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, ClassVar, Literal, Mapping, Optional, Protocol, Tuple

from plarv_schemas.events import Level, StepEvent, Verdict, VerdictState

__all__ = ["Detector", "Scope", "fingerprint", "verdict"]

Scope = Literal["run", "rank"]


class Detector(Protocol):
    """Reads the step events of one attempt of one run, in the log's order, and finds faults.

    Its state is what its ``__slots__`` (or instance attributes) hold, ``config`` and ``version``
    excepted: numbers, strings, None, tuples, lists, dicts, ``array``s, and objects of the same kind
    that the constructor makes (see :mod:`plarv_processors.snapshot`).
    """

    name: ClassVar[str]
    scope: ClassVar[Scope]
    """``run``: sees one event a complete step, the mean over the ranks, the ranks' own events in
    ``event.parts``. ``rank``: sees every rank's every event. With one rank these are the same."""

    version: str

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event, mostly none. Data never makes it raise; no input, no word."""
        ...


def fingerprint(name: str, config: Any) -> str:
    """``name`` and a hash of every setting: a new threshold never resumes old state.

    >>> import dataclasses
    >>> Config = dataclasses.make_dataclass("Config", [("threshold", float, 8.0)], frozen=True)
    >>> fingerprint("loss_spike", Config())
    'loss_spike-0ed237'
    """
    text = ",".join(
        f"{field.name}={_setting(field, config)!r}"
        for field in sorted(dataclasses.fields(config), key=lambda field: field.name)
    )
    return f"{name}-{hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}"


def verdict(
    detector: Detector,
    event: StepEvent,
    *,
    kind: str,
    level: Level,
    state: VerdictState,
    onset_step: int,
    score: float,
    threshold: float,
    evidence: Mapping[str, float],
    message: str,
    rank: Optional[int] = None,
) -> Verdict:
    """A verdict of ``detector`` at ``event``. The fold adds the attempt and the ordinal.

    ``rank`` stays None for what is true of the run as a whole.
    """
    return Verdict(
        run_id=event.run_id,
        attempt=0,
        rank=rank,
        step=event.step,
        ordinal=-1,
        detector=detector.name,
        kind=kind,
        level=level,
        state=state,
        onset_step=onset_step,
        score=score,
        threshold=float(threshold),
        evidence=evidence,
        message=message,
        version=detector.version,
    )


def _setting(field: dataclasses.Field[Any], config: Any) -> Any:
    """12 and 12.0 are one setting where it is a float, as they are in the compiled fold."""
    value = getattr(config, field.name)
    return float(value) if field.type in ("float", float) and isinstance(value, int) else value
