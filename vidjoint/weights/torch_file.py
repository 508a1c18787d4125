"""PyTorch's files read without PyTorch: an interpreter of its own follows the pickle's instructions, and has no way to import or to call anything.

A pickle is a program. The one of torch.save makes dicts, lists, tuples, numbers and strings, refers to a few functions by name, and names storages,
whose bytes lie outside the pickle. Here a name is only compared with those few (ALLOWED), and what they do is written out in `_Pickle.call`. Any
other name or instruction ends the reading. Bytes are used where they lie in the file, within bounds that are checked first.
"""

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from vidjoint.errors import UserError
from vidjoint.weights.mapped import BadFile, Mapped, array_at, count_elements, map_file, reading, shown, zip_members

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how a file of torch.save began before version 1.6
MOST_INSTRUCTIONS = 1_000_000  # a ViT-L with its optimiser needs 0.1 million
MOST_PICKLE = 64 << 20  # bytes
MOST_COPIED = 500_000  # entries and characters that calls take as arguments, which a few instructions can repeat without end
MOST_SHARED = 16  # how often, on average, the file's bytes may be used by several tensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STORAGES = {
    f"{module}.{name}Storage": np.dtype(dtype)
    for module in ("torch", "torch.cuda")
    for name, dtype in {
        "Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": BFLOAT16, "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1",
        "Bool": "?",
    }.items()
} | {name: np.dtype("u1") for name in ("torch.UntypedStorage", "torch.storage.UntypedStorage", "torch.storage._UntypedStorage")}  # fmt: skip
PLAIN = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
DTYPES = {f"torch.{name}": np.dtype(name) for name in PLAIN} | {"torch.bfloat16": BFLOAT16}
NUMPY_DTYPES = {np.dtype(name).str[1:]: np.dtype(name) for name in PLAIN}  # "f8", "i4", ...: numpy's names in a pickle
DICTS = ("collections.OrderedDict", "collections.Counter")
SETTINGS = ("argparse.Namespace", "yacs.config.CfgNode", "fvcore.common.config.CfgNode")
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
REBUILT = tuple(f"torch._utils._rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state"))
WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"  # another function and its arguments, then what the tensor gets besides
TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
SETS = tuple(f"{module}.{name}" for module in ("__builtin__", "builtins") for name in ("set", "frozenset"))  # protocols 2 and 3 call them
OTHERS = ("torch.Size", "torch.device", "numpy.dtype", "_codecs.encode")
ALLOWED = frozenset([*STORAGES, *DTYPES, *DICTS, *SETTINGS, *SCALARS, *REBUILT, WITH_ATTRIBUTES, *TENSORS, *SETS, *OTHERS])
UNREAD = {  # part of a name of torch's -> what a file that refers to it holds
    "qtensor": "quantised tensors", "QInt": "quantised tensors", "QUInt": "quantised tensors", "torch.qint": "quantised tensors",
    "torch.quint": "quantised tensors", "sparse": "sparse tensors", "Complex": "complex numbers", "torch.complex": "complex numbers",
    "float8": "8-bit floating-point numbers",
}  # fmt: skip

KEYS = (str, int, float, bytes, type(None))
CONSTANTS = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8".split()
)
# The binary instructions of protocols 2 to 5. Those of protocol 0, which are text, torch.save never uses; INST is here for the name that it gives
INSTRUCTIONS = CONSTANTS | frozenset(
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET MARK TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE NEWFALSE EMPTY_DICT EMPTY_LIST EMPTY_SET "
    "LIST FROZENSET DICT SETITEM SETITEMS APPEND APPENDS ADDITEMS POP POP_MARK DUP GLOBAL STACK_GLOBAL INST REDUCE NEWOBJ BUILD BINPERSID PROTO "
    "FRAME STOP".split()
)
# Where checkpoints keep the model, the likelier first. Of DINO's two networks the teacher is the one its authors evaluate and publish
STATE_KEYS = ("model_state", "model_state_dict", "state_dict", "teacher", "model", "module", "backbone", "params")
WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DistributedDataParallel and torch.compile leave

FindStorage = Callable[[str, np.dtype, int], np.ndarray]  # key, dtype, number of elements -> float[elements]


