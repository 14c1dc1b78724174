"""A model's name to a folder with its files, for the engines that load a model themselves."""

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
NOT_FILES = ("original/*", "onnx/*", "consolidated*")
"""Second copies of the weights that some repositories carry in other forms."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's files in a folder."""

    path: str
    revision: str | None = None
    """The commit, of a model from a hub."""

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in Path(self.path).glob("*.safetensors"))


def find(model: str, revision: str | None = None, code: bool = False) -> Checkpoint:
    """The folder of a model: itself where it is one, else downloaded from the Hugging Face hub into its cache.

    `code` fetches the repository's own Python files as well. A token is taken from the environment (HF_TOKEN).
    Raises ModelError.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"{model}: is a folder, and has no --revision {revision}: that is for models of the hub")
        return _checked(Checkpoint(str(folder.resolve())), model)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: no such folder: want a folder of a Hugging Face checkpoint, or a name of its hub")
    where = f"{model}" + (f", revision {revision}" if revision else "")
    try:
        found = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*FILES, "*.py"] if code else list(FILES),
            ignore_patterns=list(NOT_FILES),
            token=os.environ.get("HF_TOKEN"),
        )
    except HFValidationError:
        raise ModelError(f"{model}: no such folder, and no name of the Hugging Face hub (owner/name) either") from None
    except GatedRepoError:
        raise ModelError(
            f"{where}: the model is gated: accept its terms on https://huggingface.co/{model} "
            "and set HF_TOKEN to a token of that account"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{where}: the model has no such revision") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{where}: neither a folder here nor a model on the Hugging Face hub (if it is private, set HF_TOKEN)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{where}: no such folder here, not in the hub's cache, and the Hugging Face hub cannot be reached: "
            f"give a folder, or download the model beforehand with `hf download {model}` ({first_line(error)})"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{where}: downloading from the Hugging Face hub failed: {first_line(error)}") from None
    return _checked(Checkpoint(found, Path(found).name), model)


def _checked(checkpoint: Checkpoint, model: str) -> Checkpoint:
    if not (Path(checkpoint.path) / "config.json").is_file():
        raise ModelError(f"{model}: found no config.json in {checkpoint.path}: not a Hugging Face checkpoint")
    if not checkpoint.weight_bytes:
        raise ModelError(f"{model}: found no *.safetensors in {checkpoint.path}: weights of other forms are not loaded")
    return checkpoint


def first_line(error: Any) -> str:
    """What an error says, for a message that has room for one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
