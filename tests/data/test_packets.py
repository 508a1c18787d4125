"""Pictures that are not wanted are left out, and those that are wanted stay the same to the bit."""

from types import SimpleNamespace

import av
import numpy as np
import pytest

from vidjoint.data import video
from vidjoint.data.decode import DecodeError
from vidjoint.data.packets import MOST_AHEAD, PacketsAhead
from vidjoint.data.transforms import Geometry
from vidjoint.data.video import Video

SIZE = Geometry((48, 64), 0, 0, 48, 64)


def packet(pts, dts, size=1, is_discard=False):
    return SimpleNamespace(pts=pts, dts=dts, size=size, is_discard=is_discard)


def stream(*times):
    """Packets with these presentation times, in order of decoding, and the end of the file."""
    return [packet(pts, dts) for pts, dts in zip(times, np.sort(times) - 4, strict=True)] + [packet(None, None, size=0)]


def test_what_is_shown_when():
    packets = PacketsAhead(iter(stream(0, 8, 4, 2, 6, 16, 12, 10, 14)))
    assert [packets.shown_at(time) for time in (-1, 0, 1, 2, 7, 11, 100, 3)] == [None, 0, 0, 2, 6, 10, 16, 2]
    assert [p.pts for p in packets] == [0, 8, 4, 2, 6, 16, 12, 10, 14, None]  # none is lost by looking ahead


@pytest.mark.parametrize("wanted", [[0], [5], [5, 5, 11], [1, 3, 9, 100], [16], [50]])
def test_only_what_is_shown_may_be(wanted):
    packets = PacketsAhead(iter(stream(0, 8, 4, 2, 6, 16, 12, 10, 14)))
    times = [0, 2, 4, 6, 8, 10, 12, 14, 16]
    expected = {max(t for t in times if t <= time) for time in wanted}
    assert {p.pts for p in packets if packets.may_show(p, wanted)} == expected | {None}


@pytest.mark.parametrize("lie", [packet(4, None), packet(None, 4), packet(3, 5), packet(9, -2)], ids=["no dts", "no pts", "too early", "falls"])
def test_nothing_is_known_where_time_stamps_lie(lie):
    packets = PacketsAhead(iter([*stream(0, 2)[:-1], lie, *stream(20, 22)]))
    assert packets.shown_at(100) is None
    assert all(packets.may_show(p, [100]) for p in packets)


def test_looks_ahead_so_far_and_no_farther():
    taken = []
    source = (taken.append(i) or packet(1000 - i, i) for i in range(400))
    packets = PacketsAhead(source)
    assert packets.may_show(next(iter(packets)), [2000]) and packets.shown_at(2000) is None
    assert len(taken) == MOST_AHEAD + 1


def test_damage_is_told_in_its_turn():
    def source():
        yield from stream(0, 2, 4, 6, 8)[:-1]
        raise av.error.InvalidDataError(1, "damaged")

    packets = PacketsAhead(source())
    assert packets.shown_at(3) == 2 and packets.shown_at(4) is None
    seen = []
    with pytest.raises(av.error.InvalidDataError):
        seen += (p.pts for p in packets)
    assert seen == [0, 2, 4, 6, 8]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """300 frames of moving noise in groups of 50 with pyramids of B-frames, half of which nothing leans on."""
    path = tmp_path_factory.mktemp("pyramids") / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"g": "50", "bf": "3", "preset": "medium", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for t in range(300):
            picture = np.ascontiguousarray(noise[t % 90 : t % 90 + 48, 2 * (t % 70) : 2 * (t % 70) + 64])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode(None))
    return path


@pytest.fixture
def everything(monkeypatch):
    """Lets videos decode all pictures, as without looking ahead."""

    def all_of(function):
        with monkeypatch.context() as patch:
            patch.setattr(video.PacketsAhead, "may_show", lambda *_: True)
            patch.setattr(video.PacketsAhead, "shown_at", lambda *_: None)
            return function()

    return all_of


def test_the_same_pictures_with_less_work(file, everything):
    rng = np.random.default_rng(1)

    def read(reads):
        with Video(file) as opened:
            return [opened.read(times, SIZE) for times in reads], opened.decoded

    total = np.zeros(2, int)
    for count in (1, 2, 8, 8, 32):
        reads = [rng.uniform(0, 10, count), (np.arange(count) + rng.random()) * 10 / count, 4 + np.arange(count) / 15]
        (clips, fewer), (expected, all_of_them) = read(reads), everything(lambda reads=reads: read(reads))
        assert all(np.array_equal(clip, as_before) for clip, as_before in zip(clips, expected, strict=True))
        total += fewer, all_of_them
    assert total[0] < 0.8 * total[1]


def test_an_unexpected_picture_ends_it(file, everything, monkeypatch):
    """Where the decoder doesn't give what packets promise, everything is decoded."""
    times = np.linspace(0.1, 9.9, 9)
    expected = everything(lambda: Video(file).read(times, SIZE))
    told = PacketsAhead.shown_at
    monkeypatch.setattr(video.PacketsAhead, "shown_at", lambda self, time: None if (pts := told(self, time)) is None else pts - 1)
    with Video(file) as opened:
        assert np.array_equal(opened.read(times, SIZE), expected)


def test_damage_is_the_same_with_or_without(file, everything):
    data = bytearray(file.read_bytes())
    rng = np.random.default_rng(2)

    def answer(content, times):
        try:
            return Video(bytes(content)).read(times, SIZE).tobytes()
        except DecodeError as error:
            return str(error)

    answers = []
    for _ in range(12):
        content, times = data.copy(), rng.uniform(0, 10, 3)
        place = int(rng.integers(len(data) // 10, len(data) * 9 // 10))
        content[place : place + 600] = rng.integers(0, 256, 600, np.uint8).tobytes()
        answers.append((answer(content, times), everything(lambda content=content, times=times: answer(content, times))))
    refused = [isinstance(one, str) for one, _ in answers]
    assert [isinstance(other, str) for _, other in answers] == refused
