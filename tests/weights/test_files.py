"""Weight files of other projects become arrays exactly, and damaged or hostile ones a line; what is written the safetensors library reads."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.weights.hand_made import refused, state_dict, survives, tensor, write_legacy, write_zip
from vidjoint.errors import UserError
from vidjoint.weights.files import check_finite, find_weights, read_arrays, read_sidecars, write_safetensors

BF16 = np.dtype(ml_dtypes.bfloat16)


def some_arrays():
    """One array of each type that is read, a scalar, an empty one, one in Fortran's order and one that is not contiguous."""
    table = np.arange(12).reshape(3, 4)
    arrays = {f"of.{name}": table.astype(name) for name in "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split()}
    odd = {"scalar": np.float32(0.07)[()], "empty": np.zeros((0, 3), np.float32), "a/b/c": np.asfortranarray(table / 7), "cut": (table / 7)[:, ::2]}
    return arrays | {name: np.asarray(array) for name, array in odd.items()}


def assert_same(read, arrays):
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape and read[name].flags.aligned and read[name].flags.writeable, name
        assert type(read[name]) is np.ndarray and read[name].tobytes() == array.tobytes(), name


def raw(path: Path, header: object, content: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, any bytes behind it, and a header's length that may be a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)
    return path


def entry(start=0, stop=24, shape=(2, 3), dtype="F32", **others):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop], **others}


def test_safetensors_of_the_library(tmp_path):
    arrays = some_arrays()
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, tmp_path / "a.safetensors", {"format": "pt"})
    assert_same(read_arrays(tmp_path / "a.safetensors"), arrays)


@pytest.mark.parametrize("pad", range(4))
def test_safetensors_that_are_not_aligned(tmp_path, pad):
    header = {"a": entry(stop=12, dtype="BF16"), "b": entry(12, 36)}
    numbers = np.arange(6, dtype=np.float32)
    path = raw(tmp_path / "a.safetensors", json.dumps(header).encode() + b" " * pad, numbers.astype(BF16).tobytes() + numbers.tobytes())
    assert_same(read_arrays(path), {"a": numbers.astype(BF16).reshape(2, 3), "b": numbers.reshape(2, 3)})


def test_written_safetensors_are_read_by_the_library_and_here(tmp_path):
    path, arrays = tmp_path / "model.safetensors", some_arrays()
    write_safetensors(path, arrays, {"format": "pt"})
    assert_same(load_file(path), arrays)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    arrays["bf16"] = np.arange(6).astype(BF16)[::2]
    write_safetensors(path, arrays, {})
    assert_same(read_arrays(path), arrays)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_bfloat16_as_torch_sees_it(tmp_path):
    torch = pytest.importorskip("safetensors.torch", reason="PyTorch is not installed (pip install vidjoint[parity])")
    write_safetensors(tmp_path / "a.safetensors", {"a": (np.arange(6) / 7).astype(BF16)}, {"format": "pt"})
    read = torch.load_file(tmp_path / "a.safetensors")
    torch.save_file(read | {"b": read["a"] * 2}, tmp_path / "b.safetensors")
    assert read["a"].float().tolist() == (np.arange(6) / 7).astype(BF16).astype(np.float32).tolist()
    assert_same(read_arrays(tmp_path / "b.safetensors"), {"a": (np.arange(6) / 7).astype(BF16), "b": (np.arange(6) / 7).astype(BF16) * BF16.type(2)})


def test_a_file_that_cannot_be_written_is_a_line_and_leaves_nothing(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    for path in (tmp_path / "none" / "a.safetensors", tmp_path / "a.safetensors"):
        with pytest.raises(UserError, match="cannot be written") as caught:
            write_safetensors(path, {"a": np.ones(3)}, {})
        assert len(caught.value.lines) == 1
    assert [file.name for file in tmp_path.rglob("*")] == ["a.safetensors"]


def test_arrays_are_the_files_bytes_and_writing_to_them_leaves_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.arange(4.0)}, {})
    before, read = path.read_bytes(), read_arrays(path)
    assert not read["a"].flags.owndata
    read["a"][:] = 7
    assert path.read_bytes() == before


