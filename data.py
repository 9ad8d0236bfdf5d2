"""Data sets of images with captions: reading, splitting, downloading, and batches for training.

from data import read_splits
splits = read_splits("data/flickr8k")
splits["train"].captions[0]  # all captions of the image splits["train"].paths[0]
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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from config import DEMO_DEFAULTS, WORKER, Config, UserError, progress

SPLITS = ("train", "dev", "test")
ARCHIVES = ("Flickr8k_Dataset.zip", "Flickr8k_text.zip")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_MISSING = 0.01  # fraction of the captions whose image may be missing
TEXT_BUCKETS = 4  # on the CPU a batch's captions are padded in this number of groups


# ---------------------------------------------------------------- splits


@dataclass(frozen=True)
class Split:
    """Images, each once, with all their captions: `captions[i]` belong to `paths[i]`."""

    paths: list[Path]
    captions: list[list[str]]

    @property
    def texts(self) -> list[str]:
        """All captions in the order of the images."""
        return list(itertools.chain.from_iterable(self.captions))


@dataclass(frozen=True)
class CaptionRow:
    """One row of a caption file."""

    source: str  # file and row, for error messages
    image: str  # name relative to the image folder
    caption: str


def read_splits(data_dir: str | Path) -> dict[str, Split]:
    """Reads the images and captions of a folder, and prints what was read and what was left out.

    Supported are the layout of Flickr8k's archives (`Flicker8k_Dataset/`, `Flickr8k.token.txt`,
    with the text files in the folder or in `Flickr8k_text/`) and Kaggle's (`Images/`,
    `captions.txt`). The lists `Flickr_8k.{train,dev,test}Images.txt` define the splits in both.
    Without them a tenth of the images, at most 1,000, is held out for dev, and as many for test.

    Returns the splits "train", "dev" and "test". Raises `UserError` with file and row for what
    cannot be read, an image in two splits, an empty split, and more than 1 % of the captions
    without their image.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
    image_dir, captions_file, rows = _find_layout(folder)
    captions = _captions_by_image(rows, image_dir, captions_file)
    lists = _read_split_lists(captions_file.parent) or _hash_split(sorted(captions))

    # Say what is left out.
    unlisted = captions.keys() - set().union(*lists.values())
    files = {path.relative_to(image_dir).as_posix() for path in list_images(image_dir)}
    uncaptioned = files - captions.keys()
    if unlisted or uncaptioned:
        print(
            f"data: left out {len(unlisted)} images in no split list "
            f"and {len(uncaptioned)} without a caption"
        )

    # Build the splits, sorted by name.
    splits = {}
    for split, listed in lists.items():
        names = sorted(listed & captions.keys())
        if not names:
            raise UserError(f"{folder}: the {split} split has no image in {image_dir}")
        paths = [image_dir / name for name in names]
        splits[split] = Split(paths, [captions[name] for name in names])
    sizes = ", ".join(f"{split} {len(part.paths):,}" for split, part in splits.items())
    num_captions = sum(len(texts) for texts in captions.values())
    print(f"data: {folder}, {len(captions):,} images, {num_captions:,} captions; {sizes}")
    return splits


def _find_layout(folder: Path) -> tuple[Path, Path, Iterator[CaptionRow]]:
    """The folder of images, the caption file, and its rows."""
    image_dir = folder / "Flicker8k_Dataset"
    for text_dir in (folder, folder / "Flickr8k_text"):
        token_file = text_dir / "Flickr8k.token.txt"
        if token_file.is_file() and image_dir.is_dir():
            return image_dir, token_file, _read_token_file(token_file)
    table = folder / "captions.txt"
    if table.is_file() and (folder / "Images").is_dir():
        return folder / "Images", table, _read_csv(table)
    raise UserError(
        f"{folder}: contains neither Flicker8k_Dataset/ with Flickr8k.token.txt "
        "nor Images/ with captions.txt"
    )


