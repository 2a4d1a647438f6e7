"""The errors that cross the wire: one gRPC code and one documented reason each.

QuantplaneError
├── InvalidRequest       INVALID_ARGUMENT    INVALID_FIELD, with every violation
├── InvalidResumeToken   INVALID_ARGUMENT    INVALID_RESUME_TOKEN
├── InvalidPageToken     INVALID_ARGUMENT    INVALID_PAGE_TOKEN
├── OutOfOrder           INVALID_ARGUMENT    OUT_OF_ORDER
├── Compacted            OUT_OF_RANGE        COMPACTED
├── UnknownSymbol        NOT_FOUND           UNKNOWN_SYMBOL
├── UnknownSignal        NOT_FOUND           UNKNOWN_SIGNAL
├── UnknownOrder         NOT_FOUND           UNKNOWN_ORDER
├── UnknownExecution     NOT_FOUND           UNKNOWN_EXECUTION
├── UnknownStrategy      NOT_FOUND           UNKNOWN_STRATEGY
├── UnknownConfiguration NOT_FOUND           UNKNOWN_CONFIGURATION
├── UnknownUser          NOT_FOUND           UNKNOWN_USER
├── UnknownKey           NOT_FOUND           UNKNOWN_KEY
├── KeyReused            ALREADY_EXISTS      IDEMPOTENCY_KEY_REUSED
├── EmailTaken           ALREADY_EXISTS      EMAIL_TAKEN
├── OrderTerminal        FAILED_PRECONDITION ORDER_TERMINAL
├── IllegalTransition    FAILED_PRECONDITION ILLEGAL_TRANSITION
├── RiskLimit            FAILED_PRECONDITION RISK_LIMIT
├── SignalMismatch       FAILED_PRECONDITION SIGNAL_MISMATCH
├── LastAdmin            FAILED_PRECONDITION LAST_ADMIN
├── ExecutionMismatch    INVALID_ARGUMENT    EXECUTION_MISMATCH
├── VersionMismatch      ABORTED             VERSION_MISMATCH
├── EtagMismatch         ABORTED             ETAG_MISMATCH
├── FeedReplaced         ABORTED             FEED_REPLACED
├── TooManyStreams       RESOURCE_EXHAUSTED  TOO_MANY_STREAMS
├── ResultTooLarge       RESOURCE_EXHAUSTED  RESULT_TOO_LARGE
├── Overloaded           RESOURCE_EXHAUSTED  OVERLOADED
├── LoginLocked          RESOURCE_EXHAUSTED  LOGIN_LOCKED
├── Draining             UNAVAILABLE         DRAINING
├── RateLimited          RESOURCE_EXHAUSTED  RATE_LIMITED
├── Unauthenticated      UNAUTHENTICATED     UNAUTHENTICATED
├── PermissionDenied     PERMISSION_DENIED   PERMISSION_DENIED
├── BackendUnavailable   UNAVAILABLE         BACKEND_UNAVAILABLE
└── InternalError        INTERNAL            INTERNAL

The reasons are documented, with cause and cure, in protos/quantplane/v1/errors.proto.
"""

from collections.abc import Sequence
from math import ceil

from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import StatusCode

from quantplane import v1 as pb

DOMAIN = "quantplane"

Violation = tuple[str, str]  # field, rule


class QuantplaneError(Exception):
    """An error whose text is meant for the caller."""

    code: StatusCode
    reason: "pb.ErrorReason.ValueType"

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.metadata = {key: str(value) for key, value in metadata.items()}

    @property
    def reason_name(self) -> str:
        return pb.ErrorReason.Name(self.reason).removeprefix("ERROR_REASON_")

    def details(self) -> list[any_pb2.Any]:
        """Return the google.rpc details, the ErrorInfo first."""
        info = error_details_pb2.ErrorInfo(
            reason=self.reason_name, domain=DOMAIN, metadata=self.metadata
        )
        return [_packed(info)]

    def status(self) -> status_pb2.Status:
        """Return this error as google.rpc.Status."""
        number = code_pb2.Code.Value(self.code.name)
        return status_pb2.Status(code=number, message=str(self), details=self.details())


class InvalidRequest(QuantplaneError):
    """Fields of a request break their documented rules."""

    code = StatusCode.INVALID_ARGUMENT
    reason = pb.ERROR_REASON_INVALID_FIELD

    SHOWN = 50  # violations listed at most: the answer must stay a small message

    def __init__(self, violations: Sequence[Violation], **metadata: object) -> None:
        self.violations = violations[: self.SHOWN]
        text = "; ".join(f"{field}: {rule}" for field, rule in self.violations[:5])
        more = len(violations) - 5
        super().__init__(text + (f"; and {more} more" if more > 0 else ""), **metadata)

    def details(self) -> list[any_pb2.Any]:
        request = error_details_pb2.BadRequest()
        for field, rule in self.violations:
            request.field_violations.add(field=field, description=rule)
        return [*super().details(), _packed(request)]