SIX = bytes(24)
HEADERS = {
    "2**60 bytes of header": (b"{}", b"", 2**60, "1,152,921,504,606,846,976"),
    "2**64 - 1 bytes of header": (b"{}", b"", 2**64 - 1, "incomplete"),
    "no JSON": (b"{'a'}", b"", None, "not JSON"),
    "no text": (b'{"\xff": 1}', b"", None, "not JSON"),
    "no header": (b"", b"", None, "not JSON"),
    "a list": ([], b"", None, "no object"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", None, "not JSON"),
    "many digits": (b'{"a":' + b"9" * 100_000 + b"}", b"", None, "not JSON"),
    "a name twice": (b'{"a": 1, "a": 2}', b"", None, "twice"),
    "no entry": ({"a": 3}, b"", None, "other things than"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2, 3]}}, SIX, None, "other things than"),
    "an entry more": ({"a": entry(more=1)}, SIX, None, "other things than"),
    "an unknown type": ({"a": entry(dtype="F8_E4M3")}, SIX, None, "F8_E4M3"),
    "a type of 10**5 characters": ({"a": entry(dtype="F" * 100_000)}, SIX, None, "FFF"),
    "text as shape": ({"a": entry(shape=("2", 3))}, SIX, None, "shape"),
    "a negative size": ({"a": entry(shape=(-2, -3))}, SIX, None, "shape"),
    "a size of 2**60": ({"a": entry(shape=(2**60,))}, SIX, None, "shape"),
    "nothing, by huge": ({"a": entry(stop=0, shape=(0, 2**40, 2**40))}, b"", None, "shape"),
    "100 axes": ({"a": entry(shape=(1,) * 100, stop=4)}, SIX, None, "shape"),
    "fewer bytes than the shape": ({"a": entry(stop=20)}, SIX[:20], None, "does not fill"),
    "a negative offset": ({"a": entry(-24, 0)}, SIX, None, "does not fill"),
    "offsets the wrong way round": ({"a": entry(24, 0)}, SIX, None, "does not fill"),
    "offsets beyond the end": ({"a": entry(0, 24)}, SIX[:8], None, "incomplete"),
    "offsets of 2**62": ({"a": entry(2**62, 2**62 + 24)}, SIX, None, "gap"),
    "overlap": ({"a": entry(0, 24), "b": entry(12, 36)}, SIX * 2, None, "overlap"),
    "the same bytes twice": ({"a": entry(0, 24), "b": entry(0, 24)}, SIX, None, "overlap"),
    "a gap": ({"a": entry(0, 24), "b": entry(28, 52)}, SIX * 3, None, "gap"),
    "bytes that belong to none": ({"a": entry()}, SIX + b"\0", None, "incomplete"),
    "a name of two lines": ({"a\nerror: b": entry(stop=3)}, SIX, None, r"a\nerror: b"),
    "a name of 10**5 characters": ({"a" * 100_000: entry(stop=3)}, SIX, None, "aaa..."),
    "half a surrogate": (b'{"\\ud800": 1}', b"", None, r"\ud800"),
    "too many arrays": ({str(n): 0 for n in range(100_001)}, b"", None, "100,001"),
    "a header of 17 MiB": (b" " * (17 << 20), b"", None, "17,825,792"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_hostile_safetensors(tmp_path, fault):
    header, content, length, word = HEADERS[fault]
    path = raw(tmp_path / "a.safetensors", header, content, length)
    with refused(path, word):
        read_arrays(path)


def test_safetensors_cut_anywhere(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.arange(4.0), "b": np.arange(3)}, {})
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with refused(path):
            read_arrays(path)


