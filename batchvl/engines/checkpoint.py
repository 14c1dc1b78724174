"""Find the directory with a model's files, for engines that load models themselves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import ModelError

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
IGNORED_FILES = ("original/*", "onnx/*", "consolidated*")
"""Copies of the weights in other formats, which some repositories contain."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a model's files."""

    path: str
    revision: str | None = None
    """The commit, if the model is from a hub."""

    @property
    def weight_bytes(self) -> int:
        """Total size of the weight files."""
        return sum(file.stat().st_size for file in Path(self.path).glob("*.safetensors"))


def find_checkpoint(model: str, revision: str | None = None, code: bool = False) -> Checkpoint:
    """Return a model's directory: `model` itself if it is one, else a download from the Hugging Face hub in its cache.

    An access token is taken from the environment (HF_TOKEN).

    Args:
        model: A directory, or a name on the hub.
        revision: A branch, tag or commit on the hub.
        code: Whether to download the repository's Python files as well.

    Raises:
        ModelError: The model was not found or cannot be downloaded.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ModelError(f"{model}: --revision {revision} applies to models on the hub, but this is a directory")
        return _checked(Checkpoint(str(directory.resolve())), model)
    if directory.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(
            f"{model}: no such directory; expected a directory with a Hugging Face checkpoint, or a name on its hub"
        )
    where = model + (f", revision {revision}" if revision else "")
    try:
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*FILES, "*.py"] if code else list(FILES),
            ignore_patterns=list(IGNORED_FILES),
            token=os.environ.get("HF_TOKEN"),
        )
    except HFValidationError:
        raise ModelError(
            f"{model}: neither a directory nor a valid name on the Hugging Face hub (owner/name)"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"{where}: the model is gated: accept its terms on https://huggingface.co/{model} "
            "and set HF_TOKEN to a token of that account"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{where}: the model has no such revision") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{where}: neither a directory nor a model on the Hugging Face hub (if it is private, set HF_TOKEN)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{where}: no such directory, not in the hub's cache, and the Hugging Face hub cannot be reached: "
            f"use a directory, or download the model beforehand with `hf download {model}` ({first_line(error)})"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{where}: cannot download from the Hugging Face hub: {first_line(error)}") from None
    return _checked(Checkpoint(path, Path(path).name), model)


def _checked(checkpoint: Checkpoint, model: str) -> Checkpoint:
    if not (Path(checkpoint.path) / "config.json").is_file():
        raise ModelError(f"{model}: not a Hugging Face checkpoint: there is no config.json in {checkpoint.path}")
    if not checkpoint.weight_bytes:
        raise ModelError(
            f"{model}: there are no *.safetensors in {checkpoint.path}; other weight formats are not supported"
        )
    return checkpoint


def first_line(error: Any) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
