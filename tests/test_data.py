"""Pictures with captions: found in both layouts, split, refused, fetched, drawn, read, and made into batches."""

import csv
import io
import re
import shutil
import struct
import tempfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from config import Config, UserError, parse
from data import (
    ARCHIVES,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Split,
    Transform,
    build_train_loader,
    download_flickr8k,
    generate_shapes,
    load_image,
    read_splits,
    tokenize,
)
from models import build_wordpiece_tokenizer
from trainer import prepare_dataset

CAPTION = "A dog runs ."
LISTED = {"train": ["a.jpg"], "dev": ["b.jpg"], "test": ["c.jpg"]}
TOKENS = "".join(
    f"{name}.jpg#{number}\t{name} {number} .\n" for name in "abc" for number in range(2)
)
TABLE = "image,caption\n" + "".join(
    f"{name}.jpg,{name} {number} .\n" for name in "abc" for number in range(2)
)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lists(listed: dict[str, list[str]], folder: str = "") -> dict[str, str]:
    return {
        f"{folder}Flickr_8k.{split}Images.txt": "\n".join(names) for split, names in listed.items()
    }


def kaggle(folder: Path, table: str | bytes = TABLE, pictures: list[str] | None = None) -> Path:
    """Kaggle's layout without lists; reading it opens no picture, so these are empty."""
    names = ["a.jpg", "b.jpg", "c.jpg"] if pictures is None else pictures
    return write(folder, {"captions.txt": table} | {f"Images/{name}": b"" for name in names})


def archives(folder: Path, tokens: str | bytes = TOKENS, text_folder: str = "") -> Path:
    """The archives' layout with lists; reading it opens no picture, so these are empty."""
    pictures = {f"Flicker8k_Dataset/{name}.jpg": b"" for name in "abc"}
    return write(
        folder, {f"{text_folder}Flickr8k.token.txt": tokens} | pictures | lists(LISTED, text_folder)
    )


