"""What came first: the earliest evidence of a fault over detectors, ranks and layers, ranked."""

from __future__ import annotations

import html
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

from plarv_schemas.events import Action, Event, Verdict, to_json_value
from plarv_sinks.forensics.clues import AttemptFacts, Clue, find_clues
from plarv_sinks.forensics.episode import Episode, can_cause, episodes_of

__all__ = ["FirstCause", "Suspect", "first_cause"]

_GRAVE = 1.5  # harm from which an attempt, or a verdict in it, is the run's misfortune
_REACH = {
    "learning_rate": 100.0,
    "rank_silent": 24.0,
    "world_size": 64.0,
    "restart": 100.0,
    "repeated_batch": 64.0,
    "odd_rank": 24.0,
    "non_finite": 8.0,
    "layers": 24.0,
    "loss_jump": 4.0,
    "intervention": 64.0,
}
"""Kind of clue -> points before an onset in which it may be the reason for it."""

_TRIGGERS = ("learning_rate", "rank_silent", "world_size", "restart")
"""Clues that come before all verdicts: the run's first cause is there, not where it was seen."""

_UNSTABLE = frozenset(
    {
        "gradient_explosion", "loss_spike", "loss_divergence", "loss_oscillation", "non_finite",
        "optimizer_corruption",
    }
)  # fmt: skip
"""Detectors of what a learning rate that is too high does."""

_CRITICAL = 1.0  # harm of a critical verdict at least
_LATER = 0.5  # of the first cause's weight, that what followed from it has at most
_BESIDE = 12.0  # points after an onset in which a trigger still counts: onsets are fuzzy


class Suspect(NamedTuple):
    """A verdict that may be the first cause; the scores of a ranking add up to 1."""

    verdict: Verdict  # its first one: opened
    score: float
    reasons: Tuple[str, ...]
    rank: Optional[int] = None
    layers: Tuple[str, ...] = ()


class FirstCause(NamedTuple):
    """The first cause of a run's misfortune; ``verdict`` None: nothing went wrong."""

    verdict: Optional[Verdict]
    step: Optional[int]  # at which it began: where a trigger was found, that one's
    sentence: str
    ranking: Tuple[Suspect, ...] = ()
    attempt: Optional[int] = None
    rank: Optional[int] = None
    layers: Tuple[str, ...] = ()
    clues: Tuple[Clue, ...] = ()  # of the events, the nearest first
    lasted: bool = False  # whether it was more than a warning that passed

    def to_dict(self) -> Dict[str, Any]:
        """JSON values only."""
        return {
            "step": self.step,
            "lasted": self.lasted,
            "attempt": self.attempt,
            "rank": self.rank,
            "layers": list(self.layers),
            "sentence": self.sentence,
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "clues": [
                {"kind": clue.kind, "step": clue.step, "rank": clue.rank, "text": clue.text}
                for clue in self.clues
            ],
            "ranking": [
                {
                    "detector": suspect.verdict.detector,
                    "kind": suspect.verdict.kind,
                    "onset_step": suspect.verdict.onset_step,
                    "rank": suspect.rank,
                    "layers": list(suspect.layers),
                    "score": to_json_value(suspect.score),
                    "reasons": list(suspect.reasons),
                    "verdict_id": suspect.verdict.id,
                }
                for suspect in self.ranking
            ],
        }

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><td>{suspect.score:.0%}</td>"
            f"<td>{html.escape(_name(suspect.verdict))}</td>"
            f"<td>{suspect.verdict.onset_step:,}</td>"
            f"<td>{html.escape('; '.join(suspect.reasons))}</td></tr>"
            for suspect in self.ranking
        ]
        head = "<tr><th>score</th><th>found</th><th>onset</th><th>reasons</th></tr>"
        table = f"<table>{head}{''.join(rows)}</table>" if rows else ""
        return f"<p><b>{html.escape(self.sentence)}</b></p>{table}"


