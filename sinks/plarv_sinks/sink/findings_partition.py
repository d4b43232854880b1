"""One partition of the verdicts or the actions: each id once, gathered until a file is written."""

from __future__ import annotations

from typing import Dict, List, Literal, Set, Tuple, Union

from plarv_schemas import arrow
from plarv_schemas.events import Action, Verdict
from plarv_schemas.messages import decode_action, decode_verdict
from plarv_schemas.topic_reader import Record
from plarv_schemas.topics import TABLE_HEADER, header
from plarv_sinks.sink.steps_partition import Written

__all__ = ["FindingsPartition"]

_ROW_BYTES = 1500


class FindingsPartition:
    """Takes each verdict (or action) whose id the store does not have; ``known`` are those it has.

    Watermarks, which lie in the same topic, are passed over.
    """

    def __init__(self, table: Literal["verdicts", "actions"], known: Set[str]) -> None:
        self.poison = 0
        self.copies = 0  # records whose id had been read before
        self._table: Literal["verdicts", "actions"] = table
        self._known = known
        self._found: Dict[str, Union[Verdict, Action]] = {}

    @property
    def num_rows(self) -> int:
        """Rows that wait to be written."""
        return len(self._found)

    @property
    def size_bytes(self) -> int:
        """About how much memory they take."""
        return _ROW_BYTES * len(self._found)

    def take(self, record: Record) -> None:
        """A message of the topic."""
        table = header(record.headers, TABLE_HEADER)
        if table != self._table:
            self.poison += table != "watermark"
            return
        try:
            value = record.value or b""
            found: Union[Verdict, Action]
            found = decode_verdict(value) if table == "verdicts" else decode_action(value)
        except (ValueError, TypeError):
            self.poison += 1
            return
        if found.id in self._known:
            self.copies += 1
            return
        self._known.add(found.id)
        self._found[found.id] = found

    def written(self) -> List[Written]:
        """What is to be written now; empty: nothing new."""
        if not self._found:
            return []
        found = sorted(self._found.values(), key=_run_and_ordinal)
        if self._table == "verdicts":
            verdicts = [each for each in found if isinstance(each, Verdict)]
            batch = arrow.encode_verdicts(verdicts, schema=arrow.file_schema("verdicts"))
        else:
            actions = [each for each in found if isinstance(each, Action)]
            batch = arrow.encode_actions(actions, schema=arrow.file_schema("actions"))
        return [(self._table, batch)]

    def clear(self) -> None:
        """What waited has been written."""
        self._found = {}


def _run_and_ordinal(found: Union[Verdict, Action]) -> Tuple[str, int]:
    return found.run_id, found.ordinal
