"""Files that commands write: each whole or not at all, and results as JSON where the user wants them."""

import contextlib
import json
import os
from pathlib import Path

from vidjoint.errors import UserError

UNFINISHED = ".unfinished-"  # begins the names of files that are being written


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file so that it is seen either whole or not at all, also after a power cut. Raises OSError."""
    path = Path(path)
    beside = path.with_name(UNFINISHED + path.name)
    try:
        with open(beside, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def check_writable(file: str | None) -> None:
    """Finds out before the work whether its results can be written to `file` (None: nowhere). Raises UserError if not."""
    if file and (os.path.isdir(file) or not os.access(file if os.path.exists(file) else os.path.dirname(os.path.abspath(file)), os.W_OK)):
        raise UserError(f"--json={file} can't be written: name a file in a folder that exists and is yours")


def write_json(file: str | None, content: dict) -> None:
    """Writes results to `file` (None: nowhere). Raises UserError if that fails."""
    try:
        if file:
            Path(file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json={file} can't be written: {error.strerror}") from None
