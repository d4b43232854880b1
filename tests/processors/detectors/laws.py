"""The laws of a detector, each a function of its class that raises AssertionError on a breach.

:data:`LAWS` holds over every registered detector. Two laws know an exception, which the class
itself declares: ``scale_free = False`` (its docstring says why scaling the loss matters to it) and
``counts_non_finite = True`` (NaN and Inf are what it is about).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple, Type

from tests.processors.streams import FAULTY, HEALTHY, fleet, language_model, with_samples

from plarv_processors.detectors.detector import Detector
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import LEVELS, StepEvent, Verdict

FLOATS = (
    "loss", "grad_norm", "current_lr", "update_norm", "val_loss", "perplexity", "grad_l1_norm",
    "grad_l2_norm", "forward_ms", "backward_ms", "step_time_ms", "loss_scale", "epoch",
)  # fmt: skip
SAMPLES = ("sample_losses", "sample_confidences", "sample_margins", "sample_entropies")
LISTS = (*SAMPLES, "sample_ids", "sample_correct", "local_levels", "local_scores", "local_layers")
LOSSES = ("loss", "val_loss", "sample_losses")
STATE_BYTES = 24 * 1024  # of all twelve, so of any one
SLACK_BYTES = 256

Law = Callable[[Type[Detector]], None]


def feed(detector: Detector, events: Iterable[StepEvent]) -> List[Verdict]:
    """What the detector says, fed as the fold feeds it: complete steps, or each rank's events."""
    return [
        found
        for event in events
        for part in seen(detector, event)
        for found in detector.update(part)
    ]


def seen(detector: Detector, event: StepEvent) -> Tuple[StepEvent, ...]:
    return event.parts if event.parts and detector.scope == "rank" else (event,)


@functools.lru_cache(maxsize=None)
def streams() -> Tuple[Tuple[str, List[StepEvent]], ...]:
    """Every stream by name, the healthy ones cut short."""
    healthy = [
        (name, make(steps=120 if name in ("short", "fleet") else 400))
        for name, make in HEALTHY.items()
    ]
    return (*healthy, *[(name, make()) for name, (_, make) in FAULTY.items()])


def copy_of(detector: Detector, cls: Type[Detector]) -> Detector:
    """A fresh instance with the detector's state, by way of the bytes of a snapshot."""
    other = cls()
    restore(other, unpack(pack(dump(detector))))
    return other


def sizes(detector: Detector) -> Tuple[int, int]:
    """Bytes resident and bytes packed. Configuration and version are not state and not counted."""
    return _resident(detector, set()), len(pack(dump(detector)))


def _resident(value: object, known: Set[int]) -> int:
    if id(value) in known or value is None or isinstance(value, (bool, type)):
        return 0
    known.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + _all_resident([*value.keys(), *value.values()], known)
    if isinstance(value, (list, tuple, set, frozenset)):
        return size + _all_resident(value, known)
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    inside = dict(getattr(value, "__dict__", {}))
    inside.update((name, getattr(value, name)) for name in names if hasattr(value, name))
    if hasattr(value, "__dict__"):
        size += sys.getsizeof(value.__dict__)
    parts = [part for name, part in inside.items() if name not in ("config", "version")]
    return size + _all_resident(parts, known)


def _all_resident(values: Iterable[object], known: Set[int]) -> int:
    total = 0
    for value in values:
        total += _resident(value, known)
    return total


def says_what_it_is(cls: Type[Detector]) -> None:
    """Its name, scope and version are there, and verdicts carry them."""
    detector = cls()
    assert cls.name.isidentifier()
    assert cls.name.islower()
    assert cls.scope in ("run", "rank")
    assert detector.version.startswith(f"{cls.name}-")
    for name, events in streams():
        for found in feed(cls(), events):
            assert (found.detector, found.version) == (cls.name, detector.version), name


def verdicts_mark_changes(cls: Type[Detector]) -> None:
    """Opened once, escalated while open, resolved once; one verdict at a time for a rank."""
    for name, events in streams():
        check_states(feed(cls(), events), name)


def check_states(found: Sequence[Verdict], where: str = "") -> None:
    """The law above, and that every verdict is whole."""
    open_kinds: Dict[Optional[int], Tuple[str, int]] = {}
    for one in found:
        text = f"{where}: {one}"
        before = open_kinds.pop(one.rank, None)
        assert one.level in LEVELS, text
        assert one.message.strip() and "\n" not in one.message, text  # noqa: PT018
        assert all(type(number) is float for number in one.evidence.values()), text
        assert (type(one.score), type(one.threshold)) == (float, float), text
        assert one.state in ("opened", "escalated", "resolved"), text
        assert (one.level == "ok") == (one.state == "resolved"), text
        if one.state == "opened":
            assert before is None, text
        else:
            assert before is not None, text
            kind, level = before
            if one.state == "escalated":
                hardened = one.kind != kind and LEVELS.index(one.level) == level
                assert hardened or LEVELS.index(one.level) > level, text
            else:
                assert one.kind == kind, text
        if one.state != "resolved":
            open_kinds[one.rank] = (one.kind, LEVELS.index(one.level))


