"""Slots are whole or not there, and the newest certified one is never given up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional

import pytest
from tests.producer.processes import environment

from plarv.checkpoints.slots import Slot, Slots, choose, read_json, write_json
from plarv.checkpoints.tensor_file import write_tensor_file


def put(slots: Slots, number: int, step: int, content: bytes = b"x") -> Slot:
    draft = slots.draft()
    digest = write_tensor_file(draft / "model", b"", memoryview(content))
    about = {"run_id": "run", "step": step, "time_ns": step}
    return slots.publish(draft, number, {"model": digest}, about)


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    found = Slots(tmp_path / "checkpoints")
    assert found.open()
    return found


def slot(number: int, time_ns: int, certified: bool) -> Slot:
    return Slot(number, Path(), "run", time_ns, time_ns, 1, "", certified)


@pytest.mark.parametrize(
    ("states", "keep", "expected"),
    [
        ("", [], 0),
        ("w", [], 1),
        ("wcw", [], 0),
        ("cww", [], 1),
        ("ccw", [], 0),
        ("ccw", [0], 2),
        ("ccc", [], 0),
        ("www", [], 0),
        ("wcw", [0, 2], None),
        ("cc", [2], 0),
    ],
)
def test_the_slot_to_write_next(states: str, keep: List[int], expected: Optional[int]) -> None:
    """``states``: by slot, which is by age; c: certified, w: waiting."""
    slots = [slot(at, at, state == "c") for at, state in enumerate(states)]
    assert choose(slots, keep) == expected


def test_the_newest_certified_one_stays_whatever_its_number() -> None:
    slots = [slot(0, 9, True), slot(1, 5, True), slot(2, 7, False)]
    assert choose(slots) == 1


def test_a_slot_is_read_as_it_was_written_and_replaced_as_a_whole(slots: Slots) -> None:
    put(slots, 0, 10)
    assert slots.certify(10, {"step": 60}) is not None
    assert [(s.step, s.certified) for s in slots.all()] == [(10, True)]
    put(slots, 0, 20, b"yy")
    (found,) = slots.all()
    assert (found.step, found.certified, found.size_bytes) == (20, False, 2)
    assert slots.verify(found) is None
    assert slots.certify(10, {}) is None
    assert sorted(p.name for p in slots.folder.iterdir()) == [".lock", "slot-0"]


def test_damage_is_found(slots: Slots) -> None:
    found = put(slots, 1, 10, b"abc")
    (found.path / "model").write_bytes(b"abd")
    assert "damaged" in str(slots.verify(found))
    (found.path / "model").write_bytes(b"ab")
    assert slots.all() == ()
    assert "slot-1" in str(slots.verify(found))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9, "files": {}}', "{"])
def test_a_manifest_that_is_damaged_makes_no_slot(slots: Slots, text: str) -> None:
    found = put(slots, 0, 1)
    (found.path / "checkpoint.json").write_text(text)
    assert slots.all() == ()
    assert put(slots, 0, 2).step == 2


def test_what_is_not_ours_stays(slots: Slots) -> None:
    (slots.folder / "notes.txt").write_text("mine")
    slots.close()
    other = Slots(slots.folder)
    assert other.open()
    for number in range(3):
        put(other, number, number)
    assert (slots.folder / "notes.txt").read_text() == "mine"


def test_a_folder_has_one_process_at_a_time(slots: Slots) -> None:
    other = Slots(slots.folder)
    assert not other.open()
    slots.close()
    assert other.open()


def test_a_full_disk_leaves_the_other_slots_and_no_draft(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(slots, 0, 1)
    draft = slots.draft()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            write_tensor_file(draft / "model", b"a", memoryview(b""))
    slots.discard(draft)
    assert [s.step for s in slots.all()] == [1]
    assert sorted(p.name for p in slots.folder.iterdir()) == [".lock", "slot-0"]


def test_a_json_file_is_replaced_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["file.json"]
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_json(path)


_WRITER = """
import sys
from pathlib import Path
from plarv.checkpoints.slots import Slots, choose
from plarv.checkpoints.tensor_file import write_tensor_file
slots = Slots(Path(sys.argv[1]))
assert slots.open()
step = max([slot.step for slot in slots.all()], default=0)
while True:
    step += 1
    draft = slots.draft()
    files = {name: write_tensor_file(draft / name, b"", memoryview(bytes([step % 256]) * 50_000))
             for name in ("model", "optimizer")}
    about = {"run_id": "run", "step": step, "time_ns": step}
    slots.publish(draft, choose(slots.all()), files, about)
    if step % 2:
        assert slots.certify(step, {"step": step})
        print(step, flush=True)
"""


def kill_and_look(folder: Path, after_s: float) -> Dict[str, int]:
    """Starts a writer, kills it, and checks what it left; the newest step it had certified."""
    child = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder)],
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert child.stdout is not None
    first = child.stdout.readline()
    time.sleep(after_s)
    os.kill(child.pid, signal.SIGKILL)
    lines = [first, *child.stdout.read().split()]
    child.wait()
    child.stdout.close()
    said = max(int(line) for line in lines)
    slots = Slots(folder)
    assert slots.open()
    whole = slots.all()
    assert all(slots.verify(found) is None for found in whole)
    newest = max(found.step for found in whole if found.certified)
    assert newest >= said
    slots.close()
    return {"said": said, "newest": newest}


def test_a_writer_that_is_killed_leaves_every_certified_slot_readable(tmp_path: Path) -> None:
    for number in range(8):
        kill_and_look(tmp_path, 0.003 * number)


@pytest.mark.slow
def test_a_hundred_kills_leave_every_certified_slot_readable(tmp_path: Path) -> None:
    for number in range(100):
        kill_and_look(tmp_path, 0.0007 * number)
