"""PyTorch's files are read without PyTorch, exactly, and hostile ones are refused by name with nothing executed."""

import argparse
import os
import pickle
import warnings
import zipfile
from collections import Counter, OrderedDict

import ml_dtypes
import numpy as np
import pytest

from tests.weights.hand_made import named, plain, refused, state_dict, survives, tensor, write_legacy, write_zip
from vidjoint.errors import UserError
from vidjoint.weights.torch_file import Global, read_torch, tensors_of

SIX = np.arange(6, dtype=np.float32)


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason="PyTorch, which writes the files, is not installed (pip install vidjoint[parity])")
    torch.set_num_threads(1)
    return torch


def same(read, expected, torch):
    """Whether what was read is what was saved, types included."""
    if isinstance(expected, torch.Tensor):
        expected = expected.detach()
        if expected.dtype == torch.bfloat16:
            assert read.dtype == ml_dtypes.bfloat16
            read, expected = read.astype(np.float32), expected.float()
        assert type(read) is np.ndarray and read.shape == tuple(expected.shape) and read.dtype == expected.numpy().dtype and read.flags.aligned
        np.testing.assert_array_equal(read, expected.numpy())
    elif isinstance(expected, dict):
        assert type(read) is dict and list(read) == list(expected)
        for key, value in expected.items():
            same(read[key], value, torch)
    elif isinstance(expected, set | frozenset):
        assert type(read) is list and read == list(expected)
    elif isinstance(expected, list | tuple):
        assert len(read) == len(expected)
        for part, value in zip(read, expected, strict=True):
            same(part, value, torch)
    else:
        assert read == expected


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_what_torch_saves(torch, tmp_path, modern, protocol):
    table, marked = torch.arange(24.0).reshape(4, 6) / 7, torch.arange(3.0)
    marked.no_decay = True  # such a tensor is saved by another function
    state = OrderedDict(
        whole=table,
        transposed=table.t(),
        part=table[1:3, ::2],  # the same storage
        crossed=torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        parameter=torch.nn.Parameter(table * 2),
        bfloat16=table.bfloat16(),
        half=table.half(),
        double=table.double(),
        scalar=torch.tensor(0.07),
        counter=torch.tensor(3),
        mask=torch.tensor([True, False, True]),
        byte=torch.arange(3, dtype=torch.uint8),
        short=torch.arange(3, dtype=torch.int16),
        empty=torch.zeros(0, 3),
        repeated=torch.arange(5).expand(1, -1),
        expanded=torch.tensor([[1.0], [2.0]]).expand(2, 9),
        overlapping=torch.arange(5.0).unfold(0, 3, 1),
        marked=marked,
        buffer=torch.nn.Buffer(table - 1),
        unsigned=torch.arange(5).to(torch.uint16),  # a type without a storage of its own
    )
    saved = {
        "epoch": 14,
        "model_state": state,
        "optimizer_state": {"state": {0: {"momentum_buffer": table + 1}}, "param_groups": [{"lr": 0.005, "params": [0], "nesterov": True}]},
        "cfg": "TRAIN:\n  ENABLE: true\n",
        "shape": table.shape,
        "best": np.float64(77.9),
        "milestones": Counter([11, 14]),
        "frozen": {"b"},
        "never": frozenset({3}),
        "nobody": set(),
        "none": None,
        "text": "naïve ☃",
        "large": 2**70,
        "bytes": b"\0\1",
    }
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=modern, pickle_protocol=protocol)
    read = read_torch(tmp_path / "a.pth")
    same(read, saved, torch)
    lines = []
    same(tensors_of(read, "a.pth", lines.append), dict(state), torch)
    assert len(lines) == 1 and "under model_state;" in lines[0] and "optimizer_state" in lines[0]


