"""One harness over every registered detector, those of other packages too."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Type

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.processors.detectors import laws
from tests.processors.streams import FAULTY, HEALTHY, language_model

from plarv_processors.detectors import BUILTIN, load, registered
from plarv_processors.detectors.detector import Detector
from plarv_schemas.events import StepEvent, Verdict

DETECTORS = registered()
RESIDENT_BYTES = 24 * 1024  # of all twelve, of one run
PACKED_BYTES = 12 * 1024
RANK_BYTES = 1024  # for each further rank, of all twelve

# A loss that rises by design cannot be told from one that leaves its best level: that much is said.
ALLOWED = {("rising_by_design", "loss_divergence")}


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("cls", DETECTORS, ids=lambda cls: cls.name)
def test_every_detector_keeps_the_law(cls: Type[Detector], law: laws.Law) -> None:
    law(cls)


@pytest.mark.parametrize("cls", BUILTIN, ids=lambda cls: cls.name)
def test_a_built_in_detector_is_named_after_its_file_and_shows_a_firing_step(
    cls: Type[Detector],
) -> None:
    assert cls.__module__ == f"plarv_processors.detectors.{cls.name}"
    assert cls.__name__ == cls.name.title().replace("_", "")
    assert ">>>" in (cls.__doc__ or "")
    assert "opened" in (cls.__doc__ or "")


@pytest.mark.parametrize("fault", FAULTY)
def test_the_detector_of_a_fault_fires_on_it(fault: str) -> None:
    name, make = FAULTY[fault]
    (cls,) = [one for one in BUILTIN if one.name == name]
    for seed in (0, 1):
        events = make(seed=seed)
        assert laws.feed(cls(), events), f"seed {seed}"


@pytest.mark.parametrize("stream", HEALTHY)
def test_a_healthy_run_is_silent(stream: str) -> None:
    for seed in (3, 4):
        events = HEALTHY[stream](seed=seed)
        for cls in BUILTIN:
            found = laws.feed(cls(), events)
            if (stream, cls.name) in ALLOWED:
                assert {one.level for one in found} <= {"ok", "warn"}
            else:
                assert not found, f"{cls.name}, seed {seed}: {found[0]}"


def test_the_state_of_all_twelve_is_small_in_good_and_in_bad_times() -> None:
    for bad in (False, True):
        detectors = [cls() for cls in BUILTIN]
        seen = 0
        for upto in (10, 1_000, 5_000):
            events = laws.endless(5_000, bad)[seen:upto]
            seen = upto
            for detector in detectors:
                laws.feed(detector, events)
            sizes = {detector.name: laws.sizes(detector) for detector in detectors}
            resident = sum(size for size, _ in sizes.values())
            packed = sum(size for _, size in sizes.values())
            assert resident <= RESIDENT_BYTES, f"{resident} bytes at {upto} events: {sizes}"
            assert packed <= PACKED_BYTES, f"{packed} bytes packed at {upto} events: {sizes}"


def test_a_further_rank_costs_little_memory() -> None:
    few, many = 2, 18
    totals: List[List[int]] = []
    for ranks in (few, many):
        events = laws.fleet_of(ranks)
        detectors = [cls() for cls in BUILTIN]
        for detector in detectors:
            laws.feed(detector, events)
        totals.append([sum(size) for size in zip(*map(laws.sizes, detectors))])
    for of_few, of_many in zip(*totals):
        assert of_many - of_few <= RANK_BYTES * (many - few)


# Anything at all.

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf")]),
    st.floats(),
)
FLOAT_LISTS = st.lists(NUMBERS, max_size=40).map(tuple)
COLUMNS: Dict[str, st.SearchStrategy[Any]] = {
    "time_ns": st.integers(-(2**63), 2**63 - 1),
    "world_size": st.integers(-1, 9),
    "epoch": NUMBERS,
    "loss": NUMBERS,
    "grad_norm": NUMBERS,
    "current_lr": NUMBERS,
    "update_norm": NUMBERS,
    "val_loss": NUMBERS,
    "perplexity": NUMBERS,
    "grad_l1_norm": NUMBERS,
    "grad_l2_norm": NUMBERS,
    "forward_ms": NUMBERS,
    "backward_ms": NUMBERS,
    "step_time_ms": NUMBERS,
    "batch_size": st.integers(-(2**31), 2**31 - 1),
    "loss_scale": NUMBERS,
    "sample_ids": st.lists(st.integers(-(2**63), 2**64), max_size=40).map(tuple),
    "sample_losses": FLOAT_LISTS,
    "sample_confidences": FLOAT_LISTS,
    "sample_margins": FLOAT_LISTS,
    "sample_entropies": FLOAT_LISTS,
    "sample_correct": st.lists(st.integers(-1, 2), max_size=40).map(tuple),
    "local_levels": st.lists(st.integers(0, 2), max_size=12).map(tuple),
    "local_scores": st.lists(NUMBERS, max_size=12).map(tuple),
    "local_layers": st.lists(st.text(max_size=5), max_size=3).map(tuple),
}


@st.composite
def anything(draw: st.DrawFn) -> StepEvent:
    """An event with any columns; on some of them the ranks' own events as well."""
    given = draw(st.dictionaries(st.sampled_from(sorted(COLUMNS)), st.none(), max_size=12))
    columns = {name: draw(COLUMNS[name]) for name in given}
    step = draw(st.integers(0, 2**40))
    event = StepEvent("run", "s", draw(st.integers(0, 2**40)), 0, step, **columns)
    ranks = draw(st.sampled_from([0, 0, 0, 1, 2, 5]))
    parts: List[StepEvent] = []
    for rank in range(ranks):
        own: Dict[str, Any] = {name: draw(st.one_of(st.none(), COLUMNS[name])) for name in given}
        parts.append(event._replace(rank=rank * draw(st.integers(1, 3)), **own))
    return event._replace(parts=tuple(sorted(parts, key=lambda part: part.rank)))


