"""What can go wrong, and whom it concerns.

    BatchvlError                     a command ends with it; `exit_code` is the process's
    ├── UsageError              2    nothing was run: the command, the manifest or the model is wrong
    │   ├── OptionError              an option's value, or two options that exclude each other
    │   ├── ManifestError            the manifest as a whole: no such column, wrong type, empty, truncated
    │   ├── ModelError               the model: not found, not supported, needs code of its own
    │   ├── EngineUnavailable        the engine: a library or a device is missing
    │   └── ResumeError              the output folder belongs to another run, or another runner holds it
    ├── TooManyFailures         4    stopped by --max-failures
    ├── StoppedEarly           75    signal, time, disk: run the same command again to go on
    └── EngineLost              1    the engine died and will not come back

    RowError                         one row's failure: data, never the end of a run; `code`, `stage`, `retryable`
    ├── PromptError                  stage "prompt"
    │   ├── InvalidRow, MissingPrompt, InvalidMessages, ImageCountMismatch, SpecialToken, InvalidGeneration
    ├── FetchError                   stage "fetch"
    │   ├── UnsupportedSource, InvalidDataUri, MissingFile, ForbiddenPath, ForbiddenAddress, InvalidUrl,
    │   │   NameResolutionFailed, ConnectionFailed, HttpStatus, HttpRetryable, FetchTimeout,
    │   │   TooManyBytes, TooManyRedirects, EmptyPicture
    ├── PrepareError                 stage "prepare"
    │   ├── NotAPicture, TruncatedPicture, CorruptPicture, TooManyPixels, TooManyPictures, PrepareTimeout,
    │   │   PrepareCrashed, PrepareFailed, TooLarge
    └── InferError                   stage "engine"
        ├── ContextLengthExceeded, RequestRefused, EngineFailed, EngineCrashed, RowTimeout, Unsupported,
        │   GaveUpWaiting

A RowError's `code` goes into the output column `error.code` and never changes once released.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class BatchvlError(Exception):
    """The end of a command. The message tells what was found, what is wanted, and where."""

    exit_code: ClassVar[int] = 1


class UsageError(BatchvlError):
    """Nothing was run: mend the command, the manifest or the model and run again."""

    exit_code = 2


class OptionError(UsageError):
    """An option has a value it cannot have, or contradicts another."""


class ManifestError(UsageError):
    """The manifest cannot be read as a whole. A single bad row is a `RowError` instead."""


class ModelError(UsageError):
    """The model cannot be found, is of an unsupported kind, or needs `--trust-remote-code`."""


class EngineUnavailable(UsageError):
    """The engine cannot run here: a library or a device is missing. The message names the alternatives."""


class ResumeError(UsageError):
    """The output folder was written with other settings, or another runner is at work in it."""


class TooManyFailures(BatchvlError):
    """More rows failed than `--max-failures` allows."""

    exit_code = 4


class StoppedEarly(BatchvlError):
    """The run stopped before its end; what was answered is kept and the same command goes on from there."""

    exit_code = 75


class EngineLost(BatchvlError):
    """The engine process died and was given up. The message holds its last words."""


class RowError(Exception):
    """One row's failure. Leaves have a stable `code`, the `stage` they belong to, and whether a retry may help."""

    code: ClassVar[str]
    stage: ClassVar[str]
    retryable: ClassVar[bool] = False


class PromptError(RowError):
    stage = "prompt"


class FetchError(RowError):
    stage = "fetch"


class PrepareError(RowError):
    stage = "prepare"


class InferError(RowError):
    stage = "engine"


class InvalidRow(PromptError):
    """The manifest's row cannot be read: not JSON, a wrong type, an id out of range."""

    code = "invalid_row"


class MissingPrompt(PromptError):
    """The row's prompt is null or empty, or a column that the template names is null."""

    code = "missing_prompt"


class InvalidMessages(PromptError):
    """`messages` is not an OpenAI chat that ends with the user's turn."""

    code = "invalid_messages"


class ImageCountMismatch(PromptError):
    """`<IMAGE_TOKEN>` stands more or less often than the row has pictures."""

    code = "image_count_mismatch"


class SpecialToken(PromptError):
    """A value holds one of the model's special tokens and `--special-tokens fail` was given."""

    code = "special_token"


class InvalidGeneration(PromptError):
    """The row's `generation` holds an unknown setting or a value out of range."""

    code = "invalid_generation"