def _captions_by_image(
    rows: Iterable[CaptionRow], image_dir: Path, captions_file: Path
) -> dict[str, list[str]]:
    """The captions of each image that exists, by the image's name relative to `image_dir`.

    Flickr8k itself has five captions of an image that is not in its archive.
    """
    captions: dict[str, list[str]] = {}
    for row in rows:
        path = Path(row.image)
        if not row.image or path.is_absolute() or ".." in path.parts:
            raise UserError(f"{row.source}: {row.image!r} is not the name of a file in {image_dir}")
        caption = " ".join(row.caption.split())
        if caption:
            captions.setdefault(path.as_posix(), []).append(caption)

    num_captions = sum(len(texts) for texts in captions.values())
    missing = [name for name in captions if not os.path.lexists(image_dir / name)]
    if missing:
        num_missing = sum(len(captions.pop(name)) for name in missing)
        message = (
            f"{captions_file}: {num_missing:,} of {num_captions:,} captions have no image "
            f"in {image_dir}: {missing[0]}"
        )
        if num_missing > MAX_MISSING * num_captions:
            raise UserError(f"{message}, ...; at most {MAX_MISSING:.0%} may be missing")
        print(f"data: left out, {message}")
    return captions


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        row = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, row {row}: not UTF-8; save the file as UTF-8") from None


def _read_token_file(path: Path) -> Iterator[CaptionRow]:
    """Rows of `name.jpg#0<TAB>caption`, the format of Flickr8k's own archives."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        source = f"{path}, row {number}"
        name, tab, caption = line.partition("\t")
        if tab:
            image = name.rpartition("#")[0].strip() or name.strip()
            yield CaptionRow(source, image, caption)
        elif line.strip():
            raise UserError(f"{source}: no tab between the image and its caption")


def _read_csv(path: Path) -> Iterator[CaptionRow]:
    """Rows of a CSV file with the columns `image` and `caption`.

    Not pandas: all cells are text, so that "None", "NA" and "007" stay captions.
    """
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
                    f"{len(cells)} cells under {len(columns)} columns; "
                    "quote captions that contain commas"
                )
            row = dict(zip(columns, cells))
            yield CaptionRow(f"{path}, row {reader.line_num}", row["image"].strip(), row["caption"])
    except csv.Error as error:
        raise UserError(f"{path}, row {max(1, reader.line_num)}: {error}") from None


def _read_split_lists(folder: Path) -> dict[str, set[str]]:
    """The image names of each split's list file; empty if none of the three files exists."""
    files = {split: folder / f"Flickr_8k.{split}Images.txt" for split in SPLITS}
    if not any(file.exists() for file in files.values()):
        return {}
    names = {}
    for split, file in files.items():
        lines = (line.strip() for line in _read_text(file).splitlines())
        names[split] = {Path(line).as_posix() for line in lines if line}
    for one, other in itertools.combinations(SPLITS, 2):
        both = names[one] & names[other]
        if both:
            raise UserError(f"{files[other]}: {min(both)} is in the {one} split too")
    return names


