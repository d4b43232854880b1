"""A process of its own that speaks to the brokers, and the lines between it and this one."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from typing import Any, Dict, List, Mapping, Sequence

__all__ = ["ChildProcess", "leave_alone", "start_apart"]

_MODULE = "plarv.fleet.child"
_CHUNK = 65_536


def start_apart(
    arguments: Sequence[str], *, stdin: Any, stdout: Any, stderr: Any, **settings: str
) -> subprocess.Popen[bytes]:
    """``python -m ARGUMENTS`` in a session of its own, with the modules of this process: a Ctrl-C
    at the terminal does not reach it, and it may outlive this process. ``settings`` are variables
    of its environment, where a list of processes does not show them. OSError: it cannot be started.
    """
    if not sys.executable:
        raise OSError("nobody can say which interpreter this is")
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        bufsize=0,
        cwd="/",  # where no file of the user's is taken for a module
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_paths()), **settings},
        start_new_session=True,
    )


def leave_alone(process: subprocess.Popen[bytes]) -> None:
    """Lets it end by itself: nobody waits for it, and it leaves no zombie behind."""
    try:
        threading.Thread(target=process.wait, name="argus-reaper", daemon=True).start()
    except RuntimeError:  # the interpreter ends
        process.returncode = 0


class ChildProcess:
    """``python -m plarv.fleet.child``, told its configuration on its stdin: keys are never seen in
    a list of processes.

    It has a session of its own, so a Ctrl-C at the terminal does not reach it, and it outlives this
    process for as long as it needs to ship what is left. OSError: it cannot be started.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rest = b""
        self._ended = False
        self._process = start_apart(
            [_MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a pipeline must not wait for it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdout, False)
        self._poll = select.poll()  # select() takes no descriptor above 1023
        self._poll.register(self._stdout, select.POLLIN)
        self.tell(config)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as :meth:`hear` has heard."""
        return not self._ended

    def tell(self, line: Mapping[str, Any]) -> None:
        """Sends it a line; one that has ended does not hear it."""
        data = json.dumps(line, separators=(",", ":")).encode("utf-8") + b"\n"
        try:
            while data:
                data = data[os.write(self._stdin, data) :]
        except OSError:
            return

    def hear(self, timeout_s: float) -> List[Dict[str, Any]]:
        """The lines that it has written by now; waits up to ``timeout_s`` where there are none."""
        if self._ended or not self._poll.poll(max(0.0, 1000 * timeout_s)):
            return []
        try:
            data = os.read(self._stdout, _CHUNK)
        except BlockingIOError:
            return []
        if not data:  # its end of the pipe is closed, and it alone had it
            self._ended = True
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def leave(self) -> None:
        """Closes its stdin: it ships what is left, for 10 s at most, and ends."""
        self._close_pipes()
        leave_alone(self._process)

    def kill(self) -> None:
        """Ends it now."""
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def abandon(self) -> None:
        """In a forked child: closes its copies of the pipes, without a word to the process."""
        self._close_pipes()
        self._process.returncode = 0  # it is not this process's child

    def _close_pipes(self) -> None:
        self._ended = True
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _paths() -> List[str]:
    """Where this process finds its modules, as whole paths."""
    paths: List[str] = []
    for path in sys.path:
        try:
            paths.append(os.path.abspath(path))
        except OSError:  # the working folder is gone
            continue
    return paths
