"""Packed datasets: the same frames at the same times, TFDS reads what was written, killed runs go on, and remote shards read by their URL."""

import fcntl
import io
import json
import os
import pickle
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.data.listed import faults, opened
from tests.data.test_video import HEIGHT, WHOLE, WIDTH, numbered, numbers, write
from vidjoint import check_data, config, evaluate, pack, validate
from vidjoint.data import packed, shards
from vidjoint.data.decode import DecodeError
from vidjoint.data.encode import Encoding, encode_image, encode_video
from vidjoint.data.examples import ClipSpec, training_clip
from vidjoint.data.image import read_image
from vidjoint.data.sources import open_source
from vidjoint.data.transforms import Geometry
from vidjoint.data.video import Video
from vidjoint.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

# Frames and their times

UNEVEN = np.concatenate([[0], np.cumsum(np.random.default_rng(3).integers(10, 60, 79))])
FILMS = {  # name of the file -> how it is written; 80 frames each
    "gop30.mp4": {"gop": 30},
    "variable.mp4": {"gop": 40, "stamps": UNEVEN},
    "variable_late.mp4": {"gop": 12, "stamps": 3000 + UNEVEN},  # an edit list, and B-frames that are shown after it
    "fragmented.mp4": {"gop": 30, "movflags": "frag_keyframe+empty_moov"},
    "variable.mkv": {"gop": 12, "stamps": UNEVEN},
    "b_frames.avi": {"codec": "mpeg4", "gop": 12},
    "gop30.ts": {"gop": 30},
}

LATE = ("variable.mp4", "variable_late.mp4", "b_frames.avi")  # their headers claim to end before the last frame is shown


@pytest.mark.parametrize("name", FILMS)
def test_the_same_frame_at_any_time(tmp_path, name):
    file = tmp_path / name
    write(file, [numbered(i) for i in range(80)], **FILMS[name])
    content = encode_video(str(file), Encoding())
    with Video(file) as ours, Video(content) as theirs:
        late = 0.1 if name in LATE else 0
        assert -2e-6 <= theirs.info.duration - ours.info.duration <= 2e-6 + late and theirs.info.frames == 80
        assert (theirs.info.width, theirs.info.height) == (WIDTH, HEIGHT)
        times = np.random.default_rng(0).uniform(-0.1, ours.info.duration + 0.1, 150)
        assert numbers(theirs.read(times, WHOLE)) == numbers(ours.read(times, WHOLE))
    with Video(content) as theirs:
        theirs.read(np.array([1.9]), WHOLE)
        assert theirs.decoded <= 2 + Encoding().gop
    with av.open(io.BytesIO(content)) as container:
        assert [stream.type for stream in container.streams] == ["video"] and container.streams.video[0].codec.name == "h264"
    assert content == encode_video(file.read_bytes(), Encoding())


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_upright_and_shrunk(tmp_path, degrees, mirrored):
    coarse = np.random.default_rng(1).integers(0, 256, (3, 5, 3), np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((160, 96), Image.Resampling.BICUBIC))
    write(tmp_path / "turned.mp4", [picture] * 3, matrix=(degrees, mirrored, False))
    content = encode_video(str(tmp_path / "turned.mp4"), Encoding(short_side=48))
    with av.open(io.BytesIO(content)) as container:  # the pixels are turned: readers that know of no rotation see it too
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    with Video(tmp_path / "turned.mp4") as video:
        size = (80, 48) if degrees in (90, 270) else (48, 80)
        original = video.read(np.zeros(1), Geometry(size, 0, 0, *size))[0]
    assert stored.shape[:2] == size and np.abs(stored.astype(int) - original).mean() < 5


@pytest.mark.parametrize(("full", "space"), [(False, 1), (True, 1), (False, 6), (True, 5)])  # 1: BT.709, 5 and 6: BT.601
def test_colours_stay(tmp_path, full, space):
    planes = np.random.default_rng(2).integers(20, 230, (3, 4, 4), np.uint8).repeat(16, 1).repeat(16, 2)
    frame = av.VideoFrame.from_ndarray(
        np.concatenate([planes[0].ravel(), *(plane[::2, ::2].ravel() for plane in planes[1:])]).reshape(96, 64), "yuv420p"
    )
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 2 if full else 1, space
        frame.color_range, frame.colorspace = 2 if full else 1, space
        for i in range(3):
            frame.pts, frame.time_base = i, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    whole = Geometry((64, 64), 0, 0, 64, 64)
    with Video(tmp_path / "a.mp4") as ours, Video(encode_video(str(tmp_path / "a.mp4"), Encoding(crf=5))) as theirs:
        a, b = (video.read(np.zeros(1), whole)[0].astype(int) for video in (ours, theirs))
    assert np.abs(a - b).mean() < 1.5 and np.abs((a - b).mean((0, 1))).max() < 0.7


