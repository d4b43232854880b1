"""A store is read with one line by what people have: polars, DuckDB, pandas."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from tests.processors.logs import log_of
from tests.sinks.forensics.recorded import as_dict, keep

from plarv_schemas.arrow_columns import TableName
from plarv_sinks.store import Store

pytest.importorskip("pyarrow")

Rows = List[Dict[str, Any]]
RUNS = ("one", "a/b c%")  # the second has a folder whose name is quoted
TABLES: Tuple[TableName, ...] = ("steps", "events", "verdicts", "actions", "runs")


def read_polars(folder: Path) -> Rows:
    pl = pytest.importorskip("polars")
    rows: Rows = pl.scan_parquet(str(folder)).collect().to_dicts()
    return rows


def read_duckdb(folder: Path) -> Rows:
    duckdb: Any = pytest.importorskip("duckdb")
    found = duckdb.sql(
        f"select * from read_parquet('{folder}/**/*.parquet', hive_partitioning=true)"
    )
    return [dict(zip(found.columns, row)) for row in found.fetchall()]


def read_pandas(folder: Path) -> Rows:
    pd: Any = pytest.importorskip("pandas")
    rows: Rows = pd.read_parquet(str(folder)).to_dict("records")
    return rows


READERS: Dict[str, Callable[[Path], Rows]] = {
    "polars": read_polars,
    "duckdb": read_duckdb,
    "pandas": read_pandas,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    place = tmp_path_factory.mktemp("store")
    for run_id in RUNS:
        keep(place, [each._replace(run_id=run_id) for each in log_of("explosion", 700)])
    return Store(place)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("table", TABLES)
def test_one_line_reads_every_row_of_a_table(reader: str, table: TableName, store: Store) -> None:
    pytest.importorskip("polars")
    rows = READERS[reader](Path(store.location) / f"table={table}")
    assert {row["run_id"] for row in rows} == set(RUNS)
    for run_id in RUNS:
        mine = [row for row in rows if row["run_id"] == run_id]
        if table == "runs":
            assert [row["num_steps"] for row in mine] == [700]
            assert [row["status"] for row in mine] == ["completed"]
            continue
        wanted = store.frame(table, run_id)
        assert len(mine) == wanted.height > 0
        mine.sort(key=lambda row: int(row["ordinal"]))
        names = {"steps": ("step", "loss", "grad_norm"), "events": ("kind", "data")}
        for name in names.get(table, ("step", "id")):
            assert sorted(map(str, (row[name] for row in mine))) == sorted(
                map(str, wanted[name].to_list())
            )


@pytest.mark.parametrize("reader", READERS)
def test_maps_and_lists_of_records_arrive_whole(reader: str, store: Store) -> None:
    verdicts = {found.id: found for found in store.verdicts("one")}
    for row in READERS[reader](Path(store.location) / "table=verdicts"):
        if row["run_id"] == "one":
            assert as_dict(row["evidence"]) == dict(verdicts[row["id"]].evidence)
    actions = {found.id: found for found in store.actions("one")}
    for row in READERS[reader](Path(store.location) / "table=actions"):
        if row["run_id"] == "one":
            (session,) = row["sessions"]
            assert tuple(session.values()) == actions[row["id"]].sessions[0]
            assert tuple(row["verdict_ids"]) == actions[row["id"]].verdict_ids
