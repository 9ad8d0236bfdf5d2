"""Pictures with captions: found, checked, split, fetched or drawn, and made into batches.

from data import read_splits
splits = read_splits("data/flickr8k")  # splits["train"].captions[0] are those of splits["train"].paths[0]
"""

import csv
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset, Sampler

from config import WORKER, Config, UserError, progress

SPLITS = ("train", "dev", "test")
ARCHIVES = ("Flickr8k_Dataset.zip", "Flickr8k_text.zip")
TEXT_BUCKETS = 4  # of a batch's captions on the CPU, each padded to its own longest; a GPU would wait for its kernels
UPRIGHT = (
    "FLIP_LEFT_RIGHT",
    "ROTATE_180",
    "FLIP_TOP_BOTTOM",
    "TRANSPOSE",
    "ROTATE_270",
    "TRANSVERSE",
    "ROTATE_90",
)
Row = tuple[
    str, str, str
]  # of a caption file: where it stands there, the picture's name, the caption


@dataclass(frozen=True)
class Split:
    """Pictures, each once, with all their captions: `captions[i]` are those of `paths[i]`."""

    paths: list[Path]
    captions: list[list[str]]

    @property
    def texts(self) -> list[str]:
        return [caption for captions in self.captions for caption in captions]


def read_splits(data_dir: str | Path) -> dict[str, Split]:
    """Reads the pictures and captions of a folder, and says what it counted and left out.

    Either layout will do: the archives' (`Flicker8k_Dataset/`, `Flickr8k.token.txt`, the text files beside the folder
    or in `Flickr8k_text/`) or Kaggle's (`Images/`, `captions.txt`). The lists `Flickr_8k.{train,dev,test}Images.txt`
    are used in both; without them a tenth of the pictures each, 1,000 at most, is held out for dev and test.

    Raises `UserError`, naming file and row, for what cannot be read, a picture in two splits, an empty split, and more
    than 1 % of the captions without their picture.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
    pictures, captions_file, rows = _find_layout(folder)
    captions = _captions_by_picture(rows, pictures, captions_file)
    lists = _read_split_lists(captions_file.parent) or _hash_split(sorted(captions))
    unlisted = captions.keys() - set().union(*lists.values())
    wordless = {
        path.relative_to(pictures).as_posix() for path in list_images(pictures)
    } - captions.keys()
    if unlisted or wordless:
        print(
            f"data: left out {len(unlisted)} pictures in no split list and {len(wordless)} without a caption"
        )
    splits = {}
    for split, listed in lists.items():
        if not (names := sorted(listed & captions.keys())):
            raise UserError(
                f"{folder}: the {split} split is empty; its pictures were looked for in {pictures}"
            )
        splits[split] = Split(
            [pictures / name for name in names], [captions[name] for name in names]
        )
    sizes = ", ".join(f"{split} {len(part.paths):,}" for split, part in splits.items())
    print(
        f"data: {folder}, {len(captions):,} pictures, {sum(map(len, captions.values())):,} captions; {sizes}"
    )
    return splits


def _captions_by_picture(
    rows: Iterable[Row], pictures: Path, captions_file: Path
) -> dict[str, list[str]]:
    """The captions of each picture that exists; Flickr8k itself has five of a picture that it lacks."""
    captions: dict[str, list[str]] = {}
    for where, name, caption in rows:
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{where}: picture {name!r} is not the name of a file inside {pictures}"
            )
        if caption := " ".join(caption.split()):
            captions.setdefault(Path(name).as_posix(), []).append(caption)
    total = sum(map(len, captions.values()))
    lost = {
        name: captions.pop(name) for name in list(captions) if not os.path.lexists(pictures / name)
    }
    if lost:
        count = sum(map(len, lost.values()))
        message = f"{captions_file}: {count:,} of {total:,} captions have no picture in {pictures}: {next(iter(lost))}"
        if count > 0.01 * total:
            raise UserError(f"{message}, ...; at most 1 % may be")
        print(f"data: left out, {message}")
    return captions


def _find_layout(folder: Path) -> tuple[Path, Path, Iterator[Row]]:
    """The folder of pictures, the file of captions, and its rows."""
    for text_folder in (folder, folder / "Flickr8k_text"):
        tokens = text_folder / "Flickr8k.token.txt"
        if tokens.is_file() and (folder / "Flicker8k_Dataset").is_dir():
            return folder / "Flicker8k_Dataset", tokens, _read_token_file(tokens)
    if (table := folder / "captions.txt").is_file() and (folder / "Images").is_dir():
        return folder / "Images", table, _read_csv(table)
    raise UserError(
        f"{folder}: found neither Flicker8k_Dataset/ with Flickr8k.token.txt nor Images/ with captions.txt"
    )


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        row = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, row {row}: not UTF-8; save the file as UTF-8") from None


def _read_token_file(path: Path) -> Iterator[Row]:
    """`name.jpg#0<TAB>caption`, the layout of Flickr8k's own archives."""
    for row, line in enumerate(_read_text(path).split("\n"), start=1):
        name, tab, caption = line.partition("\t")
        if tab:
            yield f"{path}, row {row}", name.rpartition("#")[0].strip() or name.strip(), caption
        elif line.strip():
            raise UserError(f"{path}, row {row}: no tab between the picture and its caption")