def test_odd_sides_and_moving_pictures(tmp_path):
    frames = [Image.fromarray(np.full((17, 23, 3), level, np.uint8)) for level in (20, 120, 220)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100, 300, 100])
    with Video(encode_video(str(tmp_path / "a.gif"), Encoding())) as video:
        assert (video.info.width, video.info.height) == (22, 16)
        seen = video.read(np.array([0.05, 0.15, 0.35, 0.45]), Geometry((16, 22), 0, 0, 16, 22)).mean((1, 2, 3))
    np.testing.assert_allclose(seen, [20, 120, 120, 220], atol=3)


def test_damage_is_an_error(tmp_path):
    write(tmp_path / "a.mp4", [numbered(i) for i in range(90)], gop=12, movflags="faststart")
    data = (tmp_path / "a.mp4").read_bytes()
    for broken in (data[: len(data) // 3], b"no video", b""):
        with pytest.raises(DecodeError) as caught:
            encode_video(broken, Encoding())
        assert "\n" not in str(caught.value)


def picture(kind="PNG", size=(60, 40), **options) -> bytes:
    buffer = io.BytesIO()
    coarse = Image.fromarray(np.random.default_rng(4).integers(0, 256, (4, 6, 3), np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures():
    how = Encoding(short_side=40)

    def pixels(content):
        return read_image(content, lambda height, width: Geometry((height, width), 0, 0, height, width))[0].astype(int)

    for kind in ("PNG", "JPEG", "WEBP"):
        assert encode_image(picture(kind), how) == picture(kind)  # small enough: as it is
    exif = Image.Exif()
    exif[0x0112] = 6
    for content, size in ((picture("BMP"), (40, 60)), (picture("JPEG", exif=exif), (60, 40)), (picture("PNG", (301, 200)), (40, 60))):
        got = encode_image(content, how)
        with Image.open(io.BytesIO(got)) as image:
            assert image.format == "JPEG" and image.size[::-1] == size and not image.getexif()
        wanted = read_image(content, lambda height, width, size=size: Geometry(size, 0, 0, *size), interpolation="bicubic")[0]
        assert np.abs(pixels(got) - wanted).mean() < 3
    for broken in (picture("JPEG")[:400], picture("PNG")[:300], b""):
        with pytest.raises(DecodeError):
            encode_image(broken, how)


# The command


@pytest.fixture
def films(tmp_path):
    """Seven clips of three classes, of which "five.mp4" is no video."""
    folder = tmp_path / "films"
    folder.mkdir()
    lines = []
    for i, name in enumerate(("zero", "one", "two", "three", "four", "five", "six")):
        write(folder / f"{name}.mp4", [numbered(20 * i + k) for k in range(20)], gop=20)
        lines.append(f"{name}.mp4 {'abc'[i % 3]}\n")
    (folder / "five.mp4").write_bytes(b"text")
    (tmp_path / "l.csv").write_text("".join(lines))
    (tmp_path / "val.csv").write_text("six.mp4 b\nfour.mp4 c\n")
    return tmp_path


def run(*arguments) -> int:
    return pack.main(["--workers=1", *map(str, arguments)])


def command(films, *more) -> int:
    return run(films / "l.csv", films / "out", f"--root={films / 'films'}", "--shard_size=3", *more)


def manifest(films) -> dict:
    return json.loads((films / "out/pack.json").read_text())


GOOD = ["zero.mp4", "one.mp4", "two.mp4", "three.mp4", "four.mp4", "six.mp4"]
CLASSES = [0, 1, 2, 0, 1, 0]


def test_packs_and_reads_back(films, capsys):
    before = {file.name: file.read_bytes() for file in (films / "films").iterdir()}
    assert command(films, f"--val={films / 'val.csv'}") == 1
    out = capsys.readouterr().out
    assert "BAD  five.mp4: " in out and "6 of 7 videos in 3 shards, 1 bad; read back and compared\n" in out and "2 of 2 videos" in out
    assert {file.name: file.read_bytes() for file in (films / "films").iterdir()} == before
    written = manifest(films)
    train = written["splits"]["train"]
    assert train["counts"] == [3, 2, 1] and train["shard_lengths"] == [3, 2, 1] and train["bad"][0]["path"] == "five.mp4" and train["finished"]
    assert written["labels"] == ["a", "b", "c"] and written["settings"]["gop"] == 8 and written["splits"]["val"]["counts"] == [0, 1, 1]
    assert not [file for file in (films / "out").rglob("*") if "unfinished" in file.name]

    data = tfds.builder_from_directory(films / "out").as_data_source()  # any reader of TFDS
    assert set(data) == {"train", "val"} and [example["path"].decode() for example in data["train"]] == GOOD
    assert [int(example["label"]) for example in data["train"]] == CLASSES
    for i in range(6):
        with Video(bytes(data["train"][i]["video"])) as video:
            assert numbers(video.read(np.array([0.51]), WHOLE)) == [20 * (i + (i == 5)) + 15]

    assert command(films, f"--val={films / 'val.csv'}", "--allow_bad") == 0  # nothing is left to do: only read back
    assert manifest(films) == written
    assert check_data.main([str(films / "out"), f"--json={films / 'report.json'}"]) == 0
    report = json.loads((films / "report.json").read_text())
    assert report["good"] == 8 and report["classes"] == {"a": 3, "b": 3, "c": 2} and report["media"] == {"video": 8}


def test_as_a_training_source(films, monkeypatch):
    assert command(films, f"--val={films / 'val.csv'}") == 1
    monkeypatch.chdir(films)
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(films / "out"), "/bucket/out", recursive=True)
    sources = [opened(root, source="packed", train=what) for root, what in ((films, "out"), ("", "out:train"), ("", f"file://{films}/out"))]
    sources.append(opened("", source="packed", train="memory://bucket/out:train", classes=3))
    for source in sources:
        assert source.labels == ("a", "b", "c") and source.records.targets.tolist() == CLASSES and not source.warnings and source.missing == 0
        again = pickle.loads(pickle.dumps(source))
        assert [again.name(i).rpartition("/")[2] for i in range(6)] == GOOD
        for i in range(6):
            assert again[i] == source[i] and source[i]["video"] == sources[0][i]["video"] and source[i]["label"] == CLASSES[i]
    val = opened("", "val", source="packed", train="memory://bucket/out", val="memory://bucket/out")
    assert len(val) == 2 and val.origin == "packed memory://bucket/out:val" and val[1]["label"] == 2
    held = opened(films, "val", source="packed", train="out", fold="1/3"), opened(films, source="packed", train="out", fold="1/3")
    assert sorted(source.name(i) for source in held for i in range(len(source))) == sorted(sources[0].name(i) for i in range(6))

    spec = ClipSpec(config.task_config(), 4, (32, 32), 1 << 20)
    clip = training_clip(sources[3][2], spec, np.random.default_rng(0))
    assert clip.shape == (4, 32, 32, 3) and clip.any()
    whole = config.base_config()
    whole.total_steps = 1
    whole.tasks.films = config.task_config(source="packed", train="out", val="out")
    assert validate.check(whole) == []
    whole.tasks.films.source = "csv"
    evaluate.use_data(whole, "films", ("a", "b", "c"), str(films / "out"), "", str(films))
    assert whole.tasks.films.source == "packed" and whole.tasks.films.val == str(films / "out")
    whole.tasks.films.source = "csv"
    evaluate.use_data(whole, "films", ("a", "b", "c"), "out:train", "", str(films))
    assert whole.tasks.films.source == "packed" and len(open_source("films", whole.tasks.films, "val", "")) == 6
    assert check_data.main(["out:train", "--json=report.json"]) == 0
    assert json.loads((films / "report.json").read_text())["classes"] == {"a": 3, "b": 2, "c": 1}
    assert check_data.main(["out:dev"]) == 2
    (films / "out").rename(films / "out:v2")
    assert check_data.main(["out:v2"]) == check_data.main(["out:v2:train"]) == 0
    memory.rm("/bucket", recursive=True)


def test_faults_of_a_source(films):
    assert command(films, "--allow_bad") == 0
    changes = {"source": "packed"}
    assert "holds videos: set media=video" in faults(films, train="out", media="image", **changes)[0]
    assert "classes=4, but out has 3" in faults(films, train="out", classes=4, **changes)[0]
    assert "multilabel=False: set it so" in faults(films, train="out", multilabel=True, **changes)[0]
    assert "has no split 'dev': choose one of train" in faults(films, train="out:dev", **changes)[0]
    for what in ("films", "nowhere", f"file://{films}/films", "memory://nothing"):
        assert "has no pack.json" in faults(films, train=what, **changes)[0]
    assert "can't be opened" in faults(films, train="nothing://there", **changes)[0]
    (films / "out/index-train.npz").unlink()
    assert "run python -m vidjoint.pack again" in faults(films, train="out", **changes)[0]
    written = manifest(films)
    written["splits"]["train"]["finished"] = False
    (films / "out/pack.json").write_text(json.dumps(written))
    assert "has not finished" in faults(films, train="out", **changes)[0]
    (films / "out/pack.json").write_text("{")
    assert "is damaged" in faults(films, train="out", **changes)[0]


def test_a_killed_run_goes_on(films, monkeypatch, capsys):
    calls, encode = [], shards.encode

    def slow(source, row, how):
        calls.append(row)
        if row == 4 and calls.count(4) == 1:
            raise KeyboardInterrupt
        return encode(source, row, how)

    monkeypatch.setattr(shards, "encode", slow)
    assert command(films) == 130
    kept = sorted(file.name for file in (films / "out").glob("packed*"))
    assert kept == ["packed-train.array_record-00000-of-00003"]  # the second is not whole: it has not got its name
    assert list((films / "out").glob(".unfinished*")) and "has not finished" in faults(films, source="packed", train="out")[0]
    stamp = (films / "out" / kept[0]).stat().st_mtime_ns
    calls[:] = [4]
    assert command(films) == 1
    assert set(calls[1:]) == {3, 4, 5, 6} and (films / "out" / kept[0]).stat().st_mtime_ns == stamp
    written = {file.name: file.read_bytes() for file in (films / "out").glob("packed*")}
    (films / "out").rename(films / "before")
    assert command(films, "--workers=2") == 1  # and in processes
    assert {file.name: file.read_bytes() for file in (films / "out").glob("packed*")} == written


def test_refusals(films, capsys):
    assert command(films) == 1
    for more, part in ((["--gop=4"], '"gop": 8'), (["--keep"], "settings was"), (["--shard_size=2"], "shard_size was 3, now 2")):
        assert command(films, *more) == 2
        assert part in (error := capsys.readouterr().err) and error.count("\n") == 1 and "name another folder" in error
    (films / "l.csv").write_text((films / "l.csv").read_text().replace("two.mp4 c", "two.mp4 a"))
    assert command(films) == 2
    assert "the train list has changed" in capsys.readouterr().err
    assert run(films / "l.csv", films / "films", f"--root={films / 'films'}") == 2
    assert "is not empty and was not written by" in capsys.readouterr().err
    assert run(films / "l.csv", "gs://bucket/out") == 2 and "pack into a local folder" in capsys.readouterr().err
    assert run(films / "l.csv", films / "o", "--crf=70", "--preset=quick", "--gop=0") == 2 and capsys.readouterr().err.count("error: ") == 3
    assert run(films / "none.csv", films / "o") == 2 and "does not exist" in capsys.readouterr().err
    (films / "busy").mkdir()
    descriptor = os.open(films / "busy", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run(films / "l.csv", films / "busy", f"--root={films / 'films'}") == 2
    os.close(descriptor)
    assert "another run" in capsys.readouterr().err
    (films / "l.csv").write_text("five.mp4 a\n")
    assert run(films / "l.csv", films / "p", f"--root={films / 'films'}") == 2 and "can be used" in capsys.readouterr().err


def test_damage_is_found_and_mended(films, capsys):
    assert command(films) == 1
    shard = films / "out/packed-train.array_record-00001-of-00003"
    source = opened(films, source="packed", train="out")
    content, data = source[3]["video"], bytearray(shard.read_bytes())
    place = data.index(content[100:140])
    data[place] ^= 1
    shard.write_bytes(data)
    packed.open_shard.cache_clear()
    with pytest.raises(DecodeError, match="wrong checksum"):
        source[3]
    assert source[2]["label"] == 2
    assert command(films) == 2
    assert f"{shard}: three.mp4: " in (error := capsys.readouterr().err) and "Remove this shard and run the command again" in error
    shard.unlink()
    packed.open_shard.cache_clear()
    assert command(films) == 1
    assert source[3]["video"] == content


def test_kept_pictures_with_many_labels(tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(5):
        (tmp_path / f"d/{i}.png").write_bytes(picture("PNG", (60 + i, 40)))
    (tmp_path / "d/3.png").write_bytes(b"broken")
    (tmp_path / "l.csv").write_text("0.png,x|y\n1.png,y\n2.png,z\n3.png,x\n4.png,z|x|y\n")
    arguments = [tmp_path / "l.csv", tmp_path / "out", f"--root={tmp_path / 'd'}", "--media=image", "--multilabel", "--shard_size=1"]
    assert run(*arguments, "--keep") == 1
    source = opened(tmp_path, source="packed", media="image", train="out", multilabel=True)
    assert source.label_shape == (3,) and [sorted(source[i]["label"].tolist()) for i in range(4)] == [[-1, 0, 1], [-1, -1, 1], [-1, -1, 2], [0, 1, 2]]
    assert [source[i]["image"] for i in range(4)] == [(tmp_path / f"d/{i}.png").read_bytes() for i in (0, 1, 2, 4)]
    data = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")  # one of its shards is empty
    assert [list(example["label"]) for example in data] == [[0, 1], [1], [2], [2, 0, 1]]
    assert check_data.main([str(tmp_path / "out")]) == 0


def test_folders(tmp_path):
    for name in ("b/0.png", "a/1.png", "a/x/2.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(picture("PNG", (600, 400)))
    assert run(tmp_path / "d", tmp_path / "out", "--media=image", "--short_side=64") == 0
    source = opened(tmp_path, source="packed", media="image", train="out")
    assert source.labels == ("a", "b") and [source.records.names[i] for i in range(3)] == ["a/1.png", "a/x/2.png", "b/0.png"]
    with Image.open(io.BytesIO(source[0]["image"])) as image:
        assert image.size == (96, 64) and image.format == "JPEG"


def test_a_list_of_absolute_and_relative_paths(tmp_path, monkeypatch):
    for name in ("d/0.png", "e/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(picture("PNG", (60, 40)))
    (tmp_path / "l.csv").write_text(f"d/0.png x\n{tmp_path / 'e/1.png'} y\n")
    monkeypatch.chdir(tmp_path)
    assert run("l.csv", "out", "--media=image", "--keep") == 0
    source = opened(tmp_path, source="packed", media="image", train="out")
    assert [source.records.names[i] for i in range(2)] == ["d/0.png", "e/1.png"] and manifest(tmp_path)["splits"]["train"]["folder"] == str(tmp_path)


# Places in shards


def test_every_place_in_a_shard(tmp_path):
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    rng = np.random.default_rng(0)
    block = packed.BLOCK - packed.BLOCK_HEADER
    sizes = [1, 0, 50, *(block + k for k in range(-60, 60, 7)), 2 * block, 3 * block + 5, *rng.integers(0, 200_000, 30)]
    records = [rng.bytes(int(size)) for size in sizes]
    file = tmp_path / "a.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    reader = ArrayRecordReader(str(file))
    data = file.read_bytes()
    for i, ((start, length), record) in enumerate(zip(packed.find_records(file, len(records)), records, strict=True)):
        skip = int(rng.integers(0, len(record) + 1))
        begin = packed.end_of(start, length - len(record) + skip)
        got = packed.read_through(lambda begin, end: data[begin:end], begin, len(record) - skip)
        assert got == record[skip:] and zlib.crc32(reader.read([i])[0]) == zlib.crc32(record)
    with pytest.raises(OSError, match="holds"):
        packed.find_records(file, len(records) + 100)


def test_remote_reads_are_tried_again(monkeypatch):
    monkeypatch.setattr(packed, "PAUSES", (0.0, 0.0))
    fails = [TimeoutError("slow"), ValueError("odd")]

    def cat_file(path, begin, end):
        if fails:
            raise fails.pop()
        return b"content"[begin:end]

    store = ConfigDict({"cat_file": cat_file})
    monkeypatch.setattr(packed, "_file_system", lambda url: (store, "bucket"))
    assert packed.read_range("s3://bucket", "a", 1, 3) == b"on"
    fails[:] = [TimeoutError("slow")] * 3
    with pytest.raises(OSError, match="slow"):
        packed.read_range("s3://bucket", "a", 1, 3)
    with pytest.raises(UserError, match="can't be opened"):
        monkeypatch.undo()
        packed.open_manifest("nothing://x")
