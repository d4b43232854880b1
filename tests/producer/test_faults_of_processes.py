"""Faults that end or split a process, and disks that take nothing: each in a process of its own."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Optional, Tuple

import pytest
from tests.producer.processes import run, start
from tests.producer.runs import (
    controls_of,
    events_of,
    healthy,
    recorded,
    replayed,
    steps_of,
    until,
)

from plarv import Argus
from plarv_processors.stored_fold import fold_rest
from plarv_schemas.events import ControlEvent
from plarv_schemas.run_log import is_run_dir


def place() -> Path:
    return Path(os.environ["ARGUS_DIR"]) / "runs"


def the_run(root: Optional[Path] = None) -> Path:
    (folder,) = [path for path in (root or place()).iterdir() if is_run_dir(path)]
    return folder


def status_of(folder: Path) -> object:
    (finished,) = controls_of(folder, "session_finished")
    return finished.data


def assert_whole(folder: Path) -> None:
    """Each session's records are numbered without a hole."""
    for session in {event.session for event in events_of(folder)}:
        numbers = [event.record for event in events_of(folder) if event.session == session]
        assert numbers == list(range(len(numbers)))


def assert_said_twice(stderr: str) -> None:
    """One process speaks, at the start and at the end, and of verdicts between them."""
    lines = stderr.splitlines()
    assert len([line for line in lines if line.startswith("[argus] run ")]) == 2, stderr
    assert all(line.startswith(("[argus] run ", "[argus] step ")) for line in lines), stderr


# -- ends


STEPS_FOR_EVER = """
    import mmap, os, sys
    from plarv import Argus

    count = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 8)
    argus = Argus(run_id="killed", silent=True)
    step = 0
    while True:
        more = {"sample_losses": [2.5] * (step % 64)} if step % 5 == 0 else {}
        argus.step(9.0 if step % 400 == 399 else 2.5 + 0.01 * (step % 7), 1.0, **more)
        step += 1
        count[:] = step.to_bytes(8, "little")
"""


def stepping(tmp_path: Path, program: str) -> Tuple[subprocess.Popen[str], mmap.mmap]:
    """A process that steps without a pause, and the number of steps that it has completed."""
    (tmp_path / "count").write_bytes(bytes(8))
    with open(tmp_path / "count", "r+b") as file:
        count = mmap.mmap(file.fileno(), 8)
    child = start(tmp_path, program, str(tmp_path / "count"))
    return child, count


def completed(count: mmap.mmap) -> int:
    return int.from_bytes(count[:], "little")


def wait_for(steps: int, child: subprocess.Popen[str], count: mmap.mmap) -> None:
    until(lambda: completed(count) >= steps or child.poll() is not None)


def test_a_completed_step_survives_kill_9_and_the_next_start_folds_the_rest(
    tmp_path: Path,
) -> None:
    chance = random.Random(1)
    lives: List[int] = []
    for _ in range(3):
        child, count = stepping(tmp_path, STEPS_FOR_EVER)
        wait_for(chance.randrange(100, 6000), child, count)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        lives.append(completed(count))
        assert child.communicate() == ("", "")
    folder = place() / "killed"
    sessions = [each.session for each in controls_of(folder, "session_started")]
    assert len(sessions) == 3
    for session, life in zip(sessions, lives):
        kept = [step.step for step in steps_of(folder) if step.session == session]
        assert kept == list(range(len(kept)))
        assert life <= len(kept) <= life + 1  # the last may have been written and not counted
    assert_whole(folder)

    argus = Argus(run_id="killed", silent=True)
    healthy(argus, 50)
    argus.complete()
    fold_rest(folder)  # what the exit had no time for
    found = recorded(folder)
    assert found == replayed(folder)
    assert {record["attempt"] for record in found.values()} >= {1, 2, 3}


