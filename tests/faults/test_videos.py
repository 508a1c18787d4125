"""Damaged videos by the hundred, through check_data and a training mixture: no hang, no traceback, bounded memory, good files unharmed.

`--full`: 500 files, damaged copies of real clips where there are some.
"""

import json
import logging
import os
import resource
import shutil
import struct
import time
import zipfile
import zlib
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.data.sets import same
from tests.faults import hostile
from tests.faults.hostile import mutations
from tests.tiny import write_clip
from vidjoint import check_data
from vidjoint.config import base_config, task_config
from vidjoint.data import isolated
from vidjoint.data.encode import Encoding, encode_video
from vidjoint.data.files import is_media
from vidjoint.data.mixture import Mixture
from vidjoint.data.tasks import open_tasks

SECONDS, MEMORY = 10, 1024  # of a file; MiB
SHARED = Path(os.environ.get("VIDJOINT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def originals(folder: Path, full: bool) -> list[bytes]:
    """Contents of good videos: real ones of several codecs and containers, or made here."""
    if full and SHARED.is_dir():
        files = sorted((SHARED / "gestures").glob("*/*.mp4"))[:10]
        files += [file for part in ("clips", "nasty_video/codecs") for file in sorted((SHARED / part).iterdir()) if is_media(file.name)]
        return [file.read_bytes() for file in files if file.stat().st_size < 1 << 20]
    write_clip(folder / "drifts.mp4", 1, frames=30, size=(48, 64))
    return [(folder / "drifts.mp4").read_bytes(), encode_video(str(folder / "drifts.mp4"), Encoding(short_side=32, gop=6))]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, full) -> Path:
    """A folder of damaged files and, among them, the good ones; `list.csv` names all of them, good ones with class 1."""
    folder = tmp_path_factory.mktemp("damaged")
    contents = originals(tmp_path_factory.mktemp("originals"), full)
    copies, lines = (500 if full else 24), []
    each = -(-copies // len(contents))
    for i, content in enumerate(contents):
        (folder / f"{i:02}-good.mp4").write_bytes(content)
        lines.append(f"{i:02}-good.mp4,1")
        for j, copy in enumerate(mutations(content, min(each, copies - i * each), seed=i)):
            (folder / f"{i:02}-{j:03}.mp4").write_bytes(copy)
            lines.append(f"{i:02}-{j:03}.mp4,0")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder


def most_memory() -> int:
    """MiB that the largest of the child processes that live has ever held."""
    return max(child.ask(isolated.Limits(60.0, 1 << 40), hostile.most_memory, ())[0] for child in isolated._idle) >> 20


@pytest.fixture
def times(monkeypatch):
    """Seconds that each file took."""
    call, taken = isolated.call, {}

    def timed(limits, name, *args):
        start = time.monotonic()
        try:
            return call(limits, name, *args)
        finally:
            taken[name] = time.monotonic() - start

    monkeypatch.setattr(isolated, "call", timed)
    return taken


@pytest.mark.timeout(3600)
def test_check_data_names_the_bad_and_passes_the_good(damaged, tmp_path, times, capsys):
    report = tmp_path / "report.json"
    status = check_data.main([str(damaged / "list.csv"), f"--json={report}", "--threads=1", f"--seconds={SECONDS}", f"--memory={MEMORY}"])
    found = json.loads(report.read_text())
    bad = {Path(entry["path"]).name: entry["error"] for entry in found["bad"]}
    assert status == 1 and found["files"] == len(times) == len(list(damaged.glob("*.mp4")))
    assert found["good"] + len(bad) == found["files"] and not [name for name in bad if "good" in name]
    assert all(reason and reason.isprintable() and "Error(" not in reason for reason in bad.values())
    assert max(times.values()) < 2 * SECONDS + 5 and most_memory() < MEMORY
    with capsys.disabled():
        killed = sum("kills" in reason for reason in bad.values())
        late = sum("not decoded within" in reason for reason in bad.values())
        print(
            f"\ncheck_data: {found['files']} files, {len(bad)} bad ({killed} crashes, {late} too slow), slowest {max(times.values()):.2f} s, "
            f"most memory of a decoder {most_memory()} MiB"
        )


@pytest.mark.timeout(3600)
def test_training_goes_on_with_the_good(damaged, times, caplog, capsys):
    config = base_config()
    config.data_root, config.batch_size, config.model.frames, config.model.image_size = str(damaged), 8, 4, 16
    config.data.update(threads=1, max_bad_share=1.0, decode_seconds=float(SECONDS), decode_memory=MEMORY)
    config.tasks.clips = task_config(train="list.csv", short_side=(18, 24), sampler="segments")
    tasks = open_tasks(config)
    steps = -(-len(tasks["clips"].train) // 8)

    def mixture():
        return Mixture(config, tasks, steps)

    mix, good = mixture(), 0
    with caplog.at_level(logging.ERROR), closing(mix.iterate()) as tuples:
        for i, (batch,) in enumerate(islice(tuples, steps)):
            assert batch["mask"].all()
            good += int((batch["label"] == 1).sum())
            if i in (1, steps - 1):
                kept = i, batch
    bad = mix.bad["clips"]
    names = [tasks["clips"].train.name(i) for i in range(len(tasks["clips"].train))]
    assert good >= sum("good" in name for name in names) and not [i for i in bad if "good" in names[i]]
    assert all(line.isprintable() for line in bad.values())
    config.data.threads = 3
    same(mixture().step(kept[0]), (kept[1],))  # substitutes are the same on any number of threads
    assert max(times.values()) < 2 * SECONDS + 5 and most_memory() < MEMORY
    with capsys.disabled():
        print(f"\ntraining: {len(names)} files, {len(bad)} replaced, slowest {max(times.values()):.2f} s")


def test_headers_that_claim_too_much_take_no_memory(tmp_path):
    """A size, a number of frames and a duration beyond all reason, in a picture's, a video's and a zip's header."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for name, size in (("a.png", (200_000, 200_000)), ("b.png", (12_000, 10_000))):
        header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    (tmp_path / "c.bmp").write_bytes(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 1, 1, 0, 0))
    write_clip(tmp_path / "good.mp4", 0)
    content = bytearray((tmp_path / "good.mp4").read_bytes())
    for box, field, value in ((b"mvhd", 16, 0xFFFFFFF0), (b"stts", 8, 0x7FFFFFFF), (b"stsz", 12, 0x7FFFFFFF), (b"avc1", 28, 0xFFFFFFFF)):
        copy, place = bytearray(content), content.index(box)
        struct.pack_into(">I", copy, place + field, value)
        (tmp_path / f"{box.decode()}.mp4").write_bytes(copy)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"{'../' * i}up{i}/{i}.bmp", np.zeros(1 << 27, np.uint8).tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert check_data.main([str(tmp_path), str(tmp_path / "bomb.zip"), "--threads=1", f"--memory={MEMORY}", f"--json={tmp_path / 'r.json'}"]) == 1
    bad = {Path(entry["path"]).name: entry["error"] for entry in json.loads((tmp_path / "r.json").read_text())["bad"]}
    assert {"a.png", "b.png", "c.bmp", "0.bmp"} <= bad.keys() and not {"good.mp4", "1.bmp", "2.bmp"} & bad.keys()  # what leads out is left out
    assert "more than the" in bad["b.png"] and "unpack to" in bad["0.bmp"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10 and most_memory() < MEMORY
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [] and not (tmp_path.parent / "up0").exists()


@pytest.mark.timeout(600)
def test_every_nasty_file_through_a_training_run(shared_data, tmp_path):
    """Files that broke other decoders: each is used or replaced, none twice named, and all good ones are shown."""
    files = sorted(path for path in (shared_data / "nasty_video").glob("*/*"))
    (tmp_path / "list.csv").write_text("".join(f"{path};{i}\n" for i, path in enumerate(files)))
    config = base_config()
    config.batch_size, config.model.frames, config.model.image_size = 19, 4, 32
    config.data.update(threads=2, max_bad_share=0.5)
    config.tasks.clips = task_config(train=str(tmp_path / "list.csv"), short_side=(32, 40), classes=len(files), flip=False)
    mix = Mixture(config, open_tasks(config), 3)
    shown = set()
    with closing(mix.iterate()) as tuples:
        for (batch,) in islice(tuples, 3):
            assert batch["mask"].all()
            shown |= set(batch["label"].tolist())
    names = {files[i].parent.name for i in mix.bad["clips"]}
    assert shown == set(range(len(files))) - set(mix.bad["clips"]) and len(mix.bad["clips"]) == 14
    assert names == {"corrupt", "encrypted", "no_video", "truncated"}


def test_nothing_is_written_beside_the_files(damaged, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in sorted(damaged.glob("*.mp4"))[:20]:
        shutil.copy(file, copy)
    before = sorted((path.name, path.stat().st_size) for path in copy.iterdir())
    check_data.main([str(copy), "--threads=1", f"--seconds={SECONDS}", f"--memory={MEMORY}"])
    assert sorted((path.name, path.stat().st_size) for path in copy.iterdir()) == before
