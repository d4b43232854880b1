"""The sums of a run's steps in at most 128 bins of equal width, which doubles as the run grows."""

from __future__ import annotations

import math
from bisect import insort
from typing import Dict, List, Optional, Sequence, Tuple

from plarv_schemas.events import StepEvent
from plarv_sinks.quality_samples import TrustCurve, is_number

__all__ = ["StepBin", "StepBins", "whole"]

_MOST = 128
_EARLIEST = 8  # records, whose mean is the first loss


class StepBin:
    """Sums over the records of neighbouring steps. What is not finite is left out."""

    __slots__ = (
        "losses", "trust", "_loss", "_steps", "_norms", "_norm", "_pairs", "_sample_loss",
        "_entropy",
    )  # fmt: skip

    def __init__(self) -> None:
        self.losses = 0  # records with a loss
        self.trust: Optional[TrustCurve] = None
        self._loss = 0.0
        self._steps = 0.0  # of the records with a loss
        self._norms = 0
        self._norm = 0.0
        self._pairs = 0  # samples with loss and entropy
        self._sample_loss = 0.0
        self._entropy = 0.0

    def add(self, event: StepEvent) -> None:
        """Takes one record in."""
        loss, norm = event.loss, event.grad_norm
        if loss is not None and is_number(loss):
            self.losses += 1
            self._loss += loss
            self._steps += event.step
        if norm is not None and is_number(norm) and norm >= 0.0:
            self._norms += 1
            self._norm += norm
        if event.sample_losses and event.sample_entropies:
            for lost, entropy in zip(event.sample_losses, event.sample_entropies):
                if is_number(lost) and is_number(entropy) and entropy >= 0.0:
                    self._pairs += 1
                    self._sample_loss += lost
                    self._entropy += entropy
        confidences, correct = event.sample_confidences, event.sample_correct
        if confidences and correct:
            if self.trust is None:
                self.trust = TrustCurve()
            self.trust.add(confidences, correct)

    def merge(self, other: StepBin) -> None:
        """Adds what ``other`` summed."""
        self.losses += other.losses
        self._loss += other._loss
        self._steps += other._steps
        self._norms += other._norms
        self._norm += other._norm
        self._pairs += other._pairs
        self._sample_loss += other._sample_loss
        self._entropy += other._entropy
        if other.trust is not None:
            if self.trust is None:
                self.trust = TrustCurve()
            self.trust.merge(other.trust)

    @property
    def mean_loss(self) -> Optional[float]:
        """None without a loss."""
        return self._loss / self.losses if self.losses else None

    @property
    def mean_step(self) -> float:
        """Of the records with a loss; 0 without."""
        return self._steps / self.losses if self.losses else 0.0

    @property
    def mean_grad_norm(self) -> Optional[float]:
        """None without a gradient norm."""
        return self._norm / self._norms if self._norms else None

    def surprise(self, least: int) -> Optional[float]:
        """Mean loss over mean entropy, else wrong over doubted samples.

        None with fewer than ``least`` samples, or where the model doubts nothing.
        """
        if self._pairs >= least and self._entropy > 0.0 and self._sample_loss >= 0.0:
            return self._sample_loss / self._entropy
        trust = self.trust
        if trust is not None and trust.samples >= least and trust.doubt > 0.0:
            return trust.wrong / trust.doubt
        return None


class StepBins:
    """The bins of a run, by step.

    The width is the smallest power of two that leaves at most 128 bins, whatever the order in
    which the records come. Memory: 128 bins, up to 900 bytes each.
    """

    __slots__ = ("_bins", "_earliest", "_range", "_shift")

    def __init__(self) -> None:
        self._bins: Dict[int, StepBin] = {}
        self._shift = 0  # bins are 2^shift steps wide
        self._range: Optional[Tuple[int, int]] = None  # first and last step
        self._earliest: List[Tuple[int, float]] = []  # step and loss, in order

    @property
    def num_steps(self) -> int:
        """From the first to the last."""
        return self._range[1] - self._range[0] + 1 if self._range else 0

    @property
    def first_loss(self) -> Optional[float]:
        """The mean of the first records; None without a loss."""
        losses = [loss for _, loss in self._earliest]
        return math.fsum(losses) / len(losses) if losses else None

    def add(self, event: StepEvent) -> None:
        """Takes one record in."""
        step, loss, earliest = event.step, event.loss, self._earliest
        first, last = self._range or (step, step)
        if self._range is None or step < first or step > last:
            self._range = min(first, step), max(last, step)
        self._at(step).add(event)
        if loss is not None and is_number(loss):
            if len(earliest) < _EARLIEST or (step, loss) < earliest[-1]:
                insort(earliest, (step, loss))
                del earliest[_EARLIEST:]

    def _at(self, step: int) -> StepBin:
        place = step >> self._shift
        found = self._bins.get(place)
        if found is None:
            found = self._bins[place] = StepBin()
            while len(self._bins) > _MOST:
                self._double()
            found = self._bins[step >> self._shift]
        return found

    def quarters(self) -> List[List[StepBin]]:
        """The bins of each quarter of the steps from first to last, in order."""
        parts: List[List[StepBin]] = [[], [], [], []]
        if self._bins:
            first, last = min(self._bins), max(self._bins)
            for place in sorted(self._bins):
                parts[4 * (place - first) // (last - first + 1)].append(self._bins[place])
        return parts

    def _double(self) -> None:
        self._shift += 1
        halved: Dict[int, StepBin] = {}
        for place in sorted(self._bins):
            into = halved.get(place >> 1)
            if into is None:
                halved[place >> 1] = self._bins[place]
            else:
                into.merge(self._bins[place])
        self._bins = halved


def whole(bins: Sequence[StepBin]) -> StepBin:
    """The sum of several bins."""
    result = StepBin()
    for each in bins:
        result.merge(each)
    return result
