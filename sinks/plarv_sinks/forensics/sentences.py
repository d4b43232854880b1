"""What a control event says, as a sentence for people."""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, Optional

from plarv_schemas.events import Action, ControlEvent

__all__ = ["action_sentence", "control_sentence", "number", "printable"]


def control_sentence(event: ControlEvent) -> str:
    """The event in one sentence; whatever its data are, there is one.

    >>> ended = ControlEvent("run", "s", 9, 0, "session_finished", data={"status": "failed",
    ...                      "exception": "RuntimeError"})
    >>> control_sentence(ended)
    'rank 0 ends: failed (RuntimeError)'
    """
    who = "the run" if event.rank is None else f"rank {event.rank}"
    maker = _SENTENCES.get(event.kind, _other)
    return printable(maker(who, event.data, event.kind))


def action_sentence(action: Action) -> str:
    """Why the policy acts, and whether the run was told to obey."""
    told = " (dry run: not applied)" if action.parameters.get("dry_run") else ""
    return printable(f"{action.reason}{told}")


def number(value: Optional[float]) -> str:
    """Four digits; a dash for nothing.

    >>> number(0.000612345), number(None), number(float("nan"))
    ('0.0006123', '-', 'nan')
    """
    return "-" if value is None else f"{value:.4g}"


def printable(text: str) -> str:
    """The text with control characters shown as ``?``."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _started(who: str, data: Mapping[str, Any], _: str) -> str:
    facts = [str(data[name]) for name in ("mode", "model", "dtype") if data.get(name)]
    if data.get("world_size"):
        facts.append(f"{data['world_size']} ranks" if data["world_size"] != 1 else "1 rank")
    if data.get("total_steps"):
        facts.append(f"{data['total_steps']} steps planned")
    return f"{who} starts" + (f": {', '.join(facts)}" if facts else "")


def _finished(who: str, data: Mapping[str, Any], _: str) -> str:
    why = f" ({data['exception']})" if data.get("exception") else ""
    return f"{who} ends: {data.get('status') or 'without a status'}{why}"


def _about_action(who: str, data: Mapping[str, Any], kind: str) -> str:
    what = f"{data.get('kind') or 'an action'} {kind[len('action_') :]} on {who}"
    if data.get("lr") is not None:
        before = data.get("lr_before")
        what += f": learning rate {_value(before)} -> {_value(data['lr'])}"
    return f"{what}: {data['why']}" if data.get("why") else what


def _order(_: str, data: Mapping[str, Any], __: str) -> str:
    return f"{data.get('operator') or 'an operator'} orders {data.get('order') or 'something'}"


def _left_out(_: str, data: Mapping[str, Any], __: str) -> str:
    return f"detector {data.get('detector') or '?'} is left out from here on"


def _silent(who: str, data: Mapping[str, Any], _: str) -> str:
    after = data.get("silent_s")
    return f"{who} is silent" + (f" for {_value(after)} s" if after is not None else "")


def _recovered(who: str, _: Mapping[str, Any], __: str) -> str:
    return f"{who} goes on from a checkpoint"


def _other(who: str, data: Mapping[str, Any], kind: str) -> str:
    facts = ", ".join(f"{name} {_value(value)}" for name, value in list(data.items())[:6])
    return f"{kind.replace('_', ' ')} ({who})" + (f": {facts}" if facts else "")


def _value(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


_SENTENCES: Dict[str, Callable[[str, Mapping[str, Any], str], str]] = {
    "session_started": _started,
    "session_finished": _finished,
    "action_applied": _about_action,
    "action_refused": _about_action,
    "action_dropped": _about_action,
    "action_expired": _about_action,
    "order": _order,
    "detector_left_out": _left_out,
    "rank_silent": _silent,
    "recovered": _recovered,
}
