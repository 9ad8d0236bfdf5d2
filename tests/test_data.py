"""Tests of data.py: reading any layout, splitting, downloading, and generating shapes."""

import csv
import io
import itertools
import json
import pickle
import re
import sys
import tempfile
import threading
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import error_message
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import trainer
from config import Config, UserError, parse
from data import (
    ARCHIVES,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    PackedList,
    Split,
    check_data_dir,
    download_flickr8k,
    generate_shapes,
    load_image,
    prepare_data_dir,
    read_splits,
)

# Three images with two captions each, as split lists, token file and CSV file.
CAPTIONS = {f"{name}.jpg": [f"{name} 0 .", f"{name} 1 ."] for name in "abc"}
LISTS = {"train": ["a.jpg"], "dev": ["b.jpg"], "test": ["c.jpg"]}
TOKENS = "".join(f"{name}.jpg#{i}\t{name} {i} .\n" for name in "abc" for i in range(2))
TABLE = "image,caption\n" + "".join(
    f"{name}.jpg,{name} {i} .\n" for name in "abc" for i in range(2)
)


def user_error(action: Callable, *arguments: object) -> str:
    """The one line of the `UserError` that `action(*arguments)` raises."""
    with pytest.raises(UserError) as error:
        action(*arguments)
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def split_lists(names: dict[str, list[str]], folder: str = "") -> dict[str, str]:
    """The list file of each split."""
    return {f"{folder}Flickr_8k.{split}Images.txt": "\n".join(names[split]) for split in names}


def empty_images(folder: str, names: Iterable[str]) -> dict[str, bytes]:
    """Empty image files: `read_splits` opens no image."""
    return {f"{folder}/{name}": b"" for name in names}


def kaggle_layout(
    folder: Path, table: str | bytes = TABLE, names: Iterable[str] = tuple(CAPTIONS)
) -> Path:
    """Kaggle's layout, without split lists."""
    return write_files(folder, {"captions.txt": table} | empty_images("Images", names))


def archive_layout(folder: Path, tokens: str | bytes = TOKENS, text_dir: str = "") -> Path:
    """The layout of Flickr8k's archives, with split lists."""
    files = {f"{text_dir}Flickr8k.token.txt": tokens}
    files |= empty_images("Flicker8k_Dataset", CAPTIONS)
    return write_files(folder, files | split_lists(LISTS, text_dir))


def to_csv(captions: dict[str, list[str]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("image", "caption"))
    for name, texts in captions.items():
        writer.writerows((name, text) for text in texts)
    return file.getvalue()


def to_tokens(captions: dict[str, list[str]]) -> str:
    lines = []
    for name, texts in captions.items():
        lines += [f"{name}#{i}\t{text}\n" for i, text in enumerate(texts)]
    return "".join(lines)


def captions_by_image(splits: dict[str, Split]) -> dict[str, list[str]]:
    """The captions of all splits by file name; asserts that no file is repeated."""
    paths = [path for split in splits.values() for path in split.paths]
    captions = [texts for split in splits.values() for texts in split.captions]
    assert len(set(paths)) == len(paths)
    return {path.name: texts for path, texts in zip(paths, captions, strict=True)}


def names_by_split(splits: dict[str, Split]) -> dict[str, list[str]]:
    return {name: [path.name for path in split.paths] for name, split in splits.items()}


def numbered_captions(num_images: int) -> dict[str, list[str]]:
    """Five captions for each of `num_images` images."""
    captions = {}
    for i in range(num_images):
        captions[f"{i:03d}.jpg"] = [f"image {i} caption {j}" for j in range(5)]
    return captions


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("text_dir", ["", "Flickr8k_text/"])
def test_read_splits_reads_archive_layout(tmp_path: Path, text_dir: str):
    """The text files may be next to the image folder or in `Flickr8k_text/`."""
    splits = read_splits(archive_layout(tmp_path, text_dir=text_dir))
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
def test_read_splits_keeps_any_caption_of_a_csv(tmp_path: Path, cell: str, caption: str):
    folder = kaggle_layout(tmp_path, f"{TABLE}a.jpg,{cell}\n")
    write_files(folder, split_lists(LISTS))
    assert captions_by_image(read_splits(folder))["a.jpg"] == ["a 0 .", "a 1 .", caption]


@pytest.mark.parametrize(
    "encode",
    [
        pytest.param(lambda text: text.encode("utf-8-sig"), id="byte-order mark"),
        pytest.param(lambda text: text.replace("\n", "\r\n").encode(), id="Windows newlines"),
    ],
)
def test_read_splits_ignores_byte_order_mark_and_windows_newlines(
    tmp_path: Path, encode: Callable[[str], bytes]
):
    lists = {name: encode(text) for name, text in split_lists(LISTS).items()}
    kaggle = write_files(kaggle_layout(tmp_path / "kaggle", encode(TABLE)), lists)
    archives = write_files(archive_layout(tmp_path / "archives", encode(TOKENS)), lists)
    assert captions_by_image(read_splits(kaggle)) == CAPTIONS
    assert captions_by_image(read_splits(archives)) == CAPTIONS


def test_read_splits_finds_csv_columns_by_name(tmp_path: Path):
    """The columns may be in any order and among others."""
    rows = [f"{i},{name} runs,{name}.jpg\n" for i, name in enumerate("abc")]
    table = "number, caption ,image\n" + "".join(rows)
    folder = write_files(kaggle_layout(tmp_path, table), split_lists(LISTS))
    captions = captions_by_image(read_splits(folder))
    assert captions == {f"{name}.jpg": [f"{name} runs"] for name in "abc"}


def test_read_splits_accepts_any_names_and_numbers_of_captions(tmp_path: Path):
    names = ["my dog, 2024.PNG", "Ünï.webp", "sub/folder/x.jpeg"]
    names += ["no-suffix", "a#b.jpg", 'a "b".jpg']
    names += [f"{i}.jpg" for i in range(10)]
    captions = {}
    for name in names:
        count = 1 + len(name) % 4
        captions[name] = [f"caption {i} of {len(name)}" for i in range(count)]
    splits = read_splits(kaggle_layout(tmp_path, to_csv(captions), names))
    assert captions_by_image(splits) == {Path(name).name: captions[name] for name in names}


NAMES = st.text(
    st.characters(categories=("L", "N", "P", "S"), exclude_characters="/\\"),
    min_size=1,
    max_size=20,
).map(lambda stem: f"{stem}.jpg")
NOT_CSV = "\0" if sys.version_info < (3, 11) else ""  # Python 3.10's csv module refuses it
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=NOT_CSV), max_size=20)
LINE = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n"), max_size=20)


