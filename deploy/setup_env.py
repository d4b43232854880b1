"""Makes or renews `.venv` with Argus in it, editable, and one of its extras.

    python deploy/setup_env.py EXTRA

pip brings uv into the environment and uv does the rest. What pip is told about indexes, by its
environment variables or its files, uv is told too, where uv was not told otherwise.

The `dev` environment also gets, for each other Python found (on PATH or with pyenv), a bare
one with pytest alone, in which the SDK's tests run.

torch: a machine without an NVIDIA GPU takes the CPU build (0.2 GB) from torch's own index where
that index answers within 5 s, else the default build (4.5 GB on Linux), which runs there as well. A
GPU machine takes the default build. `UV_TORCH_BACKEND` (cpu, cu128, ...), if set, decides instead.
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Dict, List, Mapping, Optional

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
UV = [str(PYTHON), "-m", "uv"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
PROBE_LIMIT_S = 5.0
OTHER_PYTHONS = ("3.8", "3.9", "3.10", "3.12", "3.13")

# pip's setting -> the variable that tells uv the same.
UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "no-index": "UV_NO_INDEX",
    "cert": "SSL_CERT_FILE",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
# Older names by which uv may have been told already.
UV_ALIASES = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}


def main(arguments: List[str]) -> int:
    """Exit status: 0 done; otherwise that of the command that failed."""
    (extra,) = arguments
    started = time.monotonic()
    try:
        make_environment()
        environment = {**os.environ, **uv_settings(pip_settings(), os.environ)}
        install(extra, environment)
        if extra == "dev":
            make_bare_environments(environment)
    except subprocess.CalledProcessError as error:
        say(f"the set-up stopped: {' '.join(map(str, error.cmd))} failed (see above)")
        return error.returncode or 1
    say(f"ready in {time.monotonic() - started:.0f} s")
    return 0


def make_environment() -> None:
    """A virtual environment that runs, with uv in it; one that does not run is made anew."""
    if not runs("-c", "import pip, sys; sys.exit(sys.version_info < (3, 11))"):
        say(f"making {ENVIRONMENT.name} with Python {platform.python_version()}")
        venv.create(ENVIRONMENT, clear=True, symlinks=True, with_pip=True)
    if not runs("-m", "uv", "--version"):
        pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "uv"], check=True)


def install(extra: str, environment: Mapping[str, str]) -> None:
    """Argus, editable, with `extra`; the CPU build of torch first, where that is to be had."""
    command = [*UV, "pip", "install", "--python", str(PYTHON), "--editable", f"{ROOT}[{extra}]"]
    if wants_cpu_torch():
        say("installing, with the CPU build of torch")
        cpu = [*command, "--torch-backend", "cpu"]
        if subprocess.run(cpu, env=environment, check=False).returncode == 0:
            return
        say("that failed; trying again with the default build")
    say(f"installing [{extra}]")
    subprocess.run(command, env=environment, check=True)


def make_bare_environments(environment: Mapping[str, str]) -> None:
    """`.venv/pythons/3.8` and so on, with pytest alone; what cannot be had is left out and said."""
    for version in OTHER_PYTHONS:
        interpreter = find_python(version)
        bare = ENVIRONMENT / "pythons" / version
        shutil.rmtree(bare, ignore_errors=True)
        if interpreter is None:
            continue
        commands = (
            [*UV, "venv", "--quiet", "--no-project", "--python", interpreter, str(bare)],
            [*UV, "pip", "install", "--quiet", "--python", str(bare), "pytest"],
        )
        if any(subprocess.run(each, env=environment, check=False).returncode for each in commands):
            say(f"no tests on Python {version}: its environment could not be made")
            shutil.rmtree(bare, ignore_errors=True)


def find_python(version: str) -> Optional[str]:
    """An interpreter of that minor version that runs, from PATH or from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(f"python{version}")]
    found += sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), reverse=True)
    for candidate in found:
        if candidate and runs("-c", "import sys", python=candidate):
            return candidate
    return None


def wants_cpu_torch() -> bool:
    """Whether this is Linux without a GPU, nothing else was decided, and the CPU index answers."""
    if "UV_TORCH_BACKEND" in os.environ or platform.system() != "Linux":
        return False
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        return False
    if runs("-c", "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"):
        return False  # whichever build is there stays
    probe = f"import urllib.request as u; u.urlopen({CPU_INDEX!r}, timeout={PROBE_LIMIT_S})"
    try:  # a process of its own, since looking a name up knows no time limit
        quiet = subprocess.DEVNULL
        done = subprocess.run(
            [sys.executable, "-c", probe], timeout=PROBE_LIMIT_S, check=False, stderr=quiet
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def pip_settings() -> Dict[str, str]:
    """Settings of pip by name; a variable stands above `[install]`, and that above `[global]`."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listed = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    settings: Dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in listed.splitlines():
            key, equals, value = line.partition("=")
            if equals and key.startswith(section + "."):
                settings[key[len(section) + 1 :]] = str(ast.literal_eval(value))
    return settings


def uv_settings(settings: Mapping[str, str], environment: Mapping[str, str]) -> Dict[str, str]:
    """The variables that tell uv what pip's `settings` say, but those that `environment` has."""
    told: Dict[str, str] = {}
    for name, variable in UV_VARIABLES.items():
        value = settings.get(name)
        names = (variable, UV_ALIASES.get(variable, variable))
        if value and not any(name in environment for name in names):
            separator = "," if variable == "UV_FIND_LINKS" else " "
            told[variable] = separator.join(value.split())
    if "UV_INDEX" in told and "UV_INDEX_STRATEGY" not in environment:
        told["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # what pip does with several indexes
    return told


def runs(*arguments: str, python: str = str(PYTHON)) -> bool:
    """Whether that Python (the environment's, unless told) runs `arguments` and exits 0."""
    try:
        command = [python, *arguments]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def say(text: str) -> None:
    """One line on stderr."""
    print(f"argus: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
