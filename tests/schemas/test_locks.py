"""A lock on a file is one process's, whatever it forks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.producer.processes import environment

from plarv_schemas.locks import FileLock

_TRAINER = """
import os, sys, time
from pathlib import Path
from plarv_schemas.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
assert lock.acquire()
worker = os.fork()
if worker == 0:
    assert not lock.held
    assert not FileLock(Path(sys.argv[1])).acquire()  # it is the parent's still
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(600)
time.sleep(600)
"""


def test_a_forked_worker_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, str(path)],
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    try:
        assert not FileLock(path).acquire()
        trainer.kill()
        trainer.wait()
        lock = FileLock(path)
        assert lock.acquire()
        lock.release()
    finally:
        os.kill(worker, signal.SIGKILL)
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()


def test_two_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_a_file_system_without_locks_is_told_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(descriptor: int, _: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refusing)
    lock = FileLock(tmp_path / "lock")
    with pytest.raises(OSError, match="No locks"):
        lock.acquire()
    assert not lock.held
