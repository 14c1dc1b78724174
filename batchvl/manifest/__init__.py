"""Rows in: Parquet, JSONL, CSV, or a folder of pictures."""

from .manifest import Manifest, Schema

__all__ = ["Manifest", "Schema"]
