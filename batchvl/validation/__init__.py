"""`batchvl validate`: check a whole manifest before a run."""

from .report import Probe, Report
from .validation import validate

__all__ = ["Probe", "Report", "validate"]
