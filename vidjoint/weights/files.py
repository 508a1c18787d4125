"""Weight files of other projects as NumPy arrays: safetensors (also in parts), .npz and PyTorch's files. Nothing in them is executed.

Sizes, offsets and shapes are compared with the file's real size before memory is taken; everything wrong with a file is one line that names it.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vidjoint.data.archives import FREE_RATIO, MOST_RATIO
from vidjoint.errors import UserError
from vidjoint.weights.mapped import MOST_ENTRIES, BadFile, Mapped, array_at, count_elements, map_file, reading, shown, unpack, zip_members
from vidjoint.weights.torch_file import BFLOAT16, read_torch, tensors_of

TORCH = (".pth", ".pyth", ".pt", ".bin", ".ckpt", ".th")
PART = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")
INDEX = ".safetensors.index.json"
# What a folder's weights are called, as the libraries write them, likelier names first; each line is searched only if those before have nothing
FOLDER_NAMES = (
    ("model.safetensors", f"model{INDEX}", "open_clip_model.safetensors"),
    ("*.safetensors", f"*{INDEX}"),
    ("pytorch_model.bin", "open_clip_pytorch_model.bin"),
    ("*.npz", *(f"*{suffix}" for suffix in TORCH)),
)
SIDECARS = {"config": "config.json", "preprocessor": "preprocessor_config.json"}
OF_ITS_FOLDER = ("model.safetensors", f"model{INDEX}", "pytorch_model.bin")  # weights that the JSON files beside them belong to

MOST_JSON = 16 << 20  # bytes of a JSON file, or of the header of a safetensors file
MOST_UNPACKED = 64 << 30  # bytes of all arrays of an .npz

SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16, "I64": np.dtype("<i8"), "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
# NumPy does not know bfloat16 and stores it as two bytes without a meaning; big_vision's files hold such arrays
NPY_DTYPES = {np.dtype(code).str: np.dtype(code) for code in "<f8 <f4 <f2 >f8 >f4 >f2 <i8 <i4 <i2 >i8 >i4 >i2 <u8 <u4 <u2 i1 u1 ?".split()}
NPY_DTYPES |= {"|V2": BFLOAT16, "<V2": BFLOAT16}
NPY_HEADER = re.compile(r"\{'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \(((?:\d{1,15}L?, ?)*(?:\d{1,15}L?)?)\),? ?\}\s*")


def read_arrays(path: Path, report: Callable[[str], None] = lambda line: None) -> dict[str, np.ndarray]:
    """Reads the weights at `path`: a file, the index of a set of safetensors, or a folder with one of them (see `find_weights`).

    Returns name -> array, names and order as in the file, of the type that is stored: float16, bfloat16 (ml_dtypes), float32 or float64, integers and
    bools too. Most arrays are views of the file's bytes, which are read as they are used; writing to an array leaves the file as it is.

    Args:
      report: takes a line where a PyTorch file holds more than the weights, saying what was chosen.

    Raises:
      UserError: the file is missing, damaged, of an unknown kind, or holds what is no plain array of numbers.
    """
    path = find_weights(path)
    if path.name.endswith(INDEX):
        return _read_parts(path)
    match path.suffix.lower():
        case ".safetensors":
            if PART.search(path.name):
                raise UserError(f"{path} is one of several parts: give their folder, or the file that ends in {INDEX}")
            return _read_safetensors(path)
        case ".npz":
            return _read_npz(path)
        case suffix if suffix in TORCH or path.name.endswith(".pth.tar"):  # a name in use for what is no tar archive
            return tensors_of(read_torch(path), path, report)
    raise UserError(f"{path} is no weights file by its name: known are .safetensors, {INDEX}, .npz, {', '.join(TORCH)}")


def find_weights(path: Path) -> Path:
    """`path` itself, or where that is a folder the weights in it: of FOLDER_NAMES the first line that has any.

    Raises:
      UserError: it does not exist, or a folder has no weights or several.
    """
    path = Path(path)
    with reading(path):
        if not path.exists():
            raise BadFile("does not exist: give the folder of a run, or weights (docs/weights.md)")
        if not path.is_dir():
            return path
        for patterns in FOLDER_NAMES:
            found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file() and not PART.search(file.name)})
            if len(found) > 1:
                raise BadFile(f"holds several files of weights: {shown(', '.join(file.name for file in found))}: give the one that is meant")
            if found:
                return found[0]
        raise BadFile("holds neither a run (config.json, checkpoints) nor weights (.safetensors, .npz or a file of PyTorch)")


def read_sidecars(path: Path) -> dict[str, dict]:
    """Returns the JSON files that tell what the weights are, {} for one that is absent.

    They are {"config": config.json, "preprocessor": preprocessor_config.json}. Of a folder these are the files in it. Of a file they are those
    beside it if it has the name that Hugging Face's libraries give to a model's only weights; beside another they may belong to another model.

    Raises:
      UserError: a JSON file is damaged, larger than 16 MiB, or holds no object.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent if path.name in OF_ITS_FOLDER else None
    if folder is None:
        return {name: {} for name in SIDECARS}
    return {name: _read_json(folder / file) if (folder / file).exists() else {} for name, file in SIDECARS.items()}


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file so that it is seen either whole or not at all. bfloat16 stays bfloat16.

    Args:
      metadata: text for the header; Hugging Face's libraries ask for {"format": "pt"}.

    Raises:
      UserError: the file cannot be written there.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}  # the library writes the memory as it lies
    try:
        part.touch()
        mode = part.stat().st_mode  # the usual one; the library's own file is for its owner alone
        save_file(rows, part, dict(metadata))
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}") from None


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, whose content comes to `path` when the block ends without an error; else nothing of it stays.

    Raises:
      UserError: that cannot be written.
    """
    path = Path(os.path.abspath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield part
            path.mkdir(exist_ok=True)
            for entry in sorted(part.iterdir()):
                if (path / entry.name).is_dir():
                    shutil.rmtree(path / entry.name)
                os.replace(entry, path / entry.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror or error}): give another folder") from error


def check_finite(arrays: Mapping[str, np.ndarray], where: str | Path = "the weights") -> None:
    """Raises UserError if a floating-point array holds NaN or infinity, with the names of the first such arrays.

    Args:
      where: what to call their file.
    """
    bad = [name for name, array in arrays.items() if is_float(array.dtype) and not np.isfinite(array).all()]
    if bad:
        first = ", ".join(shown(name) for name in bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise UserError(f"{where}: {len(bad)} of {len(arrays)} arrays hold NaN or infinity: {first}: the file is damaged, or its training diverged")


def is_float(dtype: np.dtype) -> bool:
    """Whether numbers of this type are floating-point numbers; NumPy counts bfloat16 as none."""
    return dtype.kind == "f" or dtype == BFLOAT16


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Eight bytes with the header's length, a header in JSON (name -> dtype, shape, first and last byte), then the arrays without gaps."""
    with reading(path):
        data = map_file(path)
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            raise BadFile(f"is damaged or incomplete: its header is to have {length:,} bytes, and the file has {len(data):,}")
        if length > MOST_JSON:
            raise BadFile(f"is refused: its header has {length:,} bytes, more than {MOST_JSON:,}")
        header = _parse_json(data[8 : 8 + length], "its header")
        header.pop("__metadata__", None)
        if len(header) > MOST_ENTRIES:
            raise BadFile(f"is refused: it holds {len(header):,} arrays")
        places = {name: _check_entry(name, entry) for name, entry in header.items()}
        end = 0
        for name, (_, _, _, start, stop) in sorted(places.items(), key=lambda place: place[1][3:]):
            if start != end:
                raise BadFile(f"is damaged: the bytes of {shown(name)} overlap with those of another array, or leave a gap")
            end = stop
        if end != len(data) - 8 - length:
            raise BadFile(f"is damaged or incomplete: its arrays take {shown(end)} bytes, and behind its header it has {len(data) - 8 - length:,}")
        return {name: array_at(data, 8 + length + start, dtype, count).reshape(shape) for name, (dtype, shape, count, start, _) in places.items()}


