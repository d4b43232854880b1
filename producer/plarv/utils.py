"""Per-sample signals out of the logits that a training loop has at hand anyway."""

from __future__ import annotations

import logging
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from plarv.faults import Guard
from plarv.tensors import global_norm, live_gradients, loaded_torch

__all__ = ["extract_signals"]

_CHUNK_ELEMENTS = 1 << 22  # 16 MB in float32; up to four such are alive at once
_HALF = 0.5  # share of its labels from which on a sample counts as correct
_LOWEST = -200.0  # exp() of it is 0 in float32; finite, so that 0 times it is 0
_NORMS = ("grad_l1_norm", "grad_l2_norm")

_log = logging.getLogger("plarv")
_told: Set[str] = set()
_guard = Guard("signals could not be extracted")


def extract_signals(
    logits: Any, labels: Any, model: Any = None, *, ignore_index: int = -100
) -> Dict[str, Any]:
    """What each sample of a batch says, ready for ``argus.step(loss, **signals)``.

    ``logits`` are (B, C) with ``labels`` (B,), or (B, T, V) with ``labels`` (B, T). **Labels stand
    beside the logits that predict them**, position by position: where a language model's labels are
    its inputs, shift first, ``extract_signals(logits[:, :-1], labels[:, 1:])``; slices are not
    copied. A sample's value is the mean over its labels; those equal to ``ignore_index`` or outside
    of ``[0, V)`` do not count. In lists of B:

    - ``sample_losses``: cross entropy, in nats
    - ``sample_confidences``: probability of the likeliest class
    - ``sample_margins``: logit of the label minus the largest other one
    - ``sample_entropies``: of the predicted distribution, in nats
    - ``sample_correct``: 1 where at least half of the labels have the largest logit, else 0

    With ``model``, between backward and ``zero_grad()``, also ``grad_l1_norm`` and
    ``grad_l2_norm`` over all its gradients (of this rank's part where they are sharded).

    A sample without labels, or with NaN or +Inf among its logits, has NaN for its values. Never
    raises: what is no tensor, has other shapes or lies sharded over devices gives ``{}``, with one
    warning in the log of ``plarv``. Without samples: ``{}``.

    Cost: two reads of the logits, chunks of at most 64 MB in all beside them, float32 (float64 for
    such logits), and one copy from the device, which waits for it. No gradient flows through it.

    >>> extract_signals(None, None)  # not a tensor: one warning, nothing raised
    {}
    """
    torch = loaded_torch()
    wrong = _wrong_shape(torch, logits, labels)
    if wrong:
        if wrong not in _told:
            _told.add(wrong)
            _log.warning("extract_signals: %s; no signals", wrong)
        return {}
    with _guard, torch.no_grad():  # type: ignore[union-attr]
        return _extract(torch, logits.detach(), labels, model, ignore_index)
    return {}


def _wrong_shape(torch: Optional[Any], logits: Any, labels: Any) -> str:
    """What keeps these two from being logits and labels; '' where nothing does."""
    if torch is None or not isinstance(logits, torch.Tensor):
        return "logits are no torch tensor"
    if not isinstance(labels, torch.Tensor):
        return "labels are no torch tensor"
    if hasattr(logits, "_local_tensor") or hasattr(labels, "_local_tensor"):
        return "logits or labels are sharded"
    if logits.layout is not torch.strided or logits.device.type == "meta":
        return "logits are not dense"
    if not logits.is_floating_point():
        return "logits are no floating-point numbers"
    if labels.is_floating_point() or labels.is_complex():
        return "labels are no class indices"
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        return "logits must be (B, C) or (B, T, V)"
    if labels.shape != logits.shape[:-1]:
        return "labels must have the shape of the logits without its last dimension"
    return ""


def _extract(torch: Any, logits: Any, labels: Any, model: Any, ignore_index: int) -> Dict[str, Any]:
    if logits.dim() == 2:  # one position a sample
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    samples, positions, classes = logits.shape
    if samples * positions == 0:
        return {}
    labels = labels.to(device=logits.device, dtype=torch.int64, non_blocking=True)
    counted = (labels != ignore_index) & (labels >= 0) & (labels < classes)
    labels = labels.where(counted, torch.zeros_like(labels))
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    sums = logits.new_zeros((5, samples), dtype=wide)
    for rows, columns in _blocks(samples, positions, classes):
        inside = counted[rows, columns]
        block = logits[rows, columns].to(wide).reshape(-1, classes)
        values = _values(torch, block, labels[rows, columns].reshape(-1, 1))
        values = values.view(5, *inside.shape)
        sums[:, rows] += values.where(inside, torch.zeros_like(values)).sum(2)
    means = (sums / counted.sum(1)).reshape(-1)
    norms = _gradient_norms(torch, model)
    numbers = torch.cat([means, *(norm.to(means, non_blocking=True).view(1) for norm in norms)])
    return _named(numbers.tolist(), int(samples))


def _named(numbers: List[float], samples: int) -> Dict[str, Any]:
    losses, confidences, margins, entropies, correct = (
        numbers[start : start + samples] for start in range(0, 5 * samples, samples)
    )
    signals: Dict[str, Any] = {
        "sample_losses": losses,
        "sample_confidences": confidences,
        "sample_margins": margins,
        "sample_entropies": entropies,
        "sample_correct": [int(share >= _HALF) for share in correct],
    }
    signals.update(zip(_NORMS, numbers[5 * samples :]))
    return signals


def _blocks(samples: int, positions: int, classes: int) -> Iterator[Tuple[slice, slice]]:
    """Samples and positions that are worked at together: views of the logits, in any layout."""
    most = max(1, _CHUNK_ELEMENTS // classes)
    rows, columns = max(1, most // positions), min(most, positions)
    for row in range(0, samples, rows):
        for column in range(0, positions, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _values(torch: Any, block: Any, label: Any) -> Any:
    """Loss, confidence, margin, entropy and whether it is right, of each row: (5, rows).

    Everything is taken relative to the largest logit, whose own term is left out of the sums: a
    loss near 0 keeps all its digits.
    """
    largest, place = block.max(1, keepdim=True)
    below = block - largest
    of_label = below.gather(1, label).squeeze(1)
    below.scatter_(1, place, -float("inf"))
    runner_up = below.amax(1)
    terms = below.exp()
    unknown = (largest - largest).squeeze(1)  # 0, or NaN where there is no largest logit
    rest = terms.sum(1) + unknown
    weighted = terms.mul_(below.clamp_(min=_LOWEST)).sum(1)
    log_sum = rest.log1p()
    right = of_label >= 0.0
    return torch.stack(
        [
            log_sum - of_label,
            1.0 / (1.0 + rest),
            torch.where((label == place).squeeze(1), -runner_up, of_label) + unknown,
            log_sum - weighted / (1.0 + rest),
            right.to(block.dtype),
        ]
    )


def _gradient_norms(torch: Any, model: Any) -> List[Any]:
    """L1 and L2 norm of the model's gradients; nothing where there are none."""
    gradients = live_gradients(list(model.parameters())) if hasattr(model, "parameters") else []
    second = global_norm(torch, gradients)
    if second is None:
        return []
    first: Optional[Any] = None
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            gradient = gradient.coalesce().values() if gradient.is_sparse else gradient.values()
        wide = None if gradient.dtype in (torch.float64, torch.complex128) else torch.float32
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient)
        norm = torch.linalg.vector_norm(gradient, 1, dtype=wide).to(second, non_blocking=True)
        first = norm if first is None else first + norm
    return [first, second]