@settings(max_examples=60)
@given(
    before=st.integers(0, 300),
    odd=st.lists(anything(), min_size=1, max_size=12),
    times=st.integers(1, 30),
    after=st.integers(0, 60),
)
def test_no_event_makes_a_detector_raise_or_say_half_a_verdict(
    before: int, odd: List[StepEvent], times: int, after: int
) -> None:
    healthy = language_model(400)
    events = [*healthy[:before], *odd * times, *healthy[before : before + after]]
    for cls in DETECTORS:
        detector = cls()
        found: List[Verdict] = []
        for event in events:
            for part in laws.seen(detector, event):
                said = detector.update(part)
                assert isinstance(said, tuple), cls.name
                found.extend(said)
        laws.check_states(found, cls.name)
        laws.copy_of(detector, cls)  # whatever the state is now, it can be packed and restored


# Detectors of other packages.

GOOD = '''
from typing import Any, Optional, Tuple
import dataclasses
from plarv_processors.detectors.detector import fingerprint, verdict

class Steep:
    """Opens when the loss is `ratio` times the last one, resolves at the next finite loss."""

    name = "steep"
    scope = "run"

    @dataclasses.dataclass(frozen=True)
    class Config:
        ratio: float = 2.9

        def __post_init__(self) -> None:
            if not self.ratio > 1.0:
                raise ValueError("ratio must be above 1")

    def __init__(self, config=None):
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)
        self._last = None
        self._onset = None
        self.past = []

    def update(self, event):
        loss = event.loss
        if loss is None or loss - loss != 0.0:
            return ()
        last, self._last = self._last, loss
        state, level = "opened", "warn"
        if self._onset is not None:
            state, level = "resolved", "ok"
        elif last is None or not loss > self.config.ratio * abs(last):
            return ()
        onset = event.step if self._onset is None else self._onset
        self._onset = event.step if state == "opened" else None
        return (
            verdict(
                self, event, kind="steep", level=level, state=state, onset_step=onset,
                score=loss / last if last else 0.0, threshold=self.config.ratio,
                evidence={"loss": loss}, message=f"the loss went to {loss:.4g}",
            ),
        )
'''


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, points: Dict[str, str]
) -> str:
    """Puts a distribution with these entry points on sys.path, as pip would; its module's name."""
    module = f"other_detectors_{folder.name.replace('-', '_')}"
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"{name} = {value.replace('MODULE', module)}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[plarv.detectors]", *lines, ""]))
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return module


def test_an_installed_detector_is_registered_and_held_to_the_laws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "good", monkeypatch, GOOD, {"steep": "MODULE:Steep"})
    found = registered()
    assert found[: len(BUILTIN)] == BUILTIN
    (steep,) = [cls for cls in found if cls.name == "steep"]
    for law in laws.LAWS:
        law(steep)
    events = [StepEvent("run", "s", at, 0, at, loss=loss) for at, loss in enumerate((1.0, 3.0))]
    assert [one.kind for one in laws.feed(steep(), events)] == ["steep"]


