"""``argus sink``: a fleet's topics, or runs of this machine, into a store of Parquet files."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Generator, List

from plarv.archiving import NO_STORE, store_location
from plarv.cli.brokers import add_broker_option, fleet_of, told
from plarv.cli.complaint import Complaint, tell
from plarv.cli.run_folders import find_run, run_folders, runs_root
from plarv_schemas.pyarrow_types import leave_pandas_out

if TYPE_CHECKING:
    from plarv_sinks.sink.service import Sink
    from plarv_sinks.store import Store

__all__ = ["add_store_option", "add_to", "store_of", "tidy"]

_STATUS_S = 60.0
_MANY_FILES = 50  # of the list of runs
_ENDING_S = 5.0  # a process that has just written its last event still holds the run

_EPILOG = """examples:
  argus sink                        a fleet's log, verdicts and actions (ARGUS_BROKERS), for ever
  argus sink --store s3://bucket/argus --brokers broker:9092
  argus sink RUN                    a run of this machine; --all: every run that has ended
"""


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "sink",
        help="keep runs as Parquet files",
        description="Writes events, verdicts and actions into a store of Parquet files, each once.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs of this machine, id or folder")
    parser.add_argument("--all", action="store_true", help="all runs in ARGUS_DIR")
    add_store_option(parser)
    add_broker_option(parser)
    parser.add_argument(
        "--group", help="of the sinks that share the work (default: PREFIX.sink, of the topics)"
    )
    parser.add_argument(
        "--flush-every", type=float, default=30.0, metavar="S",
        help="a row waits no longer for its file (default: 30)",
    )  # fmt: skip
    parser.set_defaults(command=_sink)


def add_store_option(parser: Any) -> None:
    """``--store``, for every command that reads or writes one."""
    parser.add_argument(
        "--store", metavar="PATH|URI", help="default: ARGUS_STORE, else `store` in ARGUS_DIR"
    )


def store_of(options: argparse.Namespace) -> str:
    """The store that ``--store`` or the settings name."""
    found: str = options.store or store_location()
    if not found:
        raise Complaint(f"ARGUS_STORE is {NO_STORE}: name a store with --store")
    return found


def _sink(options: argparse.Namespace) -> int:
    if options.all and options.runs:
        raise Complaint("name runs, or --all, not both")
    with told():
        leave_pandas_out()
        if options.all or options.runs:
            return _archive(options)
        return _serve(options)


def _archive(options: argparse.Namespace) -> int:
    from plarv_sinks.archive import archive
    from plarv_sinks.replay import ReplayError
    from plarv_sinks.store import Store

    if options.all:
        folders = run_folders()
        if not folders:
            raise Complaint(f"no runs in {runs_root()}")
    else:
        folders = [find_run(run) for run in options.runs]
    store = Store(store_of(options), tell, create=True)
    failed = False
    wait_s = 0.0 if options.all else _ENDING_S
    for number, folder in enumerate(folders, 1):
        try:
            done = archive(folder, store, tell=tell, wait_s=wait_s)
        except ReplayError as error:
            tell(str(error))
            failed = failed or not options.all  # of all runs, one may still be running
            continue
        sys.stdout.write(f"{done}\n")
        if number % _MANY_FILES == 0:
            tidy(store)
    tidy(store)
    return 1 if failed else 0


def tidy(store: Store) -> None:
    """Puts a local store's small files together once there are many: four come with every run."""
    from plarv_sinks.compact import compact
    from plarv_sinks.store import StoreError

    files = store.listed("runs") if store.files.is_local else []
    if len(files) - len({file.date for file in files}) > _MANY_FILES:
        with contextlib.suppress(StoreError):  # somebody else is at it
            compact(store.files.given, tell=tell)


def _serve(options: argparse.Namespace) -> int:
    from plarv_sinks.sink.service import Sink, SinkConfig
    from plarv_sinks.store import Store

    fleet = fleet_of(options)
    if not options.flush_every > 0:
        raise Complaint("--flush-every is a number of seconds above 0")
    store = Store(store_of(options), tell, create=True)
    config = SinkConfig(
        fleet.connection,
        fleet.topics,
        options.group or f"{fleet.topics.prefix}.sink",
        flush_s=options.flush_every,
    )
    sink = Sink(config, store, tell)
    tell(f"sink: {fleet.topics.steps} at {fleet.where} into {store.location}")
    with _stopping() as stop:
        reporter = threading.Thread(target=_report, args=(sink, stop), daemon=True)
        reporter.start()
        sink.run(stop)
    tell(_status(sink))
    return 0


@contextlib.contextmanager
def _stopping() -> Generator[threading.Event, None, None]:
    """An event that SIGTERM and Ctrl-C set; a second one ends the process at once."""
    stop = threading.Event()
    before: List[Any] = []

    def ask(number: int, _: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        tell("stopping: writing what waits")
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        before.append((number, signal.signal(number, ask)))
    try:
        yield stop
    finally:
        stop.set()
        for number, handler in before:
            signal.signal(number, handler)


def _report(sink: Sink, stop: threading.Event) -> None:
    """A line a minute while there is something to say."""
    said = ""
    while not stop.wait(_STATUS_S):
        line = _status(sink)
        if line != said:
            tell(f"{time.strftime('%H:%M:%S')} {line}")
            said = line


def _status(sink: Sink) -> str:
    counts = sink.counts
    line = (
        f"sink: {counts.rows:,} rows in {counts.files:,} files, {counts.waiting:,} waiting, "
        f"{counts.behind:,} messages behind"
    )
    if counts.copies:
        line += f", {counts.copies:,} that were there already"
    if counts.poison:
        line += f", {counts.poison:,} messages that cannot be read"
    return line
