from __future__ import annotations

import math
from typing import Any, Dict, List, Tuple

import pytest
import torch
from tests.producer.runs import steps_of
from torch.overrides import TorchFunctionMode

from plarv import Argus, faults, utils
from plarv.utils import extract_signals

NAMES = (
    "sample_losses", "sample_confidences", "sample_margins", "sample_entropies", "sample_correct",
)  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def reference(logits: Any, labels: Any, ignore_index: int = -100) -> Dict[str, List[float]]:
    """The definitions, one position after the other, in float64."""
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    found: Dict[str, List[float]] = {name: [] for name in NAMES}
    for sample, targets in zip(logits.detach().double(), labels.tolist()):
        rows: List[List[float]] = []
        for row, target in zip(sample, targets):
            if target != ignore_index and 0 <= target < len(row):
                logs = torch.log_softmax(row, 0)
                probabilities = logs.exp()
                others = torch.cat([row[:target], row[target + 1 :]])
                entropy = torch.special.entr(probabilities).sum()
                margin = row[target] - others.max()
                right = float(row[target] == row.max())
                rows.append(
                    [*map(float, (-logs[target], logs.max().exp(), margin, entropy)), right]
                )
        means = [sum(column) / len(rows) for column in zip(*rows)] if rows else [math.nan] * 5
        means[4] = float(means[4] >= 0.5)
        for name, mean in zip(NAMES, means):
            found[name].append(mean)
    return found


def assert_as_reference(logits: Any, labels: Any, **given: Any) -> None:
    signals = extract_signals(logits, labels, **given)
    expected = reference(logits, labels, **given)
    assert list(signals) == list(NAMES)
    for name in NAMES:
        assert signals[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-30, nan_ok=True), (
            name
        )


def batch(*shape: int, dtype: Any = torch.float32, scale: float = 3.0) -> Tuple[Any, Any]:
    torch.manual_seed(0)
    logits = (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)
    return logits, torch.randint(shape[-1], shape[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 10), (1, 2), (4, 7, 11), (3, 5, 50_000)])
def test_the_values_are_those_of_a_float64_reference(dtype: Any, shape: Tuple[int, ...]) -> None:
    assert_as_reference(*batch(*shape, dtype=dtype))


def test_a_loss_near_zero_keeps_its_digits() -> None:
    logits, labels = batch(64, 100, scale=1.0)
    logits[torch.arange(64), labels] += 12.0  # beyond, float64's own log_softmax loses more
    assert_as_reference(logits, labels)


def test_large_logits_do_not_overflow() -> None:
    assert_as_reference(*batch(8, 9, scale=1e4))


def test_labels_that_are_ignored_or_no_class_do_not_count() -> None:
    logits, labels = batch(5, 8, 13)
    labels[0, :3] = -100
    labels[1] = -100
    labels[2, 0], labels[2, 1] = 13, -1
    assert_as_reference(logits, labels)
    assert math.isnan(extract_signals(logits, labels)["sample_losses"][1])
    assert_as_reference(logits, labels.clamp(min=0, max=12), ignore_index=0)


