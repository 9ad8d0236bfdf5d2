"""Data sets of images with captions: reading, splitting, downloading, and batches for training.

from data import read_splits
splits = read_splits("data/flickr8k")
splits["train"].captions[0]  # all captions of the image splits["train"].paths[0]
"""

import bisect
import codecs
import csv
import difflib
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import os
import platform
import posixpath
import re
import shutil
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, PngImagePlugin
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from config import DEMO_DEFAULTS, WORKER, Config, UserError, printable, progress

SPLITS = ("train", "dev", "test")
ARCHIVES = ("Flickr8k_Dataset.zip", "Flickr8k_text.zip")
# Fraction of the captions whose image may be missing, and of broken rows. Flickr8k itself has five
# captions of an image that is not in its archive.
MAX_MISSING = 0.01
BLOCK_SIZE = 2**20  # bytes of a text that are decoded at once
MAX_ARCHIVE = 3 * 2**30  # bytes of a download, packed or unpacked; Flickr8k has 1.1 GB
MAX_MEMBERS = 100_000  # files in it; Flickr8k has 16,000
DOWNLOAD_TIMEOUT = 60  # seconds without a byte
LOADER_TIMEOUT = 1800  # seconds without a batch from the DataLoader workers
SHARED_MEMORY = Path("/dev/shm")  # of Linux
TEXT_BUCKETS = 4  # on the CPU a batch's captions are padded in this number of groups


# ---------------------------------------------------------------- caption files

IMAGE_COLUMNS = ("image", "image_name", "filename", "filepath", "file_name", "file_path", "path")
CAPTION_COLUMNS = ("caption", "title", "comment", "text", "sentence", "raw")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # of a table's columns
# The names of files that may be caption files. Flickr8k's lemmas are not captions.
CAPTION_FILE = re.compile(
    r"(?!.*\.lemma\.)"
    r"(.*\.(csv|tsv|token)|.*(caption|token|result|label|text).*\.txt|dataset.*\.json)$",
    re.IGNORECASE,
)
TOKEN_LINE = re.compile(r"[^\t]+#\d+\t")
SPLIT_NAMES = {  # in a caption file; the field trains on "restval" too
    "train": "train",
    "restval": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}


class CaptionRow(NamedTuple):
    """One caption of a caption file."""

    source: str  # file and row, for error messages
    image: str  # as the file names it
    caption: str
    split: str = ""  # if the caption file defines the splits


CaptionParser = Callable[[Path], Iterator[CaptionRow | UserError]]  # an error for a broken row