def table_of(captions: dict[str, list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(
        [("image", "caption"), *((name, text) for name in captions for text in captions[name])]
    )
    return file.getvalue()


def captions_in(splits: dict[str, Split]) -> dict[str, list[str]]:
    pairs = [pair for split in splits.values() for pair in zip(split.paths, split.captions)]
    assert len({path for path, _ in pairs}) == len(pairs)
    return {path.name: captions for path, captions in pairs}


def numbered(pictures: int, captions: int = 5) -> dict[str, list[str]]:
    return {
        f"{i:03d}.jpg": [f"picture {i} caption {j}" for j in range(captions)]
        for i in range(pictures)
    }


# ---------------------------------------------------------------- both layouts


@pytest.mark.parametrize("text_folder", ["", "Flickr8k_text/"])
def test_the_archives_layout_is_read_with_the_text_files_beside_the_pictures_or_in_a_folder(
    tmp_path: Path, text_folder: str
):
    splits = read_splits(archives(tmp_path, text_folder=text_folder))
    assert list(splits) == ["train", "dev", "test"]
    for split, name in zip(SPLITS, "abc"):
        assert splits[split].paths == [tmp_path / "Flicker8k_Dataset" / f"{name}.jpg"]
        assert splits[split].captions == [[f"{name} 0 .", f"{name} 1 ."]]


@pytest.mark.parametrize(
    ("cell", "caption"),
    [
        ("None", "None"),
        ("NA", "NA"),
        ("null", "null"),
        ("007", "007"),
        ('"A dog, a cat , and a man ."', "A dog, a cat , and a man ."),
        ('"A sign says "" Stop "" ."', 'A sign says " Stop " .'),
        ('"A dog\nruns"', "A dog runs"),
        ('"A dog\r\nruns"', "A dog runs"),
        ("  A  dog\truns ", "A dog runs"),
        ("Ein Mädchen läuft 🏃", "Ein Mädchen läuft 🏃"),
    ],
)
def test_any_text_is_a_caption_in_kaggles_layout(tmp_path: Path, cell: str, caption: str):
    folder = write(kaggle(tmp_path, f"{TABLE}a.jpg,{cell}\n"), lists(LISTED))
    assert captions_in(read_splits(folder))["a.jpg"] == ["a 0 .", "a 1 .", caption]


@pytest.mark.parametrize(
    "make", [lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n")]
)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(
    tmp_path: Path, make: Callable[[bytes], bytes]
):
    files = {name: make(text.encode()) for name, text in lists(LISTED).items()}
    one = read_splits(write(kaggle(tmp_path / "kaggle", make(TABLE.encode())), files))
    other = read_splits(write(archives(tmp_path / "archives", make(TOKENS.encode())), files))
    expected = {f"{name}.jpg": [f"{name} 0 .", f"{name} 1 ."] for name in "abc"}
    assert captions_in(one) == captions_in(other) == expected


def test_columns_may_stand_in_any_order_among_others(tmp_path: Path):
    table = "number, caption ,image\n" + "".join(
        f"{i},{name} runs,{name}.jpg\n" for i, name in enumerate("abc")
    )
    splits = read_splits(write(kaggle(tmp_path, table), lists(LISTED)))
    assert captions_in(splits) == {f"{name}.jpg": [f"{name} runs"] for name in "abc"}


def test_data_of_ones_own_may_have_any_picture_names_and_any_number_of_captions(tmp_path: Path):
    names = [
        "my dog, 2024.PNG",
        "Ünï.webp",
        "sub/folder/x.jpeg",
        "no-suffix",
        "a#b.jpg",
        'a "b".jpg',
    ]
    names += [f"{i}.jpg" for i in range(10)]
    captions = {
        name: [f"caption {i} of {len(name)}" for i in range(1 + len(name) % 4)] for name in names
    }
    splits = read_splits(kaggle(tmp_path, table_of(captions), names))
    assert captions_in(splits) == {Path(name).name: texts for name, texts in captions.items()}


NAMES = st.text(
    st.characters(categories=("L", "N", "P", "S"), exclude_characters="/\\"),
    min_size=1,
    max_size=20,
).map(lambda stem: f"{stem}.jpg")
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
ONE_LINE = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\r\n"), max_size=20
)


def captioned(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, list[str]]]:
    """Three or more pictures, the first caption of each with a word in it."""
    return st.dictionaries(
        NAMES, st.lists(text, max_size=3).map(lambda texts: ["A dog", *texts]), min_size=3
    )


def read_back(
    files: dict[str, str], pictures: str, captions: dict[str, list[str]]
) -> dict[str, list[str]]:
    names = list(captions)
    listed = {"train": names[2:], "dev": names[:1], "test": names[1:2]}
    with tempfile.TemporaryDirectory() as folder:
        images = {f"{pictures}/{name}": b"" for name in names}
        return captions_in(read_splits(write(Path(folder), files | images | lists(listed))))


def in_single_spaces(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    return {
        name: [" ".join(text.split()) for text in texts if text.split()]
        for name, texts in captions.items()
    }


@settings(deadline=None, max_examples=40)
@given(captioned(TEXT))
def test_what_is_written_as_csv_is_read_back(captions: dict[str, list[str]]):
    assert read_back({"captions.txt": table_of(captions)}, "Images", captions) == in_single_spaces(
        captions
    )


@settings(deadline=None, max_examples=40)
@given(captioned(ONE_LINE))
def test_what_is_written_with_tabs_is_read_back(captions: dict[str, list[str]]):
    tokens = "".join(
        f"{name}#{i}\t{text}\n" for name in captions for i, text in enumerate(captions[name])
    )
    assert read_back(
        {"Flickr8k.token.txt": tokens}, "Flicker8k_Dataset", captions
    ) == in_single_spaces(captions)


# ---------------------------------------------------------------- what is left out


def test_captions_without_their_picture_are_counted_the_first_named_and_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    """As in Flickr8k: five captions of a `.jpg.1` that is in no archive."""
    hole = "2258277193_586949ec62.jpg.1"
    captions = numbered(100) | {hole: [CAPTION] * 5}
    tokens = "".join(
        f"{name}#{i}\t{text}\n" for name in captions for i, text in enumerate(captions[name])
    )
    pictures = {f"Flicker8k_Dataset/{name}": b"" for name in captions if name != hole}
    splits = read_splits(write(tmp_path, {"Flickr8k.token.txt": tokens} | pictures))
    assert captions_in(splits) == numbered(100)
    said = capsys.readouterr().out
    assert "5 of 505 captions have no picture" in said
    assert hole in said and "Flickr8k.token.txt" in said


@pytest.mark.parametrize(("there", "fine"), [(99, True), (98, False)])
def test_more_than_one_per_cent_without_a_picture_is_an_error(
    tmp_path: Path, there: int, fine: bool
):
    captions = numbered(there) | {"gone.jpg": [CAPTION] * 5}
    folder = kaggle(tmp_path, table_of(captions), list(numbered(there)))
    if fine:
        assert captions_in(read_splits(folder)) == numbered(there)
    else:
        error = refusal(lambda: read_splits(folder))
        for words in (
            f"5 of {5 * there + 5} captions",
            "gone.jpg",
            str(folder / "Images"),
            "captions.txt",
            "1 %",
        ):
            assert words in error


def test_pictures_in_no_list_and_without_a_caption_are_counted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    names = [
        "a.jpg",
        "b.jpg",
        "c.jpg",
        "unlisted.jpg",
        "other.jpg",
        "wordless.jpg",
        "blank.jpg",
        "sub/wordless.jpg",
    ]
    table = f"{TABLE}unlisted.jpg,a cat\nother.jpg,a man\nblank.jpg,\n"
    splits = read_splits(
        write(kaggle(tmp_path, table, names), lists(LISTED | {"dev": ["b.jpg", "wordless.jpg"]}))
    )
    assert set(captions_in(splits)) == {"a.jpg", "b.jpg", "c.jpg"}
    assert "2 pictures in no split list and 3 without a caption" in capsys.readouterr().out


def test_nothing_is_said_to_be_left_out_where_nothing_is(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    read_splits(archives(tmp_path))
    said = capsys.readouterr().out
    assert "left out" not in said
    assert "3 pictures, 6 captions; train 1, dev 1, test 1" in said


# ---------------------------------------------------------------- splits


def test_split_lists_are_used_in_kaggles_layout_too(tmp_path: Path, capsys: pytest.CaptureFixture):
    listed = {"train": ["b.jpg"], "dev": ["c.jpg"], "test": ["a.jpg"]}
    splits = read_splits(write(kaggle(tmp_path), lists(listed)))
    assert {split: [path.name for path in part.paths] for split, part in splits.items()} == listed
    assert "no split lists" not in capsys.readouterr().out


def test_without_lists_the_split_is_by_picture_always_the_same_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    captions = numbered(40)
    backwards = dict(reversed(captions.items()))
    one = read_splits(kaggle(tmp_path / "one", table_of(captions), list(captions)))
    assert (
        "no split lists; by their names 4 pictures are held out for dev and 4 for test"
        in capsys.readouterr().out
    )
    other = read_splits(kaggle(tmp_path / "other", table_of(backwards), list(backwards)))
    for split in SPLITS:
        assert [path.name for path in one[split].paths] == [
            path.name for path in other[split].paths
        ]
    assert [path.name for path in one["dev"].paths + one["test"].paths] != list(captions)[:8]


def test_pictures_that_are_added_leave_nearly_all_others_in_their_split(tmp_path: Path):
    before, after = (
        {split: {path.name for path in part.paths} for split, part in read_splits(folder).items()}
        for count in (300, 310)
        for folder in [
            kaggle(tmp_path / str(count), table_of(numbered(count)), list(numbered(count)))
        ]
    )
    assert len(after["test"]) == 31
    assert len(after["test"] & before["train"]) <= 3  # by a draw it would be 25


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 6), min_size=10, max_size=120))
def test_no_picture_is_in_two_splits_and_every_caption_stays_with_its_picture(counts: list[int]):
    captions = {f"{i}.jpg": [f"{i} {j}" for j in range(count)] for i, count in enumerate(counts)}
    with tempfile.TemporaryDirectory() as folder:
        splits = read_splits(kaggle(Path(folder), table_of(captions), list(captions)))
    assert captions_in(splits) == captions
    assert len(splits["dev"].paths) == len(splits["test"].paths) == len(counts) // 10