def first_cause(
    events: Iterable[Event], verdicts: Sequence[Verdict], actions: Sequence[Action]
) -> FirstCause:
    """The earliest evidence of what went wrong, over detectors, ranks and layers, with its reasons.

    It looks at the attempt in which the run first went wrong for good: the first with a grave
    verdict that was still open at its end, else the one with the gravest. From the first of its
    grave verdicts it goes back along what can cause what (hardware, data and optimizer before
    gradients, gradients before the loss), by onset and not by when a detector was sure, and along
    what the events show: a learning rate that rose, a restart, a rank that fell silent or whose
    loss left the others', a repeated batch, the first NaN.

    Args:
        events: of one run in the log's order; read once.
        verdicts: of the run, in any order.
        actions: of the run; they only add to the reasons.

    Cost: one pass over the events, about 5 us each; the square of an attempt's verdicts, of which
    the first 256 grave ones and the first 256 others are looked at.

    >>> first_cause([], [], []).sentence
    'Nothing was found wrong: there is no step to judge.'
    """
    attempts = find_clues(events)
    episodes = episodes_of(verdicts)
    facts = _attempt_of(episodes, attempts)
    if facts is None:
        return FirstCause(None, None, _all_well(attempts))
    for episode in episodes:
        episode.place(facts)
    there = [episode for episode in episodes if episode.attempt == facts.attempt]
    causes = _chain(there, facts.stride)
    weights = [_weight(episode, causes, facts.stride) for episode in causes]
    chain = causes + _followers(there, causes, facts.stride)
    later = _LATER * max(weights)
    weights += [later * _weight(each, chain, facts.stride) for each in chain[len(causes) :]]
    total = sum(weights)  # only shown, never compared with another version's
    order = sorted(range(len(chain)), key=lambda at: (-weights[at], chain[at].began))
    ranking = tuple(_suspect(chain[at], weights[at] / total, chain, facts, actions) for at in order)
    return _told(chain[order[0]], ranking, chain, facts)


def _attempt_of(
    episodes: Sequence[Episode], attempts: Dict[int, AttemptFacts]
) -> Optional[AttemptFacts]:
    """The attempt in which the run first went wrong for good; None: in none."""
    if not episodes:
        return None
    heaviest: Dict[int, float] = {}
    for episode in episodes:
        heaviest[episode.attempt] = max(heaviest.get(episode.attempt, 0.0), episode.weight)
    enough = min(_GRAVE, max(heaviest.values()))
    attempt = min(number for number, weight in heaviest.items() if weight >= enough)
    return attempts.get(attempt) or AttemptFacts(attempt)


def _chain(there: Sequence[Episode], stride: float) -> List[Episode]:
    """The first grave episode and all that can lie behind it, or beside it at the same time."""
    enough = min(_GRAVE, max(episode.weight for episode in there))
    grave = [episode for episode in there if episode.weight >= enough]
    anchor = min(grave, key=lambda episode: (episode.began, episode.depth))
    chain, waiting, rest = [anchor], [anchor], [each for each in there if each is not anchor]
    while waiting:
        of = waiting.pop()
        causes = [episode for episode in rest if can_cause(episode, of, stride)]
        rest = [episode for episode in rest if not can_cause(episode, of, stride)]
        chain += causes
        waiting += causes
    return chain


def _followers(there: Sequence[Episode], causes: Sequence[Episode], stride: float) -> List[Episode]:
    """What may have come of it, the first of each detector and rank: never the first cause."""
    seen = {(cause.first.detector, cause.first.rank) for cause in causes}
    found: List[Episode] = []
    for episode in there:
        place = (episode.first.detector, episode.first.rank)
        if place not in seen and any(can_cause(cause, episode, stride) for cause in causes):
            seen.add(place)
            found.append(episode)
    return found


def _weight(episode: Episode, chain: Sequence[Episode], stride: float) -> float:
    """The more of the chain explains it, and the later it began, the less it is the first cause."""
    start = min(each.began for each in chain)
    away = max(0.0, (episode.began - start) / stride - episode.late)
    weight = 1.0 / (1.0 + away / 16.0)
    weight *= 1.0 - 0.03 * episode.depth
    for other in chain:
        if other is not episode and can_cause(other, episode, stride):
            weight *= 0.5 if not can_cause(episode, other, stride) else 0.9
    return weight * (1.0 if episode.harm >= 1.0 else 0.8)


def _suspect(
    episode: Episode,
    score: float,
    chain: Sequence[Episode],
    facts: AttemptFacts,
    actions: Sequence[Action],
) -> Suspect:
    """A verdict of the chain with what speaks for it."""
    found = episode.first
    clues = _clues_for(episode, facts)
    reasons = [f"began at step {episode.began:,.0f}: {found.message}"]
    if found.step > episode.began:
        reasons[0] += f" (known at step {found.step:,})"
    explained = _names(each for each in chain if _explains(episode, each, facts.stride))
    if explained:
        reasons.append(f"can be behind {explained}, which came later or at once")
    earlier = _names(each for each in chain if _explains(each, episode, facts.stride))
    if earlier:
        reasons.append(f"may itself follow from {earlier}")
    if episode.end_step is None:
        reasons.append("was still open at the end of the attempt")
    reasons += [_dated(clue, episode) for clue in clues]
    ids = {found.id, episode.worst.id}
    asked = [action.kind for action in actions if ids.intersection(action.verdict_ids)]
    if asked:
        reasons.append(f"Argus asked for {', '.join(dict.fromkeys(asked))}")
    rank, layers = _where(episode, clues)
    return Suspect(found, score, tuple(reasons), rank, layers)


def _explains(cause: Episode, effect: Episode, stride: float) -> bool:
    return (
        cause is not effect
        and can_cause(cause, effect, stride)
        and not can_cause(effect, cause, stride)
    )


