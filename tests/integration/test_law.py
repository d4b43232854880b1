"""Live equals replay, at each boundary of one process: whole records, on real Argus objects."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import List

import pytest
from tests.integration.law import WITNESSED, live_records, replayed_records
from tests.integration.live import LiveRun, stream
from tests.processors.streams import FAULTY

import plarv.faults
from plarv.orders import order
from plarv_processors.stored_fold import StoredFold, fold_rest
from plarv_schemas.run_log import ORDER_FILE, read_run

DERIVED = ("snapshot", "base", "verdicts.jsonl", "actions.jsonl")
"""What the fold writes, in the order in which a copy must be made: what is derived comes first."""


@pytest.fixture(autouse=True)
def our_own_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plarv.faults, "RERAISE", True)


def holds(folder: Path) -> bool:
    """Whether the run's records are those of its replay; there must be some."""
    verdicts, actions = live_records(folder)
    assert verdicts
    assert (verdicts, actions) == replayed_records(folder)
    return True


@pytest.mark.parametrize("name", sorted(FAULTY))
def test_a_run_with_a_fault_got_live_what_its_replay_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = FAULTY[name][1]()
    run = LiveRun(monkeypatch, ranks=len(events[0].parts) or 1, mode="AUTO")
    run.feed(events)
    run.complete()
    fold_rest(run.folder)  # what did not fit into the exit
    verdicts, actions = live_records(run.folder)
    assert (verdicts, actions) == replayed_records(run.folder)
    assert verdicts or name == "straggler"  # the clock is a real one here, and no rank is slow


def test_attempts_of_one_run_are_each_judged_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt in range(3):
        run = LiveRun(monkeypatch, mode="MANUAL")
        run.feed(stream("divergence", seed=attempt))
        run.complete()
    assert holds(run.folder)
    assert {verdict["attempt"] for verdict in live_records(run.folder)[0]} == {1, 2, 3}


def test_a_run_whose_steps_go_back_goes_on_as_a_new_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = LiveRun(monkeypatch)
    for seed in range(3):
        run.feed(stream("divergence", seed=seed))
    run.complete()
    assert holds(run.folder)
    assert {verdict["attempt"] for verdict in live_records(run.folder)[0]} == {1, 2, 3}


