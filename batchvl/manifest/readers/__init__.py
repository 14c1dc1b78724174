"""Readers of manifest formats, one module each."""

from ..files import Format
from .base import Reader
from .csv import CsvReader
from .image_folder import ImageFolderReader
from .jsonl import JsonlReader
from .parquet import ParquetReader

__all__ = ["READERS", "Reader"]

READERS: dict[Format, type[Reader]] = {
    "parquet": ParquetReader,
    "jsonl": JsonlReader,
    "csv": CsvReader,
    "images": ImageFolderReader,
}
