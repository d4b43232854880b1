"""``argus runs`` and ``argus status``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from plarv.cli.complaint import Complaint
from plarv.cli.run_folders import RunState, find_run, run_folders, runs_root, state_of
from plarv.cli.table import aligned
from plarv_schemas.events import Action, Verdict
from plarv_schemas.records import VERDICTS_FILE, paused_by, read_findings, read_lines

__all__ = ["add_to"]

_MAX_FINDINGS = 50  # that `status` shows; the files beside the journal have all of them


def add_to(commands: Any) -> None:
    """Adds the commands."""
    parser = commands.add_parser(
        "status",
        help="where a run stands: its last step, verdicts and actions",
        description="Shows where a run stands and what its engine has found, as recorded.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="id or folder (default: the newest)")
    parser.set_defaults(command=_status)
    parser = commands.add_parser(
        "runs", help="the runs in ARGUS_DIR", description="Lists the runs in ARGUS_DIR."
    )
    parser.set_defaults(command=_runs)


def _runs(options: argparse.Namespace) -> int:
    rows: List[Tuple[str, ...]] = [("run", "started", "step", "loss", "verdicts", "size", "state")]
    now_ns = time.time_ns()
    for folder in run_folders():
        state, loss = _state(folder), ""
        last = state.last_step
        if last is not None and last.loss is not None:
            loss = f"{last.loss:.4g}"
        verdicts = sum(1 for _ in read_lines(folder / VERDICTS_FILE))
        rows.append(
            (
                folder.name,
                _local_time(state.started_ns),
                "" if last is None else f"{last.step:,}",
                loss,
                str(verdicts),
                f"{state.size_bytes / 2**20:,.0f} MiB",
                state.progress_text(now_ns),
            )
        )
    if len(rows) == 1:
        sys.stderr.write(f"argus: no runs in {runs_root()}\n")
        return 0
    for line in aligned(rows):
        sys.stdout.write(line + "\n")
    return 0


def _status(options: argparse.Namespace) -> int:
    from plarv_sinks.findings_table import findings_table, wants_colour

    if options.run is None:
        folders = run_folders()
        if not folders:
            raise Complaint(f"no runs in {runs_root()}")
        folder = folders[0]
    else:
        folder = find_run(options.run)
    findings = sorted(read_findings(folder), key=lambda finding: finding.ordinal)
    for line in aligned(list(_facts(_state(folder), findings))):
        sys.stdout.write(line + "\n")
    shown = findings[-_MAX_FINDINGS:]
    if shown:
        earlier = len(findings) - len(shown)
        sys.stdout.write(f"\n({earlier:,} earlier ones)\n" if earlier else "\n")
    for line in findings_table(shown, colour=wants_colour(sys.stdout)):
        sys.stdout.write(line + "\n")
    return 0


def _facts(
    state: RunState, findings: Sequence[Union[Verdict, Action]]
) -> Iterator[Tuple[str, str]]:
    from plarv_sinks.archive import read_quality

    yield "run", state.folder.name
    yield "folder", str(state.folder)
    yield "state", state.progress_text(time.time_ns())
    pause = paused_by(state.folder)
    if pause is not None:
        lift = f"lift it with `argus resume {state.folder.name}`"
        yield "paused", f"at step {pause.step:,}: {pause.reason} ({lift})"
    yield "started", _local_time(state.started_ns)
    yield "sessions", f"{state.num_sessions} of {state.num_ranks} ranks"
    last = state.last_step
    if last is not None:
        values = [("loss", last.loss), ("grad norm", last.grad_norm), ("lr", last.current_lr)]
        told = [f"{name} {value:.4g}" for name, value in values if value is not None]
        yield "step", ", ".join([f"{last.step:,}", *told])
    quality = read_quality(state.folder)
    if quality is not None and quality.total is not None:
        yield "data", f"quality {quality.total:.2f} of 1 (ADQI): {quality.sentence}"
    for verdict in _open_verdicts(findings):
        since = f"{verdict.level} since step {verdict.onset_step:,}"
        yield "open", f"{verdict.detector}/{verdict.kind}, {since}: {verdict.message}"


def _open_verdicts(findings: Sequence[Union[Verdict, Action]]) -> List[Verdict]:
    """Of the last attempt, what has not been resolved."""
    attempt = max((finding.attempt for finding in findings), default=0)
    found: Dict[Tuple[str, Optional[int]], Verdict] = {}
    for finding in findings:
        if isinstance(finding, Verdict) and finding.attempt == attempt:
            place = (finding.detector, finding.rank)
            found.pop(place, None)
            if finding.state != "resolved":
                found[place] = finding
    return list(found.values())


def _state(folder: Path) -> RunState:
    try:
        return state_of(folder)
    except ValueError as error:
        raise Complaint(f"{folder}: {error}") from error


def _local_time(utc_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(utc_ns * 1e-9)) if utc_ns else ""