def captioned(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, list[str]]]:
    """At least three images; the first caption of each has a word in it."""
    texts = st.lists(text, max_size=3).map(lambda texts: ["A dog", *texts])
    return st.dictionaries(NAMES, texts, min_size=3)


def read_back(
    files: dict[str, str], image_dir: str, captions: dict[str, list[str]]
) -> dict[str, list[str]]:
    """The captions that `read_splits` reads from these caption files."""
    names = list(captions)
    lists = split_lists({"train": names[2:], "dev": names[:1], "test": names[1:2]})
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files | empty_images(image_dir, names) | lists)
        return captions_by_image(read_splits(folder))


def with_single_spaces(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    """The captions with white space as `read_splits` returns it, without blank ones."""
    cleaned = {}
    for name, texts in captions.items():
        cleaned[name] = [" ".join(text.split()) for text in texts if text.split()]
    return cleaned


@settings(deadline=None, max_examples=40)
@given(captioned(TEXT))
def test_read_splits_reads_back_any_csv(captions: dict[str, list[str]]):
    found = read_back({"captions.txt": to_csv(captions)}, "Images", captions)
    assert found == with_single_spaces(captions)


@settings(deadline=None, max_examples=40)
@given(captioned(LINE))
def test_read_splits_reads_back_any_token_file(captions: dict[str, list[str]]):
    found = read_back({"Flickr8k.token.txt": to_tokens(captions)}, "Flicker8k_Dataset", captions)
    assert found == with_single_spaces(captions)


# ---------------------------------------------------------------- people's own caption files


def own_layout(
    folder: Path, table: str | bytes, name: str = "captions.csv", image_dir: str = "images"
) -> Path:
    """A caption file and the three images of `CAPTIONS` in a folder, with split lists."""
    files = {name: table} | empty_images(image_dir, CAPTIONS) | split_lists(LISTS)
    return write_files(folder, files)


@pytest.mark.parametrize(
    "name",
    ["captions.txt", "Captions.CSV", "results.csv", "results_20130124.token", "my.token", "my.tsv"],
)
@pytest.mark.parametrize(
    "image_dir", ["Images", "images", "IMAGES", "flickr30k_images", "my photos", "."]
)
def test_find_layout_accepts_any_usual_names(tmp_path: Path, name: str, image_dir: str):
    """The images are in a folder with a usual name, in the only one, or beside the captions."""
    folder = own_layout(tmp_path, TOKENS if "token" in name else TABLE, name, image_dir)
    before = sorted(folder.rglob("*"))
    assert captions_by_image(read_splits(folder)) == CAPTIONS
    assert sorted(folder.rglob("*")) == before  # it may be read-only


def test_find_layout_accepts_captions_one_folder_below(tmp_path: Path):
    """As Kaggle mounts Flickr30k: flickr30k_images/results.csv and a folder of the same name."""
    outer = write_files(tmp_path, {"prices.csv": "a,b\n"}) / "flickr30k_images"
    own_layout(outer, TABLE, "results.csv", "flickr30k_images")
    assert captions_by_image(read_splits(tmp_path)) == CAPTIONS
    assert captions_by_image(read_splits(outer)) == CAPTIONS


def test_find_layout_accepts_images_in_several_folders(tmp_path: Path):
    names = ["cats/1.jpg", "dogs/1.jpg", "dogs/2.jpg"]
    lists = {"train": names[:1], "dev": names[1:2], "test": names[2:]}
    files = {"captions.csv": "path,text\n" + "".join(f"{name},{name}\n" for name in names)}
    folder = write_files(tmp_path, files | empty_images(".", names) | split_lists(lists))
    splits = read_splits(folder)
    assert [splits[split].texts for split in SPLITS] == [[name] for name in names]
    (folder / "captions.csv").write_text("path,text\n1.jpg,a cat\n")
    message = user_error(read_splits, folder)
    assert "captions.csv, row 2: '1.jpg' could be any of cats/1.jpg, dogs/1.jpg" in message


@pytest.mark.parametrize("other", ["results.csv", "captions.csv", "Flickr8k.token.txt"])
def test_find_layout_lists_several_caption_files(tmp_path: Path, other: str):
    """One of them may be passed as `--data-dir`. A file that is no caption file does not count."""
    folder = own_layout(tmp_path, TABLE, "captions.txt")
    write_files(folder, {other: TOKENS if "token" in other else TABLE, "prices.csv": "a,b\n1,2\n"})
    message = user_error(read_splits, folder)
    for name in ("captions.txt", other):
        assert str(folder / name) in message
    assert "prices.csv" not in message
    assert captions_by_image(read_splits(folder / other)) == CAPTIONS


def test_find_layout_lists_several_image_folders(tmp_path: Path):
    folder = write_files(own_layout(tmp_path, TABLE), empty_images("flickr30k_images", "x"))
    message = user_error(read_splits, folder)
    for name in ("images", "flickr30k_images"):
        assert str(folder / name) in message


def test_find_layout_reads_flickr8k_archives_beside_other_texts(tmp_path: Path):
    """The official archive contains lemmas, expert judgments and the lists of the splits."""
    others = {"Flickr8k.lemma.token.txt": TOKENS, "readme.txt": "If you use this\n"}
    others |= {"ExpertAnnotations.txt": "a.jpg\tb.jpg#2\t1\t1\t1\n"}
    folder = write_files(archive_layout(tmp_path), others)
    assert captions_by_image(read_splits(folder)) == CAPTIONS


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", ", ", "; ", "| "])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_read_splits_reads_any_separator(tmp_path: Path, separator: str, newline: str):
    table = TABLE.replace(",", separator).replace("\n", newline)
    assert captions_by_image(read_splits(own_layout(tmp_path, table))) == CAPTIONS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_read_splits_reads_tables_with_byte_order_mark(tmp_path: Path, encoding: str):
    folder = own_layout(tmp_path, TABLE.replace(",", "\t").encode(encoding), "captions.txt")
    assert captions_by_image(read_splits(folder)) == CAPTIONS


@pytest.mark.parametrize("in_header", [True, False])
@pytest.mark.parametrize("separator", [",", ";"])
def test_read_splits_ignores_trailing_empty_columns(
    tmp_path: Path, in_header: bool, separator: str
):
    header, *rows = TABLE.replace(",", separator).splitlines()
    table = "\n".join([header + 2 * separator * in_header, *(row + 2 * separator for row in rows)])
    assert captions_by_image(read_splits(own_layout(tmp_path, table))) == CAPTIONS


@pytest.mark.parametrize(
    "image", ["image", "Image_Name", "FILENAME", "filepath", "file_name", "path", "Image Name"]
)
@pytest.mark.parametrize("caption", ["Caption", "title", "COMMENT", "text", "sentence", "raw"])
def test_read_splits_knows_usual_column_names(tmp_path: Path, image: str, caption: str):
    """Columns of indices and comment numbers are ignored."""
    rows = [f"{i},{name}.jpg,{i % 2},{name} runs" for i, name in enumerate("abc")]
    table = "\n".join([f",{image},comment_number,{caption}", *rows])
    captions = captions_by_image(read_splits(own_layout(tmp_path, table)))
    assert captions == {f"{name}.jpg": [f"{name} runs"] for name in "abc"}


@pytest.mark.parametrize(
    ("header", "repeated"),
    [
        ("image,caption,caption", "['caption', 'caption']"),
        ("image,caption, Caption", "['caption', 'caption']"),
        ("image,image,text", "['image', 'image']"),
        ("filename,path,caption", "['filename', 'path']"),
        ("image,title,text", "['title', 'text']"),
    ],
)
def test_read_splits_rejects_repeated_columns(tmp_path: Path, header: str, repeated: str):
    message = user_error(read_splits, own_layout(tmp_path, f"{header}\na.jpg,a dog,a cat\n"))
    assert f"captions.csv, row 1: columns {repeated} could all be the" in message


def test_read_splits_prefers_columns_image_and_caption(tmp_path: Path):
    table = "image,caption,path,text\n" + "".join(f"{n}.jpg,{n} runs,x,y\n" for n in "abc")
    captions = captions_by_image(read_splits(own_layout(tmp_path, table)))
    assert captions == {f"{name}.jpg": [f"{name} runs"] for name in "abc"}


def flickr30k_table(captions: dict[str, list[str]]) -> str:
    rows = ["image_name| comment_number| comment"]
    for name, texts in captions.items():
        rows += [f"{name}| {i}| {text}" for i, text in enumerate(texts)]
    return "\n".join(rows) + "\n"


def test_read_splits_reads_flickr30k_of_kaggle(tmp_path: Path, capsys: pytest.CaptureFixture):
    """One row lacks a separator. Captions contain, and begin with, quotation marks."""
    captions = numbered_captions(100)
    captions["000.jpg"][0] = '" Superman " on a shirt , and a " quote'
    table = flickr30k_table(captions).replace("050.jpg| 4| ", "050.jpg| 4   ")
    files = {"results.csv": table} | empty_images("flickr30k_images", captions)
    splits = read_splits(write_files(tmp_path, files))
    del captions["050.jpg"][4]
    assert captions_by_image(splits) == captions
    stdout = capsys.readouterr().out
    assert "left out, 1 of 500 rows are broken" in stdout
    assert f"{tmp_path / 'results.csv'}, row 256: 2 cells under 3 columns" in stdout


@pytest.mark.parametrize(("num_broken", "accepted"), [(5, True), (6, False)])
@pytest.mark.parametrize("row", ["050.jpg\n", '050.jpg,"a dog" runs\n', "050.jpg,a,b\n", ",x\n"])
def test_read_splits_skips_up_to_one_percent_broken_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture, num_broken: int, accepted: bool, row: str
):
    captions = numbered_captions(99)
    table = (
        to_csv(captions).replace("\r\n", "\n").replace("000.jpg", num_broken * row + "000.jpg", 1)
    )
    folder = kaggle_layout(tmp_path, table, captions)
    if accepted:
        assert captions_by_image(read_splits(folder)) == captions
        assert "captions.txt, row 2: " in capsys.readouterr().out
    else:
        assert "captions.txt, row 2: " in user_error(read_splits, folder)


