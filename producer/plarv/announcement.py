"""What a session says of itself: into the log, and to whoever sits at the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional

from plarv import settings
from plarv.agreement import StoreAgreement
from plarv.discovery import describe_model, total_steps_of
from plarv.identity import Identity

if TYPE_CHECKING:
    from plarv.fleet.opening import FleetSettings

__all__ = ["address_note", "describe", "may_act", "ranks_note"]


def describe(
    given: Mapping[str, Any], identity: Identity, mode: str, *, acts: bool
) -> Dict[str, Any]:
    """What a session says of itself: numbers and names, nothing of the data or the weights."""
    from plarv import __version__

    found = describe_model(given["model"], given["tokenizer"]) if given["model"] is not None else {}
    total_steps = given["total_steps"]
    if total_steps is None and given["dataloader"] is not None:
        total_steps = total_steps_of(given["dataloader"])
    data: Dict[str, Any] = {
        "mode": mode if acts else "MANUAL",
        "accept_operator": given["accept_operator"] is True and acts,
        "world_size": identity.world_size,
        "local_world_size": identity.local_world_size,
        "restart_count": identity.restart_count,
        "total_steps": None if total_steps is None else int(total_steps),
        "start_step": int(given["start_step"]),
        "project": settings.text("ARGUS_PROJECT", given["project"]) or None,
        "sdk": __version__,
    }
    for name in ("sequence_length", "vocab_size", "num_layers", "hidden_dim", "dtype"):
        value = given[name] if given[name] is not None else found.get(name)
        if name == "dtype":
            data[name] = None if value is None else str(value).replace("torch.", "")
        else:
            data[name] = None if value is None else int(value)
    data["parameters"] = found.get("parameters")
    return data


def may_act(identity: Identity, fleet: Optional[FleetSettings]) -> bool:
    """Whether whoever judges the run sees all its ranks: the embedded engine, those of a node."""
    return fleet is not None or identity.world_size <= identity.local_world_size


def address_note(given: Mapping[str, Any], fleet: Optional[FleetSettings], mode: str) -> str:
    """What to say of where the run's events go; "" where nothing needs saying."""
    if fleet is not None:
        from plarv.fleet.opening import key_note

        return key_note(fleet, mode)
    if settings.text("ARGUS_URL", given["url"]):
        return "the HTTP transport is not in this version: using the embedded engine"
    if settings.text("ARGUS_API_KEY", given["api_key"]):
        return (
            "an api_key without an address: using the embedded engine, nothing leaves this machine"
        )
    return ""


def ranks_note(identity: Identity, mode: str, fleet: Optional[FleetSettings]) -> str:
    """What to say of a job of several ranks; "" where nothing needs saying."""
    if not may_act(identity, fleet):
        acts = ": AUTO only observes" if mode == "AUTO" else ""
        return (
            f"{identity.local_world_size} of {identity.world_size} ranks are on this node, and the "
            f"embedded engine sees only these{acts}"
        )
    if identity.world_size > 1 and mode == "AUTO" and not StoreAgreement(identity).available():
        return (
            "torch.distributed is not initialised yet: until it is, AUTO only observes, since "
            "several ranks must act at one step or not at all"
        )
    return ""