def _open_text(path: Path, newline: str = "") -> TextIO:
    """The text of a UTF-8 file, with or without a byte-order mark, or of a UTF-16 file with one.

    Raises `UserError` with the row of bytes that are not text.
    """
    if not path.is_file():  # opening a named pipe would block
        raise UserError(f"{path}: No such file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    encoding = _encoding(content)
    decoder = codecs.getincrementaldecoder(encoding)()
    # In blocks: the text of a large file as one string can take four times its size.
    for start in range(0, len(content) + 1, BLOCK_SIZE):
        end = start + BLOCK_SIZE
        try:
            decoder.decode(content[start:end], final=end > len(content))
        except UnicodeDecodeError as error:
            # The decoder keeps the beginning of a character from the block before.
            position = min(end, len(content)) - len(error.object) + error.start
            row = content[:position].count(b"\n") + 1
            raise UserError(f"{path}, row {row}: not UTF-8; save the file as UTF-8") from None
    return io.TextIOWrapper(io.BytesIO(content), encoding, newline=newline)


def _encoding(start: bytes) -> str:
    """The encoding of a text, by its byte-order mark if it has one."""
    is_utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf16 else "utf-8-sig"


def _find_parser(path: Path) -> CaptionParser:
    """The function that reads a caption file, by its name and first line.

    Raises `UserError` if there is none.
    """
    if path.suffix.lower() == ".json":
        return _read_karpathy
    try:
        with path.open("rb") as file:
            head = file.read(2**16)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    lines = head.decode(_encoding(head), errors="replace").splitlines()
    header = next((line for line in lines if line.strip()), "")
    if path.name.lower() == "flickr8k.token.txt" or TOKEN_LINE.match(header):
        return _read_token_file
    _, columns = _parse_header(header)
    if set(columns) & set(IMAGE_COLUMNS) and set(columns) & set(CAPTION_COLUMNS):
        return _read_table
    raise UserError(
        f"{path}, row 1: columns {columns}, but 'image' and 'caption' are needed, "
        f"or others of {', '.join((*IMAGE_COLUMNS[1:], *CAPTION_COLUMNS[1:]))}"
    )


def _read_token_file(path: Path) -> Iterator[CaptionRow | UserError]:
    """Rows of `name.jpg#0<TAB>caption`, the format of Flickr8k's own archives."""
    for number, line in enumerate(_open_text(path, newline="\n"), start=1):
        source = f"{path}, row {number}"
        name, tab, caption = line.partition("\t")
        if tab:
            image = name.rpartition("#")[0].strip() or name.strip()
            yield CaptionRow(source, image, caption)
        elif line.strip():
            yield UserError(f"{source}: no tab between the image and its caption")


def _parse_header(line: str) -> tuple[str, list[str]]:
    """The separator of a table, by its first line, and its columns in lower case."""
    headers = []
    for separator in SEPARATORS:
        cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
        columns = [re.sub(r"[\s-]+", "_", cell.strip().lower()) for cell in cells]
        is_known = [column in (*IMAGE_COLUMNS, *CAPTION_COLUMNS) for column in columns]
        headers.append((sum(is_known), len(columns), separator, columns))
    *_, separator, columns = max(headers, key=lambda header: header[:2])
    while len(columns) > 1 and not columns[-1]:  # an empty column from a spreadsheet
        columns.pop()
    return separator, columns


def _find_column(path: Path, columns: list[str], names: tuple[str, ...]) -> int:
    """The index of the column with the first of `names`, or else with another of them."""
    found = [column for column in columns if column in names]
    if len(set(found)) < len(found) or (len(found) > 1 and names[0] not in found):
        raise UserError(f"{path}, row 1: columns {found} could all be the {names[0]}; keep one")
    return columns.index(names[0] if names[0] in found else found[0])


def _read_table(path: Path) -> Iterator[CaptionRow | UserError]:
    """Rows of a table with a column of images, one of captions, and perhaps one named "split".

    Not pandas: all cells are text, so that "None", "NA" and "007" stay captions.
    """
    file = _open_text(path)
    separator, columns = _parse_header(next(line for line in file if line.strip()))
    file.seek(0)
    image = _find_column(path, columns, IMAGE_COLUMNS)
    caption = _find_column(path, columns, CAPTION_COLUMNS)
    split = columns.index("split") if "split" in columns else None
    file_name = str(path)
    rows = _csv_rows(file, separator)
    number, header = next(rows)
    if isinstance(header, csv.Error):
        raise UserError(f"{file_name}, row {number}: {header}")
    for number, cells in rows:
        source = f"{file_name}, row {number}"
        if isinstance(cells, csv.Error):
            yield UserError(f"{source}: {cells}")
            continue
        while len(cells) > len(columns) and not cells[-1].strip():
            cells.pop()  # empty columns from a spreadsheet
        if len(cells) == len(columns):
            name = cells[image].strip()
            in_split = "" if split is None else SPLIT_NAMES.get(cells[split].strip().lower(), "")
            for text in _captions_of_cell(cells[caption]):
                yield CaptionRow(source, name, text, in_split)
            continue
        reason = f"{len(cells)} cells under {len(columns)} columns"
        if len(cells) > len(columns):
            reason += f"; quote captions that contain {SEPARATORS[separator]}"
        yield UserError(f"{source}: {reason}")


def _captions_of_cell(cell: str) -> list[str]:
    """One caption, or those of a JSON list, as in the Flickr30k of Hugging Face."""
    if cell.startswith('["'):
        with suppress(ValueError):
            return [str(text) for text in json.loads(cell)]
    return [cell]


def _csv_rows(file: TextIO, separator: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The rows of a table that are not blank, by the number of their first line.

    Yields an error for each line of a row that is not CSV. A quotation mark that is never closed
    takes all lines after it with it.
    """
    csv.field_size_limit(2**31 - 1)
    # Flickr30k's table has a space after each bar, and captions that begin with a quotation mark.
    skip_space = separator != "|"
    table = csv.reader(file, delimiter=separator, skipinitialspace=skip_space, strict=True)
    while True:
        number = table.line_num + 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield from [(number, error)] * (table.line_num + 1 - number)
            continue
        if "".join(cells).strip():
            yield number, cells


def _read_karpathy(path: Path) -> Iterator[CaptionRow]:
    """Rows of `dataset_*.json`, the captions and splits of Flickr8k, Flickr30k and COCO.

    By Karpathy and Fei-Fei (arXiv 1412.2306).
    """
    number = 0
    gc.disable()  # else it visits the dicts of the file again and again
    try:
        content = json.load(_open_text(path))
        for number, image in enumerate(content["images"]):
            source = f"{path}, image {number}"
            name = posixpath.join(image.get("filepath", ""), image["filename"])
            split = SPLIT_NAMES.get(image.get("split"), "")
            for sentence in image["sentences"]:
                yield CaptionRow(source, name, str(sentence["raw"]), split)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}, image {number}: 'images' need 'filename' and 'sentences' ({reason})"
        ) from None
    finally:
        gc.enable()


# ---------------------------------------------------------------- layout

IMAGE_DIRS = (
    "flicker8k_dataset",
    "flickr8k_dataset",
    "images",
    "flickr30k_images",
    "flickr8k_images",
)
EXPECTED_LAYOUT = (
    "Flickr8k.token.txt, captions.txt, results.csv or another caption file is expected, "
    "and images in Flicker8k_Dataset/, Images/, another folder or beside it"
)


@dataclass(frozen=True)
class Layout:
    """What `find_layout` finds in a data folder."""

    folder: Path
    files: list[str]  # all files below the folder, see `list_files`
    errors: list[str]  # of folders that cannot be read
    captions_file: Path
    read: CaptionParser
    image_dir: Path  # the names of images are relative to it


def find_layout(data_dir: str | Path) -> Layout:
    """Finds the captions and the images of a folder; it may also be given as its caption file.

    The caption file is a table, a token file or a `dataset_*.json`, in the folder or one below. The
    images are in a folder with a name of `IMAGE_DIRS`, in the only folder that contains any, or
    else anywhere below the caption file's folder. Names may be in any case.

    Raises `UserError` if there is no such folder or file, or if several fit.
    """
    folder = Path(data_dir)
    if folder.is_file():
        captions_file, read = folder, _find_parser(folder)
        folder = folder.parent
        files, errors = list_files(folder)
    elif folder.is_dir():
        files, errors = list_files(folder)
        captions_file, read = _find_captions(folder, files)
    else:
        raise UserError(f"--data-dir {data_dir}: no such folder")
    image_dir = _find_image_dir(folder, files, captions_file)
    return Layout(folder, files, errors, captions_file, read, image_dir)


def _find_captions(folder: Path, files: list[str]) -> tuple[Path, CaptionParser]:
    """The caption file and its parser; see `find_layout`."""
    unfit: list[tuple[Path, UserError]] = []
    for depth in (0, 1):
        names = [name for name in files if name.count("/") == depth]
        paths = [folder / name for name in names if CAPTION_FILE.match(posixpath.basename(name))]
        fitting = []
        for path in filter(Path.is_file, sorted(paths)):
            try:
                fitting.append((path, _find_parser(path)))
            except UserError as error:
                unfit.append((path, error))
        if len(fitting) > 1:
            listed = ", ".join(str(path) for path, _ in fitting)
            raise UserError(
                f"{folder}: several caption files fit; pass one as --data-dir: {listed}"
            )
        if fitting:
            return fitting[0]
    # Say what is wrong with the file that is named like a caption file, or with the only table.
    unfit = [(path, error) for path, error in unfit if "caption" in path.name.lower()] or unfit
    if len(unfit) == 1:
        raise unfit[0][1]
    raise UserError(f"{folder}: contains no caption file; {EXPECTED_LAYOUT}")


def _find_image_dir(folder: Path, files: list[str], captions_file: Path) -> Path:
    """The folder of the images; see `find_layout`."""
    for base in dict.fromkeys((captions_file.parent, folder)):
        prefix = _prefix(base, folder)
        names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
        dirs = {name.partition("/")[0] for name in names if "/" in name}
        known = sorted(name for name in dirs if name.lower() in IMAGE_DIRS)
        if len(known) > 1:
            listed = ", ".join(str(base / name) for name in known)
            raise UserError(f"{folder}: several folders of images fit; keep one of them: {listed}")
        with_images = {
            name.rpartition("/")[0].partition("/")[0] for name in names if is_image(name)
        }
        if known or len(with_images) == 1:
            return base / (known or list(with_images))[0]
        if with_images:
            return base
    suffixes = {posixpath.splitext(name)[1].lower() for name in files}
    advice = HEIF_ADVICE if suffixes & HEIF_SUFFIXES else EXPECTED_LAYOUT
    raise UserError(f"{folder}: contains no image that can be read; {advice}")


def _prefix(path: Path, folder: Path) -> str:
    """How the names of the files below `path` begin in a listing of `folder`."""
    return "" if path == folder else path.relative_to(folder).as_posix() + "/"


class ImageNames:
    """Finds the files that a caption file or a split list names.

    It looks them up in the listing of a layout, so that no name leads out of the data folder.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.files = set(layout.files)
        self.prefix = _prefix(layout.image_dir, layout.folder)
        captions_prefix = _prefix(layout.captions_file.parent, layout.folder)
        self.prefixes = list(dict.fromkeys((self.prefix, captions_prefix, "")))
        cut = len(self.prefix)
        self.in_image_dir = {name[cut:] for name in layout.files if name.startswith(self.prefix)}

    def find(self, name: str, source: str) -> str | None:
        """The image that is meant, as a path relative to the image folder; None if there is none.

        `name` is a path relative to the image folder, the caption file or the data folder, the end
        of such a path, or an absolute path. Case, backslashes and Unicode form do not matter, and
        the suffix may be missing. Raises `UserError`, which begins with `source`, if several files
        fit or if the path leads out of the data folder.
        """
        if name in self.in_image_dir:
            return name
        path = name.replace("\\", "/")
        is_absolute = path.startswith("/") or PureWindowsPath(path).drive != ""
        relative = (
            self._below_folder(path) if is_absolute else [prefix + path for prefix in self.prefixes]
        )
        # First with backslashes as they are: on Linux they can be part of a name.
        paths = [posixpath.normpath(path) for path in (self.prefix + name, *relative)]
        for path in paths:
            if path in self.files:
                return self._below_image_dir(path)
        for files in self._files_by_path_end:
            for fitting in filter(None, (files.get(_normalized(path)) for path in paths)):
                if len(fitting) > 1:
                    listed = ", ".join(sorted(fitting)[:3])
                    raise UserError(f"{source}: {name!r} could be any of {listed}")
                return self._below_image_dir(fitting[0])
        if is_absolute or ".." in path.split("/"):
            image_dir = self.layout.image_dir
            raise UserError(f"{source}: {name!r} is not the name of a file in {image_dir}")
        # The listing passes over hidden folders and the like.
        return name if os.path.lexists(self.layout.image_dir / name) else None

    def nearest(self, name: str) -> str:
        """A hint at the image with the nearest name; empty if no name is near."""
        names = sorted(self.in_image_dir)
        place = bisect.bisect(names, name)
        near = names[max(0, place - 2000) : place + 2000]  # comparing takes 0.1 ms each
        close = difflib.get_close_matches(name, near, n=1)
        return f" (the nearest name is {close[0]})" if close else ""

    def _below_folder(self, path: str) -> list[str]:
        """An absolute path relative to the data folder; empty if it is outside."""
        folder, image_dir = self.layout.folder, self.layout.image_dir
        roots = [(os.path.abspath(folder), ""), (os.path.realpath(folder), "")]
        for root, prefix in (*roots, (os.path.realpath(image_dir), self.prefix)):
            root_parts = _normalized(root.replace("\\", "/").rstrip("/")).split("/")
            if _normalized(path).split("/")[: len(root_parts)] == root_parts:
                return [prefix + "/".join(path.split("/")[len(root_parts) :])]
        return []

    def _below_image_dir(self, path: str) -> str:
        """A path in the listing relative to the image folder, in rare cases with ".."."""
        return posixpath.relpath(path, self.prefix or ".")

    @cached_property
    def _files_by_path_end(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """The files by every end of their `_normalized` path, with and without the suffix."""
        by_name, by_stem = defaultdict(list), defaultdict(list)
        for file in self.files:
            parts = _normalized(file).split("/")
            for start in range(len(parts)):
                end = "/".join(parts[start:])
                by_name[end].append(file)
                if is_image(file):
                    by_stem[posixpath.splitext(end)[0]].append(file)
        return dict(by_name), dict(by_stem)


def _normalized(path: str) -> str:
    """One spelling of all that differ in case or Unicode form: macOS decomposes letters."""
    return unicodedata.normalize("NFC", path).casefold()


# ---------------------------------------------------------------- splits


class PackedList(Sequence):
    """A list of which item i is `unpack(texts[i])`, as one buffer of text that processes share.

    A forked DataLoader worker would copy a list of strings: reading one changes its reference
    count.
    """

    def __init__(self, texts: Iterable[str], unpack: Callable[[str], Any]) -> None:
        self.buffer = bytearray()
        offsets = [0]  # item i ends where item i + 1 starts
        for text in texts:
            self.buffer += text.encode(errors="surrogatepass")
            offsets.append(len(self.buffer))
        self.offsets = np.array(offsets)
        self.unpack = unpack

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]  # negative ones count from the end
        text = self.buffer[self.offsets[index] : self.offsets[index + 1]]
        return self.unpack(text.decode(errors="surrogatepass"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True)
class Split:
    """Images, each once, with all their captions: `captions[i]` belong to `paths[i]`.

    White space in a caption is single spaces, so that equal captions are equal texts.
    """

    paths: Sequence[Path]
    captions: Sequence[list[str]]

    @property
    def texts(self) -> list[str]:
        """All captions in the order of the images."""
        return list(itertools.chain.from_iterable(self.captions))


def read_splits(data_dir: str | Path) -> dict[str, Split]:
    """Reads the images and captions of a folder, and prints what was read and what was left out.

    See `find_layout` for the supported folders, and `ImageNames` for the names of images. The
    splits are those of a `dataset_*.json`, of a table's column "split", or of the lists
    `Flickr_8k.{train,dev,test}Images.txt`. Without them a tenth of the images, at most 1,000, is
    held out for dev, and as many for test.

    Returns the splits "train", "dev" and "test". Raises `UserError` with file and row for what
    cannot be read, an image in two splits, an empty split, and more than 1 % of the captions
    without their image or of the rows broken.
    """
    layout = find_layout(data_dir)
    folder, image_dir = layout.folder, layout.image_dir
    names = ImageNames(layout)
    captions, lists = _captions_by_image(layout, names)
    for list_dir in (layout.captions_file.parent, folder):
        lists = lists or _read_split_lists(list_dir, names)
    lists = lists or _hash_split(folder, sorted(captions))
    _print_left_out(layout, names, captions, lists)

    splits = {}
    for split, listed in lists.items():
        in_split = sorted(listed & captions.keys())
        if not in_split:
            raise UserError(f"{folder}: the {split} split has no image in {image_dir}")
        paths = PackedList(in_split, image_dir.joinpath)
        texts = PackedList((captions[name] for name in in_split), _split_captions)
        splits[split] = Split(paths, texts)
    sizes = ", ".join(f"{split} {len(part.paths):,}" for split, part in splits.items())
    num_captions = _count_captions(captions)
    place = printable(folder)
    print(f"data: {place}, {len(captions):,} images, {num_captions:,} captions; {sizes}")
    return splits


def _print_left_out(
    layout: Layout, names: ImageNames, captions: dict[str, str], lists: dict[str, set[str]]
) -> None:
    if layout.errors:
        first = printable(layout.errors[0])
        print(f"data: left out {len(layout.errors)} folders that cannot be read: {first}")
    unlisted = captions.keys() - set().union(*lists.values())
    uncaptioned = {name for name in names.in_image_dir if is_image(name)} - captions.keys()
    if unlisted or uncaptioned:
        print(
            f"data: left out {len(unlisted)} images in no split list "
            f"and {len(uncaptioned)} without a caption"
        )


def _split_captions(text: str) -> list[str]:
    return text.split("\n")


def _count_captions(captions: dict[str, str]) -> int:
    return len(captions) + sum(text.count("\n") for text in captions.values())


def _captions_by_image(
    layout: Layout, names: ImageNames
) -> tuple[dict[str, str], dict[str, set[str]]]:
    """The captions of each image, and the images of each split if the caption file defines them.

    The captions are joined by line breaks, of which they have none. Images are named as in
    `ImageNames.find`.
    """
    captions: dict[str, str] = {}
    lists: dict[str, set[str]] = {}
    found: dict[str, str | None] = {}  # by the name in the caption file
    missing: list[str] = []
    broken: list[UserError] = []
    for row in layout.read(layout.captions_file):
        if isinstance(row, UserError):
            broken.append(row)
            continue
        if not row.image:
            broken.append(UserError(f"{row.source}: '' is not the name of an image"))
            continue
        if row.image not in found:
            found[row.image] = names.find(row.image, row.source)
            if row.split and not found[row.image]:  # Karpathy names the folders of COCO's archives
                found[row.image] = names.find(posixpath.basename(row.image), row.source)
        name, caption = found[row.image], " ".join(row.caption.split())
        if caption and name:
            captions[name] = f"{captions[name]}\n{caption}" if name in captions else caption
        elif caption:
            missing.append(row.image)
        if name and row.split:
            lists.setdefault(row.split, set()).add(name)

    num_captions = _count_captions(captions)
    if broken:
        _leave_out(len(broken), num_captions + len(missing), "rows are broken", str(broken[0]))
    if missing:
        example = f"{missing[0]}{names.nearest(missing[0])}"
        reason = f"captions have no image in {layout.image_dir}"
        _leave_out(len(missing), num_captions, reason, f"{layout.captions_file}: {example}")
    if lists:
        _check_disjoint(lists, dict.fromkeys(SPLITS, layout.captions_file))
        missing_splits = [split for split in SPLITS if split not in lists]
        if missing_splits:
            raise UserError(
                f"{layout.captions_file}: its splits have no image of {missing_splits[0]}; "
                "train, dev (or val) and test are needed, or no splits"
            )
        lists = {split: lists[split] for split in SPLITS}
    return captions, lists


def _leave_out(count: int, others: int, reason: str, example: str) -> None:
    """Prints what is left out; raises `UserError` if it is more than `MAX_MISSING` of all."""
    message = f"{count:,} of {count + others:,} {reason}: {example}"
    if count > MAX_MISSING * (count + others):
        raise UserError(f"{message}, ...; at most {MAX_MISSING:.0%} may be missing or broken")
    print(f"data: left out, {printable(message)}")


def _read_split_lists(folder: Path, names: ImageNames) -> dict[str, set[str]]:
    """The image names of each split's list file; empty if none of the three files exists."""
    files = {split: folder / f"Flickr_8k.{split}Images.txt" for split in SPLITS}
    if not any(file.exists() for file in files.values()):
        return {}
    lists = {}
    for split, file in files.items():
        lists[split] = set()
        for row, line in enumerate(_open_text(file), start=1):
            name = line.strip()
            if name:
                lists[split].add(names.find(name, f"{file}, row {row}") or name)
    _check_disjoint(lists, files)
    return lists


def _check_disjoint(lists: dict[str, set[str]], files: dict[str, Path]) -> None:
    for one, other in itertools.combinations(lists, 2):
        both = lists[one] & lists[other]
        if both:
            raise UserError(f"{files[other]}: {min(both)} is in the {one} split too")


def _hash_split(folder: Path, names: list[str]) -> dict[str, set[str]]:
    """Splits images by the hash of their names, so that adding images moves few others.

    Folders do not count: the folder that the names are relative to depends on what is added.
    """
    if len(names) < 10:
        raise UserError(
            f"{folder}: without split lists at least 10 images with captions are needed, "
            f"but there are {len(names)}"
        )
    held_out = min(len(names) // 10, 1000)  # Flickr8k holds out 1,000
    print(
        f"data: no split lists; by the hash of their names "
        f"{held_out} images are held out for dev and {held_out} for test"
    )
    order = sorted(names, key=lambda name: (_hash(posixpath.basename(name)), name))
    return {
        "train": set(order[2 * held_out :]),
        "dev": set(order[:held_out]),
        "test": set(order[held_out : 2 * held_out]),
    }


def _hash(text: str) -> bytes:
    """The same in all processes, which Python's own hash is not."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


# ---------------------------------------------------------------- download


def check_data_dir(config: Config) -> None:
    """Raises `UserError` for a data folder in no known layout, and for an absent one.

    The folder that `prepare_data_dir` makes may be absent.
    """
    is_demo = config.demo and config.data_dir == DEMO_DEFAULTS["data_dir"]
    can_be_made = is_demo or config.data_dir == Config.data_dir
    if Path(config.data_dir).exists() or not can_be_made:
        find_layout(config.data_dir)


def prepare_data_dir(config: Config) -> None:
    """Downloads Flickr8k, or generates the demo's shapes, if the default folder is absent."""
    folder = Path(config.data_dir)
    if folder.exists():
        return
    if config.demo and config.data_dir == DEMO_DEFAULTS["data_dir"]:
        generate_shapes(folder)
    elif config.data_dir == Config.data_dir:
        download_flickr8k(folder, config.download_url)


def download_flickr8k(folder: Path, base_url: str) -> None:
    """Downloads and unpacks both archives. `folder` appears only when all of it is complete.

    Raises `UserError` with the URL and the alternatives for any failure, and removes what it wrote.
    """
    print(f"data: {folder} is absent; downloading Flickr8k (1.1 GB, non-commercial research only)")
    with _staging_dir(folder) as staging:
        for name in ARCHIVES:
            url = f"{base_url.rstrip('/')}/{name}"
            try:
                _download_and_unpack(url, staging / name)
            except Exception as error:  # a wrong URL, a broken transfer or a damaged archive
                raise UserError(
                    f"{url}: {error}. Run it again, or unpack {' and '.join(ARCHIVES)} into "
                    f"{folder}, or pass another --data-dir, or try --demo"
                ) from None


def _download_and_unpack(url: str, archive: Path) -> None:
    """Unpacks the zip file at `url` beside `archive`, the path that it is downloaded to."""
    _download(url, archive)
    with zipfile.ZipFile(archive) as members:
        size = sum(member.file_size for member in members.infolist())
        if size > MAX_ARCHIVE or len(members.infolist()) > MAX_MEMBERS:
            raise OSError(f"it would unpack to {size:,} bytes in {len(members.infolist()):,} files")
        damaged = members.testzip()
        if damaged:
            raise OSError(f"{damaged} in it is damaged")
        for member in members.namelist():
            if leads_outside(member):
                raise OSError(f"{member} in it is outside its folder")
        members.extractall(archive.parent)
    archive.unlink()


def _download(url: str, path: Path) -> None:
    """Raises `OSError` for a transfer that stalls, ends early or is larger than `MAX_ARCHIVE`."""
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response, path.open("wb") as file:
        expected = int(response.headers["Content-Length"] or 0)
        size = {"total": expected or None, "unit": "B", "unit_scale": True}
        with progress(None, path.name, **size) as bar:
            for chunk in iter(lambda: response.read(2**16), b""):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > MAX_ARCHIVE:
                    raise OSError(f"it is larger than {MAX_ARCHIVE:,} bytes")
        if expected and file.tell() != expected:
            raise OSError(f"only {file.tell():,} of {expected:,} bytes arrived")


@contextmanager
def _staging_dir(folder: Path) -> Iterator[Path]:
    """An empty folder to fill. It becomes `folder`, which is therefore never incomplete.

    Of several processes of this machine that fill one at the same time, the first one's is kept.
    Raises `UserError` if it cannot be written.
    """
    staging = _temporary(folder)
    for leftover in _leftovers(folder.parent):
        if leftover.name.startswith(f"{folder.name}."):
            shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)  # of a killed process with the same id
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(folder)
    except OSError as error:
        if folder.exists():  # another process was first
            return
        raise UserError(f"{folder}: cannot be created: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ---------------------------------------------------------------- the demo's shapes

SIZES = {"small": 10, "large": 20}  # radius in pixels
COLORS = {
    "red": "#d62728",
    "green": "#2c8c3c",
    "blue": "#1f5ac8",
    "yellow": "#ebc814",
    "purple": "#823cb4",
}
SHAPES = {
    "circle": (60, 0),
    "triangle": (3, 0),
    "square": (4, 0),
    "diamond": (4, 45),
}  # corners, turn
POSITIONS = {  # center (x, y) in pixels
    "top left": (26, 26),
    "top right": (102, 26),
    "centre": (64, 64),
    "bottom left": (26, 102),
    "bottom right": (102, 102),
}
SCENE_SIDE = 128  # pixels
CAPTION_TEMPLATES = (  # for one shape, and the words between two shapes
    ("a {size} {color} {shape} at the {position}", " and "),
    ("{position}: {size} {color} {shape}", "; "),
    ("the {position} holds a {size} {shape} in {color}", " and "),
    ("one {color} {shape}, {size}, in the {position}", ", with "),
    ("there is a {color} {shape} at the {position}", ", and "),  # without the size, as in queries
)
Scene = list[dict[str, str]]  # for each shape its size, color, shape and position


def generate_shapes(folder: Path, train: int = 5000, dev: int = 200, test: int = 200) -> None:
    """Generates a data set of colored shapes in `folder`, in Kaggle's layout with split lists.

    No two scenes have the same set of (size, color, shape, position), so that no test scene is in
    the training split. Each image has five captions that name all of its shapes in random order.
    """
    rng = np.random.default_rng(0)
    scenes: dict[frozenset, Scene] = {}
    while len(scenes) < train + dev + test:
        scene = _sample_scene(rng)
        scenes[frozenset(tuple(shape.values()) for shape in scene)] = scene

    names = [f"{index:05d}.png" for index in range(len(scenes))]
    rows = [("image", "caption")]
    with _staging_dir(folder) as staging:
        (staging / "Images").mkdir()
        for name, scene in zip(progress(names, f"generating {folder}"), scenes.values()):
            _render_scene(scene, rng).save(staging / "Images" / name)
            for template, separator in CAPTION_TEMPLATES:
                phrases = rng.permutation([template.format(**shape) for shape in scene])
                rows.append((name, separator.join(phrases)))
        with (staging / "captions.txt").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        names_of_splits = (names[:train], names[train : train + dev], names[train + dev :])
        for split, listed in zip(SPLITS, names_of_splits):
            (staging / f"Flickr_8k.{split}Images.txt").write_text("\n".join(listed))


def _sample_scene(rng: np.random.Generator) -> Scene:
    """Two or three random shapes at different positions."""
    positions = rng.choice(list(POSITIONS), size=rng.integers(2, 4), replace=False)
    choices = {"size": list(SIZES), "color": list(COLORS), "shape": list(SHAPES)}
    scene = []
    for position in positions:
        shape = {kind: str(rng.choice(words)) for kind, words in choices.items()}
        scene.append({**shape, "position": str(position)})
    return scene


def _render_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (SCENE_SIDE, SCENE_SIDE), "#f5f5f0")
    for shape in scene:
        x, y = POSITIONS[shape["position"]] + rng.uniform(-4, 4, size=2)
        corners, rotation = SHAPES[shape["shape"]]
        circle = (x, y, SIZES[shape["size"]])
        fill = COLORS[shape["color"]]
        ImageDraw.Draw(image).regular_polygon(circle, corners, rotation, fill=fill)
    return image


# ---------------------------------------------------------------- images

# Pillow's raster formats. Documents, containers of other files, and formats for which Pillow starts
# programs, such as PostScript, are excluded. TGA has no signature and comes last.
IMAGE_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "MPO", "PPM", "PSD"),
    *("ICO", "ICNS", "CUR", "DIB", "DDS", "BLP", "DCX", "PCX", "FITS", "FLI", "FTEX", "GBR", "IM"),
    *("MSP", "PCD", "PIXAR", "QOI", "SGI", "SUN", "XBM", "XPM", "TGA"),
)
HEIF_SUFFIXES = {".heic", ".heics", ".heif", ".heifs", ".hif"}
HEIF_ADVICE = "HEIF images are read after: pip install pillow-heif"
SKIPPED_DIRS = {"@eadir", "__macosx", "thumbnails", "thumbs", "thumb", "$recycle.bin", "#recycle"}
# To be increased when `load_image` or `Transform` changes the pixels of some images.
DECODING = 3
END_OF_JPEG = b"\xff\xd9"
MAX_JPEG = 2**26  # bytes of a file that OpenCV decodes, which takes all of it into memory
MIN_REDUCED_SIDE = 256  # of a JPEG that is decoded smaller, so that Flickr8k's (500 px) never are
ImageSource = str | Path | Image.Image  # an image file, or an image of Pillow
# Pillow's operation that undoes each EXIF orientation from 2 to 8.
UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """All files below a folder, relative to it with "/" between names, and errors of folders.

    Links to folders are followed, but no folder is listed twice. Hidden folders, thumbnails and
    what systems keep beside images (`SKIPPED_DIRS`) are passed over.
    """
    files: list[str] = []
    errors: list[str] = []
    folders, links = [""], []  # folders before links, so that files get their own paths
    seen = set()
    while folders or links:
        parent = folders.pop() if folders else links.pop()
        path = os.path.join(folder, parent)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = parent + entry.name
                    if not _is_dir(entry):
                        files.append(name)
                    elif not entry.name.startswith(".") and entry.name.lower() not in SKIPPED_DIRS:
                        (links if entry.is_symlink() else folders).append(f"{name}/")
        except OSError as error:
            errors.append(f"{path}: {error.strerror}")
    return files, errors


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def is_image(name: str) -> bool:
    """Whether a file is named like an image that can be read here and is not hidden."""
    base = name.rpartition("/")[2]
    stem, _, suffix = base.rpartition(".")
    return (
        stem != "" and not stem.startswith(".") and f".{suffix.lower()}" in _readable_formats()[1]
    )


def list_images(folder: Path) -> list[Path]:
    """All images below a folder (see `list_files`), sorted. Prints what is left out."""
    if not folder.is_dir():
        return []
    names, errors = list_files(folder)
    others = Counter()
    for name in names:
        base = name.rpartition("/")[2]
        if not is_image(base) and not base.startswith("."):
            others[posixpath.splitext(base)[1].lower() or "without suffix"] += 1
    if others:
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(10))
        more = ", ..." if len(others) > 10 else ""
        heif = f" ({HEIF_ADVICE})" if HEIF_SUFFIXES & set(others) else ""
        print(f"images: left out {others.total():,} files: {printable(counts)}{more}{heif}")
    if errors:
        first = printable(errors[0])
        print(f"images: left out {len(errors):,} folders that cannot be read: {first}")
    return sorted(folder / name for name in names if is_image(name))


