"""``argus replay --from kafka://HOST:PORT``: runs from a fleet's log, and ``--compare``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, List, Sequence, Tuple

from plarv.cli.brokers import Fleet, fleet_of, told
from plarv.cli.complaint import Complaint, tell
from plarv.cli.replay_store import names_in
from plarv.cli.replayed import Replayed
from plarv_schemas.events import Verdict

if TYPE_CHECKING:
    from plarv_processors.engine import EngineConfig
    from plarv_sinks.kafka_source import Difference, FleetLog
    from plarv_sinks.replay import Finding

__all__ = ["replay_log"]

_SHOWN = 10  # differences of a kind and run


def replay_log(options: argparse.Namespace, config: EngineConfig) -> Tuple[int, bool]:
    """Replays runs from the log: the worst level found, and whether something was wrong.

    A partition is folded at a time, and its engines are let go of before the next.
    """
    from plarv_sinks.kafka_source import open_log

    fleet = fleet_of(argparse.Namespace(brokers=options.source))
    runs = None if options.runs is None else names_in(options.runs)
    if runs == []:
        raise Complaint("--runs names no run")
    worst, wrong, first = 0, False, True
    with told(), open_log(fleet.connection, fleet.topics, runs, tell) as log:
        for partition in log.partitions():
            replayed = _fold(log, partition, config, options)
            if replayed.runs:
                replayed.tell_faults(f"{fleet.topics.steps}, partition {partition}")
                if options.compare:
                    wrong = _compare(fleet, log, replayed, options) or wrong
                elif not options.json:
                    replayed.print_tables(first=first)
                first = False
            worst = max(worst, replayed.worst)
    if log.poison:
        what = "message that" if log.poison == 1 else "messages that"
        tell(
            f"{fleet.topics.steps}: left out {log.poison:,} {what} cannot be read; `argus dlq` "
            "lists what the workers could not"
        )
    missing = [run for run in runs or () if run not in log.found]
    if missing:
        where = f"{fleet.topics.steps} at {fleet.where}"
        raise Complaint(f"no event of {', '.join(missing)} in {where}")
    if not log.found:
        raise Complaint(f"{fleet.topics.steps} at {fleet.where} holds no run")
    return worst, wrong


def _fold(
    log: FleetLog, partition: int, config: EngineConfig, options: argparse.Namespace
) -> Replayed:
    replayed = Replayed(
        lambda run_id: log.engine_for(run_id, config),
        as_json=options.json and not options.compare,
        keep=options.compare,
    )
    for event in log.events(partition):
        replayed.take(event)
    return replayed


def _compare(fleet: Fleet, log: FleetLog, replayed: Replayed, options: argparse.Namespace) -> bool:
    """Prints how the replayed runs compare with what was recorded; whether any differs."""
    from plarv_sinks.kafka_source import compare, read_findings

    recorded = read_findings(fleet.connection, fleet.topics, list(replayed.runs), log.left_out)
    differs = False
    for run_id, run in replayed.runs.items():
        difference = compare(run_id, run.findings, recorded[run_id])
        differs = differs or not difference.identical
        lines = [_json_line(difference)] if options.json else _lines(difference)
        for line in lines:
            sys.stdout.write(line + "\n")
    return differs


def _lines(difference: Difference) -> List[str]:
    same = (
        f"{_count(difference.num_verdicts, 'verdict')}, {_count(difference.num_actions, 'action')}"
    )
    if difference.identical:
        return [f"{difference.run_id}: identical: {same}"]
    lines = [f"{difference.run_id}: different ({same} are the same)"]
    if difference.only_replayed:
        lines.append(
            f"  only in the replay: {len(difference.only_replayed):,} (a worker may be behind)"
        )
        lines += _shown([_named(finding) for finding in difference.only_replayed])
    if difference.only_recorded:
        lines.append(f"  only recorded: {len(difference.only_recorded):,}")
        lines += _shown([_named(finding) for finding in difference.only_recorded])
    if difference.changed:
        lines.append(f"  replayed otherwise: {len(difference.changed):,}")
        lines += _shown([_change(ours, theirs) for ours, theirs in difference.changed])
    if difference.conflicts:
        lines.append(f"  recorded twice, and not the same: {len(difference.conflicts):,}")
        lines += _shown(difference.conflicts)
    return lines


def _json_line(difference: Difference) -> str:
    return json.dumps(
        {
            "run_id": difference.run_id,
            "identical": difference.identical,
            "verdicts": difference.num_verdicts,
            "actions": difference.num_actions,
            "only_replayed": [finding.to_dict() for finding in difference.only_replayed],
            "only_recorded": [finding.to_dict() for finding in difference.only_recorded],
            "changed": [
                {"replayed": ours.to_dict(), "recorded": theirs.to_dict()}
                for ours, theirs in difference.changed
            ],
            "conflicts": list(difference.conflicts),
        },
        allow_nan=False,
    )


def _named(finding: Finding) -> str:
    if isinstance(finding, Verdict):
        what = f"verdict {finding.detector}/{finding.kind} {finding.state}"
    else:
        what = f"action {finding.kind}"
    return f"{what} at step {finding.step:,} (ordinal {finding.ordinal:,}, {finding.id})"


def _change(ours: Finding, theirs: Finding) -> str:
    replayed, recorded = ours.to_dict(), theirs.to_dict()
    fields = [name for name in replayed if replayed[name] != recorded.get(name)]
    told_of = ", ".join(f"{name} {replayed[name]!r}, was {recorded[name]!r}" for name in fields)
    return f"{_named(ours)}: {told_of}"


def _shown(lines: Sequence[str]) -> List[str]:
    shown = [f"    {line}" for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"    and {len(lines) - _SHOWN:,} more")
    return shown


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
