"""Whether ADQI orders data sets by their true quality.

    python benchmarks/adqi.py [--json FILE] [--quick] [--seeds N]

Small models are trained on ladders of known quality, at equal numbers of steps: the share of unique
samples (1.0 to 0.01, as passes over a shuffled set and as a list with copies whose ids differ) and
the share of right labels (1.0 to 0.2, on fresh data and in five passes). A number is Spearman's
rank correlation of ADQI's total with the true order of the five data sets of a ladder.

Three sets of signals are given of the same runs: *all* (loss, gradient norm, learning rate, the
loader's sample ids and per-sample signals, of which the gpt has losses and entropies only), *no
ids*, and *loss, gradient* (these two alone). The headline uses *all*. The score was made on other
seeds of mlp and gpt; cnn, a third task with another optimizer, took no part in it.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

from adqi_ladders import Quality, trajectory
from measure import Progress, Row, arguments, at_least, finish, information
from plarv_sinks.quality_fold import ADQI, QualityFold

_UNIQUE = (1.0, 0.4, 0.1, 0.03, 0.01)
_RIGHT = (1.0, 0.9, 0.75, 0.5, 0.2)
_TUNED, _HELD_OUT = ("mlp", "gpt"), "cnn"
_QUICK_STEPS = 150

LADDERS: Dict[str, Tuple[Quality, ...]] = {
    "unique samples, in passes": tuple(Quality(unique=share) for share in _UNIQUE),
    "unique samples, in a list with copies": (
        Quality(),
        *(Quality(unique=share, serving="copies") for share in _UNIQUE[1:]),
    ),
    "right labels, fresh data": tuple(Quality(right=share) for share in _RIGHT),
    "right labels, five passes": tuple(Quality(unique=0.2, right=share) for share in _RIGHT),
}
"""The data sets of each ladder, best first."""

_SAMPLES: Dict[str, None] = {
    "sample_losses": None,
    "sample_entropies": None,
    "sample_confidences": None,
    "sample_margins": None,
    "sample_correct": None,
}
HIDDEN: Dict[str, Mapping[str, None]] = {
    "all": {},
    "no ids": {"sample_ids": None},
    "loss, gradient": {"sample_ids": None, "current_lr": None, **_SAMPLES},
}
"""What is taken away from the recorded steps, by set of signals."""


class _Found(NamedTuple):
    """The correlations of one ladder, one a seed, and the scores they come from."""

    correlations: Dict[str, List[float]]  # by signals
    totals: Dict[str, List[List[Optional[float]]]]  # by signals, then seed, then data set


def main() -> None:
    """Trains every model, prints the table, writes the JSON."""
    parser = arguments(__doc__, "adqi")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each model")
    parser.add_argument(
        "--first-seed", type=int, default=10, metavar="N", help="and those after it"
    )
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    torch.set_num_threads(1)
    num_seeds = 1 if options.quick else options.seeds
    seeds = range(options.first_seed, options.first_seed + num_seeds)
    rows = _rows(seeds, _QUICK_STEPS if options.quick else None)
    finish("adqi", rows, options.json, quick=options.quick, load_before=load_before)


def _rows(seeds: Sequence[int], steps: Optional[int]) -> Iterator[Row]:
    yield information("a correlation a seed, with", " | ".join(HIDDEN), seeds=list(seeds))
    found: Dict[str, List[_Found]] = {}
    for name in _TUNED if steps else (*_TUNED, _HELD_OUT):
        for ladder, qualities in LADDERS.items():
            if name == _HELD_OUT and qualities[0].unique < 1.0:
                continue  # for time
            result = _climb(name, qualities, seeds, steps)
            found.setdefault(name, []).append(result)
            yield information(
                f"{name}: {ladder}",
                " | ".join(_spelled(result.correlations[signals]) for signals in HIDDEN),
                correlations=result.correlations,
                totals=result.totals,
            )
    tuned = [result for name in _TUNED for result in found[name]]
    for signals in HIDDEN:
        yield from _summary(f"mlp and gpt, {signals}", tuned, signals)
    if _HELD_OUT in found:
        for signals in HIDDEN:
            yield from _summary(f"{_HELD_OUT} (held out), {signals}", found[_HELD_OUT], signals)


def _summary(what: str, results: Sequence[_Found], signals: str) -> Iterator[Row]:
    values = [value for result in results for value in result.correlations[signals]]
    mean, worst = math.fsum(values) / len(values), min(values)
    if signals == "all":
        yield at_least(f"{what}: mean Spearman", f"{mean:.3f}", mean, 0.9, "")
        yield at_least(f"{what}: worst of {len(values)}", f"{worst:.2f}", worst, 0.7, "")
    else:
        measured = f"{mean:.3f}; worst of {len(values)} {worst:.2f}"
        yield information(f"{what}: mean Spearman", measured, mean=mean, worst=worst)


def _climb(
    name: str, qualities: Sequence[Quality], seeds: Sequence[int], steps: Optional[int]
) -> _Found:
    found = _Found({signals: [] for signals in HIDDEN}, {signals: [] for signals in HIDDEN})
    progress = Progress(name, len(seeds) * len(qualities))
    for seed in seeds:
        scores: List[Dict[str, ADQI]] = []
        for quality in qualities:
            scores.append(_trained(name, quality, seed, steps))
            progress.add()
        for signals in HIDDEN:
            totals = [score[signals].total for score in scores]
            found.totals[signals].append(totals)
            known = [math.nan if total is None else total for total in totals]
            found.correlations[signals].append(spearman(range(len(known), 0, -1), known))
    progress.close()
    return found


@lru_cache(maxsize=None)  # the best data set is the first of several ladders
def _trained(name: str, quality: Quality, seed: int, steps: Optional[int]) -> Dict[str, ADQI]:
    """The score of one run, by signals."""
    folds = {signals: QualityFold() for signals in HIDDEN}
    for event in trajectory(name, quality, seed, steps):
        for signals, fold in folds.items():
            hidden: Mapping[str, Any] = HIDDEN[signals]
            fold.add(event._replace(**hidden))
    return {signals: fold.score() for signals, fold in folds.items()}


def _spelled(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def spearman(truth: Sequence[float], values: Sequence[float]) -> float:
    """The rank correlation, ties at their mean rank; 0 where either does not vary."""
    first, second = _ranks(truth), _ranks(values)
    middle = 0.5 * (len(first) - 1)
    both = math.fsum((a - middle) * (b - middle) for a, b in zip(first, second))
    spread = math.fsum((a - middle) ** 2 for a in first)
    spread *= math.fsum((b - middle) ** 2 for b in second)
    return both / math.sqrt(spread) if spread > 0.0 else 0.0


def _ranks(values: Sequence[float]) -> List[float]:
    return [
        sum(other < value for other in values) + 0.5 * (sum(other == value for other in values) - 1)
        for value in values
    ]


if __name__ == "__main__":
    main()
