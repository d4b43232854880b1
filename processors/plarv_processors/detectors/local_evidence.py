"""What a rank's local report says beside its levels: how strongly, and of which layers."""

from __future__ import annotations

from typing import Dict

from plarv_schemas.events import StepEvent

__all__ = ["in_layers", "local_score"]

_NAMED = 3  # layers; the report itself lies on the machine that wrote it


def in_layers(event: StepEvent) -> str:
    """The worst layers of the event's report, for the end of a message; '' where it names none.

    >>> in_layers(StepEvent("r", "s", 0, 0, 0, local_layers=("net.4", "net.2")))
    ' (layers net.4, net.2)'
    >>> in_layers(StepEvent("r", "s", 0, 0, 0, local_layers=tuple("abcde")))
    ' (layers a, b, c and more)'
    """
    layers = event.local_layers
    if not layers:
        return ""
    more = " and more" if len(layers) > _NAMED else ""
    return f" ({'layer' if len(layers) == 1 else 'layers'} {', '.join(layers[:_NAMED])}{more})"


def local_score(event: StepEvent, check: int) -> Dict[str, float]:
    """``local_score`` as evidence, in the unit of that check; nothing where it has none.

    >>> local_score(StepEvent("r", "s", 0, 0, 0, local_scores=(0.5, 12.0)), 1)
    {'local_score': 12.0}
    >>> local_score(StepEvent("r", "s", 0, 0, 0), 1)
    {}
    """
    scores = event.local_scores
    if scores is None or len(scores) <= check:
        return {}
    score = float(scores[check])
    return {"local_score": score} if score - score == 0.0 else {}
