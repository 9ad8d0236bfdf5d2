"""The page of `inference.py --serve`: its answers, what it serves, and its use in a browser.

Needs gradio, playwright and Chromium. Without them tests are skipped, but not where the variable
`CI` is set.
"""

import csv
import http.client
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

import pytest
from conftest import ROOT, error_message
from PIL import Image

from inference import Page, Searcher, main

slow = pytest.mark.slow
FLAGS = ["--device", "cpu", "--num-workers", "0"]
QUERY = "a large red circle at the top left"
TEXTS = ["a red circle", "a blue square", "a <b>green</b> triangle"]
HOSTILE = "<img src=x onerror=alert(1)>.png"
# inference.py, which is refused each connection and each name but this machine's.
SERVER = """
import sys

def refuse(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", None):
        print("CONNECTION to", host, file=sys.stderr)
        raise OSError("there is no network")

sys.addaudithook(refuse)
import inference
inference.main()
"""


def require(name: str) -> ModuleType:
    return importlib.import_module(name) if "CI" in os.environ else pytest.importorskip(name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def server(folder: Path, *flags: object) -> Iterator[tuple[subprocess.Popen, int]]:
    """The process of a page and its port; its standard error is the file `stderr` in `folder`."""
    require("gradio")
    (folder / "scratch").mkdir(exist_ok=True)
    port = free_port()
    arguments = ["--weights", "w.pt", "--serve", "--port", port, *FLAGS, *flags]
    with (
        open(folder / "stderr", "w") as stderr,
        subprocess.Popen(
            [sys.executable, "-u", "-c", SERVER, *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "scratch")},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # The background jobs of a shell ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        try:
            line = ""
            while not line.startswith(f"open http://127.0.0.1:{port} "):
                line = process.stdout.readline()
                assert line, (folder / "stderr").read_text()
            yield process, port
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shapes: Path, trained: Path) -> Path:
    """A checkpoint, a folder of 13 images, and beside them a file that must not be served."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copy(trained / "best.pt", folder / "w.pt")
    (folder / "images").mkdir()
    for image in sorted((shapes / "Images").iterdir())[:12]:
        shutil.copy(image, folder / "images")
    Image.new("RGB", (60, 40), "red").save(folder / "images" / HOSTILE)
    (folder / "images" / "notes.txt").write_text("SECRET")
    return folder


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """The port of a page over `folder`, which connects to nothing."""
    with server(folder, "--images", "images", "--n", 4) as (process, port):
        yield port
        assert process.poll() is None
    assert "CONNECTION" not in (folder / "stderr").read_text()


@pytest.fixture(scope="module")
def client(port: int) -> object:
    url = f"http://127.0.0.1:{port}"
    return require("gradio_client").Client(url, download_files=False, verbose=False)


# ---------------------------------------------------------------- answers


def uploaded(path: Path) -> dict:
    return require("gradio_client").handle_file(path)


def saved_matches(*flags: object) -> list[dict[str, str]]:
    """The table that the command line saves."""
    arguments = ["--weights", "w.pt", "--output", "matches.csv", *FLAGS, *flags]
    main([str(argument) for argument in arguments])
    with open("matches.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_shows(gallery: list[dict], matches: list[dict[str, str]]) -> None:
    expected = [
        f"{match['rank']}.  {float(match['score']):.3f}\n{Path(match['path']).name}"
        for match in matches
    ]
    assert [item["caption"] for item in gallery] == expected


@slow
def test_page_answers_equal_those_of_the_command_line(
    client: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search and similar images as printed, with three digits; probabilities with all digits."""
    monkeypatch.chdir(folder)
    matches = saved_matches("--images", "images", "--query", QUERY, "--n", 5)
    assert_shows(client.predict(QUERY, 5, api_name="/search"), matches)

    photo = "images/00003.png"
    matches = saved_matches("--images", "images", "--like", photo, "--n", 5)
    client.predict(uploaded(photo), api_name="/upload")
    assert_shows(client.predict(5, api_name="/similar"), matches)

    queries = [flag for text in TEXTS for flag in ("--query", text)]
    matches = saved_matches("--image", photo, *queries)
    client.predict(uploaded(photo), api_name="/upload_1")
    label = client.predict("\n".join(TEXTS), api_name="/classify")
    ours = {item["label"]: item["confidence"] for item in label["confidences"]}
    assert ours == {match["query"]: float(match["score"]) for match in matches}


def test_page_ranks_as_the_searcher(trained: Path, shapes: Path, workdir: Path) -> None:
    """Without gradio, over the test split of the data set, from an index that is read once."""
    shutil.copy(trained / "best.pt", workdir)
    searcher = Searcher("best.pt", "cpu", 0, data_dir=shapes)
    page = Page(searcher, None)
    (matches,) = searcher.search(QUERY, n=3)
    shutil.rmtree("best.index")
    items, paths = page.search(QUERY, 3)
    assert paths == [match.path for match in matches]
    assert [caption.split()[1] for _, caption in items] == [f"{m.score:.3f}" for m in matches]
    assert page.examples[0] == searcher.checkpoint.example_query
    assert set(page.examples) <= set(searcher.test_split.texts)
    assert len(page.examples) >= 3
    assert not Path("best.index").exists()


# ---------------------------------------------------------------- what is served


def status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)  # without normalization of ".."
    response = connection.getresponse()
    body = response.read()
    assert b"SECRET" not in body and b"root:" not in body and b"PK\x03\x04" not in body[:4]
    return response.status