def test_read_splits_counts_all_rows_in_an_unclosed_quote(tmp_path: Path):
    captions = numbered_captions(99)
    table = to_csv(captions).replace("image 50 caption 0", '"image 50 caption 0')
    message = user_error(read_splits, kaggle_layout(tmp_path, table, captions))
    assert "captions.txt, row 252: " in message


def karpathy_json(splits: dict[str, str], filepath: str = "") -> str:
    """Karpathy's file of these images, by the split of each."""
    images = []
    for name, split in splits.items():
        image = {"filename": name, "split": split, "imgid": 0, "sentids": [0, 1]}
        image["sentences"] = [{"raw": text, "tokens": []} for text in CAPTIONS[name]]
        images.append(image | ({"filepath": filepath} if filepath else {}))
    return json.dumps({"images": images, "dataset": "x"})


@pytest.mark.parametrize(
    ("name", "filepath", "image_dir"),
    [
        ("dataset_flickr8k.json", "", "Flicker8k_Dataset"),
        ("dataset_flickr30k.json", "", "flickr30k_images"),
        ("dataset_coco.json", "val2014", "val2014"),
        ("dataset_coco.json", "val2014", "images/val2014"),
        ("dataset_coco.json", "val2014", "images"),
    ],
)
def test_read_splits_reads_karpathys_files(
    tmp_path: Path, name: str, filepath: str, image_dir: str
):
    """`restval` is training. The splits of the file come before lists beside it."""
    names = {"a.jpg": "restval", "b.jpg": "test", "c.jpg": "val"}
    folder = own_layout(tmp_path, karpathy_json(names, filepath), name, image_dir)
    splits = read_splits(folder)
    assert captions_by_image(splits) == CAPTIONS
    assert names_by_split(splits) == {"train": ["a.jpg"], "dev": ["c.jpg"], "test": ["b.jpg"]}
    assert splits["train"].paths == [folder / image_dir / "a.jpg"]


def test_read_splits_reads_the_table_of_hugging_face_flickr30k(tmp_path: Path):
    """Captions are JSON lists in one cell, and a column has the splits, which no list defines."""
    rows = [["raw", "sentids", "split", "filename", "img_id"]]
    names = {"train": ["a.jpg"], "val": ["b.jpg"], "test": ["c.jpg"]}
    for split, listed in names.items():
        rows += [[json.dumps(CAPTIONS[name]), "[0, 1]", split, name, "0"] for name in listed]
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    files = {"flickr_annotations_30k.csv": file.getvalue()}
    files |= empty_images("flickr30k-images", CAPTIONS)
    splits = read_splits(write_files(tmp_path, files))
    assert captions_by_image(splits) == CAPTIONS
    assert names_by_split(splits) == LISTS


