"""The page of a run: what it holds, that nothing in it can act or fetch, and that it looks right in a real browser."""

import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from tests import tiny
from vidjoint import report
from vidjoint.data.tasks import open_tasks
from vidjoint.metrics import MetricsWriter
from vidjoint.reporting import mistakes
from vidjoint.reporting.page import escaped, ticks
from vidjoint.reporting.results import TaskResult, as_events, as_json, write_reports
from vidjoint.run_folder import RunFolder

HOSTILE = "<script>alert(1)</script>\"'&amp;‮\x07"
FILE = '"><img src=x onerror=alert(1)>.mp4'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that elements close in order; keeps elements, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes <{self.open}>"

    def handle_data(self, data):
        self.text += data

    def of(self, tag, name):
        return [value for element, key, value in self.attributes if (element, key) == (tag, name)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, with hostile names wherever a user's may be: folder, classes, files."""
    folder = tmp_path_factory.mktemp("report") / "<b>run"
    (folder / "data").mkdir(parents=True)
    tiny.write_data(folder / "data")
    (folder / "data/clips/00.mp4").rename(folder / "data/clips" / FILE)
    names = [HOSTILE.replace("\x07", ""), *tiny.CLIPS[1:]]
    lines = (folder / "data/clips/val.csv").read_text().splitlines()[1:]
    quoted = '"' + FILE.replace('"', '""') + '"'
    (folder / "data/clips/val.csv").write_text("".join(f"{line}\n" for line in [f"{quoted};3 cats", *lines]), encoding="utf-8")
    config = tiny.config_of(folder / "data")
    tasks = open_tasks(config)
    rng, results = np.random.default_rng(0), {}
    for name, task in tasks.items():
        label = np.array([task.val[i]["label"] for i in range(len(task.val))])
        scores = rng.dirichlet(np.ones(len(task.labels)), len(label)).astype(np.float32)
        labels = tuple(names) if name == "clips" else task.labels
        results[name] = TaskResult(labels, label, scores, scores[::-1] if name == "clips" else None, 0, task.val, np.arange(len(label)))
    run = RunFolder(folder)
    run.write(config, {name: result.labels for name, result in results.items()})
    with MetricsWriter(folder, 0, ()) as writer:
        for step in range(1, 21):
            writer.write(step, {"train/loss": 3 / step, "train/clips/loss": 2 / step, "train/stills/loss": 1 / step, "train/lr": 0.1 * step})
        writer.write(20, as_events(results))
    write_reports(results, folder)
    run.results.write_text(json.dumps(as_json(results, 20)))
    about = {
        "started": "2026-01-01", "batches": "in turn", "epoch": {"steps": 2.5, "examples": 24.0}, "versions": {"jax": "0.10"},
        "data": {"clips": dict(train=11, val=11, classes=8, media="video", clip=[4, 16], share=1, loss_weight=1, train_from=HOSTILE, val_from="")},
        "model": {"name": "Ti/8", "trained": 1234, "frozen": 0, "macs_per_view": 10**7, "view": [4, 16, 24]},
        "memory_per_device": {"parameters": 5000}, "devices": {"count": 1, "kind": "cpu", "processes": 1},
    }  # fmt: skip
    run.about.write_text(json.dumps(about))
    return run, tasks, results


@pytest.fixture(scope="module")
def page(run):
    return report.write(run[0], run[1]).read_text(encoding="utf-8")


def test_the_page_is_whole_and_holds_everything(run, page):
    parsed, results = Page(page), run[2]
    for name, result in results.items():
        assert f"{100 * result.summary()['top1']:.1f} %" in parsed.text and f"task-{name}" in parsed.of("h2", "id")
    for words in ("Training loss", "Validation top-1", "Confusion matrix", "Calibration", "Most confused pairs", "Hardest clips", "0.10", "1,234"):
        assert words in parsed.text, words
    assert "model.mixer" in parsed.text and "'divided'" in parsed.text and "model.pool" not in parsed.text.split("The whole config")[0]
    assert "tasks.stills.media" in parsed.text
    links, ids = parsed.of("a", "href"), [value for _, key, value in parsed.attributes if key == "id"]
    assert links and all(link[1:] in ids for link in links) and len(set(ids)) == len(ids)
    wrong = sum((result.scores.argmax(1) != result.label).sum() for result in results.values())
    strips = [source for source in parsed.of("img", "src") if source.startswith("data:image/jpeg")]
    assert wrong > 10 and 20 <= len(strips) <= 2 * (mistakes.HARDEST + mistakes.PAIRS * mistakes.PER_PAIR) and len(page) < 1_500_000
    assert all(parsed.of("img", "alt")) and parsed.elements.count("img") == len(parsed.of("img", "alt"))


def test_nothing_in_it_can_act_or_fetch(page):
    parsed = Page(page)
    assert parsed.elements.count("script") == 1 and page.count("<script") == 1
    assert not [attribute for attribute in parsed.attributes if attribute[1].startswith("on")]
    for element, key, value in parsed.attributes:
        if key in ("src", "href", "srcset", "action", "data"):
            assert value.startswith(("data:image/", "#")), (element, key, value)
    assert not re.search(r"url\(|@import|https?://|file://", page)
    assert "<b>run" in parsed.text and "<script>alert(1)</script>\"'&amp;\\u202e" in parsed.text and FILE in parsed.text  # as text, and told apart
    (policy,) = [value for value in parsed.of("meta", "content") if "default-src 'none'" in value]
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_escaped():
    assert escaped("a<b>&\"'") == "a&lt;b&gt;&amp;&quot;&#x27;" and escaped(escaped("<")) == "&lt;"
    assert escaped("\udcff\n‮größe 挥手　x") == "\\udcff\\n\\u202egröße 挥手　x"


def test_ticks():
    for highest in (1e-9, 0.003, 0.7, 1, 2.3, 9.99, 20, 1300, 600000):
        marks = ticks(highest)
        assert marks[0] == 0 and 3 <= len(marks) <= 6 and highest * 0.6 <= marks[-1] <= highest * 1.0001, (highest, marks)


def test_pictures_are_left_out_when_time_is_up_or_files_are_gone(run, tmp_path, monkeypatch):
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run[0].path, copy.path, ignore=shutil.ignore_patterns("data"))
    monkeypatch.setattr(mistakes, "SECONDS", -1)
    assert "data:image/jpeg" not in report.write(copy, run[1]).read_text() and "Hardest clips" in copy.report.read_text()
    copy.config.data_root = str(tmp_path / "nowhere")
    text = report.write(copy).read_text()
    assert "No pictures of clips: " in text and "Hardest clips" in text and "data:image/jpeg" not in text


