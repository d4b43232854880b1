"""From a loss tensor back to the parameters it was computed from."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

from plarv.tensors import loaded_torch

__all__ = ["parameters_of"]

_MAX_NODES = 1_000_000


def parameters_of(loss: object) -> Tuple[object, ...]:
    """The parameters that ``loss`` was computed from, found by walking its graph.

    Works after ``backward()`` too, which frees the graph's buffers and not its edges. Where
    ``nn.Parameter`` are among the leaves, only these; empty for what is no tensor with a graph.
    O(nodes), at most a million. What ran under reentrant checkpointing is not in the graph.
    """
    torch = loaded_torch()
    try:
        root = getattr(loss, "grad_fn", None)
        if torch is None or root is None:
            return ()
        leaves = _leaves(root)
        kind = torch.nn.Parameter
    except Exception:  # noqa: BLE001 - whatever odd object was passed as a loss
        return ()
    parameters = [leaf for leaf in leaves if isinstance(leaf, kind)]
    return tuple(parameters or leaves)


def _leaves(root: Any) -> List[object]:
    leaves: Dict[int, object] = {}
    visited = {root}
    stack = [root]
    while stack and len(visited) < _MAX_NODES:
        node = stack.pop()
        if type(node).__name__ == "AccumulateGrad":
            leaves[id(node.variable)] = node.variable
            continue
        for child, _ in node.next_functions:
            if child is not None and child not in visited:
                visited.add(child)
                stack.append(child)
    return list(leaves.values())