def test_a_picture_in_two_splits_is_an_error(tmp_path: Path):
    folder = write(kaggle(tmp_path), lists(LISTED | {"test": ["c.jpg", "a.jpg"]}))
    error = refusal(lambda: read_splits(folder))
    assert "a.jpg" in error and "train" in error and "testImages.txt" in error


def test_one_picture_written_in_two_ways_does_not_get_into_two_splits(tmp_path: Path):
    folder = write(
        kaggle(tmp_path, f"{TABLE}./a.jpg,a 2 .\n"), lists(LISTED | {"test": ["c.jpg", "./a.jpg"]})
    )
    try:
        splits = read_splits(folder)
    except UserError:
        return
    files = [path.resolve() for split in splits.values() for path in split.paths]
    assert len(files) == len(set(files))


@pytest.mark.parametrize(
    ("listed", "empty"),
    [
        ({"dev": []}, "dev"),
        ({"test": ["elsewhere.jpg"]}, "test"),
        ({"train": ["a"]}, "train"),
    ],
)
def test_an_empty_split_is_an_error_that_says_what_was_looked_for_and_where(
    tmp_path: Path, listed: dict[str, list[str]], empty: str
):
    error = refusal(lambda: read_splits(write(kaggle(tmp_path), lists(LISTED | listed))))
    assert f"the {empty} split is empty" in error and str(tmp_path / "Images") in error


@pytest.mark.parametrize("table", ["image,caption\n", TABLE])
def test_too_few_pictures_to_hold_any_out_is_an_error(tmp_path: Path, table: str):
    assert "split is empty" in refusal(lambda: read_splits(kaggle(tmp_path, table)))


# ---------------------------------------------------------------- errors


def refusal(action: Callable[[], object]) -> str:
    """The one line that the user is told."""
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"a.jpg#2 a dog\n", "no tab"),
        (b"a.jpg#2\tcaf\xe9\n", "UTF-8"),
        (b"../../x.jpg#0\ta dog\n", "../../x.jpg"),
        (b"/etc/passwd#0\ta dog\n", "/etc/passwd"),
        (b"\ta dog\n", "''"),
    ],
)
def test_a_bad_row_with_a_tab_layout_names_file_and_row(tmp_path: Path, row: bytes, said: str):
    folder = archives(tmp_path, TOKENS.encode() + b"\n" + row + TOKENS.encode())
    error = refusal(lambda: read_splits(folder))
    assert f"{folder / 'Flickr8k.token.txt'}, row 8: " in error and said in error


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"a.jpg\n", "1 cells under 2 columns"),
        (b"a.jpg,a dog, a cat\n", "3 cells under 2 columns"),
        (b"a.jpg,caf\xe9\n", "UTF-8"),
        (b"../../x.jpg,a dog\n", "../../x.jpg"),
        (b"sub/../../x.jpg,a dog\n", "sub/../../x.jpg"),
        (b"/etc/passwd,a dog\n", "/etc/passwd"),
        (b",a dog\n", "''"),
        (b'a.jpg,"a dog" runs\n', "expected after"),
    ],
)
def test_a_bad_row_of_a_csv_names_file_and_row(tmp_path: Path, row: bytes, said: str):
    folder = kaggle(tmp_path, TABLE.encode() + b'a.jpg,"two\nrows"\n' + row + b"b.jpg,b 3 .\n")
    error = refusal(lambda: read_splits(folder))
    assert f"{folder / 'captions.txt'}, row 10: " in error and said in error


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "'image' and 'caption' are needed"),
        ("image,text\na.jpg,a dog\n", "'caption'"),
        ("a.jpg,a dog\nb.jpg,a cat\n", "'image' and 'caption' are needed"),
        ("image;caption\na.jpg;a dog\n", "'image' and 'caption' are needed"),
        ('"image"x,caption\na.jpg,a dog\n', "captions.txt"),
        ('image,"caption\na.jpg,a dog\n', "captions.txt"),
        (TABLE + 'a.jpg,"a dog\n', "captions.txt, row 8"),
    ],
)
def test_a_csv_without_its_columns_or_with_an_open_quote_is_an_error(
    tmp_path: Path, table: str, said: str
):
    error = refusal(lambda: read_splits(kaggle(tmp_path, table)))
    assert str(tmp_path / "captions.txt") in error and "row " in error and said in error


def test_a_list_that_is_missing_or_not_utf8_is_named(tmp_path: Path):
    folder = archives(tmp_path)
    (folder / "Flickr_8k.testImages.txt").write_bytes(b"c.jpg\n\n\xe9.jpg\n")
    assert "Flickr_8k.testImages.txt, row 3: not UTF-8" in refusal(lambda: read_splits(folder))
    (folder / "Flickr_8k.testImages.txt").unlink()
    assert "Flickr_8k.testImages.txt: No such file" in refusal(lambda: read_splits(folder))


@pytest.mark.parametrize("missing", ["Images", "captions.txt"])
def test_a_folder_in_neither_layout_is_an_error_that_names_what_was_looked_for(
    tmp_path: Path, missing: str
):
    folder = kaggle(tmp_path)
    (folder / missing).rename(folder / "elsewhere")
    error = refusal(lambda: read_splits(folder))
    assert str(folder) in error
    assert all(
        name in error
        for name in ("Flicker8k_Dataset", "Flickr8k.token.txt", "Images", "captions.txt")
    )


# ---------------------------------------------------------------- fetching


