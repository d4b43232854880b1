"""Slots are whole or not there, and the newest certified one is never given up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Set, Tuple

import pytest
from tests.producer.processes import environment

from plarv.checkpoints.anchor import write_anchor
from plarv.checkpoints.parts import anchor_of_all, folder_of, had_by_all
from plarv.checkpoints.slots import Slot, Slots, choose, read_json, write_json
from plarv.checkpoints.tensor_file import write_tensor_file


def put(slots: Slots, number: int, step: int, content: bytes = b"x") -> Slot:
    draft = slots.draft()
    digest = write_tensor_file(draft / "model", b"", memoryview(content))
    about = {"run_id": "run", "step": step}
    return slots.publish(draft, number, {"model": digest}, about)


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    found = Slots(tmp_path / "checkpoints")
    assert found.open()
    return found


def slot(number: int, sequence: int, certified: bool) -> Slot:
    return Slot(number, Path(), "run", sequence, sequence, 1, "", certified)


def names(slots: Slots) -> List[str]:
    return sorted(path.name for path in slots.folder.iterdir())


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


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "{", "[" * 100_000, '{"format": 9, "files": {}}',
        '{"format": 2, "files": {"\\u0000": {"size_bytes": 1}}}',
        '{"format": 2, "files": {"model": {"size_bytes": Infinity}}}',
    ],
    ids=["empty", "list", "object", "cut", "deep", "newer", "zero", "infinite"],
)  # fmt: skip
def test_what_may_be_a_checkpoint_is_left_alone_and_told(slots: Slots, text: str) -> None:
    found = put(slots, 0, 1)
    (found.path / "checkpoint.json").write_text(text)
    assert slots.all() == ()
    assert str(found.path) in slots.blocked()[0]
    with pytest.raises(FileExistsError, match="slot-0"):
        put(slots, 0, 2)
    assert (found.path / "checkpoint.json").read_text() == text
    assert (found.path / "model").read_bytes() == b"x"


def test_a_slot_that_lacks_a_file_that_it_lists_is_free(slots: Slots) -> None:
    (put(slots, 0, 1).path / "model").unlink()
    assert (slots.all(), slots.blocked()) == ((), {})
    assert put(slots, 0, 2).step == 2


def test_a_folder_of_somebody_elses_is_no_slot_and_keeps_what_it_holds(slots: Slots) -> None:
    (slots.folder / "slot-1").mkdir()
    (slots.folder / "slot-1" / "thesis.txt").write_text("mine")
    (slots.folder / "slot-2").write_text("mine too")
    assert sorted(slots.blocked()) == [1, 2]
    assert choose(slots.all(), slots.blocked()) == 0
    for number in (1, 2):
        with pytest.raises(FileExistsError):
            put(slots, number, 1)
    assert (slots.folder / "slot-1" / "thesis.txt").read_text() == "mine"
    assert (slots.folder / "slot-2").read_text() == "mine too"


def test_a_slot_that_cannot_be_read_now_is_not_overwritten(slots: Slots) -> None:
    found = put(slots, 0, 1)
    manifest = found.path / "checkpoint.json"
    os.rename(manifest, found.path / "aside")
    os.symlink("checkpoint.json", manifest)  # reading it fails, for whoever reads
    assert "cannot be read" in slots.blocked()[0]
    os.rename(found.path / "aside", manifest)
    assert (slots.all(), slots.blocked()) == ((found,), {})


def test_a_link_is_never_followed(slots: Slots, tmp_path: Path) -> None:
    other = Slots(tmp_path / "other")
    assert other.open()
    theirs = put(other, 0, 7)
    os.symlink(theirs.path, slots.folder / "slot-0")
    assert slots.all() == ()
    assert "no folder" in slots.blocked()[0]
    with pytest.raises(FileExistsError):
        put(slots, 0, 8)
    assert other.all() == (theirs,)


def test_a_rename_that_fails_leaves_the_old_slot(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(slots, 0, 1)
    assert slots.certify(1, {}) is not None
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if "draft" in Path(source).name:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="Input/output"):
            put(slots, 0, 2)
    assert [(s.step, s.certified) for s in slots.all()] == [(1, True)]
    slots.close()
    assert Slots(slots.folder).open()
    assert names(slots) == [".lock", "slot-0"]


def test_age_is_no_clocks(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    for at, step in enumerate((30, 20, 10)):
        monkeypatch.setattr(time, "time_ns", lambda at=at: 1000 - at)
        put(slots, at, step)
    assert [s.step for s in slots.all()] == [30, 20, 10]
    slots.close()
    again = Slots(slots.folder)
    assert again.open()
    put(again, 0, 5)
    assert [(s.step, s.sequence) for s in again.all()] == [(20, 2), (10, 3), (5, 4)]


def test_a_step_of_an_earlier_attempt_is_not_certified(slots: Slots) -> None:
    put(slots, 0, 50)
    since = slots.sequence
    assert slots.certify(50, {}, after=since) is None
    put(slots, 1, 50)
    found = slots.certify(50, {}, after=since)
    assert found is not None
    assert [(s.number, s.certified) for s in slots.all()] == [(0, False), (1, True)]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"checksum": "another"}'])
def test_a_certificate_is_of_one_content(slots: Slots, text: str) -> None:
    found = put(slots, 0, 1)
    (found.path / "certified.json").write_text(text)
    assert [s.certified for s in slots.all()] == [False]


def test_halves_of_json_files_are_swept(slots: Slots) -> None:
    found = put(slots, 0, 1)
    half = "certified.json.0123abcd"
    for path in (slots.folder / ".anchor_point.json.0123abcd", found.path / f".{half}"):
        path.write_text("{")
    (slots.folder / ".notes.json.0123abcd").write_text("mine")
    slots.close()
    assert Slots(slots.folder).open()
    assert names(slots) == [".lock", ".notes.json.0123abcd", "slot-0"]
    assert sorted(p.name for p in found.path.iterdir()) == ["checkpoint.json", "model"]


def test_all_that_lies_in_a_slot_is_synced(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = slots.draft()
    (draft / "tokenizer").mkdir()
    (draft / "tokenizer" / "model").write_text("not the model")
    digest = write_tensor_file(draft / "model", b"", memoryview(b"x"))
    synced: List[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    slots.publish(draft, 0, {"model": digest}, {"run_id": "run", "step": 1})
    assert str(draft / "tokenizer" / "model") in synced
    assert str(draft / "tokenizer") in synced


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
    about = {"run_id": "run", "step": step}
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


_KILLED = """
import os, signal, sys
from pathlib import Path
from plarv.checkpoints.slots import Slots
from plarv.checkpoints.tensor_file import write_tensor_file
slots = Slots(Path(sys.argv[1]))
assert slots.open()
left = int(sys.argv[2])
def killing(call):
    def until(*arguments, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*arguments, **named)
    return until
