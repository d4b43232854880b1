"""Ways from the journal to an engine and back: the embedded engine, or a fleet's brokers."""

from __future__ import annotations

from collections import deque
from typing import Callable, Deque, Mapping, Protocol

from plarv.decision import CONTINUE, Decision
from plarv_schemas.events import Action

__all__ = ["Mailbox", "Transport"]


class Mailbox:
    """What a transport's thread leaves for the training thread; neither waits for the other.

    One reference is replaced, one queue is appended to at one end and taken from at the other: both
    are single operations of the interpreter, so no lock is needed.
    """

    __slots__ = ("decision", "actions", "refused", "_listener")

    def __init__(self, listener: Callable[[Decision], None]) -> None:
        self.decision: Decision = CONTINUE
        self._listener = listener
        self.actions: Deque[Action] = deque(maxlen=256)  # to be applied by the training thread
        # To be written down by it: {"action": id, "why": ...} of what must not be obeyed.
        self.refused: Deque[Mapping[str, str]] = deque(maxlen=256)

    def publish(self, decision: Decision) -> None:
        """A newer decision; ``listener`` hears of it on the transport's thread."""
        self.decision = decision
        self._listener(decision)


class Transport(Protocol):
    """From the journal to an engine and back."""

    @property
    def alive(self) -> bool:
        """Whether the background thread is at work."""
        ...

    def start(self) -> None:
        """Starts the background thread; a handshake that fails raises."""
        ...

    def discard(self) -> None:
        """Ends at once what ``start`` began: there will be no run."""
        ...

    def close(self, timeout_s: float) -> None:
        """Brings over what it can within ``timeout_s``, then stops."""
        ...

    def abandon(self) -> None:
        """In a forked child, where the thread is not: lets go of files, touches nothing shared."""
        ...

    def describe(self) -> str:
        """How far the engine is behind, and what was lost, as a clause; '' where nothing is."""
        ...
