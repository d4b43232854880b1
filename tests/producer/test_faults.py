"""Bad input and faults inside one process: none reaches the loop, and what is lost is counted."""

from __future__ import annotations

import gc
import itertools
import math
import random
import sys
import tempfile
import threading
import time
from array import array
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List

import pytest
from tests.producer.runs import (
    caught_up,
    controls_of,
    events_of,
    folder_of,
    healthy,
    recorded,
    replayed,
    steps_of,
    until,
)

from plarv import Argus, ArgusError, faults, lifecycle
from plarv_processors.engine import Engine
from plarv_processors.stored_fold import base_of, fold_rest
from plarv_schemas import journal_writer
from plarv_schemas.journal import CORE_SIZE, pack_full
from plarv_schemas.journal_reader import segments_of
from plarv_schemas.run_log import read_run

MEGABYTE = 1024 * 1024


def journal_bytes(folder: Path) -> int:
    return sum(file.path.stat().st_size for files in segments_of(folder).values() for file in files)


# -- input


def test_any_mixture_of_bad_and_good_values_leaves_a_whole_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chance = random.Random(3)
    values: List[Any] = [
        None, "x", b"x", 1j, [], [[]], {}, object(), math.nan, math.inf, -math.inf, -1, 0, 1.5,
        True, 10**400, -(10**400), 1 << 70, lambda: 1.0, range(3), "nan", float, Exception("x"),
    ]  # fmt: skip
    names = (
        "grad_norm", "step", "local_report", "perplexity", "sample_ids", "sample_losses",
        "sample_correct", "forward_ms", "epoch", "val_loss", "current_lr", "batch_size",
    )  # fmt: skip
    argus = Argus()
    for _ in range(600):
        given = {name: chance.choice(values) for name in chance.sample(names, 3)}
        argus.step(chance.choice(values), **given)
    argus.complete()
    assert [event.record for event in events_of(argus)] == list(range(602))
    assert recorded(folder_of(argus)) == replayed(folder_of(argus))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "x loss was no number" in err


def test_a_list_without_end_is_cut_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    argus = Argus()
    argus.step(2.5, sample_losses=itertools.repeat(1.0))
    argus.step(2.5, sample_ids=range(10**9))
    argus.step(2.5)
    argus.complete()
    first, second, third = steps_of(argus)
    assert 10_000 < len(first.sample_losses or ()) <= 65_536
    assert 10_000 < len(second.sample_ids or ()) <= 65_536
    assert (third.loss, third.sample_losses, third.sample_ids) == (2.5, None, None)
    err = capsys.readouterr().err
    assert "1 x sample_losses was longer than 65536 and was cut" in err
    assert "2 x an event was too long: its lists were cut" in err


def test_of_a_huge_array_only_what_is_kept_is_brought_to_a_list() -> None:
    class Huge:
        """As an array of more numbers than there is memory."""

        def reshape(self, _: int) -> Huge:
            return self

        def __getitem__(self, part: slice) -> array[float]:
            return array("d", [1.0]) * int(part.stop)

        def tolist(self) -> List[float]:
            raise MemoryError

    argus = Argus(silent=True)
    argus.step(2.5, sample_losses=Huge())
    argus.complete()
    (step,) = steps_of(argus)
    assert len(step.sample_losses or ()) > 10_000


def test_a_list_that_raises_or_holds_no_numbers_costs_itself_alone() -> None:
    def torn() -> Iterator[float]:
        yield 1.0
        raise ZeroDivisionError

    argus = Argus(silent=True)
    argus.step(2.5, sample_losses=torn(), sample_entropies=["x"], sample_margins=[1.0, None])
    argus.step(2.5, sample_ids=[math.nan], sample_correct="1010", sample_confidences=[0.5])
    argus.complete()
    first, second = steps_of(argus)
    assert (first.sample_losses, first.sample_entropies, first.sample_margins) == (None,) * 3
    assert (second.sample_ids, second.sample_correct) == (None, None)
    assert second.sample_confidences == (0.5,)


def test_causes_that_never_repeat_do_not_fill_the_memory() -> None:
    found = faults.Faults()
    for number in range(10_000):
        found.count(f"cause {number}")
    assert len(found.counts) <= 65
    assert sum(found.counts.values()) == 10_000


# -- faults of our own


def test_a_fault_of_ours_is_swallowed_counted_and_said_once_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "RERAISE", False)
    argus = Argus()
    argus.step(2.5)
    writer = argus._writer
    room, writer.buffer = writer.buffer, b""  # nothing can be written to that
    for _ in range(3):
        argus.step(2.5)
    writer.buffer = room
    argus.step(2.5)
    argus.complete()
    assert [step.step for step in steps_of(argus)] == [0, 4]
    assert capsys.readouterr().err.count("3 x step() failed") == 1


