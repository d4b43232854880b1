"""A training that goes back to a checkpoint goes on bit for bit as it did."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest
import torch as _torch

from plarv.checkpoints.contents import Training, collect
from plarv.checkpoints.snapshot import MODEL_FILE, REST_FILE, Snapshot
from plarv.checkpoints.tensor_file import read_tensors
from plarv.checkpoints.training_state import reset_optimizer, restore

torch: Any = _torch  # its stubs name a third of what is used here


class Tied(_torch.nn.Module):
    """A bit of everything: tied weights, BatchNorm's counters, dropout, a half, an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8)
        self.inner = torch.nn.Linear(8, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.dropout = torch.nn.Dropout(0.2)
        self.head = torch.nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("halves", torch.arange(3, dtype=torch.bfloat16))
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("wave", torch.ones(2, dtype=torch.complex128))

    def forward(self, x: Any) -> Any:
        return self.head(self.dropout(self.norm(self.inner(self.embedding(x)))))


OPTIMIZERS: List[Tuple[str, Callable[[Any], Any]]] = [
    ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01)),
    ("adamw_foreach", lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True)),
    ("adamw_fused", lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)),
    ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ("plain_sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
    ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.1)),
]
SCHEDULES: List[Callable[[Any], Any]] = [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, slower),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=200),
]


def train(model: Any, optimizer: Any, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        x = torch.randint(0, 11, (16,))
        loss = torch.nn.functional.cross_entropy(model(x), x) * (1.0 + random.random())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def save(folder: Path, snapshot: Snapshot, step: int) -> Path:
    """The snapshot's files in a folder, as a slot has them."""
    folder.mkdir()
    assert snapshot.take(step)
    snapshot.write(folder)
    snapshot.release()
    return folder


def prepared(*parts: Any) -> Snapshot:
    snapshot = Snapshot(Training(*parts))
    snapshot.survey()
    assert snapshot.prepare() is None
    return snapshot


def weights(model: Any) -> List[bytes]:
    tensors = [t.detach().contiguous().reshape(-1) for t in model.state_dict().values()]
    return [bytes(t.view(torch.uint8).numpy()) for t in tensors]


def slower(step: int) -> float:
    return 1.0 / (1 + step)


@pytest.mark.parametrize("scheduled", [0, 1])
@pytest.mark.parametrize(("name", "make"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
@pytest.mark.parametrize("fresh", [False, True], ids=["in_place", "in_a_new_process"])
def test_training_goes_on_bit_for_bit_from_where_it_was_saved(
    tmp_path: Path, name: str, make: Any, scheduled: int, fresh: bool
) -> None:
    torch.manual_seed(3)
    random.seed(4)
    model = Tied()
    optimizer = make(model.parameters())
    schedule = SCHEDULES[scheduled] if name in ("adamw", "sgd") else None
    scheduler = schedule(optimizer) if schedule else None
    train(model, optimizer, scheduler, 5)
    folder = save(tmp_path / "slot", prepared(model, optimizer, scheduler), 4)
    train(model, optimizer, scheduler, 7)
    first = weights(model)
    if fresh:
        model = Tied()
        optimizer = make(model.parameters())
        scheduler = schedule(optimizer) if schedule else None
    assert restore(folder, Training(model, optimizer, scheduler)).step == 4
    assert weights(model) != first
    train(model, optimizer, scheduler, 7)
    assert weights(model) == first


def scaled(model: Any, optimizer: Any, scaler: Any, steps: int) -> None:
    """fp16 with a scale that grows every third step, and skips the steps in which it overflows."""
    for _ in range(steps):
        given = torch.randn(8, 4)
        with torch.autocast("cpu", torch.float16):
            loss = model(given).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch before 2.3")
@pytest.mark.parametrize("after", [0, 1, 40])
@pytest.mark.parametrize("fresh", [False, True], ids=["in_place", "in_a_new_process"])
def test_a_gradient_scaler_goes_back_too(tmp_path: Path, after: int, fresh: bool) -> None:
    def make() -> Training:
        model = torch.nn.Linear(4, 4)
        scaler = torch.amp.GradScaler("cpu", 2.0**14, growth_interval=3)
        return Training(model, torch.optim.AdamW(model.parameters()), None, lambda: scaler)

    torch.manual_seed(0)
    training = make()
    scaled(training.model, training.optimizer, training.scaler(), after)
    snapshot = Snapshot(training)
    snapshot.survey()
    assert snapshot.prepare() is None
    folder = save(tmp_path / "slot", snapshot, 7)
    scaled(training.model, training.optimizer, training.scaler(), 20)
    first, scale = weights(training.model), training.scaler().state_dict()
    training = make() if fresh else training
    assert restore(folder, training) == (7, ())
    assert weights(training.model) != first
    scaled(training.model, training.optimizer, training.scaler(), 20)
    assert weights(training.model) == first
    assert training.scaler().state_dict() == scale


def test_what_a_checkpoint_has_and_the_training_was_not_given_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, slower)
    folder = save(tmp_path / "slot", prepared(model, optimizer, schedule), 0)
    passed_over = restore(folder, Training(model)).passed_over
    assert passed_over == ("the optimizer's state", "the schedule")


class Averaging(torch.optim.Optimizer):  # type: ignore[misc]
    """Follows the average gradient, which it keeps in float32 whatever the weights are."""

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros(weight.shape))
                average.lerp_(weight.grad.float(), 0.01)
                weight.sub_((group["lr"] * average).to(weight.dtype))


@pytest.mark.parametrize("fresh", [False, True], ids=["in_place", "in_a_new_process"])
def test_moments_of_another_type_than_the_weights_stay_what_they_are(
    tmp_path: Path, fresh: bool
) -> None:
    """bfloat16 weights under float32 moments: ``load_state_dict()`` would round these."""

    def make() -> Training:
        model = Tied()
        model.inner.to(torch.bfloat16)
        model.inner.register_forward_pre_hook(lambda _, given: given[0].to(torch.bfloat16))
        model.inner.register_forward_hook(lambda *called: called[2].float())
        return Training(model, Averaging(model.parameters(), {"lr": 0.1}))

    torch.manual_seed(0)
    random.seed(4)
    training = make()
    train(training.model, training.optimizer, None, 3)
    folder = save(tmp_path / "slot", prepared(*training[:2]), 3)
    train(training.model, training.optimizer, None, 5)
    first = weights(training.model)
    training = make() if fresh else training
    restore(folder, training)
    assert {s["average"].dtype for s in training.optimizer.state.values()} == {torch.float32}
    train(training.model, training.optimizer, None, 5)
    assert weights(training.model) == first


def test_moments_follow_weights_that_have_another_type_now(tmp_path: Path) -> None:
    torch.manual_seed(0)
    random.seed(4)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, None, 3)
    folder = save(tmp_path / "slot", prepared(model, optimizer), 3)
    narrow = Tied()
    narrow.inner.to(torch.bfloat16)
    narrow.inner.register_forward_pre_hook(lambda _, given: given[0].to(torch.bfloat16))
    narrow.inner.register_forward_hook(lambda *called: called[2].float())
    other = torch.optim.AdamW(narrow.parameters())
    restore(folder, Training(narrow, other))
    assert other.state[narrow.inner.weight]["exp_avg"].dtype is torch.bfloat16
    train(narrow, other, None, 2)