def _check_entry(name: str, entry: object) -> tuple[np.dtype, list[int], int, int, int]:
    """Returns dtype, shape, number of elements, first byte and the one behind the last of an array, relative to the header's end."""
    match entry:
        case {"dtype": str() as kind, "shape": list() as shape, "data_offsets": [int() as start, int() as stop], **rest} if not rest:
            pass
        case _:
            raise BadFile(f"is damaged: its header says of {shown(name)} other things than dtype, shape and data_offsets")
    if kind not in SAFETENSORS_DTYPES:
        raise BadFile(f"holds {shown(name)} as {shown(kind)}, which is not read: known are {', '.join(SAFETENSORS_DTYPES)}")
    dtype, count = SAFETENSORS_DTYPES[kind], count_elements(shape, name)
    if not 0 <= start <= stop or stop - start != count * dtype.itemsize:
        raise BadFile(f"is damaged: {shown(name)} is {kind} of shape {shown(shape)}, which does not fill the bytes {shown(start)} to {shown(stop)}")
    return dtype, shape, count, start, stop


def _read_parts(path: Path) -> dict[str, np.ndarray]:
    """A set of safetensors files by its index, whose weight_map says in which file of its folder each array lies."""
    names = _read_json(path).get("weight_map")
    with reading(path):
        if not isinstance(names, dict) or not names or len(names) > MOST_ENTRIES:
            raise BadFile("is damaged: it has no weight_map from arrays to files")
        for file in names.values():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise BadFile(f"is refused: its weight_map has {shown(file)}, which is no name of a .safetensors file in the same folder")
    parts = {file: _read_safetensors(path.with_name(file)) for file in dict.fromkeys(names.values())}
    with reading(path):
        for name, file in names.items():
            if name not in parts[file]:
                raise BadFile(f"is damaged: {shown(name)} is not in {file}")
    return {name: parts[file][name] for name, file in names.items()}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """A zip archive of .npy members. Stored ones are used where they lie in the file, packed ones unpacked into memory."""
    with reading(path):
        data = map_file(path)
        members = zip_members(data)
        total = sum(member.size for member in members.values())
        if total > MOST_UNPACKED or total > FREE_RATIO + MOST_RATIO * len(data):
            raise BadFile(f"is refused: its {len(data):,} bytes would unpack to {total:,}")
        for name in members:
            if not name.endswith(".npy"):
                raise BadFile(f"is no .npz of arrays: its member {shown(name)} is none")
        return {name.removesuffix(".npy"): _read_npy(unpack(data, member, name), name) for name, member in members.items()}


