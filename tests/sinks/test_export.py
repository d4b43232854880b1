"""A run's folder becomes four Parquet files, whole or not at all; they replay as the run does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import pytest
from tests.sinks.stores import journal, losses

from plarv_processors.engine import EngineConfig
from plarv_processors.stored_fold import StoredFold
from plarv_schemas import arrow
from plarv_schemas.arrow_columns import RUN_TABLES
from plarv_schemas.events import Verdict
from plarv_schemas.journal_writer import JournalWriter
from plarv_sinks import export as export_module
from plarv_sinks.export import export
from plarv_sinks.replay import ReplayError, engine_for, read_events, replay

parquet: Any = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "run"
    journal(folder, "0", losses(400, spike_at=300))
    journal(folder, "1", losses(400, spike_at=100), first_step=200)
    return folder


def rows(folder: Path, table: str) -> List[Dict[str, Any]]:
    found: List[Dict[str, Any]] = parquet.read_table(folder / f"{table}.parquet").to_pylist()
    return found


def findings(path: Path) -> List[Dict[str, Any]]:
    """What a replay of the run, or of its export, finds."""
    told: List[str] = []
    engine = engine_for(path, EngineConfig(), told.append)
    return [finding.to_dict() for finding in replay(read_events(path, told.append), engine)]


def test_each_event_is_there_with_its_place_in_the_log(run_dir: Path, tmp_path: Path) -> None:
    told: List[str] = []
    done = export(run_dir, tmp_path / "out", tell=told.append)
    steps, events = rows(tmp_path / "out", "steps"), rows(tmp_path / "out", "events")
    assert done.rows["steps"] == len(steps) == 800
    assert [event["kind"] for event in events] == ["session_started", "session_finished"] * 2
    assert json.loads(events[0]["data"])["mode"] == "AUTO"
    places = [(row["ordinal"], row["session"], row["record"]) for row in (*steps, *events)]
    assert sorted(ordinal for ordinal, _, _ in places) == list(range(804))
    assert len(set(places)) == 804
    assert [row["attempt"] for row in steps] == [1] * 400 + [2] * 400
    assert steps[0]["sample_losses"] == [2.0, 2.0]
    assert steps[1]["sample_losses"] is None
    assert told == []


def test_an_export_replays_to_the_verdicts_and_actions_of_the_run(
    run_dir: Path, tmp_path: Path
) -> None:
    export(run_dir, tmp_path / "out", tell=print)
    of_run, of_export = findings(run_dir), findings(tmp_path / "out")
    assert of_run == of_export
    verdicts = [found for found in of_run if found["type"] == "verdict"]
    assert len(verdicts) >= 3
    table = parquet.read_table(tmp_path / "out" / "verdicts.parquet").to_batches()
    stored = [verdict.to_dict() for batch in table for verdict in arrow.decode_verdicts(batch)]
    assert stored == verdicts
    table = parquet.read_table(tmp_path / "out" / "actions.parquet").to_batches()
    stored = [action.to_dict() for batch in table for action in arrow.decode_actions(batch)]
    assert stored == [found for found in of_run if found["type"] == "action"]
    assert [row["id"] for row in rows(tmp_path / "out", "verdicts")] == [
        verdict["id"] for verdict in verdicts
    ]


def test_a_detector_that_was_left_out_is_not_called_when_the_export_is_replayed(
    run_dir: Path, tmp_path: Path
) -> None:
    writer = JournalWriter(
        run_dir, run_id="run", session="f" * 16, rank=-1, world_size=0, segment_bytes=1 << 14
    )
    note = {"detector": "loss_spike", "ordinal": 50}  # it comes long after what it is about
    assert writer.control("detector_left_out", step=None, rank=None, data=note)
    writer.close()
    exported = export(run_dir, tmp_path / "out", tell=print).folder
    engine = engine_for(exported, EngineConfig(), print)
    found = {
        f.detector for f in replay(read_events(exported, print), engine) if isinstance(f, Verdict)
    }
    assert found
    assert "loss_spike" not in found


def test_steps_alone_replay_too_and_verdicts_alone_are_turned_away(
    run_dir: Path, tmp_path: Path
) -> None:
    export(run_dir, tmp_path / "out", tell=print)
    assert len(list(read_events(tmp_path / "out" / "steps.parquet", print))) == 800
    with pytest.raises(ReplayError, match="holds verdicts, not steps"):
        list(read_events(tmp_path / "out" / "verdicts.parquet", print))


def test_small_row_groups_change_nothing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run_dir, tmp_path / "whole", tell=print)
    monkeypatch.setattr(export_module, "_GROUP_VALUES", 1000)
    export(run_dir, tmp_path / "parts", tell=print)
    assert parquet.ParquetFile(tmp_path / "parts" / "steps.parquet").num_row_groups > 10
    for table in RUN_TABLES:
        assert rows(tmp_path / "whole", table) == rows(tmp_path / "parts", table)


def test_every_file_has_the_tables_fixed_columns_and_version(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "out", tell=print)
    for table in RUN_TABLES:
        schema = parquet.read_schema(tmp_path / "out" / f"{table}.parquet")
        assert schema.equals(arrow.file_schema(table))
        assert arrow.table_of(schema) == table


def test_a_second_export_replaces_the_first(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, tmp_path / "out", tell=print)
    before = findings(tmp_path / "out")
    export(run_dir, tmp_path / "out", tell=print)
    assert findings(tmp_path / "out") == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{table}.parquet" for table in RUN_TABLES
    )


def test_an_export_that_fails_leaves_nothing_behind(run_dir: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "out" / "steps.parquet"
    in_the_way.mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        export(run_dir, tmp_path / "out", tell=print)
    assert list((tmp_path / "out").iterdir()) == [in_the_way]


def test_a_folder_without_a_journal_is_turned_away(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="no journal in it"):
        export(tmp_path, tmp_path / "out", tell=print)
    assert not (tmp_path / "out").exists()


def test_progress_goes_up_to_what_was_read(run_dir: Path, tmp_path: Path) -> None:
    shares: List[float] = []
    export(run_dir, tmp_path / "out", tell=print, progress=shares.append)
    assert shares == sorted(shares)
    assert 0.5 < shares[-1] <= 1.0


def test_where_old_segments_were_removed_the_export_begins_there_and_replays_to_the_rest(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    fold = StoredFold(run_dir)
    live: List[Dict[str, Any]] = []
    for session, first_step in (("0", 0), ("1", 400)):
        journal(run_dir, session, losses(600, spike_at=500), first_step)
        fold_all(fold, live)
        if session == "0":
            assert fold.trim() > 0
    fold.close()
    told: List[str] = []
    export(run_dir, tmp_path / "out", tell=told.append)
    first = rows(tmp_path / "out", "events")[0]["ordinal"]
    assert first == 602
    assert rows(tmp_path / "out", "steps")[0]["ordinal"] == 603
    assert f"steps begin with the event of ordinal {first}" in told[0]
    assert [row["id"] for row in rows(tmp_path / "out", "verdicts")] == [
        found["id"] for found in live if found["type"] == "verdict"
    ]
    rest = [found for found in live if found["ordinal"] >= first]
    assert findings(tmp_path / "out") == findings(run_dir) == rest
    assert 0 < len(rest) < len(live)


def fold_all(fold: StoredFold, live: List[Dict[str, Any]]) -> None:
    while True:
        count, found = fold.advance(100)
        live += [finding.to_dict() for finding in found]
        if count == 0:
            return
