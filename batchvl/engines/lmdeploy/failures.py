"""LMDeploy's errors in ours."""

from __future__ import annotations

from ...errors import (
    ContextLengthExceeded,
    EngineError,
    EngineLost,
    InferError,
    PrepareFailed,
    RequestRefused,
    RowError,
    Unsupported,
)
from ..checkpoint import first_line

FAILURES: dict[str, type[RowError]] = {
    "invalid_request": RequestRefused,
    "context_length_exceeded": ContextLengthExceeded,
    "unsupported_feature": Unsupported,
    "preprocess_failed": PrepareFailed,
    "request_conflict": EngineError,
    "request_cancelled": EngineError,
    "internal_error": EngineError,
    "unauthorized": EngineError,  # this one and the next are of its server alone
    "model_not_found": EngineError,
}
"""By `ErrorCode` of lmdeploy.serve.core. What is missing here, `engine_unavailable`, is no row's failure."""


def failure(code: str, message: str, cause: BaseException | None) -> RowError:
    """The row's failure that an error of LMDeploy stands for. Raises EngineLost where it is the engine's end.

    code: an `ErrorCode`'s value. cause: what LMDeploy keeps to its log.
    """
    said = message if cause is None else f"{message} ({type(cause).__name__}: {first_line(cause)})"
    if code == "engine_unavailable":
        raise EngineLost(f"LMDeploy's engine is gone: {said}")
    return FAILURES.get(code, EngineError)(f"LMDeploy, {code}: {said}")


def ended(reason: str | None) -> InferError:
    """The failure of an answer that ended as none does that was given in full: "abort", "error" or for no reason."""
    return EngineError(f"LMDeploy ended the answer early ({reason or 'it gives no reason'})")