class InvalidResumeToken(QuantplaneError):
    code = StatusCode.INVALID_ARGUMENT
    reason = pb.ERROR_REASON_INVALID_RESUME_TOKEN

    def __init__(self) -> None:
        super().__init__(
            "resume_token: damaged, or made for another request; "
            "subscribe without it and read the past with start_time"
        )


class InvalidPageToken(QuantplaneError):
    code = StatusCode.INVALID_ARGUMENT
    reason = pb.ERROR_REASON_INVALID_PAGE_TOKEN

    def __init__(self) -> None:
        super().__init__(
            "page_token: damaged, or made for another query; ask for the first page"
        )


class OutOfOrder(QuantplaneError):
    """A stream's messages came in an order that has no meaning."""

    code = StatusCode.INVALID_ARGUMENT
    reason = pb.ERROR_REASON_OUT_OF_ORDER


class Compacted(QuantplaneError):
    """What a reader asks for is no longer kept."""

    code = StatusCode.OUT_OF_RANGE
    reason = pb.ERROR_REASON_COMPACTED

    def __init__(self, cause: "pb.GapCause.ValueType", **metadata: object) -> None:
        self.cause = cause
        super().__init__(
            "what follows the resume token is no longer kept; subscribe without it "
            "and read the past by other calls",
            cause=pb.GapCause.Name(cause).removeprefix("GAP_CAUSE_"),
            **metadata,
        )


class UnknownSymbol(QuantplaneError):
    code = StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_UNKNOWN_SYMBOL

    def __init__(self, symbol: str, hint: str) -> None:
        super().__init__(f"nothing is recorded under {symbol!r}; {hint}", symbol=symbol)


class UnknownSignal(QuantplaneError):
    code = StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_UNKNOWN_SIGNAL

    def __init__(self, signal_id: str) -> None:
        super().__init__(f"there is no signal {signal_id}", signal_id=signal_id)


class UnknownOrder(QuantplaneError):
    code = StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_UNKNOWN_ORDER

    def __init__(self, name: str, **metadata: str) -> None:
        super().__init__(f"there is no order {name}", **metadata)


class UnknownExecution(QuantplaneError):
    code = StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_UNKNOWN_EXECUTION

    def __init__(self, broker_exec_id: str) -> None:
        super().__init__(
            f"the order has no execution {broker_exec_id!r}; report the fill first",
            broker_exec_id=broker_exec_id,
        )


class UnknownStrategy(QuantplaneError):
    code = StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_UNKNOWN_STRATEGY

    def __init__(self, strategy_id: str) -> None:
        super().__init__(
            f"there is no strategy {strategy_id!r}", strategy_id=strategy_id
        )


class UnknownConfiguration(QuantplaneError):
    code = StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_UNKNOWN_CONFIGURATION

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is not set", key=key)


class UnknownUser(QuantplaneError):
    code = StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_UNKNOWN_USER

    def __init__(self, username: str) -> None:
        super().__init__(f"there is no user {username!r}", username=username)


class UnknownKey(QuantplaneError):
    code = StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_UNKNOWN_KEY

    def __init__(self, key_id: str) -> None:
        super().__init__(f"there is no API key {key_id}", key_id=key_id)


class EmailTaken(QuantplaneError):
    code = StatusCode.ALREADY_EXISTS
    reason = pb.ERROR_REASON_EMAIL_TAKEN

    def __init__(self, email: str) -> None:
        super().__init__(f"another user has the address {email!r}", email=email)


class LastAdmin(QuantplaneError):
    code = StatusCode.FAILED_PRECONDITION
    reason = pb.ERROR_REASON_LAST_ADMIN

    def __init__(self) -> None:
        super().__init__(
            "nobody who may do everything would be left; "
            "let another user have such a role first"
        )


class KeyReused(QuantplaneError):
    """A key came again with another body."""

    code = StatusCode.ALREADY_EXISTS
    reason = pb.ERROR_REASON_IDEMPOTENCY_KEY_REUSED

    def __init__(self, field: str, key: str) -> None:
        super().__init__(
            f"{field} {key!r} was used for a request that differs; "
            "use a new one for a new request",
            key=key,
        )


class OrderTerminal(QuantplaneError):
    """An order that is over does not change."""

    code = StatusCode.FAILED_PRECONDITION
    reason = pb.ERROR_REASON_ORDER_TERMINAL

    def __init__(self, status: str, event: str) -> None:
        super().__init__(
            f"the order is {status} and can't take {event}: it is over",
            status=status,
            event=event,
        )


class IllegalTransition(QuantplaneError):
    """Something was asked that does not fit the state."""

    code = StatusCode.FAILED_PRECONDITION
    reason = pb.ERROR_REASON_ILLEGAL_TRANSITION