def parts(folder, **changes):
    """A set of two safetensors files and their index, which `changes` add to."""
    save_file({"a": np.ones(2), "b": np.ones(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": np.ones(4), "beside": np.ones(1)}, folder / "model-00002-of-00002.safetensors")
    names = {name: f"model-0000{number}-of-00002.safetensors" for name, number in (("c", 2), ("a", 1), ("b", 1))} | changes
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": names}))
    return path


def test_safetensors_in_parts(tmp_path):
    index = parts(tmp_path)
    for path in (index, tmp_path):
        assert {name: array.shape for name, array in read_arrays(path).items()} == {"c": (4,), "a": (2,), "b": (3,)}
    one = tmp_path / "model-00001-of-00002.safetensors"
    with refused(one, "one of several parts"):
        read_arrays(one)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b.safetensors", "config.json", "a\0.safetensors", 3, None, ["a"]]
)
def test_parts_lie_in_the_folder_of_their_index(tmp_path, file):
    (tmp_path / "in").mkdir()
    path = parts(tmp_path / "in", d=file)
    with refused(path, "same folder"):
        read_arrays(path)


def test_damaged_indices(tmp_path):
    path = parts(tmp_path, d="model-00002-of-00002.safetensors")
    with refused(path, "d is not in model-00002"):
        read_arrays(path)
    parts(tmp_path, d="none.safetensors")
    with pytest.raises(UserError, match=r"none\.safetensors does not exist"):
        read_arrays(path)
    for text in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", ""):
        path.write_text(text)
        with refused(path):
            read_arrays(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    arrays = some_arrays() | {"big": np.arange(5, dtype=">f4")}
    save(tmp_path / "a.npz", **arrays, bf16=np.arange(6).astype(BF16), nameless=np.arange(6).astype(BF16).view("V2"))
    assert_same(
        read_arrays(tmp_path / "a.npz"),
        arrays | {"big": np.arange(5, dtype=np.float32), "bf16": np.arange(6).astype(BF16), "nameless": np.arange(6).astype(BF16)},
    )


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(path: Path, method=zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def test_npz_of_other_writers(tmp_path):
    old = npy(np.ones((2, 3), np.float32)).replace(b"(2, 3), }", b"(2L, 3L)}")  # of Python 2
    second = bytearray(npy(np.ones((2, 3), np.float32)))
    second[6:10] = b"\2\0" + struct.pack("<I", len(second) - 24 - 10)[:2]
    second[10:10] = b"\0\0"
    read = read_arrays(npz(tmp_path / "a.npz", old=old, second=bytes(second)))
    assert_same(read, {name: np.ones((2, 3), np.float32) for name in ("old", "second")})


class Touches:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_npz_with_pickles_is_refused_and_nothing_runs(tmp_path):
    path, marker = tmp_path / "a.npz", tmp_path / "marker"
    objects = np.empty(1, object)
    objects[0] = Touches(marker)
    np.savez(path, good=np.ones(3), bad=objects)
    with refused(path, "Python objects as bad"):
        read_arrays(path)
    np.savez(path, bad=np.zeros(1, [("a", "f4"), ("b", object)]))
    with refused(path, "Python objects as bad"):
        read_arrays(path)
    with refused(npz(path, bad=pickle.dumps(Touches(marker))), "bad is not in NumPy's format"):
        read_arrays(path)
    assert not marker.exists()


def with_header(**changes) -> bytes:
    """Six float32 zeros under a .npy header that says something else."""
    header = {"descr": "'<f4'", "fortran_order": "False", "shape": "(2, 3)"} | changes
    text = "{" + ", ".join(f"'{key}': {value}" for key, value in header.items()) + ", }\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + SIX


ARRAYS = {
    "complex": npy(np.ones(3, complex)),
    "text": npy(np.array(["a"])),
    "bytes": npy(np.array([b"a"])),
    "dates": npy(np.array(["2024-01-01"], "datetime64[D]")),
    "records": npy(np.zeros(2, [("a", "f4")])),
    "void of three": npy(np.zeros(2, "V3")),
    "8-bit floats": npy(np.zeros(2, ml_dtypes.float8_e4m3fn)),
    "long doubles": npy(np.zeros(2, np.longdouble)),
    "another shape": with_header(shape="(2, 4)"),
    "a huge shape": with_header(shape="(999999999999999, 999999999999999)"),
    "a shape of many digits": with_header(shape="(" + "9" * 3000 + ",)"),
    "digits without an end": with_header(shape="(" + "1" * 3000),
    "a negative shape": with_header(shape="(-2, -3)"),
    "many axes": with_header(shape="(" + "1, " * 100 + ")"),
    "code as shape": with_header(shape="(__import__('os').getpid(),)"),
    "nesting": with_header(shape="(" * 3000),
    "minus signs": with_header(shape="-" * 3000 + "1"),
    "a pickle's type": with_header(descr="'|O'"),
    "a key more": with_header(more="1"),
    "nothing": b"",
    "the magic alone": b"\x93NUMPY",
    "an old version": b"\x93NUMPY\0\0" + with_header()[8:],
    "a header beyond the end": b"\x93NUMPY\1\0\xff\xff" + with_header()[10:],
    "a header of 4 GiB": b"\x93NUMPY\2\0\xff\xff\xff\xff" + with_header()[10:],
    "no NumPy": b"\0" * 100,
}


@pytest.mark.parametrize("fault", ARRAYS)
def test_hostile_members_of_npz(tmp_path, fault):
    assert read_arrays(npz(tmp_path / "a.npz", good=with_header()))["good"].shape == (2, 3)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = npz(tmp_path / "a.npz", method, good=with_header(), bad=ARRAYS[fault])
        with refused(path, "bad"):
            read_arrays(path)


def packed(size: int, claimed: int) -> bytes:
    """An .npz whose only member packs `size` zero bytes and claims to have `claimed`."""
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = b"".join(zeros.compress(bytes(min(1 << 20, size - done))) for done in range(0, size, 1 << 20)) + zeros.flush()
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(content), claimed, 5, 0)
    local = b"PK\3\4" + common + b"a.npy" + content
    central = b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + b"a.npy"
    return local + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


def test_zip_bombs(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(packed(300 << 20, 300 << 20))  # a thousandth of its size
    with refused(path, "would unpack to 314,572,800"):
        read_arrays(path)
    path.write_bytes(packed(300 << 20, 1000))  # more in it than it claims
    with refused(path, "checksum"):
        read_arrays(path)
    path.write_bytes(packed(10, 2**32 - 2))
    with refused(path, "would unpack to 4,294,967,294"):
        read_arrays(path)
    with zipfile.ZipFile(path, "w") as archive:  # nested: a member is never looked into
        archive.writestr("a.npy", packed(1 << 20, 1 << 20))
    with refused(path, "a is not in NumPy's format"):
        read_arrays(path)


def test_members_that_share_bytes(tmp_path):
    content = npz(tmp_path / "a.npz", a=npy(np.ones(100))).read_bytes()
    local = content[: content.index(b"PK\1\2")]
    central = content[len(local) : content.index(b"PK\5\6")]
    central += central.replace(b"a.npy", b"b.npy")
    (tmp_path / "a.npz").write_bytes(local + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 2, 2, len(central), len(local), 0))
    with refused(tmp_path / "a.npz", "does not lie where"):
        read_arrays(tmp_path / "a.npz")


def test_odd_archives(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"no zip at all, whatever its name says")
    with refused(path, "no zip archive"):
        read_arrays(path)
    with refused(npz(path, zipfile.ZIP_BZIP2, a=npy(np.ones(3))), "unusual method"):
        read_arrays(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with refused(path, "readme.txt"):
        read_arrays(path)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(np.ones(3)))
        archive.writestr("a.npy", npy(np.ones(3)))
    with refused(path, "two members"):
        read_arrays(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../a.npy", npy(np.ones(3)))
    assert list(read_arrays(path)) == ["../../a"]  # a name like any other: nothing is unpacked to disk
    content = npz(path, a=npy(np.ones(300))).read_bytes()
    path.write_bytes(content.replace(np.ones(1).tobytes(), np.zeros(1).tobytes(), 1))
    with refused(path, "checksum"):
        read_arrays(path)


def test_files_of_torch(tmp_path):
    six = np.arange(6, dtype=np.float32)
    for suffix in ("pth", "pyth", "pt", "bin", "ckpt", "pth.tar"):
        path = write_zip(tmp_path / f"a.{suffix}", state_dict(**{"module.a": tensor()}), {"0": six.tobytes()})
        assert_same(read_arrays(path), {"a": six.reshape(2, 3)})
    lines = []
    program = b"\x80\x02}(X\5\0\0\0model" + state_dict(a=tensor())[2:-1] + b"X\5\0\0\0epochK\3u."
    read_arrays(write_legacy(tmp_path / "a.pth", program, {"0": six}), lines.append)
    assert lines == [f"{tmp_path / 'a.pth'}: the weights are those under model; beside them it holds epoch"]
    with refused(write_zip(tmp_path / "b.pth", b"\x80\x02}."), "no tensors"):
        read_arrays(tmp_path / "b.pth")


def test_folders(tmp_path):
    def folder(*names):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        for name in names:
            (place / name).touch()
        return place

    for names, found in (
        (["model.safetensors", "pytorch_model.bin", "training_args.bin", "config.json"], "model.safetensors"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "model.safetensors.index.json"),
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], "open_clip_model.safetensors"),
        (["vit.safetensors", "pytorch_model.bin"], "vit.safetensors"),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "pytorch_model.bin"),
        (["TimeSformer_divST_8x32_224_K400.pyth", "readme.txt"], "TimeSformer_divST_8x32_224_K400.pyth"),
        (["B_16.npz"], "B_16.npz"),
    ):
        assert find_weights(folder(*names)).name == found
    for names in (["model.safetensors", "open_clip_model.safetensors"], ["a.safetensors", "b.safetensors"], ["a.npz", "b.pth"]):
        place = folder(*names)
        with refused(place, *names):
            read_arrays(place)
    for place in (folder(), folder("readme.txt"), folder("pytorch_model-00001-of-00002.bin")):
        with refused(place, "neither a run"):
            read_arrays(place)


def test_what_is_no_weights_file(tmp_path):
    with refused(tmp_path / "none.safetensors", "does not exist"):
        read_arrays(tmp_path / "none.safetensors")
    for name in ("a.safetensors", "a.npz", "a.pth", "model.safetensors.index.json"):
        (tmp_path / name).touch()
        with refused(tmp_path / name, "is empty"):
            read_arrays(tmp_path / name)
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with refused(tmp_path / "tf_model.h5", ".safetensors", ".npz", ".pyth"):
        read_arrays(tmp_path / "tf_model.h5")
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    with refused(tmp_path / "pipe.safetensors", "no regular file"):
        read_arrays(tmp_path / "pipe.safetensors")


def test_sidecars(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    expected = {"config": {"model_type": "dinov2"}, "preprocessor": {}}
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"):
        assert read_sidecars(path) == expected
    assert read_sidecars(tmp_path / "dino.pth") == {"config": {}, "preprocessor": {}}  # the config may be of another model
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224}')
    assert read_sidecars(tmp_path) == expected | {"preprocessor": {"size": 224}}
    for text in ("{", "[]", "", '"x"', '{"a": 1, "a": 2}', '{"a":' * 100_000, " " * (17 << 20)):
        (tmp_path / "config.json").write_text(text)
        with refused(tmp_path / "config.json"):
            read_sidecars(tmp_path)


def test_finite():
    arrays = some_arrays() | {"bf16": np.ones(3, BF16)}
    check_finite(arrays)
    for dtype in (np.float64, np.float32, np.float16, BF16):
        for value in (np.nan, np.inf, -np.inf):
            with pytest.raises(UserError, match=r"^a\.pth: 4 of 21 arrays hold NaN or infinity: bad0, bad1, bad2, \.\.\.: "):
                check_finite(arrays | {f"bad{n}": np.array([1, value]).astype(dtype) for n in range(4)}, "a.pth")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "packed", "index", "config"])
def test_any_damage_is_a_line(tmp_path, kind):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.float16), "c": np.array([True, False])}
    read = read_arrays
    match kind:
        case "safetensors":
            path = tmp_path / "a.safetensors"
            save_file(arrays, path)
        case "npz" | "packed":
            path = tmp_path / "a.npz"
            (np.savez if kind == "npz" else np.savez_compressed)(path, **arrays)
        case "index":
            path = parts(tmp_path)
        case "config":
            path = tmp_path / "config.json"
            path.write_text('{"hidden_size": 768, "id2label": {"0": "abseiling"}, "layer_norm_eps": 1e-12}')
            read = lambda path: read_sidecars(path.parent)  # noqa: E731
    survives(read, path, path.read_bytes(), seed=7)
