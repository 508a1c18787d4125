"""Every file here is made by the test and carries its frame numbers in its pictures, but for the last tests, which read real broken files."""

import io
import json
import os
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from vidjoint.data.decode import DecodeError
from vidjoint.data.image import read_image
from vidjoint.data.transforms import Geometry
from vidjoint.data.video import Video

SHARED = Path(os.environ.get("VIDJOINT_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
NASTY = SHARED / "nasty_video"
needs_nasty = pytest.mark.skipif(not NASTY.is_dir(), reason=f"no {NASTY}; VIDJOINT_SHARED_DATA says where it is")

WIDTH, HEIGHT, BLOCK = 80, 32, 16  # ten blocks: the bits of the frame number
WHOLE = Geometry((HEIGHT, WIDTH), 0, 0, HEIGHT, WIDTH)


def numbered(number: int) -> np.ndarray:
    bits = np.array([(number >> k) & 1 for k in range(10)], np.uint8).reshape(2, 5) * 255
    return bits.repeat(BLOCK, 0).repeat(BLOCK, 1)[..., None].repeat(3, 2)


def numbers(clip: np.ndarray) -> list[int]:
    """Reads the frame numbers back: uint8[T, HEIGHT, WIDTH, 3] -> T ints."""
    blocks = clip.reshape(len(clip), 2, BLOCK, 5, BLOCK, 3).mean((2, 4, 5)).reshape(len(clip), 10)
    assert np.all((blocks < 64) | (blocks > 191)), "a picture is a mixture of frames"
    return [int(sum(1 << k for k in range(10) if row[k] > 128)) for row in blocks]


def write(file, pictures, stamps=None, codec="libx264", rate=30, gop=30, b_frames=2, container=None, movflags="", matrix=None) -> None:
    """Writes pictures with the presentation times `stamps` (in units of 1/600 s; None: constant rate)."""
    options = {"movflags": movflags} if movflags else {}
    with av.open(file, "w", format=container, options=options) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        stream.options = {"g": str(gop), "bf": str(b_frames), "threads": "1"}
        if codec == "libx264":
            stream.options |= {"x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:qp=20"}
        if stamps is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        if matrix is not None:
            stream.set_display_rotation(*matrix)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i if stamps is None else int(stamps[i])
            frame.time_base = Fraction(1, rate) if stamps is None else Fraction(1, 600)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


KINDS = {  # name of the file -> how it is written; 300 frames each, at 30 per second where the rate is constant
    "gop12.mp4": {"gop": 12},
    "gop30.mp4": {"gop": 30},
    "gop250.mp4": {"gop": 250},
    "no_b_frames.mp4": {"gop": 12, "b_frames": 0},
    "variable.mp4": {"gop": 12, "stamps": True},
    "variable_long_gop.mp4": {"gop": 250, "stamps": True},
    "fragmented.mp4": {"gop": 30, "movflags": "frag_keyframe+empty_moov"},
    "fragmented_later.mp4": {"gop": 30, "movflags": "frag_keyframe"},
    "gop30.mkv": {"gop": 30},
    "variable.mkv": {"gop": 12, "stamps": True},
    "mpeg4.avi": {"codec": "mpeg4", "gop": 12, "b_frames": 0},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "gop": 12, "b_frames": 2},
    "h264.avi": {"gop": 12, "b_frames": 0},
    "h264_b_frames.avi": {"gop": 12},
    "gop30.ts": {"gop": 30},
    "gop30.flv": {"gop": 30},
}


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    """Name -> (file, the time in seconds at which each of its frames appears)."""
    folder, made = tmp_path_factory.mktemp("videos"), {}
    pictures = [numbered(i) for i in range(300)]
    gaps = np.random.default_rng(3).integers(10, 60, 299)
    stamps = np.concatenate([[0], np.cumsum(gaps)])
    for name, how in KINDS.items():
        variable = how.get("stamps")
        write(folder / name, pictures, **{**how, "stamps": stamps if variable else None})
        made[name] = (folder / name, stamps / 600 if variable else np.arange(300) / 30)
    return made


def within(appear: np.ndarray, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Times at which the given frames are shown, clear of their ends (containers round times to a millisecond)."""
    ends = np.append(appear[1:], appear[-1] + 1 / 30)
    return appear[frames] + rng.uniform(0.1, 0.9, len(frames)) * (ends - appear)[frames]


@pytest.mark.parametrize("name", KINDS)
def test_right_frames(files, name):
    file, appear = files[name]
    rng = np.random.default_rng(0)
    for count in (1, 3, 8, 40):
        wanted = rng.integers(0, 300, count)  # any order, repeats included
        with Video(file) as video:
            assert numbers(video.read(within(appear, wanted, rng), WHOLE)) == wanted.tolist()
            again = rng.integers(0, 300, 4)  # and back
            assert numbers(video.read(within(appear, again, rng), WHOLE)) == again.tolist()


@pytest.mark.parametrize("name", KINDS)
def test_info(files, name):
    file, appear = files[name]
    with Video(file) as video:
        info = video.info
    assert (info.width, info.height) == (WIDTH, HEIGHT)
    assert info.duration == pytest.approx(appear[-1] + 1 / 30, abs=0.11)
    if name != "variable.mkv":  # Matroska holds no count, and a rate only where it is constant
        assert info.frames == pytest.approx(300, abs=12)
        assert info.fps == pytest.approx(300 / info.duration, rel=0.05)


def test_made_up_stamps_do_not_shorten_a_video(files):
    """The decoder holds two frames back before it gives the first one; the video is as long all the same."""
    with Video(files["h264_b_frames.avi"][0]) as video:
        assert video.info.duration == pytest.approx(10.0, abs=1e-6)
        assert numbers(video.read(np.array([0.0, 9.99]), WHOLE)) == [0, 299]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_last_frames_count_where_the_header_forgets_them(tmp_path, codec):
    """Packets without durations, slower at the end: the header adds up times of decoding, which end before the last frames are shown."""
    stamps = np.cumsum([0] + [12] * 54 + [90] * 5)
    write(tmp_path / "slow_end.mp4", [numbered(i) for i in range(60)], stamps=stamps, codec=codec)
    with Video(tmp_path / "slow_end.mp4") as video:
        assert video.info.duration == pytest.approx((stamps[-1] + 90) / 600, abs=0.11)
        assert numbers(video.read(stamps / 600, WHOLE)) == list(range(60))


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 0), ("libx264", 2), ("mpeg4", 0), ("mpeg4", 2)])
def test_avi_with_dropped_frames(tmp_path, codec, b_frames):
    """As recorders of screens write them: a picture that is like the one before is an empty chunk, which the header counts."""
    stamps = 20 * np.cumsum([0] + [1, 2, 3, 4, 5] * 8)  # of 121 pictures 41 are there
    write(tmp_path / "dropped.avi", [numbered(i) for i in range(41)], stamps=stamps, codec=codec, b_frames=b_frames, gop=12)
    with Video(tmp_path / "dropped.avi") as video:
        assert video.info.frames == 41
        assert video.info.duration == pytest.approx(stamps[-1] / 600, abs=0.3)
        assert numbers(video.read(stamps[:39] / 600 + 0.01, WHOLE)) == list(range(39))  # when the last ones come, B-frames leave open
        assert numbers(video.read(stamps[20:10:-1] / 600 + 0.01, WHOLE)) == list(range(20, 10, -1))


def test_avi_with_dropped_frames_beside_sound(tmp_path):
    """After a jump FFmpeg counts empty chunks twice that lie between the sound before the keyframe and the keyframe."""
    file, stamps = tmp_path / "sound.avi", np.cumsum([0] + [1, 2, 3, 4, 5] * 24)  # in 1/30 s
    with av.open(file, "w") as out:
        sound, stream = out.add_stream("pcm_s16le", rate=8000, layout="mono"), out.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.options = WIDTH, HEIGHT, "yuv420p", {"g": "12"}
        for i, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            frame.pts, frame.time_base = int(stamp), Fraction(1, 30)
            out.mux(stream.encode(frame))
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * (i % 5 + 1) // 30), np.int16), format="s16", layout="mono")
            heard.sample_rate, heard.pts = 8000, int(stamp) * 8000 // 30
            out.mux(sound.encode(heard))
        out.mux([*stream.encode(None), *sound.encode(None)])
    for wanted in (np.arange(3, 120, 16), np.arange(118, 0, -7)):
        with Video(file) as video:
            assert numbers(video.read(stamps[wanted] / 30 + 0.01, WHOLE)) == wanted.tolist()


def test_times_outside_and_on_the_stamps(files):
    file, appear = files["variable.mp4"]
    with Video(file) as video:
        assert numbers(video.read(np.array([-1.0, 0.0, 1e6, 99.0]), WHOLE)) == [0, 0, 299, 299]
        assert numbers(video.read(appear, WHOLE)) == list(range(300))
        assert numbers(video.read(appear[1:] - 1e-3, WHOLE)) == list(range(299))
        assert numbers(video.read(appear[::-30], WHOLE)) == list(range(299, -1, -30))
        assert video.read(np.empty(0), WHOLE).shape == (0, HEIGHT, WIDTH, 3)
        for times in (np.array([np.nan]), np.array([np.inf])):
            with pytest.raises(ValueError):
                video.read(times, WHOLE)


@pytest.mark.parametrize(("name", "most"), [("gop12.mp4", 40), ("gop30.mkv", 80), ("mpeg4.avi", 40), ("variable.mp4", 40), ("gop250.mp4", 275)])
def test_seeks_when_that_is_cheaper(files, name, most):
    file, appear = files[name]
    wanted = np.array([100, 270])
    with Video(file) as video:
        assert numbers(video.read(within(appear, wanted, np.random.default_rng(0)), WHOLE)) == [100, 270]
        assert video.decoded <= most


def test_plays_on_when_no_keyframe_lies_between(files):
    file, appear = files["gop30.mp4"]
    wanted = np.arange(61, 89)
    with Video(file) as video:
        assert numbers(video.read(within(appear, wanted, np.random.default_rng(0)), WHOLE)) == wanted.tolist()
        assert video.decoded <= 1 + 30  # the first frame of the file, then one group of pictures


def test_time_starts_at_the_first_displayed_frame(tmp_path):
    stamps = 3000 + 20 * np.arange(60)  # 5 s late
    for name in ("late.mkv", "late.mp4", "late.ts"):
        write(tmp_path / name, [numbered(i) for i in range(60)], stamps=stamps, gop=12)
        with Video(tmp_path / name) as video:
            assert video.info.duration == pytest.approx(2.0, abs=0.05), name
            assert numbers(video.read(np.array([0.01, 0.51, 1.99]), WHOLE)) == [0, 15, 59], name


def test_unknown_duration_is_found(tmp_path):
    with open(tmp_path / "live.mkv", "wb") as out:
        pipe = SimpleNamespace(write=out.write)  # cannot be rewound, so the header never learns the duration, nor is there an index
        write(pipe, [numbered(i) for i in range(75)], container="matroska")
    with av.open(str(tmp_path / "live.mkv")) as container:
        assert not container.duration and not container.streams.video[0].duration
    with Video(tmp_path / "live.mkv") as video:
        assert video.info.duration == pytest.approx(2.5, abs=0.04)
        assert video.info.frames == 75
        assert numbers(video.read(np.array([2.4]), WHOLE)) == [72]


def test_one_frame(tmp_path):
    write(tmp_path / "one.mp4", [numbered(7)])
    with Video(tmp_path / "one.mp4") as video:
        assert video.info.frames == 1 and video.info.duration > 0
        assert numbers(video.read(np.linspace(0, 3, 4), WHOLE)) == [7] * 4


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation(tmp_path, degrees, mirrored):
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 2, (3, 4, 1), dtype=np.uint8).repeat(16, 0).repeat(16, 1).repeat(3, 2) * 255
    write(tmp_path / "turned.mp4", [picture] * 3, matrix=(degrees, mirrored, False))
    upright = np.rot90(picture, degrees // 90)  # counter-clockwise, then mirrored
    upright = upright[:, ::-1] if mirrored else upright
    height, width = upright.shape[:2]
    with Video(tmp_path / "turned.mp4") as video:
        assert (video.info.height, video.info.width) == (height, width)
        whole = video.read(np.array([0.0]), Geometry((height, width), 0, 0, height, width))[0]
        part = video.read(np.array([0.0]), Geometry((height, width), 5, 8, 30, 20, flip=True))[0]
    assert np.abs(whole.astype(int) - upright).mean() < 8
    assert np.array_equal(part, whole[5:35, 8:28][:, ::-1])


def test_resizing_averages(files):
    with Video(files["gop30.mp4"][0]) as video:
        small = video.read(np.array([(21 + 0.5) / 30]), Geometry((2, 5), 0, 0, 2, 5))
    assert np.array_equal(small[0, :, :, 0] > 128, numbered(21)[::BLOCK, ::BLOCK, 0] > 128)
    with Video(files["gop30.mp4"][0]) as video, pytest.raises(ValueError):
        video.read(np.array([0.0]), Geometry((32, 80), 1, 0, 32, 80))


@pytest.mark.parametrize("name", ["-i.mp4", "ünïcode 名前.mp4", "%03d.mp4", "concat:a.mp4", "http:a.mp4", "file:a.mp4", "a\nb.mp4", "no_extension"])
def test_any_file_name(files, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data = files["gop12.mp4"][0].read_bytes()
    Path(name).write_bytes(data)
    for file in (name, Path(name), str(tmp_path / name), data):
        with Video(file) as video:
            assert numbers(video.read(np.array([5.01]), WHOLE)) == [150]


def refusal(file, read=Video, **settings) -> str:
    with pytest.raises(DecodeError) as caught:
        read(file, **settings)
    assert caught.value.__cause__ is None
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_what_is_no_video(files, tmp_path):
    file = files["gop12.mp4"][0]
    assert "No such file" in refusal(tmp_path / "missing.mp4")
    assert "not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")
    refusal("with\0zero")
    refusal("http://127.0.0.1/a.mp4")
    refusal(b"")
    refusal(b"just text " * 1000)
    refusal(np.random.default_rng(0).bytes(100_000))
    sound = io.BytesIO()
    with wave.open(sound, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(8000))
    assert "audio" in refusal(sound.getvalue())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{file}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    refusal(tmp_path / "list.m3u8")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {file.name}\n")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    refusal(tmp_path / "list.ffconcat")


def test_pixel_limit(files):
    file = files["gop12.mp4"][0]
    assert "80 x 32" in refusal(file, max_pixels=WIDTH * HEIGHT - 1)
    with Video(file, max_pixels=WIDTH * HEIGHT) as video:
        assert video.info.width == WIDTH


def test_damage_matters_only_where_frames_are_wanted(tmp_path):
    write(tmp_path / "whole.mp4", [numbered(i) for i in range(300)], gop=12, movflags="faststart")
    data = (tmp_path / "whole.mp4").read_bytes()
    with av.open(io.BytesIO(data)) as container:
        place = next(p.pos for p in container.demux(video=0) if p.pts is not None and p.pts * p.time_base >= 5)
    damaged = data[:place] + b"\xff" * 4000 + data[place + 4000 :]
    with Video(damaged) as video:
        assert numbers(video.read(np.array([0.01, 3.01]), WHOLE)) == [0, 90]
        with pytest.raises(DecodeError):
            video.read(np.array([0.01, 5.3]), WHOLE)
        assert numbers(video.read(np.array([0.01, 3.01]), WHOLE)) == [0, 90]
    cut = data[: len(data) * 2 // 3]
    with Video(cut) as video:
        assert numbers(video.read(np.array([0.01, 3.01]), WHOLE)) == [0, 90]


def test_mutated_files_raise_nothing_else(files):
    rng = np.random.default_rng(5)
    for name in ("gop12.mp4", "gop30.mkv", "mpeg4_b_frames.avi", "gop30.ts", "fragmented.mp4"):
        data = np.frombuffer(files[name][0].read_bytes(), np.uint8)
        for _ in range(8):
            changed = data[: rng.integers(1, len(data))].copy() if rng.random() < 0.3 else data.copy()
            places = rng.integers(0, len(changed) if rng.random() < 0.5 else min(2000, len(changed)), 10)
            changed[places] = rng.integers(0, 256, len(places))
            try:
                with Video(changed.tobytes(), max_pixels=1 << 20) as video:
                    assert video.info.duration > 0 and video.info.frames > 0 and np.isfinite(video.info.fps)
                    assert video.read(np.linspace(0, min(video.info.duration, 100), 8), WHOLE).shape == (8, HEIGHT, WIDTH, 3)
            except DecodeError as error:
                assert "\n" not in str(error)


# Images


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def smooth(height=60, width=100) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 200], -1).astype(np.uint8))


def whole(height: int, width: int) -> Geometry:
    return Geometry((height, width), 0, 0, height, width)


def test_crop_and_resize_in_one_equals_one_after_the_other():
    picture = smooth()
    geometry = Geometry((37, 71), 4, 9, 24, 40, flip=True)
    got = read_image(encoded(picture, "PNG"), lambda h, w: geometry)
    resized = np.asarray(picture.resize((71, 37), Image.Resampling.BILINEAR))
    assert got.dtype == np.uint8
    np.testing.assert_allclose(got[0].astype(int), resized[4:28, 9:49][:, ::-1], atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(600, 1000), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    seen = []

    def choose(height, width):
        seen.append((width, height))
        return Geometry((height // 5, width // 5), 10, 20, 60, 70)

    got = read_image(data, choose)
    assert seen == [upright.size]
    want = np.asarray(upright.resize((upright.width // 5, upright.height // 5), Image.Resampling.BILINEAR))[10:70, 20:90]
    assert np.abs(got[0].astype(int) - want).mean() < 2  # a JPEG is decoded at a quarter first


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    picture = smooth()
    if mode == "I;16":
        changed = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        want = np.asarray(picture.convert("L").convert("RGB"))
    else:
        changed = picture.convert(mode)
        want = np.asarray(changed.convert("RGB"))
    file = tmp_path / "-ä.png"
    file.write_bytes(encoded(changed, "TIFF" if mode == "CMYK" else "PNG"))
    np.testing.assert_allclose(read_image(file, whole)[0].astype(int), want, atol=1)


def test_sixteen_bits_of_a_pgm():
    grey = np.asarray(smooth().convert("L"))
    header = f"P5 {grey.shape[1]} {grey.shape[0]} 65535\n".encode()
    np.testing.assert_allclose(read_image(header + (grey.astype(">u2") * 257).tobytes(), whole)[0, ..., 0].astype(int), grey, atol=1)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_no_known_range_are_refused(dtype):
    with pytest.raises(DecodeError, match="numbers of 32 bits, whose range nothing tells: convert it to 8 or 16 bits"):
        read_image(encoded(Image.fromarray(np.asarray(smooth().convert("L")).astype(dtype)), "TIFF"), whole)


def test_first_picture_of_an_animation():
    data = encoded(smooth().convert("P"), "GIF", save_all=True, append_images=[Image.new("P", (100, 60))])
    assert np.abs(read_image(data, whole)[0].astype(int) - np.asarray(smooth())).mean() < 20


def test_what_is_no_picture(tmp_path):
    def read(file, **settings):
        return read_image(file, whole, **settings)

    data = encoded(smooth(600, 1000), "JPEG")
    refusal(tmp_path / "missing.jpg", read)
    refusal(tmp_path, read)
    refusal(b"", read)
    assert refusal(b"text", read) == "no picture, or of an unknown kind"
    refusal(data[: len(data) // 2], read)
    refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", read)  # would start another program
    assert "1000 x 600" in refusal(data, read, max_pixels=599_999)
    assert read(data, max_pixels=600_000).shape == (1, 600, 1000, 3)
    with pytest.raises(ZeroDivisionError):  # the caller's own errors stay the caller's
        read_image(data, lambda h, w: 1 / 0)


# Real broken files


def shown_frames(file: Path, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """All frames in the order of a plain decode, and when they appear. Rotation is left to the caller's choice of files."""
    with av.open(str(file)) as container:
        stream = container.streams.best("video")
        frames = [(f.pts, f.reformat(*geometry.resize[::-1], "rgb24", interpolation="BILINEAR").to_ndarray()) for f in container.decode(stream)]
        times = np.array([float((pts - frames[0][0]) * stream.time_base) for pts, _ in frames])
    return times, np.stack([picture for _, picture in frames])


@needs_nasty
@pytest.mark.parametrize(
    "name",
    [
        "codecs/media__sample.avi", "multi_stream/media__sample_empty_track.mp4", "odd_dims/media__bear-vp9-odd-dimensions.webm",
        "odd_dims/moviepy__-video-with-dash-.mp4", "odd_dims/moviepy__pigs_in_a_polka.gif",
        "vfr_timing/decord__unordered.mov", "vfr_timing/media__iibbibb_editlist_videoonly.mp4",
        "vfr_timing/media__bbb_800x640_768kbps_30fps_avc_2b_firstpts_10_sec.mp4", "vfr_timing/media__sample.flv",
        "vfr_timing/media__sample_edit_list_only_preroll_sync_sample.mp4", "vfr_timing/moviepy__no_duration.webm",
    ],
)  # fmt: skip
def test_equals_decoding_everything(name):
    geometry = Geometry((24, 32), 0, 0, 24, 32)
    appear, pictures = shown_frames(NASTY / name, geometry)
    rng = np.random.default_rng(0)
    for count in (1, 5):
        wanted = rng.integers(0, len(appear), count)
        with Video(NASTY / name) as video:
            assert np.array_equal(video.read(within(appear, wanted, rng), geometry), pictures[wanted])
            assert video.info.duration == pytest.approx(appear[-1], abs=max(0.06, 1.6 * appear[-1] / max(1, len(appear) - 1)))


READ_ALL = """
import json, re, sys
import numpy as np
from vidjoint.data.transforms import Geometry
from vidjoint.data.decode import DecodeError
from vidjoint.data.video import Video
answers = {}
for file in sys.argv[1:]:
    try:
        with Video(file) as video:
            answers[file] = video.read((np.arange(2) + 0.5) / 2 * video.info.duration, Geometry((24, 32), 0, 0, 24, 32)).shape[0]
            assert video.decoded < 1000
    except DecodeError as error:
        answers[file] = str(error)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())  # ru_maxrss would count the process that started this one
print(json.dumps({"answers": answers, "megabytes": int(peak[1]) // 1024}))
"""


@needs_nasty
def test_every_nasty_file_answers():
    files = sorted(str(f) for f in NASTY.glob("*/*"))
    done = subprocess.run([sys.executable, "-c", READ_ALL, *files], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    refused = {Path(f).name: reason for f, reason in report["answers"].items() if isinstance(reason, str)}
    assert len(files) == 57 and len(refused) == 14, refused
    assert all(reason and "\n" not in reason for reason in refused.values())
    assert report["megabytes"] < 2048
