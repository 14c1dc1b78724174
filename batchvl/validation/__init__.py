"""Check a whole manifest before anything is paid for."""

from .report import Probe, Report
from .validation import validate

__all__ = ["Probe", "Report", "validate"]
