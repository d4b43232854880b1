"""A store at a URI: S3, as a server on this machine speaks it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Iterator

import pytest
from tests.sinks.stores import (
    STEPS,
    contents,
    findings_records,
    folded,
    named,
    packed,
    records_of,
    sink_into,
)

from plarv_sinks.compact import compact
from plarv_sinks.history import History, replay_run
from plarv_sinks.store import Store, StoreError

pytest.importorskip("pyarrow")
pytest.importorskip("polars")
pytest.importorskip("kafka")
boto3: Any = pytest.importorskip("boto3")
moto_server: Any = pytest.importorskip("moto.server")

SECRET = "not-to-be-told"


@pytest.fixture
def uri(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="argus")
    client.close()
    yield (
        f"s3://key:{SECRET}@argus/store?scheme=http&region=us-east-1"
        f"&endpoint_override=127.0.0.1:{port}"
    )
    server.stop()


def test_a_store_on_s3_is_written_compacted_read_and_replayed(uri: str, tmp_path: Path) -> None:
    runs = {name: named(name, name, 200) for name in ("fleet", "repeated_batch")}
    found = [each for events in runs.values() for each in folded(events)]
    log = {STEPS: records_of(packed(random.Random(1), runs)), **findings_records(found)}
    sink_into(tmp_path / "store", log)
    wanted = contents(Store(tmp_path / "store"))
    sink_into(uri, log, every=40)
    assert contents(Store(uri)) == wanted
    compact(uri, tell=print)
    store = Store(uri)
    assert contents(store) == wanted
    assert store.files.listed("fresh") == []
    rows = store.scan("steps").collect()
    assert rows.height == Store(tmp_path / "store").scan("steps").collect().height
    assert set(rows["run_id"]) == set(runs)
    assert replay_run(History(uri), "fleet").error == ""


def test_a_key_in_a_uri_is_not_told(uri: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store(uri).run_row("nobody")
    assert SECRET not in str(caught.value)
    assert "s3://***@argus/store" in str(caught.value)


def test_a_uri_that_nobody_can_open_is_an_error_of_one_line() -> None:
    with pytest.raises(StoreError, match="zork") as caught:
        Store("zork://bucket/store")
    assert "\n" not in str(caught.value)