for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "open"):
    setattr(os, name, killing(getattr(os, name)))
draft = slots.draft()
digest = write_tensor_file(draft / "model", b"", memoryview(b"new"))
slots.publish(draft, 0, {"model": digest}, {"run_id": "run", "step": 2})
assert slots.certify(2, {})
"""


@pytest.mark.slow
def test_a_kill_at_any_call_leaves_the_old_slot_or_the_new_one(tmp_path: Path) -> None:
    seen: Set[Tuple[int, bool]] = set()
    code = 1
    for calls in range(200):
        slots = Slots(tmp_path / str(calls))
        assert slots.open()
        put(slots, 0, 1)
        assert slots.certify(1, {}) is not None
        slots.close()
        command = [sys.executable, "-c", _KILLED, str(slots.folder), str(calls)]
        code = subprocess.run(command, env=environment(), check=False).returncode
        assert code in (0, -signal.SIGKILL)
        again = Slots(slots.folder)
        assert again.open()
        (found,) = again.all()
        assert again.verify(found) is None
        assert names(again) == [".lock", "slot-0"]
        assert not list(found.path.glob(".*"))
        seen.add((found.step, found.certified))
        again.close()
        if code == 0:
            break
    assert code == 0
    assert seen == {(1, True), (2, False), (2, True)}


@pytest.mark.slow
def test_a_hundred_kills_leave_every_certified_slot_readable(tmp_path: Path) -> None:
    for number in range(100):
        kill_and_look(tmp_path, 0.0007 * number)


def test_ranks_go_back_to_what_all_of_them_have(tmp_path: Path) -> None:
    """A job died between two ranks' certificates, and on one of them before the last was saved."""
    ranks = [Slots(folder_of(tmp_path, rank)) for rank in range(2)]
    for rank, slots in enumerate(ranks):
        assert slots.open()
        for number, step in enumerate((50, 100, 150)[: 3 - rank]):
            put(slots, number, step)
        for step in (50, 100)[: 2 - rank]:
            assert slots.certify(step, {"step": step}) is not None
    for slots in ranks:
        every = slots.all()
        certified = [slot for slot in every if slot.certified]
        assert [slot.step for slot in had_by_all(certified, slots.folder, 2)] == [50]
        assert [slot.step for slot in had_by_all(every, slots.folder, 2)] == [50, 100]
        assert had_by_all(certified, slots.folder, 1) == certified
        assert had_by_all(certified, slots.folder, 3) == had_by_all(certified, slots.folder, 2)
        assert had_by_all([], slots.folder, 2) == []
    write_anchor(ranks[0].folder, ranks[0].all()[1])
    assert anchor_of_all(ranks[1].folder, 2)["step"] == 100
    write_anchor(ranks[1].folder, ranks[1].all()[0])
    assert {anchor_of_all(slots.folder, 2)["step"] for slots in ranks} == {50}
    assert anchor_of_all(ranks[0].folder, 1)["step"] == 100
    assert anchor_of_all(tmp_path / "nowhere", 1) == {}
