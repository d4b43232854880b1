"""All ranks act at one step or none does, whatever each of them knows and when."""

from __future__ import annotations

import datetime as dt
import random
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import pytest

from plarv.agreement import StoreAgreement
from plarv.faults import Faults
from plarv.identity import Identity
from plarv.interventions import Interventions
from plarv.learning_rate import LearningRateCap
from plarv_schemas.events import Action

APPLY_STEP = 20


class Store:
    """A key-value store with the semantics of torch's TCPStore."""

    def __init__(self) -> None:
        self.values: Dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def check(self, keys: List[str]) -> bool:
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        stands = self.values.get(key)
        if stands is None:
            if expected:
                return expected.encode()
            self.set(key, desired)
        elif stands == expected.encode():
            self.set(key, desired)
        return self.values[key]


class GoneStore:
    """As torch's is once the process that hosts it has died."""

    def set(self, *_: object) -> None:
        raise RuntimeError("Broken pipe")

    check = compare_set = set  # noqa: A003 - as the store calls it


class Optimizer:
    def __init__(self) -> None:
        self.param_groups: List[Dict[str, Any]] = [{"lr": 0.1}]


def make_action(kind: str = "SET_LR", **parameters: Any) -> Action:
    parameters.setdefault("apply_step", APPLY_STEP)
    if kind == "SET_LR":
        parameters.setdefault("lr", 0.01)
    return Action(
        "run", 1, (("s0", 0), ("s1", 0)), 10, 21, kind, parameters, "why", (), 1.0, 210,  # type: ignore[arg-type]
    )  # fmt: skip


def agreement(store: Any, rank: int, world_size: int = 2) -> StoreAgreement:
    return StoreAgreement(Identity("run", rank, world_size, rank, world_size, None), store)


class Rank:
    """One rank's half of it, with a real optimizer's rate to change."""

    def __init__(self, store: Any, rank: int, world_size: int = 2) -> None:
        self.optimizer: Optional[Optimizer] = Optimizer()
        self.agreement = agreement(store, rank, world_size)
        self.reports: List[Tuple[str, int, Any]] = []
        self.meanwhile: Callable[[], None] = lambda: None  # what threads do between take and apply
        self.interventions = Interventions(
            auto=True,
            accept_operator=False,
            cap=LearningRateCap(),
            find_optimizer=lambda: self.optimizer,
            on_pause=None,
            report=lambda kind, step, data: self.reports.append((kind, step, data.get("why"))),
            faults=Faults(),
            agreement=self.agreement,
        )

    def step(self, step: int, *received: Action) -> None:
        for action in received:
            self.interventions.take(action, step)
        self.meanwhile()
        self.interventions.apply(step)

    @property
    def kinds(self) -> List[str]:
        return [kind for kind, _, _ in self.reports]


def tend(ranks: List[Rank]) -> None:
    for _ in range(2):
        for rank in ranks:
            rank.agreement.tend()


def test_a_rate_is_lowered_at_the_same_step_on_all_ranks() -> None:
    store = Store()
    ranks = [Rank(store, 0), Rank(store, 1)]
    for step in range(30):
        for rank in ranks:
            rank.step(step, *([make_action()] if step == 12 else []))
        tend(ranks)
    assert [rank.reports for rank in ranks] == [[("action_applied", APPLY_STEP, None)]] * 2
    assert [rank.optimizer.param_groups[0]["lr"] for rank in ranks if rank.optimizer] == [0.01] * 2


def test_a_rank_that_never_hears_of_it_keeps_the_others_from_acting() -> None:
    store = Store()
    ranks = [Rank(store, 0), Rank(store, 1)]
    for step in range(30):
        ranks[0].step(step, *([make_action()] if step == 12 else []))
        ranks[1].step(step)
        tend(ranks)
    assert ranks[0].reports == [("action_dropped", APPLY_STEP, "not all ranks had it in time")]
    assert ranks[1].reports == []


def test_a_rank_that_hears_too_late_drops_it_like_the_others() -> None:
    store = Store()
    ranks = [Rank(store, 0), Rank(store, 1)]
    for step in range(30):
        ranks[0].step(step, *([make_action()] if step == 12 else []))
        ranks[1].step(step, *([make_action()] if step == APPLY_STEP + 1 else []))
        tend(ranks)
    assert ranks[0].reports == [("action_dropped", APPLY_STEP, "not all ranks had it in time")]
    assert ranks[1].reports == [("action_dropped", APPLY_STEP + 1, "it came too late")]


def test_a_rank_that_is_a_step_ahead_and_too_late_cannot_make_the_others_act() -> None:
    """It must not even say that it has the action: the others might act on that word."""
    store = Store()
    behind, ahead = Rank(store, 0), Rank(store, 1)
    ahead.meanwhile = lambda: tend([behind, ahead])
    behind.step(APPLY_STEP - 1, make_action())
    ahead.step(APPLY_STEP + 1, make_action())
    tend([behind, ahead])
    behind.step(APPLY_STEP)
    assert behind.kinds == ahead.kinds == ["action_dropped"]


