"""Models, losses and moments that nobody would make on purpose: training goes on as without us."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from tests.producer.local.watched import Fault, Watch, faulty, flip_a_bit, healthy, hooks_of
from torch import nn

import plarv.faults
from plarv.local import LocalDetector

ROWS = 16


class Untouchable:
    """What raises wherever it is looked at."""

    def __init__(self, tensor: Any) -> None:
        object.__setattr__(self, "_kept", tensor)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"do not touch {name}")

    def __len__(self) -> int:
        raise RuntimeError("nor this")

    __bool__ = __len__


@dataclass
class Answer:
    hidden: Any
    aside: str = ""


class Gives(nn.Linear):
    """A linear layer that gives what it is told to make of its result."""

    def __init__(self, form: Callable[[Any], Any]) -> None:
        super().__init__(16, 16)
        self.form = form

    def forward(self, given: torch.Tensor) -> Any:
        return self.form(super().forward(given))


class Around(nn.Module):
    """Takes the tensor out of what its middle layer gives."""

    def __init__(self, form: Callable[[Any], Any], back: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16), Gives(form), nn.Linear(16, 4)
        self.back = back

    def forward(self, given: torch.Tensor) -> Any:
        return self.last(self.back(self.middle(self.first(given).relu())).relu())


def plain(
    make: Callable[[], Any], make_optimizer: Any = None, given: Any = None
) -> Callable[[Watch], None]:
    """A training of whatever takes (16, 8) and gives a tensor."""

    def training(watch: Watch) -> None:
        model = make()
        if make_optimizer is None:
            optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-3)
        else:
            optimizer = make_optimizer(model)
        watch.attach(model, optimizer)
        for _ in watch.steps():
            data = torch.randn(ROWS, 8) if given is None else given()
            loss: Any = (model(data) - 1.0).square().mean()
            loss.backward()
            watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()

    return training


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def train(model: Any, optimizer: Any, detector: LocalDetector, steps: int) -> List[Any]:
    reports: List[Any] = []
    for _ in range(steps):
        model(torch.randn(ROWS, 8)).square().mean().backward()
        reports.append(detector.step(loss=1.0))
        optimizer.step()
        optimizer.zero_grad()
    return reports


FORMS: Dict[str, Tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "dict": (lambda x: {"hidden": x, "aside": None}, lambda x: x["hidden"]),
    "tuple": (lambda x: (x, "aside"), lambda x: x[0]),
    "list in a tuple": (lambda x: ([x], None), lambda x: x[0][0]),
    "dataclass": (Answer, lambda x: x.hidden),
    "dataclass, tensor second": (lambda x: Answer("", x), lambda x: x.aside),
}


@pytest.mark.parametrize("form", FORMS)
def test_activations_are_seen_in_whatever_a_layer_gives(form: str) -> None:
    def cut_off(model: Any, _optimizer: Any) -> None:
        model.middle.weight.zero_()
        model.middle.bias.fill_(1.0)

    training = plain(lambda: Around(*FORMS[form]))
    healthy(training, steps=60)
    faulty(training, Fault("representation_collapse", "middle", cut_off, at=60))


def test_what_a_layer_gives_that_cannot_be_read_is_said() -> None:
    opaque: Any = (lambda x: lambda: x, lambda x: x())
    healthy(plain(lambda: Around(*opaque)), steps=60, notes=["activations of middle"])


def test_what_raises_when_it_is_touched_harms_nobody_and_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plarv.faults, "RERAISE", False)
    touchy: Any = (Untouchable, lambda x: object.__getattribute__(x, "_kept"))
    healthy(plain(lambda: Around(*touchy)), steps=60, notes=["activations of middle"])


class Odd(nn.Module):
    """A layer called twice, one never, complex, integer, empty and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.never = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(3, 3)
        self.spectrum = nn.Parameter(torch.randn(16, 16, dtype=torch.complex64))
        self.table = nn.Parameter(torch.arange(6), requires_grad=False)
        self.empty, self.scalar = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(()))
        self.head = nn.Linear(16, 4)

    def forward(self, given: torch.Tensor) -> Any:
        hidden = self.twice(self.twice(self.first(given).relu())).relu()
        spectrum = torch.fft.fft(hidden) @ self.spectrum
        return self.head(torch.fft.ifft(spectrum).real) * self.scalar