def _read_csv(path: Path) -> Iterator[Row]:
    """CSV with the columns `image` and `caption`. Read as text alone: "None" and "NA" are captions."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        columns = [column.strip().lower() for column in next(reader, [])]
        if not {"image", "caption"} <= set(columns):
            raise csv.Error(f"columns {columns}, but 'image' and 'caption' are needed")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise csv.Error(
                    f"{len(cells)} cells under {len(columns)} columns; quote captions that hold commas"
                )
            row = dict(zip(columns, cells))
            yield f"{path}, row {reader.line_num}", row["image"].strip(), row["caption"]
    except csv.Error as error:
        raise UserError(f"{path}, row {max(1, reader.line_num)}: {error}") from None


def _read_split_lists(folder: Path) -> dict[str, set[str]]:
    """The names in `Flickr_8k.{train,dev,test}Images.txt`; empty where there is none of the three."""
    files = {split: folder / f"Flickr_8k.{split}Images.txt" for split in SPLITS}
    if not any(file.exists() for file in files.values()):
        return {}
    lines = {split: _read_text(file).splitlines() for split, file in files.items()}
    names = {
        split: {Path(line.strip()).as_posix() for line in lines[split] if line.strip()}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        if both := names[one] & names[other]:
            raise UserError(f"{files[other]}: {min(both)} is in the {one} split too")
    return names


def _hash_split(names: list[str]) -> dict[str, set[str]]:
    """Splits by picture, so that no test picture is trained on with another of its captions."""
    held = min(len(names) // 10, 1000)  # Flickr8k holds out as many
    print(
        f"data: no split lists; by their names {held} pictures are held out for dev and {held} for test"
    )
    order = sorted(
        names, key=lambda name: hashlib.sha256(name.encode()).digest()
    )  # more pictures move few
    return {
        "train": set(order[2 * held :]),
        "dev": set(order[:held]),
        "test": set(order[held : 2 * held]),
    }


def download_flickr8k(folder: Path, base_url: str) -> None:
    """Downloads and unpacks both archives; `folder` appears at once, when everything in it is sound."""
    print(f"data: {folder} is absent; fetching Flickr8k (1.1 GB, for non-commercial research only)")
    unpacked = _staging_dir(folder)
    for name in ARCHIVES:
        url, archive = f"{base_url.rstrip('/')}/{name}", unpacked / name
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                length = response.headers["Content-Length"]
            torch.hub.download_url_to_file(url, str(archive))
            if length and (came := archive.stat().st_size) != int(length):
                raise OSError(f"only {came:,} of {int(length):,} bytes came")
            with zipfile.ZipFile(archive) as members:
                if damaged := members.testzip():
                    raise OSError(f"{damaged} in it is damaged")
                if any(
                    ".." in Path(member).parts or Path(member).is_absolute()
                    for member in members.namelist()
                ):
                    raise OSError("a member of it climbs out of its folder")
                members.extractall(unpacked)
        except (
            Exception
        ) as error:  # whatever a wrong address, a broken transfer or a damaged archive brings about
            by_hand = f"unpack {' and '.join(ARCHIVES)} into {folder}, give another --data-dir, or try --demo"
            raise UserError(f"{url}: {error}. Run it again, or {by_hand}") from None
        archive.unlink()
    unpacked.rename(folder)


def _staging_dir(folder: Path) -> Path:
    """An empty folder to fill and then rename, so that a half-filled one is never taken for whole."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


