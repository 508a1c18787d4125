"""Clips per second and core: files of an experiment decoded by this package and, where they are installed, by decord and torchcodec."""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint.data.sources import open_source
from vidjoint.data.tasks import clip_spec
from vidjoint.data.transforms import Geometry
from vidjoint.data.video import Video
from vidjoint.errors import UserError

FILES = 3  # of each experiment
FRAMES = (8, 16, 32)
ROUNDS = 5  # after one that warms up; medians count
TICKS = 90_000  # per second, of files that are written

Clip = tuple[str, np.ndarray, np.ndarray]  # a file, the times of its frames in seconds, their numbers
Reader = Callable[[Clip, tuple[int, int] | None], np.ndarray]  # (clip, height and width or None as stored) -> uint8[T, height, width, 3]


def measure_decode(config: ConfigDict, gops: Sequence[int] = ()) -> dict:
    """Decodes the first files of the first video task: T frames spread evenly, whole pictures, at the task's input size and at their own.

    With `gops` each file is written anew first, once for each number: 340 x 256 pixels, 10 s, a keyframe every so many frames. Readers take turns on
    one core; what counts is the processor's time.

    Raises:
      UserError: the experiment has no video task, or its files can't be opened.
    """
    name = next((name for name in sorted(config.tasks) if config.tasks[name].media == "video"), None)
    if name is None:
        raise UserError("--what=decode needs a task with media='video', and this experiment has none")
    source, size = open_source(name, config.tasks[name], "train", config.data_root), clip_spec(config, name).size
    readers, rows = dict(_readers()), []
    with tempfile.TemporaryDirectory() as folder, one_core():
        files = list(_files(source, Path(folder)))
        sets = {gop: [_rewrite(file, gop, Path(folder)) for file in files] for gop in gops} or {0: files}
        cells = [(gop, count, to) for to in (size, None) for gop in sets for count in FRAMES]
        for gop, count, to in tqdm(cells, desc="decoding", unit="cell", delay=2, disable=None, leave=False):
            clips = [_choose(file, count) for file in sets[gop]]
            rates = {f"{reader}_clips_per_s": rate for reader, rate in _compare(readers, clips, to).items()}
            rows.append({"gop": gop or "as it is", "frames": count, "size": "x".join(map(str, to)) if to else "as stored"} | rates)
    return {"task": name, "files": len(files), "rows": rows}


def _compare(readers: dict[str, Reader], clips: list[Clip], size: tuple[int, int] | None) -> dict[str, float]:
    seconds = {reader: [] for reader in readers}
    for _ in range(ROUNDS + 1):
        for reader, read in readers.items():
            began = time.process_time()
            for clip in clips:
                read(clip, size)
            seconds[reader].append(time.process_time() - began)
    return {reader: len(clips) / statistics.median(times[1:]) for reader, times in seconds.items()}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this thread, and those that it starts, on one of its cores (where the system can, as Linux does)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


# Readers. Each does all in its own best way, with one thread.


def _readers() -> Iterator[tuple[str, Reader]]:
    yield "vidjoint", _read
    with contextlib.suppress(ImportError, OSError):
        import decord

        def read(clip: Clip, size: tuple[int, int] | None) -> np.ndarray:
            shape = {"height": size[0], "width": size[1]} if size else {}
            return decord.VideoReader(clip[0], num_threads=1, **shape).get_batch(clip[2]).asnumpy()

        yield "decord", read
    with contextlib.suppress(ImportError, OSError, RuntimeError):  # RuntimeError: it finds no FFmpeg
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize

        def reader(seek_mode: str) -> Reader:
            def read(clip: Clip, size: tuple[int, int] | None) -> np.ndarray:
                resize = [Resize(size)] if size else None
                decoder = VideoDecoder(clip[0], num_ffmpeg_threads=1, seek_mode=seek_mode, dimension_order="NHWC", transforms=resize)
                return decoder.get_frames_at(clip[2].tolist()).data.numpy()

            return read

        yield "torchcodec_exact", reader("exact")
        yield "torchcodec_approximate", reader("approximate")


def _read(clip: Clip, size: tuple[int, int] | None) -> np.ndarray:
    with Video(clip[0]) as video:
        height, width = size or (video.info.height, video.info.width)
        return video.read(clip[1], Geometry((height, width), 0, 0, height, width))


# Files


def _choose(file: str, count: int) -> Clip:
    """The middles of `count` equal parts of a video, and the numbers of the frames shown then."""
    with Video(file) as video:
        times = (np.arange(count) + 0.5) * video.info.duration / count
    with av.open(file) as container:
        stream = container.streams.best("video")
        shown = np.sort([packet.pts for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard])
        appear = (shown - shown[0]) * float(stream.time_base)
    return file, times, np.searchsorted(appear, times + 1e-6, "right") - 1


def _files(source, folder: Path) -> Iterator[str]:
    for i in range(min(FILES, len(source))):
        content = source[i]["video"]
        if isinstance(content, bytes):
            (folder / f"{i}.mp4").write_bytes(content)
            content = folder / f"{i}.mp4"
        yield str(content)


def _rewrite(file: str, gop: int, folder: Path) -> str:
    """Writes the first 10 s of a video as videos are often stored: 340 x 256, H.264 of x264's medium preset, CRF 23, B-frames."""
    path = folder / f"{Path(file).stem}-{gop}.mp4"
    with Video(file) as video, av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(min(max(video.info.fps, 1.0), 240.0)).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, TICKS)
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        stream.codec_context.options = {"preset": "medium", "crf": "23"}
        last = -1
        for ticks, picture in video.frames(256, 340):
            moment = round(ticks * video.time_base * TICKS)
            if moment >= 10 * TICKS:
                break
            if moment > last:
                picture.pts, picture.time_base, picture.pict_type, last = moment, Fraction(1, TICKS), PictureType.NONE, moment
                out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return str(path)
