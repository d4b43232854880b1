"""The four things that travel: steps and control events in, verdicts and actions out.

They are named tuples: immutable, compared as whole records, and cheap enough for the fold's hot
path (a frozen dataclass costs twice as much to make). Every column that can be absent is ``None``
then; non-finite floats are values like any other.
"""

from __future__ import annotations

import hashlib
import math
from typing import (
    Any,
    Dict,
    List,
    Literal,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
)

__all__ = [
    "ACTION_KINDS",
    "CONFIRM_STEPS",
    "LEVELS",
    "LIST_COLUMNS",
    "LOCAL_CHECKS",
    "SCALAR_COLUMNS",
    "Action",
    "ActionKind",
    "ControlEvent",
    "Event",
    "Level",
    "StepEvent",
    "Verdict",
    "VerdictState",
    "digest",
    "from_json_value",
    "to_json_value",
]

Level = Literal["ok", "warn", "critical"]
VerdictState = Literal["opened", "escalated", "resolved"]
ActionKind = Literal[
    "WARN",
    "CHECKPOINT",
    "CERTIFY",
    "FREEZE",
    "SET_LR",
    "RESET_OPTIMIZER",
    "ROLLBACK",
    "PAUSE",
    "RESUME",
    "HALT",
]
ControlKind = Literal[
    "session_started",
    "session_finished",
    "checkpoint_saved",
    "recovered",
    "action_applied",
    "action_refused",
    "action_dropped",
    "action_expired",
    "order",
    "rank_silent",
    "detector_left_out",
]

LEVELS: Tuple[Level, ...] = ("ok", "warn", "critical")
"""In order of severity; the wire carries the index."""

ACTION_KINDS: Tuple[ActionKind, ...] = (
    "WARN",
    "CHECKPOINT",
    "CERTIFY",
    "FREEZE",
    "SET_LR",
    "RESET_OPTIMIZER",
    "ROLLBACK",
    "PAUSE",
    "RESUME",
    "HALT",
)

CONFIRM_STEPS = 50
"""Steps after a checkpoint in which the detectors confirm a fault; without one it is certified."""

LOCAL_CHECKS: Tuple[str, ...] = (
    "activation_sparsity",
    "activation_saturation",
    "gradient_flow",
    "weight_imbalance",
    "optimizer_health",
    "attention_collapse",
    "loss_spike",
    "representation_collapse",
    "precision_erosion",
    "hardware_integrity",
)
"""The checks of a local report, in the order of its levels and scores."""


class StepEvent(NamedTuple):
    """One optimizer step of one rank. (session, record) is the key by which a duplicate is
    known.
    """

    run_id: str
    session: str  # one process start of one rank
    record: int  # number of this record in its session, from 0; control events count too
    rank: int
    step: int  # optimizer steps, from 0
    time_ns: Optional[int] = None  # UTC
    world_size: Optional[int] = None
    epoch: Optional[float] = None
    loss: Optional[float] = None
    grad_norm: Optional[float] = None  # L2, unscaled, before clipping
    current_lr: Optional[float] = None
    update_norm: Optional[float] = None  # L2 of the change of the weights in this step
    val_loss: Optional[float] = None
    perplexity: Optional[float] = None
    grad_l1_norm: Optional[float] = None
    grad_l2_norm: Optional[float] = None
    forward_ms: Optional[float] = None  # timings are float32 on the wire, so here too
    backward_ms: Optional[float] = None
    step_time_ms: Optional[float] = None
    batch_size: Optional[int] = None
    loss_scale: Optional[float] = None
    # Per-sample signals, one value a sample. Their lengths may differ.
    sample_ids: Optional[Tuple[int, ...]] = None  # signed 64 bit; strings are hashed before
    sample_losses: Optional[Tuple[float, ...]] = None
    sample_confidences: Optional[Tuple[float, ...]] = None
    sample_margins: Optional[Tuple[float, ...]] = None
    sample_entropies: Optional[Tuple[float, ...]] = None
    sample_correct: Optional[Tuple[int, ...]] = None  # 0 or 1
    # The local report, one value a check, in the order of LOCAL_CHECKS.
    local_levels: Optional[Tuple[int, ...]] = None  # index into LEVELS
    local_scores: Optional[Tuple[float, ...]] = None
    local_layers: Optional[Tuple[str, ...]] = None  # worst layers, worst first
    # Set by the fold on the event that stands for a complete step of several ranks; never on the
    # wire.
    parts: Tuple[StepEvent, ...] = ()  # the ranks' own events, in rank order


