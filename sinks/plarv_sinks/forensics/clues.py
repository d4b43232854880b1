"""What a run's events say by themselves, beside the verdicts: what changed, and where."""

from __future__ import annotations

import math
from typing import Any, Dict, Iterable, List, Literal, NamedTuple, Optional, Set, Tuple

from plarv_processors.attempts import Attempts
from plarv_schemas.events import LEVELS, LOCAL_CHECKS, ControlEvent, Event, StepEvent

__all__ = ["AttemptFacts", "Clue", "ClueKind", "find_clues"]

ClueKind = Literal[
    "learning_rate", "restart", "rank_silent", "world_size", "repeated_batch", "odd_rank",
    "non_finite", "layers", "loss_jump", "intervention",
]  # fmt: skip

_JUMP = 2.0  # times the learning rate held before
_HELD = 8  # steps that a learning rate is held to be one that can be left
_HELD_WITHIN = 1.1  # times; a schedule moves by less in a step
_RAMP_AFTER = 50  # steps of a run; before, a rise is its warm-up
_SILENT_AFTER = 8  # steps that a rank may be behind, as in the fold
_JUMP_Z, _JUMP_FLOOR = 4.0, 0.02  # deviations of log(loss) from its past; smallest of these
_JUMP_RATIO, _JUMP_MEMORY, _JUMP_ADOPT = 1.25, 32, 300  # times; losses; losses
_ODD_Z, _ODD_FLOOR = 5.0, 0.05  # deviations of log(loss) from the other ranks; smallest of these
_ODD_HISTORY, _ODD_MEMORY = 16, 32  # complete steps
_AHEAD = 16  # steps of several ranks kept until they are complete
_MAX_CLUES = 256  # of an attempt
_CRITICAL = LEVELS.index("critical")


class Clue(NamedTuple):
    """Something that the events show at a step: a reason for what came after it."""

    kind: ClueKind
    step: int
    rank: Optional[int]
    text: str  # with its numbers
    layers: Tuple[str, ...] = ()


class AttemptFacts:
    """One attempt as its events show it: where it began and ended, and the clues, by step."""

    __slots__ = ("attempt", "first_step", "last_step", "ranks", "points", "status", "clues")

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.first_step: Optional[int] = None
        self.last_step: Optional[int] = None
        self.ranks: Dict[int, int] = {}  # rank -> its last step
        self.points = 0  # step events of the first rank seen
        self.status: Optional[str] = None  # it ended with; None: it did not say
        self.clues: List[Clue] = []

    @property
    def stride(self) -> float:
        """Steps from one event of a rank to its next, on average; at least 1."""
        if self.first_step is None or self.last_step is None or self.points < 2:
            return 1.0
        return max(1.0, (self.last_step - self.first_step) / (self.points - 1))

    def add(self, clue: Clue) -> None:
        """Takes a clue, while there are not too many."""
        if len(self.clues) < _MAX_CLUES:
            self.clues.append(clue)


def find_clues(events: Iterable[Event]) -> Dict[int, AttemptFacts]:
    """The facts of each attempt, in one pass over the events in the log's order.

    Cost: about 5 us an event; memory of a few steps and some hundred clues an attempt.

    >>> log = [StepEvent("run", "s", step, 0, step, current_lr=1e-3 if step < 90 else 3e-2)
    ...        for step in range(100)]
    >>> [(clue.kind, clue.step, clue.text) for clue in find_clues(log)[1].clues]
    [('learning_rate', 90, 'the learning rate rose from 0.001 to 0.03 (x30)')]
    """
    reader = _Reader()
    for event in events:
        reader.read(event)
    return reader.finish()


