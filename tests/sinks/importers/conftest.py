"""Files of other loggers, each written once a session by the logger itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict

import pytest

_NEEDS = {
    "tensorboard": ("tensorboard",),
    "torch": ("torch", "tensorboard"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "lightning": ("lightning",),
    "huggingface": ("transformers", "accelerate", "torch"),
}
_OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="session")
def written_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that a writer wrote; a test that asks for one that is not installed is skipped."""
    folders: Dict[str, Path] = {}

    def write(name: str) -> Path:
        for package in _NEEDS[name]:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("writers.py")), name, str(folder)],
                cwd=folder,
                env={**os.environ, **_OFFLINE},
                capture_output=True,
                text=True,
                check=False,
                timeout=240,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            folders[name] = folder
        return folders[name]

    return write