class UnsupportedSource(FetchError):
    """The picture's source is of a kind that batchvl does not read, such as `ftp://`."""

    code = "unsupported_source"


class InvalidDataUri(FetchError):
    """The `data:` URI is malformed or its base64 cannot be decoded."""

    code = "invalid_data_uri"


class MissingFile(FetchError):
    """No such file, or it cannot be read."""

    code = "missing_file"


class ForbiddenPath(FetchError):
    """The file lies outside the manifest's folder and every `--image-root`, symbolic links resolved."""

    code = "forbidden_path"


class ForbiddenAddress(FetchError):
    """The URL leads to an address that is not global and not opened by `--allow-private`."""

    code = "forbidden_address"


class InvalidUrl(FetchError):
    """The URL cannot be parsed."""

    code = "invalid_url"


class NameResolutionFailed(FetchError):
    """The host's name cannot be resolved."""

    code = "name_resolution_failed"
    retryable = True


class ConnectionFailed(FetchError):
    """Connecting failed, TLS failed, or the connection broke, after all retries."""

    code = "connection_failed"
    retryable = True


class HttpStatus(FetchError):
    """The server answered with a status that a retry does not mend, such as 404. The message names it."""

    code = "http_status"


class HttpRetryable(FetchError):
    """The server answered 408, 425, 429 or 5xx, after all retries. The message names the status."""

    code = "http_retryable"
    retryable = True


class FetchTimeout(FetchError):
    """The picture did not arrive within the fetch deadline."""

    code = "fetch_timeout"
    retryable = True


class TooManyBytes(FetchError):
    """The picture has more bytes than `--max-image-bytes`."""

    code = "too_many_bytes"


class TooManyRedirects(FetchError):
    """The server redirected too often."""

    code = "too_many_redirects"


class EmptyImage(FetchError):
    """The picture has no bytes."""

    code = "empty_image"


class NotAnImage(PrepareError):
    """The bytes are no picture of a known format. The message tells what they look like, such as an HTML page."""

    code = "not_an_image"


class TruncatedImage(PrepareError):
    """The picture ends too early."""

    code = "truncated_image"


class CorruptImage(PrepareError):
    """The picture's data cannot be decoded."""

    code = "corrupt_image"


class TooManyPixels(PrepareError):
    """The picture has more pixels than `--max-image-pixels`. Found in its header, before decoding."""

    code = "too_many_pixels"


class TooManyImages(PrepareError):
    """The row has more pictures than the engine or `--max-images` allows."""

    code = "too_many_images"


class PrepareTimeout(PrepareError):
    """Decoding and preparing took longer than `--prepare-timeout`."""

    code = "prepare_timeout"


class PrepareCrashed(PrepareError):
    """The image worker died twice over this row, of memory or of a fault in a decoder."""

    code = "prepare_crashed"


class PrepareFailed(PrepareError):
    """The model's own preparation raised an error. The message quotes it."""

    code = "prepare_failed"


class TooLarge(PrepareError):
    """The row's pictures do not fit the arena (`--arena-bytes`)."""

    code = "too_large"


class ContextLengthExceeded(InferError):
    """Prompt, pictures and history have more tokens than the model's context holds."""

    code = "context_length_exceeded"


class RequestRefused(InferError):
    """The engine takes the row's request for invalid. The message quotes it."""

    code = "request_refused"


class EngineError(InferError):
    """The engine answered this row with an error. The message quotes it."""

    code = "engine_error"
    retryable = True


class EngineCrashed(InferError):
    """The engine died twice over this row, the second time over this row alone."""

    code = "engine_crashed"


class RowTimeout(InferError):
    """The row was longer in the engine than `--row-timeout`."""

    code = "row_timeout"
    retryable = True


class Unsupported(InferError):
    """The engine cannot honour what this row asks for."""

    code = "unsupported"


class GaveUpWaiting(InferError):
    """Only rows waiting for a retry were left and the engine had idled `--max-idle-gpu`."""

    code = "gave_up_waiting"
    retryable = True


def row_errors() -> Iterator[type[RowError]]:
    """Every leaf of the tree of row errors, in the order of the stages.

    >>> [error.code for error in row_errors()][:2]
    ['invalid_row', 'missing_prompt']
    """
    for stage in RowError.__subclasses__():
        yield from stage.__subclasses__()