class _Rates:
    """Follows the learning rate of one rank over all attempts."""

    __slots__ = ("steps", "largest", "_last", "_since", "_held")

    def __init__(self) -> None:
        self.steps = 0
        self.largest = 0.0  # that was ever held
        self._last: Optional[float] = None
        self._since: Optional[float] = None  # the rate from which `held` counts
        self._held = 0

    def read(self, rate: float) -> Optional[str]:
        """What changed, in words; None: nothing that one would be told of."""
        self.steps += 1
        last, self._last = self._last, rate
        if last is None or self._since is None or not last > 0.0:
            self._since = rate
            return None
        found: Optional[str] = None
        if self._held >= _HELD and rate >= _JUMP * last:
            found = self._told(last, rate)
        elif self.steps > _RAMP_AFTER and rate >= _JUMP * self.largest > 0.0:
            found = self._told(self.largest, rate)
        low, high = sorted((self._since, rate))
        if high <= low * _HELD_WITHIN:
            self._held += 1
        else:
            self._since, self._held = rate, 0
        if found or self._held >= _HELD or self.steps <= _RAMP_AFTER:
            self.largest = max(self.largest, rate)
        return found

    @staticmethod
    def _told(before: float, after: float) -> str:
        times = after / before
        return f"the learning rate rose from {before:.4g} to {after:.4g} (x{times:.3g})"


class _Jumps:
    """Finds where the loss left its own recent past upwards: two high ones of three."""

    __slots__ = ("_mean", "_spread", "_seen", "_first", "_high", "_watched", "_told")

    def __init__(self) -> None:
        self._mean = self._spread = 0.0  # of log(loss)
        self._seen = 0
        self._first: Optional[Tuple[int, float]] = None  # step, loss of the first high one
        self._high = self._watched = 0
        self._told = False

    def read(self, step: int, loss: float) -> Optional[Clue]:
        """A clue where this loss makes a jump sure."""
        if not 0.0 < loss < math.inf:
            return None
        rise = math.log(loss) - self._mean
        limit = max(_JUMP_Z * max(self._spread, _JUMP_FLOOR), math.log(_JUMP_RATIO))
        if self._seen >= _ODD_HISTORY and rise >= limit:
            if self._first is None:
                self._first, self._high, self._watched = (step, loss), 0, 0
            self._high += 1
        elif self._first is None or self._watched >= 3:
            self._learn(rise)
        if self._first is None:
            return None
        self._watched += 1
        first, value = self._first
        found: Optional[Clue] = None
        if self._high >= 2 and not self._told:
            self._told = True
            usual = math.exp(self._mean)
            text = f"the loss went to {value:.4g} from its usual {usual:.4g}"
            found = Clue("loss_jump", first, None, text)
        if self._watched >= _JUMP_ADOPT or (self._watched >= 3 and rise < limit):
            self._first, self._told = None, False
            self._seen = 0 if self._watched >= _JUMP_ADOPT else self._seen
        return found

    def _learn(self, rise: float) -> None:
        self._seen += 1
        weight = 1.0 / min(self._seen, _JUMP_MEMORY)
        if self._seen == 1:
            self._mean += rise
            return
        self._mean += weight * rise
        self._spread += weight * (1.2533 * abs(rise) - self._spread)