@slow
def test_page_serves_thumbnails_and_no_other_file(client: object, port: int, folder: Path) -> None:
    gallery = client.predict(QUERY, 2, api_name="/search")
    thumbnail = Path(gallery[0]["image"]["path"])
    assert status(port, f"/gradio_api/file={thumbnail}") == 200
    to_root = "/".join([".."] * 12)
    files = [folder / "images" / "notes.txt", folder / "images" / "00003.png", folder / "w.pt"]
    files += ["/etc/passwd", "images/notes.txt", "w.pt", "./w.pt", thumbnail.parent]
    files += [f"{thumbnail.parent}/{to_root}/etc/passwd", f"{folder}/scratch/../images/notes.txt"]
    for file in files:
        for name in (str(file), quote(str(file), safe="")):
            assert status(port, f"/gradio_api/file={name}") in (403, 404), name
    for prefix in ("static", "assets", "svelte", "gradio_api/file", "gradio_api/proxy="):
        for dots in (to_root, to_root.replace(".", "%2e"), to_root.replace("/", "%2f")):
            assert status(port, f"/{prefix}/{dots}/etc/passwd") >= 400


@slow
def test_page_takes_no_file_of_this_machine_as_an_upload(port: int, folder: Path) -> None:
    """It would be shown, and deleted."""
    (folder / "mine.png").write_bytes((folder / "images" / "00003.png").read_bytes())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for path in (folder / "mine.png", "mine.png", f"{folder}/scratch/../mine.png"):
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        headers = {"Content-Type": "application/json"}
        url = "/gradio_api/call/upload"
        connection.request("POST", url, json.dumps({"data": [file]}), headers)
        event = json.load(connection.getresponse())["event_id"]
        connection.request("GET", f"{url}/{event}")
        assert connection.getresponse().read().startswith(b"event: error")
        assert (folder / "mine.png").exists()


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux answers to all of 127.0.0.0/8")
def test_page_binds_to_one_address(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=20).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=20)


@slow
def test_page_deletes_uploads_and_reads_them_as_any_image(client: object, folder: Path) -> None:
    """A file that is no image, PostScript and a bomb are errors of one line; the page lives on."""
    Image.new("RGB", (50, 40), "blue").save(folder / "blue.png")
    Image.new("RGB", (50, 40), "blue").save(folder / "postscript.eps")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "x.png").write_text("no image")
    uploads = {"postscript.eps": "cannot be read as an image", "bomb.png": "more than"}
    uploads |= {"x.png": "cannot be read as an image"}
    for name, message in uploads.items():
        with pytest.raises(Exception, match=f"^'?{name}: .*{message}"):
            client.predict(uploaded(folder / name), api_name="/upload")
    client.predict(uploaded(folder / "blue.png"), api_name="/upload")
    with pytest.raises(Exception, match="empty"):
        client.predict(" ", 3, api_name="/search")
    assert len(client.predict(QUERY, 3, api_name="/search")) == 3
    kept = [path.read_bytes() for path in (folder / "scratch").rglob("*") if path.is_file()]
    for name in ("blue.png", *uploads):
        assert (folder / name).read_bytes() not in kept


