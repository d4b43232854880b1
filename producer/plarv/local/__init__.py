"""The detector that looks inside the model, on this machine only. torch is needed to attach it."""

from __future__ import annotations

from plarv.local.detector import LocalDetector
from plarv.local.kept_reports import read_reports
from plarv.local.report import CheckResult, LocalReport

__all__ = ["CheckResult", "LocalDetector", "LocalReport", "read_reports"]
