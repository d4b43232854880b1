"""``argus export RUN_DIR``: the journal as Parquet."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any, Callable, TextIO

from plarv.cli.complaint import Complaint, tell
from plarv.cli.run_folders import find_run

__all__ = ["ProgressBar", "add_to", "run"]


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "export",
        help="write a run's journal as Parquet files",
        description="Folds a run's whole journal anew and writes steps.parquet, events.parquet, "
        "verdicts.parquet and actions.parquet. `argus replay` reads the folder.",
        epilog="example:\n  argus export .argus/runs/RUN --output exported",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN_DIR", help="the run's folder, or its id")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to (default: RUN_DIR/export)"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Writes the files and prints each with its number of rows."""
    from plarv_processors.stored_fold import fold_rest
    from plarv_sinks.export import export
    from plarv_sinks.replay import ReplayError

    folder = find_run(options.run)
    with contextlib.suppress(OSError):  # a folder that we may not write to is exported as it is
        fold_rest(folder)  # in which order ranks are merged is decided once, and written down
    bar = ProgressBar(f"export {folder.name}", sys.stderr)
    try:
        done = export(folder, options.output or folder / "export", tell=tell, progress=bar.show)
    except ReplayError as error:
        raise Complaint(str(error)) from error
    except ImportError as error:
        raise Complaint(str(error), 1) from error
    finally:
        bar.close()
    for table, rows in done.rows.items():
        sys.stdout.write(f"{done.folder / table}.parquet  {rows:,} rows\n")
    return 0


class ProgressBar:
    """A line that fills up on a terminal, once the work has taken a second; nothing elsewhere."""

    _WIDTH = 40

    def __init__(
        self, title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._title = title
        self._stream = stream
        self._visible = stream.isatty()
        self._started = clock()
        self._shown_at = 0.0

    def show(self, share: float) -> None:
        """Shows that `share` of the work, 0 to 1, is done; at most ten times a second."""
        now = self._clock()
        if not self._visible or now - self._started < 1.0 or now - self._shown_at < 0.1:
            return
        self._shown_at = now
        filled = round(self._WIDTH * min(1.0, max(0.0, share)))
        bar = "#" * filled + "." * (self._WIDTH - filled)
        self._stream.write(f"\r{self._title} [{bar}] {share:4.0%}")
        self._stream.flush()

    def close(self) -> None:
        """Clears the line."""
        if self._shown_at:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
