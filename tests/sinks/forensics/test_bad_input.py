"""What cannot be read is told, once a file; everything else is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

import pytest
from tests.processors.logs import log_of
from tests.sinks.forensics.recorded import DATE, keep, kept, steps_of

from plarv_schemas import arrow
from plarv_schemas.events import StepEvent
from plarv_sinks.forensics import Forensics, Run, open_store

pl = pytest.importorskip("polars")
pa: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")

TABLES = ("steps", "events", "verdicts", "actions", "runs")


def damage(location: Path, table: str, how: str) -> Path:
    """A file more in the folder of the table, of the run ``run`` where it is of one."""
    folder = location / f"table={table}/date={DATE}"
    folder = folder / "run_id=run" if table == "steps" else folder
    (whole,) = folder.glob("*.parquet")
    path = folder / "x-more.parquet"
    if how == "half written":
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        parquet.write_table(pa.table({"loss": [1.0], "run_id": ["run"]}), path)
    elif how == "newer":
        rows = parquet.read_table(whole, partitioning=None)
        metadata = {**rows.schema.metadata, b"argus.schema_version": b"99"}
        parquet.write_table(rows.replace_schema_metadata(metadata), path)
    else:
        rows = parquet.read_table(whole, partitioning=None)
        column = "step" if "step" in rows.schema.names else "num_steps"
        place = rows.schema.get_field_index(column)
        odd = pa.array(["many"] * rows.num_rows)
        metadata = rows.schema.metadata
        rows = rows.set_column(place, column, odd).replace_schema_metadata(metadata)
        parquet.write_table(rows, path)
    return path


def everything(store: Forensics) -> List[Any]:
    run: Run = store.run("run")
    return [
        store.runs().rows(), run.steps().rows(), run.events().rows(),
        run.verdicts()["id"].to_list(),
        run.actions()["id"].to_list(), run.timeline().rows(), len(list(store.store.events("run"))),
    ]  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("how", ["half written", "empty", "foreign", "newer", "wrong type"])
def test_a_file_that_cannot_be_read_costs_only_itself_and_is_told_once(
    table: str, how: str, tmp_path: Path
) -> None:
    keep(tmp_path, log_of("spike", 700))
    told: List[str] = []
    whole = everything(open_store(tmp_path, told.append))
    assert told == []
    path = damage(tmp_path, table, how)
    assert repr(everything(open_store(tmp_path, told.append))) == repr(whole)
    (line,) = told
    assert path.name in line
    assert "left out" in line
    if how == "newer":
        assert "upgrade" in line


def test_where_the_steps_are_lost_the_rest_of_the_story_is_told(tmp_path: Path) -> None:
    run = kept(tmp_path, log_of("spike", 700))
    whole = run.timeline().filter(pl.col("what") != "step")
    (tmp_path / f"table=steps/date={DATE}/run_id=run/0.parquet").write_bytes(b"PAR1")
    told: List[str] = []
    left = open_store(tmp_path, told.append).run("run")
    columns = ["ordinal", "what", "kind", "text"]
    assert left.timeline().select(columns).rows() == whole.select(columns).rows()
    assert len(told) == 1
    explained = left.explain(run.store.verdicts("run")[0])
    assert explained.recomputed is None
    assert "events before it are not in the store" in str(explained)
    assert "no step that is still stored" in explained._repr_html_()
    figure: Any = left.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_where_verdicts_are_lost_the_steps_are_there(tmp_path: Path) -> None:
    keep(tmp_path, log_of("spike", 700))
    (tmp_path / f"table=verdicts/date={DATE}/run.parquet").write_bytes(b"PAR1 and no end")
    told: List[str] = []
    store = open_store(tmp_path, told.append)
    assert store.runs()["worst_level"].to_list() == [None]
    assert store.run("run").steps().height == 700
    assert len(told) == 1


def test_columns_of_another_width_are_read_like_ours(tmp_path: Path) -> None:
    keep(tmp_path, steps_of([2.0, 1.5]))
    folder = tmp_path / f"table=steps/date={DATE}/run_id=run"
    rows = parquet.read_table(folder / "0.parquet", partitioning=None)
    place = rows.schema.get_field_index("loss")
    narrow = rows.set_column(place, "loss", rows.column("loss").cast(pa.float32()))
    narrow = narrow.set_column(
        rows.schema.get_field_index("ordinal"), "ordinal", pa.array([3, 4], pa.int32())
    )
    parquet.write_table(narrow.replace_schema_metadata(rows.schema.metadata), folder / "1.parquet")
    run = open_store(tmp_path).run("run")
    assert run.steps()["loss"].to_list() == [2.0, 1.5, 2.0, 1.5]


def test_a_control_event_whose_data_are_no_object_still_has_a_line(tmp_path: Path) -> None:
    keep(tmp_path, steps_of([2.0]))
    path = tmp_path / f"table=events/date={DATE}/run.parquet"
    rows = parquet.read_table(path, partitioning=None)
    place = rows.schema.get_field_index("data")
    for text in ("[1, 2]", "{", "7"):
        schema = arrow.file_schema("events")
        odd = rows.set_column(place, rows.schema.field(place), pa.array([text])).cast(schema)
        parquet.write_table(odd, path)
        told: List[str] = []
        run = open_store(tmp_path, told.append).run("run")
        assert run.timeline()["text"][0] == "rank 0 starts"
        assert [type(event) for event in run.store.events("run")] == [StepEvent]
        assert len(told) == 1
        assert "a row of events is left out" in told[0]