SIZES = {"small": 10, "large": 20}  # radius in pixels of 128
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
}  # corners, and turned by
PLACES = {
    "top left": (26, 26),
    "top right": (102, 26),
    "centre": (64, 64),
}  # of the middle, in pixels of 128
PLACES |= {"bottom left": (26, 102), "bottom right": (102, 102)}
CAPTION_TEMPLATES = (  # of one shape, and what joins several
    ("a {size} {color} {shape} at the {place}", " and "),
    ("{place}: {size} {color} {shape}", "; "),
    ("the {place} holds a {size} {shape} in {color}", " and "),
    ("one {color} {shape}, {size}, in the {place}", ", with "),
    (
        "there is a {color} {shape} at the {place}",
        ", and ",
    ),  # as people ask, who seldom say the size
)


def generate_shapes(folder: Path, train: int = 5000, dev: int = 200, test: int = 200) -> None:
    """Draws scenes of two or three coloured shapes into `folder`, in Kaggle's layout with split lists.

    A scene is its set of (size, color, shape, place); no two are equal. Each has five captions that name all of its
    shapes in other words and another order.
    """
    drawing = _staging_dir(folder)
    (drawing / "Images").mkdir()
    rng = np.random.default_rng(0)
    scenes: dict[frozenset, list[dict[str, str]]] = {}
    while len(scenes) < train + dev + test:
        scene = _sample_scene(rng)
        scenes[frozenset(tuple(thing.values()) for thing in scene)] = scene
    names, rows = [f"{i:05d}.png" for i in range(len(scenes))], [("image", "caption")]
    for name, scene in zip(progress(names, f"drawing {folder}"), scenes.values()):
        _render_scene(scene, rng).save(drawing / "Images" / name)
        for words, joint in CAPTION_TEMPLATES:
            rows.append(
                (name, joint.join(rng.permutation([words.format(**thing) for thing in scene])))
            )
    with (drawing / "captions.txt").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    for split, part in zip(
        SPLITS, (names[:train], names[train : train + dev], names[train + dev :])
    ):
        (drawing / f"Flickr_8k.{split}Images.txt").write_text("\n".join(part))
    drawing.rename(folder)


def _sample_scene(rng: np.random.Generator) -> list[dict[str, str]]:
    kinds = {"size": list(SIZES), "color": list(COLORS), "shape": list(SHAPES)}
    places = rng.choice(list(PLACES), size=rng.integers(2, 4), replace=False)
    return [
        {kind: str(rng.choice(words)) for kind, words in kinds.items()} | {"place": str(at)}
        for at in places
    ]


def _render_scene(scene: list[dict[str, str]], rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (128, 128), "#f5f5f0")
    for thing in scene:
        x, y = PLACES[thing["place"]] + rng.uniform(-4, 4, size=2)
        circle, (corners, turn) = (x, y, SIZES[thing["size"]]), SHAPES[thing["shape"]]
        ImageDraw.Draw(picture).regular_polygon(circle, corners, turn, fill=COLORS[thing["color"]])
    return picture