def _hash_split(names: list[str]) -> dict[str, set[str]]:
    """Splits images by the hash of their names, so that adding images moves few others."""
    held_out = min(len(names) // 10, 1000)  # Flickr8k holds out 1,000
    print(
        f"data: no split lists; by the hash of their names "
        f"{held_out} images are held out for dev and {held_out} for test"
    )
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return {
        "train": set(order[2 * held_out :]),
        "dev": set(order[:held_out]),
        "test": set(order[held_out : 2 * held_out]),
    }


# ---------------------------------------------------------------- download


def check_data_dir(config: Config) -> None:
    """Raises `UserError` if the data folder is absent and `prepare_data_dir` cannot make it."""
    can_be_made = config.data_dir in (Config.data_dir, DEMO_DEFAULTS["data_dir"])
    if not can_be_made and not Path(config.data_dir).exists():
        raise UserError(f"--data-dir {config.data_dir}: no such folder")


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

    Raises `UserError` with the URL and the ways out for any failure.
    """
    print(f"data: {folder} is absent; downloading Flickr8k (1.1 GB, non-commercial research only)")
    staging = _staging_dir(folder)
    for name in ARCHIVES:
        url = f"{base_url.rstrip('/')}/{name}"
        try:
            _download_and_unpack(url, staging / name)
        except Exception as error:  # a wrong URL, a broken transfer or a damaged archive
            raise UserError(
                f"{url}: {error}. Run it again, or unpack {' and '.join(ARCHIVES)} into {folder}, "
                "or pass another --data-dir, or try --demo"
            ) from None
    staging.rename(folder)


def _download_and_unpack(url: str, archive: Path) -> None:
    """Unpacks the zip file at `url` beside `archive`, the path that it is downloaded to."""
    with urllib.request.urlopen(url, timeout=60) as response:
        expected_size = response.headers["Content-Length"]
    torch.hub.download_url_to_file(url, str(archive))
    size = archive.stat().st_size
    if expected_size and size != int(expected_size):
        raise OSError(f"only {size:,} of {int(expected_size):,} bytes arrived")
    with zipfile.ZipFile(archive) as members:
        damaged = members.testzip()
        if damaged:
            raise OSError(f"{damaged} in it is damaged")
        for member in members.namelist():
            if Path(member).is_absolute() or ".." in Path(member).parts:
                raise OSError(f"{member} in it is outside its folder")
        members.extractall(archive.parent)
    archive.unlink()


def _staging_dir(folder: Path) -> Path:
    """An empty folder to fill and then rename to `folder`, which is therefore never incomplete."""
    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


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
    staging = _staging_dir(folder)
    (staging / "Images").mkdir()
    rng = np.random.default_rng(0)
    scenes: dict[frozenset, Scene] = {}
    while len(scenes) < train + dev + test:
        scene = _sample_scene(rng)
        scenes[frozenset(tuple(shape.values()) for shape in scene)] = scene

    names = [f"{index:05d}.png" for index in range(len(scenes))]
    rows = [("image", "caption")]
    for name, scene in zip(progress(names, f"generating {folder}"), scenes.values()):
        _render_scene(scene, rng).save(staging / "Images" / name)
        for template, separator in CAPTION_TEMPLATES:
            parts = rng.permutation([template.format(**shape) for shape in scene])
            rows.append((name, separator.join(parts)))
    with (staging / "captions.txt").open("w", newline="") as file:
        csv.writer(file).writerows(rows)

    parts = (names[:train], names[train : train + dev], names[train + dev :])
    for split, part in zip(SPLITS, parts):
        (staging / f"Flickr_8k.{split}Images.txt").write_text("\n".join(part))
    staging.rename(folder)


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


def list_images(folder: Path) -> list[Path]:
    """All files in `folder` and its subfolders that are named like an image, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Pillow's image with only its header read. Raises `UserError` for what is no image."""
    try:
        if not path.is_file():  # opening a named pipe would block
            raise OSError("it is not a file")
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from None


def load_image(path: Path) -> np.ndarray:
    """The image as RGB, (H, W, 3) `uint8`: upright, transparency over white, 16 bits scaled to 8.

    Raises `UserError` for a file that cannot be read as an image.
    """
    with open_image(path) as image:
        # Not ImageOps.exif_transpose, which fails if another part of the EXIF block is damaged.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if orientation in UNDO_ORIENTATION:
            image = image.transpose(UNDO_ORIENTATION[orientation])
        if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would clip to white
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


class Transform:
    """Resizes images (H, W, 3) `uint8` to the encoder's input (S, S, 3) `uint8`.

    Calling it takes the center square, for evaluation. `augment` takes a random crop of a random
    square, flips it and jitters its colors, for training.
    """

    def __init__(self, size: int) -> None:
        # Imported here because a search over images that are in the index needs neither.
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the network for a newer version
        import albumentations as A
        import cv2

        cv2.setNumThreads(0)  # its threads do not survive the fork of a DataLoader worker
        # Area interpolation averages pixels when an image is made smaller, which avoids aliasing.
        self.resize = A.Resize(size, size, area_for_downscale="image")
        crop = A.RandomResizedCrop(
            (size, size), scale=(0.35, 1.0), ratio=(0.8, 1.25), area_for_downscale="image"
        )
        jitter = A.ColorJitter(
            brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.7, 1.3), hue=(0, 0), p=0.8
        )
        self.augmentation = A.Compose([crop, jitter])

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return self.resize(image=_square_crop(pixels, 0.5))["image"]

    def augment(self, pixels: np.ndarray, caption: str, rng: np.random.Generator) -> np.ndarray:
        """A random view of the image, determined by `rng`, for which `caption` stays true."""
        # Albumentations has a generator of its own, of which each worker has a copy: seed it.
        self.augmentation.set_random_seed(int(rng.integers(2**31)))
        mentions_side = re.search(r"\b(left|right)\b", caption, re.IGNORECASE)
        if rng.random() < 0.5 and not mentions_side:
            pixels = pixels[:, ::-1]  # horizontal flip
        pixels = _square_crop(pixels, position=rng.random())
        return self.augmentation(image=np.ascontiguousarray(pixels))["image"]


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
        pixels = load_image(self.split.paths[i])
        if self.augment:
            pixels = self.transform.augment(pixels, caption, rng)
        else:
            pixels = self.transform(pixels)
        return {"pixels": pixels, "caption": caption}


