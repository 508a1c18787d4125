"""Errors that are the user's to mend, and how commands show them."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right. Commands print it without a traceback and exit with status 2.

    Holds one line or several: each says what is wrong and what to do about it.
    """

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


def command(main: Callable) -> Callable:
    """Decorates `main(argv) -> exit status`: user errors become lines on standard error and status 2, Ctrl-C status 130."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        except UserError as error:
            for line in error.lines:
                print(line if line.startswith(" ") else f"error: {line}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
