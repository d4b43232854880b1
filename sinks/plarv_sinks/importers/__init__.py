"""Runs that others recorded, as this project's events.

``open_source`` reads a Hugging Face trainer's state, TensorBoard's event files, what W&B exports or
keeps offline, MLflow's file store, Lightning's CSV logs, and any table of a curve.
"""

from plarv_sinks.importers.sources import FORMATS, ImportedRun, format_of, open_source

__all__ = ["FORMATS", "ImportedRun", "format_of", "open_source"]