SCALAR_COLUMNS: Tuple[str, ...] = StepEvent._fields[5:21]
"""Nullable scalar columns, in wire order: ``time_ns`` to ``loss_scale``."""

LIST_COLUMNS: Tuple[str, ...] = StepEvent._fields[21:30]
"""Nullable list columns, in wire order: ``sample_ids`` to ``local_layers``."""


class ControlEvent(NamedTuple):
    """Whatever needs a clock or comes from outside the fold: written once, then read by the fold.

    ``data`` holds only what JSON can: numbers, strings, booleans, None, lists and mappings of them.
    """

    run_id: str
    session: str
    record: int
    rank: Optional[int]  # None: about the run as a whole
    kind: ControlKind
    time_ns: Optional[int] = None  # UTC
    step: Optional[int] = None
    data: Mapping[str, Any] = {}


Event = Union[StepEvent, ControlEvent]


class Verdict(NamedTuple):
    """A detector's finding, written when it changes: opened, escalated, resolved."""

    run_id: str
    attempt: int  # from 1; set by the fold
    rank: Optional[int]  # None: the run as a whole
    step: int
    # of the event it was found at, among the accepted events of the run; set by the fold
    ordinal: int
    detector: str
    kind: str  # what was found, e.g. "transient", "confirmed"
    level: Level
    state: VerdictState
    onset_step: int  # first step of the evidence
    score: float
    threshold: float  # score is at or past this when the verdict opens
    evidence: Mapping[str, float]  # enough to redo the decision by hand
    message: str  # one sentence for a person, with its numbers
    version: str  # name and Config fingerprint of the detector

    @property
    def id(self) -> str:
        """16 hex digits made from what the verdict is about, never from when it was computed."""
        return digest(
            self.run_id, self.attempt, self.rank, self.step, self.version, self.kind, self.state
        )

    def to_dict(self) -> Dict[str, Any]:
        """As `argus replay --json` prints it: JSON values only, non-finite numbers as strings."""
        return {
            "type": "verdict",
            "id": self.id,
            **{name: to_json_value(getattr(self, name)) for name in Verdict._fields},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The inverse of :meth:`to_dict`."""
        fields = {name: data[name] for name in cls._fields}
        fields["evidence"] = {k: from_json_value(v) for k, v in data["evidence"].items()}
        for name in ("score", "threshold"):
            fields[name] = from_json_value(data[name])
        return cls(**fields)


class Action(NamedTuple):
    """What the policy wants done about a run, and why."""

    run_id: str
    attempt: int
    sessions: Tuple[Tuple[str, int], ...]  # (session, first record) of each rank in the attempt
    step: int
    ordinal: int
    kind: ActionKind
    parameters: Mapping[str, Any]  # JSON values
    reason: str  # one sentence with its numbers
    verdict_ids: Tuple[str, ...]
    harm_pressure: float  # 0 to 3
    expiry_step: int  # not to be applied after this step

    @property
    def id(self) -> str:
        """16 hex digits; one cause at one place gives one id."""
        return digest(
            self.run_id, self.attempt, self.step, self.ordinal, self.kind, *self.verdict_ids
        )

    def to_dict(self) -> Dict[str, Any]:
        """As `argus replay --json` prints it."""
        return {
            "type": "action",
            "id": self.id,
            **{name: to_json_value(getattr(self, name)) for name in Action._fields},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Action:
        """The inverse of :meth:`to_dict`."""
        fields = {name: data[name] for name in cls._fields}
        fields["sessions"] = tuple((str(s), int(r)) for s, r in data["sessions"])
        fields["verdict_ids"] = tuple(data["verdict_ids"])
        fields["parameters"] = {k: from_json_value(v) for k, v in data["parameters"].items()}
        return cls(**fields)


_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_json_value(value: Any) -> Any:
    """`value` with what JSON lacks replaced: non-finite floats become "nan", "inf", "-inf"."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "nan" if value != value else ("inf" if value > 0 else "-inf")
    kind: Type[object] = value.__class__
    if issubclass(kind, Mapping):
        return {str(name): to_json_value(item) for name, item in value.items()}
    if issubclass(kind, (list, tuple)):
        items: List[Any] = [to_json_value(item) for item in value]
        return items
    return value


def from_json_value(value: Any) -> Any:
    """The inverse of :func:`to_json_value` for one number; anything else comes back as it is."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return value


def digest(*parts: Union[str, int, Sequence[str], None]) -> str:
    """16 hex digits made from what something is about: the same whenever they are made."""
    text = "\x1f".join("" if part is None else str(part) for part in parts)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()
