#!/bin/sh
# Prints the Python (3.11 or later, with venv and pip) that the set-up uses; $PYTHON comes first.
# Each candidate is run, not only looked up: a pyenv shim exists for versions that are not active.
set -eu

for candidate in ${PYTHON:-} python3.11 python3 python3.12 python3.13 python3.14 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            command -v "$candidate"
            exit 0
        fi
        bare=$candidate
    fi
done

if [ -n "${bare:-}" ]; then
    echo "argus: $bare has no venv or no pip (on Debian and Ubuntu: apt install python3-venv)." >&2
else
    echo "argus: the set-up needs Python 3.11 or later on PATH, as python3.11 or python3." >&2
    echo "argus: install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2
fi
exit 1
