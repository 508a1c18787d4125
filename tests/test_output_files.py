"""What commands write: whole or not at all, and where it may go."""

import os

import pytest

from vidjoint.output_files import check_writable, write_json, write_whole


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.csv"
    write_whole(file, b"old")
    write_whole(str(file), b"new")
    assert file.read_bytes() == b"new"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"newer")
    assert file.read_bytes() == b"new" and [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_json_may_be_a_device_and_no_file_needs_no_right():
    check_writable("/dev/null")
    check_writable(None)
    write_json("/dev/null", {})
