"""Where answers go: a journal that loses nothing, parts made of it, and the merged file. `shard.py` has the layout."""

from .merging.merge import merge
from .merging.report import MergeReport
from .record import COLUMNS, Counts, Record, schema
from .retry_selection import RetrySelection
from .rowset import RowSet
from .run_file import RunFile
from .store import ResultStore
from .watch import status, watch

__all__ = [
    "COLUMNS",
    "Counts",
    "MergeReport",
    "Record",
    "ResultStore",
    "RetrySelection",
    "RowSet",
    "RunFile",
    "merge",
    "schema",
    "status",
    "watch",
]