def test_read_splits_rejects_a_column_of_splits_without_dev(tmp_path: Path):
    rows = "image,caption,split\na.jpg,a,train\nb.jpg,b,train\nc.jpg,c,Test\n"
    message = user_error(read_splits, own_layout(tmp_path, rows))
    assert "captions.csv: its splits have no image of dev; train, dev (or val) and" in message


def test_read_splits_takes_a_bracket_as_part_of_a_caption(tmp_path: Path):
    table = TABLE + 'a.jpg,"[""a"" dog"\n'
    captions = captions_by_image(read_splits(own_layout(tmp_path, table)))
    assert captions["a.jpg"][-1] == '["a" dog'


@pytest.mark.parametrize("content", ["{", "[]", '{"images": [{"filename": "a.jpg"}]}', "{}"])
def test_read_splits_names_file_and_image_of_bad_json(tmp_path: Path, content: str):
    message = user_error(read_splits, own_layout(tmp_path, content, "dataset_coco.json"))
    assert "dataset_coco.json, image 0: 'images' need 'filename'" in message


def test_read_splits_rejects_image_in_two_splits_of_json(tmp_path: Path):
    content = json.loads(karpathy_json({"a.jpg": "train", "b.jpg": "val", "c.jpg": "test"}))
    content["images"].append(content["images"][0] | {"split": "test"})
    message = user_error(read_splits, own_layout(tmp_path, json.dumps(content), "dataset_x.json"))
    assert "dataset_x.json: a.jpg is in the train split too" in message


@pytest.mark.parametrize(
    ("row", "file"),
    [
        ("Ä b.JPG", "Ä b.JPG"),
        ("images/Ä b.JPG", "Ä b.JPG"),
        ("./Ä b.JPG", "Ä b.JPG"),
        ("../images/Ä b.JPG", "Ä b.JPG"),
        ("{folder}/images/Ä b.JPG", "Ä b.JPG"),
        ("sub\\Ä b.JPG", "sub/Ä b.JPG"),
        ("images\\sub\\Ä b.JPG", "sub/Ä b.JPG"),
        ("Ä b.JPG", "sub/Ä b.JPG"),
        ("ä B.jpg", "Ä b.JPG"),
        ("Images/ä b.jpg", "Ä b.JPG"),
        (unicodedata.normalize("NFD", "Ä b.JPG"), unicodedata.normalize("NFC", "Ä b.JPG")),
        (unicodedata.normalize("NFC", "Ä b.JPG"), unicodedata.normalize("NFD", "Ä b.JPG")),
        ("Ä b", "Ä b.JPG"),
        ("sub/ä b", "sub/Ä b.JPG"),
        ("hidden/.Ä b.JPG", "hidden/.Ä b.JPG"),
        (".hidden/Ä b.JPG", ".hidden/Ä b.JPG"),
    ],
)
def test_image_names_are_found_in_any_spelling(tmp_path: Path, row: str, file: str):
    row = row.format(folder=tmp_path)
    table = f"{TABLE}{row},a dog\n"
    lists = split_lists(LISTS | {"train": ["a.jpg", row]})
    folder = own_layout(tmp_path, table)
    splits = read_splits(write_files(folder, empty_images("images", [file]) | lists))
    assert folder / "images" / file in splits["train"].paths


def test_image_names_are_found_by_absolute_paths_through_links(tmp_path: Path):
    """A data folder often links to a disk; the rows give the path there or here."""
    disk = write_files(tmp_path / "disk", empty_images(".", CAPTIONS))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "images").symlink_to(disk)
    rows = f"{disk}/a.jpg,a\n{folder}/images/b.jpg,b\nc.jpg,c\n"
    write_files(folder, {"captions.csv": f"image,caption\n{rows}"} | split_lists(LISTS))
    assert captions_by_image(read_splits(folder)) == {f"{name}.jpg": [name] for name in "abc"}


@pytest.mark.parametrize("change", [str.swapcase, partial(unicodedata.normalize, "NFD")])
def test_absolute_paths_are_found_in_any_spelling(tmp_path: Path, change: Callable):
    """As C: and c: on Windows, or composed and decomposed letters on macOS."""
    folder = own_layout(tmp_path / "Dätä", TABLE)
    rows = [f"{change(str(folder))}/images/{name},{name}" for name in CAPTIONS]
    write_files(folder, {"captions.csv": "image,caption\n" + "\n".join(rows)})
    assert captions_by_image(read_splits(folder)) == {name: [name] for name in CAPTIONS}


def test_image_names_are_found_beside_the_caption_file_first(tmp_path: Path):
    own = {"own/captions.csv": "image,caption\n" + "".join(f"images/{x},{x}\n" for x in CAPTIONS)}
    files = own | empty_images("images", CAPTIONS) | empty_images("own/images", CAPTIONS)
    splits = read_splits(write_files(tmp_path, files | split_lists(LISTS)))
    assert splits["train"].paths == [tmp_path / "own/images/a.jpg"]


@pytest.mark.parametrize("row", ["{parent}/x.jpg", "C:\\x.jpg", "..\\..\\x.jpg", "../../x.jpg"])
def test_image_names_out_of_the_folder_are_refused(tmp_path: Path, row: str):
    (tmp_path / "x.jpg").touch()
    row = row.format(parent=tmp_path)
    folder = own_layout(tmp_path / "folder", f"{TABLE}{row},a dog\n")
    message = user_error(read_splits, folder)
    assert f"row 8: {row!r} is not the name of a file in {folder / 'images'}" in message


def test_read_splits_names_the_nearest_image(tmp_path: Path):
    folder = own_layout(tmp_path, TABLE + "holidy1.jpg,a dog\n")
    write_files(folder, empty_images("images", ["holiday1.jpg", "holiday1.txt"]))
    message = user_error(read_splits, folder)
    assert "no image in" in message
    assert "holidy1.jpg (the nearest name is holiday1.jpg)" in message


@pytest.mark.slow
def test_read_splits_reads_118000_images_in_seconds(tmp_path: Path):
    """As many as COCO has, with five captions each."""
    captions = {f"{i:012d}.jpg": [f"a dog {j}" for j in range(5)] for i in range(118_000)}
    (tmp_path / "images").mkdir()
    for name in captions:
        (tmp_path / "images" / name).touch()
    (tmp_path / "captions.csv").write_text(to_csv(captions))
    started = time.process_time()
    splits = read_splits(tmp_path)
    assert time.process_time() - started < 8  # 2.5 s
    assert len(splits["train"].paths) == 116_000


# ---------------------------------------------------------------- what is left out