# ---------------------------------------------------------------- start and end


@slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_page_stops_with_one_line_and_leaves_no_file(
    stop: signal.Signals, checkpoint: Path, images: Path, workdir: Path
) -> None:
    with server(workdir, "--images", images) as (process, _):
        assert len(list((workdir / "scratch").iterdir())) == 1
        process.send_signal(stop)
        assert process.wait(60) == 1
    assert (workdir / "stderr").read_text() == "stopped\n"
    assert list((workdir / "scratch").iterdir()) == []


def test_page_without_gradio_is_one_line_error(
    checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = error_message(main, "--weights", checkpoint, "--images", images, "--serve")
    assert message == "error: --serve requires gradio: pip install gradio"


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_page_address_that_cannot_be_used_is_one_line_error(
    host: str, checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        flags = ["--serve", "--host", host, "--port", other.getsockname()[1]]
        message = error_message(main, "--weights", checkpoint, "--images", images, *flags)
    assert message.startswith(f"error: --host {host} --port {flags[-1]}: ")


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = require("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium and "CI" not in os.environ:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as tools:
        # Without a sandbox, which root may not have. Names other than this machine are unknown.
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        arguments = ["--no-sandbox", rules]
        yield tools.chromium.launch(executable_path=chromium, args=arguments)


@slow
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(browser: object, port: int, folder: Path, width: int) -> None:
    """A query, a click and an upload make no error in the console and no request elsewhere."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems, urls = [], []
    page.on("console", lambda line: line.type == "error" and problems.append(line.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("response", lambda answer: answer.ok or problems.append(answer.url))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(f"http://127.0.0.1:{port}")

    # 1. Four images of a query, then all by the slider. A click shows the full size, or an error.
    thumbnails = page.locator(".thumbnail-item:visible")
    page.get_by_label("query").fill(QUERY)
    page.get_by_label("query").press("Enter")
    thumbnails.nth(3).wait_for()
    assert thumbnails.count() == 4
    page.get_by_label("number input").first.fill("13")
    page.get_by_label("number input").first.press("Enter")
    thumbnails.nth(12).wait_for()
    hostile = page.locator(".thumbnail-item", has_text=HOSTILE)
    (folder / "images" / HOSTILE).rename(folder / "elsewhere")
    hostile.click()
    page.get_by_text(f"images/{HOSTILE}: cannot be read as an image").first.wait_for()
    (folder / "elsewhere").rename(folder / "images" / HOSTILE)
    thumbnails.first.click()
    page.locator(".details img").wait_for()
    hostile.click()
    assert page.locator(".details textarea, .details input").input_value() == f"images/{HOSTILE}"
    size = (
        "[...document.querySelectorAll('.details img')].map(i => [i.naturalWidth, i.naturalHeight])"
    )
    page.wait_for_function(f"({size})[0][0] == 60")
    assert page.evaluate(size) == [[60, 40]]

    # 2. The images that are most like an uploaded one.
    page.get_by_role("tab", name="Similar images").click()
    page.locator("input[type=file]").first.set_input_files(folder / "images" / "00003.png")
    thumbnails.nth(3).wait_for()
    assert "00003.png" in thumbnails.first.inner_text()

    # 3. The probabilities of texts, and first the error that there is no image.
    page.get_by_role("tab", name="Classify").click()
    page.get_by_label("texts, one a line").fill("\n".join(TEXTS))
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("nothing is given; type a text or upload an image").wait_for()
    page.locator("input[type=file]").last.set_input_files(folder / "images" / HOSTILE)
    page.locator(".image-frame img:visible").wait_for()
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("a <b>green</b> triangle").last.wait_for()

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert problems == []
    assert {url.split("/")[2] for url in urls if not url.startswith("data:")} == {
        f"127.0.0.1:{port}"
    }
    page.close()