@pytest.mark.parametrize("elements", [1, 40, 100, 1000, 1 << 22])
def test_the_size_of_a_chunk_changes_nothing(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = batch(5, 8, 13)
    labels[3, 2:] = -100
    expected = extract_signals(logits, labels)
    monkeypatch.setattr(utils, "_CHUNK_ELEMENTS", elements)
    found = extract_signals(logits, labels)
    for name in NAMES:
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_shifted_logits_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, tokens = batch(4, 33, 1000)
    monkeypatch.setattr(utils, "_CHUNK_ELEMENTS", 4000)
    largest = _largest_allocation(logits[:, :-1], tokens[:, 1:])
    assert 4 * 4000 <= largest < 2 * 4 * 4000  # bytes; the logits have 512,000
    assert_as_reference(logits[:, :-1], tokens[:, 1:])


def _largest_allocation(logits: Any, labels: Any) -> int:
    with _NewTensors(logits) as seen:
        extract_signals(logits, labels)
    largest: int = seen.largest
    return largest


class _NewTensors(TorchFunctionMode):
    """Sees the size in bytes of every tensor that an operation made."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self._given = given.untyped_storage().data_ptr()
        self.largest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else [made]:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = torch.Tensor.untyped_storage(tensor)
            if storage.data_ptr() != self._given:
                self.largest = max(self.largest, storage.nbytes())
        return made


def test_logits_that_are_not_numbers_cost_their_own_sample_only() -> None:
    logits, labels = batch(5, 6)
    logits[0, 1], logits[1, 2], logits[2] = math.nan, math.inf, -math.inf
    assert_as_reference(logits[3:], labels[3:])
    signals: Any = extract_signals(logits, labels)
    for name in NAMES[:4]:
        values = signals[name]
        assert all(map(math.isnan, values[:2]))
        assert values[3:] == extract_signals(logits[3:], labels[3:])[name]
    assert math.isnan(signals["sample_losses"][2])


def test_classes_that_are_masked_out_have_no_share() -> None:
    logits, labels = batch(6, 7)
    labels.fill_(3)
    logits[:, 5:] = -math.inf
    assert_as_reference(logits, labels)
    labels[0] = 6
    assert extract_signals(logits, labels)["sample_losses"][0] == math.inf


def test_a_single_class_and_ties() -> None:
    signals = extract_signals(torch.tensor([[3.0], [4.0]]), torch.tensor([0, 0]))
    assert signals["sample_losses"] == [0.0, 0.0]
    assert signals["sample_confidences"] == [1.0, 1.0]
    tied = extract_signals(torch.zeros(2, 4), torch.tensor([0, 3]))
    assert tied["sample_correct"] == [1, 1]
    assert tied["sample_margins"] == [0.0, 0.0]


def test_gradient_norms_are_those_of_the_whole_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4).to(torch.float64))
    frozen = torch.nn.Linear(2, 2)
    model.append(frozen)
    logits = model[1](model[0](torch.randn(3, 6)).double())
    labels = torch.tensor([0, 1, 2])
    assert "grad_l1_norm" not in extract_signals(logits, labels, model)
    torch.nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
    signals = extract_signals(logits, labels, model)
    every = torch.cat([p.grad.double().view(-1) for p in model.parameters() if p.grad is not None])
    assert signals["grad_l1_norm"] == pytest.approx(float(every.abs().sum()), rel=1e-6)
    assert signals["grad_l2_norm"] == pytest.approx(float(every.norm()), rel=1e-6)


def test_sparse_half_and_complex_gradients_have_norms_too() -> None:
    model = torch.nn.Embedding(9, 4, sparse=True)
    model.register_parameter("narrow", torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16)))
    model.register_parameter("phase", torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    model(torch.tensor([1, 1, 2])).sum().backward()
    narrow: Any = model.narrow
    phase: Any = model.phase
    narrow.grad = torch.full((5,), 300.0, dtype=torch.bfloat16)
    phase.grad = torch.full((2,), 3.0 + 4.0j)
    signals = extract_signals(*batch(2, 3), model)
    assert signals["grad_l1_norm"] == pytest.approx(12.0 + 1500.0 + 14.0, rel=1e-5)


def test_training_is_the_same_to_the_bit() -> None:
    weights = []
    for watched in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            logits, labels = model(torch.randn(8, 5)), torch.randint(4, (8,))
            if watched:
                signals = extract_signals(logits, labels, model)
                assert not torch.is_tensor(signals["sample_losses"])
            torch.nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)


def test_the_signals_are_what_step_takes() -> None:
    model = torch.nn.Linear(5, 4)
    labels = torch.tensor([0, 1, 2])
    logits = model(torch.randn(3, 5))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    signals = extract_signals(logits, labels, model)
    with Argus(silent=True, catch_exceptions=False) as argus:
        argus.step(loss.item(), **signals)
    (event,) = steps_of(argus)
    losses: Any = event.sample_losses
    assert sum(losses) / 3 == pytest.approx(event.loss, rel=1e-5)
    assert event.sample_correct == tuple(signals["sample_correct"])
    assert event.grad_l1_norm == pytest.approx(signals["grad_l1_norm"])


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (None, None),
        ([[1.0, 2.0]], [0]),
        (torch.zeros(2, 3), [0, 1]),
        (torch.zeros(2, 3), torch.tensor([0])),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0])),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1])),
        (torch.zeros(3), torch.tensor([0, 1, 2])),
        (torch.zeros(2, 3, 4), torch.tensor([0, 1])),
        (torch.zeros(2, 0), torch.tensor([0, 1])),
        (torch.zeros(2, 3).to_sparse(), torch.tensor([0, 1])),
    ],
)
def test_what_is_no_logits_and_labels_gives_nothing_and_is_said_once(
    logits: Any, labels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(utils, "_told", set())
    assert [extract_signals(logits, labels) for _ in range(3)] == [{}, {}, {}]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)])
def test_a_batch_without_samples_gives_nothing_and_is_no_mistake(
    shape: Tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    assert extract_signals(torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.int64)) == {}
    assert not caplog.records


def test_a_model_that_raises_does_not_end_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def parameters(self) -> Any:
            raise RuntimeError("no")

    monkeypatch.setattr(faults, "RERAISE", False)
    assert extract_signals(*batch(2, 3), Broken()) == {}
