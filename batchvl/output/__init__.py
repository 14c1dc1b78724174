"""Where answers go: a journal that loses nothing, parts made of it, and the merged file. `shard.py` has the layout."""

from .done import Bitmap
from .guard import Guard
from .merge import merge
from .record import COLUMNS, Counts, Record, schema
from .redo import Redo
from .report import MergeReport
from .store import Output
from .watch import status, watch

__all__ = [
    "COLUMNS",
    "Bitmap",
    "Counts",
    "Guard",
    "MergeReport",
    "Output",
    "Record",
    "Redo",
    "merge",
    "schema",
    "status",
    "watch",
]
