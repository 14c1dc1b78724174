"""Where answers go: a journal that loses nothing, parts made of it, and the merged file. `shard.py` has the layout."""

from .done import Bitmap
from .guard import Guard
from .merge import MergeReport, merge
from .record import COLUMNS, Counts, Record, schema
from .store import Output

__all__ = ["COLUMNS", "Bitmap", "Counts", "Guard", "MergeReport", "Output", "Record", "merge", "schema"]