def test_a_fault_of_ours_is_raised_where_errors_are_let_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faults, "RERAISE", False)
    argus = Argus(silent=True, catch_exceptions=False)
    writer = argus._writer
    room, writer.buffer = writer.buffer, b""
    with pytest.raises(ArgusError):
        argus.step(2.5)
    writer.buffer = room


def test_a_thread_that_cannot_be_started_costs_no_event(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "RERAISE", False)

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", start)
        argus = Argus()
    last = healthy(argus, 100)
    argus.step(9.0, step=last + 1)
    argus.complete()
    assert len(steps_of(argus)) == 101
    assert "1 x no thread for the engine" in capsys.readouterr().err
    found = recorded(folder_of(argus))  # folded at the end, by the one who ends the run
    assert found
    assert found == replayed(folder_of(argus))


def test_without_a_thread_what_finds_no_segment_is_lost_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "RERAISE", False)
    monkeypatch.setenv("ARGUS_JOURNAL_MAX_MB", "4")  # so segments of 1 MiB
    monkeypatch.setenv("ARGUS_SHUTDOWN_TIMEOUT", "0")

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", start)
        argus = Argus()
    steps = 40_000
    for _ in range(steps):
        argus.step(2.5)
    argus.complete()
    kept = [event.record for event in events_of(argus)]
    assert kept == list(range(len(kept)))
    lost = steps + 2 - len(kept)
    assert 0 < lost < steps
    assert f"{lost} events lost" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("closed"), RuntimeError("odd")])
