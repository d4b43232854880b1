"""Puts the compiled fold into a wheel built with ARGUS_COMPILE=1; any other wheel is pure."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

__all__ = ["CompiledFold"]


class CompiledFold(BuildHookInterface[Any]):
    """See `deploy/compile_fold.py`."""

    def dependencies(self) -> List[str]:
        """What only a compiling build needs."""
        return list(_compiler(self.root).REQUIREMENTS) if _wanted() else []

    def initialize(self, version: str, build_data: Dict[str, Any]) -> None:
        """Compiles, and adds the modules beside the Python ones."""
        if not _wanted() or version == "editable":
            return
        compiler = _compiler(self.root)
        compiler.compile_fold(compiler.TARGET)
        for path in sorted(compiler.TARGET.rglob("*")):
            if path.suffix in (".so", ".pyd"):
                name = path.relative_to(compiler.TARGET).as_posix()
                build_data["force_include"][str(path)] = name
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _wanted() -> bool:
    return os.environ.get("ARGUS_COMPILE", "0") not in ("", "0")


def _compiler(root: str) -> ModuleType:
    place = Path(root) / "deploy" / "compile_fold.py"
    spec = importlib.util.spec_from_file_location("compile_fold", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