def read_torch(path: Path) -> object:
    """Reads what torch.save wrote, in the zip format (PyTorch 1.6 and later) or the one before.

    Returns the saved object: dicts (OrderedDict and Counter too), lists (sets too), tuples, numbers and strings as they are, tensors and parameters
    as arrays over the file's bytes, dtypes as NumPy's, devices as strings, argparse.Namespace and yacs configs as dicts of their attributes. It
    comes from a file that anybody may have written: it can contain itself, or be nested deeper than Python's recursion goes.

    Raises:
      UserError: one line, where the file is damaged, no file of torch.save, from a big-endian machine, or refers to anything but the above.
    """
    path = Path(path)
    with reading(path):
        data = map_file(path)
        if data[:4] == b"PK\3\4":
            return _read_zip(data)
        if data[257:262] == b"ustar":
            raise BadFile("is a tar archive, which the first versions of PyTorch wrote: load it and save it again with a newer one")
        return _read_legacy(data)


def tensors_of(saved: object, where: str | Path = "the file", report: Callable[[str], None] = lambda line: None) -> dict[str, np.ndarray]:
    """Returns the state dict within what `read_torch` returned: parameter name -> array.

    That is what lies under the first of STATE_KEYS that holds tensors, itself or under another of them (`{"state_dict": {"model": ...}}`), else the
    dict itself. Entries that are no tensors are left out, and prefixes of WRAPPERS dropped where all names have them.

    Args:
      where: what to call the file.
      report: takes a line that says which of several parts was chosen.

    Raises:
      UserError: there are no tensors.
    """
    keys, found = _state(saved, 3) or ((), {})
    if not found:
        within = f" (its entries are {shown(', '.join(shown(key) for key in saved))})" if isinstance(saved, dict) and saved else ""
        raise UserError(f"{where} holds no tensors at its top nor under {', '.join(STATE_KEYS)}{within}")
    if keys:
        rest = [shown(key) for key in saved if key != keys[0]]
        report(f"{where}: the weights are those under {'/'.join(keys)}" + (f"; beside them it holds {shown(', '.join(rest))}" if rest else ""))
    while prefix := next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in found)), ""):
        found = {name.removeprefix(prefix): array for name, array in found.items()}
    return found


def _state(saved: object, depth: int) -> tuple[tuple[str, ...], dict[str, np.ndarray]] | None:
    if not isinstance(saved, dict) or not depth:
        return None
    for key in STATE_KEYS:
        if inner := _state(saved.get(key), depth - 1):
            return (key, *inner[0]), inner[1]
    tensors = {name: value for name, value in saved.items() if isinstance(value, np.ndarray) and isinstance(name, str)}
    return ((), tensors) if tensors else None


def _read_zip(data: Mapped) -> object:
    """The format since 1.6: NAME/data.pkl, and a member NAME/data/KEY per storage."""
    members = zip_members(data)
    roots = [name.removesuffix("data.pkl") for name in members if f"/{name}".endswith("/data.pkl")]
    if len(roots) != 1:
        raise BadFile("is a zip archive, but not one of torch.save: it has no data.pkl, or several")
    if f"{roots[0]}constants.pkl" in members:
        raise BadFile("is a TorchScript program (torch.jit.save), not a file of weights: save the model's state_dict() with torch.save")

    def place(name: str, most: int, size: int | None = None) -> tuple[int, int]:
        """First byte and size of a member, which is `size` bytes long where that is given."""
        member = members.get(roots[0] + name)
        if member is None:
            raise BadFile(f"is damaged or incomplete: it has no member {shown(roots[0] + name)}")
        if member.deflated or member.size > most or size not in (None, member.size):
            raise BadFile(f"is refused: its member {shown(roots[0] + name)} has not the size that it should have, or is packed")
        return member.start, member.size

    if f"{roots[0]}byteorder" in members:
        start, size = place("byteorder", 16)
        if data[start : start + size].strip() != b"little":
            raise BadFile("was written on a big-endian machine: load it and save it again on another")

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if (key, dtype) not in storages:
            start, _ = place(f"data/{key}", len(data), count * dtype.itemsize)
            storages[key, dtype] = array_at(data, start, dtype, count)
        if len(storages[key, dtype]) != count:
            raise BadFile(f"is damaged: its storage {shown(key)} has two sizes")
        return storages[key, dtype]

    storages = {}
    start, size = place("data.pkl", MOST_PICKLE)
    return _Pickle(_Stream(data, start, start + size), storage).load()


