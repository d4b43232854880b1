"""What the detector promises whatever the model is: no exception, no trace, no changed bit."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
import torch
from torch import nn
from torch.nn import functional

import plarv.faults
from plarv.local import LocalDetector
from plarv.local_report import local_columns
from plarv_schemas.events import LOCAL_CHECKS

Model = Callable[[], nn.Module]


class Mixed(nn.Module):
    """Outputs of all kinds, a layer that is called twice, one that is never, odd parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.never = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(3, 3)
        self.pair, self.none = Pair(), Nothing()
        self.spectrum = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
        self.table = nn.Parameter(torch.arange(6), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.head = nn.Linear(16, 3)

    def forward(self, given: torch.Tensor) -> Dict[str, torch.Tensor]:
        hidden = self.twice(self.twice(functional.relu(self.first(given))))
        self.none(hidden)
        hidden, _ = self.pair(hidden)
        return {"logits": self.head(hidden), "energy": self.spectrum.abs().sum()}


class Pair(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, given: torch.Tensor) -> Any:
        return super().forward(given), {"extra": None}


class Nothing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, given: torch.Tensor) -> Any:
        return None


def loss_of(output: Any) -> Any:
    if isinstance(output, dict):
        return output["logits"].float().square().mean() + 1e-3 * output["energy"]
    return output.float().square().mean()


def train(
    model: nn.Module, optimizer: Any, detector: Optional[LocalDetector], steps: int, **options: Any
) -> List[Any]:
    dice = torch.Generator().manual_seed(5)
    reports: List[Any] = []
    for _ in range(steps):
        given = torch.randn(16, 8, generator=dice).to(options.get("dtype", torch.float32))
        loss: Any = loss_of(model(given))
        loss.backward()
        if detector is not None and not options.get("late"):
            reports.append(detector.step(loss=loss.item()))
        optimizer.step()
        if detector is not None and options.get("late"):
            reports.append(detector.step(loss=loss))
        optimizer.zero_grad()
    return reports


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_a_model_of_odd_parts_is_trained_and_reported_on() -> None:
    model = Mixed()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2, 0.9)
    with LocalDetector(model, optimizer) as detector:
        reports = train(model, optimizer, detector, 12)
    assert reports[-1].worst_level == "ok"
    assert reports[-1].notes == ("activations of none: they give no tensor",)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
        lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, 1e-3),
        lambda p: torch.optim.Adagrad(p, 1e-3),
    ],
    ids=["adamw-foreach", "adamw-fused", "sgd", "rmsprop", "adagrad"],
)
@pytest.mark.parametrize("late", [False, True], ids=["before-the-step", "after-the-step"])
def test_any_optimizer_is_healthy_and_poisoned_state_is_found(make: Any, late: bool) -> None:
    torch.manual_seed(0)
    model = small()
    optimizer = make(model.parameters())
    with LocalDetector(model, optimizer) as detector:
        assert not any(
            report.any_warn for report in train(model, optimizer, detector, 30, late=late)
        )
        state = optimizer.state[model[2].weight]
        key = next(k for k, v in state.items() if isinstance(v, torch.Tensor) and v.numel() > 1)
        state[key].mul_(1e4)
        report = train(model, optimizer, detector, 2, late=late)[-1]
    assert report.checks["optimizer_health"].level == "critical"
    assert "2" in report.checks["optimizer_health"].layers


@pytest.mark.parametrize("make", [small, Mixed], ids=["small", "mixed"])
def test_weights_are_the_same_bits_with_and_without_it(make: Model) -> None:
    weights: List[Dict[str, Any]] = []
    for watched in (False, True):
        torch.manual_seed(3)
        model = make()
        usable = [p for p in model.parameters() if p.requires_grad and not p.is_complex()]
        optimizer = torch.optim.AdamW(usable, 1e-3)
        detector = LocalDetector(model, optimizer).attach() if watched else None
        train(model, optimizer, detector, 40)
        weights.append({k: v.detach().numpy().tobytes() for k, v in model.state_dict().items()})
    assert weights[0] == weights[1]


def test_detach_leaves_nothing_behind_and_attaching_twice_is_once() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    detector = LocalDetector(model, optimizer)
    detector.attach()
    once = hooks_of(model)
    detector.attach()
    assert hooks_of(model) == once > 0
    detector.detach()
    detector.detach()
    assert hooks_of(model) == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_watched_model_can_be_pickled_and_copied_without_the_hooks_doing_anything() -> None:
    model = small()
    with LocalDetector(model, torch.optim.SGD(model.parameters(), 0.1)) as detector:
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied(torch.randn(16, 8)).shape == (16, 4)
        assert detector._readings is not None
        assert not detector._readings._queued


@pytest.mark.parametrize(
    "model",
    [None, object(), nn.Identity(), nn.ReLU(), [nn.Linear(2, 2)]],
    ids=["none", "object", "no parameters", "activation", "list"],
)
def test_what_is_no_model_is_said_in_the_notes(model: Any) -> None:
    with LocalDetector(model, None) as detector:
        report = detector.step(loss=1.0)
    assert report.worst_level == "ok"
    assert any("no torch model" in note for note in report.notes)


