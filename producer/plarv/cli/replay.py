"""``argus replay FILE...``: judges recorded runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from plarv.cli.complaint import Complaint, tell
from plarv_schemas.events import LEVELS, Verdict

if TYPE_CHECKING:
    from plarv_processors.engine import Engine, EngineConfig
    from plarv_sinks.replay import Finding, RunSummary

__all__ = ["add_to", "run"]

_EPILOG = """columns: step, rank, loss, grad_norm, current_lr (or lr, learning_rate), val_loss,
step_time_ms (or step_ms), run_id, attempt, world_size and all others of Argus.step().
An empty cell is a missing value, nan is NaN. Without step, rows count from 0.

examples:
  argus replay losses.csv
  argus replay runs/*.csv --fail-on critical      exit code 3 where one went wrong
  argus replay .argus/runs/RUN --json | jq .message
  argus replay losses.csv --detector my_package.my_detector:MyDetector
"""


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "replay",
        help="judge recorded runs: CSV, JSON lines, Parquet, a journal, an export's folder",
        description="Folds recorded runs and prints the verdicts and actions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path)
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


def run(options: argparse.Namespace) -> int:
    """Replays every file; a file that cannot be read does not keep the others from being."""
    config = _engine_config(options)
    worst, failed = 0, False
    for number, path in enumerate(options.files):
        replaying = _FileReplay(path, config, as_json=options.json)
        replaying.fold()
        if not options.json:
            replaying.print_tables(first=number == 0, with_path=len(options.files) > 1)
        worst = max(worst, replaying.worst)
        failed = failed or replaying.failed
    if failed:
        return 2
    return 3 if options.fail_on and worst >= LEVELS.index(options.fail_on) else 0


class _FileReplay:
    """One file: its runs, each folded by an engine of its own."""

    def __init__(self, path: Path, config: EngineConfig, *, as_json: bool) -> None:
        self.path = path
        self.worst = 0  # index into LEVELS
        self.failed = False
        self._config = config
        self._as_json = as_json
        self._runs: Dict[str, Tuple[Engine, RunSummary, List[Finding]]] = {}

    def fold(self) -> None:
        from plarv_sinks.replay import ReplayError, RunSummary, engine_for, read_events, replay

        try:
            for event in read_events(self.path, tell):
                run = self._runs.get(event.run_id)
                if run is None:
                    engine = engine_for(self.path, self._config, tell)
                    run = self._runs[event.run_id] = (engine, RunSummary(event.run_id), [])
                for finding in replay((event,), run[0], run[1]):
                    self._take(finding, run[2])
        except ReplayError as error:
            tell(str(error))
            self.failed = True
        for engine, _, _ in self._runs.values():
            for name, reason in engine.faults.items():
                tell(f"{self.path}: detector {name} raised and was left out: {reason}")

    def print_tables(self, *, first: bool, with_path: bool) -> None:
        from plarv_sinks.findings_table import findings_table, summary_line, wants_colour

        colour = wants_colour(sys.stdout)
        for number, (_, summary, findings) in enumerate(self._runs.values()):
            if number or not first:
                sys.stdout.write("\n")
            if with_path:
                sys.stdout.write(f"{self.path}\n")
            for line in findings_table(findings, colour=colour):
                sys.stdout.write(line + "\n")
            sys.stdout.write(summary_line(summary) + "\n")

    def _take(self, finding: Finding, findings: List[Finding]) -> None:
        if isinstance(finding, Verdict):
            self.worst = max(self.worst, LEVELS.index(finding.level))
        if self._as_json:
            sys.stdout.write(json.dumps(finding.to_dict(), allow_nan=False) + "\n")
        else:
            findings.append(finding)


def _engine_config(options: argparse.Namespace) -> EngineConfig:
    from plarv_processors.detectors import load
    from plarv_processors.engine import EngineConfig

    sys.path.insert(0, "")  # a detector beside you is found, as with `python -m`
    try:
        extra = tuple(load(path) for path in options.detector)
    except ValueError as error:
        raise Complaint(str(error)) from error
    finally:
        sys.path.remove("")
    config = EngineConfig(mode=options.mode, extra=extra, without=tuple(options.without))
    unknown = _unknown(EngineConfig(extra=extra), options.without)
    if unknown is not None:
        raise Complaint(unknown)
    return config


def _unknown(config: EngineConfig, without: List[str]) -> Optional[str]:
    names = [cls.name for cls in config.classes()]
    for name in without:
        if name not in names:
            return f"--without {name}: no such detector; there are {', '.join(names)}"
    return None
