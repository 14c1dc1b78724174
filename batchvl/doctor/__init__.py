"""Check this machine and suggest fixes: `batchvl doctor`."""

from .examine import as_json, examine
from .finding import Finding, Verdict

__all__ = ["Finding", "Verdict", "as_json", "examine"]