class Answer(BaseHTTPRequestHandler):
    """Sends what `server.answers` holds for a path: a body, and the length to claim for it."""

    def do_GET(self):
        if self.path not in self.server.answers:
            return self.send_error(404)
        body, length = self.server.answers[self.path]
        self.send_response(200)
        for name, value in (
            {"Content-Length": length} if isinstance(length, int) else length
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        return self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A local stand-in for the place where Flickr8k is kept, with small sound archives."""
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.url = f"http://127.0.0.1:{server.server_port}/Flickr8k/"
    server.answers = {
        f"/Flickr8k/{name}": (body, len(body)) for name, body in zip(ARCHIVES, sound_archives())
    }
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def zipped(files: dict[str, str | bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
        for name, content in files.items():
            members.writestr(name, content)
    return archive.getvalue()


def sound_archives() -> tuple[bytes, bytes]:
    noise = np.random.default_rng(0).bytes(3000)
    pictures = {f"Flicker8k_Dataset/{name}.jpg": noise for name in "abc"}
    return zipped(pictures | {"__MACOSX/Flicker8k_Dataset/._a.jpg": b"x"}), zipped(
        {"Flickr8k.token.txt": TOKENS} | lists(LISTED)
    )


def damaged(archive: bytes, position: int, bits: int) -> bytes:
    """One byte is another."""
    broken = bytearray(archive)
    broken[position] ^= bits
    return bytes(broken)


def test_both_archives_are_fetched_and_make_a_data_set(workdir: Path, server: ThreadingHTTPServer):
    download_flickr8k(Path("data/flickr8k"), server.url)
    assert captions_in(read_splits("data/flickr8k")) == {
        f"{x}.jpg": [f"{x} 0 .", f"{x} 1 ."] for x in "abc"
    }
    assert [path.name for path in Path("data").iterdir()] == ["flickr8k"]
    assert not list(Path("data/flickr8k").glob("*.zip"))


def test_the_address_may_end_with_or_without_a_slash(workdir: Path, server: ThreadingHTTPServer):
    download_flickr8k(Path("data/flickr8k"), server.url.rstrip("/"))
    assert Path("data/flickr8k/Flickr8k.token.txt").is_file()


PICTURES, TEXTS = sound_archives()
MANY = zipped({f"{i}.txt": "a dog runs over the snow " * 40 for i in range(20)})


@pytest.mark.parametrize("broken", ARCHIVES)
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param((PICTURES[:-100], len(PICTURES)), id="the connection ends early"),
        pytest.param(
            (PICTURES, len(PICTURES) + 9), id="an archive that is whole but should be longer"
        ),
        pytest.param((b"", len(PICTURES)), id="nothing comes"),
        pytest.param(
            (b"64\r\n" + b"x" * 50, {"Transfer-Encoding": "chunked"}), id="a chunk ends early"
        ),
        pytest.param((PICTURES[:-100], {}), id="no length, and the end is missing"),
        pytest.param((PICTURES[:-100], len(PICTURES) - 100), id="a truncated archive"),
        pytest.param((b"<html>Sorry</html>", 18), id="a web page"),
        pytest.param((damaged(MANY, 60, 1), len(MANY)), id="a member with another sum"),
        pytest.param((damaged(MANY, 35, 0b110), len(MANY)), id="a member that cannot be unpacked"),
        pytest.param((zipped({"../climbed.txt": "x"}),) * 2, id="a member climbs out"),
        pytest.param(
            (zipped({"a/../../climbed.txt": "x"}),) * 2, id="a member climbs out from within"
        ),
        pytest.param((zipped({"/climbed.txt": "x"}),) * 2, id="a member with an absolute path"),
        pytest.param(None, id="404"),
    ],
)
def test_a_broken_transfer_is_one_error_leaves_no_folder_and_a_second_try_succeeds(
    workdir: Path, server: ThreadingHTTPServer, broken: str, answer: tuple | None
):
    path, sound = f"/Flickr8k/{broken}", server.answers[f"/Flickr8k/{broken}"]
    del server.answers[path]
    if answer:
        body, length = answer
        server.answers[path] = (body, len(body) if isinstance(length, bytes) else length)
    error = refusal(lambda: download_flickr8k(Path("data/flickr8k"), server.url))
    for words in (server.url + broken, *ARCHIVES, "data/flickr8k", "--data-dir", "--demo"):
        assert words in error
    assert not Path("data/flickr8k").exists()
    assert not list(workdir.rglob("climbed.txt"))
    server.answers[path] = sound
    download_flickr8k(Path("data/flickr8k"), server.url)
    assert len(captions_in(read_splits("data/flickr8k"))) == 3
    assert [path.name for path in Path("data").iterdir()] == ["flickr8k"]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, len(TEXTS) - 1), st.integers(1, 255))
def test_whichever_byte_of_an_archive_is_damaged_it_is_one_error_or_does_no_harm(
    position: int, bits: int
):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), dict(zip(ARCHIVES, (PICTURES, damaged(TEXTS, position, bits)))))
        fetched = Path(folder, "flickr8k")
        try:
            download_flickr8k(fetched, Path(folder).as_uri())
        except UserError as error:
            assert "--data-dir" in str(error) and not fetched.exists()
            return
        sound = [text.encode() for text in (TOKENS, *lists(LISTED).values())]
        assert all(path.read_bytes() in sound for path in fetched.glob("*.txt"))


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/", "no address", "http://[/", "gopher://127.0.0.1/"]
)
def test_nobody_listening_or_no_address_is_one_error_that_says_what_to_do(
    workdir: Path, address: str
):
    error = refusal(lambda: download_flickr8k(Path("data/flickr8k"), address))
    for words in (address, *ARCHIVES, "data/flickr8k", "--data-dir", "--demo"):
        assert words in error
    assert not Path("data/flickr8k").exists()


def test_a_process_killed_halfway_leaves_nothing_that_is_taken_for_whole(
    workdir: Path, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(zipfile.ZipFile, "extractall", killed)
        download_flickr8k(Path("data/flickr8k"), server.url)
    assert not Path("data/flickr8k").exists()
    download_flickr8k(Path("data/flickr8k"), server.url)
    assert len(captions_in(read_splits("data/flickr8k"))) == 3


def test_the_default_folder_is_fetched_from_the_address_in_the_settings_and_only_once(
    workdir: Path, server: ThreadingHTTPServer
):
    config = parse(Config, ["--download-url", server.url])
    prepare_dataset(config)
    assert len(captions_in(read_splits(config.data_dir))) == 3
    server.answers.clear()
    prepare_dataset(config)


@pytest.mark.parametrize("demo", [[], ["--demo"]])
def test_a_given_folder_that_is_absent_is_an_error_and_fetches_nothing(
    workdir: Path, server: ThreadingHTTPServer, demo: list[str]
):
    config = parse(Config, [*demo, "--data-dir", "data/flikr8k", "--download-url", server.url])
    prepare_dataset(config)
    error = refusal(lambda: read_splits(config.data_dir))
    assert "--data-dir data/flikr8k" in error
    assert not list(workdir.iterdir())


def test_the_demos_folder_is_drawn_where_it_is_absent(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn = []
    monkeypatch.setattr("trainer.generate_shapes", drawn.append)
    prepare_dataset(parse(Config, ["--demo"]))
    assert drawn == [Path("data/shapes")]
    Path("data/shapes").mkdir(parents=True)
    prepare_dataset(parse(Config, ["--demo"]))
    assert drawn == [Path("data/shapes")]


# ---------------------------------------------------------------- reading pictures


def saved(folder: Path, name: str, picture: Image.Image, **options) -> Path:
    picture.save(folder / name, **options)
    return folder / name


def test_grayscale_and_palette_pictures_become_red_green_and_blue(tmp_path: Path):
    grey = load_image(saved(tmp_path, "grey.png", Image.new("L", (3, 2), 100)))
    assert grey.shape == (2, 3, 3) and grey.dtype == np.uint8 and (grey == 100).all()
    palette = load_image(
        saved(tmp_path, "palette.png", Image.new("RGB", (3, 2), (255, 0, 0)).convert("P"))
    )
    assert palette.shape == (2, 3, 3) and (palette == (255, 0, 0)).all()
    black_and_white = load_image(saved(tmp_path, "bits.png", Image.new("1", (3, 2), 1)))
    assert black_and_white.shape == (2, 3, 3) and (black_and_white == 255).all()


def test_cmyk_pictures_become_red_green_and_blue(tmp_path: Path):
    pixels = load_image(
        saved(tmp_path, "print.jpg", Image.new("CMYK", (16, 8), (0, 255, 255, 0)), quality=95)
    )
    assert pixels.shape == (8, 16, 3)
    assert (abs(pixels.astype(int) - (255, 0, 0)) < 10).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_scaled_and_not_clipped_to_white(tmp_path: Path, name: str):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = load_image(saved(tmp_path, name, Image.fromarray(ramp)))
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert (abs(pixels[..., 0].astype(float) - ramp / 257) <= 1).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "one color"])
def test_what_is_transparent_becomes_white(tmp_path: Path, mode: str):
    picture, options = Image.new("RGBA", (2, 1), (0, 0, 0, 0)), {}
    picture.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "LA":
        picture = picture.convert("LA")
    elif mode == "palette":
        picture = Image.new("P", (2, 1), 0)
        picture.putpalette([10, 20, 30, 0, 0, 0])
        picture.putpixel((1, 0), 1)
        options = {"transparency": 0}
    elif mode == "one color":
        picture = Image.new("RGB", (2, 1), (10, 20, 30))
        picture.putpixel((1, 0), (0, 0, 0))
        options = {"transparency": (10, 20, 30)}
    pixels = load_image(saved(tmp_path, "see-through.png", picture, **options))
    assert pixels.tolist() == [[[255] * 3, [0] * 3]]


def test_what_is_half_transparent_becomes_half_white(tmp_path: Path):
    pixels = load_image(saved(tmp_path, "half.png", Image.new("RGBA", (1, 1), (255, 0, 0, 128))))
    assert (abs(pixels.astype(int) - (255, 127, 127)) <= 1).all()


def test_a_picture_that_its_camera_says_is_turned_is_turned_upright(tmp_path: Path):
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("red", (0, 0, 16, 16))
    turned_right = Image.Exif()
    turned_right[0x0112] = 6
    pixels = load_image(saved(tmp_path, "turned.jpg", picture, exif=turned_right, quality=95))
    assert pixels.shape == (32, 16, 3)
    assert (pixels[:12, :, 0] > 200).all() and (pixels[20:] < 50).all()


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_as_pillow_turns_it(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(
        tmp_path,
        "turned.png",
        Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)),
        exif=exif,
    )
    assert (load_image(path)[:, :, 0] == np.array(ImageOps.exif_transpose(Image.open(path)))).all()


def test_a_picture_whose_exif_is_damaged_elsewhere_is_turned_too(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 40  # turned, and a width of 40 ...
    path = saved(tmp_path, "damaged.jpg", Image.new("RGB", (40, 30)), exif=exif)
    width = exif.tobytes()[16:22]  # tag 0x0100, a number (4), one of it
    path.write_bytes(
        path.read_bytes().replace(width, width[:2] + b"\0\2" + width[4:])
    )  # ... that is said to be a text
    with pytest.raises((struct.error, TypeError, AttributeError)):
        ImageOps.exif_transpose(Image.open(path))
    assert load_image(path).shape == (40, 30, 3)


@pytest.mark.parametrize("size", [(1, 1), (4000, 20), (20, 4000)])
@pytest.mark.parametrize("augment", [True, False])
def test_tiny_and_very_long_pictures_are_pictures_too(
    tmp_path: Path, size: tuple[int, int], augment: bool
):
    path = saved(tmp_path, "odd.png", Image.new("RGB", size, (200, 30, 30)))
    assert load_image(path).shape == (*size[::-1], 3)
    (epoch,) = draws(Split([path] * 2, [[CAPTION]] * 2), augment=augment, batch_size=2)
    assert all(pixels.shape == (3, 32, 32) and (pixels[0] > pixels[1]).all() for _, pixels in epoch)


def broken_pictures(folder: Path) -> list[Path]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = saved(folder, "whole.jpg", noise).read_bytes()
    write(
        folder,
        {"truncated.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.jpg": b"not a picture"},
    )
    (folder / "folder.jpg").mkdir()
    return [
        folder / name
        for name in ("truncated.jpg", "empty.jpg", "text.jpg", "folder.jpg", "absent.jpg")
    ]


def test_what_cannot_be_read_as_a_picture_is_an_error_that_names_the_file(tmp_path: Path):
    for path in broken_pictures(tmp_path):
        assert str(path) in refusal(lambda path=path: load_image(path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_met_in_training_is_one_line_too(tmp_path: Path, workers: int):
    path = broken_pictures(tmp_path)[0]
    split = Split([path] * 4, [[CAPTION]] * 4)
    error = refusal(lambda: draws(split, num_workers=workers))
    assert error.startswith(str(path))


# ---------------------------------------------------------------- training draws


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Fourteen pictures that differ, with one to four captions of different lengths, no two the same."""
    folder = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(14)]
    paths = [saved(folder, f"{i}.png", picture) for i, picture in enumerate(noise)]
    captions = [[f"p{i}c{j} " + "dog " * (3 * i + j) for j in range(1 + i % 4)] for i in range(14)]
    return Split(paths, [[caption.strip() for caption in texts] for texts in captions])


