"""Why a verdict was given: recomputed from what the store kept, and honest where it cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, List, Tuple

import pytest
from tests.processors.logs import log_of
from tests.processors.streams import FAULTY
from tests.sinks.forensics.recorded import kept, steps_of

from plarv_processors.detectors.detector import Scope
from plarv_processors.detectors.loss_spike import LossSpike
from plarv_schemas.events import StepEvent, Verdict
from plarv_sinks.forensics import Run, StoreError

pl = pytest.importorskip("polars")
pytest.importorskip("pyarrow")

SPIKE = [2.0 + 0.01 * (step % 5) for step in range(80)] + [9.0] * 8 + [2.0] * 60


def first(run: Run) -> Verdict:
    return run.store.verdicts(run.id)[0]


@pytest.mark.parametrize("name", sorted(FAULTY))
def test_the_verdicts_of_every_golden_log_are_recomputed_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    run = kept(tmp_path, log_of(name))
    verdicts = run.store.verdicts("run")
    last = {(found.detector, found.state): found for found in verdicts}
    assert last
    for found in last.values():
        explained = run.explain(found)
        assert explained.agrees, str(explained)
        assert explained.notes == ()
        assert explained.window.height > 0


def test_it_names_formula_settings_numbers_and_what_happened_next(tmp_path: Path) -> None:
    run = kept(tmp_path, steps_of(SPIKE))
    found = first(run)
    explained = run.explain(found.id)
    assert explained.formula.startswith("Fires when the loss jumps far above its own recent past.")
    assert "Cost:" not in explained.formula
    assert explained.settings["jump_z"] == LossSpike.Config().jump_z
    assert explained.window["step"].to_list() == list(range(16, 81))
    assert explained.window["loss"].to_list() == SPIKE[16:81]
    assert explained.next[0].startswith("step 83 (+3): confirmed escalated, critical")
    assert any("WARN" in line for line in explained.next)
    assert explained.next[-1].endswith("2 at step 147 (the attempt's last)")
    shown = str(explained)
    assert "bit for bit" in shown
    assert f"{found.evidence['median']:.4g}" in shown
    assert repr(explained) == shown


def test_the_start_of_an_id_is_enough_and_a_wrong_one_names_the_right_ones(tmp_path: Path) -> None:
    run = kept(tmp_path, steps_of(SPIKE))
    found = first(run)
    assert run.explain(found.id[:6]).verdict == found
    with pytest.raises(StoreError, match=f"no verdict with the id 'zz'.*{found.id}"):
        run.explain("zz")
    with pytest.raises(StoreError, match="no verdict with the id ''"):
        run.explain("")


def changed(**values: Any) -> Any:
    return lambda found: found._replace(**values) if found.state == "opened" else found


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"level": "critical"}, "level: recorded critical, recomputed warn"),
        ({"score": 8.5}, "score: recorded 8.5, recomputed "),
        ({"evidence": {"loss": 8.0}}, "evidence loss: recorded 8.0, recomputed 9.0"),
    ],
)
def test_what_was_recorded_otherwise_is_told(values: Any, told: str, tmp_path: Path) -> None:
    run = kept(tmp_path, steps_of(SPIKE), change=changed(**values))
    explained = run.explain(first(run))
    assert not explained.agrees
    assert any(line.startswith(told) for line in explained.differences)
    assert told in str(explained)


def test_steps_that_were_changed_since_give_other_numbers(tmp_path: Path) -> None:
    from tests.sinks.forensics.recorded import DATE

    from plarv_schemas import arrow
    from plarv_sinks.store_files import StoreFiles, steps_place

    run = kept(tmp_path, steps_of(SPIKE))
    folder, schema = steps_place(DATE, "run")
    other = steps_of([*SPIKE[:80], 12.0, *SPIKE[81:]])
    batch = arrow.encode_steps(
        [event for event in other if isinstance(event, StepEvent)],
        ordinals=range(1, len(other)), attempts=[1] * (len(other) - 1),
        schema=arrow.file_schema("steps"),
    )  # fmt: skip
    files = StoreFiles(tmp_path)
    files.write(f"{folder}/0.parquet", schema, [batch])
    explained = run.explain(first(run))
    assert "evidence loss: recorded 9.0, recomputed 12.0" in explained.differences


def test_a_verdict_of_another_version_is_told(tmp_path: Path) -> None:
    old = "loss_spike-000000"
    run = kept(tmp_path, steps_of(SPIKE), change=lambda found: found._replace(version=old))
    explained = run.explain(first(run))
    assert any(f"recorded by version {old}" in note for note in explained.notes)
    assert explained.recomputed is not None  # the numbers are still there to be compared


def test_a_detector_that_is_not_installed_leaves_what_was_recorded(tmp_path: Path) -> None:
    run = kept(tmp_path, steps_of(SPIKE), change=lambda found: found._replace(detector="mine"))
    explained = run.explain(first(run))
    assert explained.recomputed is None
    assert not explained.agrees
    assert "detector mine is not installed here" in str(explained)
    assert "score" in explained._repr_html_()


class Careful:
    """Fires on every loss above 5.

    Cost: nothing.
    """

    name: ClassVar[str] = "careful"
    scope: ClassVar[Scope] = "run"
    version = "careful-1"

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        if event.loss is None or not event.loss > 5.0:
            return ()
        found = Verdict(event.run_id, 0, None, event.step, -1, self.name, "high", "warn", "opened",
                        event.step, event.loss, 5.0, {}, "high", self.version)  # fmt: skip
        return (found,)


def test_an_own_detector_is_handed_over(tmp_path: Path) -> None:
    run = kept(tmp_path, steps_of([1.0, 9.0]))
    (verdict,) = Careful().update(StepEvent("run", "a", 2, 0, 1, loss=9.0))
    explained = run.explain(verdict._replace(attempt=1, ordinal=2), detector=Careful)
    assert explained.agrees
    assert explained.formula == "Fires on every loss above 5."
    assert explained.settings == {}


def test_a_verdict_that_the_steps_do_not_give_is_not_confirmed(tmp_path: Path) -> None:
    run = kept(tmp_path, steps_of([1.0, 9.0]))
    (verdict,) = Careful().update(StepEvent("run", "a", 1, 0, 0, loss=9.0))
    explained = run.explain(verdict._replace(attempt=1, ordinal=1), detector=Careful)
    assert explained.recomputed is None
    assert "it finds nothing at this place" in str(explained)


def test_events_that_the_store_lost_are_counted(tmp_path: Path) -> None:
    from tests.sinks.forensics.recorded import DATE

    run = kept(tmp_path, steps_of(SPIKE))
    (tmp_path / f"table=events/date={DATE}/run.parquet").unlink()
    explained = run.explain(first(run))
    assert explained.notes == ("1 events before it are not in the store (any more)",)
    assert explained.agrees


def test_a_verdict_about_one_rank_shows_that_rank_and_peers_where_they_were_read(
    tmp_path: Path,
) -> None:
    run = kept(tmp_path, log_of("straggler"))
    explained = run.explain(first(run))
    assert set(explained.window["rank"]) == {0, 1, 2, 3}
    assert "step_time_ms" in explained.window.columns


def test_a_verdict_of_the_second_attempt_sees_that_attempt_alone(tmp_path: Path) -> None:
    log = steps_of(SPIKE[:60]) + steps_of(SPIKE, session="b", first=40)
    run = kept(tmp_path, log)
    explained = run.explain(first(run))
    assert explained.verdict.attempt == 2
    assert explained.agrees
    assert explained.window["step"].to_list()[0] >= 40


def test_nan_in_the_evidence_is_no_difference(tmp_path: Path) -> None:
    run = kept(tmp_path, steps_of([2.0] * 30 + [math.nan] * 5))
    found = first(run)
    assert math.isnan(found.evidence["loss"])
    assert run.explain(found).agrees


def test_its_markup_is_escaped_and_fetches_nothing(tmp_path: Path) -> None:
    message = "<script>alert(1)</script>"
    run = kept(tmp_path, steps_of(SPIKE), change=lambda found: found._replace(message=message))
    shown = run.explain(first(run))._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "http" not in shown


def test_it_goes_into_json(tmp_path: Path) -> None:
    import json

    run = kept(tmp_path, steps_of(SPIKE))
    data: Any = json.loads(json.dumps(run.explain(first(run)).to_dict()))
    assert data["agrees"] is True
    assert data["verdict"]["detector"] == "loss_spike"
    lines: List[str] = data["next"]
    assert lines