def list_images(folder: Path) -> list[Path]:
    """Every file under `folder` that is named like a picture, sorted."""
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Pillow's picture, of which only the header is read yet; what Pillow cannot read becomes a `UserError`."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("it is not a file")
        with Image.open(path) as picture:
            yield picture
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture: {error}") from None


def load_image(path: Path) -> np.ndarray:
    """The picture as (H, W, 3) `uint8`: upright, alpha over white, 16 bits scaled to 8; raises as `open_image`."""
    with open_image(path) as picture:
        orientation = picture.getexif().get(
            ExifTags.Base.Orientation
        )  # 1: upright; UPRIGHT undoes 2 to 8
        if orientation in range(
            2, 9
        ):  # not Pillow's exif_transpose, which fails where the rest of the EXIF is damaged
            picture = picture.transpose(Image.Transpose[UPRIGHT[orientation - 2]])
        if picture.mode.startswith(
            "I"
        ):  # 16 bits, which Pillow's own conversion would clip to white
            picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.array(picture.convert("RGB"))


class Transform:
    """Pictures (H, W, 3) at the encoder's size (S, S, 3), `uint8`. To evaluate, the middle square is taken; to train,
    `draw` decides square, crop, brightness, contrast, saturation, and a mirror image where the caption allows it."""

    def __init__(self, size: int) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = (
            "1"  # or it asks the network for its newest version
        )
        import albumentations as A  # here, as a search over pictures that are already embedded needs none of it
        import cv2

        cv2.setNumThreads(0)  # its threads would not survive the fork into a loader worker
        self.resize = A.Resize(
            size, size, area_for_downscale="image"
        )  # averages to shrink, lest patterns alias
        crop = A.RandomResizedCrop(
            (size, size), (0.35, 1.0), ratio=(0.8, 1.25), area_for_downscale="image"
        )
        jitter = A.ColorJitter(
            brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.7, 1.3), hue=(0, 0), p=0.8
        )
        self.augmentation = A.Compose([crop, jitter])

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return self.resize(image=_square_crop(pixels, 0.5))["image"]

    def augment(self, pixels: np.ndarray, caption: str, rng: np.random.Generator) -> np.ndarray:
        # Compose draws from a generator of its own, of which every loader worker has a copy: seed it each time.
        self.augmentation.set_random_seed(int(rng.integers(2**31)))
        if rng.random() < 0.5 and not re.search(r"\b(left|right)\b", caption, re.IGNORECASE):
            pixels = pixels[:, ::-1]
        return self.augmentation(image=np.ascontiguousarray(_square_crop(pixels, rng.random())))[
            "image"
        ]


