"""Mutated weight files of every kind: each is read or refused in one line, nothing in it runs, memory stays flat. `--full`: 200."""

import time
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.weights.hand_made import most_memory, mutations, named, plain, state_dict, tensor, write_legacy, write_zip
from tests.weights.small import write_foreign
from vidjoint.errors import UserError
from vidjoint.weights.__main__ import main
from vidjoint.weights.files import read_arrays

SECONDS, MEMORY = 10, 200 << 20  # of a file; bytes by which the process may grow


@pytest.fixture
def files(tmp_path) -> list:
    """One of each kind, and a folder as Hugging Face's library leaves it."""
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.float16), "c": np.array([True, False])}
    save_file(arrays, tmp_path / "a.safetensors")
    np.savez(tmp_path / "stored.npz", **arrays)
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    settings = named("argparse", "Namespace") + b")\x81}" + plain("lr") + plain(0.1) + b"sb"
    program = state_dict(a=tensor(), b=tensor(offset=5, size=(), stride=()), args=settings, text=plain("x"))
    six = np.arange(6, dtype=np.float32)
    write_zip(tmp_path / "new.pth", program, {"0": six.tobytes()})
    write_legacy(tmp_path / "old.pth", program, {"0": six})
    folder = write_foreign(tmp_path / "vit")
    return [*(tmp_path / name for name in ("a.safetensors", "stored.npz", "packed.npz", "new.pth", "old.pth")), *sorted(folder.iterdir())]


@pytest.mark.timeout(3600)
def test_mutated_weight_files(files, full, capsys):
    outcomes, slowest, before = Counter(), 0.0, most_memory(reset=True)
    each = -(-(200 if full else 42) // len(files))
    for number, path in enumerate(files):
        content = path.read_bytes()
        of_folder = path.parent.name == "vit"
        for copy in mutations(content, each, seed=number):
            path.write_bytes(copy)
            start = time.monotonic()
            try:
                if of_folder:
                    status = main(["inspect", str(path.parent)])
                    shown = capsys.readouterr()
                    outcomes["refused" if status else "read"] += 1
                    assert status in (0, 2) and (status == 0 or shown.err.startswith("error: ")) and shown.err.count("\n") < 30
                else:
                    read_arrays(path)
                    outcomes["read"] += 1
            except UserError as error:
                outcomes["refused"] += 1
                assert len(error.lines) == 1 and str(error).isprintable() and str(path) in str(error)
            slowest = max(slowest, time.monotonic() - start)
        path.write_bytes(content)
        assert main(["inspect", str(path.parent)]) == 0 if of_folder else read_arrays(path)  # the good file beside it
    capsys.readouterr()
    grown = most_memory() - before
    assert outcomes["read"] and outcomes["refused"] and slowest < SECONDS and grown < MEMORY
    with capsys.disabled():
        print(f"\nweights: {outcomes['read']} read, {outcomes['refused']} refused in a line, slowest {slowest:.2f} s, {grown >> 20} MiB more memory")
