"""What single samples say: repeated batches, wrong labels, a few samples that carry the loss."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import ClassVar, List, Mapping, Optional, Sequence, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.sample_statistics import (
    BatchMemory,
    Concentration,
    LossShares,
    MarginHeaps,
    checksum,
    finite,
    signed_confidences,
    total,
)
from plarv_schemas.events import Level, StepEvent, Verdict, VerdictState

__all__ = ["SampleAnomaly"]


class SampleAnomaly:
    """Fires on what the samples of a batch show and its mean hides. One state for all ranks.

    *repeated_batch*: a rank gets the same batch ``min_repeats`` times in a row, or that often
    within the last ``horizon`` batches once as many different ones came in a row. So neither
    several passes over the data nor a data set of a few batches is an alarm. A batch is its sample
    ids in order, or without ids the bits of its sample losses (then the model stood still too). It
    is critical after ``critical_repeats`` in a row, but not in a run that never had any other
    batch.

    *label_noise*: the margins (the label's score minus the best other) fall into two heaps while
    most samples are learned: with T = half the median positive margin, more than ``heap_ratio`` as
    many lie in (-3T, -T], confidently wrong, as in (-T, T], undecided. Where margins only tail off
    to the left, as a learner's do, it is the other way round. Without margins, ``2 x confidence -
    1`` signed by correctness stands for them. It must hold over ``noise_pools`` pools of ``pool``
    samples.

    *concentrated_loss*: with all losses taken above the batch's smallest, the largest has far more
    of what the smaller nine tenths have together than in the batches before (log, robust z), is
    ``top_record`` times the largest of these, and a tenth of the samples hold ``top_share`` of it
    all. Its window takes no batch while it is open.

    NaN and Inf samples are left out. Only the first ``max_samples`` of a batch are read, the
    margins of every fourth batch, the losses of every eighth and of each with a large one.

    Cost: 5 us a batch of 32, 1.9 KB. Source: AUM and confident learning for the margins; the rest
    is the survey's row on data quality.

    >>> detector = SampleAnomaly()
    >>> for step in range(60):
    ...     first = 32 * min(step, 40)  # the loader is stuck from step 40 on
    ...     event = StepEvent("run", "s", step, 0, step, sample_ids=tuple(range(first, first + 32)))
    ...     for found in detector.update(event):
    ...         print(found.step, found.kind, found.level, found.state)
    42 repeated_batch warn opened
    51 repeated_batch critical escalated
    """

    name: ClassVar[str] = "sample_anomaly"
    scope: ClassVar[Scope] = "rank"

    @dataclass(frozen=True)
    class Config:
        """Defaults from simulated healthy batches: normal, exponential and log-normal losses."""

        horizon: int = 128  # batches of all watched ranks
        max_ranks: int = 8  # ranks watched for repeats: then the horizon holds 16 batches of each
        min_repeats: int = 3  # two in a row is what the boundary of a shuffled epoch can give
        critical_repeats: int = 12  # in a row
        calm_batches: int = 32  # without the anomaly (a rank), to resolve it
        max_samples: int = 256  # read of a batch, to bound the time
        pool: int = 128  # samples that are judged together
        noise_share: float = 0.05  # of all samples; below it is any data set's own noise
        heap_ratio: float = 2.0  # far to near; at most 1 with one heap
        noise_z: float = 4.0  # standard deviations between far and near, were they Poisson
        noise_pools: int = 10  # in a row; a class that is merely late is learned by then
        min_samples: int = 8  # of a batch, for its largest loss to be judged
        min_history: int = 20  # batches
        top_z: float = 6.0  # robust standard deviations of the log ratio
        top_floor: float = 0.25  # smallest scale of the log ratio; normal losses give 0.2
        top_record: float = 3.0  # times the largest excess of the batches before: tames heavy tails
        top_share: float = 0.5  # held by a tenth of the samples; exponential losses give 0.3

        def __post_init__(self) -> None:
            if self.max_ranks < 1 or self.calm_batches < 1:
                raise ValueError("max_ranks and calm_batches must be at least 1")
            if not 3 <= self.min_repeats <= self.critical_repeats <= self.horizon // self.max_ranks:
                raise ValueError("3 <= min_repeats <= critical_repeats <= horizon / max_ranks")
            if not 32 <= self.pool <= self.max_samples:
                raise ValueError("pool must be between 32 and max_samples")
            if not (0.0 < self.noise_share < 0.5 and 0.0 < self.top_share < 1.0):
                raise ValueError("noise_share must lie in (0, 0.5) and top_share in (0, 1)")
            if not (self.heap_ratio > 1.0 and self.noise_z > 0.0):
                raise ValueError("heap_ratio must be above 1 and noise_z positive")
            if not (self.top_z > 0.0 and self.top_floor > 0.0 and self.top_record >= 1.0):
                raise ValueError("top_z, top_floor must be positive, top_record at least 1")
            if self.noise_pools < 2 or self.min_samples < 4 or self.min_history < 8:
                raise ValueError("noise_pools >= 2, min_samples >= 4, min_history >= 8")

    __slots__ = (
        "config", "version", "_batches", "_repeating_since", "_pool", "_heaps", "_noisy_pools",
        "_noisy_since", "_shares", "_kind", "_level", "_onset", "_calm",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._batches = BatchMemory(self.config.horizon)
        self._repeating_since = 0  # step
        self._pool = array("f")  # margins
        self._heaps = MarginHeaps()
        self._noisy_pools = 0  # in a row
        self._noisy_since = 0  # step
        self._shares = LossShares(self.config.top_floor)
        self._kind: Optional[str] = None  # of the open verdict
        self._level: Level = "ok"
        self._onset = 0
        self._calm = 0  # batches or pools since the anomaly was last seen

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        ids, losses, margins = event.sample_ids, event.sample_losses, event.sample_margins
        if not (ids or losses or margins or event.sample_correct):
            return ()
        found: List[Verdict] = []
        limit = self.config.max_samples
        if ids or losses:
            self._watch_repeats(event, ids, losses, found)
        turn = event.record + event.rank
        if losses:
            losses = losses[:limit]
            shares = self._shares
            if not turn & 7 or shares.filling or max(losses) > shares.alarm:
                self._watch_largest(event, losses, found)
        if not turn & 3:
            given = margins or signed_confidences(event.sample_confidences, event.sample_correct)
            if given:
                self._watch_margins(event, given[:limit], found)
        return tuple(found)

    # The same batch again.

    def _watch_repeats(
        self,
        event: StepEvent,
        ids: Optional[Sequence[int]],
        losses: Optional[Sequence[float]],
        found: List[Verdict],
    ) -> None:
        config, batches, rank = self.config, self._batches, event.rank
        key = checksum(ids, losses, rank) if 0 <= rank < config.max_ranks else None
        if key is None:
            return
        fresh = batches.streak
        came_before = batches.add(key)
        if not came_before and self._kind != "repeated_batch":
            return
        ranks = min(max(event.world_size or 1, 1), config.max_ranks)
        times = in_row = 1
        if came_before:
            times, in_row = batches.repeats(ranks + ranks // 2, config.critical_repeats)
            if fresh:
                self._repeating_since = event.step
        if in_row >= config.min_repeats or (batches.long and times >= config.min_repeats):
            self._repeated(event, times, in_row, found)
        elif self._kind == "repeated_batch" and self._is_calm(config.calm_batches * ranks):
            self._close(event, "no batch came again", found)

    def _repeated(self, event: StepEvent, times: int, in_row: int, found: List[Verdict]) -> None:
        config, distinct = self.config, self._batches.distinct
        self._calm = 0
        ranks = min(max(event.world_size or 1, 1), config.max_ranks)
        stuck = in_row >= config.critical_repeats and distinct > ranks
        if self._kind == "repeated_batch" and not (stuck and self._level == "warn"):
            return
        who = f"rank {event.rank} got" if (event.world_size or 1) > 1 else "the run got"
        often = "in a row" if in_row >= config.min_repeats else f"in {config.horizon} batches"
        message = f"{who} the same batch {times} times {often}, after {distinct - 1} others"
        evidence = {
            "times": float(times),
            "in_row": float(in_row),
            "different": float(distinct),
            "rank": float(event.rank),
        }
        score, threshold = float(times), float(config.min_repeats)
        if self._kind == "repeated_batch":
            self._level = "critical"
            found.append(self._verdict(event, "escalated", score, threshold, evidence, message))
            return
        if self._kind is not None:  # what the data loader does explains the rest
            self._close(event, "the batches repeat, which comes first", found)
        self._open(event, "repeated_batch", self._repeating_since)
        found.append(self._verdict(event, "opened", score, threshold, evidence, message))

    # A few samples that carry the loss.

    def _watch_largest(
        self, event: StepEvent, losses: Sequence[float], found: List[Verdict]
    ) -> None:
        config, shares = self.config, self._shares
        batch = shares.read(losses, config.min_samples)
        if batch is None:
            return
        if (
            shares.count >= config.min_history
            and batch.z >= config.top_z
            and batch.share >= config.top_share
            and batch.excess >= config.top_record * batch.record
        ):
            if self._kind is None:
                self._concentrated(event, batch, found)
            elif self._kind == "concentrated_loss":
                self._calm = 0
        elif self._kind != "concentrated_loss":
            shares.accept(batch)
        elif self._is_calm(config.calm_batches):
            self._close(event, "the loss is spread over the samples again", found)

    def _concentrated(self, event: StepEvent, batch: Concentration, found: List[Verdict]) -> None:
        place = (event.sample_losses or ()).index(batch.largest)
        ids = event.sample_ids or ()
        who = f"sample {ids[place]}" if place < len(ids) else f"sample number {place}"
        message = (
            f"a tenth of the samples hold {batch.share:.0%} of the loss above the batch's least; "
            f"{who} alone has {math.exp(batch.log_ratio):.2g} of what the smaller nine tenths have "
            f"together (usual: {self._shares.usual:.2g})"
        )
        evidence = batch._asdict()
        evidence["usual_ratio"] = self._shares.usual
        evidence["place"] = float(place)
        evidence["rank"] = float(event.rank)
        self._open(event, "concentrated_loss", event.step)
        found.append(self._verdict(event, "opened", batch.z, self.config.top_z, evidence, message))

    # Labels that contradict what the model has learned.

    def _watch_margins(
        self, event: StepEvent, margins: Sequence[float], found: List[Verdict]
    ) -> None:
        pool, size = self._pool, self.config.pool
        pool.extend(margins if total(margins) is not None else finite(margins))
        while len(pool) >= size:
            ordered = sorted(pool[:size])
            del pool[:size]
            self._judge_pool(event, ordered, found)

    def _judge_pool(self, event: StepEvent, margins: List[float], found: List[Verdict]) -> None:
        config, heaps = self.config, self._heaps
        heaps.add(margins)
        z = heaps.z
        if (
            heaps.learned
            and z >= config.noise_z
            and heaps.far >= config.noise_share * heaps.samples
            and heaps.far >= config.heap_ratio * heaps.near
        ):
            if not self._noisy_pools:
                self._noisy_since = event.step
            self._noisy_pools += 1
            if self._kind == "label_noise":
                self._calm = 0
            elif self._kind is None and self._noisy_pools >= config.noise_pools:
                self._noisy(event, z, found)
            return
        self._noisy_pools = 0
        if self._kind == "label_noise" and self._is_calm(config.noise_pools):
            self._close(event, "the confidently wrong samples are gone", found)

    def _noisy(self, event: StepEvent, z: float, found: List[Verdict]) -> None:
        heaps = self._heaps
        far, near = heaps.far / heaps.samples, heaps.near / heaps.samples
        message = (
            f"since step {self._noisy_since} {far:.1%} of the samples are wrong with high "
            f"confidence and only {near:.1%} undecided: their labels may be wrong"
        )
        evidence = {
            "far_share": far,
            "near_share": near,
            "samples": heaps.samples,
            "pools": float(self._noisy_pools),
        }
        self._open(event, "label_noise", self._noisy_since)
        found.append(self._verdict(event, "opened", z, self.config.noise_z, evidence, message))

    # What all three share.

    def _open(self, event: StepEvent, kind: str, onset_step: int) -> None:
        self._kind, self._level, self._onset, self._calm = kind, "warn", onset_step, 0

    def _is_calm(self, enough: int) -> bool:
        self._calm += 1
        return self._calm >= enough

    def _close(self, event: StepEvent, why: str, found: List[Verdict]) -> None:
        self._level = "ok"
        calm = {"calm": float(self._calm)}
        message = f"{why} (it began at step {self._onset})"
        found.append(self._verdict(event, "resolved", 0.0, 0.0, calm, message))
        self._kind = None

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
        )