def _square_crop(pixels: np.ndarray, place: float) -> np.ndarray:
    """The largest square of (H, W, 3), at a place from 0 (top or left) to 1, so that all pictures shrink alike."""
    side = min(pixels.shape[:2])
    top, left = (int(place * (length - side)) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


class ImageCaptionDataset(Dataset):
    """An item per picture: its pixels (S, S, 3) `uint8`, and one of its captions, drawn anew each epoch.

    Every draw is a function of (seed, epoch, picture) alone: the same with any number of workers and after a resume.
    """

    def __init__(self, split: Split, config: Config) -> None:
        self.split, self.seed, self.augment = split, config.seed, config.augment
        self.transform = Transform(config.image_size)

    def __getitem__(self, epoch_and_picture: tuple[int, int]) -> tuple[np.ndarray, str]:
        epoch, picture = epoch_and_picture
        rng = np.random.default_rng((self.seed, epoch, picture))
        captions = self.split.captions[picture]
        caption = captions[rng.integers(len(captions))]
        pixels = load_image(self.split.paths[picture])
        return self.transform.augment(pixels, caption, rng) if self.augment else self.transform(
            pixels
        ), caption


class EpochBatchSampler(Sampler):
    """Of each batch one process's `rows`, as (epoch, picture), in an order drawn from seed and epoch; the last short
    batch is dropped. The epoch goes along since workers that are kept alive never see a changed attribute."""

    def __init__(self, num_images: int, batch_size: int, seed: int, rows: slice) -> None:
        self.num_images, self.batch_size, self.seed, self.rows, self.epoch = (
            num_images,
            batch_size,
            seed,
            rows,
            0,
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        for batch in order[: len(self) * self.batch_size].reshape(-1, self.batch_size).tolist():
            yield [(self.epoch, picture) for picture in batch[self.rows]]


def stack(pictures: Iterable[np.ndarray]) -> torch.Tensor:
    """Pictures (S, S, 3) as one batch (B, 3, S, S), `uint8`, in channels-last memory."""
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2)


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (B, T) `int64`; T is the length of the longest of these texts."""
    encodings = tokenizer.encode_batch(texts)
    return torch.tensor([e.ids for e in encodings]), torch.tensor(
        [e.attention_mask for e in encodings]
    )


def collate(
    items: list[tuple[np.ndarray, str]], tokenizer: Tokenizer, group_size: int
) -> tuple[torch.Tensor, list]:
    """Items of `ImageCaptionDataset` to one batch: pixels, and token ids and mask of each group of captions.

    The pairs come by the length of their captions, and a group is padded to its own longest: of a batch padded as a
    whole half would be padding. The loss does not depend on the order of pairs.
    """
    pictures, captions = zip(*sorted(items, key=lambda item: len(item[1])))
    starts = range(0, len(items), group_size)
    return stack(pictures), [
        tokenize(tokenizer, list(captions[start : start + group_size])) for start in starts
    ]


def build_loader(
    dataset: Dataset, workers: int, device: torch.device, collate_fn: Callable, **options: Any
) -> DataLoader:
    """A `DataLoader` that leaves torch's own generator alone, which dropout draws from; for -1 see `NUM_WORKERS`."""
    if workers < 0:
        cores = os.cpu_count() // int(
            os.environ.get("LOCAL_WORLD_SIZE", 1)
        )  # of each of torchrun's processes
        workers = 4 if device.type == "cpu" else max(4, min(cores, 16))
    warnings.filterwarnings(
        "ignore", "This DataLoader will create"
    )  # more workers than cores do no harm here
    options |= {
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "generator": torch.Generator(),
    }
    return DataLoader(dataset, num_workers=workers, collate_fn=collate_fn, **options)


def build_train_loader(
    split: Split,
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device,
    rows: slice = slice(None),
) -> DataLoader:
    """Batches for one epoch after another, or of each batch the `rows`; set `batch_sampler.epoch` before each."""
    own = len(range(config.batch_size)[rows])  # pairs of a batch
    group_size = min(
        math.ceil(own / TEXT_BUCKETS) if device.type == "cpu" else own, config.chunk_size or own
    )
    make_batch = partial(collate, tokenizer=tokenizer, group_size=group_size)
    batches = EpochBatchSampler(len(split.paths), config.batch_size, config.seed, rows)
    return build_loader(
        ImageCaptionDataset(split, config),
        config.num_workers,
        device,
        make_batch,
        batch_sampler=batches,
    )


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path` at once: at no instant is it missing or half-written, even if the process is killed."""
    beside = path.with_name(
        f"{path.name}.{os.getpid()}.tmp"
    )  # two processes may build the same index
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # torch wraps what it meets
        if isinstance(cause, KeyboardInterrupt) or WORKER in str(
            cause
        ):  # neither is about the file
            raise cause from None
        reason = getattr(cause, "strerror", None) or error
        raise UserError(f"{path}: could not be written, what was there stands: {reason}") from None
    finally:
        with suppress(OSError):
            beside.unlink()