@pytest.mark.parametrize("loss", [None, "x", object(), torch.ones(3), torch.tensor(2.0), 3])
def test_any_loss_is_taken(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plarv.faults, "RERAISE", False)
    model = small()
    with LocalDetector(model, torch.optim.SGD(model.parameters(), 0.1)) as detector:
        assert detector.step(loss=loss).worst_level == "ok"


def test_step_without_backward_and_an_optimizer_over_other_parameters_are_no_faults() -> None:
    model, other = small(), nn.Linear(2, 2)
    with LocalDetector(model, torch.optim.Adam(other.parameters())) as detector:
        for _ in range(12):
            model(torch.randn(16, 8))
            assert detector.step(loss=1.0).worst_level == "ok"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_widths_are_healthy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = small().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with LocalDetector(model, optimizer) as detector:
        reports = train(model, optimizer, detector, 30, dtype=dtype)
    assert {report.worst_level for report in reports} == {"ok"}


def test_a_fault_of_ours_inside_a_hook_stands_in_the_notes_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plarv.faults, "RERAISE", False)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    detector = LocalDetector(model, optimizer).attach()
    assert detector._activations is not None

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(detector._activations, "_measure", broken)
    report = train(model, optimizer, detector, 8)[-1]
    assert any("activations" in note for note in report.notes)
    detector.detach()


def test_a_forward_that_raises_leaves_no_mode_behind() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 9))
    with LocalDetector(model, torch.optim.SGD(model.parameters(), 0.1)):
        with pytest.raises(RuntimeError):
            model(torch.randn(4, 8))
        assert not torch._C._len_torch_function_stack()


def test_the_report_is_what_the_engine_takes() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with LocalDetector(model, optimizer) as detector:
        report = train(model, optimizer, detector, 3)[-1]
    data = report.to_dict()
    assert tuple(data["checks"]) == LOCAL_CHECKS
    assert set(data["checks"]["loss_spike"]) == {"level", "score", "threshold", "layers", "message"}
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert local_columns(report.to_dict())["local_levels"] == (0,) * 10
    assert "ok" in report.summary()


def with_tied_weights() -> Tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    model = nn.ModuleDict({"embed": nn.Embedding(12, 16), "head": nn.Linear(16, 12, bias=False)})
    parts: Any = model
    parts["head"].weight = parts["embed"].weight
    tokens = torch.randint(0, 12, (16, 6))

    def loss(model: nn.Module) -> torch.Tensor:
        parts: Any = model
        return functional.cross_entropy(
            parts["head"](parts["embed"](tokens)).flatten(0, 1), tokens.flatten()
        )

    return model, loss


def test_tied_and_frozen_and_unused_weights_are_no_faults() -> None:
    model, loss_of_tied = with_tied_weights()
    model.add_module("unused", nn.Linear(4, 4))
    model.add_module("frozen", nn.Linear(4, 4).requires_grad_(False))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with LocalDetector(model, optimizer) as detector:
        for _ in range(30):
            loss: Any = loss_of_tied(model)
            loss.backward()
            assert detector.step(loss=loss.item()).worst_level == "ok"
            optimizer.step()
            optimizer.zero_grad()


def test_weights_edited_by_code_on_every_step_are_normal() -> None:
    torch.manual_seed(0)
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with LocalDetector(model, optimizer) as detector:
        for _ in range(30):
            report = train(model, optimizer, detector, 1)[-1]
            assert report.checks["hardware_integrity"].level == "ok"
            with torch.no_grad():
                weight: Any = model[2].weight
                weight.mul_(0.9999)


def test_a_checkpoint_that_is_loaded_is_no_bit_flip_and_one_bit_is() -> None:
    torch.manual_seed(0)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    kept = copy.deepcopy(model.state_dict())
    with LocalDetector(model, optimizer) as detector:
        train(model, optimizer, detector, 15)
        model.load_state_dict(kept)
        assert train(model, optimizer, detector, 1)[-1].checks["hardware_integrity"].level == "ok"
        train(model, optimizer, detector, 5)
        weight: Any = model[4].weight
        weight.data.view(torch.int32).view(-1)[5] ^= 1
        found = train(model, optimizer, detector, 2)[-1].checks["hardware_integrity"]
    assert found.level == "critical"
    assert found.layers == ("4",)


def test_a_compiled_model_is_left_to_its_compiler() -> None:
    inner = small()
    model: Any = torch.compile(inner, backend="eager")
    optimizer = torch.optim.SGD(inner.parameters(), 1e-2)
    with LocalDetector(model, optimizer) as detector:
        assert hooks_of(inner) == 0
        report = train(model, optimizer, detector, 3)[-1]
    assert any("compiled" in note for note in report.notes)