BREACHES = [
    (laws.says_what_it_is, "fingerprint(self.name,", "fingerprint('other',"),
    (laws.verdicts_mark_changes, '"resolved", "ok"', '"opened", "warn"'),
    (
        laws.same_events_same_verdicts,
        "last, self._last = self._last, loss",
        "last, type(self).shared = getattr(type(self), 'shared', None), loss",
    ),
    (laws.a_snapshot_changes_nothing, 'scope = "run"', 'scope = "run"; _derived = ("_last",)'),
    (
        laws.memory_is_bounded,
        "last, self._last = self._last, loss",
        "last, self._last = self._last, loss; self.past.append(loss)",
    ),
    (laws.scaling_the_loss_changes_nothing, "self.config.ratio * abs(last)", "abs(last) + 2.0"),
    (laws.non_finite_input_leaves_no_trace, "loss is None or loss - loss != 0.0", "loss is None"),
    (
        laws.a_missing_input_is_silence,
        "loss is None or loss - loss != 0.0",
        "(loss := event.step % 2 * 9.0 + 0.1 if loss is None else loss) < 0.0",
    ),
    (laws.healthy_runs_are_never_critical, '"opened", "warn"', '"opened", "critical"'),
    (laws.every_setting_is_in_the_version, "self.name, self.config)", "self.name, self.Config())"),
    (laws.nonsense_settings_are_rejected, "if not self.ratio > 1.0", "if self.ratio == 7.0"),
]


def test_there_is_a_breach_for_every_law() -> None:
    assert [law for law, _, _ in BREACHES] == list(laws.LAWS)


@pytest.mark.parametrize(
    ("law", "right", "wrong"), BREACHES, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_detector_that_breaks_a_law_is_caught(law: laws.Law, right: str, wrong: str) -> None:
    assert GOOD.count(right) == 1
    names: Dict[str, Any] = {}
    exec(GOOD.replace(right, wrong), names)
    with pytest.raises(AssertionError):
        law(names["Steep"])


@pytest.mark.parametrize(
    ("source", "point", "reason"),
    [
        ("1 / 0", "MODULE:Steep", "ZeroDivisionError"),
        ("", "MODULE:Steep", "Steep"),
        ("def steep(): pass", "MODULE:steep", "write a class after the colon"),
        ("class Steep: pass", "MODULE:Steep", "class attribute name"),
        ("class Steep: name = 'steep'", "MODULE:Steep", "scope"),
        ("class Steep: name = 'steep'; scope = 'run'", "MODULE:Steep", "update"),
        (GOOD.replace('"steep"', '"loss_spike"', 1), "MODULE:Steep", "taken by .*LossSpike"),
        (GOOD.replace("config=None", "config"), "MODULE:Steep", "without arguments"),
        (GOOD.replace("self.version =", "self.other ="), "MODULE:Steep", "version"),
    ],
)
def test_an_installed_detector_that_is_broken_is_left_out_with_a_warning(
    source: str, point: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"bad_{abs(hash((source, point)))}"
    install(tmp_path / name, monkeypatch, source, {"steep": point})
    with pytest.warns(RuntimeWarning, match=f"detector 'steep' .* is left out: .*{reason}"):
        assert registered() == DETECTORS


def test_two_installed_detectors_of_one_name_give_the_first_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = GOOD + "\n\nclass Other(Steep):\n    pass\n"
    install(tmp_path / "twice", monkeypatch, other, {"a": "MODULE:Other", "b": "MODULE:Steep"})
    with pytest.warns(RuntimeWarning, match="detector 'b' .* the name 'steep' is taken by .*Other"):
        found = registered()
    assert [cls.__name__ for cls in found if cls.name == "steep"] == ["Other"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("loss_spike", "write package.module:Class"),
        (":Steep", "write package.module:Class"),
        ("no_such_module_at_all:Steep", "cannot import 'no_such_module_at_all'.*PYTHONPATH"),
        ("plarv_processors.windows:Nothing", "has no 'Nothing'; its classes are: RobustWindow"),
        ("plarv_processors.windows:median", "write a class after the colon"),
        ("plarv_processors.windows:RobustWindow", "class attribute name"),
    ],
)
def test_load_says_what_is_wrong_and_what_to_write(path: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"detector '{path}': .*{reason}"):
        load(path)


def test_load_gives_a_detector_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(tmp_path / "loaded", monkeypatch, GOOD, {})
    assert load(f"{module}:Steep").name == "steep"
    assert registered() == DETECTORS
