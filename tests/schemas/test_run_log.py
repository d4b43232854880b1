from __future__ import annotations

import math
from pathlib import Path
from typing import List

from plarv_schemas.events import Event
from plarv_schemas.journal import (
    CORE,
    CORE_SIZE,
    CORE_STRUCT,
    HAS_LOSS,
    RECORD_HEAD,
    TRAILER,
)
from plarv_schemas.journal_writer import JournalWriter
from plarv_schemas.run_log import RunLog, is_run_dir, read_run


class Rank:
    """One rank's journal, written with a clock of the test's own."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.session = f"{rank + 1:016x}"
        self.writer = JournalWriter(
            folder,
            run_id="run",
            session=self.session,
            rank=rank,
            world_size=2,
            segment_bytes=65536,
        )
        self.step = 0

    def write(self, clock_ns: int) -> None:
        number = self.writer.record + 1
        record = (CORE_SIZE, CORE, HAS_LOSS, 0, clock_ns, self.step, 1.0, 0.0, math.nan, number)
        assert self.writer.append(CORE_STRUCT.pack(*record))
        self.step += 1


def drain(log: RunLog, limit: int = 64) -> List[Event]:
    found: List[Event] = []
    events = log.poll(limit)
    while events:
        found.extend(events)
        events = log.poll(limit)
    return found


def keys(events: List[Event]) -> List[object]:
    return [(event.session, event.record) for event in events]


def test_two_ranks_are_merged_by_time_and_a_replay_takes_the_same_order(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path, 0), Rank(tmp_path, 1)]
    for step in range(200):
        ranks[step % 2].write(step * 10)
        ranks[1 - step % 2].write(step * 10 + 5)
    log = RunLog(tmp_path, record=True)
    live = drain(log)
    log.close()
    assert len(live) == 400
    times = [event.time_ns or 0 for event in live]
    offset = {event.session: event.time_ns for event in reversed(live)}
    assert len(offset) == 2
    assert times == sorted(times)
    assert list(read_run(tmp_path)) == live


def test_a_backlog_on_one_rank_does_not_tear_the_ranks_apart(tmp_path: Path) -> None:
    ahead, behind = Rank(tmp_path, 0), Rank(tmp_path, 1)
    for step in range(1000):
        ahead.write(step * 1000)
        behind.write(step * 1000 + 1)
    log = RunLog(tmp_path, record=True)
    live = drain(log, limit=50)
    log.close()
    gaps, newest = [], {ahead.session: 0, behind.session: 0}
    for event in live:
        newest[event.session] = event.record
        gaps.append(abs(newest[ahead.session] - newest[behind.session]))
    assert len(live) == 2000
    assert max(gaps) <= 1


def test_what_arrives_late_is_replayed_where_it_was_folded(tmp_path: Path) -> None:
    first, second = Rank(tmp_path, 0), Rank(tmp_path, 1)
    log = RunLog(tmp_path, record=True)
    live: List[Event] = []
    for step in range(40):
        first.write(1000 + step)
        if step % 10 == 9:
            live.extend(drain(log))
    for _ in range(40):
        second.write(0)  # older by its clock than all that is folded already
    live.extend(drain(log))
    log.discover()
    live.extend(drain(log))
    log.close()
    assert [event.session for event in live] == [first.session] * 40 + [second.session] * 40
    assert list(read_run(tmp_path)) == live


def test_a_restart_takes_what_was_recorded_first_and_goes_on(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path, 0), Rank(tmp_path, 1)]
    for step in range(30):
        for rank in ranks:
            rank.write(step)
    log = RunLog(tmp_path, record=True)
    live = log.poll(10)
    log.close()  # killed here
    log = RunLog(tmp_path, record=True)
    after = drain(log)
    log.close()
    assert keys(after)[: len(live)] == keys(live)
    assert len(after) == 60
    assert list(read_run(tmp_path)) == after


def test_one_session_alone_costs_one_line_of_order(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0)
    log = RunLog(tmp_path, record=True)
    for step in range(50):
        rank.write(step)
        log.poll()
    assert (tmp_path / "order.log").read_text().splitlines() == [f"+{rank.session} 0", "0 *"]
    other = Rank(tmp_path, 1)
    other.write(60)
    for _ in range(10):
        log.poll()
    log.close()
    assert (tmp_path / "order.log").read_text().splitlines() == [
        f"+{rank.session} 0",
        "0 50",
        f"+{other.session} 1",
        "1 *",
    ]
    assert len(list(read_run(tmp_path))) == 51


def test_a_line_of_order_that_was_not_finished_is_not_believed(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path, 0), Rank(tmp_path, 1)]
    for step in range(20):
        for rank in ranks:
            rank.write(step)
    log = RunLog(tmp_path, record=True)
    live = drain(log)
    log.close()
    path = tmp_path / "order.log"
    path.write_bytes(path.read_bytes()[:-1])
    assert sorted(keys(list(read_run(tmp_path)))) == sorted(keys(live))  # type: ignore[type-var]


def test_positions_let_another_log_go_on(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path, 0), Rank(tmp_path, 1)]
    for step in range(100):
        for rank in ranks:
            rank.write(step)
    log = RunLog(tmp_path)
    first = log.poll(20)
    while not log.settled:
        first.extend(log.poll(20))
    positions = log.positions()
    log.close()
    log = RunLog(tmp_path)
    log.seek(positions)
    rest = drain(log)
    log.close()
    assert len(first) + len(rest) == 200
    assert not {*keys(first)} & {*keys(rest)}


def test_a_single_segment_file_is_read_alone(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0)
    for step in range(2000):
        rank.writer.prepare()
        rank.write(step)
    rank.writer.close()
    files = sorted(tmp_path.glob("*.journal"))
    counts = [len(list(read_run(path))) for path in files]
    assert len(files) > 1
    assert counts[0] > 0
    assert counts[0] < 2000


def test_a_folder_without_a_journal_is_no_run(tmp_path: Path) -> None:
    assert not is_run_dir(tmp_path)
    Rank(tmp_path, 0)
    assert is_run_dir(tmp_path)


def test_a_record_that_cannot_be_read_does_not_shift_the_order(tmp_path: Path) -> None:
    first, second = Rank(tmp_path, 0), Rank(tmp_path, 1)
    log = RunLog(tmp_path, record=True)
    live: List[Event] = []
    for turn in range(20):
        for rank in (first, second):
            for _ in range(3):
                rank.write(1_000 - turn)  # each later than what is merged already, and dated before
            if turn % 4 == 0:  # of a kind that only a newer version knows
                number = rank.writer.record + 1
                unknown = RECORD_HEAD.pack(32, 9, 0, 0, 5, 5) + TRAILER.pack(number)
                assert rank.writer.append(unknown)
            rank.write(1_000 - turn)
            live.extend(drain(log))
    log.close()
    assert len(live) == 160
    assert log.skipped == 10
    assert list(read_run(tmp_path)) == live
