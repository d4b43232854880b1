from __future__ import annotations

import json
import math
import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
from tests.sinks.report.written_runs import diverging, healthy, lost, straggling, write_run

from plarv.cli import main
from plarv_schemas.events import Verdict
from plarv_sinks.replay import ReplayError
from plarv_sinks.report.page import page
from plarv_sinks.report.source import of_folder
from plarv_sinks.report.story import Story, read_story


class Reader(HTMLParser):
    """Which elements and attributes a page has, and whether its elements close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: List[str] = []
        self.attributes: List[Tuple[str, Optional[str]]] = []
        self.open: List[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def story_of(folder: Path) -> Story:
    return read_story(of_folder(folder, print))


def marks_of(text: str) -> Dict[str, int]:
    found = re.findall(r'data-mark="(\w+)"', text)
    return {level: found.count(level) for level in found}


def test_a_healthy_run_says_so_and_marks_nothing(tmp_path: Path) -> None:
    story = story_of(write_run(tmp_path / "calm", healthy, 400))
    assert (story.level, story.headline) == ("ok", "Healthy")
    assert story.sentences[0].startswith("The run went 400 steps in 1 min 4")
    assert story.sentences[1] == "Nothing was found wrong in 400 steps."
    text = page(story)
    assert marks_of(text) == {}
    assert "First cause" not in text


def test_a_run_that_diverged_says_when_where_and_what_to_do(tmp_path: Path) -> None:
    story = story_of(write_run(tmp_path / "wrong", diverging, 1000, status="failed"))
    assert story.level == "critical"
    assert story.cause.step == 700
    assert len(story.sentences) == 3
    assert "the learning rate rose from 0.0006 to 0.024 (x40)" in story.sentences[1]
    assert "SET_LR" in story.sentences[2]
    text = page(story)
    marks = marks_of(text)
    assert marks["cause"] >= 4  # at every curve
    assert marks["action"] >= 1
    for verdict in story.recorded.verdicts:
        assert f"{verdict.detector}/{verdict.kind} {verdict.state}" in text


def test_ranks_stand_side_by_side_and_the_slow_one_is_marked(tmp_path: Path) -> None:
    story = story_of(write_run(tmp_path / "four", straggling, 500, ranks=4))
    assert story.cause.rank == 2
    assert "look at the machine of rank 2" in story.sentences[2]
    text = page(story)
    rows = re.findall(r'<tr class="(odd|even)"><td class="number">(\d)</td>', text)
    assert rows == [("even", "0"), ("even", "1"), ("odd", "2"), ("even", "3")]
    assert story.facts.num_steps == 500


def test_a_run_of_nan_alone_is_drawn_as_such(tmp_path: Path) -> None:
    story = story_of(write_run(tmp_path / "nan", lost, 100))
    text = page(story)
    assert "no loss was ever finite" in story.sentences[0]
    assert text.count("not finite at the end") == 2
    assert 'class="lost"' in text


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_run_that_hardly_began_is_a_page_too(tmp_path: Path, steps: int) -> None:
    folder = write_run(tmp_path / "short", healthy, steps)
    story = story_of(folder)
    assert story.headline == ("Nothing found, in few steps" if steps else "No step was recorded")
    assert Reader(page(story)).open == []


def test_a_run_that_recovered_in_its_next_attempt_is_told_as_that(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "twice", diverging, 900, status="interrupted")
    write_run(folder, healthy, 300, first_step=600, name="b", after_s=3600.0)
    story = story_of(folder)
    assert (story.level, story.headline) == ("warn", "Went wrong, and recovered")
    assert story.cause.attempt == 1
    assert ">attempt 1</span>" in page(story)
    assert "<th>attempt</th>" in page(story)


def test_text_from_outside_is_never_markup(tmp_path: Path) -> None:
    nasty = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>\x1b[31m\u202e"
    started = {"project": nasty, "sdk": nasty, "dtype": nasty}
    folder = write_run(tmp_path / "<b>run", healthy, 200, started=started, status=nasty)
    story = story_of(folder)
    verdict = Verdict(
        "r", 1, None, 5, 5, nasty, nasty, "critical", "opened", 5, 1.0, 1.0, {}, nasty, nasty
    )
    recorded = story.recorded._replace(
        verdicts=[verdict], run_id=nasty, commands=(nasty,), snippet=nasty
    )
    text = page(story._replace(recorded=recorded, headline=nasty, sentences=(nasty,) * 3), nasty)
    read = Reader(text)
    assert read.open == []
    assert "img" not in read.tags
    assert read.tags.count("script") == 1
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_page_names_nothing_that_a_browser_would_load(tmp_path: Path) -> None:
    text = page(story_of(write_run(tmp_path / "wrong", diverging, 800)))
    read = Reader(text)
    assert {"link", "img", "iframe", "object"}.isdisjoint(read.tags)
    assert {"src", "href", "srcset", "action"}.isdisjoint(name for name, _ in read.attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text or "default-src &#x27;none&#x27;" in text


def test_the_timeline_shows_its_ends_and_says_how_much_it_leaves_out(tmp_path: Path) -> None:
    story = story_of(write_run(tmp_path / "calm", healthy, 100))
    verdicts = [
        Verdict("r", 1, None, n, n, "d", "k", "warn", "opened", n, 1.0, 1.0, {}, f"m{n}.", "d-1")
        for n in range(1000)
    ]
    text = page(story._replace(recorded=story.recorded._replace(verdicts=verdicts)))
    assert "1,002 entries" in text
    assert "702 left out" in text
    assert "m0." in text
    assert "m999." in text
    assert '<td class="text">m500.</td>' not in text


def test_a_damaged_journal_is_reported_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "cut", healthy, 300)
    segment = max(folder.glob("*.journal"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    segment.write_bytes(data)
    told: List[str] = []
    story = read_story(of_folder(folder, told.append))
    assert Reader(page(story)).open == []
    assert 0 < story.facts.num_steps < 300


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="no journal"):
        of_folder(tmp_path, print)


def test_the_command_writes_one_file_and_prints_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "a run", healthy, 100)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == "a_run.html\n"
    assert (tmp_path / "a_run.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".new")] == []


def test_the_facts_come_as_json_without_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "nan", lost, 100)
    monkeypatch.setenv("ARGUS_DIR", str(tmp_path))
    assert main(["report", "nan", "--json"]) == 0
    told: Any = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["level"] == "critical"
    assert told["first_cause"]["step"] == 0
    assert told["loss"]["last"] == "nan"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("arguments", [["nowhere"], ["nowhere", "--store", "no/store"]])
def test_a_run_that_is_not_there_is_a_complaint(
    arguments: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments]) == 2
    assert "argus: " in capsys.readouterr().err


def test_a_file_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "calm", healthy, 50)
    assert main(["report", str(folder), "--output", str(tmp_path / "none" / "r.html")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_run_in_a_store_gives_the_page_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="stores are Parquet")
    from plarv_sinks.archive import archive

    folder = write_run(tmp_path / "wrong", diverging, 800)
    archive(folder, tmp_path / "store", tell=print)
    assert main(["report", str(folder), "--json"]) == 0
    of_the_folder = json.loads(capsys.readouterr().out)
    monkeypatch.setenv("ARGUS_STORE", str(tmp_path / "store"))
    assert main(["report", "wrong", "--json"]) == 0
    of_the_store = json.loads(capsys.readouterr().out)
    del of_the_folder["reproduce"], of_the_store["reproduce"]
    assert of_the_store == of_the_folder


def test_a_journal_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    import subprocess

    folder = write_run(tmp_path / "calm", healthy, 100)
    program = (
        "import sys; before = set(sys.modules); from plarv.cli import main; "
        f"assert main(['report', {str(folder)!r}, '--json']) == 0; "
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "assert names.isdisjoint({'pyarrow', 'polars', 'numpy', 'matplotlib'}), names"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_long_run_makes_no_large_page(tmp_path: Path) -> None:
    def noisy(step: int, rank: int, chance: Any) -> Dict[str, Any]:
        value = math.exp(zlib.crc32(b"%d" % step) / 2**30)
        return {"loss": value, "grad_norm": value, "current_lr": value, "update_norm": value}

    text = page(story_of(write_run(tmp_path / "long", noisy, 5_000)))
    assert len(text) < 500_000
