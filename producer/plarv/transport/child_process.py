"""A process of its own that speaks to the brokers, and the lines between it and this one."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import Any, Dict, List, Mapping

__all__ = ["ChildProcess"]

_MODULE = "plarv.fleet.child"
_CHUNK = 65_536
_MAX_LINE = 64 * 1024 * 1024


class ChildProcess:
    """``python -m plarv.fleet.child``, told its configuration on its stdin: keys are never seen in
    a list of processes.

    It has a session of its own, so a Ctrl-C at the terminal does not reach it, and it outlives this
    process for as long as it needs to ship what is left. OSError: it cannot be started.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rest = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a pipeline must not wait for it
            bufsize=0,
            cwd="/",  # where no file of the user's is taken for a module
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdout, False)
        self.tell(config)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def tell(self, line: Mapping[str, Any]) -> None:
        """Sends it a line; one that has ended does not hear it."""
        data = json.dumps(line, separators=(",", ":")).encode("utf-8") + b"\n"
        try:
            while data:
                data = data[os.write(self._stdin, data) :]
        except OSError:
            return

    def hear(self, timeout_s: float) -> List[Dict[str, Any]]:
        """The lines that it has written by now; waits up to ``timeout_s`` where there are none.

        Where it has ended, this waits too: the caller looks at ``alive``.
        """
        if not select.select([self._stdout], [], [], max(0.0, timeout_s))[0]:
            return []
        try:
            data = os.read(self._stdout, _CHUNK)
        except BlockingIOError:
            return []
        if not data:
            time.sleep(min(timeout_s, 0.05))
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            self._rest = b""
        return [json.loads(line) for line in lines]

    def leave(self) -> None:
        """Closes its stdin: it ships what is left, for 10 s at most, and ends."""
        self.abandon()

    def kill(self) -> None:
        """Ends it now."""
        self._process.kill()
        self._process.wait()
        self.abandon()

    def abandon(self) -> None:
        """Lets go of the pipes, without a word to it; in a forked child they are copies."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._process.returncode is None:
            self._process.returncode = 0  # nobody waits for it: Popen would say so at the end
