"""Decodes each message once for all agents of a worker."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Tuple, Union

from plarv_processors.event_batch import EventBatch
from plarv_schemas.messages import decode_events
from plarv_schemas.topics import Headers

__all__ = ["Decoder", "Poison"]

_KEPT = 256  # messages; agents are rarely further apart


class Poison:
    """A message that cannot be read, and why."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Decoder:
    """Batches by (partition, offset), the newest few kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Tuple[int, int], Union[EventBatch, Poison]] = OrderedDict()

    def decode(self, message: Any) -> Union[EventBatch, Poison]:
        """The events of a message of the steps topic."""
        place = (message.partition, message.offset)
        found = self._kept.get(place)
        if found is None:
            found = self._kept[place] = _decoded(message.key, message.headers, message.value)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found


def _decoded(key: Any, headers: Union[Headers, None], value: Any) -> Union[EventBatch, Poison]:
    if value is None:
        return Poison("the message is empty")
    try:
        batch = EventBatch(decode_events(headers, bytes(value)))
    except (ValueError, TypeError, OverflowError) as error:
        return Poison(str(error).splitlines()[0] if str(error) else type(error).__name__)
    if key is None or bytes(key) != batch.run_id.encode("utf-8"):
        return Poison(f"the message's key is not the run id {batch.run_id!r} of its events")
    return batch
