"""The pure fold of the policy over one run: its events and its detectors' verdicts in."""

from __future__ import annotations

from typing import Any, List, Mapping, Optional, Sequence, Tuple

from plarv_processors.attempts import ENDINGS, Attempts
from plarv_processors.event_batch import EventBatch
from plarv_processors.policy import Policy
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import Action, ControlEvent, Event, Verdict

__all__ = ["PolicyFold"]

_NO_VERDICTS: Tuple[Verdict, ...] = ()


class PolicyFold:
    """Gives the actions that :class:`~plarv_processors.engine.Engine` gives.

    A run that has ended keeps the policy as bytes, until something of it comes again.
    """

    __slots__ = (
        "config", "attempts", "ordinal", "attempt", "step", "ended", "_mode", "_policy", "_packed",
    )  # fmt: skip

    def __init__(self, config: Optional[Policy.Config] = None, mode: str = "MANUAL") -> None:
        self.config = config
        self.attempts = Attempts()
        self.ordinal = -1  # of the last accepted event
        self.attempt = 0
        self.step = -1  # of the last step event of the attempt
        self.ended = False
        self._mode = mode
        self._policy: Optional[Policy] = None
        self._packed = b""  # the policy's state while there is none

    def fold(self, batch: EventBatch, verdicts: Mapping[int, Sequence[Verdict]]) -> List[Action]:
        """The actions of a batch's events.

        ``verdicts``: by ordinal, of each in the order in which the policy hears the detectors.
        """
        made: List[Action] = []
        policy = self._unpacked()
        attempt = self.attempts.place_all(batch)
        if attempt is None:
            for event in batch.events:
                made.extend(self._fold_one(event, policy, verdicts))
        elif attempt == self.attempt:
            self._continue(policy)
            for event in batch.steps:
                self.ordinal += 1
                self.step = event.step
                found = verdicts.get(self.ordinal, _NO_VERDICTS)
                made.extend(policy.step(event, found, self))
        else:
            self.ordinal += len(batch.events)
        if self.ended:
            self._packed, self._policy = pack(dump(policy)), None
        return made

    def sessions(self) -> Tuple[Tuple[str, int], ...]:
        """(session, first record) of each rank in the attempt."""
        return self.attempts.sessions()

    def snapshot(self) -> bytes:
        """The whole state, for a fold of the same configuration."""
        policy = self._packed if self._policy is None else pack(dump(self._policy))
        own = (self.ordinal, self.attempt, self.step, self.ended, self._mode)
        return pack((dump(self.attempts), *own, policy))

    def restore(self, snapshot: bytes) -> None:
        """Goes on where ``snapshot`` was taken. ValueError: it is none of a policy's fold."""
        state: Tuple[Any, ...] = unpack(snapshot)
        if len(state) != 7:
            raise ValueError("the snapshot is not one of a policy's fold")
        restore(self.attempts, state[0])
        own: Tuple[int, int, int, bool, str] = state[1:6]
        self.ordinal, self.attempt, self.step, self.ended, self._mode = own
        self._policy, self._packed = None, state[6]

    def _unpacked(self) -> Policy:
        policy = self._policy
        if policy is None:
            policy = self._policy = Policy(self.config, self._mode)
            if self._packed:
                restore(policy, unpack(self._packed))
                self._packed = b""
        return policy

    def _fold_one(
        self, event: Event, policy: Policy, verdicts: Mapping[int, Sequence[Verdict]]
    ) -> Tuple[Action, ...]:
        attempts = self.attempts
        attempt = attempts.place(event)
        if attempt is None:
            return ()
        self.ordinal += 1
        if attempts.current != self.attempt:
            self.attempt = attempts.current
            self._begin(policy)
        if isinstance(event, ControlEvent):
            self.ended = self.ended or (event.kind in ENDINGS and attempts.ended)
            return policy.control(event, self)
        if attempt != self.attempt:
            return ()
        self._continue(policy)
        self.step = event.step
        return policy.step(event, verdicts.get(self.ordinal, _NO_VERDICTS), self)

    def _continue(self, policy: Policy) -> None:
        """A step after the attempt had ended begins anew."""
        if self.ended:
            self._begin(policy)

    def _begin(self, policy: Policy) -> None:
        self.step = -1
        self.ended = False
        policy.begin_attempt()