def test_a_scaler_of_somebodys_own_is_left_out_and_said() -> None:
    class Own:
        _per_optimizer_states = None
        _scale = None

    model = torch.nn.Linear(2, 2)
    own = Own()
    found = collect(Training(model, torch.optim.SGD(model.parameters()), None, lambda: own))
    assert found.left_out == ("the gradient scaler",)
    assert "scaler" not in found.rest


def test_a_training_goes_back_to_before_its_optimizer_had_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    folder = save(tmp_path / "slot", prepared(model, optimizer), 0)
    train(model, optimizer, None, 3)
    first = weights(model)
    restore(folder, Training(model, optimizer))
    assert not optimizer.state
    train(model, optimizer, None, 3)
    assert weights(model) == first


def test_gradients_are_zero_afterwards_and_stay_where_they_are(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, None, 1)
    folder = save(tmp_path / "slot", prepared(model, optimizer), 0)
    gradient: Any = model.inner.weight.grad
    place = gradient.data_ptr()
    restore(folder, Training(model, optimizer))
    gradient = model.inner.weight.grad
    assert gradient.data_ptr() == place
    assert not gradient.any()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: torch.nn.Linear(3, 3), "it is of another model"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(4, 5)), "shape"),
        (lambda: torch.nn.Sequential(), "which this model has not"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(
    tmp_path: Path, other: Any, says: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    folder = save(tmp_path / "slot", prepared(model), 0)
    wrong = other()
    before = weights(wrong)
    with pytest.raises(ValueError, match=says):
        restore(folder, Training(wrong))
    assert weights(wrong) == before


def test_another_number_of_parameters_in_the_optimizer_is_an_error(tmp_path: Path) -> None:
    model = Tied()
    folder = save(tmp_path / "slot", prepared(model, torch.optim.SGD(model.parameters(), 0.1)), 0)
    before = weights(model)
    with pytest.raises(ValueError, match="the optimizer has groups"):
        restore(folder, Training(model, torch.optim.SGD(model.inner.parameters(), 0.1)))
    assert weights(model) == before


def test_a_shared_weight_is_saved_once_and_read_as_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "slot", prepared(Tied()), 0)
    tensors = read_tensors(folder / MODEL_FILE, torch)
    assert tensors["head.weight"] is tensors["embedding.weight"]
    assert (folder / MODEL_FILE).stat().st_size < 4000


def test_wrappers_do_not_change_the_names(tmp_path: Path) -> None:
    model = Tied()
    folder = save(tmp_path / "slot", prepared(torch.nn.DataParallel(model)), 0)
    other = Tied()
    restore(folder, Training(other))
    assert weights(other) == weights(model)


def test_a_snapshot_whose_layout_changed_is_refused_until_it_is_prepared_again() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    snapshot = prepared(model, optimizer)
    train(model, optimizer, None, 1)  # the moments are there now
    assert not snapshot.take(1)
    snapshot.survey()
    assert snapshot.prepare() is None
    assert snapshot.take(1)
    with pytest.raises(RuntimeError, match="still being written"):
        snapshot.take(2)


def test_more_than_there_is_memory_is_said_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plarv.checkpoints.snapshot.available_bytes", lambda: 1000)
    snapshot = Snapshot(Training(Tied()))
    snapshot.survey()
    assert "available" in str(snapshot.prepare())
    assert not snapshot.is_prepared
    assert not snapshot.take(0)


@pytest.mark.parametrize(("name", "make"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_a_reset_optimizer_takes_the_same_steps_as_a_new_one(name: str, make: Any) -> None:
    model, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    optimizer = make(model.parameters())
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    other.load_state_dict(model.state_dict())
    assert reset_optimizer(optimizer) == (0 if name == "plain_sgd" else 2)
    for each, with_optimizer in ((model, optimizer), (other, make(other.parameters()))):
        torch.manual_seed(1)
        for _ in range(3):
            with_optimizer.zero_grad()
            each(torch.randn(2, 4)).sum().backward()
            with_optimizer.step()
    assert weights(model) == weights(other)


def test_a_model_without_parameters_is_kept_too(tmp_path: Path) -> None:
    folder = save(tmp_path / "slot", prepared(torch.nn.ReLU()), 7)
    assert restore(folder, Training(torch.nn.ReLU())).step == 7


class Counted(_torch.nn.Module):
    """A module with a state of its own, a tensor in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = torch.zeros(2)

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "scale": 0.5, "how": len}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]
        assert "how" not in state  # a function is not kept


def test_extra_state_of_modules_is_kept_where_it_is_plain(tmp_path: Path) -> None:
    model = torch.nn.Sequential(Counted())
    model[0].seen = torch.ones(2)
    snapshot = prepared(model)
    assert snapshot.left_out == ("extra.0._extra_state.how",)
    folder = save(tmp_path / "slot", snapshot, 0)
    other = torch.nn.Sequential(Counted())
    restore(folder, Training(other))
    assert other[0].seen.tolist() == [1.0, 1.0]


def test_a_schedule_with_numbers_of_numpy_and_counters_is_kept(tmp_path: Path) -> None:
    numpy: Any = pytest.importorskip("numpy")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = numpy.float32(0.5)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    folder = save(tmp_path / "slot", prepared(model, optimizer, scheduler), 0)
    before = dict(scheduler.state_dict())
    restore(folder, Training(model, optimizer, scheduler))
    assert scheduler.milestones == before["milestones"]
    assert type(scheduler.milestones) is type(before["milestones"])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_missing_part_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, None, 1)
    folder = save(tmp_path / "slot", prepared(model, optimizer), 0)
    rest = torch.load(folder / REST_FILE, weights_only=True)
    del rest["rng"]
    torch.save(rest, folder / REST_FILE)
    train(model, optimizer, None, 1)
    before = weights(model)
    with pytest.raises(ValueError, match="lacks a part"):
        restore(folder, Training(model, optimizer))
    assert weights(model) == before
