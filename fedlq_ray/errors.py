"""The errors of this package. Each states where it occurred, the rule, the value and the remedy, and can be pickled."""


class FedLQError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(FedLQError):
    """The user's input is wrong: a configuration, data, profiles or an import path. The exit code is 2."""


class PayloadError(FedLQError):
    """The bytes are not a well-formed payload of this program."""


class CheckpointError(FedLQError):
    """A checkpoint cannot be written, read or used. The exit code is 1."""


class ClientError(FedLQError):
    """A client's round failed. The exit code is 1.

    Args:
        message: the problem and its remedy.
        round: the round, from 0.
        client: the client's number, from 0.
    """

    def __init__(self, message: str, *, round: int, client: int) -> None:
        super().__init__(message, round, client)
        self.message, self.round, self.client = message, round, client

    def __str__(self) -> str:
        return f"round {self.round}, client {self.client}: {self.message}"

    def __reduce__(self) -> tuple[object, ...]:
        return _client_error, (type(self), self.message, self.round, self.client)


def _client_error(kind: type[ClientError], message: str, round: int, client: int) -> ClientError:
    return kind(message, round=round, client=client)


class DivergedError(ClientError):
    """A client's training produced non-finite numbers; the cause is its settings, not the machine."""


def first_line(exc: BaseException) -> str:
    """Returns the first line of an exception's message, plus the next if it ends in a colon; else the type's name."""
    try:
        lines = [line.strip() for line in str(exc).splitlines()]
    except Exception:  # a broken __str__
        lines = []
    told = ""
    for line in filter(None, lines):
        told = f"{told} {line}".strip()
        if not told.endswith(":"):
            break
    return told.rstrip(": ") or type(exc).__name__