def test_read_splits_drops_and_prints_captions_without_image(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    """As in Flickr8k: five captions of a `.jpg.1` that is in no archive."""
    missing = "2258277193_586949ec62.jpg.1"
    captions = numbered_captions(100)
    tokens = to_tokens(captions | {missing: ["A dog runs ."] * 5})
    files = {"Flickr8k.token.txt": tokens} | empty_images("Flicker8k_Dataset", captions)
    splits = read_splits(write_files(tmp_path, files))
    assert captions_by_image(splits) == captions
    stdout = capsys.readouterr().out
    assert "5 of 505 captions have no image" in stdout
    assert missing in stdout
    assert "Flickr8k.token.txt" in stdout


@pytest.mark.parametrize(("num_images", "accepted"), [(99, True), (98, False)])
def test_read_splits_rejects_more_than_one_percent_missing(
    tmp_path: Path, num_images: int, accepted: bool
):
    captions = numbered_captions(num_images)
    table = to_csv(captions | {"gone.jpg": ["A dog runs ."] * 5})
    folder = kaggle_layout(tmp_path, table, captions)
    if accepted:
        assert captions_by_image(read_splits(folder)) == captions
    else:
        message = user_error(read_splits, folder)
        assert f"5 of {5 * num_images + 5} captions" in message
        assert "gone.jpg" in message
        assert str(folder / "Images") in message
        assert "captions.txt" in message
        assert "at most 1% may be missing" in message


def test_read_splits_counts_images_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Images in no split list, and images without a caption."""
    names = ["a.jpg", "b.jpg", "c.jpg", "unlisted.jpg", "other.jpg"]
    names += ["uncaptioned.jpg", "blank.jpg", "sub/uncaptioned.jpg"]
    table = f"{TABLE}unlisted.jpg,a cat\nother.jpg,a man\nblank.jpg,\n"
    lists = split_lists(LISTS | {"dev": ["b.jpg", "uncaptioned.jpg"]})
    splits = read_splits(write_files(kaggle_layout(tmp_path, table, names), lists))
    assert set(captions_by_image(splits)) == {"a.jpg", "b.jpg", "c.jpg"}
    assert "2 images in no split list and 3 without a caption" in capsys.readouterr().out


def test_read_splits_prints_counts_without_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    read_splits(archive_layout(tmp_path))
    stdout = capsys.readouterr().out
    assert "left out" not in stdout
    assert "3 images, 6 captions; train 1, dev 1, test 1" in stdout


# ---------------------------------------------------------------- splits


def test_read_splits_uses_split_lists_in_kaggle_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    lists = {"train": ["b.jpg"], "dev": ["c.jpg"], "test": ["a.jpg"]}
    splits = read_splits(write_files(kaggle_layout(tmp_path), split_lists(lists)))
    assert names_by_split(splits) == lists
    assert "no split lists" not in capsys.readouterr().out


def test_hash_split_is_printed_and_independent_of_order(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    captions = numbered_captions(40)
    backwards = dict(reversed(captions.items()))
    one = read_splits(kaggle_layout(tmp_path / "one", to_csv(captions), captions))
    message = (
        "no split lists; by the hash of their names 4 images are held out for dev and 4 for test"
    )
    assert message in capsys.readouterr().out
    other = read_splits(kaggle_layout(tmp_path / "other", to_csv(backwards), backwards))
    names = names_by_split(one)
    assert names == names_by_split(other)
    assert names["dev"] + names["test"] != list(captions)[:8]


def test_hash_split_moves_few_images_when_images_are_added(tmp_path: Path):
    names = []
    for num_images in (300, 310):
        captions = numbered_captions(num_images)
        folder = kaggle_layout(tmp_path / str(num_images), to_csv(captions), captions)
        names.append(names_by_split(read_splits(folder)))
    before, after = names
    assert len(set(after["test"])) == 31
    moved = set(after["test"]) & set(before["train"])
    assert len(moved) <= 3  # 25 with a random split


def test_hash_split_does_not_depend_on_images_in_other_folders(tmp_path: Path):
    """Whose presence changes the folder that all names are relative to."""
    captions = numbered_captions(200)
    files = {"captions.csv": to_csv(captions)} | empty_images("photos", captions)
    before = names_by_split(read_splits(write_files(tmp_path, files)))
    write_files(tmp_path, {"matches.png": b"", "more/x.jpg": b""})
    after = names_by_split(read_splits(tmp_path))
    for split, names in before.items():
        assert sorted(after[split]) == sorted(names)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 6), min_size=10, max_size=120))
def test_hash_split_puts_each_image_with_all_captions_in_one_split(counts: list[int]):
    captions = {}
    for i, count in enumerate(counts):
        captions[f"{i}.jpg"] = [f"{i} {j}" for j in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        splits = read_splits(kaggle_layout(Path(folder), to_csv(captions), captions))
    assert captions_by_image(splits) == captions
    assert len(splits["dev"].paths) == len(splits["test"].paths) == len(counts) // 10


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(LISTS, 2)])
def test_read_splits_rejects_image_in_two_splits(tmp_path: Path, one: str, other: str):
    lists = split_lists(LISTS | {other: [*LISTS[other], *LISTS[one]]})
    message = user_error(read_splits, write_files(kaggle_layout(tmp_path), lists))
    assert f"{other}Images.txt: {LISTS[one][0]} is in the {one} split too" in message


def test_split_lists_need_no_suffixes(tmp_path: Path):
    lists = {split: [Path(name).stem for name in names] for split, names in LISTS.items()}
    splits = read_splits(write_files(kaggle_layout(tmp_path), split_lists(lists)))
    assert names_by_split(splits) == LISTS


@given(st.lists(st.text(st.characters())))
def test_packed_list_equals_the_list(texts: list[str]):
    """Also of texts with lone surrogates, as in file names that are not UTF-8, and pickled."""
    packed = pickle.loads(pickle.dumps(PackedList(texts, str)))
    assert packed == texts
    assert packed[1:] == texts[1:]
    assert [packed[i] for i in range(-len(texts), 0)] == texts
    with pytest.raises(IndexError):
        packed[len(texts)]


def test_read_splits_keeps_no_list_of_strings(tmp_path: Path):
    """A forked worker would copy it."""
    folder = write_files(kaggle_layout(tmp_path), split_lists(LISTS))
    for split in read_splits(folder).values():
        assert type(split.paths) is type(split.captions) is PackedList


def test_read_splits_rejects_two_spellings_of_one_name_in_two_splits(tmp_path: Path):
    folder = kaggle_layout(tmp_path, f"{TABLE}./a.jpg,a 2 .\n")
    write_files(folder, split_lists(LISTS | {"test": ["c.jpg", "./a.jpg"]}))
    message = user_error(read_splits, folder)
    assert "testImages.txt: a.jpg is in the train split too" in message


def test_read_splits_merges_two_spellings_of_one_name(tmp_path: Path):
    folder = kaggle_layout(tmp_path, f"{TABLE}./a.jpg,a 2 .\n")
    write_files(folder, split_lists(LISTS))
    assert captions_by_image(read_splits(folder))["a.jpg"] == ["a 0 .", "a 1 .", "a 2 ."]


@pytest.mark.parametrize(
    ("lists", "empty"),
    [
        ({"dev": []}, "dev"),
        ({"test": ["elsewhere.jpg"]}, "test"),
    ],
)
def test_read_splits_rejects_empty_split(tmp_path: Path, lists: dict[str, list[str]], empty: str):
    folder = write_files(kaggle_layout(tmp_path), split_lists(LISTS | lists))
    message = user_error(read_splits, folder)
    assert f"the {empty} split has no image in {tmp_path / 'Images'}" in message


@pytest.mark.parametrize(("table", "count"), [("image,caption\n", 0), (TABLE, 3)])
def test_hash_split_rejects_too_few_images(tmp_path: Path, table: str, count: int):
    message = user_error(read_splits, kaggle_layout(tmp_path, table))
    assert message.endswith(f"at least 10 images with captions are needed, but there are {count}")


def test_split_list_rejects_the_end_of_two_paths(tmp_path: Path) -> None:
    """Which of the two files were meant would otherwise depend on the process."""
    folder = kaggle_layout(tmp_path, "image,caption\nx/z.jpg,a dog\ny/z.jpg,a cat\n")
    for name in ("x", "y"):
        (folder / "Images" / name).mkdir()
        (folder / "Images" / name / "z.jpg").touch()
    write_files(folder, split_lists({"train": ["x/z.jpg", "z.jpg"], "dev": [], "test": []}))
    message = user_error(read_splits, folder)
    assert "Flickr_8k.trainImages.txt, row 2: 'z.jpg' could be any of" in message


# ---------------------------------------------------------------- errors in the files


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a.jpg#2 a dog\n", "no tab"),
        (b"a.jpg#2\tcaf\xe9\n", "UTF-8"),
        (b"../../x.jpg#0\ta dog\n", "../../x.jpg"),
        (b"/etc/passwd#0\ta dog\n", "/etc/passwd"),
        (b"\ta dog\n", "''"),
    ],
)
def test_read_splits_names_file_and_row_of_bad_token_line(tmp_path: Path, line: bytes, reason: str):
    tokens = TOKENS.encode()
    folder = archive_layout(tmp_path, tokens + b"\n" + line + tokens)
    message = user_error(read_splits, folder)
    assert f"{folder / 'Flickr8k.token.txt'}, row 8: " in message
    assert reason in message


@pytest.mark.parametrize(
    ("row", "reason"),
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
def test_read_splits_names_file_and_row_of_bad_csv_row(tmp_path: Path, row: bytes, reason: str):
    table = TABLE.encode() + b'a.jpg,"two\nrows"\n' + row + b"b.jpg,b 3 .\n"
    folder = kaggle_layout(tmp_path, table)
    message = user_error(read_splits, folder)
    assert f"{folder / 'captions.txt'}, row 10: " in message
    assert reason in message


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("", "'image' and 'caption' are needed"),
        ("image,words\na.jpg,a dog\n", "'caption'"),
        ("a.jpg,a dog\nb.jpg,a cat\n", "'image' and 'caption' are needed"),
        ("image:caption\na.jpg:a dog\n", "'image' and 'caption' are needed"),
        ('"image"x,caption\na.jpg,a dog\n', "captions.txt"),
        ('image,"caption\na.jpg,a dog\n', "captions.txt"),
        (TABLE + 'a.jpg,"a dog\n', "captions.txt, row 8"),
    ],
)
def test_read_splits_rejects_csv_without_columns_or_with_open_quote(
    tmp_path: Path, table: str, reason: str
):
    message = user_error(read_splits, kaggle_layout(tmp_path, table))
    assert str(tmp_path / "captions.txt") in message
    assert "row " in message
    assert reason in message


def test_read_splits_names_missing_or_badly_encoded_split_list(tmp_path: Path):
    folder = archive_layout(tmp_path)
    test_list = folder / "Flickr_8k.testImages.txt"
    test_list.write_bytes(b"c.jpg\n\n\xe9.jpg\n")
    assert "Flickr_8k.testImages.txt, row 3: not UTF-8" in user_error(read_splits, folder)
    test_list.unlink()
    assert "Flickr_8k.testImages.txt: No such file" in user_error(read_splits, folder)


@pytest.mark.parametrize("missing", ["Images", "captions.txt"])
def test_read_splits_rejects_folder_in_neither_layout(tmp_path: Path, missing: str):
    folder = kaggle_layout(tmp_path)
    (folder / missing).rename(tmp_path.with_name(f"{tmp_path.name}.elsewhere"))
    message = user_error(read_splits, folder)
    assert str(folder) in message
    for name in ("Flicker8k_Dataset", "Flickr8k.token.txt", "Images", "captions.txt"):
        assert name in message


# ---------------------------------------------------------------- download

Response = tuple[bytes | Iterable[bytes], dict[str, object]]  # body, or its parts, and headers


class Handler(BaseHTTPRequestHandler):
    """Sends the response that `server.responses` has for a path, or else status 404."""

    def do_GET(self):
        if self.path not in self.server.responses:
            self.send_error(404)
            return
        body, headers = self.server.responses[self.path]
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        with suppress(ConnectionError):  # the client has closed it
            for part in [body] if isinstance(body, bytes) else body:
                self.wfile.write(part)

    def log_message(self, *_):
        pass


def response(body: bytes, length: int | None = None) -> Response:
    """A response whose header gives its true length, or another."""
    return body, {"Content-Length": len(body) if length is None else length}


def zip_of(files: dict[str, str | bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
        for name, content in files.items():
            members.writestr(name, content)
    return archive.getvalue()


def flip_bits(archive: bytes, position: int, bits: int) -> bytes:
    """The archive with another byte at one position."""
    damaged = bytearray(archive)
    damaged[position] ^= bits
    return bytes(damaged)


NOISE = np.random.default_rng(0).bytes(3000)
IMAGE_ZIP = zip_of(
    {f"Flicker8k_Dataset/{name}": NOISE for name in CAPTIONS}
    | {"__MACOSX/Flicker8k_Dataset/._a.jpg": b"x"}
)
TEXT_ZIP = zip_of({"Flickr8k.token.txt": TOKENS} | split_lists(LISTS))
LONG_ZIP = zip_of({f"{i}.txt": "a dog runs over the snow " * 40 for i in range(20)})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A local server of two small archives in the layout of Flickr8k's."""
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/Flickr8k/"
    server.responses = {
        f"/Flickr8k/{name}": response(body) for name, body in zip(ARCHIVES, (IMAGE_ZIP, TEXT_ZIP))
    }
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_unpacks_both_archives(workdir: Path, server: ThreadingHTTPServer):
    download_flickr8k(Path("data/flickr8k"), server.url)
    assert captions_by_image(read_splits("data/flickr8k")) == CAPTIONS
    assert [path.name for path in Path("data").iterdir()] == ["flickr8k"]
    assert not list(Path("data/flickr8k").glob("*.zip"))


def test_download_accepts_url_without_final_slash(workdir: Path, server: ThreadingHTTPServer):
    download_flickr8k(Path("data/flickr8k"), server.url.rstrip("/"))
    assert Path("data/flickr8k/Flickr8k.token.txt").is_file()


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(response(IMAGE_ZIP[:-100], len(IMAGE_ZIP)), id="connection ends early"),
        pytest.param(response(IMAGE_ZIP, len(IMAGE_ZIP) + 9), id="shorter than its header says"),
        pytest.param(response(b"", len(IMAGE_ZIP)), id="empty body"),
        pytest.param(
            (b"64\r\n" + b"x" * 50, {"Transfer-Encoding": "chunked"}), id="chunk ends early"
        ),
        pytest.param((IMAGE_ZIP[:-100], {}), id="truncated, without a length"),
        pytest.param(response(IMAGE_ZIP[:-100]), id="truncated archive"),
        pytest.param(response(b"<html>Sorry</html>"), id="web page"),
        pytest.param(response(flip_bits(LONG_ZIP, 60, 1)), id="wrong checksum"),
        pytest.param(response(flip_bits(LONG_ZIP, 35, 0b110)), id="member cannot be unpacked"),
        pytest.param(response(zip_of({"../outside.txt": "x"})), id="member in parent folder"),
        pytest.param(response(zip_of({"a/../../outside.txt": "x"})), id="parent folder within"),
        pytest.param(response(zip_of({"/outside.txt": "x"})), id="member with absolute path"),
        pytest.param(None, id="404"),
    ],
)
def test_download_recovers_from_broken_transfer(
    workdir: Path, server: ThreadingHTTPServer, name: str, broken: Response | None
):
    """It is one error that leaves no folder, and the next download succeeds."""
    path = f"/Flickr8k/{name}"
    original = server.responses.pop(path)
    if broken:
        server.responses[path] = broken
    message = user_error(download_flickr8k, Path("data/flickr8k"), server.url)
    for words in (server.url + name, *ARCHIVES, "data/flickr8k", "--data-dir", "--demo"):
        assert words in message
    assert not Path("data/flickr8k").exists()
    assert not list(workdir.rglob("outside.txt"))

    server.responses[path] = original
    download_flickr8k(Path("data/flickr8k"), server.url)
    assert len(captions_by_image(read_splits("data/flickr8k"))) == 3
    assert [path.name for path in Path("data").iterdir()] == ["flickr8k"]


