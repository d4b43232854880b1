"""``argus report RUN``: what happened in a run, as one HTML file."""

from __future__ import annotations

import argparse
import json
import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plarv import __version__
from plarv.archiving import store_location
from plarv.cli.complaint import Complaint, tell
from plarv.cli.run_folders import find_run

if TYPE_CHECKING:
    from plarv_sinks.report.source import Recorded

__all__ = ["add_to", "run"]

_EPILOG = """examples:
  argus report .argus/runs/RUN                  writes RUN.html
  argus report RUN --output report.html --open yes
  argus report RUN --store s3://bucket/argus
  argus report RUN --json | jq .first_cause.sentence
"""


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "report",
        help="what happened in a run, as one HTML file",
        description="Writes what happened in a run, when and where it began, as one HTML file that "
        "loads nothing from anywhere.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="id, or the run's folder")
    parser.add_argument(
        "--store",
        metavar="STORE",
        help="read it from a store (default, where this machine has no such run: ARGUS_STORE, or "
        "store in ARGUS_DIR)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to (default: RUN.html, here)"
    )
    parser.add_argument(
        "--open", choices=("yes", "no"), default="no", help="show it in a browser (default: no)"
    )
    parser.add_argument("--json", action="store_true", help="print the facts, write no file")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Writes the file and prints its name, or prints the facts."""
    from plarv_sinks.replay import ReplayError
    from plarv_sinks.report.page import page
    from plarv_sinks.report.story import read_story

    try:
        story = read_story(_recorded(options))
    except ReplayError as error:
        raise Complaint(str(error)) from error
    if options.json:
        sys.stdout.write(json.dumps(story.to_dict(), allow_nan=False) + "\n")
        return 0
    path: Path = options.output or Path(f"{_file_name(story.recorded.run_id)}.html")
    _write(path, page(story, f"argus {__version__}"))
    sys.stdout.write(f"{path}\n")
    if options.open == "yes" and not webbrowser.open(path.resolve().as_uri()):
        tell("no browser was found")
    return 0


def _recorded(options: argparse.Namespace) -> Recorded:
    """The run on this machine, unless a store is named; else in the default store."""
    from plarv_sinks.replay import ReplayError
    from plarv_sinks.report.source import of_folder, of_store

    if options.store is not None:
        return of_store(options.store, options.run, tell)
    try:
        folder = find_run(options.run)
    except Complaint as complaint:
        store = store_location()
        if not (store and _is_in(store)):
            raise
        try:
            return of_store(store, options.run, tell)
        except ReplayError:
            raise complaint from None
    return of_folder(folder, tell)


def _is_in(store: str) -> bool:
    """Whether there may be such a store: a folder that is there, or a URI."""
    return "://" in store or Path(store).is_dir()


def _file_name(run_id: str) -> str:
    """The run's id as a file's name: no other folder, whatever the id holds."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in run_id)
    return kept.strip(".")[:120] or "run"


def _write(path: Path, text: str) -> None:
    """The whole file or none: what was there before stays until the new one is complete."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
