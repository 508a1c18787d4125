"""Errors that are the user's to mend, and how commands show them."""

import argparse
import functools
import os
import select
import sys
import unicodedata
from collections.abc import Callable
from typing import TextIO

STDOUT = 1  # file descriptor


class UserError(Exception):
    """Something the user can put right. Commands print it without a traceback and exit with status 2.

    Holds one line or several: each says what is wrong and what to do about it.
    """

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


def printable(text: str, stream: TextIO | None = None) -> str:
    """One line of text as it may go to `stream` (standard output): names in files of others may hold anything.

    Escaped is what would break the line, act on a terminal or mislead who reads it (control characters, marks that turn the direction of writing),
    and what the stream's encoding lacks, such as bytes of file names that are no UTF-8.
    """
    shown = "".join(char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode() for char in text)
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


class Paragraphs(argparse.HelpFormatter):
    """Fills the texts of a command's help as wide as the terminal is, and leaves empty lines between their paragraphs."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(Paragraphs, self)._fill_text(part, width, indent) for part in text.strip().split("\n\n"))


def command(main: Callable) -> Callable:
    """Decorates `main(argv) -> exit status`: user errors become lines on standard error and status 2, Ctrl-C status 130.

    Where the reader of standard output has gone (`| head -1`), the command ends quietly with status 141, as SIGPIPE would end it.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            status = main(sys.argv[1:] if argv is None else argv) or 0
            print(end="", flush=True)  # a reader that has gone shows here, not after the exit
            return status
        except UserError as error:
            for line in error.lines:
                print(printable(line if line.startswith(" ") else f"error: {line}", sys.stderr), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            if not reader_has_gone():
                raise  # another pipe broke, a worker's perhaps: that is a fault
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, STDOUT)  # takes what the interpreter still flushes when it exits
            os.close(nowhere)
            return 141

    return run