@functools.cache
def _readable_formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """The `IMAGE_FORMATS` that Pillow can open here, and the suffixes of their files."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # some hold long texts
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # else it writes to the screen
    extensions = Image.registered_extensions().items()  # loads all of Pillow's plugins
    suffixes = frozenset(suffix for suffix, name in extensions if name in IMAGE_FORMATS)
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN), suffixes


@contextmanager
def open_image(source: ImageSource) -> Iterator[Image.Image]:
    """Pillow's image with only its header read; an image of Pillow is returned unchanged.

    Raises `UserError` for what is no image and for any error of a decoder in the block.
    """
    if isinstance(source, Image.Image):
        yield source
        return
    path = Path(source)
    formats, _ = _readable_formats()
    try:
        if not path.is_file():  # opening a named pipe would block
            raise OSError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=formats) as image:
                yield image
    except Image.DecompressionBombError:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS:,}"
        raise UserError(f"{path}: has more than {limit} pixels; save it with fewer") from None
    except Exception as error:  # a damaged file makes a decoder raise anything
        reason = str(error) or type(error).__name__
        if path.suffix.lower() in HEIF_SUFFIXES - _readable_formats()[1]:
            reason = HEIF_ADVICE
        raise UserError(f"{path}: cannot be read as an image: {reason}") from None


def load_image(source: ImageSource, min_side: int = 0) -> np.ndarray:
    """The image as RGB, (H, W, 3) `uint8`: upright, transparency over white, 8 bits per channel.

    With `min_side`, the pixels that its shorter side is needed with, a large JPEG is decoded at
    1/2, 1/4 or 1/8 of its size, whichever is the smallest that leaves twice that side.

    Raises `UserError` for a file that cannot be read as an image.
    """
    with open_image(source) as image:
        full_size = image.size
        if min_side and image is not source:  # whose size it would change
            side = max(2 * min_side, MIN_REDUCED_SIDE)
            image.draft(None, (side, side))  # of JPEG files; does nothing to others
        # Not ImageOps.exif_transpose, which fails if another part of the EXIF block is damaged.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        is_plain = image.mode == "RGB" and orientation not in UNDO_ORIENTATION
        if is_plain and image.format == "JPEG" and image.size == full_size and image is not source:
            pixels = _decode_jpeg(source)
            if pixels is not None:
                return pixels
        if orientation in UNDO_ORIENTATION:
            image = image.transpose(UNDO_ORIENTATION[orientation])
        if image.mode.startswith(("I", "F")):  # Pillow's conversion would clip to white
            image = Image.fromarray(_scale_to_uint8(np.asarray(image)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


def _decode_jpeg(path: str | Path) -> np.ndarray | None:
    """The pixels (H, W, 3) of an RGB JPEG, equal to Pillow's if it is not damaged, but faster.

    None for a file that is incomplete, very large or not readable by OpenCV, which writes
    libjpeg's warnings to the screen and has no switch for it.
    """
    with open(path, "rb") as file:
        num_bytes = file.seek(-len(END_OF_JPEG), os.SEEK_END)
        # Before version 4.11 OpenCV fills an incomplete image with gray.
        if num_bytes > MAX_JPEG or file.read() != END_OF_JPEG:
            return None
        file.seek(0)
        content = np.frombuffer(file.read(), np.uint8)
    cv2 = _opencv()
    pixels = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


@functools.cache
def _opencv() -> ModuleType:
    """OpenCV, imported when it is needed, and without threads.

    Its threads do not survive the fork of a DataLoader worker.
    """
    import cv2

    cv2.setNumThreads(0)
    return cv2


def _scale_to_uint8(values: np.ndarray) -> np.ndarray:
    """Gray values (H, W) of 16 bits, 32 bits or floats as `uint8`.

    Integers have a nominal range of 0 to 65535, floats of 0 to 1 or 0 to 255. Values that lie far
    outside of it, or all in its lowest sixteenth, such as 12 bits, are scaled by their own range.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    nominal = 65535.0 if values.dtype.kind in "iu" else 1.0 if high <= 1 else 255.0
    is_nominal = low >= -nominal and nominal / 16 < high <= 2 * nominal
    if is_nominal or low == high:
        low, high = 0.0, nominal
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return ((values - low) / ((high - low) / 255)).clip(0, 255).astype(np.uint8)


