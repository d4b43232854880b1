"""The object beside the loop with numpy's and torch's values, and in torch's usual loops."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import torch
from tests.producer.runs import controls_of, steps_of

from plarv import Argus, ArgusConfigurationError
from plarv_schemas.events import StepEvent

NUMPY = ["float16", "float32", "float64", "longdouble", "int8", "int64", "uint8", "bool_"]
TORCH = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.uint8, torch.bool, *(
        [torch.float8_e4m3fn, torch.float8_e5m2] if hasattr(torch, "float8_e4m3fn") else []
    ),
]  # fmt: skip


def the_step(argus: Argus) -> StepEvent:
    argus.complete()
    (step,) = steps_of(argus)
    return step


def small_model() -> Tuple[Any, Any, Any, Any]:
    """Model, optimizer, inputs and targets."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, optimizer, torch.randn(16, 4), torch.randn(16, 1)


@pytest.mark.parametrize("kind", NUMPY)
def test_a_loss_is_a_numpy_scalar_or_a_0_d_array_of_any_type(kind: str) -> None:
    argus = Argus(silent=True)
    argus.step(getattr(np, kind)(1))
    argus.step(np.array(1, dtype=getattr(np, kind)), np.array([1], dtype=getattr(np, kind)))
    argus.complete()
    assert [step.loss for step in steps_of(argus)] == [1.0, 1.0]
    assert steps_of(argus)[1].grad_norm == 1.0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_a_loss_is_a_tensor_with_one_element_of_any_dtype(
    dtype: torch.dtype, shape: Tuple[int, ...]
) -> None:
    argus = Argus(silent=True)
    argus.step(torch.ones(shape).to(dtype), current_lr=torch.tensor(0.5))
    step = the_step(argus)
    assert (step.loss, step.current_lr) == (1.0, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_non_finite_tensor_is_recorded_as_what_it_is(dtype: torch.dtype, value: float) -> None:
    argus = Argus(silent=True)
    argus.step(torch.tensor(value, dtype=dtype))
    assert repr(the_step(argus).loss) == repr(value)


@pytest.mark.parametrize(
    "loss",
    [
        torch.ones(2),
        torch.ones(0),
        torch.tensor(1j),
        torch.ones((), device="meta"),
        np.ones(2),
        np.array("1.0"),
        np.complex64(1j),
        np.str_("1.0"),
    ],
    ids=lambda loss: f"{type(loss).__name__} {getattr(loss, 'dtype', '')}",
)
def test_what_has_not_one_number_is_left_out_and_counted(
    capsys: pytest.CaptureFixture[str], loss: Any
) -> None:
    argus = Argus()
    argus.step(loss, epoch=1.0)
    step = the_step(argus)
    assert (step.loss, step.epoch) == (None, 1.0)
    assert "1 x loss was no number" in capsys.readouterr().err


@pytest.mark.parametrize("step", [np.int64(7), np.int32(7), np.array(7), torch.tensor(7)])
def test_a_step_is_any_whole_number(step: Any) -> None:
    argus = Argus(silent=True)
    argus.step(2.5, step=step)
    argus.step(2.5)
    argus.complete()
    assert [each.step for each in steps_of(argus)] == [7, 8]


def test_a_step_beyond_double_precision_is_not_rounded() -> None:
    argus = Argus(silent=True)
    step: Any = np.int64((1 << 60) + 1)
    argus.step(2.5, step=step)
    assert the_step(argus).step == (1 << 60) + 1


def test_a_loss_that_requires_grad_is_read_and_its_graph_is_not_kept() -> None:
    model, optimizer, inputs, targets = small_model()
    argus = Argus(silent=True)
    references: List[Any] = []
    for _ in range(3):
        loss: Any = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        argus.step(loss)
        references.append(weakref.ref(loss))
        expected = loss.item()
        del loss
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    argus.complete()
    assert steps_of(argus)[-1].loss == expected


def test_the_published_quick_start_has_a_gradient_norm_without_a_model() -> None:
    model, optimizer, inputs, targets = small_model()
    argus = Argus(api_key="your-key", silent=True)
    norms: List[float] = []
    for _ in range(5):
        loss: Any = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        squares = [float(p.grad.double().pow(2).sum()) for p in model.parameters()]
        norms.append(math.sqrt(math.fsum(squares)))
        optimizer.step()
        optimizer.zero_grad()
        argus.step(loss)
    argus.complete()
    found = steps_of(argus)
    assert [step.grad_norm for step in found[1:]] == pytest.approx(norms[1:], rel=1e-5)
    assert [step.current_lr for step in found[2:]] == [0.05] * 3


def test_with_model_and_optimizer_norm_rate_and_size_of_the_update_are_measured() -> None:
    model, optimizer, inputs, targets = small_model()
    argus = Argus(model=model, optimizer=optimizer, silent=True)
    for _ in range(20):
        optimizer.zero_grad()
        loss: Any = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        argus.step(2.5)
    argus.complete()
    found = steps_of(argus)
    assert all(step.grad_norm is not None for step in found)
    assert [step.current_lr for step in found] == [0.05] * 20
    updates = [step for step in found if step.update_norm is not None]
    assert updates
    for step in updates:  # plain SGD: the update is lr times the gradient
        assert step.update_norm == pytest.approx(0.05 * (step.grad_norm or 0.0), rel=1e-4)
    (started,) = controls_of(argus, "session_started")
    assert (started.data["dtype"], started.data["parameters"]) == ("float32", 49)
    assert (started.data["num_layers"], started.data["hidden_dim"]) == (2, 8)


def test_a_model_without_gradients_is_watched_without_them() -> None:
    model, _, inputs, targets = small_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    argus = Argus(model=model, silent=True)
    for _ in range(3):
        argus.step(torch.nn.functional.mse_loss(model(inputs), targets))
    argus.complete()
    assert [step.grad_norm for step in steps_of(argus)] == [None] * 3
    assert all(step.loss is not None for step in steps_of(argus))


def test_a_gradient_norm_that_is_given_goes_before_the_one_that_is_measured() -> None:
    model, optimizer, inputs, targets = small_model()
    argus = Argus(model=model, optimizer=optimizer, silent=True)
    loss: Any = torch.nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    argus.step(loss, norm, current_lr=0.5, update_norm=3.0)
    step = the_step(argus)
    assert (step.grad_norm, step.current_lr, step.update_norm) == (norm.item(), 0.5, 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_samples_come_as_tensors_of_any_dtype_and_shape(dtype: torch.dtype) -> None:
    argus = Argus(silent=True)
    values = torch.tensor([[0, 1], [2, 3]]).to(dtype)
    argus.step(
        2.5,
        sample_losses=values.clone().requires_grad_(dtype.is_floating_point),
        sample_confidences=values.float().numpy(),
        sample_ids=torch.arange(4),
        sample_correct=torch.tensor([True, False, True, True]),
    )
    step = the_step(argus)
    assert step.sample_losses == step.sample_confidences == (0.0, 1.0, 2.0, 3.0)
    assert step.sample_ids == (0, 1, 2, 3)
    assert step.sample_correct == (1, 0, 1, 1)


def test_a_tensor_for_a_learning_rate_is_recorded_also_when_it_comes_later() -> None:
    _, optimizer, _, _ = small_model()
    argus = Argus(optimizer=optimizer, silent=True)
    argus.step(2.5, 1.0)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    argus.step(2.5, 1.0)
    optimizer.param_groups[0]["lr"] = torch.tensor([0.25, 0.25])
    argus.step(2.5, 1.0)
    argus.complete()
    assert [step.current_lr for step in steps_of(argus)] == [0.05, 0.25, None]


def test_a_rate_that_is_a_tensor_from_the_start_is_recorded_by_the_long_way() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25), capturable=True)
    argus = Argus(optimizer=optimizer, silent=True)
    argus.step(2.5, 1.0)
    assert the_step(argus).current_lr == 0.25


def test_numpy_numbers_are_as_good_as_pythons_for_the_constructor() -> None:
    counts: Dict[str, Any] = {"total_steps": np.int64(100), "start_step": np.int8(3)}
    counts["vocab_size"] = np.int32(50)
    argus = Argus(silent=True, **counts)
    argus.step(2.5)
    argus.complete()
    (started,) = controls_of(argus, "session_started")
    assert (started.data["total_steps"], started.data["vocab_size"]) == (100, 50)
    assert [step.step for step in steps_of(argus)] == [3]


@pytest.mark.parametrize("value", [np.array([1, 2]), torch.ones(2), np.float64(3.0)], ids=repr)
def test_an_array_is_no_count(value: Any) -> None:
    with pytest.raises(ArgusConfigurationError) as raised:
        Argus(total_steps=value)
    assert raised.value.parameter == "total_steps"


def test_a_torch_dtype_is_named_as_people_name_it() -> None:
    argus = Argus(silent=True, dtype=torch.bfloat16)
    argus.complete()
    (started,) = controls_of(argus, "session_started")
    assert started.data["dtype"] == "bfloat16"