@pytest.mark.parametrize("mode", ["MANUAL", "AUTO"])
def test_an_operators_orders_have_their_place_in_the_log(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LiveRun(monkeypatch, mode=mode)
    events = stream("divergence", 620)
    for kind in ("pause", "resume", "stop"):
        run.feed(events[:200])
        del events[:200]
        run.catch_up()
        order(run.ranks[0].run_id, kind, "Ada")
    run.feed(events)
    run.complete()
    assert holds(run.folder)
    ordered = [a["kind"] for a in live_records(run.folder)[1] if "operator" in a["parameters"]]
    assert ordered == ["PAUSE", "RESUME", "HALT"]


@pytest.mark.parametrize("seed", range(3))
def test_two_ranks_that_run_apart_are_merged_once_and_for_all(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    run = LiveRun(monkeypatch, ranks=2, mode="AUTO", behind_ns=10**10)
    waiting = [list(reversed(stream("divergence", seed=seed))) for _ in run.ranks]
    while any(waiting):
        rank = chance.randrange(2)
        for _ in range(min(chance.choice([1, 2, 7, 60]), len(waiting[rank]))):
            run.step(run.ranks[rank], waiting[rank].pop())
        if chance.random() < 0.2:
            run.catch_up()
    run.complete()
    fold_rest(run.folder)
    assert holds(run.folder)


@pytest.mark.parametrize("seed", range(8))
def test_folds_that_are_killed_one_after_the_other_write_what_one_would_have_written(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks train on; whoever folds them is killed now and then, and another takes over."""
    chance = random.Random(seed)
    run = LiveRun(monkeypatch, ranks=2, mode="AUTO", behind_ns=10**10, leads=False)
    waiting = [list(reversed(stream("divergence", 620, seed))) for _ in run.ranks]
    fold = StoredFold(run.folder, WITNESSED)
    is_saved = False  # whether what a kill could tear is in a snapshot
    while any(waiting):
        rank = chance.randrange(2)
        for _ in range(min(chance.choice([1, 2, 7, 60]), len(waiting[rank]))):
            run.step(run.ranks[rank], waiting[rank].pop())
        for _ in range(chance.randrange(4)):
            _, found = fold.advance(chance.choice([1, 8, 64]))
            is_saved = is_saved and not found
        happens = chance.random()
        if happens < 0.1:
            fold.save()
            is_saved = True
        elif happens < 0.3:
            fold.close()
            if not is_saved:
                tear(run.folder, chance)
            fold = StoredFold(run.folder, WITNESSED)
    run.complete()
    while fold.advance(64)[0]:
        pass
    fold.close()
    assert live_records(run.folder) == replayed_records(run.folder, WITNESSED)


def tear(folder: Path, chance: random.Random) -> None:
    """What was being written at the time of a kill is there in part."""
    verdicts = folder / "verdicts.jsonl"
    if verdicts.exists():
        data = verdicts.read_bytes()
        begin = data.rfind(b"\n", 0, len(data) - 1) + 1
        verdicts.write_bytes(data[: chance.randrange(begin, len(data) + 1)])
    with open(folder / ORDER_FILE, "ab") as file:
        file.write(chance.choice([b"", b"1", b"0 12", b"+0123", b"0 *"]))
    (folder / "snapshot.new").write_bytes(b"half")


@pytest.mark.parametrize("damage", ["cut", "changed", "of another engine"])
def test_a_snapshot_that_cannot_be_read_costs_time_and_nothing_else(
    damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LiveRun(monkeypatch)
    run.feed(stream("divergence", 620))
    run.complete()
    snapshot = run.folder / "snapshot"
    data = bytearray(snapshot.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "changed":
        data[len(data) // 2 :: 97] = bytes(len(data[len(data) // 2 :: 97]))
    else:
        at = data.index(b"loss_spike-")
        data[at : at + 10] = b"other_name"
    snapshot.write_bytes(data)
    run = LiveRun(monkeypatch)
    run.feed(stream("divergence", 620, seed=1))
    run.complete()
    assert holds(run.folder)
    assert {verdict["attempt"] for verdict in live_records(run.folder)[0]} == {1, 2}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_was_killed_as_a_whole_goes_on_from_any_moment(
    ranks: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(10 * seed + ranks)
    run = LiveRun(monkeypatch, ranks=ranks, mode="AUTO", behind_ns=10**10)
    copies: List[Path] = []
    for name, steps in (("divergence", 620), ("dead", 540)):
        events = stream(name, steps, seed)
        while events:
            some = chance.randrange(100, 300)
            run.feed(events[:some])
            del events[:some]
            if chance.random() < 0.7:
                run.catch_up()
                run.feed(events[:5])  # some that it has not seen
                del events[:5]
            copies.append(tmp_path / str(len(copies)))
            copy_as_killed(run.folder, copies[-1])
            tear(copies[-1], chance)
    run.complete()
    fold_rest(run.folder)
    assert holds(run.folder)
    for copy in copies:
        before = replayed_records(copy)
        assert fold_rest(copy)
        # What two ranks' order is, past what was written down, is up to who folds it first.
        assert live_records(copy) == (before if ranks == 1 else replayed_records(copy))
    assert len(copies) > 3


def copy_as_killed(folder: Path, copy: Path) -> None:
    """The run's folder as a kill would leave it now.

    The fold writes the order down before it folds, and what it finds after that: a copy
    that is made file by file must take them the other way round.
    """
    copy.mkdir()
    names = [path.name for path in folder.iterdir() if path.is_file()]  # no local reports
    derived = [name for name in DERIVED if name in names]
    others = sorted(set(names) - set(derived), key=lambda name: (name.endswith(".journal"), name))
    for name in (*derived, *others):
        shutil.copyfile(folder / name, copy / name)


def test_a_loop_without_a_pause_leaves_a_prefix_and_the_rest_is_folded_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tight_loop(monkeypatch, 30_000)


@pytest.mark.slow
def test_a_long_loop_without_a_pause_leaves_a_prefix_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tight_loop(monkeypatch, 300_000)


def tight_loop(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    losses = [event.loss for event in stream("divergence", steps=3000)]
    run = LiveRun(monkeypatch)
    argus = run.ranks[0]
    for step in range(steps):
        argus.step(losses[step % 3000], 1.0)
    argus.complete()
    events = list(read_run(run.folder))
    assert len(events) == steps + 2  # with the session's begin and end
    live = live_records(run.folder)
    whole = replayed_records(run.folder)
    assert whole[0]
    assert live == (whole[0][: len(live[0])], whole[1][: len(live[1])])
    assert fold_rest(run.folder)
    assert live_records(run.folder) == whole