def _clues_for(episode: Episode, facts: AttemptFacts) -> Tuple[Clue, ...]:
    """What the events show shortly before the onset or with it; the nearest first."""
    found: List[Clue] = []
    after = max(2.0 * facts.stride, episode.first.step - episode.began)
    for clue in facts.clues:
        ahead = episode.began - clue.step
        if clue.kind == "learning_rate" and episode.first.detector not in _UNSTABLE:
            continue
        reach = _REACH[clue.kind] * facts.stride
        late = after if clue.kind not in _TRIGGERS else _BESIDE * facts.stride
        if -late <= ahead <= reach and _same_place(clue, episode):
            found.append(clue)
    found.sort(key=lambda clue: (abs(episode.began - clue.step), clue.step))
    seen: Set[str] = set()
    first: List[Clue] = []
    for clue in found:
        if clue.kind not in seen:
            seen.add(clue.kind)
            first.append(clue)
    return tuple(first)


def _same_place(clue: Clue, episode: Episode) -> bool:
    """A clue about one rank speaks for the run as a whole and for that rank."""
    if clue.kind not in ("odd_rank", "repeated_batch", "layers", "non_finite"):
        return True
    return clue.rank is None or episode.first.rank is None or clue.rank == episode.first.rank


def _where(episode: Episode, clues: Sequence[Clue]) -> Tuple[Optional[int], Tuple[str, ...]]:
    rank = episode.first.rank
    if rank is None:
        of = [clue.rank for clue in clues if clue.kind in ("odd_rank", "rank_silent")]
        rank = of[0] if of else None
    layers = [clue.layers for clue in clues if clue.kind == "layers" and clue.layers]
    return rank, layers[0] if layers else ()


def _told(
    top: Episode, ranking: Tuple[Suspect, ...], chain: Sequence[Episode], facts: AttemptFacts
) -> FirstCause:
    """The answer, in one sentence for a person."""
    suspect = ranking[0]
    clues = _clues_for(top, facts)
    trigger = next((clue for kind in _TRIGGERS for clue in clues if clue.kind == kind), None)
    step = round(top.began) if trigger is None else trigger.step
    attempt = f" of attempt {facts.attempt}" if facts.attempt > 1 else ""
    where = "" if suspect.rank is None else f" on rank {suspect.rank}"
    layers = f", in {', '.join(suspect.layers)}" if suspect.layers else ""
    what = f"{_name(suspect.verdict)}{where}{layers}: {suspect.verdict.message}"
    lasted = any(each.end_step is None or each.harm >= _CRITICAL for each in chain)
    if not lasted:
        sentence = f"Nothing wrong lasted; the first warning is of step {step:,}{attempt}, {what}"
    elif trigger is None:
        sentence = f"It began at step {step:,}{attempt} with {what}"
    else:
        sentence = f"It began at step {step:,}{attempt}: {trigger.text}; at step "
        sentence += f"{top.began:,.0f} followed {what}"
    later = [each for each in chain if each is not top and each.began >= top.began]
    later.sort(key=lambda each: each.began)
    if later and lasted:
        steps: Dict[str, str] = {}
        for each in later:
            name = each.first.detector
            if name != top.first.detector:
                steps.setdefault(name, f"{name} at {each.began:,.0f}")
        sentence += f"; then {', '.join(list(steps.values())[:4])}" if steps else ""
    return FirstCause(
        verdict=suspect.verdict,
        step=step,
        sentence=f"{sentence}.",
        ranking=ranking,
        attempt=facts.attempt,
        rank=suspect.rank,
        layers=suspect.layers,
        clues=clues,
        lasted=lasted,
    )


def _dated(clue: Clue, episode: Episode) -> str:
    ahead = round(episode.began) - clue.step
    if ahead == 0:
        return f"{clue.text}, at the same step"
    steps = f"{abs(ahead):,} step{'' if abs(ahead) == 1 else 's'}"
    return f"{clue.text}, {steps} {'before' if ahead > 0 else 'after'}"


def _all_well(attempts: Dict[int, AttemptFacts]) -> str:
    newest = attempts.get(max(attempts, default=0))
    if newest is None or newest.last_step is None:
        return "Nothing was found wrong: there is no step to judge."
    steps = newest.last_step + 1 - (newest.first_step or 0)
    sentence = f"Nothing was found wrong in {steps:,} steps"
    if newest.status not in (None, "completed"):
        sentence += f", though the run ended as {newest.status} at step {newest.last_step:,}"
    return f"{sentence}."


def _names(episodes: Iterable[Episode]) -> str:
    return ", ".join(dict.fromkeys(_name(episode.first) for episode in episodes))


def _name(found: Verdict) -> str:
    return f"{found.detector} ({found.kind.replace('_', ' ')})"
