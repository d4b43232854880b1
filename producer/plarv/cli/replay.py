"""``argus replay``: judges recorded runs again, from files, a fleet's log, or a store."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Generator, List, Tuple

from plarv.cli.complaint import Complaint, tell
from plarv.cli.replay_store import names_in, replay_store
from plarv.cli.replayed import Replayed
from plarv_schemas.events import LEVELS

if TYPE_CHECKING:
    from plarv_processors.engine import EngineConfig

__all__ = ["add_to", "columns_in", "run"]

_ADDRESS = re.compile(r"^[^/]+:\d+$")  # of brokers, without the word that says so

_EPILOG = """columns: step, rank, loss, grad_norm, current_lr (or lr, learning_rate), val_loss,
step_time_ms (or step_ms), run_id, attempt, world_size and all others of Argus.step().
An empty cell is a missing value, nan is NaN. Without step, rows count from 0.

examples:
  argus replay losses.csv
  argus replay runs/*.csv --fail-on critical      exit code 3 where one went wrong
  argus replay .argus/runs/RUN --json | jq .message
  argus replay output/trainer_state.json          also a folder: Hugging Face, TensorBoard, W&B,
  argus replay runs/ --column loss=train/xent     MLflow, Lightning; see docs/importers.md
  argus replay losses.csv --detector my_package.my_detector:MyDetector
  argus replay --from kafka://broker:9092 --runs RUN --compare
  argus replay --from .argus/store --since 30d --detector my_package.my_detector:MyDetector
                                  history through a new detector, beside what was recorded
"""


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "replay",
        help="judge recorded runs: tables, journals, exports, what other loggers wrote",
        description="Folds recorded runs and prints the verdicts and actions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", metavar="FILE", type=Path)
    _add_log_options(parser)
    _add_import_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--detector",
        action="append",
        default=[],
        metavar="PACKAGE:CLASS",
        help="add a detector of your own",
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="NAME", help="leave a detector out"
    )
    parser.add_argument("--only", metavar="NAME,...", help="these detectors alone")
    parser.add_argument(
        "--fail-on",
        choices=LEVELS[1:],
        help="exit with 3 where a verdict is of this level or above",
    )
    parser.add_argument(
        "--mode",
        choices=("MANUAL", "AUTO"),
        default="MANUAL",
        help="of the policy, where the recording does not say (default: MANUAL)",
    )
    parser.set_defaults(command=run)


def _add_log_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        metavar="kafka://HOST:PORT|STORE",
        help="a fleet's log, or a store of Parquet files (path or URI), instead of files",
    )
    parser.add_argument("--runs", metavar="RUN,...", help="of that log or store (default: all)")
    parser.add_argument(
        "--since", metavar="DATE|DAYS", help="of a store: runs heard of since, as 2026-11-01 or 30d"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="of a store: processes (default: one a core)"
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="of a store: CSV or JSON with run_id and label, for precision and recall",
    )  # fmt: skip
    parser.add_argument(
        "--compare",
        action="store_true",
        help="with what was recorded, whole records; exit with 1 where they differ",
    )


def _add_import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="huggingface, mlflow, wandb, lightning, tensorboard or plain (default: by content)",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="the log's name of a column, such as loss=train/total_loss",
    )
    parser.add_argument(
        "--run",
        dest="names",
        action="append",
        default=[],
        metavar="NAME",
        help="of a file's or folder's several runs, this one",
    )


def run(options: argparse.Namespace) -> int:
    """Replays every file; a file that cannot be read does not keep the others from being."""
    _check(options)
    with _modules_beside_you():
        if options.source is None:
            worst, failed = _replay_files(options, _engine_config(options))
            if failed:
                return 2
        elif options.source.startswith("kafka://"):
            from plarv.cli.replay_log import replay_log

            worst, differs = replay_log(options, _engine_config(options))
            if differs:
                return 1
        else:
            worst, differs = replay_store(options, _engine_config(options))
            if differs:
                return 1
    return 3 if options.fail_on and worst >= LEVELS.index(options.fail_on) else 0


def _check(options: argparse.Namespace) -> None:
    """Complains of options that would do nothing."""
    if bool(options.files) == bool(options.source):
        raise Complaint("name files to replay, or a fleet's log or a store with --from")
    if not options.source and (options.runs is not None or options.compare):
        raise Complaint("--runs and --compare go with --from")
    if options.source and (options.format or options.column or options.names):
        raise Complaint("--format, --column and --run go with files, not with --from")
    if options.source and _ADDRESS.match(options.source):
        raise Complaint(f"--from is kafka://HOST:PORT or a store's path, not {options.source!r}")
    if options.source is None or options.source.startswith("kafka://"):
        for name in ("since", "jobs", "labels"):
            if getattr(options, name) is not None:
                raise Complaint(f"--{name} goes with --from STORE")
    if options.jobs is not None and options.jobs < 1:
        raise Complaint(f"--jobs is at least 1, not {options.jobs}")


@contextmanager
def _modules_beside_you() -> Generator[None, None, None]:
    """A detector in the working folder is found, as with `python -m`."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def _replay_files(options: argparse.Namespace, config: EngineConfig) -> Tuple[int, bool]:
    """The worst level found, and whether a file could not be read."""
    worst, failed = 0, False
    for number, path in enumerate(options.files):
        replayed, whole = _fold_file(path, config, options)
        if not options.json:
            title = str(path) if len(options.files) > 1 else ""
            replayed.print_tables(first=number == 0, title=title)
        worst = max(worst, replayed.worst)
        failed = failed or not whole
    return worst, failed


def _fold_file(
    path: Path, config: EngineConfig, options: argparse.Namespace
) -> Tuple[Replayed, bool]:
    """One file's runs, each folded by an engine of its own, and whether all of it was read."""
    from plarv_sinks.replay import ReplayError, engine_for, read_events

    whole = True
    columns = columns_in(options.column)
    replayed = Replayed(lambda _: engine_for(path, config, tell), as_json=options.json)
    try:
        for event in read_events(
            path, tell, format=options.format, columns=columns, runs=options.names
        ):
            replayed.take(event)
    except ReplayError as error:
        tell(str(error))
        whole = False
    replayed.tell_faults(str(path))
    return replayed, whole


def columns_in(given: List[str]) -> Dict[str, str]:
    """Our column -> the log's, of options OURS=THEIRS. Complaint: one is not."""
    pairs = [text.partition("=") for text in given]
    for (ours, equals, theirs), text in zip(pairs, given):
        if not (ours and equals and theirs):
            raise Complaint(f"--column {text}: write OURS=THEIRS, such as loss=train/total_loss")
    return {ours.strip(): theirs for ours, _, theirs in pairs}


def _engine_config(options: argparse.Namespace) -> EngineConfig:
    from plarv_processors.detectors import load
    from plarv_processors.engine import EngineConfig

    try:
        extra = tuple(load(path) for path in options.detector)
    except ValueError as error:
        raise Complaint(str(error)) from error
    names = [cls.name for cls in EngineConfig(extra=extra).classes()]
    only = names_in(options.only)
    for option, given in (("--without", options.without), ("--only", only)):
        for name in given:
            if name not in names:
                raise Complaint(f"{option} {name}: no such detector; there are {', '.join(names)}")
    without = [*options.without, *[name for name in names if only and name not in only]]
    return EngineConfig(mode=options.mode, extra=extra, without=tuple(without))
