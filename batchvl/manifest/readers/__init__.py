"""Readers of manifest formats, one module each."""

from ..files import Files, Format
from .base import Reader
from .csv import CsvReader
from .image_folder import ImageFolderReader
from .img2dataset import Img2datasetReader, is_img2dataset
from .jsonl import JsonlReader
from .parquet import ParquetReader
from .webdataset import WebDatasetReader

__all__ = ["READERS", "Reader", "open_reader"]

READERS: dict[Format, type[Reader]] = {
    "parquet": ParquetReader,
    "jsonl": JsonlReader,
    "csv": CsvReader,
    "webdataset": WebDatasetReader,
    "images": ImageFolderReader,
}
"""For each format, the reader that has the columns of the files, and no others."""


def open_reader(files: Files) -> Reader:
    """Return a reader for a run. Parquet that img2dataset wrote has images that its columns do not name.

    Raises:
        ManifestError: The files are empty or not of the format.
    """
    if files.format == "parquet" and is_img2dataset(files):
        return Img2datasetReader(files)
    return READERS[files.format](files)