def stalling_body() -> Iterator[bytes]:
    yield b"x" * 50
    time.sleep(3)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(stalling_body(), "timed out", id="stalls"),
        pytest.param(itertools.repeat(bytes(2**16)), "larger than 100,000 bytes", id="endless"),
        pytest.param(zip_of({"a.txt": bytes(10**6)}), "to 1,000,000 bytes in 1 files", id="bomb"),
        pytest.param(LONG_ZIP, "bytes in 20 files", id="many files"),
    ],
)
def test_download_is_bounded_in_time_and_size(
    workdir: Path,
    server: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    body: bytes | Iterable[bytes],
    reason: str,
):
    """It ends in one line, and nothing is left."""
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(data, "MAX_ARCHIVE", 100_000)
    monkeypatch.setattr(data, "MAX_MEMBERS", 10)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("unpacked"))
    server.responses[f"/Flickr8k/{ARCHIVES[0]}"] = body, {}
    assert reason in user_error(download_flickr8k, Path("data/flickr8k"), server.url)
    assert not list(Path("data").iterdir())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, len(TEXT_ZIP) - 1), st.integers(1, 255))
def test_download_detects_any_damaged_byte(position: int, bits: int):
    """It is an error without a folder, unless the unpacked files are the original ones."""
    archives = (IMAGE_ZIP, flip_bits(TEXT_ZIP, position, bits))
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), dict(zip(ARCHIVES, archives)))
        downloaded = Path(folder, "flickr8k")
        try:
            download_flickr8k(downloaded, Path(folder).as_uri())
        except UserError as error:
            assert "--data-dir" in str(error)
            assert not downloaded.exists()
            return
        originals = [text.encode() for text in (TOKENS, *split_lists(LISTS).values())]
        assert all(path.read_bytes() in originals for path in downloaded.glob("*.txt"))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/", "no address", "http://[/", "gopher://127.0.0.1/"]
)
def test_download_rejects_unreachable_or_invalid_url(workdir: Path, url: str):
    message = user_error(download_flickr8k, Path("data/flickr8k"), url)
    for words in (url, *ARCHIVES, "data/flickr8k", "--data-dir", "--demo"):
        assert words in message
    assert not Path("data/flickr8k").exists()


