"""All errors: those that end a command, and those that fail a single row.

    BatchvlError                     ends a command with its `exit_code`
    ├── UsageError              2    nothing was run: the command, the manifest or the model is wrong
    │   ├── OptionError              invalid value of an option, or conflicting options
    │   ├── ManifestError            the manifest as a whole: missing column, wrong type, empty, truncated
    │   ├── ModelError               the model: not found, not supported, needs its own code
    │   ├── EngineUnavailable        the engine: a library or a device is missing
    │   └── ResumeError              the output directory belongs to another run, or is in use by another runner
    ├── TooManyFailures         4    stopped by --max-failures
    ├── StoppedEarly           75    stopped by a signal, a time limit or a full disk; the same command resumes the run
    └── EngineLost              1    the engine exited and is not restarted

    RowError                         fails one row, not the run; has a `code`, a `stage` and `retryable`
    ├── PromptError                  stage "prompt"
    │   ├── InvalidRow, MissingPrompt, InvalidMessages, ImageCountMismatch, SpecialToken, InvalidGeneration
    ├── FetchError                   stage "fetch"
    │   ├── UnsupportedSource, InvalidDataUri, MissingFile, ForbiddenPath, ForbiddenAddress, InvalidUrl,
    │   │   NameResolutionFailed, ConnectionFailed, HttpStatus, HttpRetryable, FetchTimeout,
    │   │   TooManyBytes, TooManyRedirects, EmptyImage, UnsupportedEncoding, OptedOut
    ├── PrepareError                 stage "prepare"
    │   ├── NotAnImage, TruncatedImage, CorruptImage, TooManyPixels, TooManyImages, PrepareTimeout,
    │   │   PrepareCrashed, PrepareFailed, TooLarge
    └── InferError                   stage "engine"
        ├── ContextLengthExceeded, RequestRefused, EngineError, EngineCrashed, RowTimeout, Unsupported,
        │   GaveUpWaiting

The `code` of a RowError is the value of the output column `error.code`. A released code is never removed; one that was
renamed stays known in `RENAMED_CODES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class BatchvlError(Exception):
    """An error that ends a command. The message says what was found, what is expected, and where."""

    exit_code: ClassVar[int] = 1


class UsageError(BatchvlError):
    """Nothing was run, because the command, the manifest or the model is wrong."""

    exit_code = 2


class OptionError(UsageError):
    """An option has an invalid value, or conflicts with another one."""


class ManifestError(UsageError):
    """The manifest as a whole cannot be read. A single invalid row is a `RowError` instead."""


class ModelError(UsageError):
    """The model is not found or not supported, or needs `--trust-remote-code`."""


class EngineUnavailable(UsageError):
    """The engine cannot run here: a library or a device is missing. The message names the alternatives."""


class ResumeError(UsageError):
    """The output directory was written with other options, or is in use by another runner."""


class TooManyFailures(BatchvlError):
    """More rows failed than `--max-failures` allows."""

    exit_code = 4


class StoppedEarly(BatchvlError):
    """The run stopped early. Its results are kept, and the same command resumes it."""

    exit_code = 75


class EngineLost(BatchvlError):
    """The engine exited and is not restarted. The message quotes its last output."""


class RowError(Exception):
    """The failure of one row. Each leaf class has a stable `code`, a `stage`, and whether a retry may help."""

    code: ClassVar[str]
    stage: ClassVar[str]
    retryable: ClassVar[bool] = False


class PromptError(RowError):
    """The row has no valid prompt."""

    stage = "prompt"


class FetchError(RowError):
    """An image of the row cannot be read."""

    stage = "fetch"


class PrepareError(RowError):
    """An image of the row cannot be decoded or prepared for the model."""

    stage = "prepare"


class InferError(RowError):
    """The engine did not answer the row."""

    stage = "engine"


class InvalidRow(PromptError):
    """The row of the manifest cannot be read: invalid JSON, a wrong type, an ID out of range."""

    code = "invalid_row"


class MissingPrompt(PromptError):
    """The row's prompt is null or empty, or a column in the `--prompt` template is null."""

    code = "missing_prompt"


class InvalidMessages(PromptError):
    """`messages` is not an OpenAI chat that ends with a user message."""

    code = "invalid_messages"


class ImageCountMismatch(PromptError):
    """The number of `<IMAGE_TOKEN>` in the prompt differs from the number of images in the row."""

    code = "image_count_mismatch"


class SpecialToken(PromptError):
    """A value contains a special token of the model, and `--special-tokens fail` is set."""

    code = "special_token"


class InvalidGeneration(PromptError):
    """The row's `generation` column has an unknown setting or a value out of range."""

    code = "invalid_generation"


class UnsupportedSource(FetchError):
    """The image's URL has a scheme that is not supported, such as `ftp://`."""

    code = "unsupported_source"


class InvalidDataUri(FetchError):
    """The `data:` URI is malformed, or its base64 cannot be decoded."""

    code = "invalid_data_uri"


