"""Files of torch.save made by hand, without PyTorch, and what a hostile file must end in."""

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vidjoint.errors import UserError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MEMORY = 100 << 20  # bytes by which this process may grow over a small hostile file


def plain(value: object) -> bytes:
    """Instructions that push a number, a string, or a tuple of such."""
    if isinstance(value, tuple):
        return b"(" + b"".join(plain(part) for part in value) + b"t"
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor(kind="FloatStorage", key="0", count=6, offset=0, size=(2, 3), stride=(3, 1), view=b"") -> bytes:
    """Instructions that push a tensor over a storage; `view` is what old files add to the storage."""
    storage = b"(" + plain("storage") + named("torch", kind) + plain(key) + plain("cpu") + plain(count) + view + b"tQ"
    hooks = named("collections", "OrderedDict") + b")R"
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + plain(offset) + plain(size) + plain(stride) + b"\x89" + hooks + b"tR"


def state_dict(**tensors: bytes) -> bytes:
    """A pickle of an OrderedDict."""
    items = b"".join(plain(name) + value for name, value in tensors.items())
    return b"\x80\x02" + named("collections", "OrderedDict") + b")R(" + items + b"u."


def write_zip(path: Path, program: bytes, storages: dict[str, bytes] | None = None, **others: bytes) -> Path:
    """The format since PyTorch 1.6."""
    with zipfile.ZipFile(path, "w") as archive:
        members = {"data.pkl": program} | {f"data/{key}": content for key, content in (storages or {}).items()} | others
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return path


def write_legacy(path: Path, program: bytes, storages: dict[str, np.ndarray] | None = None, little=True) -> Path:
    """The format before PyTorch 1.6."""
    storages = storages or {}
    head = [pickle.dumps(part, 2) for part in (MAGIC, PROTOCOL, {"protocol_version": PROTOCOL, "little_endian": little})]
    raw = [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    path.write_bytes(b"".join([*head, program, pickle.dumps(list(storages), 2), *raw]))
    return path


def most_memory(reset: bool = False) -> int:
    """The most bytes that this process has held, ever or since the last reset; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@contextmanager
def refused(path: Path, *words: str):
    """The block raises a UserError of one line, which names the file and has all the words; memory stays flat."""
    before = most_memory(reset=True)
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert len(caught.value.lines) == 1 and message.isprintable() and str(path) in message and len(message) < len(str(path)) + 400, message
    assert all(word in message for word in words), message
    assert most_memory() - before < MEMORY


def mutations(content: bytes, count: int, seed: int) -> Iterable[bytes]:
    """Copies of a file with bytes changed, cut out, doubled, or missing from some place on."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        copy = bytearray(content)
        for _ in range(random.integers(1, 5)):
            place, length = int(random.integers(len(copy))), int(random.integers(1, 9))
            match random.integers(6):
                case 0:
                    copy[place] ^= 1 << random.integers(8)
                case 1:
                    copy[place : place + length] = random.bytes(length)
                case 2:
                    copy[place : place + length] = b"\xff" * length
                case 3:
                    del copy[place : place + length]
                case 4:
                    copy[place:place] = copy[max(place - length, 0) : place + length]
                case 5 if random.integers(3) == 0:
                    del copy[place:]
            if not copy:
                break
        yield bytes(copy)


def survives(read: Callable[[Path], object], path: Path, content: bytes, seed: int, count: int = 300) -> None:
    """Each mutation of the file is read or refused in one line; no other exception, and not all of them refused."""
    outcomes = set()
    for number, mutated in enumerate(mutations(content, count, seed)):
        path.write_bytes(mutated)
        try:
            outcomes.add(type(read(path)))
        except UserError as error:
            assert len(error.lines) == 1 and str(error).isprintable(), number
            outcomes.add(UserError)
    assert UserError in outcomes and len(outcomes) > 1
