"""Scalars become floats without anybody waiting for a device."""

from __future__ import annotations

import math
import threading
from decimal import Decimal
from fractions import Fraction
from typing import Any, List, Optional, Tuple

import pytest

from plarv.device_scalars import Pending, ScalarReader


class Event:
    """A device's mark that is passed when the test says so."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False

    def query(self) -> bool:
        if self.is_broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return self.is_done


class Device:
    """Stands for an accelerator: copies are made at once, events are passed on demand."""

    def __init__(self) -> None:
        self.events: List[Event] = []
        self.records = 0
        self.capturing = False
        self.has_pinned_memory = True

    def allocate(self, slots: int, width: int) -> Any:
        if not self.has_pinned_memory:
            raise RuntimeError("cannot pin memory")
        return pytest.importorskip("torch").zeros((slots, width), dtype=torch_of().float64)

    def record(self, device: object, event: Optional[Event]) -> Event:
        self.records += 1
        mark = Event() if event is None else event
        mark.is_done = False
        if event is None:
            self.events.append(mark)
        return mark

    def is_capturing(self) -> bool:
        return self.capturing


def torch_of() -> Any:
    return pytest.importorskip("torch")


def begun(reader: ScalarReader, *values: object) -> Pending:
    pending = reader.begin(values)
    assert isinstance(pending, Pending)
    return pending


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def reader(device: Device) -> ScalarReader:
    torch_of()
    return ScalarReader(backends={"cpu": device})  # type: ignore[dict-item]


def test_numbers_of_every_make_are_read_at_once() -> None:
    values = (1.5, 2, Fraction(1, 4), Decimal("0.5"), None, math.inf)
    assert ScalarReader().begin(values) == (1.5, 2.0, 0.25, 0.5, None, math.inf)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("2.5", "not a number"),
        (b"2", "not a number"),
        ([2.5], "not a scalar"),
        ((), "not a scalar"),
        ({"loss": 1.0}, "not a scalar"),
        (2j, "not a number"),
        (10**400, "too large"),
        (object(), "not a number"),
        (float, "not a number"),
    ],
)
def test_what_is_no_scalar_is_left_out_with_a_reason(value: object, reason: str) -> None:
    told: List[Tuple[int, str]] = []
    reader = ScalarReader(lambda index, why: told.append((index, why)))
    assert reader.begin((1.0, value)) == (1.0, None)
    assert told == [(1, reason)]
    assert reader.reasons == {reason: 1}


def test_numpy_scalars_and_arrays_of_one_element_are_read() -> None:
    numpy = pytest.importorskip("numpy")
    values = (numpy.float16(0.5), numpy.int64(3), numpy.array(2.5), numpy.array([1.5]))
    assert ScalarReader().begin(values) == (0.5, 3.0, 2.5, 1.5)
    reader = ScalarReader()
    assert reader.begin((numpy.array([1.0, 2.0]), numpy.array("text"))) == (None, None)
    assert len(reader.reasons) == 2


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "bool"])
def test_a_tensor_of_any_dtype_on_the_host_is_read_at_once(dtype: str) -> None:
    torch = torch_of()
    value = torch.ones((1, 1), dtype=getattr(torch, dtype))
    assert ScalarReader().begin((value,)) == (1.0,)


def test_a_loss_that_requires_grad_is_read_and_keeps_its_graph() -> None:
    torch = torch_of()
    weight = torch.ones(1, requires_grad=True)
    loss = (weight * 3).sum()
    assert ScalarReader().begin((loss,)) == (3.0,)
    loss.backward()
    assert weight.grad.item() == 3.0


def test_tensors_that_hold_no_number_are_left_out() -> None:
    torch = torch_of()
    reader = ScalarReader()
    values = (torch.ones(2), torch.ones((), dtype=torch.complex64), torch.ones((), device="meta"))
    assert reader.begin(values) == (None, None, None)
    assert reader.reasons == {"not a scalar": 1, "not a number": 1, "no data": 1}


def test_a_device_scalar_is_read_when_its_event_is_done_and_not_before(
    reader: ScalarReader, device: Device
) -> None:
    torch = torch_of()
    pending = begun(reader, torch.tensor(2.5), None, 7, torch.tensor(0.5))
    assert not pending.ready()
    assert pending.values() == (None, None, 7.0, None)
    device.events[0].is_done = True
    assert pending.ready()
    assert pending.values() == (2.5, None, 7.0, 0.5)
    assert device.records == 1  # one copy for both


def test_device_scalars_of_different_dtypes_come_exactly(
    reader: ScalarReader, device: Device
) -> None:
    torch = torch_of()
    big = 2**53 - 1
    pending = begun(
        reader, torch.tensor(big), torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(math.nan)
    )
    device.events[0].is_done = True
    first, second, third = pending.values()
    assert (first, second) == (float(big), 1.5)
    assert third is not None
    assert math.isnan(third)


def test_the_value_is_that_of_the_call_also_when_the_loss_is_changed_after(
    reader: ScalarReader, device: Device
) -> None:
    loss = torch_of().tensor(2.0)
    pending = begun(reader, loss)
    loss.zero_()
    device.events[0].is_done = True
    assert pending.values() == (2.0,)


def test_slots_are_used_again_and_a_full_ring_leaves_out_instead_of_growing(
    reader: ScalarReader, device: Device
) -> None:
    torch = torch_of()
    for step in range(600):
        pending = begun(reader, torch.tensor(float(step)))
        for event in device.events:
            event.is_done = True
        assert pending.values() == (float(step),)
    assert len(device.events) == 256
    kept = [begun(reader, torch.tensor(1.0)) for _ in range(256)]
    assert reader.begin((torch.tensor(1.0),)) == (None,)
    assert reader.reasons == {"too many under way": 1}
    device.events[3].is_done = True
    assert sum(pending.ready() for pending in kept) == 1
    assert isinstance(reader.begin((torch.tensor(1.0),)), Pending)


def test_nothing_is_asked_of_a_device_that_records_a_graph(
    reader: ScalarReader, device: Device
) -> None:
    torch = torch_of()
    device.capturing = True
    assert reader.begin((torch.tensor(1.0), 2.0)) == (None, 2.0)
    assert reader.reasons == {"graph capture": 1}
    assert device.records == 0


def test_a_device_that_failed_gives_none_and_a_reason(reader: ScalarReader, device: Device) -> None:
    pending = begun(reader, torch_of().tensor(1.0))
    device.events[0].is_broken = True
    assert pending.ready()
    assert pending.values() == (None,)
    assert reader.reasons == {"device error": 1}


def test_without_pinned_memory_the_background_thread_reads(
    reader: ScalarReader, device: Device
) -> None:
    torch = torch_of()
    device.has_pinned_memory = False
    pending = begun(reader, torch.tensor(1.25), 3, torch.tensor(0.5))
    assert pending.wait(30.0)
    assert pending.values() == (1.25, 3.0, 0.5)
    reader.close()


class Slow:
    """An array of another library, whose value comes when the test lets it."""

    size = 1

    def __init__(self, value: float) -> None:
        self._value = value
        self.may_be_read = threading.Event()

    def __float__(self) -> float:
        assert self.may_be_read.wait(30.0)
        return self._value


def test_arrays_that_would_make_us_wait_are_read_by_a_thread() -> None:
    reader, array = ScalarReader(), Slow(4.0)
    pending = begun(reader, array, 1.0)
    assert pending.values() == (None, 1.0)
    assert not pending.wait(0.0)
    array.may_be_read.set()
    assert pending.wait(30.0)
    assert pending.values() == (4.0, 1.0)
    reader.close()


def test_the_threads_queue_is_bounded() -> None:
    reader, blocking = ScalarReader(), Slow(0.0)
    pendings = [begun(reader, blocking)]
    while not reader.reasons:
        answer = reader.begin((Slow(1.0),))
        if isinstance(answer, Pending):
            pendings.append(answer)
        assert len(pendings) < 1000
    assert reader.reasons == {"too many under way": 1}
    blocking.may_be_read.set()


def test_a_replicated_dtensor_is_read_and_a_sharded_one_left_out() -> None:
    torch = torch_of()

    class Placement:
        def __init__(self, replicate: bool) -> None:
            self._replicate = replicate

        def is_replicate(self) -> bool:
            return self._replicate

    def distributed(replicate: bool) -> Any:
        tensor = torch.tensor(1.0)
        tensor._local_tensor = torch.tensor(2.0)
        tensor.placements = (Placement(replicate),)
        return tensor

    reader = ScalarReader()
    assert reader.begin((distributed(True), distributed(False))) == (2.0, None)
    assert reader.reasons == {"sharded": 1}