def _read_npy(content: memoryview, name: str) -> np.ndarray:
    """An array in NumPy's own format: magic, version, the header's length, and the header as the text of a Python dict, which is matched as text."""
    name, version = shown(name.removesuffix(".npy")), bytes(content[6:8])
    if content[:6] != b"\x93NUMPY" or version not in (b"\1\0", b"\2\0") or len(content) < 12:
        raise BadFile(f"is damaged: {name} is not in NumPy's format of version 1 or 2")
    size = 2 if version == b"\1\0" else 4
    start = 8 + size + int.from_bytes(content[8 : 8 + size], "little")
    text = bytes(content[8 + size : min(start, 4096)]).decode("latin-1")
    match = NPY_HEADER.fullmatch(text)
    if "|O'" in text:
        raise BadFile(f"holds Python objects as {name} (a pickle): they are not read (nothing was executed)")
    if match is None:
        raise BadFile(f"holds {name} with the header {shown(text.strip())}, which is no plain array's")
    kind, fortran, sizes = match.groups()
    if kind not in NPY_DTYPES:
        raise BadFile(f"holds {name} of NumPy's type {shown(kind)}, which is not read: only floating-point numbers, integers and bools are")
    dtype, shape = NPY_DTYPES[kind], [int(number) for number in re.findall(r"\d+", sizes)]
    count = count_elements(shape, name)
    if len(content) - start != count * dtype.itemsize:
        raise BadFile(f"is damaged: {name} is {kind} of shape {shown(shape)}, and has {len(content) - start:,} bytes")
    array = array_at(content, start, dtype, count).reshape(shape, order="F" if fortran == "True" else "C")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _read_json(path: Path) -> dict:
    with reading(path):
        data: Mapped = map_file(path)
        if len(data) > MOST_JSON:
            raise BadFile(f"is refused: it has {len(data):,} bytes, more than {MOST_JSON:,}")
        return _parse_json(data[:], "it")


def _parse_json(text: bytes, what: str) -> dict:
    def once(pairs: list[tuple[str, object]]) -> dict:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise BadFile(f"is damaged: {what} has an entry twice")
        return entries

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"is damaged: {what} is not JSON ({shown(str(error))})") from None
    if not isinstance(parsed, dict):
        raise BadFile(f"is damaged: {what} is JSON, but no object")
    return parsed
