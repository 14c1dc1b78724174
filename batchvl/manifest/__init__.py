"""Manifests: the rows of Parquet, JSONL or CSV files, or of a directory of images."""

from .manifest import Manifest, Schema

__all__ = ["Manifest", "Schema"]
