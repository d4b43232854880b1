"""The command ``argus``. What it found goes to stdout, what it has to say to stderr.

Exit codes: 0 fine, 1 failure, 2 a call or input that cannot work, 3 findings at or above --fail-on.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from typing import Callable, Optional, Sequence

from plarv import __version__
from plarv.cli.complaint import Complaint, tell

__all__ = ["build_parser", "main"]

_COMMANDS = (  # each a module of this package, in the order in which they are listed
    "demo", "replay", "runs", "report", "orders", "export", "sink", "compact", "imports", "worker",
    "topics", "actions", "sync", "dead_letters", "keys",
)  # fmt: skip

_EXAMPLES = """examples:
  argus demo                            a run that goes wrong, alone and under Argus
  argus replay losses.csv               judge a curve that you have as a file
  argus replay .argus/runs/RUN --json   one JSON object a line, for other programs
  argus export .argus/runs/RUN          the journal as Parquet files
  argus report RUN                      what happened, as one HTML file
  argus status                          where the newest run stands
  argus resume RUN                      lift a pause; also: argus pause RUN, argus stop RUN
  argus replay --from kafka://HOST:PORT --runs RUN --compare
                                        judge a fleet's run again and compare
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command: its exit code. A reader that leaves early (``| head``) is no error."""
    parser = build_parser()
    _never_fail_on_a_letter()
    try:
        options = parser.parse_args(arguments)
        command: Optional[Callable[[argparse.Namespace], int]] = getattr(options, "command", None)
        if command is None:
            parser.print_help(sys.stderr)
            return 2
        code = command(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit: let it go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Complaint as complaint:
        tell(str(complaint))
        return complaint.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tell(f"{where}{error.strerror or error}")
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``command``, the function that runs it."""
    parser = argparse.ArgumentParser(
        prog="argus",
        description="Watches neural-network training: what was found, and what was done about it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"argus {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"plarv.cli.{name}").add_to(commands)
    return parser


def _never_fail_on_a_letter() -> None:
    """A terminal that cannot show a letter gets its escape instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