def test_reads_modules_parameters_with_attributes_and_settings(torch, tmp_path):
    layer = torch.nn.Linear(3, 2)
    layer.weight.no_decay = True  # such a parameter is saved by another function
    settings = argparse.Namespace(lr=0.1, layers=[1, 2])
    saved = {"layer": layer.state_dict(), "w": layer.weight, "args": settings, "dtype": torch.float16, "device": torch.device("cuda", 1)}
    torch.save(saved, tmp_path / "a.pt")
    read = read_torch(tmp_path / "a.pt")
    same(read["layer"], dict(layer.state_dict()), torch)
    same(read["w"], layer.weight, torch)
    assert read["args"] == {"lr": 0.1, "layers": [1, 2]} and read["dtype"] == np.float16 and read["device"] == "cuda:1"


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_tensors_of_other_kinds_are_refused_by_name(torch, tmp_path, modern):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = {
            "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "sparse": torch.eye(3).to_sparse(),
            "complex": torch.ones(3, dtype=torch.complex64),
            "8-bit": torch.ones(3).to(torch.float8_e4m3fn),
        }
        for kind, value in others.items():
            path = tmp_path / f"{kind}.pt"
            torch.save({"a": value}, path, _use_new_zipfile_serialization=modern)
            with refused(path, f"holds {kind}"):
                read_torch(path)
        torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=modern)
        with refused(path, "refers to torch.nn.modules.linear.Linear, which is no part of a weights file"):
            read_torch(path)
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
        with refused(path, "TorchScript"):
            read_torch(path)


def both(folder, program, storage=SIX):
    """The same pickle in both formats."""
    zipped = write_zip(folder / "zip.pth", program, {"0": storage.tobytes()}, version=b"3\n", byteorder=b"little")
    return zipped, write_legacy(folder / "legacy.pth", program, {"0": storage})


def test_reads_files_made_by_hand(tmp_path):
    for path in both(tmp_path, state_dict(a=tensor(), b=tensor(size=(3, 2), stride=(1, 3)), c=tensor(offset=5, size=(), stride=()))):
        read = read_torch(path)
        np.testing.assert_array_equal(read["a"], [[0, 1, 2], [3, 4, 5]], strict=False)
        np.testing.assert_array_equal(read["b"], [[0, 3], [1, 4], [2, 5]], strict=False)
        assert read["c"].shape == () and read["c"] == 5 and read["a"].dtype == np.float32
        before = path.read_bytes()
        read["a"][:] = 7  # arrays may be written to; the file is not
        assert path.read_bytes() == before


def with_attributes(tensor):
    """A tensor's instructions, a call, as torch.save writes it where the tensor has attributes: function, type, arguments, attributes."""
    function, arguments = tensor.split(b"(", 1)
    return named("torch._tensor", "_rebuild_from_type_v2") + b"(" + function + named("torch", "Tensor") + b"(" + arguments[:-1] + b"}tR"


LESS_USUAL = {  # instructions -> what they make
    "a set": (named("__builtin__", "set") + b"](" + plain("x") + plain("y") + b"e\x85R", ["x", "y"]),
    "a frozen set of protocol 3": (named("builtins", "frozenset") + b"]\x85R", []),
    "an expanded tensor": (tensor(size=(6, 4), stride=(1, 0)), np.repeat(SIX, 4).reshape(6, 4)),
    "a tensor with attributes": (with_attributes(tensor()), SIX.reshape(2, 3)),
}


@pytest.mark.parametrize("kind", LESS_USUAL)
def test_reads_what_is_less_usual(tmp_path, kind):
    program, expected = LESS_USUAL[kind]
    for path in both(tmp_path, state_dict(a=program, b=tensor())):
        found = read_torch(path)["a"]
        assert type(found) is type(expected)
        np.testing.assert_array_equal(found, expected)