class MissingFile(FetchError):
    """The image file, the member of a tar, the object or its bucket does not exist, or the file cannot be read."""

    code = "missing_file"


class ForbiddenPath(FetchError):
    """The image file is outside the manifest's directory and every `--image-root`, after resolving symbolic links."""

    code = "forbidden_path"


class ForbiddenAddress(FetchError):
    """The URL leads to a non-public address that `--allow-private` does not allow, or to a bucket that `--allow-bucket`
    does not allow."""

    code = "forbidden_address"


class InvalidUrl(FetchError):
    """The URL cannot be parsed."""

    code = "invalid_url"


class NameResolutionFailed(FetchError):
    """The host name cannot be resolved."""

    code = "name_resolution_failed"
    retryable = True


class ConnectionFailed(FetchError):
    """The connection failed, TLS failed, or the connection was lost, after all retries."""

    code = "connection_failed"
    retryable = True


class HttpStatus(FetchError):
    """The server returned an HTTP status that is not worth a retry, such as 404, or an object store denied access."""

    code = "http_status"


class HttpRetryable(FetchError):
    """The server returned 408, 425, 429 or 5xx, after all retries."""

    code = "http_retryable"
    retryable = True


class FetchTimeout(FetchError):
    """No attempt got the image within `--fetch-timeout`, or `--fetch-deadline` was over."""

    code = "fetch_timeout"
    retryable = True


class TooManyBytes(FetchError):
    """The encoded image is larger than `--max-image-bytes`."""

    code = "too_many_bytes"


class TooManyRedirects(FetchError):
    """The server redirected too many times."""

    code = "too_many_redirects"


class EmptyImage(FetchError):
    """The image has 0 bytes."""

    code = "empty_image"


class UnsupportedEncoding(FetchError):
    """The server encoded the image in a way that cannot be decoded here, such as `br` without the extra `codings`."""

    code = "unsupported_encoding"


class OptedOut(FetchError):
    """The server opts the image out of use for AI (`X-Robots-Tag: noai`), and `--ignore-opt-out` is not set."""

    code = "opted_out"


class NotAnImage(PrepareError):
    """The data is not an image of a supported format. The message says what it looks like, such as HTML."""

    code = "not_an_image"


class TruncatedImage(PrepareError):
    """The image data ends too early."""

    code = "truncated_image"


class CorruptImage(PrepareError):
    """The image data cannot be decoded."""

    code = "corrupt_image"


class TooManyPixels(PrepareError):
    """The image has more pixels than `--max-image-pixels`, according to its header."""

    code = "too_many_pixels"


class TooManyImages(PrepareError):
    """The row has more images than `--max-images` or the engine allows."""

    code = "too_many_images"


class PrepareTimeout(PrepareError):
    """Decoding and preparing the row's images took longer than `--prepare-timeout`."""

    code = "prepare_timeout"


class PrepareCrashed(PrepareError):
    """An image worker crashed twice on this row: out of memory, or a bug in a decoder."""

    code = "prepare_crashed"


class PrepareFailed(PrepareError):
    """The model's image processor raised an error, which the message quotes."""

    code = "prepare_failed"


class TooLarge(PrepareError):
    """The row's images do not fit into the arena (`--arena-bytes`)."""

    code = "too_large"


class ContextLengthExceeded(InferError):
    """Prompt, images and previous turns have more tokens than the model's context length."""

    code = "context_length_exceeded"


class RequestRefused(InferError):
    """The engine rejected the request as invalid; the message quotes it."""

    code = "request_refused"


class EngineError(InferError):
    """The engine reported an error for this row, which the message quotes."""

    code = "engine_error"
    retryable = True


class EngineCrashed(InferError):
    """The engine crashed on this row twice, the second time with no other row in it."""

    code = "engine_crashed"


class RowTimeout(InferError):
    """The row was in the engine for longer than `--row-timeout`."""

    code = "row_timeout"
    retryable = True


class Unsupported(InferError):
    """The engine does not support a setting of this row."""

    code = "unsupported"


class GaveUpWaiting(InferError):
    """The row waited for a retry when the engine had been idle for `--max-idle-gpu`."""

    code = "gave_up_waiting"
    retryable = True


def row_errors() -> Iterator[type[RowError]]:
    """Yield every leaf class of `RowError`, in the order of the stages.

    >>> [error.code for error in row_errors()][:2]
    ['invalid_row', 'missing_prompt']
    """
    for stage in RowError.__subclasses__():
        yield from stage.__subclasses__()


RENAMED_CODES = {
    "corrupt_picture": CorruptImage.code,
    "empty_picture": EmptyImage.code,
    "not_a_picture": NotAnImage.code,
    "too_many_pictures": TooManyImages.code,
    "truncated_picture": TruncatedImage.code,
}
"""Error codes of version 0.1, which its outputs still contain, and their present spellings."""


def current_code(code: str) -> str:
    """Return the present spelling of an error code.

    >>> current_code("corrupt_picture"), current_code("missing_file")
    ('corrupt_image', 'missing_file')
    """
    return RENAMED_CODES.get(code, code)
