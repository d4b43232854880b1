"""How a replay's verdicts compare with those recorded live: same, earlier, later, new, gone."""

from __future__ import annotations

from typing import Dict, Iterable, List, Literal, NamedTuple, Optional, Sequence, Tuple

from plarv_schemas.events import LEVELS, Level, Verdict

__all__ = ["Change", "ChangeKind", "Episode", "changes_of", "episodes"]

ChangeKind = Literal["same", "earlier", "later", "new", "gone"]
_Place = Tuple[str, int, Optional[int]]  # detector, attempt, rank


class Episode(NamedTuple):
    """An alarm from where it opened to where it was resolved."""

    opened: Verdict
    level: Level  # the gravest it reached
    end_step: Optional[int]  # None: it was open at the end

    def overlaps(self, other: Episode) -> bool:
        """Whether both are about some of the same steps, from their onsets on."""
        return self._begins_by(other.end_step) and other._begins_by(self.end_step)

    def _begins_by(self, step: Optional[int]) -> bool:
        return step is None or self.opened.onset_step <= step


class Change(NamedTuple):
    """An alarm of the replay, of the recording, or of both."""

    kind: ChangeKind
    detector: str
    recorded: Optional[Episode]
    replayed: Optional[Episode]

    @property
    def steps(self) -> int:
        """How much later the replay finds it; negative: earlier; 0 where one is missing."""
        if self.recorded is None or self.replayed is None:
            return 0
        return self.replayed.opened.step - self.recorded.opened.step


def changes_of(recorded: Iterable[Verdict], replayed: Iterable[Verdict]) -> List[Change]:
    """Every alarm of one run, in the order of the steps at which they opened.

    Two are the same alarm where they are of one detector, attempt and rank, and about some of the
    same steps.

    >>> def found(step, state="opened"):
    ...     return Verdict("run", 1, None, step, step, "loss_spike", "transient", "warn", state,
    ...                    step, 9.0, 8.0, {}, "loss 9", "loss_spike-1")
    >>> live = [found(10), found(14, "resolved"), found(70)]
    >>> again = [found(12), found(14, "resolved"), found(40), found(45, "resolved")]
    >>> [(change.kind, change.steps) for change in changes_of(live, again)]
    [('later', 2), ('new', 0), ('gone', 0)]
    """
    theirs, ours = episodes(recorded), episodes(replayed)
    changes: List[Change] = []
    for place in dict.fromkeys((*theirs, *ours)):
        changes += _matched(place[0], theirs.get(place, []), ours.get(place, []))
    return sorted(changes, key=_opened_step)


def episodes(verdicts: Iterable[Verdict]) -> Dict[_Place, List[Episode]]:
    """The alarms of one run, by detector, attempt and rank, in their order."""
    found: Dict[_Place, List[Episode]] = {}
    is_open: Dict[_Place, bool] = {}
    for verdict in verdicts:
        place = (verdict.detector, verdict.attempt, verdict.rank)
        of_place = found.setdefault(place, [])
        if verdict.state == "resolved":
            if is_open.get(place):
                of_place[-1] = of_place[-1]._replace(end_step=verdict.step)
            is_open[place] = False
        elif is_open.get(place):
            level = max(of_place[-1].level, verdict.level, key=LEVELS.index)
            of_place[-1] = of_place[-1]._replace(level=level)
        else:
            of_place.append(Episode(verdict, verdict.level, None))
            is_open[place] = True
    return found


def _matched(
    detector: str, recorded: Sequence[Episode], replayed: Sequence[Episode]
) -> List[Change]:
    changes: List[Change] = []
    left = list(replayed)
    for theirs in recorded:
        ours = next((episode for episode in left if episode.overlaps(theirs)), None)
        if ours is None:
            changes.append(Change("gone", detector, theirs, None))
            continue
        left.remove(ours)
        difference = ours.opened.step - theirs.opened.step
        kind: ChangeKind = "earlier" if difference < 0 else ("later" if difference else "same")
        changes.append(Change(kind, detector, theirs, ours))
    return [*changes, *[Change("new", detector, None, episode) for episode in left]]


def _opened_step(change: Change) -> Tuple[int, str]:
    episode = change.replayed or change.recorded
    assert episode is not None
    return episode.opened.step, change.detector