def test_reads_views_of_storages_in_old_files(tmp_path):
    path = write_legacy(tmp_path / "a.pth", state_dict(a=tensor(size=(2,), stride=(1,), view=plain(("1", 3, 2)))), {"0": SIX})
    np.testing.assert_array_equal(read_torch(path)["a"], np.float32([3, 4]), strict=True)
    path = write_legacy(tmp_path / "a.pth", state_dict(a=tensor(size=(2,), stride=(1,), view=plain(("1", 5, 2)))), {"0": SIX})
    with refused(path, "damaged"):
        read_torch(path)


def test_a_bool_is_true_or_false_whatever_its_byte(tmp_path):
    program = state_dict(a=tensor("BoolStorage", count=3, size=(3,), stride=(1,)))
    for path in both(tmp_path, program, np.uint8([0, 1, 7])):
        assert read_torch(path)["a"].view(np.uint8).tolist() == [0, 1, 1]


class Reduces:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def hostile(command):
    """Name of a trick -> the pickle, and a word of the refusal."""
    run = b"(" + text(command) + b"tR"
    nested = pickle.dumps({"model": OrderedDict(a=[1, (2, Reduces(os.system, command))])}, 2)
    return {
        "os.system": (b"\x80\x02" + named("os", "system") + run + b".", "refers to os.system"),
        "pickled by __reduce__": (nested, f"refers to {os.name}.system"),
        "protocol 4": (pickle.dumps(Reduces(os.system, command), 4), f"refers to {os.name}.system"),
        "protocol 0": (b"\x80\x02" + pickle.dumps(Reduces(os.system, command), 0), f"refers to {os.name}.system"),
        "eval": (pickle.dumps(Reduces(eval, f"__import__('os').system({command!r})"), 2), "refers to __builtin__.eval"),
        "stack global": (b"\x80\x04" + text("builtins") + text("exec") + b"\x93" + run + b".", "refers to builtins.exec"),
        "dotted below an allowed module": (b"\x80\x04" + text("collections") + text("abc.sys.modules") + b"\x93.", "collections.abc.sys.modules"),
        "dotted in torch": (b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.", "__globals__"),
        "a name that is none": (b"\x80\x04" + text("os") + b"K\x01\x93.", "no name"),
        "a name of two lines": (b"\x80\x04" + text("os\nerror: all is well") + text("system") + b"\x93.", "refers to"),
        "getattr chain": (
            b"\x80\x02" + named("builtins", "getattr") + b"(" + named("os", "path") + text("os") + b"tR.",
            "refers to builtins.getattr",
        ),
        "torch.hub": (b"\x80\x02" + named("torch.hub", "load") + run + b".", "refers to torch.hub.load"),
        "torch.load": (b"\x80\x02" + named("torch.storage", "_load_from_bytes") + run + b".", "torch.storage._load_from_bytes"),
        "numpy.load": (b"\x80\x02" + named("numpy", "load") + run + b".", "refers to numpy.load"),
        "INST": (b"\x80\x02(" + text(command) + b"ios\nsystem\n.", "refers to os.system"),
        "OBJ": (b"\x80\x02(" + named("os", "system") + text(command) + b"o.", "refers to os.system"),
        "OBJ of an allowed name": (b"\x80\x02(" + named("collections", "OrderedDict") + b"o.", "OBJ"),
        "NEWOBJ": (b"\x80\x02" + named("subprocess", "Popen") + b"(" + text(command) + b"t\x81.", "refers to subprocess.Popen"),
        "extension registry": (b"\x80\x02\x82\x01.", "EXT1"),
        "text persistent id": (b"\x80\x02P0\n.", "PERSID"),
        "text with escapes": (b"\x80\x02S'\\d'\n.", "STRING"),
        "BUILD with __setstate__": (
            b"\x80\x02" + named("argparse", "Namespace") + b")\x81}" + text("__setstate__") + named("os", "system") + b"sb" + text(command) + b"b.",
            "refers to os.system",
        ),
        "BUILD with __setstate__ of an allowed name": (
            b"\x80\x02" + named("argparse", "Namespace") + b")\x81}" + text("__setstate__") + named("torch", "Size") + b"sb" + text(command) + b"b.",
            "attributes",
        ),
        "BUILD of a list": (b"\x80\x02]}b.", "attributes"),
        "BUILD of a function": (b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b"}b.", "attributes"),
        "a call of a string": (b"\x80\x02" + text("os.system") + run + b".", "no function"),
        "a call of a storage's type": (b"\x80\x02" + named("torch", "FloatStorage") + b"(" + text("0") + b"tR.", "calls torch.FloatStorage"),
        "a call of a dict": (b"\x80\x02}" + run + b".", "no function"),
        "a codec": (b"\x80\x02" + named("_codecs", "encode") + b"(" + text("x") + text("hex") + b"tR.", "_codecs.encode"),
        "a set of a name": (b"\x80\x02" + named("__builtin__", "set") + b"(" + text("x") + b"tR.", "calls __builtin__.set"),
        "another type of tensor": (
            b"\x80\x02" + named("torch._tensor", "_rebuild_from_type_v2") + b"(" + named("torch._utils", "_rebuild_tensor") + named("os", "system"),
            "refers to os.system",
        ),
        "a tensor with attributes that calls another name": (
            b"\x80\x02" + named("torch._tensor", "_rebuild_from_type_v2") + b"(" + named("torch", "Size") + named("torch", "Tensor") + b"))}tR.",
            "calls torch._tensor._rebuild_from_type_v2 in a way",
        ),
        "a dtype of objects": (b"\x80\x02" + named("numpy", "dtype") + b"(" + text("O8") + b"\x89\x88tR.", "numpy.dtype"),
        "a state dict as default": (b"\x80\x02" + named("collections", "defaultdict") + b"(" + named("os", "system") + b"tR.", "defaultdict"),
        "persistent id": (b"\x80\x02" + text(command) + b"Q.", "no storage"),
    }


@pytest.mark.parametrize("trick", hostile(""))
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, trick):
    marker = tmp_path / "marker"
    program, word = hostile(f"touch {marker}")[trick]
    (tmp_path / "bare.pth").write_bytes(program)
    state = tmp_path / "after_protocol.pth"
    state.write_bytes(write_legacy(state, program).read_bytes())
    for path in (*both(tmp_path, program), tmp_path / "bare.pth", state):
        with refused(path, word):
            read_torch(path)
    assert not marker.exists()


