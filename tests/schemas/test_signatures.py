"""Keys and signatures: what is signed under a run's key is that run's, whole, and of its kind."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plarv_schemas.signatures import MIN_KEY_LENGTH, Order, parse_run_key, run_key, sign, verify

MASTER = "k" * MIN_KEY_LENGTH

orders = st.builds(
    Order,
    id=st.text("0123456789abcdef", min_size=16, max_size=16),
    run_id=st.text(),
    order=st.text(),
    operator=st.text(),
    issued_ns=st.integers(),
    expires_ns=st.integers(),
    attempt=st.none() | st.integers(),
)


@given(orders)
def test_an_order_comes_back_as_it_was(order: Order) -> None:
    assert Order.from_bytes(order.to_bytes()) == order


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_order(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an order"):
        Order.from_bytes(data)


def test_an_order_nested_without_end_is_none() -> None:
    with pytest.raises(ValueError, match="not an order"):
        Order.from_bytes(b"[" * 100_000)


@given(orders, st.data())
def test_a_damaged_order_is_refused_or_fails_its_signature(
    order: Order, data: st.DataObject
) -> None:
    value = order.to_bytes()
    place = data.draw(st.integers(0, len(value) - 1))
    damaged = (
        value[:place] + bytes([value[place] ^ data.draw(st.integers(1, 255))]) + value[place + 1 :]
    )
    key = run_key(MASTER, order.run_id)
    assert not verify(key, "order", damaged, sign(key, "order", value))
    try:
        Order.from_bytes(damaged)
    except ValueError:
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"id": 5}, {"run_id": None}, {"order": ["stop"]}, {"operator": {}}, {"issued_ns": None},
        {"expires_ns": []}, {"expires_ns": "soon"}, {"attempt": "first"},
        {"expires_ns": float("inf")}, {"issued_ns": float("nan")}, {"run_id": "\ud800"},
    ],
)  # fmt: skip
def test_an_order_with_a_field_of_another_kind_is_none(change: dict[str, object]) -> None:
    data = json.loads(Order("a", "run", "stop", "jo", 1, 2).to_bytes())
    with pytest.raises(ValueError, match="not an order"):
        Order.from_bytes(json.dumps({**data, **change}).encode())
    for name in change:
        del data[name]
        with pytest.raises(ValueError, match="not an order"):
            Order.from_bytes(json.dumps(data).encode())


@given(st.text(), st.binary())
def test_a_signature_holds_for_its_key_kind_and_value_alone(run_id: str, value: bytes) -> None:
    key = run_key(MASTER, run_id)
    signature = sign(key, "action", value)
    assert verify(key, "action", value, signature)
    assert not verify(key, "order", value, signature)
    assert not verify(key, "action", value + b"\0", signature)
    assert not verify(run_key(MASTER, run_id + "x"), "action", value, signature)
    assert not verify(run_key(MASTER + "x", run_id), "action", value, signature)
    assert not verify(key, "action", value, None)
    assert not verify(key, "action", value, "")
    assert not verify(key, "action", value, signature[:-1])


@given(st.text())
def test_a_signature_of_any_text_is_refused_and_never_raises(signature: str) -> None:
    assert not verify(run_key(MASTER, "run"), "action", b"value", signature)


def test_a_master_key_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{MIN_KEY_LENGTH} characters or more"):
        run_key("k" * (MIN_KEY_LENGTH - 1), "run")


@given(st.text())
def test_a_run_key_is_read_back_from_its_hex_digits(run_id: str) -> None:
    key = run_key(MASTER, run_id)
    assert len(key) == 32
    assert parse_run_key(f" {key.hex()}\n") == key


@pytest.mark.parametrize("text", ["", "abc", "zz" * 32, "00" * 31, "00" * 33])
def test_what_is_no_run_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        parse_run_key(text)
