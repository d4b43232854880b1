"""The published SDK, to compare with: in an environment of its own, answered by a stub."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import List, Optional, Type

from children import Package, clean_environment, our_package

__all__ = ["PEER", "Stub", "install", "packages"]

PEER = "plarv-argus-sdk==1.1.2"
_NEEDED = (PEER, "numpy")  # it declares no dependency, and imports numpy
_ANSWER = b'{"action": "CONTINUE", "harm_pressure": 0, "status": "Active", "exists": true}'


class Stub:
    """Answers every request on a loopback port with "continue"."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Stub:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Any question."""
        self._answer()

    def do_POST(self) -> None:
        """Any report."""
        self._answer()

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Says nothing."""

    def _answer(self) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            left -= len(self.rfile.read(min(left, 1 << 16))) or left
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(_ANSWER)))
        self.end_headers()
        self.wfile.write(_ANSWER)


def install(stub: Stub) -> Package:
    """The published SDK in an environment under the user's cache folder, pointed at ``stub``.

    torch comes from this interpreter's environment. RuntimeError: it cannot be installed, and why.
    """
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "argus-benchmarks" / f"{PEER.replace('==', '-')}-py{version}"
    python = folder / "bin" / "python"
    if not _imports(python):
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], [])
        uv = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(python), *_NEEDED]
        pip = [str(python), "-m", "pip", "install", "-q", *_NEEDED]
        _run(uv, pip)
        if not _imports(python):
            raise RuntimeError("it is installed and cannot be imported")
    environment = clean_environment()
    environment["PLARV_API_URL"] = stub.url
    return Package(PEER.replace("==", " "), str(python), environment, _torch_paths())


def _imports(python: Path) -> bool:
    if not python.exists():
        return False
    done = subprocess.run(
        [str(python), "-c", "import plarv"],
        env=clean_environment(),
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def _run(command: List[str], otherwise: List[str]) -> None:
    """Runs ``command``, and where that fails ``otherwise``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        if not otherwise:
            raise RuntimeError(str(error)) from error
        _run(otherwise, [])
        return
    if done.returncode != 0:
        if not otherwise:
            raise RuntimeError(_last_line(done.stderr or done.stdout))
        _run(otherwise, [])


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _torch_paths() -> List[str]:
    """Where torch lies here. It comes last, so that this environment's own plarv is not found."""
    found = importlib.util.find_spec("torch")
    return [str(Path(found.origin).parents[1])] if found and found.origin else []


def packages(stack: ExitStack, *, with_peer: bool) -> List[Package]:
    """This checkout, and the published SDK where it is asked for and can be installed."""
    found = [our_package()]
    if with_peer:
        try:
            found.append(install(stack.enter_context(Stub())))
        except RuntimeError as error:
            print(f"{PEER} cannot be installed, so it is left out: {error}")
    return found