def _read_legacy(data: Mapped) -> object:
    """The format before 1.6: five pickles (magic number, protocol, the machine, the object, storage keys), then each storage's size and bytes.

    Where the storages lie is known only after the object: it is gone through once for their sizes and a second time for the object itself.
    """
    if data[:1] != b"\x80":
        raise BadFile("is no file of torch.save (nor a zip archive)")
    stream = _Stream(data, 0, min(MOST_PICKLE, len(data)))

    def none(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        raise BadFile("is damaged: a storage outside the saved object")

    if _Pickle(stream, none).load() != MAGIC:
        raise BadFile("is a pickle, but not one of torch.save")
    if _Pickle(stream, none).load() != PROTOCOL:
        raise BadFile(f"is not of the protocol {PROTOCOL} of torch.save")
    machine = _Pickle(stream, none).load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise BadFile("was written on a big-endian machine: load it and save it again on another")

    sizes: dict[str, tuple[int, int]] = {}  # key -> element size in bytes, number of elements
    places: dict[str, int] = {}  # key -> first byte
    storages: dict[tuple[str, np.dtype], np.ndarray] = {}

    def measured(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        itemsize, known = sizes.setdefault(key, (dtype.itemsize, count))
        if count * dtype.itemsize != known * itemsize or count * dtype.itemsize > len(data):
            raise BadFile(f"is damaged or incomplete: its storage {shown(key)} cannot have {count} elements")
        return np.frombuffer(data, dtype, count) if count else np.empty(0, dtype)  # the right size, any values

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if (key, dtype) not in storages:
            storages[key, dtype] = array_at(data, places[key], dtype, count)
        return storages[key, dtype]

    start = stream.position
    _Pickle(stream, measured).load()
    keys = _Pickle(stream, none).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(sizes) or len(keys) != len(sizes):
        raise BadFile("is damaged: its list of storages is not that of the saved object")
    end = stream.position
    for key in keys:
        itemsize, count = sizes[key]
        places[key] = end + 8
        if end + 8 + itemsize * count > len(data) or struct.unpack("<q", data[end : end + 8])[0] != count:
            raise BadFile(f"is damaged or incomplete: its storage {shown(key)} is not there in full")
        end += 8 + itemsize * count
    return _Pickle(_Stream(data, start, len(data)), storage).load()


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to. It stays a name."""

    name: str


class Settings(dict):
    """The attributes of a configuration object."""


class _Stream:
    """Bytes `position` to `end` of the file, as pickletools reads them: never beyond, whatever length the pickle claims."""

    def __init__(self, data: Mapped, position: int, end: int):
        self.data, self.position, self.end = data, position, end

    def read(self, size: int) -> bytes:
        start = self.position
        self.position = min(start + size, self.end)
        return self.data[start : self.position]

    def readline(self) -> str:
        newline = self.data.find(b"\n", self.position, min(self.position + 1000, self.end))
        if newline < 0:
            raise ValueError("a name without end")
        return self.read(newline + 1 - self.position)[:-1].decode()


class _Pickle:
    """Follows the instructions of one pickle. `stream` is left behind its end."""

    def __init__(self, stream: _Stream, storage: FindStorage):
        self.stream, self.storage = stream, storage
        self.copied = self.tensor_bytes = 0

    def load(self) -> object:
        try:
            return self.run()
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # from pickletools, or too few values on the stack
            raise BadFile(f"is damaged or incomplete: its pickle cannot be followed ({shown(str(error))})") from None

    def run(self) -> object:
        stack: list = []
        marks: list[int] = []
        memo: dict[int, object] = {}

        def since_mark() -> list:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        def pop(count: int) -> tuple:
            if len(stack) < count:
                raise IndexError("too few values on its stack")
            items = tuple(stack[-count:])
            del stack[-count:]
            return items

        for _ in range(MOST_INSTRUCTIONS):
            opcode = pickletools.code2op[self.stream.read(1).decode("latin-1")]
            name = opcode.name
            if name not in INSTRUCTIONS:
                raise BadFile(f"is refused: its pickle has the instruction {name}, which torch.save does not use")
            if name in ("GLOBAL", "INST"):  # module and name as lines, which pickletools would search for escapes
                argument = f"{self.stream.readline()}.{self.stream.readline()}"
            else:
                argument = opcode.arg.reader(self.stream) if opcode.arg else None
            if name in CONSTANTS:
                if type(argument) is int and argument.bit_length() > 256:
                    raise BadFile("is refused: it holds an integer of more than 256 bits")
                stack.append(argument)
                continue
            match name:
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(pop(int(name[-1])))
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "LIST" | "FROZENSET":
                    stack.append(since_mark())
                case "DICT":
                    stack.append(_updated({}, since_mark()))
                case "SETITEM":
                    _updated(stack[-3], pop(2))
                case "SETITEMS":
                    items = since_mark()
                    _updated(stack[-1], items)
                case "APPEND":
                    _extended(stack[-2], pop(1))
                case "APPENDS" | "ADDITEMS":
                    items = since_mark()
                    _extended(stack[-1], items)
                case "POP":
                    # pickle's own rule: right behind a mark it is the mark that goes
                    _ = marks.pop() if marks and marks[-1] == len(stack) else stack.pop()
                case "POP_MARK":
                    since_mark()
                case "DUP":
                    stack.append(stack[-1])
                case "GLOBAL":
                    stack.append(_global(argument))
                case "STACK_GLOBAL":
                    module, attribute = pop(2)
                    if not isinstance(module, str) or not isinstance(attribute, str):
                        raise BadFile("is refused: it refers to what is no name (nothing was executed)")
                    stack.append(_global(f"{module}.{attribute}"))
                case "INST":
                    _global(argument)
                    raise BadFile("is refused: it makes an object in a way that torch.save does not")
                case "REDUCE" | "NEWOBJ":
                    function, arguments = pop(2)
                    stack.append(self.call(function, arguments))
                case "BUILD":
                    (state,) = pop(1)
                    self.count((state,))
                    _build(stack[-1], state)
                case "BINPERSID":
                    (which,) = pop(1)
                    stack.append(self.find_storage(which))
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
        raise BadFile(f"is refused: its pickle has more than {MOST_INSTRUCTIONS:,} instructions")

    def find_storage(self, which: object) -> np.ndarray:
        match which:
            case ("storage", Global(kind), str() as key, str(), int() as count, *view) if kind in STORAGES and 0 <= count < 2**48:
                flat = self.storage(key, STORAGES[kind], count)
            case _:
                raise BadFile(f"is damaged or no weights file: {shown(which)} is no storage")
        match view:
            case [] | [None]:
                return flat
            case [(str(), int() as offset, int() as size)] if 0 <= offset <= offset + size <= count:
                return flat[offset : offset + size]
        raise BadFile(f"is damaged: its storage {shown(key)} has a view that is none")

    def call(self, function: object, arguments: object) -> object:
        """What the functions of ALLOWED make of their arguments."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise BadFile("is refused: it calls what is no function (nothing was executed)")
        self.count(arguments)
        match (function.name, *arguments):
            case ("torch._utils._rebuild_tensor", flat, offset, size, stride):
                return self.tensor(flat, offset, size, stride)
            case ("torch._utils._rebuild_tensor_v2", flat, offset, size, stride, _, _, *metadata) if not any(metadata):
                return self.tensor(flat, offset, size, stride)
            case ("torch._utils._rebuild_tensor_v3", np.ndarray() as flat, offset, size, stride, _, _, np.dtype() as dtype, *rest) if not any(rest):
                whole = flat.nbytes // dtype.itemsize * dtype.itemsize
                return self.tensor(flat.view(np.uint8)[:whole].view(dtype), offset, size, stride)
            case ("torch._utils._rebuild_parameter" | "torch.nn.parameter.Parameter", np.ndarray() as tensor, *_):
                return tensor
            case ("torch._utils._rebuild_parameter_with_state", np.ndarray() as tensor, *_):
                return tensor
            case (name, Global(inner), Global(kind), tuple() as rest, _) if name == WITH_ATTRIBUTES and inner in REBUILT and kind in TENSORS:
                return self.call(Global(inner), rest)
            case (name, list() as members) if name in SETS:
                return list(members)
            case ("collections.OrderedDict",):
                return {}
            case ("collections.OrderedDict", list() as pairs):
                return _updated({}, [part for pair in pairs for part in _pair(pair)])
            case ("collections.Counter", dict() as counts):
                return dict(counts)
            case ("torch.Size", tuple() | list() as sizes):
                return tuple(sizes)
            case ("torch.device", str() as kind):
                return kind
            case ("torch.device", str() as kind, int() as index):
                return f"{kind}:{index}"
            case ("numpy.dtype", str() as code, *_) if code.lstrip("<|=") in NUMPY_DTYPES:
                return NUMPY_DTYPES[code.lstrip("<|=")]
            case (name, np.dtype() as dtype, str() | bytes() as value) if name in SCALARS:
                return np.frombuffer(value.encode("latin-1") if isinstance(value, str) else value, dtype, 1)[0]
            case ("_codecs.encode", str() as text, str() as codec) if codec in ("latin1", "latin-1"):
                return text.encode("latin-1")
            case (name,) if name in SETTINGS:
                return Settings()
            case (name, dict() as entries) if name in SETTINGS:
                return Settings(entries)
        raise BadFile(f"is refused: it calls {shown(function.name)} in a way that torch.save does not (nothing was executed)")

    def count(self, arguments: tuple) -> None:
        self.copied += len(arguments) + sum(len(part) for part in arguments if isinstance(part, list | tuple | dict | str | bytes))
        if self.copied > MOST_COPIED:
            raise BadFile("is refused: its pickle repeats itself beyond measure")

    def tensor(self, flat: object, offset: object, size: object, stride: object) -> np.ndarray:
        """A view of a storage, `offset` and `stride` in elements: all lie within the storage. Of a stride of 0 (`expand`), many are one."""
        if not isinstance(flat, np.ndarray) or not all(isinstance(sizes, tuple | list) for sizes in (size, stride)) or len(size) != len(stride):
            raise BadFile("is damaged: a tensor without storage, size or stride")
        elements = count_elements(size, "a tensor")
        if not all(type(step) is int and 0 <= step < 2**48 for step in (offset, *stride)):
            raise BadFile(f"is damaged: a tensor with offset {shown(offset)} and stride {shown(stride)}")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if elements and last >= flat.size:
            raise BadFile(f"is damaged: a tensor of shape {list(size)}, stride {list(stride)}, offset {offset} exceeds its {flat.size} elements")
        self.tensor_bytes += elements * flat.itemsize
        if self.tensor_bytes > MOST_SHARED * len(self.stream.data):
            raise BadFile("is refused: its tensors are many times larger than the file")
        if not elements:
            return np.empty(size, flat.dtype)
        view = np.ndarray(tuple(size), flat.dtype, flat.view(np.uint8), offset * flat.itemsize, [step * flat.itemsize for step in stride])
        return np.require(view, requirements="A")


def _global(name: str) -> Global | np.dtype:
    if name in DTYPES:
        return DTYPES[name]
    if name in ALLOWED:
        return Global(name)
    if kind := next((kind for part, kind in UNREAD.items() if part in name and name.startswith("torch.")), None):
        raise BadFile(f"holds {kind} ({shown(name)}), which are not read: save the model with plain floating-point tensors")
    raise BadFile(f"refers to {shown(name)}, which is no part of a weights file: it is not read (nothing was executed)")


def _updated(target: object, items: list | tuple) -> dict:
    """`target` with keys and values put in, which alternate in `items`."""
    if not isinstance(target, dict) or len(items) % 2:
        raise BadFile("is refused: it sets entries of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Tuples as keys: hashing a nested one overruns the C stack. Large integers: a multiple of 2**61 - 1 has the same hash as any other
        if not isinstance(key, KEYS) or (isinstance(key, int) and key.bit_length() > 64):
            raise BadFile(f"is refused: a dict in it has a key that is neither text nor number, but {type(key).__name__}")
        target[key] = value
    return target


def _extended(target: object, items: list | tuple) -> None:
    if not isinstance(target, list):
        raise BadFile("is refused: it appends to what is no list")
    target.extend(items)


def _pair(pair: object) -> tuple | list:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise BadFile("is damaged: an OrderedDict of what are no pairs")
    return pair


def _build(target: object, state: object) -> None:
    """Gives an object its attributes: settings keep them, a dict's (`_metadata` of a state dict) are dropped, a dtype's tell its byte order."""
    match target, state:
        case Settings(), dict():
            _updated(target, [part for entry in state.items() for part in entry])
        case dict(), dict():
            pass
        case np.dtype(), (int(), str() as order, None, None, None, *_) if order in ("<", "|", "="):
            pass
        case _:
            raise BadFile("is refused: it sets attributes of what has none in a weights file (nothing was executed)")
