"""The registry: the twelve built-in detectors, and those that others install.

A package adds its own through the entry-point group ``plarv.detectors``::

    [project.entry-points."plarv.detectors"]
    my_detector = "my_package.my_detector:MyDetector"
"""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata
from typing import Dict, Iterable, List, Tuple, Type

from plarv_processors.detectors.canalization import Canalization
from plarv_processors.detectors.detector import Detector
from plarv_processors.detectors.fleet_skew import FleetSkew
from plarv_processors.detectors.generalization_gap import GeneralizationGap
from plarv_processors.detectors.gradient_collapse import GradientCollapse
from plarv_processors.detectors.gradient_explosion import GradientExplosion
from plarv_processors.detectors.loss_divergence import LossDivergence
from plarv_processors.detectors.loss_oscillation import LossOscillation
from plarv_processors.detectors.loss_plateau import LossPlateau
from plarv_processors.detectors.loss_spike import LossSpike
from plarv_processors.detectors.non_finite import NonFinite
from plarv_processors.detectors.optimizer_corruption import OptimizerCorruption
from plarv_processors.detectors.sample_anomaly import SampleAnomaly

__all__ = ["BUILTIN", "ENTRY_POINT_GROUP", "load", "registered"]

ENTRY_POINT_GROUP = "plarv.detectors"

BUILTIN: Tuple[Type[Detector], ...] = (
    NonFinite,
    LossSpike,
    LossDivergence,
    LossPlateau,
    LossOscillation,
    GradientExplosion,
    GradientCollapse,
    OptimizerCorruption,
    Canalization,
    SampleAnomaly,
    GeneralizationGap,
    FleetSkew,
)
"""In the order in which the policy hears them."""


def registered() -> Tuple[Type[Detector], ...]:
    """The built-in detectors in their fixed order, then the installed ones sorted by name.

    An installed one that does not load, is no detector or takes a name that is taken is left out
    with a RuntimeWarning that says why: a broken package never breaks a run.

    >>> [cls.name for cls in registered()][:2]
    ['non_finite', 'loss_spike']
    """
    found: Dict[str, Type[Detector]] = {}
    for point in sorted(_entry_points(), key=lambda point: (point.name, point.value)):
        try:
            cls = _checked(point.load(), point.value)
            if cls.name in found:
                raise ValueError(f"the name {cls.name!r} is taken by {_path(found[cls.name])}")
        except Exception as error:  # noqa: BLE001  a foreign module may raise anything
            warnings.warn(
                f"detector {point.name!r} ({point.value}) is left out: {_reason(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        found[cls.name] = cls
    return BUILTIN + tuple(found[name] for name in sorted(found))


def load(path: str) -> Type[Detector]:
    """The detector class at ``package.module:Class``.

    Raises ValueError, saying what is wrong and what to write, when there is none.

    >>> load("plarv_processors.detectors.loss_spike:LossSpike").name
    'loss_spike'
    >>> load("my_package.my_module")
    Traceback (most recent call last):
    ValueError: detector 'my_package.my_module': write package.module:Class
    """
    module_name, colon, class_name = path.partition(":")
    if not (colon and module_name and class_name):
        raise ValueError(f"detector {path!r}: write package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise ValueError(
            f"detector {path!r}: cannot import {module_name!r} ({_reason(error)}); "
            "is its folder on PYTHONPATH, or its package installed?"
        ) from error
    if not hasattr(module, class_name):
        own = [
            name
            for name, value in sorted(vars(module).items())
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        raise ValueError(
            f"detector {path!r}: module {module_name!r} has no {class_name!r}; "
            f"its classes are: {', '.join(own) or 'none'}"
        )
    try:
        return _checked(getattr(module, class_name), path)
    except ValueError as error:
        raise ValueError(f"detector {path!r}: {error}") from error


def _checked(candidate: object, path: str) -> Type[Detector]:
    """``candidate``, if it is a detector class under a free name; else ValueError with the rule."""
    if not isinstance(candidate, type):
        raise ValueError(f"write a class after the colon, {path!r} is a {type(candidate).__name__}")
    name = getattr(candidate, "name", None)
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"a detector has a class attribute name = 'my_detector', found {name!r}")
    if getattr(candidate, "scope", None) not in ("run", "rank"):
        raise ValueError("a detector has a class attribute scope = 'run' or scope = 'rank'")
    if not callable(getattr(candidate, "update", None)):
        raise ValueError("a detector has a method update(event) that returns a tuple of verdicts")
    taken = next((cls for cls in BUILTIN if cls.name == name), None)
    if taken is not None and taken is not candidate:
        raise ValueError(f"the name {name!r} is taken by {_path(taken)}; choose another")
    try:
        version = getattr(candidate(), "version", None)
    except Exception as error:  # the class is not ours
        raise ValueError(
            f"{candidate.__name__}() must work without arguments: {_reason(error)}"
        ) from error
    if not (isinstance(version, str) and version):
        raise ValueError("an instance has version = fingerprint(name, config)")
    return candidate


def _entry_points() -> Iterable[metadata.EntryPoint]:
    """The entry points of our group: up to Python 3.9 they come as a dict of all groups."""
    points = metadata.entry_points()
    select = getattr(points, "select", None)
    if select is not None:
        selected: Iterable[metadata.EntryPoint] = select(group=ENTRY_POINT_GROUP)
    else:
        selected = points.get(ENTRY_POINT_GROUP, ())
    distinct: List[metadata.EntryPoint] = []
    for point in selected:  # a path listed twice in sys.path yields its distributions twice
        if point not in distinct:
            distinct.append(point)
    return distinct


def _path(cls: Type[Detector]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