def test_old_and_unfinished_runs_have_a_page_too(run, tmp_path, capsys):
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run[0].path, copy.path, ignore=shutil.ignore_patterns("data", "predictions_*", "about.json", "report.html"))
    assert report.main([f"--workdir={copy.path}"]) == 0 and capsys.readouterr().out.strip() == str(copy.report)
    text = Page(copy.report.read_text()).text
    assert f"vidjoint.evaluate --workdir={copy.path} --predictions=" in text and "Not recorded" in text and "Hardest" not in text
    copy.results.unlink()
    (copy.path / "metrics.jsonl").unlink()
    assert report.main([f"--workdir={copy.path}", f"--out={tmp_path / 'x.html'}"]) == 0
    assert "There are none yet" in Page((tmp_path / "x.html").read_text()).text


def test_what_the_user_can_mend_is_one_line(run, tmp_path, capsys):
    assert report.main([f"--workdir={tmp_path}"]) == 2 and "no folder of a run" in capsys.readouterr().err
    assert report.main([f"--workdir={run[0].path}", f"--out={tmp_path}"]) == 2 and "--out=" in capsys.readouterr().err
    assert report.main([f"--workdir={run[0].path}", f"--out={tmp_path / 'no' / 'x.html'}"]) == 2 and "--out=" in capsys.readouterr().err


def test_a_report_that_fails_is_a_warning(run, monkeypatch, caplog):
    monkeypatch.setattr(report, "page", lambda *_: 1 / 0)
    report.write_if_possible(run[0], run[1])
    (record,) = caplog.records
    assert record.getMessage() == "report.html was not written (ZeroDivisionError: division by zero)"


def test_multilabel_tasks(run, tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = run[0].config.copy_and_resolve_references()
    del config.tasks["stills"]
    config.task_order, config.tasks.clips.multilabel = (), True
    folder.write(config, {"clips": tiny.CLIPS})
    label = np.array([[0, 1], [2, -1], [-1, -1], [3, -1]])
    scores = np.random.default_rng(0).random((4, 8)).astype(np.float32)
    results = {"clips": TaskResult(tiny.CLIPS, label, scores, None, 1, run[1]["clips"].val, np.arange(4))}
    write_reports(results, folder.path)
    folder.results.write_text(json.dumps(as_json(results, 3)))
    parsed = Page(report.write(folder, run[1]).read_text())
    assert "mAP" in parsed.text and "average precision" in parsed.text and "Hardest clips" in parsed.text
    assert "Calibration" not in parsed.text and "Most confused" not in parsed.text and "1 files could not be decoded" in parsed.text


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: playwright's own, or the one that VIDJOINT_CHROMIUM names."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: pip install playwright && playwright install chromium")
    with playwright.sync_playwright() as driver:
        try:
            chromium = driver.chromium.launch(executable_path=os.environ.get("VIDJOINT_CHROMIUM"), args=["--no-sandbox", "--no-zygote"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts here ({str(error).splitlines()[0]}): playwright install chromium, or name one by VIDJOINT_CHROMIUM")
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(run, page, browser, width):
    """No message on the console, no request, nothing wider than the window; headings sort their table."""
    tab, messages, requests = browser.new_page(viewport={"width": width, "height": 800}), [], []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("dialog", lambda dialog: messages.append(dialog.message))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(run[0].report.resolve().as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    heading = tab.locator(".tall th", has_text="examples").first
    counts = "[...document.querySelector('.tall tbody').rows].map(row => +row.cells[2].dataset.value)"
    heading.locator("button").click()
    assert tab.evaluate(counts) == sorted(tab.evaluate(counts)) and heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").click()
    assert tab.evaluate(counts) == sorted(tab.evaluate(counts), reverse=True)
    assert not messages and [url for url in requests if not url.startswith("data:")] == [run[0].report.resolve().as_uri()]
    tab.close()
