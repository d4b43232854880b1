"""The compiled fold says what the Python one says: every record, every snapshot, bit for bit."""

from __future__ import annotations

import importlib.util
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.integration import fold_server
from tests.integration.fold_server import Folded
from tests.processors.detectors import laws
from tests.processors.detectors.test_laws import COLUMNS
from tests.processors.logs import log_of, names
from tests.processors.streams import FAULTY, language_model, with_samples

from plarv_processors.engine import is_compiled
from plarv_schemas.events import ControlEvent, Event, StepEvent

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CC", "cc"))
MYPYC = importlib.util.find_spec("mypyc") and importlib.util.find_spec("setuptools")

pytestmark = pytest.mark.skipif(
    not (COMPILER and MYPYC), reason="needs mypyc, setuptools and a C compiler"
)


def compiler() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "compile_fold", ROOT / "deploy" / "compile_fold.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paths_with(build: Path) -> str:
    return os.pathsep.join(map(str, (build, *(ROOT / name for name in ("schemas", "sinks", "")))))


class Compiled:
    """A process that folds with the compiled modules."""

    def __init__(self, build: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, fold_server.__file__],
            env={**os.environ, "PYTHONPATH": paths_with(build)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, name: str, *given: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((name, given), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def fold(self, *given: Any) -> Folded:
        return Folded(*self.ask("fold", *given))

    def fold_by_detector(self, *given: Any) -> Folded:
        return Folded(*self.ask("fold_by_detector", *given))

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    """Without optimisation, which takes a third of the time: kept until a source changes."""
    assert not is_compiled()
    build = ROOT / "build" / "compiled-for-tests"
    compiler().compile_fold(build, level="0")
    process = Compiled(build)
    yield process
    process.close()


def check(compiled: Compiled, events: List[Any]) -> Folded:
    """Both builds fold alike, and each goes on from the other's snapshot."""
    half = len(events) // 2
    ours = fold_server.fold(events, None, [half])
    theirs = compiled.fold(events, None, [half])
    assert theirs == ours
    rest = fold_server.fold(events[half:], theirs.snapshots[0])
    assert rest == compiled.fold(events[half:], ours.snapshots[0])
    assert rest.snapshots[-1] == ours.snapshots[-1]
    return ours


def test_all_modules_that_are_to_be_compiled_are(compiled: Compiled) -> None:
    found: Dict[str, bool] = compiled.ask("modules")
    wanted = {name[: -len(".py")].replace("/", ".") for name in compiler().sources()}
    assert {name for name, is_native in found.items() if is_native} == wanted
    assert len(wanted) > 20


@pytest.mark.parametrize("name", names)
def test_a_golden_log_folds_to_the_same_bits(name: str, compiled: Compiled) -> None:
    check(compiled, log_of(name))


@pytest.mark.parametrize("name", FAULTY)
def test_by_hand_the_policy_answers_alike(name: str, compiled: Compiled) -> None:
    check(compiled, log_of(name, steps=800, mode="MANUAL"))


@pytest.mark.parametrize("size", [1, 7, 256])
def test_the_folds_of_single_detectors_are_alike(size: int, compiled: Compiled) -> None:
    for name in ("divergence", "straggler", "repeated_batch"):
        events = log_of(name)
        assert compiled.fold_by_detector(events, size) == fold_server.fold_by_detector(events, size)


def stormy(seed: int) -> List[Event]:
    """A run in which columns turn into NaN, Inf, zero and the ends of the doubles, in bursts."""
    chance = random.Random(seed)
    values = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1.7e308, -1.7e308, -1.0)
    events: List[Event] = []
    for event, other in zip(language_model(1_200, seed), with_samples(1_200, seed)):
        samples = {name: getattr(other, name) for name in laws.LISTS if getattr(other, name)}
        event = event._replace(**samples)
        if chance.random() < 0.3 and event.step % 100 > 60:
            some = chance.sample(laws.FLOATS, chance.randrange(1, 6))
            odd: Dict[str, Any] = {name: chance.choice(values) for name in some}
            lists = chance.sample(laws.SAMPLES, 2)
            odd.update((name, tuple(chance.choice(values) for _ in range(9))) for name in lists)
            event = event._replace(**odd)
        events.append(event)
    return events


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_of_nan_and_inf_folds_to_the_same_bits(seed: int, compiled: Compiled) -> None:
    assert check(compiled, stormy(seed)).faults == {}


def test_attempts_repeats_and_detectors_left_out_fold_alike(compiled: Compiled) -> None:
    events: List[Event] = []
    for attempt, name in enumerate(("divergence", "dead", "explosion")):
        log = log_of(name, steps=700)
        for number, event in enumerate(log):
            event = event._replace(session=f"{event.session}-{attempt // 2}", record=len(events))
            events.append(event)
            if number % 50 == 0:
                events.append(event)
        out = {"detector": "loss_spike", "ordinal": 900}
        last = ControlEvent("run", event.session, len(events), 0, "detector_left_out", data=out)
        events.extend([last, last._replace(record=len(events) + 1, kind="recovered", data={})])
    check(compiled, events)


NUMBERS = st.sampled_from(sorted(COLUMNS))


@st.composite
def odd_steps(draw: st.DrawFn) -> Callable[[int, int], StepEvent]:
    """Any columns, of any rank of a run of up to three."""
    given = draw(st.dictionaries(NUMBERS, st.none(), max_size=10))
    columns: Dict[str, Any] = {name: draw(COLUMNS[name]) for name in given}
    columns["world_size"] = draw(st.sampled_from([None, 1, 2, 3]))
    rank, ahead = draw(st.integers(0, 2)), draw(st.integers(-3, 12))

    def make(record: int, step: int) -> StepEvent:
        return StepEvent("run", f"s{rank}", record, rank, max(0, step + ahead), **columns)

    return make


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    before=st.integers(0, 150),
    odd=st.lists(odd_steps(), min_size=1, max_size=12),
    times=st.integers(1, 12),
    after=st.integers(0, 60),
)
def test_any_events_fold_to_the_same_bits(
    before: int, odd: List[Any], times: int, after: int, compiled: Compiled
) -> None:
    healthy = language_model(300)
    events: List[Event] = [event._replace(session="s0") for event in healthy[:before]]
    for make in odd * times:
        events.append(make(len(events), len(events)))
    for event in healthy[before : before + after]:
        events.append(event._replace(session="s0", record=len(events), step=len(events)))
    check(compiled, events)