def test_complex_integer_empty_and_scalar_parameters_are_no_fault() -> None:
    def optimizer(model: Any) -> Any:
        return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-3)

    training = plain(Odd, optimizer)
    healthy(training)
    faulty(training, Fault("hardware_integrity", "twice", flip_a_bit("twice.weight")))


def test_an_optimizer_over_other_parameters_is_no_fault() -> None:
    healthy(plain(small, lambda _: torch.optim.Adam(nn.Linear(2, 2).parameters())), steps=60)


def test_a_model_without_parameters_is_said() -> None:
    other = nn.Linear(8, 8)
    with LocalDetector(nn.ReLU(), torch.optim.SGD(other.parameters(), 0.1)) as detector:
        report = detector.step(loss=0.5)
    assert report.worst_level == "ok"


def test_step_never_preceded_by_forward_or_backward_is_no_fault() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with LocalDetector(model, optimizer) as detector:
        for _ in range(40):
            assert not detector.step(loss=1.0).any_warn
        for _ in range(40):
            model(torch.randn(ROWS, 8))
            optimizer.step()
            assert not detector.step().any_warn
        assert not any(each.any_warn for each in train(model, optimizer, detector, 40))


def test_it_can_go_and_come_back_in_the_middle_of_a_run() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    detector = LocalDetector(model, optimizer).attach()
    for steps_away in (0, 1, 20):
        reports = train(model, optimizer, detector, 30)
        detector.detach()
        after = detector.step(loss=0.5)
        assert any("not attached" in note for note in after.notes)
        detector.detach()
        for _ in range(steps_away):
            model(torch.randn(ROWS, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        detector.attach()
        assert [each.summary() for each in reports if each.any_warn] == []
    assert not any(each.any_warn for each in train(model, optimizer, detector, 30))
    detector.detach()
    assert hooks_of(model) == 0


class Leaves(nn.Module):
    """Detaches the detector in the middle of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.leave: Callable[[], None] = lambda: None

    def forward(self, given: torch.Tensor) -> Any:
        hidden = self.first(given)
        self.leave()
        return self.last(hidden)


def test_it_can_be_detached_within_a_forward() -> None:
    model = Leaves()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    detector = LocalDetector(model, optimizer).attach()
    model.leave = detector.detach
    model(torch.randn(ROWS, 8)).sum().backward()
    optimizer.step()
    assert hooks_of(model) == 0
    assert not torch._C._len_torch_function_stack()
    assert any("not attached" in note for note in detector.step().notes)


def test_a_watched_model_and_optimizer_can_be_copied_saved_and_loaded() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with LocalDetector(model, optimizer) as detector:
        train(model, optimizer, detector, 3)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for copied in (
            copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
        ):  # fmt: skip
            assert torch.equal(copied(torch.ones(2, 8)), model(torch.ones(2, 8)))
            own = torch.optim.AdamW(copied.parameters(), 1e-3)
            own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            copied(torch.randn(ROWS, 8)).sum().backward()
            own.step()
        assert not any(each.any_warn for each in train(model, optimizer, detector, 30))


LOSSES: Dict[str, Tuple[Any, str]] = {
    "nan": (float("nan"), "critical"),
    "infinite tensor": (torch.tensor(float("inf")), "critical"),
    "none": (None, "ok"),
    "text": ("much", "ok"),
    "two elements": (torch.ones(2), "ok"),
    "no elements": (torch.ones(0), "ok"),
    "complex": (torch.tensor(1.0 + 2.0j), "ok"),
    "integer": (torch.tensor(3), "ok"),
    "dict": ({"loss": 1.0}, "ok"),
    "meta": (torch.ones((), device="meta"), "ok"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_any_loss_is_taken_or_said_not_to_be(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plarv.faults, "RERAISE", False)
    loss, level = LOSSES[kind]
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with LocalDetector(model, optimizer) as detector:
        for _ in range(3):
            model(torch.randn(ROWS, 8)).sum().backward()
            report = detector.step(loss=loss)
            optimizer.step()
    assert report.checks["loss_spike"].level == level
    readable = kind in ("nan", "infinite tensor", "integer", "none")
    assert any("the loss" in note for note in report.notes) is not readable


def converted(convert: str) -> Callable[[Watch], None]:
    """A training whose model has another type of number from step 60 on."""

    def training(watch: Watch) -> None:
        model: Any = small()
        optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
        watch.attach(model, optimizer)
        dtype = torch.float32
        for step in watch.steps():
            if step == 60:
                getattr(model, convert)()
                dtype = model[0].weight.dtype
                for state in optimizer.state.values():
                    state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
            loss: Any = (model(torch.randn(ROWS, 8, dtype=dtype)) - 1.0).square().mean()
            loss.backward()
            watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()

    return training


@pytest.mark.parametrize("convert", ["double", "half"])
def test_a_model_converted_in_the_middle_of_a_run_is_no_fault(convert: str) -> None:
    healthy(converted(convert), steps=120)
    fault = Fault("hardware_integrity", "2", flip_a_bit("2.weight"), at=100)
    faulty(converted(convert), fault)


def test_updates_that_a_coarser_type_loses_are_told_and_nothing_else_is() -> None:
    watch = Watch(on=True, steps=120)
    converted("bfloat16")(watch)
    ill = {
        key
        for report in watch.reports
        for key, check in report.checks.items()
        if check.level != "ok"
    }
    assert ill == {"precision_erosion"}
    assert watch.detector is not None
    watch.detector.detach()


def test_parameters_that_are_added_in_the_middle_of_a_run_are_looked_at() -> None:
    def training(watch: Watch) -> None:
        model: Any = small()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        watch.attach(model, optimizer)
        for step in watch.steps():
            if step == 50:
                model.append(nn.ReLU())
                model.append(nn.Linear(4, 4))
                optimizer.add_param_group({"params": model[6].parameters()})
            loss: Any = (model(torch.randn(ROWS, 8)) - 1.0).square().mean()
            loss.backward()
            watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()

    healthy(training)
    faulty(training, Fault("hardware_integrity", "6", flip_a_bit("6.weight"), at=100))


def test_parameters_that_are_not_made_yet_are_looked_at_once_they_are() -> None:
    def training(watch: Watch) -> None:
        model: Any = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        watch.attach(model, optimizer)
        for _ in watch.steps():
            loss: Any = (model(torch.randn(ROWS, 8)) - 1.0).square().mean()
            loss.backward()
            watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()

    healthy(training)
    faulty(training, Fault("hardware_integrity", "2", flip_a_bit("2.weight")))


def test_inference_between_the_steps_is_no_fault() -> None:
    def training(watch: Watch) -> None:
        model: Any = small()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        watch.attach(model, optimizer)
        for step in watch.steps():
            with torch.inference_mode():
                model(100.0 * torch.randn(ROWS, 8))
            if step % 10 == 0:
                model.eval()
                with torch.no_grad():
                    model(100.0 * torch.randn(ROWS, 8))
                model.train()
            loss: Any = (model(torch.randn(ROWS, 8)) - 1.0).square().mean()
            loss.backward()
            watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()

    healthy(training, steps=80)


class Stops(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error, self.stops = nn.Linear(8, 8), error, False

    def forward(self, given: torch.Tensor) -> Any:
        if self.stops:
            raise self.error
        return self.layer(given)


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()], ids=repr)
def test_whatever_ends_a_forward_leaves_no_mode_behind(error: BaseException) -> None:
    model = Stops(error)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    detector = LocalDetector(model, optimizer).attach()
    for how in (detector.step, detector.detach):
        model.stops = True
        with pytest.raises(type(error)):
            model(torch.randn(ROWS, 8))
        how()
        assert not torch._C._len_torch_function_stack()
        model.stops = False
        model(torch.randn(ROWS, 8)).sum().backward()
        optimizer.step()
    assert hooks_of(model) == 0


def test_another_mode_that_was_entered_since_an_interrupted_forward_stays() -> None:
    model = Stops(KeyboardInterrupt())
    with LocalDetector(model, torch.optim.SGD(model.parameters(), 0.1)) as detector:
        model.stops = True
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(ROWS, 8))
        with torch.device("meta"):
            detector.step()
            assert torch.ones(2).device.type == "meta"
        assert torch.ones(2).device.type == "cpu"


def test_two_models_in_two_threads_do_not_disturb_each_other() -> None:
    found: Dict[int, Any] = {}

    def work(number: int) -> None:
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        with LocalDetector(model, optimizer) as detector:
            reports = train(model, optimizer, detector, 80)
        found[number] = (reports, hooks_of(model))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1]
    for reports, hooks in found.values():
        assert [each.summary() for each in reports if each.any_warn] == []
        assert (reports[-1].notes, hooks) == ((), 0)