class VersionMismatch(QuantplaneError):
    code = StatusCode.ABORTED
    reason = pb.ERROR_REASON_VERSION_MISMATCH

    def __init__(self, version: int) -> None:
        super().__init__(
            f"the order is at version {version} now; read it again", version=version
        )


class EtagMismatch(QuantplaneError):
    """What was to be changed is not as the caller has read it."""

    code = StatusCode.ABORTED
    reason = pb.ERROR_REASON_ETAG_MISMATCH

    def __init__(self, name: str, etag: str) -> None:
        super().__init__(f"{name} has changed since; read it again", etag=etag)


class RiskLimit(QuantplaneError):
    """An order would break a limit of its strategy."""

    code = StatusCode.FAILED_PRECONDITION
    reason = pb.ERROR_REASON_RISK_LIMIT


class SignalMismatch(QuantplaneError):
    """An order and the signal that it names do not go together."""

    code = StatusCode.FAILED_PRECONDITION
    reason = pb.ERROR_REASON_SIGNAL_MISMATCH


class ExecutionMismatch(QuantplaneError):
    """An execution is not of the order that it names."""

    code = StatusCode.INVALID_ARGUMENT
    reason = pb.ERROR_REASON_EXECUTION_MISMATCH


class FeedReplaced(QuantplaneError):
    code = StatusCode.ABORTED
    reason = pb.ERROR_REASON_FEED_REPLACED

    def __init__(self, feed: str) -> None:
        super().__init__(
            f"a newer connection publishes as feed {feed!r}; "
            "give every feed a name of its own",
            feed=feed,
        )


class TooManyStreams(QuantplaneError):
    code = StatusCode.RESOURCE_EXHAUSTED
    reason = pb.ERROR_REASON_TOO_MANY_STREAMS

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"this server already holds {limit} streams, its limit; "
            "close some, or use another server",
            limit=limit,
        )


class ResultTooLarge(QuantplaneError):
    code = StatusCode.RESOURCE_EXHAUSTED
    reason = pb.ERROR_REASON_RESULT_TOO_LARGE

    def __init__(self, limit: int, what: str) -> None:
        super().__init__(
            f"the answer has more than {limit:,} {what}; narrow the request",
            limit=limit,
        )


class Overloaded(QuantplaneError):
    code = StatusCode.RESOURCE_EXHAUSTED
    reason = pb.ERROR_REASON_OVERLOADED

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit:,} commands wait already, as many as the server holds; "
            "retry with back-off",
            limit=limit,
        )


class LoginLocked(QuantplaneError):
    code = StatusCode.RESOURCE_EXHAUSTED
    reason = pb.ERROR_REASON_LOGIN_LOCKED

    def __init__(self, retry_s: float) -> None:
        super().__init__(f"too many logins have failed; wait {retry_s:.3g} s")
        self._retry_s = retry_s

    def details(self) -> list[any_pb2.Any]:
        return [*super().details(), _retry_after(self._retry_s)]


class RateLimited(QuantplaneError):
    """A caller makes more calls, or more wrong ones, than are allowed."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = pb.ERROR_REASON_RATE_LIMITED

    def __init__(self, limit: int, what: str, retry_s: float) -> None:
        super().__init__(
            f"more than {limit:,} {what}; wait {retry_s:.3g} s", limit=limit
        )
        self._retry_s = retry_s

    def details(self) -> list[any_pb2.Any]:
        return [*super().details(), _retry_after(self._retry_s)]


class Unauthenticated(QuantplaneError):
    """A call has no good credential; whatever is wrong with it is told alike."""

    code = StatusCode.UNAUTHENTICATED
    reason = pb.ERROR_REASON_UNAUTHENTICATED

    def __init__(self) -> None:
        super().__init__(
            "the call has no credential, or one that is not, or no longer, good; "
            "log in, or send another API key"
        )


class PermissionDenied(QuantplaneError):
    """The caller is known, and may not do it."""

    code = StatusCode.PERMISSION_DENIED
    reason = pb.ERROR_REASON_PERMISSION_DENIED


class Draining(QuantplaneError):
    code = StatusCode.UNAVAILABLE
    reason = pb.ERROR_REASON_DRAINING

    def __init__(self) -> None:
        super().__init__("the server is stopping; reconnect")


class BackendUnavailable(QuantplaneError):
    """The database or the bus is away."""

    code = StatusCode.UNAVAILABLE
    reason = pb.ERROR_REASON_BACKEND_UNAVAILABLE

    def __init__(self) -> None:
        super().__init__("the database or the bus can't be reached now; retry")


class InternalError(QuantplaneError):
    code = StatusCode.INTERNAL
    reason = pb.ERROR_REASON_INTERNAL

    def __init__(self) -> None:
        super().__init__("internal error; the server's log has the details")


def _retry_after(seconds: float) -> any_pb2.Any:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(ceil(seconds * 1_000))
    return _packed(info)


def _packed(message: Message) -> any_pb2.Any:
    detail = any_pb2.Any()
    detail.Pack(message)
    return detail