def test_download_leaves_no_partial_folder_when_killed(
    workdir: Path, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(zipfile.ZipFile, "extractall", interrupt)
        download_flickr8k(Path("data/flickr8k"), server.url)
    assert not Path("data/flickr8k").exists()
    download_flickr8k(Path("data/flickr8k"), server.url)
    assert len(captions_by_image(read_splits("data/flickr8k"))) == 3


def test_prepare_data_dir_downloads_default_folder_once(workdir: Path, server: ThreadingHTTPServer):
    config = parse(Config, ["--download-url", server.url])
    check_data_dir(config)
    prepare_data_dir(config)
    assert len(captions_by_image(read_splits(config.data_dir))) == 3
    server.responses.clear()
    prepare_data_dir(config)


@pytest.mark.parametrize("demo", [[], ["--demo"]])
def test_prepare_data_dir_never_makes_another_folder(
    workdir: Path, server: ThreadingHTTPServer, demo: list[str]
):
    """An absent folder that is not the default one is an error, such as one with a typo."""
    config = parse(Config, [*demo, "--data-dir", "data/flikr8k", "--download-url", server.url])
    prepare_data_dir(config)
    assert "--data-dir data/flikr8k" in user_error(read_splits, config.data_dir)
    assert "--data-dir data/flikr8k" in user_error(check_data_dir, config)
    assert not list(workdir.iterdir())


@pytest.mark.parametrize("pretrained", ["--pretrained", "--no-pretrained"])
def test_trainer_checks_the_layout_before_it_loads_an_encoder(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, pretrained: str
):
    own_layout(workdir / "own", "a,b\n1,2\n", "captions.csv")
    monkeypatch.setattr("trainer.build_clip", lambda *_, **__: pytest.fail("loaded"))
    message = error_message(trainer.main, "--data-dir", "own", pretrained, "--device", "cpu")
    assert "own/captions.csv, row 1: columns ['a', 'b'], but 'image' and 'caption'" in message


def test_prepare_data_dir_generates_demo_shapes_once(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    generated = []
    monkeypatch.setattr("data.generate_shapes", generated.append)
    config = parse(Config, ["--demo"])
    check_data_dir(config)
    prepare_data_dir(config)
    assert generated == [Path("data/shapes")]
    Path("data/shapes").mkdir(parents=True)
    prepare_data_dir(config)
    assert generated == [Path("data/shapes")]


# ---------------------------------------------------------------- the demo's shapes

KINDS = (SIZES, COLORS, SHAPES, POSITIONS)
# Pixels of a small shape in all, and in its width.
SMALL_SHAPES = {"circle": (343, 21), "triangle": (156, 19), "square": (240, 16)}
SMALL_SHAPES["diamond"] = (221, 21)


def parse_scene(caption: str, kinds: tuple[dict, ...] = KINDS) -> frozenset[tuple[str, ...]]:
    """The shapes that a caption names, each as one word of each kind, such as (size, color)."""
    words = re.findall("|".join(itertools.chain(*kinds)), caption)
    assert len(words) in (2 * len(kinds), 3 * len(kinds)), caption
    scene = set()
    for start in range(0, len(words), len(kinds)):
        mentioned = words[start : start + len(kinds)]
        shape = [next(word for word in mentioned if word in kind) for kind in kinds]
        scene.add(tuple(shape))
    assert len(kinds) * len(scene) == len(words)
    return frozenset(scene)


@pytest.fixture(scope="module")
def many_scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    """So many scenes that some would be equal if equal ones were not rejected."""
    folder = tmp_path_factory.mktemp("scenes") / "shapes"
    generate_shapes(folder, train=1500, dev=100, test=100)
    return read_splits(folder)


def test_generate_shapes_writes_five_captions_of_each_scene(many_scenes: dict[str, Split]):
    """The five differ and name all of the scene, but the last omits the sizes."""
    for split in many_scenes.values():
        for captions in split.captions:
            assert len(captions) == len(set(captions)) == 5
            assert len({parse_scene(caption) for caption in captions[:4]}) == 1
            assert len({parse_scene(caption, KINDS[1:]) for caption in captions}) == 1


def test_generate_shapes_repeats_no_scene(many_scenes: dict[str, Split]):
    """No scene is repeated, so that no test scene is in the training split."""
    scenes = {}
    for name, split in many_scenes.items():
        scenes[name] = [parse_scene(captions[0]) for captions in split.captions]
    sizes = {name: len(part) for name, part in scenes.items()}
    assert sizes == {"train": 1500, "dev": 100, "test": 100}
    all_scenes = list(itertools.chain(*scenes.values()))
    assert len(all_scenes) == len(set(all_scenes))
    assert not set(scenes["test"]) & set(scenes["train"])
    assert {len(scene) for scene in all_scenes} == {2, 3}


def test_generate_shapes_renders_what_captions_say(many_scenes: dict[str, Split]):
    """Each position shows the named color, size and, if it is small, shape; or no color."""
    split = many_scenes["test"]
    rgb = {color: tuple(bytes.fromhex(code[1:])) for color, code in COLORS.items()}
    for path, captions in zip(split.paths[:40], split.captions):
        pixels = load_image(path)
        scene = parse_scene(captions[0])
        expected = {position: (size, color, shape) for size, color, shape, position in scene}
        for position, (x, y) in POSITIONS.items():
            cell = pixels[y - 18 : y + 18, x - 18 : x + 18].reshape(-1, 3)
            pixel_counts = Counter(map(tuple, cell.tolist()))
            areas = {color: pixel_counts[rgb[color]] for color in rgb if pixel_counts[rgb[color]]}
            size, color, shape = expected.pop(position, (None, None, None))
            assert list(areas) == ([color] if color else []), (path, position)
            if size:
                assert (areas[color] > 350) == (size == "large"), (path, position)
            if size == "small":
                cell = pixels[y - 14 : y + 15, x - 14 : x + 15]
                mask = (cell == rgb[color]).all(axis=2)
                area, width = SMALL_SHAPES[shape]
                assert abs(mask.sum() - area) <= 20, (path, position)
                assert abs(mask.any(axis=0).sum() - width) <= 1, (path, position)
        assert not expected


def test_generate_shapes_is_deterministic(tmp_path: Path, shapes: Path):
    again = tmp_path / "again"
    generate_shapes(again, train=48, dev=12, test=12)
    names = sorted(path.relative_to(shapes) for path in shapes.rglob("*"))
    assert names == sorted(path.relative_to(again) for path in again.rglob("*"))
    for name in names:
        if not (shapes / name).is_dir():
            assert (shapes / name).read_bytes() == (again / name).read_bytes()


def test_generate_shapes_leaves_no_partial_folder_when_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "shapes"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("data.csv.writer", interrupt)
        generate_shapes(folder, train=8, dev=1, test=1)
    assert not folder.exists()
    generate_shapes(folder, train=8, dev=1, test=1)
    assert len(captions_by_image(read_splits(folder))) == 10


def test_read_splits_names_a_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Once; the images in other folders are read."""
    folder = own_layout(tmp_path, TABLE, "captions.csv")
    original = data.list_files

    def list_files(path: Path) -> tuple[list[str], list[str]]:
        return original(path)[0], [f"{path}/locked: Permission denied"]

    monkeypatch.setattr(data, "list_files", list_files)
    assert captions_by_image(read_splits(folder)) == CAPTIONS
    stdout = capsys.readouterr().out
    assert stdout.count("left out 1 folders that cannot be read") == 1
    assert "locked: Permission denied" in stdout
