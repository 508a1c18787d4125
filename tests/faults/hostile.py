"""What a decoder may do over a hostile file, for child processes to run; and files, changed at random."""

import os
import signal
import time
from collections.abc import Iterator

import numpy as np

from vidjoint.data import examples
from vidjoint.data.decode import DecodeError

HARM = {"4.mp4": "crash", "5.mp4": "hang", "7.mp4": "eat"}


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    time.sleep(1000)


def spin() -> None:
    while True:
        pass


def eat() -> None:
    held = []
    while True:
        held.append(np.empty(1 << 24, np.uint8))


def crash_once(mark: str) -> np.ndarray:
    if not os.path.exists(mark):
        open(mark, "x").close()
        crash()
    return np.arange(10)


def echo(value: object) -> object:
    return value


def address_space() -> int:
    """How much this process takes now, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def most_memory() -> int:
    """The most that this process has held in memory, in bytes."""
    with open("/proc/self/status") as file:
        return int(file.read().split("VmHWM:")[1].split()[0]) << 10


def refuse() -> None:
    raise DecodeError("no video")


def fail() -> None:
    raise ZeroDivisionError("a bug")


def training_clip(example: dict, spec: bytes, state: dict) -> np.ndarray:
    """Decodes, but for three files, over which it does what HARM says."""
    if harm := HARM.get(os.path.basename(example["video"])):
        globals()[harm]()
    return examples._training_clip(example, spec, state)


def mutations(content: bytes, count: int, seed: int, edges: int = 3000) -> Iterator[bytes]:
    """Copies of a file with bits flipped anywhere, its end missing, or fields of its head and tail set to extremes, where containers keep sizes."""
    random = np.random.default_rng(seed)
    for number in range(count):
        copy = np.frombuffer(content, np.uint8).copy()
        if number % 3 == 0:
            places = random.integers(len(copy), size=random.integers(1, 60))
            copy[places] ^= (1 << random.integers(8, size=len(places))).astype(np.uint8)
        elif number % 3 == 1:
            copy = copy[: random.integers(len(copy))]
        else:
            for _ in range(random.integers(1, 6)):
                start = int(random.integers(min(edges, len(copy))))
                start = start if random.integers(2) else max(0, len(copy) - 1 - start)
                value = random.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x00FFFFFF, int(random.integers(2**32))])
                field = np.frombuffer(int(value).to_bytes(4, "big"), np.uint8)
                copy[start : start + 4] = field[: len(copy[start : start + 4])]
        yield copy.tobytes()
