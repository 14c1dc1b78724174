"""Manifests: the rows of Parquet, JSONL, CSV or tar files, or of a directory of images."""

from .manifest import Manifest, Schema

__all__ = ["Manifest", "Schema"]
