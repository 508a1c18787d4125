"""Written files and lists, opened as sources: what the tests of lists and of sources share."""

import os

import pytest

from vidjoint.config import task_config
from vidjoint.data.records import Source
from vidjoint.data.sources import open_source
from vidjoint.errors import UserError


def touch(root, *names):
    """Makes files whose content is their own name: sources never decode."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def opened(data_root, split="train", **changes) -> Source:
    return open_source("t", task_config(**changes), split, str(data_root))


def pairs(source):
    return [(os.path.basename(os.fsdecode(source[i][source.media])), source[i]["label"]) for i in range(len(source))]


def faults(data_root, split="train", **changes):
    with pytest.raises(UserError) as error:
        opened(data_root, split, **changes)
    assert all(line.startswith(f"task t, {split}: ") and "\n" not in line for line in error.value.lines)
    return [line.removeprefix(f"task t, {split}: ") for line in error.value.lines]
