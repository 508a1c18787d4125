"""check_data: finds every bad file and says why, counts the good ones, and exits accordingly."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vidjoint import check_data

SHARED = Path(os.environ.get("VIDJOINT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def write_video(file, frames=20, width=32, height=24, fps=10, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with av.open(str(file), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            picture = rng.integers(0, 256, (height, width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file


@pytest.fixture
def videos(tmp_path):
    """Five files: two good, one cut off, one of no format, one without pictures."""
    folder = tmp_path / "clips"
    write_video(folder / "a.mp4")
    write_video(folder / "b c.mp4", frames=40, width=48)
    whole = write_video(tmp_path / "whole.mp4", movflags="faststart").read_bytes()  # its index comes first, so it can still be opened
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    (folder / "text.mp4").write_bytes(b"this is no video")
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def run(*args):
    return check_data.main([str(arg) for arg in args] + ["--threads=2"])


def report_of(file):
    return json.loads(file.read_text())


def test_a_list(videos, tmp_path, capsys):
    names = ["a.mp4", "b c.mp4", "cut.mp4", "text.mp4", "empty.mp4", "gone.mp4"]
    (tmp_path / "train.csv").write_text("path,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    assert run(tmp_path / "train.csv", f"--root={videos}", f"--json={tmp_path / 'r.json'}") == 1
    report = report_of(tmp_path / "r.json")
    assert (report["files"], report["good"]) == (6, 2)
    reasons = {Path(entry["path"]).name: entry["error"] for entry in report["bad"]}
    assert set(reasons) == {"cut.mp4", "text.mp4", "empty.mp4", "gone.mp4"} and all(reasons.values())
    assert reasons["gone.mp4"] == f"missing ({tmp_path / 'train.csv'} line 7)"
    assert report["sizes"] == {"32x24": 1, "48x24": 1} and report["media"] == {"video": 2}
    assert report["duration"]["min"] == pytest.approx(2) and report["duration"]["max"] == pytest.approx(4)
    assert report["fps"]["median"] == pytest.approx(10) and report["frames"]["total"] == 60
    out = capsys.readouterr().out
    assert out.count("BAD") == 4 and "2 good, 4 bad" in out and f"BAD  {videos}/text.mp4: {reasons['text.mp4']}" in out


def test_good_files_are_a_success(videos, tmp_path, capsys):
    for name in ("cut.mp4", "text.mp4", "empty.mp4"):
        (videos / name).unlink()
    (videos / "notes.txt").write_text("not counted as bad")
    assert run(videos) == 0
    assert "2: 2 good, 0 bad" in (out := capsys.readouterr().out) and "1 files in folders, of no known kind" in out
    (tmp_path / "paths.txt").write_text("a.mp4\nb c.mp4\n")
    assert run(tmp_path / "paths.txt", "--root", videos) == 0
    assert run(videos / "a.mp4", videos / "b c.mp4") == 0


def test_classes_and_repeats(videos, tmp_path, capsys):
    (tmp_path / "l.csv").write_text("a.mp4 walk\na.mp4 walk\nb c.mp4 run\n")
    assert run(tmp_path / "l.csv", f"--root={videos}", f"--json={tmp_path / 'r.json'}") == 0
    report = report_of(tmp_path / "r.json")
    assert report["classes"] == {"run": 1, "walk": 2} and report["files"] == 2
    assert report["repeated"] == [{"path": str(videos / "a.mp4"), "places": [f"{tmp_path}/l.csv line 1", f"{tmp_path}/l.csv line 2"]}]
    assert "TWICE" in capsys.readouterr().out
    (tmp_path / "l.csv").write_text("a.mp4 walk\na.mp4 run\nb c.mp4 run\nb c.mp4\n")
    assert run(tmp_path / "l.csv", f"--root={videos}") == 1
    assert "listed with labels run, walk" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [False, True])
def test_images_in_a_folder_or_zip(tmp_path, packed, capsys):
    folder = tmp_path / "d"
    (folder / "x").mkdir(parents=True)
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(folder / "x/good.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "x/cut.jpg")
    (folder / "x/cut.jpg").write_bytes((folder / "x/cut.jpg").read_bytes()[:2000])
    what = folder
    if packed:
        what = tmp_path / "d.zip"
        with zipfile.ZipFile(what, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in folder.rglob("*.*"):
                archive.write(file, file.relative_to(folder))
    assert run(what, f"--json={tmp_path / 'r.json'}") == 1
    report = report_of(tmp_path / "r.json")
    assert [entry["path"] for entry in report["bad"]] == [str(what / "x/cut.jpg")]
    assert report["sizes"] == {"9x6": 1} and report["classes"] == {"x": 2} and "duration" not in report


def test_usage_errors(tmp_path, capsys):
    assert run(tmp_path / "nowhere.csv", tmp_path / "none.zip") == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 2 and "Traceback" not in err
    assert run(tmp_path) == 2  # nothing in it
    write_video(tmp_path / "a.mp4")
    assert run(tmp_path, "--json", tmp_path / "no/such/folder.json") == 2
    assert check_data.main([str(tmp_path), "--threads=0"]) == 2
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2


def test_as_a_command(videos):
    done = subprocess.run([sys.executable, "-m", "vidjoint.check_data", videos], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1 and "2 good, 3 bad" in done.stdout and done.stderr == ""


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}")
def test_real_bad_files(tmp_path):
    folders = [SHARED / "nasty_video" / name for name in ("corrupt", "truncated", "no_video", "encrypted")]
    assert run(*folders, f"--json={tmp_path / 'r.json'}") == 1
    bad = {Path(entry["path"]).name: entry["error"] for entry in report_of(tmp_path / "r.json")["bad"]}
    assert len(bad) == 14 and "audio only" in bad["media__bbb_1ch_48kHz_q10_opus.webm"]
    assert all(reason and "\n" not in reason for reason in bad.values())


def test_files_of_many_labels(videos, tmp_path):
    (tmp_path / "l.csv").write_text("a.mp4,x|y\nb c.mp4,\na.mp4,z\na.mp4,x\n")
    assert run(tmp_path / "l.csv", f"--root={videos}") == 1
    assert run(tmp_path / "l.csv", f"--root={videos}", "--multilabel", f"--json={tmp_path / 'r.json'}") == 0
    report = report_of(tmp_path / "r.json")
    assert report["files"] == report["good"] == 2 and report["classes"] == {"x": 1, "y": 1, "z": 1} and not report["repeated"]


def test_validation_is_compared_with_training(videos, tmp_path, capsys):
    """By path, however it is written, and by content."""
    shutil.copy(videos / "a.mp4", videos / "copy.mp4")
    (tmp_path / "train.csv").write_text("a.mp4 0\nb c.mp4 1\n")
    (tmp_path / "val.csv").write_text("./b c.mp4 1\ncopy.mp4 0\n")
    assert run(tmp_path / "train.csv", f"--val={tmp_path / 'val.csv'}", f"--root={videos}", f"--json={tmp_path / 'r.json'}") == 1
    report = report_of(tmp_path / "r.json")
    assert report["good"] == report["files"] == 3
    both = {Path(entry["path"]).name: [Path(place).name for place in entry["places"]] for entry in report["overlap"]}
    assert both == {"b c.mp4": ["train.csv line 2", "val.csv line 1"], "a.mp4": ["copy.mp4"]}
    assert report["copies"] == [[str(videos / "a.mp4"), str(videos / "copy.mp4")]] and not report["repeated"]
    out = capsys.readouterr().out
    assert out.count("BOTH  ") == 2 and "2 files are in both, by path or by content" in out and "1 files have the same bytes as another" in out


def test_labels_are_checked_against_the_classes(videos, tmp_path, capsys):
    (tmp_path / "l.csv").write_text("a.mp4 1\nb c.mp4 3\n")
    assert run(tmp_path / "l.csv", f"--root={videos}", f"--json={tmp_path / 'r.json'}") == 0
    assert report_of(tmp_path / "r.json")["label_warnings"] == ["train: labels leave out 0, 2: 2 of the 4 classes, 0 to 3, have no examples"]
    assert run(tmp_path / "l.csv", f"--root={videos}", "--classes=3", f"--json={tmp_path / 'r.json'}") == 1
    (fault,) = report_of(tmp_path / "r.json")["label_faults"]
    assert fault == f"train: {tmp_path}/l.csv: labels run from 1 to 3; they must run from 0 to 2: subtract 1 from each"
    assert run(videos, "--labels=none.txt", f"--json={tmp_path / 'r.json'}") == 1  # a folder, whose labels are its folders
    assert "none.txt" in report_of(tmp_path / "r.json")["label_faults"][0]
    (tmp_path / "labels.txt").write_text("turn left\nturn right\n")
    (tmp_path / "l.csv").write_text("a.mp4,turn left\nb c.mp4,turn back\n")
    assert run(tmp_path / "l.csv", f"--root={videos}", f"--labels={tmp_path / 'labels.txt'}", f"--json={tmp_path / 'r.json'}") == 1
    report = report_of(tmp_path / "r.json")
    assert report["label_faults"] == [f"train: {tmp_path}/l.csv line 2: class 'turn back' is not among the 2 known ones (turn left, turn right)"]
    assert report["label_warnings"] == ["'turn left' and 'turn right' become each other in a mirror: set flip=False"]


def test_files_outside_the_root(videos, tmp_path):
    (videos / "in").mkdir()
    shutil.copy(videos / "a.mp4", videos / "in/a.mp4")
    (tmp_path / "l.csv").write_text("a.mp4\n../b c.mp4\n")
    args = (tmp_path / "l.csv", f"--root={videos / 'in'}", f"--json={tmp_path / 'r.json'}")
    assert run(*args) == 1
    report = report_of(tmp_path / "r.json")
    assert [entry["error"] for entry in report["bad"]] == [f"outside {videos / 'in'} ({tmp_path}/l.csv line 2)"]
    assert run(*args, "--allow_outside") == 0
    report = report_of(tmp_path / "r.json")
    assert report["outside"] == [{"path": f"{videos}/in/../b c.mp4", "place": f"{tmp_path}/l.csv line 2"}] and report["good"] == 2


def test_relative_roots(videos, monkeypatch):
    (videos / "below").mkdir()
    (videos / "below/l.csv").write_text("a.mp4\n")
    for folder, root in (("clips", "."), ("clips/below", ".."), ("clips/below", "../../clips"), (".", "./clips")):
        monkeypatch.chdir(videos.parent / folder)
        assert run(videos / "below/l.csv", f"--root={root}") == 0
    monkeypatch.chdir(videos / "below")
    (videos / "below/l.csv").write_text("../a.mp4\n")
    assert run("l.csv", "--root=.") == 1 and run("l.csv", "--root=..") == 1  # clips/../a.mp4 is not there


def test_imagenet_s_list_names_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n")
    assert run(tmp_path / "LOC_val_solution.csv", f"--json={tmp_path / 'r.json'}") == 0
    assert report_of(tmp_path / "r.json")["media"] == {"image": 1}


def test_where_the_report_goes_is_checked_first_and_what_was_found_is_shown_anyway(videos, tmp_path, monkeypatch, capsys):
    assert run(videos, "--json=/dev/full") == 2
    out, err = capsys.readouterr()
    assert "2 good, 3 bad" in out and err == "error: --json=/dev/full can't be written: No space left on device\n"
    monkeypatch.setattr(check_data, "check", lambda *_: pytest.fail("it has begun to decode"))
    assert run(videos, f"--json={tmp_path}/no/such/r.json") == 2
    assert capsys.readouterr().err == f"error: --json={tmp_path}/no/such/r.json can't be written: name a file in a folder that exists and is yours\n"


def test_limits(videos, tmp_path, capsys):
    whole = [videos / "a.mp4", f"--json={tmp_path / 'r.json'}"]
    assert run(*whole, "--seconds=0.0001") == 1 and "not decoded within 0.0001 s (--seconds)" in report_of(tmp_path / "r.json")["bad"][0]["error"]
    assert run(*whole) == 0
    assert run(*whole, "--seconds=0") == 2


def test_names_that_act_on_a_terminal_are_escaped(videos, capsys):
    (videos / "x\x1b[2J\ny.mp4").write_bytes(b"")
    assert run(videos) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and f"BAD  {videos}/x\\x1b[2J\\ny.mp4: " in out