class EpochBatchSampler(Sampler):
    """Batches of indices of an `ImageCaptionDataset` in an order that depends on (seed, epoch).

    With several processes each takes its own part of every batch. The last incomplete batch of an
    epoch is dropped. Call `set_epoch` before each epoch. The epoch is part of the indices because
    workers that are kept alive do not see a changed attribute of the dataset.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.local_batch_size = batch_size // world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        indices = (self.epoch * self.num_images + order).tolist()
        for step in range(len(self)):
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
    """Items of `ImageCaptionDataset` as {"pixels": (B, 3, S, S), "texts": [(ids, mask), ...]}.

    The pairs are sorted by caption length, and each bucket of captions is padded to its own longest
    caption: padding the whole batch to one length would make half of its tokens padding. The loss
    does not depend on the order of the pairs.
    """
    items = sorted(items, key=lambda item: len(item["caption"]))
    captions = [item["caption"] for item in items]
    texts = []
    for start in range(0, len(captions), bucket_size):
        texts.append(tokenize(tokenizer, captions[start : start + bucket_size]))
    return {"pixels": stack_images(item["pixels"] for item in items), "texts": texts}


def build_loader(
    dataset: Dataset, num_workers: int, device: torch.device, collate_fn: Callable, **options: Any
) -> DataLoader:
    """A `DataLoader` for batches on `device`. With `num_workers` -1 it chooses the number.

    It has a generator of its own, so that it does not change torch's, which dropout samples from.
    """
    if num_workers < 0 and device.type == "cpu":
        num_workers = 4
    elif num_workers < 0:
        cores_per_process = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_workers = max(4, min(cores_per_process, 16))
    # More workers than cores do no harm here.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
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
) -> DataLoader:
    """The training batches of one process; call `batch_sampler.set_epoch` before each epoch."""
    sampler = EpochBatchSampler(
        len(split.paths), config.batch_size, config.seed, rank=rank, world_size=world_size
    )
    bucket_size = sampler.local_batch_size
    if device.type == "cpu":  # a GPU loses more time on more kernels than on padding
        bucket_size = math.ceil(bucket_size / TEXT_BUCKETS)
    if config.chunk_size:
        bucket_size = min(bucket_size, config.chunk_size)
    collate_fn = partial(collate, tokenizer=tokenizer, bucket_size=bucket_size)
    dataset = ImageCaptionDataset(split, config)
    return build_loader(dataset, config.num_workers, device, collate_fn, batch_sampler=sampler)


# ---------------------------------------------------------------- files


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path` by what `write` writes, in one step.

    At no time is the file missing or incomplete, even if the process is killed. Raises `UserError`
    if it cannot be written; the former content is then unchanged.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # unique among processes
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # torch.save wraps the error that it meets
        if isinstance(cause, KeyboardInterrupt) or WORKER in str(cause):  # not about this file
            raise cause from None
        reason = getattr(cause, "strerror", None) or error
        raise UserError(f"{path}: could not be written, content unchanged: {reason}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
