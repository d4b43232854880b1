"""What forensics takes beside the standard library: asked for by name where it is missing."""

from __future__ import annotations

import importlib

__all__ = ["require"]


def require(*packages: str) -> None:
    """ImportError, naming the extra to install, where one of the packages is not there.

    >>> require("no_such_package")
    Traceback (most recent call last):
    ImportError: forensics needs no_such_package: pip install 'plarv-argus-sdk[forensics]'
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"forensics needs {package}: pip install 'plarv-argus-sdk[forensics]'"
            ) from error