def same_events_same_verdicts(cls: Type[Detector]) -> None:
    """Also when another instance reads something else in between: instances share no state."""
    others = language_model(400, seed=9)
    for name, events in streams():
        alone = feed(cls(), events)
        first, second, between = cls(), cls(), cls()
        together: List[Verdict] = []
        for at, event in enumerate(events):
            feed(between, [others[at % len(others)]])
            ours = feed(first, [event])
            assert feed(second, [event]) == ours, f"{name}: {event}"
            together.extend(ours)
        assert together == alone, name


def a_snapshot_changes_nothing(cls: Type[Detector]) -> None:
    """Packed and restored into a fresh instance after every third event, it goes on alike."""
    for name, events in streams():
        straight, restored = cls(), cls()
        for at, event in enumerate(events):
            expected = feed(straight, [event])
            assert feed(restored, [event]) == expected, f"{name}: {event}"
            if at % 3 == 0 or expected:
                before = restored
                restored = copy_of(restored, cls)
                feed(before, [event, event])  # what the old one goes on reading is not shared
        assert pack(dump(restored)) == pack(dump(straight)), name


def memory_is_bounded(cls: Type[Detector]) -> None:
    """After 20,000 events it holds what it held after 5,000, in good and in bad times."""
    for events in (endless(5_000), endless(5_000, bad=True)):
        detector = cls()
        feed(detector, events)
        resident, packed = sizes(detector)
        assert resident <= STATE_BYTES, f"{resident} bytes resident"
        for lap in (1, 2, 3):
            feed(detector, shifted(events, lap))
            now_resident, now_packed = sizes(detector)
            assert now_resident <= resident + SLACK_BYTES, f"{resident}, then {now_resident} bytes"
            assert now_packed <= packed + SLACK_BYTES, f"{packed}, then {now_packed} bytes packed"


def scaling_the_loss_changes_nothing(cls: Type[Detector]) -> None:
    """Losses times a power of two: the same verdicts, their numbers up to rounding."""
    if not getattr(cls, "scale_free", True):
        assert "scale" in (cls.__doc__ or ""), "scale_free = False: the docstring says why"
        return
    for name, events in streams():
        plain = feed(cls(), events)
        for factor in (2.0**-4, 2.0**9):
            scaled = feed(cls(), [scale_losses(event, factor) for event in events])
            assert [decision(one) for one in scaled] == [decision(one) for one in plain], (
                f"{name} x {factor}"
            )
            for one, other in zip(scaled, plain):
                assert close(one.score, other.score), f"{name} x {factor}: {one}, {other}"


def decision(found: Verdict) -> Tuple[Any, ...]:
    return found.step, found.rank, found.kind, found.level, found.state, found.onset_step


def close(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=1e-6) or (one != one and other != other)


def non_finite_input_leaves_no_trace(cls: Type[Detector]) -> None:
    """Events whose every float is NaN or Inf, put in between, change no verdict on the others."""
    if getattr(cls, "counts_non_finite", False):
        return
    for name, events in streams():
        detector = cls()
        found: List[Verdict] = []
        for at, event in enumerate(events):
            if at % 7 == 3:
                for poison in (math.nan, math.inf, -math.inf):
                    said = feed(detector, [poisoned(event, poison)])
                    assert not said, f"{name}: {said}"
            found.extend(feed(detector, [event]))
        assert found == feed(cls(), events), name


def poisoned(event: StepEvent, poison: float) -> StepEvent:
    """``event`` with nothing in it but non-finite numbers, in its parts too."""
    columns: Dict[str, Any] = {name: poison for name in FLOATS if getattr(event, name) is not None}
    for name in LISTS:
        given = getattr(event, name)
        columns[name] = tuple(poison for _ in given) if given and name in SAMPLES else None
    columns["parts"] = tuple([poisoned(part, poison) for part in event.parts])
    return event._replace(**columns)


def a_missing_input_is_silence(cls: Type[Detector]) -> None:
    """No verdict where nothing is logged, nor on a healthy run that lacks any one column."""
    bare = [StepEvent("run", "s", step, 0, step, world_size=1) for step in range(400)]
    assert not feed(cls(), bare)
    for events in (language_model(500), with_samples(300)):
        for name in (*FLOATS, *LISTS, "batch_size"):
            lacking: Dict[str, Any] = {name: None}
            without = [event._replace(**lacking) for event in events]
            assert not feed(cls(), without), f"a healthy run without {name}"


def healthy_runs_are_never_critical(cls: Type[Detector]) -> None:
    for name, make in HEALTHY.items():
        for seed in (1, 2):
            critical = [one for one in feed(cls(), make(seed=seed)) if one.level == "critical"]
            assert not critical, f"{name}: {critical}"


