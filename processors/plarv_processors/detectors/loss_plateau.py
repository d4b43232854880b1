"""A loss that does not learn: it stands near where it began, and stays."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import ClassVar, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.windows import median
from plarv_schemas.events import Level, StepEvent, Verdict, VerdictState

__all__ = ["LossPlateau"]

_LARGEST = 1e290  # what may be averaged without an overflow


class LossPlateau:
    """Fires when a run has not learnt anything for three quarters of its life.

    The past is kept as at most ``levels`` levels, each the mean of as many block medians as it
    takes, so that the level at a quarter of the run is known however long the run is. *no_progress*
    (warn) opens, from ``min_points`` losses on, when all of this holds:

    - the latest level is not ``progress`` below the level at a quarter of the run, nor ``rise``
      above it;
    - it is above ``start_share`` of the first loss: a run that came down further has converged;
    - the noise inside a block is at most ``quiet`` of the level. At chance the output hardly
      depends on the batch, so the loss hardly varies; a fine-tuning whose batches differ by more
      than it can gain is nobody's failure.

    Steps at a learning rate of 0, or below ``lr_share`` of its largest, do not count. Resolved when
    ``resume_blocks`` blocks in a row lie ``resume`` below the level it stood at. A loss of exactly
    0 is passed over; one below 0 is no loss to minimise, and from there on there is silence.

    Cost: O(1) a step and one short sort a block, 48 doubles. Source: the progress ratio of the
    replay over public runs, without its need to know the length of the run.

    >>> detector = LossPlateau()
    >>> for step in range(1000):
    ...     loss = 2.303 + 0.01 * (step % 3) if step < 600 else 2.303 * 0.99 ** (step - 600)
    ...     for found in detector.update(StepEvent("run", "s", step, 0, step, loss=loss)):
    ...         print(found.step, found.kind, found.level, found.state)
    255 no_progress warn opened
    639 no_progress ok resolved
    """

    name: ClassVar[str] = "loss_plateau"
    scope: ClassVar[Scope] = "run"

    @dataclass(frozen=True)
    class Config:
        """Defaults: silent on 54 healthy public runs, all 10 stalled ones found."""

        block: int = 16  # losses of a block
        levels: int = 32  # levels kept; an even number
        min_points: int = 256  # losses; healthy runs stand at chance for up to 130
        progress: float = 0.02  # of the level at a quarter of the run
        rise: float = 0.05  # of it; more is not standing still
        start_share: float = 0.5  # of the first loss; GPT-2 from 11 ends at 0.3 of it
        quiet: float = (
            0.02  # of the level, robust deviation inside a block; at chance 0.002 to 0.01
        )
        resume: float = 0.03  # of the level it stood at
        resume_blocks: int = 2  # blocks
        lr_share: float = 0.05  # of the largest learning rate so far

        def __post_init__(self) -> None:
            if self.block < 4 or self.levels < 8 or self.levels % 2:
                raise ValueError("block must be at least 4 and levels an even number from 8 on")
            if not 8 * self.block <= self.min_points:
                raise ValueError("min_points must be at least 8 blocks")
            if not (0.0 < self.progress < 1.0 and 0.0 < self.resume < 1.0 and self.rise > 0.0):
                raise ValueError("progress and resume must be shares, rise positive")
            if not (0.0 < self.start_share <= 1.0 and 0.0 <= self.lr_share < 1.0):
                raise ValueError("start_share and lr_share must be shares")
            if not self.quiet > 0.0 or self.resume_blocks < 1:
                raise ValueError("quiet must be positive and resume_blocks at least 1")

    __slots__ = (
        "config", "version", "_off", "_count", "_start", "_lr_max", "_block", "_levels", "_span",
        "_sum", "_parts", "_noise", "_open", "_onset", "_stood", "_better",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None) -> None:
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._off = False  # whether the loss was seen below zero
        self._count = 0  # losses in the history
        self._start = 0.0  # the largest of the first losses
        self._lr_max = 0.0
        self._block = array("d")  # the losses of the unfinished block
        self._levels = array("d")
        self._span = 1  # blocks a level
        self._sum = 0.0  # of the medians of the unfinished level
        self._parts = 0  # of these, how many
        self._noise = 0.0  # mean over the blocks, as a share of the level
        self._open = False
        self._onset = 0
        self._stood = 0.0  # level at which the verdict opened
        self._better = 0  # blocks in a row that lie below it

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """The verdicts of this event; see the class."""
        loss = event.loss
        if loss is None or loss - loss != 0.0 or self._off:
            return ()
        lr = event.current_lr
        if lr is not None:
            if lr > self._lr_max and lr - lr == 0.0:
                self._lr_max = lr
            elif lr <= self._lr_max * self.config.lr_share:
                return ()
        if loss <= 0.0 or loss > _LARGEST:
            return self._switch_off(event) if loss < 0.0 else ()
        block = self._block
        block.append(loss)
        if len(block) < self.config.block:
            return ()
        return self._finish_block(event)

    def _finish_block(self, event: StepEvent) -> Tuple[Verdict, ...]:
        config, block = self.config, self._block
        if self._start == 0.0:
            self._start = max(block[:3])
        ordered = sorted(block)
        del block[:]
        size = len(ordered)
        level = median(ordered)
        if self._open:
            return self._follow(event, level)
        # 0.7413 x the interquartile range is the deviation of a normal distribution.
        noise = min(1.0, 0.7413 * (ordered[3 * size // 4] - ordered[size // 4]) / level)
        self._count += size
        weight = max(size / self._count, 0.125)
        self._noise += weight * (noise - self._noise)
        self._sum += level
        self._parts += 1
        if self._parts < self._span:
            return ()
        self._levels.append(self._sum / self._parts)
        self._sum, self._parts = 0.0, 0
        found = self._judge(event)
        if len(self._levels) == config.levels:
            self._halve()
        return found

    def _judge(self, event: StepEvent) -> Tuple[Verdict, ...]:
        """Whether the run stands still, now that a level is complete."""
        config, levels = self.config, self._levels
        if self._count < config.min_points:
            return ()
        now, quarter = levels[-1], levels[len(levels) // 4]
        still = quarter * (1.0 - config.progress) < now < quarter * (1.0 + config.rise)
        if not still or not self._noise <= config.quiet or now <= config.start_share * self._start:
            return ()
        self._open, self._stood, self._better = True, now, 0
        self._onset = event.step
        return (self._verdict(event, now, quarter, "warn", "opened"),)

    def _follow(self, event: StepEvent, level: float) -> Tuple[Verdict, ...]:
        """A block after the verdict opened: resolve when the run learns again."""
        config = self.config
        if level < self._stood * (1.0 - config.resume):
            self._better += 1
        else:
            self._better = 0
        if self._better < config.resume_blocks:
            return ()
        return (self._resolve(event, level),)

    def _halve(self) -> None:
        """Joins the levels two by two, so that the same room holds a run twice as long."""
        levels = self._levels
        for at in range(len(levels) // 2):
            levels[at] = 0.5 * (levels[2 * at] + levels[2 * at + 1])
        del levels[len(levels) // 2 :]
        self._span *= 2

    def _resolve(self, event: StepEvent, level: float) -> Verdict:
        resolved = self._verdict(event, level, self._stood, "ok", "resolved")
        self._open = False
        del self._levels[:]
        self._count = self._parts = 0
        self._span, self._sum, self._noise = 1, 0.0, 0.0
        return resolved

    def _switch_off(self, event: StepEvent) -> Tuple[Verdict, ...]:
        self._off = True
        return (self._resolve(event, self._stood),) if self._open else ()

    def _verdict(
        self, event: StepEvent, now: float, before: float, level: Level, state: VerdictState
    ) -> Verdict:
        what = (
            f"loss {now:.4g} has not come down for {3 * self._count // 4} losses: it was "
            f"{before:.4g} a quarter into the run and {self._start:.4g} at its start"
        )
        if state == "resolved":
            what = f"loss {now:.4g} moves again, it stood at {before:.4g}"
        return verdict(
            self,
            event,
            kind="no_progress",
            level=level,
            state=state,
            onset_step=self._onset,
            score=now / before,
            threshold=1.0 - self.config.progress,
            evidence={
                "level": now,
                "level_before": before,
                "start": self._start,
                "noise": self._noise,
                "losses": float(self._count),
            },
            message=what,
        )