@pytest.mark.parametrize("handled", [False, True])
def test_sigterm_ends_a_process_as_it_always_did_and_no_step_is_lost(
    handled: bool, tmp_path: Path
) -> None:
    program = STEPS_FOR_EVER
    if handled:
        leave = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
        program = program.replace("step = 0", f"{leave}\n    step = 0")
    child, count = stepping(tmp_path, program)
    wait_for(500, child, count)
    child.terminate()
    assert child.wait() == (7 if handled else -signal.SIGTERM)
    assert child.communicate() == ("", "")
    folder = place() / "killed"
    assert_whole(folder)
    assert len(steps_of(folder)) >= completed(count)
    if handled:
        assert status_of(folder) == {"status": "exited", "exception": None}


ENDS = {
    "by itself": ("pass", 0, {"status": "exited", "exception": None}),
    "by sys.exit": ("sys.exit(3)", 3, {"status": "exited", "exception": None}),
    "by an error": ("1 / 0", 1, {"status": "failed", "exception": "ZeroDivisionError"}),
    "by Ctrl-C": ("raise KeyboardInterrupt", None, None),
    "by os._exit": ("os._exit(4)", 4, None),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_ends_without_complete_ends_its_run(end: str, tmp_path: Path) -> None:
    statement, code, status = ENDS[end]
    done = run(
        tmp_path,
        f"""
        import os, sys
        from plarv import Argus

        argus = Argus()
        for step in range(2000):
            argus.step(2.5, 1.0)
        {statement}
        """,
    )
    if code is not None:
        assert done.returncode == code, done.stderr
    assert len(steps_of(the_run())) == 2000
    assert_whole(the_run())
    said = [line for line in done.stderr.splitlines() if line.startswith("[argus]")]
    if end == "by os._exit":
        assert len(said) == 1
    else:
        assert "2002 events" in said[-1]
    if status is not None:
        assert status_of(the_run()) == status
        others = [line for line in done.stderr.splitlines() if not line.startswith("[argus]")]
        assert bool(others) == (end == "by an error")  # only the script's own traceback


def test_steps_of_a_finalizer_and_runs_begun_at_the_exit_do_no_harm(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import atexit
        from plarv import Argus

        def late():
            with Argus(run_id="late") as argus:
                argus.step(1.0)

        class Last:
            def __del__(self):
                argus.step(1.0)
                argus.complete()

        atexit.register(late)  # runs after the exit of Argus itself
        argus = Argus(run_id="early")
        argus.step(1.0)
        last = Last()
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert [len(steps_of(place() / name)) for name in ("early", "late")] == [1, 1]


def test_a_daemon_thread_that_steps_into_the_exit_does_no_harm(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import sys, threading, time
        from plarv import Argus

        argus = Argus(silent=True)
        sys.setswitchinterval(1e-5)

        def train():
            while True:
                argus.step(1.0)

        threading.Thread(target=train, daemon=True).start()
        while not argus.decision.step:
            time.sleep(0.001)
        """,
        ARGUS_SHUTDOWN_TIMEOUT="0.3",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_whole(the_run())


# -- forks

fork_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@fork_only
def test_a_fork_with_every_lock_held_gives_a_child_that_is_silent_and_ends(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import gc, io, logging, os, sys, threading, time, types
        import plarv
        from plarv import Argus, lifecycle
        from plarv.background_scalars import BackgroundReader

        logging.basicConfig()
        argus = Argus(run_id="forked")
        for step in range(100):
            argus.step(2.5, 1.0)
        while argus.decision.step != 99:
            time.sleep(0.001)

        # A stderr that another thread is writing to, for ever: a pipe that nobody reads.
        reader, writer = os.pipe()
        stderr = sys.stderr
        stuck = io.TextIOWrapper(io.BufferedWriter(io.FileIO(writer, "w")), write_through=True)

        def write_for_ever():
            try:
                stuck.write("x" * 10_000_000)
            except OSError:
                pass

        threading.Thread(target=write_for_ever, daemon=True).start()

        # Every lock that can be reached from us, and those of logging's handlers.
        kinds = (type(threading.Lock()), type(threading.RLock()))
        seen, locks = set(), []
        todo = [argus, lifecycle, logging.getLogger().handlers]
        todo += [module for name, module in sys.modules.items() if name.startswith("plarv")]
        while todo:
            thing = todo.pop()
            if id(thing) in seen or thing in (sys, threading, os, gc):
                continue
            seen.add(id(thing))
            if isinstance(thing, kinds):
                locks.append(thing)
            elif not isinstance(thing, (type, types.FrameType)):
                for other in gc.get_referents(thing):
                    is_module = isinstance(other, types.ModuleType)
                    if not is_module or other.__name__.startswith("plarv"):
                        todo.append(other)
        held, go = threading.Event(), threading.Event()

        def hold():
            got = [lock for lock in locks if lock.acquire(timeout=0.05)]
            held.set()
            go.wait()
            for lock in got:
                lock.release()

        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        assert len(locks) >= 3, locks
        sys.stderr = stuck
        child = os.fork()
        if child == 0:
            for _ in range(10):
                argus.step(3.5, 1.0)
                argus.step(3.5, epoch=1.0)
            argus.complete()
            lifecycle._end_all()
            os._exit(5)
        sys.stderr = stderr
        until = time.monotonic() + 30
        while True:
            gone, status = os.waitpid(child, os.WNOHANG)
            if gone or time.monotonic() > until:
                break
            time.sleep(0.002)
        if not gone:
            os.kill(child, 9)
            sys.exit("the child hangs")
        go.set()
        for step in range(100):
            argus.step(2.5, 1.0)
        argus.complete()
        os.close(reader)
        sys.exit(0 if os.WEXITSTATUS(status) == 5 else f"the child ended with {status}")
        """,
    )
    assert done.returncode == 0, done.stderr
    assert_said_twice(done.stderr)
    folder = place() / "forked"
    assert {step.loss for step in steps_of(folder)} == {2.5}
    assert len(steps_of(folder)) == 200
    assert_whole(folder)
    assert recorded(folder) == replayed(folder)


@fork_only
def test_a_forked_child_that_leaves_by_the_front_door_writes_nothing_of_its_parents(
    tmp_path: Path,
) -> None:
    done = run(
        tmp_path,
        """
        import os, sys, time
        from plarv import Argus

        argus = Argus(run_id="parent")
        statuses = []
        for step in range(200):
            argus.step(90.0 if step % 60 == 59 else 2.5, 1.0)
            if step % 40 == 0:
                child = os.fork()
                if child == 0:
                    argus.step(3.5)
                    if step == 80:
                        with Argus(run_id="child", silent=True) as own:
                            own.step(4.5)
                    sys.exit(0)  # with all finalizers
                statuses.append(os.waitpid(child, 0)[1])
        argus.complete()
        sys.exit(0 if statuses == [0] * 5 else str(statuses))
        """,
    )
    assert done.returncode == 0, done.stderr
    assert_said_twice(done.stderr)
    assert {step.loss for step in steps_of(place() / "parent")} == {2.5, 90.0}
    assert_whole(place() / "parent")
    assert recorded(place() / "parent") == replayed(place() / "parent")
    assert [step.loss for step in steps_of(place() / "child")] == [4.5]
    assert status_of(place() / "child") == {"status": "completed", "exception": None}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_any_start_method_are_inert_and_the_parent_goes_on(
    method: str, tmp_path: Path
) -> None:
    done = run(
        tmp_path,
        """
        import multiprocessing, sys
        from plarv import Argus

        def work(argus, number):
            argus.step(3.5)
            argus.complete()
            return argus.run_id

        if __name__ == "__main__":
            argus = Argus(run_id="workers")
            for step in range(50):
                argus.step(2.5, 1.0)
            context = multiprocessing.get_context(sys.argv[1])
            with context.Pool(2) as pool:
                assert pool.starmap(work, [(argus, n) for n in range(4)]) == [""] * 4
                argus.step(2.5, 1.0)
            argus.complete()
        """,
        method,
    )
    assert done.returncode == 0, done.stderr
    assert_said_twice(done.stderr)
    assert [step.loss for step in steps_of(place() / "workers")] == [2.5] * 51
    assert_whole(place() / "workers")


# -- disks


def may_mount() -> bool:
    """Whether this process may mount in a namespace of its own."""
    probe = f"mount -t tmpfs -o size=64k tmpfs {tempfile.gettempdir()}"
    command = ["unshare", "-m", "sh", "-c", probe]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


mounts = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not may_mount(),
    reason="mounting in a namespace of one's own is not permitted here",
)


def mounted(command: str) -> List[str]:
    return ["unshare", "-m", "sh", "-c", f'{command} && exec "$@"', "sh"]


LOOP = """
    import sys
    from plarv import Argus

    argus = Argus(run_id="disk")
    for step in range(int(sys.argv[1])):
        argus.step(2.5, 1.0)
    argus.complete()
    print(argus.run_dir)
"""


@mounts
def test_on_a_read_only_disk_the_run_goes_on_in_the_temporary_folder_and_says_so(
    tmp_path: Path,
) -> None:
    disk, other = tmp_path / "disk", tmp_path / "tmp"
    disk.mkdir()
    other.mkdir()
    done = run(
        tmp_path,
        LOOP,
        "100",
        prefix=mounted(f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}"),
        ARGUS_DIR=str(disk),
        TMPDIR=str(other),
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert other in folder.parents
    assert len(steps_of(folder)) == 100
    assert f"cannot be written to (Read-only file system): using {folder}" in done.stderr
    assert list(disk.iterdir()) == []


def test_below_a_file_the_run_goes_on_in_the_temporary_folder_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    other = tmp_path / "tmp"
    other.mkdir()
    done = run(tmp_path, LOOP, "100", ARGUS_DIR=str(tmp_path / "file" / "x"), TMPDIR=str(other))
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert other in folder.parents
    assert len(steps_of(folder)) == 100
    assert "cannot be written to (Not a directory)" in done.stderr


@mounts
def test_where_no_disk_takes_a_journal_the_loop_runs_and_is_told(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = run(
        tmp_path,
        LOOP,
        "100",
        prefix=mounted(f"mount -t tmpfs -o size=64k tmpfs {disk}"),
        ARGUS_DIR=str(disk),
        TMPDIR=str(disk),
    )
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert "no folder can be written to: this run is not monitored" in done.stderr
    assert len(done.stderr.splitlines()) == 1


FULL_DISK = """
    import os, sys
    from pathlib import Path
    from plarv import Argus
    from plarv_schemas.run_log import read_run

    steps = 250_000
    argus = Argus(run_id="disk")
    for step in range(steps):
        argus.step(2.5, 1.0)
        if step % 50_000 == 0:
            argus.step(2.5, sample_losses=[1.0] * 60_000)
            steps += 1
    argus.complete()
    numbers = [event.record for event in read_run(argus.run_dir)]
    assert numbers == list(range(len(numbers))), "a hole"
    print(len(numbers), steps + 2 - len(numbers))
"""


@mounts
@pytest.mark.parametrize("room", ["5m", "9m"])
def test_a_disk_that_fills_up_kills_nobody_and_what_is_lost_is_counted(
    room: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = run(
        tmp_path,
        FULL_DISK,
        prefix=mounted(f"mount -t tmpfs -o size={room} tmpfs {disk}"),
        ARGUS_DIR=str(disk),
        ARGUS_SHUTDOWN_TIMEOUT="0.5",
    )
    assert done.returncode == 0, done.stderr  # -7 would be SIGBUS
    kept, lost = map(int, done.stdout.split())
    assert kept > 40_000
    assert lost > 0
    said = done.stderr.splitlines()[-1]
    assert f" {kept} events" in said
    assert f"{lost} events lost (no room for the journal: No space left on device)" in said
    assert "Traceback" not in done.stderr


NO_ROOM_BESIDE = """
    import os, time
    from pathlib import Path
    from plarv import Argus
    from plarv_processors.stored_fold import fold_rest
    from tests.producer.runs import recorded, replayed, steps_of

    disk = Path(os.environ["ARGUS_DIR"])
    argus = Argus(run_id="disk")
    filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        while True:  # not a byte is left
            os.write(filler, bytes(4096))
    except OSError:
        pass
    for step in range(300):
        argus.step(90.0 if step % 100 == 99 else 2.5, 1.0)
    time.sleep(0.3)  # the engine's turn comes, and fails
    os.truncate(disk / "filler", 0)
    for step in range(100):
        argus.step(2.5, 1.0)
    argus.complete()
    fold_rest(argus.run_dir)
    assert len(steps_of(argus.run_dir)) == 400
    assert recorded(argus.run_dir) == replayed(argus.run_dir)
    assert recorded(argus.run_dir)
"""


@mounts
def test_a_disk_that_was_full_for_a_while_costs_no_verdict(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = run(
        tmp_path,
        NO_ROOM_BESIDE,
        prefix=mounted(f"mount -t tmpfs -o size=14m tmpfs {disk}"),
        ARGUS_DIR=str(disk),
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@mounts
def test_a_disk_that_fills_up_behind_the_journal_keeps_the_string_ids_of_one_run_alike(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = run(
        tmp_path,
        """
        import os
        from pathlib import Path
        from plarv import Argus
        from plarv_schemas.run_log import read_run

        argus = Argus(run_id="disk", silent=True)  # its segment is all that finds room
        argus.step(2.5, sample_ids=["a", "b", "a"])
        argus.complete()
        (ids,) = [e.sample_ids for e in read_run(argus.run_dir) if hasattr(e, "sample_ids")]
        assert ids[0] == ids[2] != ids[1]
        """,
        prefix=mounted(f"mount -t tmpfs -o size=4m tmpfs {disk}"),
        ARGUS_DIR=str(disk),
    )
    assert (done.returncode, done.stderr) == (0, "")


@mounts
def test_events_whose_order_finds_no_room_are_folded_when_there_is_room_again(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = run(
        tmp_path,
        """
        import os
        from pathlib import Path
        from plarv_schemas.journal_writer import JournalWriter
        from plarv_schemas.run_log import RunLog, read_run

        disk = Path(os.environ["ARGUS_DIR"])
        writers = [
            JournalWriter(
                disk,
                run_id="run",
                session=f"{rank:016x}",
                rank=10 + rank,
                world_size=2,
                segment_bytes=60_000,
            )
            for rank in range(2)
        ]
        order = disk / "order.log"

        def written():
            for writer in writers:
                assert writer.control("order", step=None, rank=None, data={})

        def is_refused():
            filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
            try:
                while True:
                    os.write(filler, bytes(4096))
            except OSError:
                pass
            before = order.read_bytes() if order.exists() else b""
            try:
                log.poll()
            except OSError:
                assert (order.read_bytes() if order.exists() else b"") == before
                assert not log.settled
                return True
            finally:
                os.close(filler)
                os.unlink(disk / "filler")
            return False

        log = RunLog(disk, record=True)
        events = []
        written()
        assert is_refused()  # its first line of all
        events += log.poll()
        while order.stat().st_size < 4085:
            written()
            events += log.poll()
        assert order.stat().st_size < 4096
        written()
        assert is_refused()  # the lines would run into a page that there is not
        events += log.poll()
        written()
        events += log.poll()
        assert bytes(1) not in order.read_bytes()
        assert list(read_run(disk)) == events
        assert len(events) == sum(writer.record for writer in writers)
        """,
        prefix=mounted(f"mount -t tmpfs -o size=160k tmpfs {disk}"),
        ARGUS_DIR=str(disk),
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- what others see of it


def test_a_reader_beside_a_run_that_lives_sees_whole_events_only(tmp_path: Path) -> None:
    child, count = stepping(tmp_path, STEPS_FOR_EVER)
    try:
        wait_for(100, child, count)
        for _ in range(5):
            seen = completed(count)
            events = events_of(place() / "killed")
            assert [event.record for event in events] == list(range(len(events)))
            assert len(events) >= seen
            assert isinstance(events[0], ControlEvent)
    finally:
        child.kill()
        child.communicate()
