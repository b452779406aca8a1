"""What every command shares: exit codes, errors as messages, text that is safe to show."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import typer

USAGE, FAILED, INTERRUPTED = 2, 1, 130
_TRACEBACK_VARIABLE = "MIMO_JAX_TRACEBACK"
# Control characters except tab and line feed, which a terminal would obey, as visible pictures.
_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


def printable(text: str) -> str:
    """Text that is safe to show in a terminal: control characters become visible."""
    return text.translate(_PICTURES)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turns expected errors into one message on stderr and an exit code, and Ctrl-C into 130.

    2 says that the command asks for something impossible, 1 that a file or the machine is at fault.
    MIMO_JAX_TRACEBACK=1 shows where an error comes from.
    """
    try:
        yield
        print(end="", flush=True)  # or Python would do it where nobody catches what is wrong
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise  # the reader of stdout has gone: typer ends quietly
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, typer.Exit) or _wants_traceback():
            raise
        message = _message(error)
        if message is None:
            raise
        fail(f"error: {message}", USAGE if _is_usage(error) else FAILED)


def _wants_traceback() -> bool:
    return os.environ.get(_TRACEBACK_VARIABLE, "0") not in ("", "0")


def _is_usage(error: Exception) -> bool:
    """Whether the command is wrong, rather than a file or the machine."""
    from mimo_jax.checkpoint import CheckpointError
    from mimo_jax.config import ConfigError
    from mimo_jax.tokenizer import TokenizerError

    damaged = isinstance(error, CheckpointError | ConfigError | TokenizerError)
    return isinstance(error, FileNotFoundError) or (isinstance(error, ValueError) and not damaged)


def _message(error: Exception) -> str | None:
    """What went wrong, for people; None where that is a mistake in the program."""
    from sharding.memory import lack_of_memory

    if isinstance(error, RuntimeError | MemoryError):
        return lack_of_memory(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def run_program(main: Callable[[], object]) -> None:
    """Runs a program that isn't one of typer's, with the errors and exit codes of the commands."""
    try:
        with readable_errors():
            main()
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        sys.exit(FAILED)


def fail(message: str, code: int) -> None:
    """Ends the command with a message on stderr."""
    print(printable(message), file=sys.stderr)
    raise typer.Exit(code) from None