def test_steps_that_are_reported_now_and_then_act_at_the_first_one_after() -> None:
    store = Store()
    ranks = [Rank(store, 0), Rank(store, 1)]
    for step in range(0, 60, 7):
        for rank in ranks:
            rank.step(step, *([make_action()] if step == 14 else []))
        tend(ranks)
    assert [rank.reports for rank in ranks] == [[("action_applied", 21, None)]] * 2


def test_a_rank_that_cannot_do_it_says_so_and_no_one_does_it() -> None:
    store = Store()
    ranks = [Rank(store, 0), Rank(store, 1)]
    ranks[1].optimizer = None
    for step in range(30):
        for rank in ranks:
            rank.step(step, *([make_action()] if step == 12 else []))
        tend(ranks)
    assert ranks[0].reports == [("action_dropped", APPLY_STEP, "not all ranks had it in time")]
    assert ranks[1].reports == [("action_refused", 12, "no optimizer is known")]


def test_steps_so_quick_that_the_step_to_act_at_lies_far_ahead_still_act() -> None:
    store = Store()
    ranks = [Rank(store, 0), Rank(store, 1)]
    action = make_action(apply_step=500)._replace(expiry_step=500)
    for step in (12, 499, 503):  # the first one reported at or after it
        for rank in ranks:
            rank.step(step, *([action] if step == 12 else []))
        tend(ranks)
    assert [rank.kinds for rank in ranks] == [["action_applied"]] * 2


def test_without_a_store_nothing_is_done_and_that_is_said() -> None:
    rank = Rank(None, 0)  # torch.distributed is not initialised in this process
    rank.step(12, make_action())
    rank.step(APPLY_STEP)
    assert rank.reports == [("action_dropped", 12, "no store to agree by")]
    assert not rank.interventions.busy


def test_a_store_that_is_gone_agrees_to_nothing_and_raises_nothing() -> None:
    rank = Rank(GoneStore(), 0)
    rank.step(12, make_action())
    rank.agreement.tend()
    rank.agreement.tend()
    rank.step(APPLY_STEP)
    assert rank.kinds == ["action_dropped"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_in_every_interleaving_all_ranks_act_or_none_does(world_size: int) -> None:
    chance = random.Random(world_size)
    seen: Set[str] = set()
    for _ in range(150):
        store, action = Store(), make_action(apply_step=4)
        ranks = [Rank(store, rank, world_size) for rank in range(world_size)]

        def threads(ranks: List[Rank] = ranks) -> None:  # in the background, whenever they like
            for _ in range(chance.randrange(4)):
                chance.choice(ranks).agreement.tend()

        for each in ranks:
            each.meanwhile = threads
        hears = [chance.randrange(7) for _ in ranks]  # the step at which each hears of the action
        steps = [0] * world_size
        turns = [rank for rank in range(world_size) for _ in range(8)]
        chance.shuffle(turns)
        for rank in turns:
            ranks[rank].step(steps[rank], *([action] if steps[rank] == hears[rank] else []))
            steps[rank] += 1
            threads()
        done = {kind for rank in ranks for kind in rank.kinds}
        assert len(done) == 1, [rank.reports for rank in ranks]
        if done == {"action_applied"}:
            assert [step for rank in ranks for _, step, _ in rank.reports] == [4] * world_size
        seen |= done
    assert seen == {"action_applied", "action_dropped"}


def test_the_store_of_these_tests_behaves_as_torchs_own_does() -> None:
    distributed: Any = pytest.importorskip("torch.distributed")
    real = distributed.TCPStore(
        "127.0.0.1", 0, 2, True, timeout=dt.timedelta(seconds=20), wait_for_workers=False
    )
    stores: List[Any] = [Store(), distributed.PrefixStore("default_pg", real)]
    for call in (
        lambda store: store.check(["absent"]),
        lambda store: bytes(store.compare_set("absent", "expected", "desired")),
        lambda store: store.check(["absent"]),
        lambda store: bytes(store.compare_set("key", "", "drop")),
        lambda store: bytes(store.compare_set("key", "", "apply")),
        lambda store: bytes(store.compare_set("key", "drop", "apply")),
        lambda store: store.set("other", "1"),
        lambda store: store.check(["key", "other"]),
        lambda store: store.check(["key", "absent"]),
        lambda store: bytes(store.compare_set("other", "", "2")),
    ):
        ours, theirs = (call(store) for store in stores)
        assert ours == theirs


def test_two_ranks_agree_by_torchs_own_store() -> None:
    distributed: Any = pytest.importorskip("torch.distributed")
    host = distributed.TCPStore(
        "127.0.0.1", 0, 2, True, timeout=dt.timedelta(seconds=20), wait_for_workers=False
    )
    other = distributed.TCPStore("127.0.0.1", host.port, 2, False, timeout=dt.timedelta(seconds=20))
    ranks = [Rank(host, 0), Rank(other, 1)]
    for step in range(30):
        for rank in ranks:
            rank.step(step, *([make_action()] if step == 12 else []))
        tend(ranks)
    assert [rank.reports for rank in ranks] == [[("action_applied", APPLY_STEP, None)]] * 2