class Transform:
    """Resizes images (H, W, 3) `uint8` to the encoder's input (S, S, 3) `uint8`.

    Calling it takes the center square, for evaluation. `augment` takes a random crop of a random
    square, flips it and jitters its colors, for training.
    """

    def __init__(self, size: int) -> None:
        # Imported here because a search over images that are in the index does not need it.
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the network for a newer version
        import albumentations as A

        self.size = size
        area, ratio = 0.35, 1.25  # of the smallest crop and of the longest one
        self.crop = A.RandomResizedCrop((size, size), scale=(area, 1.0), ratio=(1 / ratio, ratio))
        self.jitter = A.ColorJitter(
            brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.7, 1.3), hue=(0, 0), p=0.8
        )
        self.flip = partial(_opencv().flip, flipCode=1)  # horizontal
        # The `min_side` of the images, for `load_image`.
        self.min_side = size
        self.augment_min_side = math.ceil(size / math.sqrt(area / ratio))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return _resize(_square_crop(pixels, 0.5), self.size)

    def augment(self, pixels: np.ndarray, caption: str, rng: np.random.Generator) -> np.ndarray:
        """A random view of the image, determined by `rng`.

        It is not flipped if the (English) caption mentions left or right.
        """
        # Albumentations has generators of its own, of which each worker has a copy: seed them.
        seed = int(rng.integers(2**31))
        self.crop.set_random_seed(seed)
        self.jitter.set_random_seed(seed)
        mentions_side = re.search(r"\b(left|right)(most|hand|wards?)?\b", caption, re.IGNORECASE)
        if rng.random() < 0.5 and not mentions_side:
            pixels = self.flip(pixels)
        pixels = _square_crop(pixels, position=rng.random())
        # Only the position of the crop is Albumentations', which has no such resizing as `_resize`.
        sampled = self.crop.get_params_dependent_on_data({"shape": pixels.shape}, {})
        left, top, right, bottom = sampled["crop_coords"]
        pixels = _resize(pixels[top:bottom, left:right], self.size)
        return self.jitter(image=pixels)["image"]


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) `uint8` as (size, size, 3).

    Of an image of twice the size or more, whole numbers of pixels are averaged first, which avoids
    aliasing. Below that, interpolation is as good and much faster (tests/benchmarks/README.md).
    """
    cv2 = _opencv()
    height, width = pixels.shape[:2]
    factor = min(height, width) // size
    if factor > 1:
        pixels = pixels[: height - height % factor, : width - width % factor]
        smaller = (width // factor, height // factor)
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)


def _square_crop(pixels: np.ndarray, position: float) -> np.ndarray:
    """The largest square of (H, W, 3) at a position from 0 (top or left) to 1 (bottom or right)."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top = int(position * (height - side))
    left = int(position * (width - side))
    return pixels[top : top + side, left : left + side]