def test_a_stderr_that_raises_silences_us_and_nothing_more(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Broken:
        def write(self, _: str) -> int:
            raise error

        def isatty(self) -> bool:
            raise error

    monkeypatch.setattr(sys, "stderr", Broken())
    argus = Argus()
    healthy(argus, 60)
    argus.step(90.0, epoch="x")
    argus.complete()
    monkeypatch.undo()
    assert len(steps_of(argus)) == 61


def test_no_stderr_at_all_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Argus() as argus:
        argus.step(2.5)
    monkeypatch.undo()
    assert len(steps_of(argus)) == 1


class Interrupted(BaseException):
    """Comes out of a signal's handler, as KeyboardInterrupt does."""


_TRACED = ("client.py", "recorder.py", "journal_writer.py", "journal.py")


def _interrupt_at(opcode: int) -> Any:
    """A trace function that raises at the ``opcode``-th instruction of the SDK and the journal."""
    left = itertools.count(opcode, -1)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(_TRACED):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(left) == 0:
            raise Interrupted
        return trace

    return trace


def _is_interrupted(opcode: int, call: Callable[[], object]) -> bool:
    before = sys.gettrace()
    sys.settrace(_interrupt_at(opcode))
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("more", [{}, {"epoch": 1.0}], ids=["short way", "long way"])
def test_an_interrupt_at_any_instruction_of_a_step_leaves_no_hole_in_the_log(
    more: Dict[str, Any],
) -> None:
    argus = Argus(silent=True)
    trials = 0
    while _is_interrupted(trials, lambda: argus.step(2.5, **more)):
        argus.step(2.0, **more)
        trials += 1
    argus.step(2.0, **more)
    argus.complete()
    assert trials > 20
    events = events_of(argus)
    assert [event.record for event in events] == list(range(len(events)))
    assert [step.loss for step in steps_of(argus)].count(2.0) == trials + 1
    assert controls_of(argus, "session_finished")


def test_an_interrupt_at_any_instruction_of_a_change_of_segments_leaves_no_hole(
    tmp_path: Path,
) -> None:
    writer = journal_writer.JournalWriter(
        tmp_path, run_id="run", session="0123456789abcdef", rank=0, world_size=1, segment_bytes=8192
    )

    def append(step: int) -> bool:
        return writer.append(pack_full(writer.record, 1_000 * step, step, {"loss": 2.5})[0])

    trials = step = 0
    was_interrupted = True
    while was_interrupted:
        writer.prepare()
        while writer.segment_bytes - writer.position >= CORE_SIZE:
            step += 1
            assert append(step)
        was_interrupted = _is_interrupted(trials, lambda: append(-1))
        writer.settle()
        trials += 1
    writer.close()
    assert trials > 100
    events = events_of(tmp_path)
    assert [event.record for event in events] == list(range(len(events)))
    assert [each.step for each in steps_of(tmp_path) if each.step > 0] == list(range(1, step + 1))


def test_a_segment_that_is_made_while_the_journal_is_closed_is_removed(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer = journal_writer.JournalWriter(
            folder,
            run_id="run",
            session="0123456789abcdef",
            rank=0,
            world_size=1,
            segment_bytes=8192,
        )
        thread = threading.Thread(target=writer.prepare, args=(1 + number % 8,))
        thread.start()
        writer.close()
        thread.join()
        writer.prepare()
        assert len(list(folder.iterdir())) == 1


def test_a_working_folder_that_is_gone_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ARGUS_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with Argus(silent=True) as argus:
        argus.step(2.5)
    monkeypatch.chdir(tmp_path)
    assert tmp_path in folder_of(argus).parents
    assert len(steps_of(argus)) == 1


# -- detectors of others


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a package with a detector, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, program: str) -> None:
        (tmp_path / f"{name}.py").write_text(program, encoding="utf-8")
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        (folder / "METADATA").write_text(metadata, encoding="utf-8")
        points = f"[plarv.detectors]\n{name} = {name}:Theirs\n"
        (folder / "entry_points.txt").write_text(points, encoding="utf-8")

    yield install
    for name in list(sys.modules):
        if name.startswith("theirs_"):
            del sys.modules[name]


RAISES = """
from plarv.detectors import verdict
class Theirs:
    name, scope, version = "theirs_raises", "run", "theirs_raises-1"
    def __init__(self, config=None):
        self.seen = 0
    def update(self, event):
        self.seen += 1
        if self.seen > 50:
            raise ZeroDivisionError("by their own hand")
        return ()
"""


def test_a_detector_that_raises_is_off_from_there_and_said_and_all_others_go_on(
    installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("theirs_raises", RAISES)
    argus = Argus()
    last = healthy(argus, 100)
    argus.step(9.0, step=last + 1)
    argus.complete()
    err = capsys.readouterr().err
    assert err.count("detector theirs_raises failed (ZeroDivisionError: by their own hand)") == 1
    assert "Traceback" not in err
    found = recorded(folder_of(argus))
    assert {record.get("detector") for record in found.values()} >= {"loss_spike"}
    assert found == replayed(folder_of(argus))


def test_a_detector_that_cannot_be_imported_is_left_out_and_said(
    installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("theirs_torn", "import not_there_at_all\n")
    argus = Argus()
    healthy(argus, 10)
    argus.complete()
    assert "detector 'theirs_torn'" in capsys.readouterr().err
    assert len(steps_of(argus)) == 10


# -- several runs, several attempts


def test_two_runs_in_one_process_do_not_meet() -> None:
    first, second = Argus(run_id="first", silent=True), Argus(run_id="second", silent=True)
    for step in range(60):
        first.step(2.5, 1.0)
        second.step(5.0 if step < 50 else 90.0, 1.0)
    first.complete()
    second.step(5.0, 1.0)
    second.complete()
    assert [step.loss for step in steps_of(first)] == [2.5] * 60
    assert len(steps_of(second)) == 61
    spikes = []
    for argus in (first, second):
        found = recorded(folder_of(argus))
        assert found == replayed(folder_of(argus))
        spikes.append(any(record.get("detector") == "loss_spike" for record in found.values()))
    assert spikes == [False, True]


def test_two_of_one_run_id_in_one_process_are_two_attempts_and_nothing_is_lost() -> None:
    first, second = Argus(run_id="same", silent=True), Argus(run_id="same", silent=True)
    first.step(2.5)
    for _ in range(60):
        second.step(2.5, 1.0)
        first.step(2.5, 1.0)
    second.complete()
    first.complete()
    fold_rest(folder_of(first))
    assert len(steps_of(first)) == 121
    assert len({step.session for step in steps_of(first)}) == 2
    assert recorded(folder_of(first)) == replayed(folder_of(first))


def test_the_second_of_one_run_id_takes_the_fold_over_when_the_first_has_ended() -> None:
    first = Argus(run_id="same", silent=True)
    caught_up(first, healthy(first, 20))
    second = Argus(run_id="same", silent=True)
    first.complete()
    last = healthy(second, 80)
    caught_up(second, last)
    second.step(9.0, 1.0, step=last + 1)
    until(lambda: second.decision.verdicts)
    second.complete()
    assert recorded(folder_of(first)) == replayed(folder_of(first))


def test_a_resumed_run_opens_its_next_attempt_judged_by_its_own_past_alone() -> None:
    for attempt in (1, 2, 3):
        argus = Argus(run_id="again", silent=True)
        level = 10.0**attempt
        for step in range(100 * attempt, 100 * attempt + 120):
            argus.step(level + 0.01 * (step % 5), 1.0 + 0.01 * (step % 7), step=step)
        caught_up(argus, 100 * attempt + 119)
        assert argus.decision.attempt == attempt
        argus.complete()
    assert len(steps_of(argus)) == 360
    assert len(controls_of(argus, "session_started")) == 3
    assert recorded(folder_of(argus)) == replayed(folder_of(argus))
    spikes = [r for r in recorded(folder_of(argus)).values() if r.get("detector") == "loss_spike"]
    assert spikes == []  # ten times the loss of the last attempt is none


def test_a_run_that_was_dropped_without_an_end_is_ended_at_the_exit() -> None:
    Argus(run_id="dropped", silent=True).step(2.5)
    (argus,) = lifecycle._live
    lifecycle._end_all()
    (finished,) = controls_of(argus, "session_finished")
    assert finished.data == {"status": "exited", "exception": None}


# -- bounds


def test_at_its_bound_the_journal_ends_without_a_hole_and_the_loss_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGUS_JOURNAL_MAX_MB", "1")  # one segment alone: none can ever go
    monkeypatch.setenv("ARGUS_SHUTDOWN_TIMEOUT", "0.1")
    argus = Argus()
    until(lambda: argus._writer.full)
    steps = 60_000
    for _ in range(steps):
        argus.step(2.5)
    argus.complete()
    assert journal_bytes(folder_of(argus)) <= MEGABYTE
    kept = [event.record for event in events_of(argus)]
    assert kept == list(range(len(kept)))
    lost = steps + 2 - len(kept)
    assert lost > 0
    err = capsys.readouterr().err
    assert f"{len(kept)} events" in err
    assert f"{lost} events lost (the journal is at its bound, ARGUS_JOURNAL_MAX_MB)" in err


def test_within_its_bound_what_was_folded_goes_and_a_replay_begins_where_the_rest_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ARGUS_JOURNAL_MAX_MB", "4")
    argus = Argus(run_id="long", silent=True)
    folder = folder_of(argus)
    chance = random.Random(0)
    for step in range(72):
        loss = 9.0 if step in (40, 68) else 2.5 + 0.01 * chance.random()
        argus.step(loss, 1.0, sample_losses=[loss] * 30_000)  # four of these fill a segment
        caught_up(argus, step)
        if step % 8 == 7:
            assert journal_bytes(folder) <= 4 * MEGABYTE
    argus.complete()
    kept = events_of(argus)
    assert 0 < len(kept) < 60
    numbers = [event.record for event in kept]
    assert numbers == list(range(numbers[0], 74))  # the old ones went, and no others
    engine = Engine()
    base = base_of(folder, engine)
    assert base is not None
    assert base >= numbers[0] - 1
    again: Dict[str, Any] = {}
    for event in read_run(folder):
        again.update({record.id: record.to_dict() for record in engine.fold(event)})
    found = recorded(folder)
    assert again == {name: r for name, r in found.items() if r["ordinal"] > base}
    assert {r["step"] for r in found.values()} >= {40, 68}
    assert again

    argus = Argus(run_id="long", silent=True)  # and the next attempt goes on from there
    healthy(argus, 10)
    argus.complete()
    assert journal_bytes(folder) <= 4 * MEGABYTE
    assert argus.decision.attempt == 2


def test_what_waits_for_a_segment_is_bounded_also_when_it_is_long(tmp_path: Path) -> None:
    writer = journal_writer.JournalWriter(
        tmp_path, run_id="run", session="0123456789abcdef", rank=0, world_size=1
    )
    data = {"x": "y" * 400_000}
    taken = 0
    while writer.control("order", step=None, rank=None, data=data):
        taken += 1
    assert taken * 400_000 < 20 * MEGABYTE
    assert writer.ended
    assert not writer.control("order", step=None, rank=None, data={})
    assert writer.lost == 2
    writer.close()
    assert [event.record for event in events_of(tmp_path)] == list(range(taken))


def test_an_exit_far_behind_takes_no_longer_than_it_may(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGUS_SHUTDOWN_TIMEOUT", "0.5")
    argus = Argus()
    for _ in range(150_000):  # more than six seconds of folding
        argus.step(2.5, 1.0)
    begun = time.monotonic()
    argus.complete()
    assert time.monotonic() - begun < 3.0
    assert "the engine is behind" in capsys.readouterr().err


def test_several_that_end_at_the_exit_take_no_longer_than_one_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ARGUS_SHUTDOWN_TIMEOUT", "0.5")
    runs = [Argus(silent=True) for _ in range(8)]
    for argus in runs:
        for _ in range(20_000):
            argus.step(2.5, 1.0)
    begun = time.monotonic()
    lifecycle._end_all()
    assert time.monotonic() - begun < 3.0
    assert not lifecycle._live


def test_after_the_end_no_thread_and_no_file_is_left() -> None:
    def files() -> int:
        descriptors = Path("/proc/self/fd")
        return len(list(descriptors.iterdir())) if descriptors.is_dir() else 0

    def engines() -> List[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "argus-engine"]

    until(lambda: not engines())  # those of other tests that are still at their end
    gc.collect()
    before = files()
    for _ in range(3):
        with Argus(silent=True) as argus:
            healthy(argus, 60)
            argus.step(90.0)
        assert engines() == []
    gc.collect()
    assert files() == before
