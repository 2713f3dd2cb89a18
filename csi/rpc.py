"""The one decorator around every method: failures become gRPC codes here, nowhere else; each call is one log line."""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from csi import failure
from csi.options import printable
from csi.redact import hide_secrets, redacted

log = logging.getLogger(__name__)

CODES: tuple[tuple[type[failure.Failure], grpc.StatusCode], ...] = (
    (failure.BadRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (failure.Unknown, grpc.StatusCode.NOT_FOUND),
    (failure.Conflict, grpc.StatusCode.ALREADY_EXISTS),
    (failure.Busy, grpc.StatusCode.ABORTED),
    (failure.NotAllowedNow, grpc.StatusCode.FAILED_PRECONDITION),
    (failure.Denied, grpc.StatusCode.PERMISSION_DENIED),
    (failure.Unreachable, grpc.StatusCode.UNAVAILABLE),
    (failure.TooSlow, grpc.StatusCode.DEADLINE_EXCEEDED),
    (failure.Full, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (failure.Broken, grpc.StatusCode.INTERNAL),
)
QUIET = frozenset({"Probe", "NodeGetVolumeStats", "GetPluginInfo", "NodeGetCapabilities"})
"""Called every few seconds: logged at debug when they succeed."""

_Request = TypeVar("_Request", bound=Message)
_Answer = TypeVar("_Answer", bound=Message)


def code_of(error: failure.Failure) -> grpc.StatusCode:
    """By the error's class."""
    return next((code for kind, code in CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def rpc(method: Callable[[Any, _Request], _Answer]) -> Callable[[Any, _Request, grpc.ServicerContext], _Answer]:
    """For methods (self, request) of a servicer: adds the context, the codes, the log line. Any other exception is
    our bug: logged by type and place, without its text, which may hold a secret."""

    @functools.wraps(method)
    def wrapper(self: Any, request: _Request, context: grpc.ServicerContext) -> _Answer:
        started_s = time.monotonic()
        try:
            answer = method(self, request)
        except failure.Failure as exc:
            code, text = code_of(exc), hide_secrets(str(exc), request)
        except Exception as exc:
            log.error("%s: %s at %s", method.__name__, type(exc).__name__, _place(exc))
            code, text = grpc.StatusCode.INTERNAL, f"an error in the driver ({type(exc).__name__})"
        else:
            level = logging.DEBUG if method.__name__ in QUIET else logging.INFO
            _log_call(level, method.__name__, request, "OK", started_s)
            return answer
        _log_call(logging.WARNING, method.__name__, request, f"{code.name}: {text}", started_s)
        _abort(context, code, text)

    return wrapper


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("abort() returned")


def _place(exc: BaseException) -> str:
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}" if trace is not None else "?"


def _log_call(level: int, name: str, request: Message, outcome: str, started_s: float) -> None:
    milliseconds = (time.monotonic() - started_s) * 1000
    volume = printable(str(getattr(request, "volume_id", "") or getattr(request, "name", "")))
    log.log(level, "%s volume=%s %s (%.0f ms)", name, volume or "-", outcome, milliseconds)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s %s", name, redacted(request))
