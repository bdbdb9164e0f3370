"""Starts a program of the command line: Ctrl-C, and an output that takes nothing more, end it with one sentence.

A module of its own, as importing `lesa_kernels` imports torch, which takes seconds in which users press Ctrl-C too.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main() -> None:
    """Run `lesa`."""

    def load() -> Callable[[], object]:
        from lesa_kernels.cli import app

        return app

    run(load)


def run(load: Callable[[], Callable[[], object]]) -> None:
    """Load a program, and run it to its end.

    Ctrl-C ends it with the exit code 130, and an output that cannot be written with 1; a reader that went away, as
    `head` does, needs no words.

    Args:
        load: imports what the program needs and returns it.
    """
    _open_missing()
    with loading():
        program = load()
    try:
        with interruptible("Interrupted."):
            program()
    except OSError as error:
        if not is_of_output(error):
            raise
        give_up_output(error)
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        # What is left is to end the process.
        signal.signal(signal.SIGINT, _end)


@contextmanager
def loading() -> Generator[None, None, None]:
    """Let Ctrl-C end the process at once: an import that is broken off raises anything."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        # Somebody, such as nohup or a shell that runs it in the background, takes care of it.
        yield
        return
    signal.signal(signal.SIGINT, _end)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def interruptible(sentence: str) -> Generator[None, None, None]:
    """Let Ctrl-C end the program with a sentence of its own."""
    try:
        yield
    except KeyboardInterrupt:
        tell(sentence)
        sys.exit(INTERRUPTED)


def is_of_output(error: OSError) -> bool:
    """Whether an error comes from writing to the standard output, which has no name, rather than to a file."""
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF)


def give_up_output(error: OSError) -> None:
    """Say why the output cannot be written, and end the program; what is buffered is dropped."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno != errno.EPIPE:
        tell(f"The output cannot be written: {os.strerror(error.errno or errno.EIO)}.")
    sys.exit(1)


def tell(text: str) -> None:
    """Write a sentence to the standard error, if it takes it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _end(number: int, frame: FrameType | None) -> None:
    """End the process at once."""
    tell("Interrupted.")
    os._exit(INTERRUPTED)


def _open_missing() -> None:
    """Open the standard streams that are closed: a file that takes the place of one would get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - it stays open
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
