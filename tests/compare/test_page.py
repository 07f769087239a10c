"""The page loads nothing, runs nothing that came from runs, and is sound HTML; also in a real browser, where one is.

pytest tests/compare/test_page.py
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from mbtrain import cli
from mbtrain.compare import compare
from mbtrain.compare.markup import Markup, element, shown
from tests.compare import made

VOID = {"br", "img", "meta", "circle", "line", "path", "rect"}
HOSTILE = (
    '"><script>alert(1)</script><img src=x onerror=alert(2)></style><a href="http://evil.example/">\x1b[2J\u202e&amp;'
)
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, text by element; it raises where tags do not pair."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, tag: str) -> str:
        return " ".join(self.text.get(tag, []))


def sound(path: Path) -> Page:
    """The page, after all that holds for every page was looked at."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "a", "foreignobject")
        for key, value in attributes.items():
            assert not key.startswith("on"), key
            assert key != "style"
            if key in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert (value or "").startswith(("data:image/png;base64,", "data:audio/wav;base64,"))
    assert len(page.of("script")) == len(page.of("style")) == 1
    policy = page.of("meta")[1]["content"] or ""
    assert policy.startswith("default-src 'none';")
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256("".join(page.text[tag]).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    return page


def hostile(folder: Path) -> Path:
    """A run that says the worst wherever a run can say something."""
    made.run(folder)
    (folder / "config.yaml").write_text(
        json.dumps({"model": {"kind": HOSTILE, "stages": [{"d_model": HOSTILE}]}, HOSTILE: 1})
    )
    environment = {
        "device": HOSTILE,
        "tags": {"dataset_hash": HOSTILE},
        "data": [{"name": HOSTILE, "modality": HOSTILE}],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "eval_x.json").write_text(json.dumps({"bpb": 2.0, "split": HOSTILE, "mode": HOSTILE}))
    (folder / "status.json").write_text(json.dumps({"status": HOSTILE}))
    (folder / "samples" / ("step_9" + HOSTILE.replace("/", "|") + ".txt")).write_text(HOSTILE * 3)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seeds, a rival, a picture, a sound, a run cut off, one of an older schema, a hostile one."""
    root = tmp_path_factory.mktemp("runs")
    out = [made.run(root / f"ours_s{i}", floor=2 + i / 50) for i in range(3)]
    out.append(made.run(root / "rival", floor=2.5, model={"kind": "transformer", "stages": tiny_stage()}))
    for name, modality, suffix, content in (
        ("photo", "image", "png", made.png()),
        ("voice", "audio", "wav", made.wav()),
    ):
        folder = made.run(root / name, data=name, modality=modality)
        (folder / "samples" / f"step_0000000200.{suffix}").write_bytes(content)
        out.append(folder)
    cut = made.run(root / "cut", steps=3, floor=4.0)
    (cut / "status.json").unlink()
    shutil.rmtree(cut / "samples")
    out.append(cut)
    older = made.run(root / "older")
    made.damaged(older, metrics__jsonl=b'{"step": 1, "train/bpb": 5}\nhalf', config__yaml=b"{", environment__json=None)
    return [*out, older, hostile(root / ("hostile" + HOSTILE.replace("/", "|")))]


def tiny_stage() -> list[dict[str, int]]:
    return [{"patch_size": 1, "d_model": 16, "n_layers": 2, "n_heads": 2}]


@pytest.fixture(scope="module")
def page_of_all(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compare(runs, tmp_path_factory.mktemp("out")).path


def test_a_page_of_everything_is_sound(page_of_all: Path) -> None:
    page = sound(page_of_all)
    assert "Best: ours with" in page.words("p")
    assert "megabyte" in page.words("td")
    assert "no end told" in page.words("p")
    assert len(page.of("img")) == 1
    assert len(page.of("audio")) == 1
    assert "alert(1)" not in page.words("script")
    assert "\x1b" not in page_of_all.read_text()
    assert "\u202e" not in page_of_all.read_text()
    assert re.search(r"cut: no validation|older: config.yaml is damaged", page.words("li"))


def test_pictures_are_beside_the_page(page_of_all: Path) -> None:
    pictures = sorted(page_of_all.parent.glob("*.png"))
    assert len(pictures) >= 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert all(path.name.startswith("curves_") and re.fullmatch(r"[\w.-]+", path.name) for path in pictures)


@pytest.mark.parametrize("count", [1, 2, 60])
def test_from_one_run_to_sixty(tmp_path: Path, count: int) -> None:
    folders = [made.run(tmp_path / f"r{i // 3}_s{i % 3}", floor=2 + i / 30, steps=30) for i in range(count)]
    out = compare(folders, tmp_path / "out")
    page = sound(out.path)
    groups = len(out.runs) // 3 if count == 60 else 1
    assert len({run["group"] for run in out.runs}) == groups
    assert len([a for a in page.of("g") if (a.get("class") or "").startswith("curve")]) == 3 * groups
    scores = [run["bpb"] for run in out.runs]
    means = [sum(scores[i : i + 3]) for i in range(0, len(scores), 3)]
    assert means == sorted(means)
    assert out.path.stat().st_size < 2_000_000


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [made.run(tmp_path / place / "run") for place in ("first", "second")]
    assert {run["name"] for run in compare([*folders, folders[0]], tmp_path / "out").runs} == {
        "first/run",
        "second/run",
    }


def test_what_is_no_markup_is_escaped() -> None:
    made_ = element("p", "<b>", Markup("<i>"), ["&", element("br")], title='"<', data_g=1, hidden=None)
    assert made_ == '<p title="&quot;&lt;" data-g="1">&lt;b&gt;<i>&amp;<br></p>'
    assert shown(b"a\tb\n\x00\xff\xe2\x80\xae\x1b") == "a\tb\n\\x00\\xff\\u202e\\x1b"


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(made.run(tmp_path / name)) for name in "ab"]
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", *folders, f"--out={tmp_path / 'out'}", "--json"])
    assert end.value.code == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["path"] == str(tmp_path / "out" / "compare.html")
    assert [run["name"] for run in figures["runs"]] == ["a", "b"]
    assert figures["runs"][0]["parameters"] == 12345


@pytest.mark.parametrize(
    "args",
    [
        ["{}/nothing"],
        [],
        ["{}/a", "--uri=x"],
        ["{}/a", "--out={}/file/x"],
        ["--experiment=x", "--uri=sqlite:///{}/no.db"],
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.run(tmp_path / "a")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", *(arg.format(tmp_path) for arg in args)])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


class _Proxy(BaseHTTPRequestHandler):
    """Hears of every address that a browser asks for, and has none of them."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if "google" not in self.path and "gvt1.com" not in self.path:  # Chromium's own errands
            self.asked.append(self.path)
        self.send_error(404)

    do_CONNECT = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def browse(page: Path, folder: Path) -> tuple[str, str, list[str]]:
    """(the document as it became, what the console said, addresses that were asked for) in headless Chromium."""
    _Proxy.asked.clear()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--dump-dom", "--enable-logging=stderr", "--virtual-time-budget=1000", "--disable-component-update"]
    with ThreadingHTTPServer(("127.0.0.1", 0), _Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        options += [f"--proxy-server=http://127.0.0.1:{proxy.server_port}", "--proxy-bypass-list=<-loopback>"]
        command = [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        proxy.shutdown()
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line), [*_Proxy.asked]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser_it_asks_for_nothing_and_says_nothing(page_of_all: Path, tmp_path: Path) -> None:
    document, said, asked = browse(page_of_all, tmp_path)
    assert said == ""
    assert asked == []
    assert document.count("<svg") > 10


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser_a_table_is_sorted_and_the_policy_stops_what_is_not_ours(
    page_of_all: Path, tmp_path: Path
) -> None:
    """A script that got in does nothing; without the policy it clicks on a head, and the rows turn round."""
    picture = "http://somewhere.example/x.png"
    click = "for (const i of [0, 1]) document.querySelector('table.sorted th button').click()"
    text = page_of_all.read_text().replace("</body>", f"<img src='{picture}'><script>{click}</script></body>")
    names = r'<span class="name">(ours|rival|cut)</span>'
    orders = {}
    for name, changed in (("with", text), ("without", re.sub(r'<meta http-equiv="[^>]*>', "", text))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.html").write_text(changed)
        document, said, asked = browse(tmp_path / name / "page.html", tmp_path / name)
        orders[name] = re.findall(names, re.search(r"<tbody>.*?</tbody>", document, re.DOTALL)[0])  # type: ignore[index]
        assert ("Content Security Policy" in said) == (name == "with")
        assert asked == ([] if name == "with" else [picture])
    assert orders["with"] == ["ours", "rival", "cut"]
    assert orders["without"] == ["rival", "ours", "cut"]