def tokenizer_of(split: Split, max_length: int = 64) -> Tokenizer:
    return build_wordpiece_tokenizer(
        [caption for captions in split.captions for caption in captions], max_length
    )


def draws(
    split: Split, epochs: tuple[int, ...] = (0,), **changed
) -> list[list[tuple[str, torch.Tensor]]]:
    """For each epoch the (caption, pixels) that one loader gives, in order."""
    config = Config(**{"image_size": 32, "batch_size": 4, "num_workers": 0} | changed)
    tokenizer = tokenizer_of(split)
    texts = {tuple(tokenizer.encode(text).ids): text for texts in split.captions for text in texts}
    loader = build_train_loader(split, tokenizer, config, torch.device("cpu"))
    drawn = []
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch)
        drawn.append([])
        for pixels, groups in loader:
            rows = [
                (row, kept) for ids, mask in groups for row, kept in zip(ids, mask, strict=True)
            ]
            captions = [texts[tuple(row[kept.bool()].tolist())] for row, kept in rows]
            drawn[-1] += zip(captions, pixels.clone(), strict=True)
    return drawn


def same(one: list[tuple[str, torch.Tensor]], other: list[tuple[str, torch.Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a == b and torch.equal(p, q) for (a, p), (b, q) in zip(one, other)
    )


def captions_of(epoch: list[tuple[str, torch.Tensor]]) -> list[str]:
    return [caption for caption, _ in epoch]


@pytest.fixture(scope="module")
def three_epochs(noisy: Split) -> list[list[tuple[str, torch.Tensor]]]:
    return draws(noisy, (0, 1, 2))


@pytest.mark.parametrize("workers", [1, 4])
def test_captions_and_pixels_are_the_same_with_any_number_of_workers_kept_alive(
    noisy: Split, three_epochs: list, workers: int
):
    drawn = draws(noisy, (0, 1, 2), num_workers=workers)
    assert all(same(one, other) for one, other in zip(drawn, three_epochs, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_and_pixels_are_the_same_after_a_resume(
    noisy: Split, three_epochs: list, workers: int
):
    (drawn,) = draws(noisy, (2,), num_workers=workers)
    assert same(drawn, three_epochs[2])


def test_captions_and_pixels_do_not_depend_on_the_global_generators(
    noisy: Split, three_epochs: list
):
    state = torch.get_rng_state()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    (drawn,) = draws(noisy)
    assert same(drawn, three_epochs[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


def test_a_picture_draws_the_same_whatever_else_is_in_its_batch(noisy: Split, three_epochs: list):
    (drawn,) = draws(noisy, (1,), batch_size=7)
    other = dict(drawn)
    assert all(torch.equal(pixels, other[caption]) for caption, pixels in three_epochs[1])


@pytest.mark.parametrize(("changed", "epoch"), [({}, 1), ({}, 2), ({"seed": 1}, 0)])
def test_captions_pixels_and_order_differ_between_epochs_and_seeds(
    noisy: Split, three_epochs: list, changed: dict, epoch: int
):
    (drawn,) = draws(noisy, (epoch,), **changed)
    first = dict(three_epochs[0])
    assert captions_of(drawn) != captions_of(three_epochs[0])
    assert set(captions_of(drawn)) != set(first)
    again = [(pixels, first[caption]) for caption, pixels in drawn if caption in first]
    assert again and not any(torch.equal(one, other) for one, other in again)
    pictures = [
        [caption.partition("c")[0] for caption in captions_of(part)]
        for part in (drawn, three_epochs[0])
    ]
    assert pictures[0] != pictures[1]


def test_each_picture_comes_at_most_once_an_epoch_and_only_the_last_short_batch_is_dropped(
    three_epochs: list,
):
    for epoch in three_epochs:
        pictures = [caption.partition("c")[0] for caption in captions_of(epoch)]
        assert len(pictures) == len(set(pictures)) == 12


def test_every_picture_comes_where_the_batches_fit(noisy: Split):
    (epoch,) = draws(noisy, batch_size=7)
    assert {caption.partition("c")[0] for caption in captions_of(epoch)} == {
        f"p{i}" for i in range(14)
    }


def test_captions_are_drawn_from_all_of_a_pictures_own_evenly(noisy: Split):
    drawn = draws(noisy, tuple(range(100)), batch_size=14, augment=False)
    seen = Counter(caption for epoch in drawn for caption in captions_of(epoch))
    for captions in noisy.captions:
        assert sum(seen[caption] for caption in captions) == 100
        assert all(seen[caption] > 50 / len(captions) for caption in captions)


def test_a_caption_comes_with_its_own_picture(noisy: Split):
    (epoch,) = draws(noisy, batch_size=14, augment=False, image_size=40)
    means = {f"p{i}": load_image(path)[:, 5:35].mean((0, 1)) for i, path in enumerate(noisy.paths)}
    for caption, pixels in epoch:
        own = caption.partition("c")[0]
        shown = pixels.double().mean((1, 2)).numpy()
        assert min(means, key=lambda picture: abs(means[picture] - shown).sum()) == own


# ---------------------------------------------------------------- augmentation and batches


def halves(folder: Path, captions: list[str]) -> Split:
    """A picture for each caption: red at the left, blue at the right."""
    picture = Image.new("RGB", (64, 48), (200, 60, 60))
    picture.paste((60, 60, 200), (32, 0, 64, 48))
    return Split(
        [saved(folder, "halves.png", picture)] * len(captions), [[caption] for caption in captions]
    )


def is_mirrored(pixels: torch.Tensor) -> bool:
    red = pixels[0].double().mean(0)
    return bool(red[:8].mean() < red[-8:].mean())


def test_a_mirror_image_is_never_drawn_where_the_caption_says_left_or_right(tmp_path: Path):
    sided = ["a dog on the left", "Right: a dog", "a RIGHT-handed man", "the dog's left, muddy paw"]
    plain = ["a dog on the grass", "a bright light", "a leftover pie", "two dogs"]
    drawn = draws(halves(tmp_path, sided + plain), tuple(range(25)), batch_size=8)
    mirrored = Counter(
        caption for epoch in drawn for caption, pixels in epoch if is_mirrored(pixels)
    )
    assert not set(mirrored) & set(sided)
    assert all(3 <= mirrored[caption] <= 22 for caption in plain[::3]), mirrored


def test_a_long_picture_is_trained_on_square_by_square_from_one_end_to_the_other(tmp_path: Path):
    ramp = np.tile(
        np.linspace(0, 255, 800).astype(np.uint8)[:, None], (40, 1, 3)
    )  # darkest at its left end
    split = Split(
        [saved(tmp_path, "ramp.png", Image.fromarray(ramp))] * 40, [["a dog on the left"]] * 40
    )
    (drawn,) = draws(split, batch_size=40)
    means, spans = zip(*((pixels.double().mean(), np.ptp(pixels.numpy())) for _, pixels in drawn))
    assert min(means) < 64
    assert max(means) > 192
    assert (
        max(spans) < 255 * 40 / 800 * 1.3 * 1.3 + 2
    )  # of a square; contrast and brightness may rise


@pytest.mark.parametrize("side", [8, 200])
def test_pictures_are_enlarged_and_shrunk_smoothly(side: int):
    stripes = np.tile(np.array([0, 0, 255, 255], np.uint8)[None, :, None], (side, side // 4, 3))
    shown = Transform(32)(stripes)
    assert len(np.unique(shown)) > 2
    if side > 32:
        assert np.ptp(shown.astype(int)[1:-1, 1:-1]) < 100  # two pixels wide, they are nearly grey


def test_augmentation_changes_no_colour_into_another(tmp_path: Path):
    for epoch in draws(halves(tmp_path, ["a dog on the left"] * 8), tuple(range(10)), batch_size=8):
        for _, pixels in epoch:
            red, green, blue = pixels.double()
            assert ((red > green + 20) | (blue > green + 20)).double().mean() > 0.9
            assert (red[:, 0] > blue[:, 0]).all() and (blue[:, -1] > red[:, -1]).all()


def test_the_demo_shows_each_scene_as_it_was_drawn_every_time(shapes: Path):
    split = read_splits(shapes)["train"]
    config = parse(Config, ["--demo"])
    one, other = draws(split, (0, 1), batch_size=48, augment=config.augment, image_size=128)
    drawn = {load_image(path).tobytes() for path in split.paths}
    for epoch in (one, other):
        assert {pixels.permute(1, 2, 0).numpy().tobytes() for _, pixels in epoch} == drawn


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_bytes_in_channels_last_memory(noisy: Split, workers: int):
    config = Config(image_size=32, batch_size=4, num_workers=workers)
    batches = list(build_train_loader(noisy, tokenizer_of(noisy), config, torch.device("cpu")))
    assert len(batches) == 3
    for pixels, groups in batches:
        assert pixels.shape == (4, 3, 32, 32) and pixels.dtype == torch.uint8
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        for ids, mask in groups:
            assert ids.shape == mask.shape and ids.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize(
    ("batch_size", "chunk_size", "sizes"),
    [
        (2, 0, [1, 1]),
        (4, 0, [1, 1, 1, 1]),
        (6, 0, [2, 2, 2]),
        (7, 0, [2, 2, 2, 1]),
        (14, 0, [4, 4, 4, 2]),
        (14, 14, [4, 4, 4, 2]),
        (14, 3, [3, 3, 3, 3, 2]),
        (14, 2, [2] * 7),
    ],
)
def test_captions_come_in_four_groups_of_a_chunk_at_most_each_padded_to_its_own_longest_and_no_further(
    noisy: Split, batch_size: int, chunk_size: int, sizes: list[int]
):
    config = Config(image_size=32, batch_size=batch_size, chunk_size=chunk_size, num_workers=0)
    lengths = set()
    for _, groups in build_train_loader(noisy, tokenizer_of(noisy), config, torch.device("cpu")):
        assert [len(ids) for ids, _ in groups] == sizes
        for ids, mask in groups:
            assert mask.sum(dim=1).max() == ids.shape[1]
            lengths.add(ids.shape[1])
    assert len(lengths) > 3


@pytest.mark.parametrize(("chunk_size", "sizes"), [(0, [14]), (4, [4, 4, 4, 2])])
def test_for_a_gpu_they_come_in_one_group_or_in_chunks(
    noisy: Split, chunk_size: int, sizes: list[int]
):
    config = Config(image_size=32, batch_size=14, chunk_size=chunk_size, num_workers=0)
    loader = build_train_loader(noisy, tokenizer_of(noisy), config, torch.device("cuda"))
    _, groups = loader.collate_fn([loader.dataset[0, i] for i in range(14)])
    assert [len(ids) for ids, _ in groups] == sizes


def test_the_pairs_of_a_batch_come_by_the_length_of_their_captions(noisy: Split):
    for batch_size in (4, 14):
        (epoch,) = draws(noisy, batch_size=batch_size)
        for start in range(0, len(epoch), batch_size):
            lengths = [len(caption) for caption in captions_of(epoch)[start : start + batch_size]]
            assert lengths == sorted(lengths)


@pytest.mark.parametrize("chunk_size", [2, 3, 14])
def test_captions_and_pixels_are_the_same_with_chunks_of_any_size(
    noisy: Split, three_epochs: list, chunk_size: int
):
    (drawn,) = draws(noisy, (1,), chunk_size=chunk_size)
    assert same(drawn, three_epochs[1])


@pytest.mark.parametrize(
    ("asked", "device", "cores", "of_torchrun", "workers"),
    [
        (-1, "cpu", 64, 1, 4),
        (-1, "cuda", 2, 1, 4),
        (-1, "cuda", 12, 1, 12),
        (-1, "cuda", 64, 1, 16),
        (-1, "cuda", 64, 8, 8),
        (0, "cuda", 64, 1, 0),
        (2, "cpu", 64, 1, 2),
    ],
)
def test_training_reads_with_four_processes_or_with_each_core_for_a_gpu_unless_told_otherwise(
    noisy: Split, monkeypatch, asked: int, device: str, cores: int, of_torchrun: int, workers: int
):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(of_torchrun))
    config = Config(image_size=32, batch_size=4, num_workers=asked)
    loader = build_train_loader(noisy, tokenizer_of(noisy), config, torch.device(device))
    assert (loader.num_workers, loader.persistent_workers) == (workers, workers > 0)
    assert loader.pin_memory == (device == "cuda")


def test_captions_longer_than_allowed_are_cut(noisy: Split):
    longest = max((text for texts in noisy.captions for text in texts), key=len)
    ids, mask = tokenize(tokenizer_of(noisy, max_length=8), ["dog", longest])
    assert mask.sum(dim=1).tolist() == [3, 8] and ids.shape == (2, 8)


# ---------------------------------------------------------------- the demo's scenes

KINDS = (SIZES, COLORS, SHAPES, PLACES)


def scene_of(caption: str, kinds: tuple[dict, ...] = KINDS) -> frozenset[tuple[str, ...]]:
    """The things that a caption tells of, each as its words of these kinds: (size, color, shape, place)."""
    words = re.findall("|".join(word for kind in kinds for word in kind), caption)
    assert len(words) in (2 * len(kinds), 3 * len(kinds)), caption
    scene = frozenset(
        tuple(next(word for word in words[i : i + len(kinds)] if word in kind) for kind in kinds)
        for i in range(0, len(words), len(kinds))
    )
    assert len(kinds) * len(scene) == len(words)
    return scene


@pytest.fixture(scope="module")
def many_scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    """So many that equal ones would be among them if nobody looked."""
    folder = tmp_path_factory.mktemp("scenes") / "shapes"
    generate_shapes(folder, train=1500, dev=100, test=100)
    return read_splits(folder)


def test_each_scene_has_five_different_captions_that_tell_all_of_it_but_the_last_no_size(
    many_scenes: dict[str, Split],
):
    for split in many_scenes.values():
        for captions in split.captions:
            assert len(captions) == len(set(captions)) == 5
            assert len({scene_of(caption) for caption in captions[:4]}) == 1
            assert len({scene_of(caption, KINDS[1:]) for caption in captions}) == 1


def test_no_two_scenes_are_equal_so_that_test_scenes_are_never_trained_on(
    many_scenes: dict[str, Split],
):
    scenes = {
        name: [scene_of(captions[0]) for captions in part.captions]
        for name, part in many_scenes.items()
    }
    assert {name: len(part) for name, part in scenes.items()} == {
        "train": 1500,
        "dev": 100,
        "test": 100,
    }
    everything = [scene for part in scenes.values() for scene in part]
    assert len(everything) == len(set(everything))
    assert not set(scenes["test"]) & set(scenes["train"])
    assert {len(scene) for scene in everything} == {2, 3}


def test_a_scene_shows_what_its_captions_say(many_scenes: dict[str, Split]):
    split = many_scenes["test"]
    colors = {name: tuple(bytes.fromhex(code[1:])) for name, code in COLORS.items()}
    for path, captions in zip(split.paths[:40], split.captions):
        pixels = load_image(path)
        things = {place: (size, color) for size, color, _, place in scene_of(captions[0])}
        for place, (x, y) in PLACES.items():
            cell = pixels[y - 18 : y + 18, x - 18 : x + 18].reshape(-1, 3)
            shown = Counter(map(tuple, cell.tolist()))
            (size, color) = things.pop(place, (None, None))
            counts = {name: shown[code] for name, code in colors.items() if shown[code]}
            assert list(counts) == ([color] if color else []), (path, place)
            assert size is None or (counts[color] > 350) == (size == "large"), (path, place)
        assert not things


def test_drawing_twice_gives_the_same_files(tmp_path: Path, shapes: Path):
    generate_shapes(tmp_path / "again", train=48, dev=12, test=12)
    files = [
        sorted(path.relative_to(folder) for path in folder.rglob("*"))
        for folder in (shapes, tmp_path / "again")
    ]
    assert files[0] == files[1]
    for name in files[0]:
        assert (shapes / name).is_dir() or (shapes / name).read_bytes() == (
            tmp_path / "again" / name
        ).read_bytes()


def test_a_drawing_that_was_broken_off_is_never_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("data.csv.writer", killed)
        generate_shapes(tmp_path / "shapes", train=8, dev=1, test=1)
    assert not (tmp_path / "shapes").exists()
    generate_shapes(tmp_path / "shapes", train=8, dev=1, test=1)
    assert len(captions_in(read_splits(tmp_path / "shapes"))) == 10
    shutil.rmtree(tmp_path / "shapes")
