"""What every command shares: exit codes, errors as messages, text that is safe to show."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

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
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise  # the reader of stdout has gone: typer ends quietly
    except (ValueError, OSError) as error:
        from mimo_jax.checkpoint import CheckpointError
        from mimo_jax.config import ConfigError

        if os.environ.get(_TRACEBACK_VARIABLE, "0") not in ("", "0"):
            raise
        theirs = isinstance(error, ValueError | FileNotFoundError)
        damaged = isinstance(error, CheckpointError | ConfigError)
        fail(f"error: {error}", USAGE if theirs and not damaged else FAILED)


def fail(message: str, code: int) -> None:
    """Ends the command with a message on stderr."""
    print(printable(message), file=sys.stderr)
    raise typer.Exit(code) from None
