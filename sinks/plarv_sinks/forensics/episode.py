"""A finding from its opening to its end, and which of two can lie behind the other."""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

from plarv_processors.responses import harm_of
from plarv_schemas.events import Verdict
from plarv_sinks.forensics.clues import AttemptFacts

__all__ = ["Episode", "can_cause", "episodes_of"]

_STRICT = 3.0  # points that a verdict must lie ahead to cause what usually causes it
_LINGERS = 48.0  # points after it was resolved that a verdict may still explain another
_BLOCKS_POINTS = 48.0  # by which loss_oscillation, which judges blocks, is late
_MAX_EPISODES = 512  # looked at: half of them grave, half warnings

_DEPTH = {
    "fleet_skew/hardware": 0,
    "fleet_skew/replica_disagreement": 0,
    "fleet_skew/replica_mismatch": 0,
    "sample_anomaly/repeated_batch": 1,
    "sample_anomaly/label_noise": 1,
    "gradient_explosion": 2,
    "optimizer_corruption": 3,
    "gradient_collapse": 3,
    "loss_oscillation/period_two": 4,
    "loss_oscillation": 6,
    "non_finite": 5,
    "loss_spike": 5,
    "sample_anomaly": 6,
    "loss_divergence": 7,
    "canalization": 7,
    "loss_plateau": 8,
    "generalization_gap": 8,
    "fleet_skew": 9,
}
"""Detector, or detector/kind -> how far down the causal chain it reads: data, hardware and
optimizer make gradients, gradients make losses, and what a loss does for long is a symptom."""

_LATE = {
    "gradient_collapse": 12.0,  # the local reports that it reads come every so many steps
    "sample_anomaly/label_noise": 24.0,
    "sample_anomaly/repeated_batch": 2.0,
    "loss_oscillation": 16.0,
}
_EARLY = {"loss_divergence": 12.0, "canalization": 12.0, "loss_oscillation": 48.0}
"""Points by which a detector's onset may lie after, or before, what it found: where it judges
blocks, or where noise lifted the points before. None for what is measured at a step."""

_ENDS = frozenset({"loss_plateau"})
"""What explains nothing else: that nothing is learnt breaks no loss."""

_APART = frozenset({"generalization_gap", "fleet_skew/straggler", "fleet_skew/slowdown"})
"""What explains nothing else, and is explained by the data or the hardware alone."""


class Episode:
    """One finding from its opening to its end, with the escalations between."""

    __slots__ = ("first", "worst", "attempt", "end_step", "harm", "began", "key")

    def __init__(self, first: Verdict) -> None:
        self.first = self.worst = first
        self.attempt = first.attempt
        self.end_step: Optional[int] = None  # None: still open
        self.harm = harm_of(first)
        self.began = float(first.onset_step)
        self.key = ""

    def grow(self, found: Verdict) -> None:
        """Takes an escalation."""
        if harm_of(found) >= self.harm:
            self.worst, self.harm = found, harm_of(found)

    def place(self, facts: AttemptFacts) -> None:
        """Says when it began, for detectors whose onset is when they knew; and what it is."""
        kinds = [f"{self.first.detector}/{each.kind}" for each in (self.worst, self.first)]
        known = [kind for kind in kinds if kind in _DEPTH or kind in _APART]
        self.key = known[0] if known else self.first.detector
        self.began, start = float(self.first.onset_step), facts.first_step or 0
        if self.first.detector == "loss_oscillation":
            self.began = max(start, self.began - _BLOCKS_POINTS * facts.stride)
        elif self.first.detector == "loss_plateau":  # judged against a quarter of the run's life
            self.began = start + 0.25 * max(0.0, self.began - start)
        if self.first.detector in ("loss_divergence", "loss_oscillation"):
            jumps = [clue.step for clue in facts.clues if clue.kind == "loss_jump"]
            self.began = next((j for j in jumps if self.began <= j <= self.first.step), self.began)

    @property
    def depth(self) -> int:
        """How far down the causal chain; what we do not know stands with the losses."""
        return _DEPTH.get(self.key, _DEPTH.get(self.first.detector, 6))

    @property
    def late(self) -> float:
        """Points by which it may have begun before ``began``."""
        return _LATE.get(self.key, _LATE.get(self.first.detector, 0.0))

    @property
    def early(self) -> float:
        """Points by which it may have begun after ``began``."""
        return _EARLY.get(self.first.detector, 0.0)

    @property
    def weight(self) -> float:
        """Harm, half of it where it passed."""
        return self.harm if self.end_step is None else 0.5 * self.harm


def episodes_of(verdicts: Sequence[Verdict]) -> List[Episode]:
    """The findings from opening to end, by ordinal."""
    found: List[Episode] = []
    standing: Dict[Tuple[int, str, Optional[int]], Episode] = {}
    for verdict in sorted(verdicts, key=lambda each: each.ordinal):
        place = (verdict.attempt, verdict.detector, verdict.rank)
        episode = standing.get(place)
        if verdict.state == "resolved":
            if episode is not None:
                episode.end_step = verdict.step
                del standing[place]
        elif episode is None or verdict.state == "opened":
            standing[place] = episode = Episode(verdict)
            found.append(episode)
        else:
            episode.grow(verdict)
    if len(found) <= _MAX_EPISODES:
        return found
    grave = [episode for episode in found if episode.harm >= 1.0][: _MAX_EPISODES // 2]
    others = [episode for episode in found if episode.harm < 1.0][: _MAX_EPISODES // 2]
    return sorted(grave + others, key=lambda episode: episode.first.ordinal)


def can_cause(cause: Episode, effect: Episode, stride: float) -> bool:
    """Whether one may lie behind the other, by their onsets, by what they are, and by rank."""
    if cause.key in _APART or cause.key in _ENDS:
        return False
    if effect.key in _APART and cause.depth > 1:
        return False
    if cause.end_step is not None and cause.end_step + _LINGERS * stride < effect.began:
        return False
    lead = (effect.began - cause.began) / stride
    if cause.depth < effect.depth:
        return lead >= -(cause.late + effect.early)
    if cause.depth == effect.depth:
        return lead > 0.0 if cause.key == effect.key else lead >= 0.0
    return lead >= _STRICT + cause.early + effect.late
