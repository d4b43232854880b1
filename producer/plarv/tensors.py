"""What the SDK needs to know about torch without ever importing it.

torch counts as present only when the training script has imported it: everything here asks
``sys.modules`` and nothing here causes an import.
"""

from __future__ import annotations

import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

__all__ = ["global_norm", "is_tensor", "live_gradients", "loaded_torch", "local_part"]


def loaded_torch() -> Optional[Any]:
    """torch, where the script has imported it (wholly), else ``None``."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "Tensor") and hasattr(torch, "autograd") else None


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a torch tensor; False wherever torch is not loaded."""
    torch = loaded_torch()
    return torch is not None and isinstance(value, torch.Tensor)


def local_part(tensor: Any) -> Any:
    """This rank's part of a DTensor, and any other tensor itself: no collective is ever started."""
    return getattr(tensor, "_local_tensor", tensor)


def live_gradients(parameters: Sequence[Any]) -> List[Any]:
    """The ``.grad`` of those parameters that have one, in order, local parts only."""
    gradients: List[Any] = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            gradients.append(local_part(gradient))
    return gradients


def global_norm(torch: Any, tensors: Sequence[Any]) -> Optional[Any]:
    """The L2 norm over all elements of all tensors as a 0-d tensor, or ``None`` for no tensors.

    No synchronisation on strided tensors: one multi-tensor kernel per device and dtype. Halves are
    accumulated in float32, for the norm of a half tensor overflows at 65,504. Non-finite elements
    give a non-finite norm. On several devices the result is on the first accelerator. An
    uncoalesced sparse gradient on an accelerator is taken as it is (coalescing waits for it).
    """
    groups: Dict[Tuple[Any, Any], List[Any]] = {}
    strided = torch.strided
    for tensor in tensors:
        if tensor.layout is not strided:
            tensor = _dense_values(tensor)
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    if not groups:
        return None
    norms = [_group_norm(torch, dtype, group) for (_, dtype), group in groups.items()]
    if len(norms) == 1:
        return norms[0]
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), norms[0].device)
    wide = torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
    moved = [norm.to(device=device, dtype=wide, non_blocking=True) for norm in norms]
    return torch.linalg.vector_norm(torch.stack(moved))


def _dense_values(tensor: Any) -> Any:
    if tensor.is_sparse and tensor.device.type == "cpu":
        return tensor.coalesce().values()
    return tensor._values() if tensor.is_sparse else tensor.values()


def _group_norm(torch: Any, dtype: Any, tensors: List[Any]) -> Any:
    if dtype.is_complex:
        tensors = [torch.view_as_real(tensor) for tensor in tensors]
    if dtype in (torch.float16, torch.bfloat16):
        norms = _half_norms(torch, tensors)
    elif hasattr(torch, "_foreach_norm"):
        norms = torch._foreach_norm(tensors)
    else:
        norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


def _half_norms(torch: Any, tensors: List[Any]) -> Sequence[Any]:
    try:
        return list(torch._foreach_norm(tensors, 2, dtype=torch.float32))
    except (AttributeError, TypeError):  # torch before 2.4 has no dtype there
        return [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