SUBCLASS = """
from plarv_processors.detectors.loss_spike import LossSpike
from plarv_processors.engine import Engine, EngineConfig, is_compiled
from plarv_schemas.events import StepEvent

class Eager(LossSpike):
    name = "eager"
    def __init__(self):
        super().__init__(self.Config(jump_z=9, min_history=10))
    def _jumped(self, rise, x):
        return rise > 0.02

engine = Engine(EngineConfig(detectors=(Eager,)))
print(is_compiled())
print(LossSpike.__doc__, repr(Eager.Config()))
for step in range(200):
    loss = 2.0 + 0.09 * (step % 50 > 45)
    for record in engine.fold(StepEvent("r", "s", step, 0, step, loss=loss)):
        print(record)
print(engine.fingerprint, engine.snapshot().hex(), engine.faults)
"""


def test_a_detector_that_builds_on_ours_is_alike(compiled: Compiled) -> None:
    said: List[List[str]] = []
    for place in (ROOT / "build" / "compiled-for-tests", ROOT / "processors"):
        done = subprocess.run(
            [sys.executable, "-c", SUBCLASS],
            env={**os.environ, "PYTHONPATH": paths_with(place)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(done.stdout.splitlines())
    assert [lines.pop(0) for lines in said] == ["True", "False"]
    assert said[0] == said[1]
    assert any(line.startswith("Verdict") for line in said[0])


@pytest.mark.slow
def test_the_tests_of_the_fold_pass_on_the_build_that_is_shipped(tmp_path: Path) -> None:
    module = compiler()
    module.compile_fold(module.TARGET)
    paths = " ".join(map(str, (module.TARGET, "producer", "schemas", "sinks", ".")))
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider",
            "-o", f"pythonpath={paths}", "tests/test_golden.py", "tests/processors",
            "--ignore=tests/processors/worker",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10000:]


def test_a_nested_class_and_slots_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from __future__ import annotations\nimport dataclasses\n"
        "class Outer:\n    '''Says.'''\n    @dataclasses.dataclass(frozen=True)\n"
        "    class Config:\n        '''Of it.'''\n        size: int = 3\n"
        "    __slots__ = ('config',)\n"
        "    def __init__(self, config: Config = None):\n"
        "        self.config = config or self.Config()\n"
    )
    native = compiler().native_source(source)
    assert "class OuterConfig:" in native
    module: Any = ModuleType("native")
    monkeypatch.setitem(sys.modules, "native", module)
    module.mypyc_attr = lambda **_: lambda cls: cls
    exec(compile(native, "native", "exec"), vars(module))
    outer = module.Outer
    assert (outer.__slots__, outer.__doc__) == (("config",), "Says.")
    assert repr(outer().config) == "Outer.Config(size=3)"