def every_setting_is_in_the_version(cls: Type[Detector]) -> None:
    """Another threshold gives another version, so that no state made under the old one is used."""
    config = config_of(cls)
    if config is None:
        return
    versions = {cls().version}
    fields = dataclasses.fields(config)
    for field in fields:
        changed = next(
            (made for made in map(_maker(config, field.name), _near(config, field.name)) if made),
            None,
        )
        assert changed is not None, f"no other value of {field.name} is accepted"
        versions.add(_instance(cls, changed).version)
    assert len(versions) == len(fields) + 1


def nonsense_settings_are_rejected(cls: Type[Detector]) -> None:
    """NaN and numbers far below zero raise ValueError for every setting; settings are frozen."""
    config = config_of(cls)
    if config is None:
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        nonsense: List[float] = [-(10**9)] if isinstance(value, int) else [math.nan, -1e9]
        for wrong in nonsense:
            made = _maker(config, field.name)(wrong)
            assert made is None, f"{field.name} = {wrong} is accepted"
        try:
            setattr(config, field.name, value)
        except dataclasses.FrozenInstanceError:
            continue
        raise AssertionError("Config is not frozen")


def config_of(cls: Type[Detector]) -> Optional[Any]:
    """The configuration of a default instance, where it is a dataclass."""
    config = getattr(cls(), "config", None)
    return config if dataclasses.is_dataclass(config) else None


def _instance(cls: Type[Detector], config: Any) -> Detector:
    make: Callable[[Any], Detector] = cls
    return make(config)


def _maker(config: Any, name: str) -> Callable[[Any], Optional[Any]]:
    def make(value: Any) -> Optional[Any]:
        try:
            return dataclasses.replace(config, **{name: value})
        except ValueError:
            return None

    return make


def _near(config: Any, name: str) -> List[Any]:
    value = getattr(config, name)
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, value * 2, value + 8, value // 2]
    if isinstance(value, float):
        return [value * 1.01, value * 0.99, value + 0.01, value * 1.5, value * 0.5]
    if value is None:
        return [1, 1.0]
    return []


LAWS: Tuple[Law, ...] = (
    says_what_it_is,
    verdicts_mark_changes,
    same_events_same_verdicts,
    a_snapshot_changes_nothing,
    memory_is_bounded,
    scaling_the_loss_changes_nothing,
    non_finite_input_leaves_no_trace,
    a_missing_input_is_silence,
    healthy_runs_are_never_critical,
    every_setting_is_in_the_version,
    nonsense_settings_are_rejected,
)


# Streams that only the laws need.


def endless(steps: int, bad: bool = False) -> List[StepEvent]:
    """All columns on every event; ``bad``: a fault of some kind in every 200 steps."""
    scalars, samples = language_model(steps), with_samples(min(steps, 500))
    events: List[StepEvent] = []
    for at, event in enumerate(scalars):
        extra = samples[at % len(samples)]
        lists = {name: getattr(extra, name) for name in LISTS if getattr(extra, name) is not None}
        lists["sample_ids"] = tuple(range(32 * at, 32 * at + 32))
        event = event._replace(val_loss=event.val_loss or (event.loss or 0.0) + 0.1, **lists)
        events.append(_bad(event, at) if bad and at % 200 >= 100 else event)
    return events


def _bad(event: StepEvent, at: int) -> StepEvent:
    factor = (3.0, 0.01, 50.0, 1e6)[at // 200 % 4]
    columns: Dict[str, Any] = {
        name: (getattr(event, name) or 1.0) * factor for name in FLOATS if name != "current_lr"
    }
    columns["sample_ids"] = tuple(range(32))
    columns["local_levels"] = tuple(2 for _ in range(10))
    columns["local_layers"] = ("layer.0", "layer.1")
    if at % 5 == 0:
        columns["loss"] = math.nan
    return event._replace(**columns)


def shifted(events: Sequence[StepEvent], laps: int) -> List[StepEvent]:
    """``events`` once more, later."""
    by = laps * len(events)
    return [
        event._replace(
            step=event.step + by,
            record=event.record + by,
            sample_ids=tuple(one + 32 * by for one in event.sample_ids or ()),
        )
        for event in events
    ]


def scale_losses(event: StepEvent, factor: float) -> StepEvent:
    """``event`` as a run with a scaled loss sends it."""
    columns: Dict[str, Any] = {"parts": tuple([scale_losses(part, factor) for part in event.parts])}
    for name in LOSSES:
        value = getattr(event, name)
        if value is not None:
            scaled = isinstance(value, tuple)
            columns[name] = tuple([one * factor for one in value]) if scaled else value * factor
    return event._replace(**columns)


def fleet_of(ranks: int) -> List[StepEvent]:
    """A run whose every rank logs everything, one of them slow and one with another gradient."""
    events: List[StepEvent] = []
    for at, event in enumerate(fleet(ranks, steps=120)):
        parts = list(event.parts)
        if at > 60:
            parts[0] = parts[0]._replace(step_time_ms=(parts[0].step_time_ms or 1.0) * 2.0)
            parts[-1] = parts[-1]._replace(grad_norm=(parts[-1].grad_norm or 1.0) * 2.0)
        events.append(event._replace(parts=tuple(parts)))
    return events