def test_pickle_would_have_run_the_hostile_ones(tmp_path):
    """The tricks of the test above are real: Python's own pickle falls for them."""
    marker = tmp_path / "marker"
    for trick in ("os.system", "pickled by __reduce__", "stack global", "INST", "OBJ"):
        pickle.loads(hostile(f"touch {marker}" if trick != "stack global" else f"open({str(marker)!r}, 'w').close()")[trick][0])
        assert marker.exists(), trick
        marker.unlink()


def exploding():
    """Name of a bomb -> a pickle of a few kilobytes that asks for endless memory, time or stack."""
    doubling = b"(" + text("lol") + b"l" + b"q\0000h\0h\0\x86" * 1000
    ordered = named("collections", "OrderedDict")
    pairs = b"](" + (plain("a") + b"N\x86") * 1000 + b"e\x85q\1"
    return {
        "bytes of 2**40": (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.", "damaged"),
        "bytes of 2**63": (b"\x80\x04\x8e" + (2**63).to_bytes(8, "little") + b"x.", "damaged"),
        "text of 2**32 - 1": (b"\x80\x02X\xff\xff\xff\xffx.", "damaged"),
        "a number of 2**31 - 1 bytes": (b"\x80\x02\x8b\xff\xff\xff\x7fx.", "damaged"),
        "a number of 10**5 bytes": (b"\x80\x02\x8b" + (10**5).to_bytes(4, "little") + b"\x7f" * 10**5 + b".", "256 bits"),
        "a number of 10**5 digits": (b"\x80\x02L" + b"9" * 10**5 + b"L\n.", "LONG"),
        "a byte array": (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.", "BYTEARRAY8"),
        "nothing on the stack": (b"\x80\x02R.", "damaged"),
        "no mark": (b"\x80\x02t.", "damaged"),
        "no memory": (b"\x80\x02h\7.", "damaged"),
        "no end": (b"\x80\x02}", "damaged"),
        "instructions without end": (b"\x80\x02" + b"N0" * 10_000 + b".", "instructions"),
        "a tuple in a tuple as a key": (b"\x80\x02}N" + b"\x85" * 14_000 + b"Ns.", "key"),
        "doubling, as an id": (b"\x80\x02" + doubling + b"Q.", "no storage"),
        "doubling, as a name": (b"\x80\x04" + doubling + text("x") + b"\x93.", "no name"),
        "doubling, as a size": (b"\x80\x02" + tensor().replace(plain((2, 3)), doubling) + b".", "damaged"),
        "a list of itself, as a size": (b"\x80\x02" + tensor().replace(plain((2, 3)), b"]q\0h\0a") + b".", "damaged"),
        "keys of one hash": (b"\x80\x02}(" + b"".join(plain(n * (2**61 - 1)) + b"N" for n in range(100)) + b"u.", "key"),
        "the same pairs again and again": (b"\x80\x02" + ordered + b"q\2" + pairs + (b"h\2h\1R" * 3000) + b".", "repeats itself"),
    }


@pytest.mark.parametrize("bomb", exploding())
def test_bombs_are_refused_in_no_memory(tmp_path, bomb, monkeypatch):
    monkeypatch.setattr("vidjoint.weights.torch_file.MOST_INSTRUCTIONS", 15_000)  # of a million, in a hundredth of the time
    program, word = exploding()[bomb]
    for path in both(tmp_path, program):
        with refused(path, word):
            read_torch(path)


def test_doubling_and_deep_nesting_take_no_memory_as_long_as_nobody_looks(tmp_path):
    deep = state_dict(a=tensor(), b=b"N" + b"\x85" * 50_000, c=b"]q\0h\0a", d=b"N" + b"q\0010h\1h\1\x86" * 300)
    for path in both(tmp_path, deep):
        assert list(tensors_of(read_torch(path))) == ["a"]


TENSORS = {
    "beyond the end": dict(offset=1),
    "a long stride": dict(stride=(4, 1)),
    "a huge stride": dict(stride=(2**47, 1)),
    "a stride of 2**62": dict(stride=(2**62, 1)),
    "a negative stride": dict(offset=5, stride=(-3, 1)),
    "a negative offset": dict(offset=-1),
    "a negative size": dict(size=(-2, 3)),
    "a size of 2**60": dict(size=(2**60, 3), stride=(0, 0)),
    "2**40 elements of one": dict(size=(2**20, 2**20), stride=(0, 0)),
    "nothing, by huge": dict(size=(0, 2**60), stride=(1, 1)),
    "too many axes": dict(size=(1,) * 40, stride=(1,) * 40),
    "fewer strides": dict(stride=(3,)),
    "a size that is none": dict(size=("2", 3)),
    "a stride that is none": dict(stride=("2", 3)),
    "a size that is a number": dict(size=6),
    "more storage than there is": dict(count=7),
    "storage of 2**40": dict(count=2**40),
    "storage of 2**62": dict(count=2**62),
    "less than no storage": dict(count=-1),
    "another type": dict(kind="DoubleStorage"),
    "a storage that is not there": dict(key="1"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_stay_within_their_storage(tmp_path, fault):
    for path in both(tmp_path, state_dict(a=tensor(**TENSORS[fault]))):
        with refused(path):
            read_torch(path)


def test_many_views_of_the_same_bytes_are_refused(tmp_path):
    for path in both(tmp_path, state_dict(**{f"a{n}": tensor() for n in range(100)}), np.zeros(6, np.float32)):
        assert len(read_torch(path)) == 100  # the pickle is larger than that
    big = np.zeros(100_000, np.float32)
    many = state_dict(**{f"a{n}": tensor(count=big.size, size=(big.size,), stride=(1,)) for n in range(40)})
    for path in both(tmp_path, many, big):
        with refused(path, "many times larger than the file"):
            read_torch(path)


def test_damaged_archives_are_refused(tmp_path):
    good, six = state_dict(a=tensor()), {"0": SIX.tobytes()}
    path = tmp_path / "a.pth"
    with refused(write_zip(path, good, six, byteorder=b"big"), "big-endian"):
        read_torch(path)
    with refused(write_legacy(path, good, {"0": SIX}, little=False), "big-endian"):
        read_torch(path)
    with refused(write_zip(path, good), "archive/data/0"):
        read_torch(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", good.replace(b".", b"N0" * 10**6 + b"."))
    with refused(path, "data.pkl"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/weights.txt", "")
    with refused(path, "no data.pkl"):
        read_torch(path)
    path.write_bytes(write_zip(path, good, six).read_bytes()[:-40])
    with refused(path, "zip archive"):
        read_torch(path)
    path.write_bytes(write_legacy(path, good, {"0": SIX}).read_bytes()[:-1])
    with refused(path, "incomplete"):
        read_torch(path)
    with refused(write_legacy(path, good, {"0": SIX, "1": SIX}), "list of storages"):
        read_torch(path)
    path.write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 1000)
    with refused(path, "tar archive"):
        read_torch(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with refused(path, "not one of torch.save"):
        read_torch(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with refused(path, "no file of torch.save"):
        read_torch(path)
    path.write_bytes(b"")
    with refused(path, "is empty"):
        read_torch(path)
    with refused(tmp_path, "is a folder"):
        read_torch(tmp_path)
    with refused(tmp_path / "none.pth", "does not exist"):
        read_torch(tmp_path / "none.pth")


@pytest.mark.parametrize("kind", [0, 1], ids=["zip", "legacy"])
def test_any_damage_is_a_line(tmp_path, kind):
    extra = named("argparse", "Namespace") + b")\x81}" + plain("lr") + plain(0.1) + b"sb"
    program = state_dict(a=tensor(), b=tensor(offset=5, size=(), stride=()), args=extra, dtype=named("torch", "float16"), text=plain("x"))
    path = both(tmp_path, program)[kind]
    survives(read_torch, path, path.read_bytes(), seed=kind)


def test_finds_the_state_dict():
    one, two, three = {"a": SIX}, {"b": SIX, "epoch": 3}, {"c": SIX}
    for saved, name in (
        (one, "a"),
        ({"model": two, "epoch": 1}, "b"),
        ({"student": one, "teacher": two, "optimizer": {"x": SIX}}, "b"),
        ({"state_dict": {"model": one}}, "a"),
        ({"model": one, "model_state": three}, "c"),
        ({"model": "vit_base", "state_dict": one}, "a"),
        ({"c": SIX, "model": {}}, "c"),
        ({"module.a": SIX}, "a"),
        ({"module._orig_mod.a": SIX}, "a"),
        ({"model.a": SIX}, "model.a"),
    ):
        assert list(tensors_of(saved)) == [name], saved
    assert list(tensors_of({"module.a": SIX, "b": SIX})) == ["module.a", "b"]  # not common to all
    deep = {"model": {"model": {"model": {"model": one}}}}
    for saved in ({}, [SIX], SIX, None, {"model": {"epoch": 3}}, {1: SIX}, deep, {"x": Global("torch.Size")}):
        with pytest.raises(UserError, match=r"^f\.pth holds no tensors"):
            tensors_of(saved, "f.pth")
    loop = {}
    loop["model"] = loop
    with pytest.raises(UserError):
        tensors_of(loop)
