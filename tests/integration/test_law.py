"""Live equals replay, at each boundary of one process: whole records, on real Argus objects."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import List

import pytest
from tests.integration.law import live_records, replayed_records
from tests.integration.live import LiveRun, stream
from tests.processors.streams import FAULTY

import plarv.faults
from plarv_processors.stored_fold import StoredFold, fold_rest
from plarv_schemas.run_log import ORDER_FILE

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


@pytest.mark.parametrize("seed", range(3))
def test_two_ranks_that_run_apart_are_merged_once_and_for_all(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    run = LiveRun(monkeypatch, ranks=2, mode="AUTO", behind_ns=5_000_000)
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


def copy_as_killed(folder: Path, copy: Path, chance: random.Random) -> None:
    """The run's folder as a kill would leave it now, with what was being written torn.

    The fold writes the order down before the events are folded, and what it finds after that: a
    copy that is made bit by bit must take them the other way round.
    """
    copy.mkdir()
    for name in DERIVED:
        if (folder / name).exists():
            shutil.copyfile(folder / name, copy / name)
    names = sorted(path.name for path in folder.iterdir() if path.name not in DERIVED)
    names.sort(key=lambda name: name.endswith(".journal"))
    for name in names:
        shutil.copyfile(folder / name, copy / name)
    for name in ("verdicts.jsonl", "actions.jsonl"):
        path = copy / name
        if path.exists() and chance.random() < 0.7:
            data = path.read_bytes()
            path.write_bytes(data[: max(0, len(data) - chance.randrange(1500))])
    if chance.random() < 0.3 and (copy / "snapshot").exists():
        data = (copy / "snapshot").read_bytes()
        (copy / "snapshot").write_bytes(data[: chance.randrange(len(data))])
    if chance.random() < 0.5:
        with open(copy / ORDER_FILE, "ab") as file:
            file.write(chance.choice([b"1", b"0 12", b"+0123", b"0 *"]))
    (copy / "snapshot.new").write_bytes(b"half")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_was_killed_at_any_moment_goes_on_as_if_it_had_not_been(
    ranks: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(10 * seed + ranks)
    run = LiveRun(monkeypatch, ranks=ranks, mode="AUTO", behind_ns=5_000_000)
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
            copy_as_killed(run.folder, copies[-1], chance)
    run.complete()
    fold_rest(run.folder)
    assert holds(run.folder)
    for copy in copies:
        before = replayed_records(copy)
        fold = StoredFold(copy)
        while fold.advance(chance.choice([1, 7, 64, 1024]))[0]:
            if chance.random() < 0.03:
                fold.save()
                fold.close()
                fold = StoredFold(copy)
        fold.close()
        # What two ranks' order is, past what was written down, is up to who folds it first.
        assert live_records(copy) == (before if ranks == 1 else replayed_records(copy))
    assert len(copies) > 3


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
    live = live_records(run.folder)
    whole = replayed_records(run.folder)
    assert whole[0]
    assert live == (whole[0][: len(live[0])], whole[1][: len(live[1])])
    assert fold_rest(run.folder)
    assert live_records(run.folder) == whole