# ---------------------------------------------------------------- training batches


class ImageCaptionDataset(Dataset):
    """One item per image: {"pixels": (S, S, 3) `uint8`, "caption": str}.

    The caption is one of the image's own, sampled anew in each epoch. An index counts on over the
    epochs: `epoch * len(dataset) + i` is image i in that epoch. Caption and augmentation are a
    function of (seed, epoch, i) alone: the same with any number of workers and after a resume.
    """

    def __init__(self, split: Split, config: Config) -> None:
        self.split = split
        self.seed = config.seed
        self.augment = config.augment
        self.transform = Transform(config.image_size)

    def __len__(self) -> int:
        return len(self.split.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, i = divmod(index, len(self))
        rng = np.random.default_rng((self.seed, epoch, i))
        captions = self.split.captions[i]
        caption = captions[rng.integers(len(captions))]
        path = self.split.paths[i]
        if self.augment:
            pixels = load_image(path, self.transform.augment_min_side)
            pixels = self.transform.augment(pixels, caption, rng)
        else:
            pixels = self.transform(load_image(path, self.transform.min_side))
        return {"pixels": pixels, "caption": caption}


class EpochBatchSampler(Sampler):
    """Batches of indices of an `ImageCaptionDataset`, of all `epochs` one after the other.

    One iterator then serves all epochs, and DataLoader workers do not wait between two. The order
    depends on (seed, epoch). With several processes each takes its own part of every batch. The
    last incomplete batch of an epoch is dropped.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        epochs: range,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.epochs = epochs
        self.rank = rank
        self.local_batch_size = batch_size // world_size
        self.steps_per_epoch = num_images // batch_size

    def __len__(self) -> int:
        return len(self.epochs) * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in self.epochs:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
            indices = (epoch * self.num_images + order).tolist()
            for step in range(self.steps_per_epoch):
                start = step * self.batch_size + self.rank * self.local_batch_size
                yield indices[start : start + self.local_batch_size]


def stack_images(images: Iterable[np.ndarray]) -> Tensor:
    """Images (S, S, 3) as one batch (B, 3, S, S), `uint8`, in channels-last memory format."""
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, T) `int64`; T is the length of the longest of these texts."""
    encodings = tokenizer.encode_batch(texts)
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    return ids, mask


def collate(items: list[dict[str, Any]], tokenizer: Tokenizer, bucket_size: int) -> dict[str, Any]:
    """Items of `ImageCaptionDataset` as a batch.

    {"pixels": (B, 3, S, S), "texts": [(ids, mask), ...], "caption_ids": (B,)}. The pairs are sorted
    by caption length, and each bucket of captions is padded to its own longest caption: padding the
    whole batch to one length would make half of its tokens padding. The loss does not depend on the
    order of the pairs. Equal captions, and no others, have equal ids.
    """
    items = sorted(items, key=lambda item: len(item["caption"]))
    captions = [item["caption"] for item in items]
    texts = []
    for start in range(0, len(captions), bucket_size):
        texts.append(tokenize(tokenizer, captions[start : start + bucket_size]))
    return {
        "pixels": stack_images(item["pixels"] for item in items),
        "texts": texts,
        "caption_ids": torch.tensor([_caption_id(caption) for caption in captions]),
    }


def _caption_id(caption: str) -> int:
    """64 bits of the caption's hash."""
    return int.from_bytes(_hash(caption)[:8], "little", signed=True)


@functools.cache  # its line is printed once for equal loaders
def limit_workers(num_workers: int, batch_bytes: int) -> int:
    """The number of DataLoader workers, or fewer whose batches fit into the free shared memory.

    A container often has 64 MB of it, and workers that find it full block forever.
    """
    if num_workers == 0 or not SHARED_MEMORY.is_dir():
        return num_workers
    is_writable = os.access(SHARED_MEMORY, os.W_OK)
    free = shutil.disk_usage(SHARED_MEMORY).free if is_writable else 0
    # Half is left to other loaders: that of training keeps its batches during validation.
    num_batches = free // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // batch_bytes
    max_workers = max(0, num_batches // 2 - 1)  # each prefetches 2 batches, and 2 are in use
    if max_workers >= num_workers:
        return num_workers
    print(
        f"{SHARED_MEMORY} has {free / 2**20:,.0f} MB free: {max_workers} DataLoader workers "
        f"instead of {num_workers} (docker run --shm-size=8g gives it more)"
    )
    return max_workers


def _workers_for_gpu() -> int:
    """One for each core that this process may use, beside the others that torchrun started."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # fewer in a Slurm job or a container's CPU set
    cores_per_process = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(4, min(cores_per_process, 16))


def build_loader(
    dataset: Dataset,
    num_workers: int,
    device: torch.device,
    collate_fn: Callable,
    batch_bytes: int,
    keep_workers: bool = False,
    **options: Any,
) -> DataLoader:
    """A `DataLoader` for batches on `device`. With `num_workers` -1 it chooses the number.

    `batch_bytes`, the size of a batch, limits the number of workers. With `keep_workers` they wait
    for the loader's next use; else they end with its iterator. The loader has a generator of its
    own, so that it does not change torch's, which dropout samples from.
    """
    if num_workers < 0:
        num_workers = 4 if device.type == "cpu" else _workers_for_gpu()
    num_workers = limit_workers(num_workers, batch_bytes)
    # With a timeout torch does not notice on Windows that a worker has died.
    timeout = LOADER_TIMEOUT if num_workers and os.name != "nt" else 0
    # More workers than cores do no harm here.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=device.type == "cuda",
        persistent_workers=keep_workers and num_workers > 0,
        timeout=timeout,
        generator=torch.Generator(),
        **options,
    )


def build_train_loader(
    split: Split,
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    start_epoch: int = 0,
) -> DataLoader:
    """The training batches of one process, of all epochs from `start_epoch` on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns of each forked worker
    epochs = range(start_epoch, config.epochs)
    sampler = EpochBatchSampler(
        len(split.paths), config.batch_size, config.seed, epochs, rank=rank, world_size=world_size
    )
    bucket_size = sampler.local_batch_size
    if device.type == "cpu":  # a GPU loses more time on more kernels than on padding
        bucket_size = math.ceil(bucket_size / TEXT_BUCKETS)
    if config.chunk_size:
        bucket_size = min(bucket_size, config.chunk_size)
    collate_fn = partial(collate, tokenizer=tokenizer, bucket_size=bucket_size)
    dataset = ImageCaptionDataset(split, config)
    # Pixels, and token ids with their mask.
    batch_bytes = sampler.local_batch_size * (3 * config.image_size**2 + 16 * config.max_length)
    return build_loader(
        dataset, config.num_workers, device, collate_fn, batch_bytes, batch_sampler=sampler
    )


# ---------------------------------------------------------------- files


def leads_outside(path: str) -> bool:
    """Whether a path may lead out of the current folder, or to another machine."""
    return Path(path).anchor != "" or ".." in Path(path).parts


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files of `atomic_write` whose process was killed on this machine."""
    for path in _leftovers(folder):
        with suppress(OSError):  # such as a folder of that name
            path.unlink()


def _temporary(path: Path) -> Path:
    """A name beside `path`, unique among the processes of all machines that share its folder."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")


def _leftovers(folder: Path) -> list[Path]:
    """The `_temporary` files and folders of processes of this machine that have ended."""
    leftovers = []
    for path in folder.glob("*.tmp"):
        named = re.fullmatch(rf".+\.{re.escape(platform.node())}\.([0-9]+)\.tmp", path.name)
        if named and not _is_running(int(named[1])):
            leftovers.append(path)
    return leftovers


def _is_running(pid: int) -> bool:
    if os.name == "nt":
        return True  # os.kill would send a signal there
    try:
        os.kill(pid, 0)  # sends no signal
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path` by what `write` writes, in one step.

    At no time is the file missing or incomplete, even if the process is killed. Raises `UserError`
    if it cannot be written; the former content is then unchanged.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        context = error.__context__  # torch.save wraps the error that it meets
        for cause in (error, context):
            if isinstance(cause, KeyboardInterrupt) or WORKER in str(cause):  # not about this file
                raise cause from None
        reason = getattr(context or error, "strerror", None) or error
        raise UserError(f"{path}: could not be written, content unchanged: {reason}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
