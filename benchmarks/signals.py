"""What ``extract_signals`` costs on a language model's logits: memory, time, and how exact it is.

    python benchmarks/signals.py [--json FILE] [--quick]

(8, 2048, 128,000) in bfloat16 are 4.2 GB; --quick takes an eighth of the positions. Memory is the
process's high-water mark above what it had with the logits made, CPU only. Time is compared with
reading the logits twice, which is the least for values that need a maximum first. The reference is
float64, from the definitions.
"""

from __future__ import annotations

import importlib
import os
import resource
import time
from typing import Any, Dict, Iterator, List

from measure import Row, arguments, at_most, finish, information, median

_SAMPLES, _POSITIONS, _CLASSES = 8, 2048, 128_000
_ROUNDS = 3


def main() -> None:
    """Measures every row, prints the table, writes the JSON."""
    options = arguments(__doc__, "signals").parse_args()
    load_before = os.getloadavg()[0]
    positions = _POSITIONS // 8 if options.quick else _POSITIONS
    finish("signals", rows(positions), options.json, quick=options.quick, load_before=load_before)


def rows(positions: int) -> Iterator[Row]:
    """Memory first: the high-water mark only ever rises."""
    from plarv.utils import extract_signals

    torch: Any = importlib.import_module("torch")
    torch.manual_seed(0)
    shape = (_SAMPLES, positions, _CLASSES)
    extract_signals(*_batch(torch, (2, 4, 1000)))
    logits, labels = _batch(torch, shape)
    before = _peak_bytes()
    signals = extract_signals(logits, labels)
    megabytes = (_peak_bytes() - before) / 1e6
    size = logits.numel() * logits.element_size() / 1e6
    name = f"({_SAMPLES}, {positions}, {_CLASSES:,}) in bfloat16, {size:,.0f} MB"
    text = f"{megabytes:.0f} MB beside them"
    yield at_most(f"memory for {name}", text, megabytes, 100.0, "MB")
    taken: List[float] = []
    read: List[float] = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        logits.amax()
        logits.amin()
        read.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        extract_signals(logits, labels)
        taken.append(time.perf_counter() - begun)
    ratio = median(taken) / median(read)
    text = f"{median(taken):.2f} s, {ratio:.1f} x two reads"
    yield information(f"time for {name}", text, ratio=ratio, seconds=median(taken))
    worst = _worst(signals, logits, labels)
    text = f"{worst:.1e} of the value"
    yield at_most("largest distance from a float64 reference", text, worst, 1e-5, "")


def _batch(torch: Any, shape: Any) -> Any:
    """Made in place: no float32 copy may raise the mark."""
    logits = torch.empty(shape, dtype=torch.bfloat16)
    for sample in logits:
        sample.normal_(0.0, 3.0)
    return logits, torch.randint(shape[-1], shape[:-1])


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def _worst(signals: Dict[str, Any], logits: Any, labels: Any) -> float:
    """Of all samples and signals but the counts."""
    torch: Any = importlib.import_module("torch")
    worst = 0.0
    for number, (sample, targets) in enumerate(zip(logits, labels)):
        sums = torch.zeros(4, dtype=torch.float64)
        for block, of_block in zip(sample.split(64), targets.split(64)):
            logs = torch.log_softmax(block.double(), -1)
            own = of_block[:, None]
            others = block.double().scatter(1, own, float("-inf")).amax(1)
            sums += torch.stack((
                -logs.gather(1, own).sum(),
                logs.amax(1).exp().sum(),
                (block.double().gather(1, own)[:, 0] - others).sum(),
                torch.special.entr(logs.exp()).sum(),
            ))  # fmt: skip
        names = ("sample_losses", "sample_confidences", "sample_margins", "sample_entropies")
        for name, expected in zip(names, (sums / len(targets)).tolist()):
            worst = max(worst, abs(signals[name][number] - expected) / abs(expected))
    return worst


if __name__ == "__main__":
    main()