class _Peers:
    """Finds the rank whose loss leaves the others', step by complete step."""

    __slots__ = ("complete", "_pending", "_mean", "_spread", "_seen", "_odd", "_told")

    def __init__(self) -> None:
        self.complete: Tuple[Optional[float], int] = (None, 0)  # mean loss and step; to be taken
        self._pending: Dict[int, Dict[int, float]] = {}
        self._mean: Dict[int, float] = {}  # rank -> usual log ratio to the median
        self._spread: Dict[int, float] = {}
        self._seen = 0
        self._odd: Dict[int, Tuple[int, int]] = {}  # rank -> (first step, times in a row)
        self._told: Set[int] = set()

    def read(self, event: StepEvent, world_size: int) -> Optional[Clue]:
        """A clue where this event completes a step that shows one."""
        if event.loss is None:
            return None
        losses = self._pending.setdefault(event.step, {})
        losses[event.rank] = event.loss
        if len(losses) < world_size:
            if len(self._pending) > _AHEAD:
                del self._pending[min(self._pending)]
            return None
        del self._pending[event.step]
        try:
            self.complete = (math.fsum(losses.values()) / len(losses), event.step)
        except (OverflowError, ValueError):  # fsum refuses inf - inf and huge sums
            self.complete = (math.nan, event.step)
        return self._judge(event.step, losses)

    def _judge(self, step: int, losses: Dict[int, float]) -> Optional[Clue]:
        finite = {rank: loss for rank, loss in losses.items() if 0.0 < loss < math.inf}
        if len(finite) < 3 or len(finite) < len(losses) - 1:
            return None
        middle = sorted(finite.values())[(len(finite) - 1) // 2]
        worst: Tuple[float, int] = (0.0, -1)
        self._seen += 1
        for rank, loss in finite.items():
            away = math.log(loss / middle)
            usual, spread = self._mean.get(rank, away), self._spread.get(rank, 0.0)
            z = abs(away - usual) / max(spread, _ODD_FLOOR)
            worst = max(worst, (z, rank))
            if z < _ODD_Z or self._seen < _ODD_HISTORY:
                weight = 1.0 / min(self._seen, _ODD_MEMORY)
                self._mean[rank] = usual + weight * (away - usual)
                self._spread[rank] = spread + weight * (1.2533 * abs(away - usual) - spread)
        return self._note(step, worst, losses, middle)

    def _note(
        self, step: int, worst: Tuple[float, int], losses: Dict[int, float], middle: float
    ) -> Optional[Clue]:
        z, rank = worst
        if z < _ODD_Z or self._seen < _ODD_HISTORY:
            self._odd.clear()
            return None
        first, times = self._odd.get(rank, (step, 0))
        self._odd = {rank: (first, times + 1)}
        if times + 1 < 3 or rank in self._told:
            return None
        self._told.add(rank)
        text = f"rank {rank} has a loss of {losses[rank]:.4g} where the others have {middle:.4g}"
        return Clue("odd_rank", first, rank, text)


class _Reader:
    """One pass over the events."""

    def __init__(self) -> None:
        self._attempts = Attempts()
        self._facts: Dict[int, AttemptFacts] = {}
        self._rates = _Rates()
        self._peers = _Peers()
        self._jumps = _Jumps()
        self._attempt = 0
        self._followed = 0  # rank whose learning rate is read
        self._world: Optional[int] = None
        self._ids: Dict[int, Tuple[Optional[Tuple[int, ...]], bool]] = {}  # rank -> (batch, told)
        self._lost: Dict[str, Clue] = {}  # column -> where it was first not finite
        self._checks: Set[str] = set()  # local checks that have been told
        self._silent: Set[int] = set()
        self._finished: Dict[int, Dict[int, bool]] = {}  # attempt -> ranks that said they end

    def read(self, event: Event) -> None:
        """Takes one event."""
        attempt = self._attempts.place(event)
        if attempt is None:
            return
        facts = self._facts.get(attempt)
        if facts is None:
            facts = self._facts[attempt] = AttemptFacts(attempt)
        if isinstance(event, ControlEvent):
            self._control(event, facts)
        elif attempt == self._attempts.current:
            if attempt != self._attempt:
                self._begin(event, facts)
            self._step(event, facts)

    def finish(self) -> Dict[int, AttemptFacts]:
        """The facts, with what only the end shows: ranks that stopped before the others."""
        for facts in self._facts.values():
            last = facts.last_step
            ended = self._finished.get(facts.attempt, {})
            for rank, step in facts.ranks.items():
                behind = 0 if last is None else last - step
                told = any(c.kind == "rank_silent" and c.rank == rank for c in facts.clues)
                if behind > _SILENT_AFTER * facts.stride and rank not in ended and not told:
                    text = f"rank {rank} sent its last step, {step:,}, and the others went on"
                    facts.add(Clue("rank_silent", step + 1, rank, text))
            facts.clues.sort(key=lambda clue: clue.step)
        return self._facts

    def _begin(self, event: StepEvent, facts: AttemptFacts) -> None:
        before = self._facts.get(facts.attempt - 1)
        self._attempt, self._followed = facts.attempt, event.rank
        self._peers, self._jumps, self._ids = _Peers(), _Jumps(), {}
        self._lost, self._checks = {}, set()
        if facts.attempt > 1:
            text = f"attempt {facts.attempt} began at step {event.step:,}"
            if before is not None and before.last_step is not None:
                text += f"; the one before ended at step {before.last_step:,}"
            facts.add(Clue("restart", event.step, None, text))

    def _step(self, event: StepEvent, facts: AttemptFacts) -> None:
        step, rank = event.step, event.rank
        if facts.first_step is None or facts.last_step is None:
            facts.first_step = facts.last_step = step
        facts.last_step = max(step, facts.last_step)
        facts.ranks[rank] = step
        if rank == self._followed:
            facts.points += 1
            if event.current_lr is not None and event.current_lr - event.current_lr == 0.0:
                told = self._rates.read(event.current_lr)
                if told is not None:
                    facts.add(Clue("learning_rate", step, None, told))
        self._shape(event, facts)
        if event.loss is not None:
            self._loss(event, event.loss, facts)
        for column, value in (("loss", event.loss), ("grad_norm", event.grad_norm)):
            if value is not None and value - value != 0.0 and column not in self._lost:
                text = f"{column} is {value} for the first time, on rank {rank}"
                self._lost[column] = Clue("non_finite", step, rank, text)
                facts.add(self._lost[column])
        if event.sample_ids:
            self._batch(event, facts)
        if event.local_levels is not None:
            self._report(event, facts)

    def _shape(self, event: StepEvent, facts: AttemptFacts) -> None:
        world_size = event.world_size
        if world_size is None:
            return
        if self._world is not None and world_size != self._world:
            text = f"the job went from {self._world} to {world_size} ranks"
            facts.add(Clue("world_size", event.step, None, text))
        self._world = world_size
        if world_size > 2:
            clue = self._peers.read(event, world_size)
            if clue is not None:
                facts.add(clue)

    def _loss(self, event: StepEvent, loss: float, facts: AttemptFacts) -> None:
        """The followed rank's, or the mean over the ranks where three or more are compared."""
        if (event.world_size or 1) > 2:
            mean, step = self._peers.complete
            self._peers.complete = (None, 0)
            if mean is None:
                return
        elif event.rank != self._followed:
            return
        else:
            mean, step = loss, event.step
        clue = self._jumps.read(step, mean)
        if clue is not None:
            facts.add(clue)

    def _batch(self, event: StepEvent, facts: AttemptFacts) -> None:
        before, told = self._ids.get(event.rank, (None, False))
        same = before == event.sample_ids
        if same and not told:
            text = f"the batch of step {event.step:,} is that of the step before, on rank "
            facts.add(Clue("repeated_batch", event.step, event.rank, f"{text}{event.rank}"))
        self._ids[event.rank] = (event.sample_ids, same)

    def _report(self, event: StepEvent, facts: AttemptFacts) -> None:
        levels = zip(LOCAL_CHECKS, event.local_levels or ())
        names = [name for name, level in levels if level >= _CRITICAL and name not in self._checks]
        if not names:
            return
        self._checks.update(names)
        text = f"the local report of step {event.step:,} is critical: {', '.join(names)}"
        layers = event.local_layers or ()
        if layers:
            text += f"; layers {', '.join(layers)}"
        facts.add(Clue("layers", event.step, event.rank, text, layers))

    def _control(self, event: ControlEvent, facts: AttemptFacts) -> None:
        data: Any = event.data
        if event.kind == "session_finished":
            facts.status = str(data.get("status", "finished"))
            if event.rank is not None:
                self._finished.setdefault(facts.attempt, {})[event.rank] = True
        elif event.kind == "rank_silent":
            rank = data.get("rank", event.rank)
            step = facts.ranks.get(rank, facts.last_step or 0)
            number = rank if isinstance(rank, int) else None
            text = f"rank {rank} fell silent after step {step:,}"
            facts.add(Clue("rank_silent", step + 1, number, text))
        elif event.kind == "action_applied" and event.step is not None:
            text = f"{data.get('kind', 'an action')} was applied at step {event.step:,}"
            facts.add(Clue("intervention", event.step, event.rank, text))
