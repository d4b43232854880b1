"""Live equals replay, however a run's log is cut: polls, snapshots, segments that were removed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.integration.law import WITNESSED, Records, fold, live_records, replayed_records
from tests.integration.live import LiveRun, stream

from plarv_processors.engine import Engine
from plarv_processors.stored_fold import StoredFold, base_of
from plarv_schemas.journal_reader import segments_of
from plarv_schemas.run_log import read_run

PIECES = st.lists(
    st.tuples(st.integers(1, 700), st.sampled_from(["go on", "save", "save and reopen", "reopen"])),
    min_size=1,
    max_size=12,
)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of three attempts in two sessions, whose log nobody has folded yet."""
    place = tmp_path_factory.mktemp("pieces")
    ranks: int = request.param
    chance = random.Random(ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARGUS_DIR", str(place))
        for names in (("divergence", "dead"), ("oscillation",)):
            run = LiveRun(patch, ranks=ranks, mode="AUTO")
            for name in names:
                events = stream(name, 620)
                while events:
                    some = chance.randrange(1, 40)
                    for rank in run.ranks:  # each some steps ahead in turn
                        for event in events[:some]:
                            run.step(rank, event)
                    del events[:some]
            run.complete()
            for path in run.folder.iterdir():
                if path.is_file() and path.suffix not in (".journal", ".key"):
                    path.unlink()
        yield run.folder


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES)
def test_the_size_of_polls_and_the_place_of_snapshots_change_nothing(
    pieces: Any, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    stored, number, count = StoredFold(place, WITNESSED), 0, 1
    while count:
        limit, then = pieces[number % len(pieces)] if number < 40 else (700, "go on")
        count, _ = stored.advance(limit)
        number += 1
        if then.startswith("save"):
            stored.save()
        if then.endswith("reopen"):
            stored.close()
            stored = StoredFold(place, WITNESSED)
    stored.close()
    verdicts, actions = live_records(place)
    assert verdicts
    assert actions
    assert (verdicts, actions) == replayed_records(place, WITNESSED)


def test_an_engine_that_is_restored_between_any_two_events_goes_on_as_if_nothing_were(
    folder: Path,
) -> None:
    events = list(read_run(folder))
    whole = fold(Engine(), events)
    chance = random.Random(0)
    engine, begin = Engine(), 0
    parts: List[Records] = []
    while begin < len(events):
        end = begin + chance.randrange(1, 60)
        parts.append(fold(engine, events[begin:end]))
        snapshot, engine = engine.snapshot(), Engine()
        engine.restore(snapshot)
        begin = end
    assert whole == ([v for part in parts for v in part[0]], [a for part in parts for a in part[1]])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_old_segments_were_removed_replays_from_where_its_log_begins(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_JOURNAL_MAX_MB", str(4 * ranks))
    heavy = tuple([0.5] * 500)  # 4 KB a step, so that a segment of 1 MB holds some 250
    for _ in range(2):
        run = LiveRun(monkeypatch, ranks=ranks)
        for seed in range(4):
            for event in stream("divergence", 620, seed):
                step = event.step + 620 * seed
                run.feed([event._replace(step=step, sample_entropies=heavy)])
                if step % 100 == 0:  # a loop quicker than the disk would keep steps in memory
                    run.catch_up()
        run.complete()
    files = [file.segment for session in segments_of(run.folder).values() for file in session]
    assert 0 not in files
    engine = Engine()
    begins = base_of(run.folder, engine)
    assert begins is not None
    events_left = list(read_run(run.folder))
    verdicts, actions = live_records(run.folder)
    later = [record for record in verdicts if record["ordinal"] > begins]
    assert 0 < len(later) < len(verdicts)
    assert fold(engine, events_left) == (
        later, [record for record in actions if record["ordinal"] > begins]
    )  # fmt: skip
