"""Tests of data.py: loading and transforming images, and batches of images with captions."""

import itertools
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, error_message
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import data
import inference
from config import Config, UserError, cli_errors, parse
from data import (
    ImageCaptionDataset,
    Split,
    Transform,
    build_train_loader,
    collate,
    list_images,
    load_image,
    read_splits,
    tokenize,
)
from models import build_wordpiece_tokenizer

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
ORIENTATION = 0x0112  # EXIF tag
ROTATE_RIGHT = 6  # its value for an image that must be rotated by 90 degrees clockwise

Epoch = list[tuple[str, Tensor]]  # caption and pixels of each pair, in order


def require_format(suffix: str) -> None:
    """Skips the test where Pillow is too old to write the format, such as AVIF before 11.2."""
    if Image.registered_extensions().get(f".{suffix}") not in Image.SAVE:
        pytest.skip(f"Pillow cannot write .{suffix} here")


def save_image(folder: Path, name: str, image: Image.Image, **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def noise_image(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---------------------------------------------------------------- load_image


@pytest.mark.parametrize(
    ("image", "color"),
    [
        pytest.param(Image.new("L", (3, 2), 100), (100, 100, 100), id="grayscale"),
        pytest.param(Image.new("RGB", (3, 2), (255, 0, 0)).convert("P"), (255, 0, 0), id="palette"),
        pytest.param(Image.new("1", (3, 2), 1), (255, 255, 255), id="black and white"),
    ],
)
def test_load_image_converts_to_rgb(tmp_path: Path, image: Image.Image, color: tuple[int, ...]):
    pixels = load_image(save_image(tmp_path, "image.png", image))
    assert pixels.shape == (2, 3, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == color).all()


def test_load_image_converts_cmyk_to_rgb(tmp_path: Path):
    image = Image.new("CMYK", (16, 8), (0, 255, 255, 0))
    pixels = load_image(save_image(tmp_path, "print.jpg", image, quality=95))
    assert pixels.shape == (8, 16, 3)
    assert (abs(pixels.astype(int) - (255, 0, 0)) < 10).all()


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        pytest.param("RGB", {}, id="color"),
        pytest.param("RGB", {"subsampling": 0, "quality": 95}, id="all colors"),
        pytest.param("RGB", {"progressive": True}, id="progressive"),
        pytest.param("RGB", {"restart_marker_rows": 1}, id="restart markers"),
        pytest.param("L", {}, id="grayscale"),
        pytest.param("CMYK", {}, id="print"),
    ],
)
@pytest.mark.parametrize("trailer", [b"", b"video", b"video" + data.END_OF_JPEG])
def test_load_image_reads_the_pixels_of_pillow(
    tmp_path: Path, mode: str, options: dict[str, Any], trailer: bytes
):
    """Though OpenCV decodes plain JPEG files, with or without something appended."""
    image = noise_image(np.random.default_rng(0), 45, 67).convert(mode)
    path = save_image(tmp_path, "photo.jpg", image, **options)
    path.write_bytes(path.read_bytes() + trailer)
    with Image.open(path) as reopened:
        expected = np.asarray(reopened.convert("RGB"))
    assert (load_image(path) == expected).all()


def test_a_small_image_in_a_huge_file_takes_little_memory(tmp_path: Path):
    path = save_image(tmp_path, "photo.jpg", Image.new("RGB", (8, 8), "red"))
    with path.open("r+b") as file:
        file.seek(2**34)  # of 16 GB, nearly all of which is a hole
        file.write(data.END_OF_JPEG)
    assert load_image(path).shape == (8, 8, 3)


def test_plain_jpegs_are_decoded_by_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_image(tmp_path, "photo.jpg", Image.new("RGB", (8, 8), "red"))
    monkeypatch.setattr(Image.Image, "convert", None)  # Pillow's path needs it
    assert load_image(path).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param(np.uint16([[0, 65535], [257, 25700]]), [0, 255, 1, 100], id="16 bits"),
        pytest.param(np.uint16([[0, 4095], [16, 2048]]), [0, 255, 0, 127], id="12 of 16 bits"),
        pytest.param(np.uint16([[1000, 3000], [1500, 2000]]), [0, 255, 63, 127], id="low and far"),
        pytest.param(np.uint16([[90, 90], [90, 90]]), [0, 0, 0, 0], id="uniform"),
        pytest.param(np.int32([[0, 65535], [257, 25700]]), [0, 255, 1, 100], id="32 bits as 16"),
        pytest.param(np.int32([[0, 2**30], [2**29, 2**28]]), [0, 255, 127, 63], id="32 bits"),
        pytest.param(np.int32([[0, 255], [51, 102]]), [0, 255, 51, 102], id="32 bits as 8"),
        pytest.param(np.int32([[-(2**30), 2**30], [0, 2**29]]), [0, 255, 127, 191], id="signed"),
        pytest.param(np.float32([[0, 1], [0.5, 0.25]]), [0, 255, 127, 63], id="float to 1"),
        pytest.param(np.float32([[0.5, 0.5], [0.5, 0.5]]), [127] * 4, id="uniform float"),
        pytest.param(np.float32([[0, 255], [51, 102]]), [0, 255, 51, 102], id="float to 255"),
        pytest.param(np.float32([[0, 4000], [1000, 2000]]), [0, 255, 63, 127], id="float above"),
        pytest.param(np.float32([[-3, 1], [-1, -2]]), [0, 255, 127, 63], id="float below"),
        pytest.param(np.float32([[0, 1], [math.nan, math.inf]]), [0, 255, 0, 255], id="not finite"),
    ],
)
def test_load_image_scales_deep_values(tmp_path: Path, values: np.ndarray, expected: list[int]):
    """By their nominal range, or by their own if they lie far outside or far below it."""
    pixels = load_image(save_image(tmp_path, "deep.tif", Image.fromarray(values)))
    assert pixels[..., 0].flatten().tolist() == expected


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_load_image_scales_16_bits(tmp_path: Path, name: str):
    """Pillow's own conversion clips them to white."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = load_image(save_image(tmp_path, name, Image.fromarray(ramp)))
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert (abs(pixels[..., 0].astype(float) - ramp / 257) <= 1).all()


def transparent_image(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """A transparent pixel and a black one, and the options to save them with."""
    if mode == "palette":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([10, 20, 30, 0, 0, 0])
        image.putpixel((1, 0), 1)
        return image, {"transparency": 0}
    if mode == "one color":
        image = Image.new("RGB", (2, 1), (10, 20, 30))
        image.putpixel((1, 0), (0, 0, 0))
        return image, {"transparency": (10, 20, 30)}
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    return image.convert(mode), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "one color"])
def test_load_image_shows_transparency_as_white(tmp_path: Path, mode: str):
    image, options = transparent_image(mode)
    pixels = load_image(save_image(tmp_path, "transparent.png", image, **options))
    assert pixels.tolist() == [[[255] * 3, [0] * 3]]


def test_load_image_blends_half_transparency_with_white(tmp_path: Path):
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    pixels = load_image(save_image(tmp_path, "half.png", image))
    assert (abs(pixels.astype(int) - (255, 127, 127)) <= 1).all()


def test_load_image_turns_image_upright(tmp_path: Path):
    """The red left half of the file is the upper half of the image."""
    image = Image.new("RGB", (32, 16), "black")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATE_RIGHT
    pixels = load_image(save_image(tmp_path, "turned.jpg", image, exif=exif, quality=95))
    assert pixels.shape == (32, 16, 3)
    assert (pixels[:12, :, 0] > 200).all()
    assert (pixels[20:] < 50).all()


@pytest.mark.parametrize("orientation", range(10))
def test_load_image_turns_image_as_pillow_does(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    path = save_image(tmp_path, "turned.png", image, exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(path)))
    assert (load_image(path)[:, :, 0] == expected).all()


def test_load_image_turns_image_with_damaged_exif(tmp_path: Path):
    """Another entry of the EXIF block is damaged, so that Pillow's own function fails."""
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATE_RIGHT
    exif[0x0100] = 40  # the width
    path = save_image(tmp_path, "damaged.jpg", Image.new("RGB", (40, 30)), exif=exif)
    entry = exif.tobytes()[16:22]  # the width's tag, its type (4, a number) and its count (1)
    damaged = entry[:2] + b"\0\2" + entry[4:]  # type 2, a text
    path.write_bytes(path.read_bytes().replace(entry, damaged))
    with pytest.raises((struct.error, TypeError, AttributeError)):
        ImageOps.exif_transpose(Image.open(path))
    assert load_image(path).shape == (40, 30, 3)


@pytest.mark.parametrize("size", [(1, 1), (4000, 20), (20, 4000)])
@pytest.mark.parametrize("augment", [True, False])
def test_loader_accepts_tiny_and_very_long_images(
    tmp_path: Path, size: tuple[int, int], augment: bool
):
    path = save_image(tmp_path, "odd.png", Image.new("RGB", size, (200, 30, 30)))
    assert load_image(path).shape == (*size[::-1], 3)
    split = Split([path] * 2, [["A dog runs ."]] * 2)
    (epoch,) = load_epochs(split, augment=augment, batch_size=2)
    for _, pixels in epoch:
        assert pixels.shape == (3, 32, 32)
        assert (pixels[0] > pixels[1]).all()


def broken_image(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jpg"
    if kind == "truncated":
        save_image(folder, path.name, noise_image(np.random.default_rng(0), 64, 64))
        jpeg = path.read_bytes()
        path.write_bytes(jpeg[: len(jpeg) // 2])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "folder", "absent"])
def test_load_image_rejects_what_is_no_image(tmp_path: Path, kind: str):
    path = broken_image(tmp_path, kind)
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        load_image(path)
    assert "\n" not in str(error.value)


def test_load_image_rejects_a_truncated_jpeg_that_opencv_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Older versions of OpenCV do."""
    import cv2

    path = broken_image(tmp_path, "truncated")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_image(path)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_names_broken_image_in_one_line(tmp_path: Path, num_workers: int):
    path = broken_image(tmp_path, "truncated")
    split = Split([path] * 4, [["A dog runs ."]] * 4)
    with pytest.raises(UserError) as error:
        load_epochs(split, num_workers=num_workers)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_load_image_reads_png_with_a_long_text(tmp_path: Path):
    """As some generators of images write them. Pillow's default limit is 1 MB."""
    info = PngInfo()
    info.add_text("workflow", "x" * 5_000_000, zip=True)
    path = save_image(tmp_path, "long.png", Image.new("RGB", (2, 2), "red"), pnginfo=info)
    assert load_image(path).tolist() == [[[255, 0, 0]] * 2] * 2


@pytest.mark.parametrize(("num_pixels", "accepted"), [(15, True), (25, False)])
def test_load_image_names_the_limit_of_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_pixels: int, accepted: bool
):
    """Pillow warns from the limit on and refuses twice as many. The warning is not shown."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = save_image(tmp_path, "large.png", Image.new("RGB", (num_pixels, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if accepted:
            assert load_image(path).shape == (1, num_pixels, 3)
        else:
            with pytest.raises(UserError, match=r"large.png: has more than 20 pixels; save it"):
                load_image(path)


@pytest.mark.parametrize("name", ["image.jpg", "image.eps", "image.pdf"])
def test_load_image_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """PostScript is not opened, whatever the file is called."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("started"))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.ps", format="EPS")
    (tmp_path / "image.ps").rename(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: cannot be read as an image"):
        load_image(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == "EPS"


@pytest.mark.parametrize(
    "error",
    [TypeError("x"), RuntimeError("x"), NotImplementedError(), struct.error("x"), MemoryError()],
)
def test_load_image_turns_any_error_of_a_decoder_into_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    path = save_image(tmp_path, "image.png", Image.new("RGB", (8, 8)))

    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    reason = str(error) or type(error).__name__
    with pytest.raises(UserError, match=f"image.png: cannot be read as an image: {reason}$"):
        load_image(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "suffix", ["avif", "tif", "dds", "blp", "jp2", "webp", "qoi", "tga", "ico"]
)
def test_load_image_survives_any_damaged_byte(tmp_path: Path, suffix: str):
    """It returns an image or raises `UserError`, whatever byte is damaged."""
    require_format(suffix)
    mode = "P" if suffix == "blp" else "RGB"
    image = noise_image(np.random.default_rng(0), 24, 24).convert(mode)
    original = save_image(tmp_path, f"image.{suffix}", image).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = np.frombuffer(original, np.uint8).copy()
        damaged[rng.integers(min(len(damaged), 400))] = rng.integers(256)
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(damaged[: rng.integers(len(damaged)) if rng.random() < 0.2 else None])
        with warnings.catch_warnings(), suppress(UserError):
            warnings.simplefilter("error")
            assert load_image(path).dtype == np.uint8


# ---------------------------------------------------------------- large JPEG files


@pytest.mark.parametrize("size", [(500, 500), (500, 375), (333, 500)])
@pytest.mark.parametrize("min_side", [1, 32, 64, 224, 288])
def test_load_image_decodes_flickr8k_sizes_in_full(
    tmp_path: Path, size: tuple[int, int], min_side: int
):
    path = save_image(tmp_path, "flickr.jpg", noise_image(np.random.default_rng(0), *size))
    assert (load_image(path, min_side) == load_image(path)).all()
    assert (load_image(path) == np.array(Image.open(path))).all()


@pytest.mark.parametrize(
    ("size", "min_side", "expected"),
    [
        ((4000, 3000), 224, (1000, 750)),
        ((4000, 3000), 100, (500, 375)),
        ((4000, 3000), 288, (1000, 750)),
        ((4000, 3000), 423, (2000, 1500)),
        ((4000, 3000), 751, (4000, 3000)),
        ((3000, 4000), 300, (750, 1000)),
        ((4000, 600), 224, (4000, 600)),
    ],
)
def test_load_image_decodes_large_jpeg_at_smallest_sufficient_scale(
    tmp_path: Path, size: tuple[int, int], min_side: int, expected: tuple[int, int]
):
    """The smallest of 1/8, 1/4, 1/2 and 1 whose shorter side is at least twice `min_side`."""
    path = save_image(tmp_path, "photo.jpg", Image.new("RGB", size))
    assert load_image(path, min_side).shape == (*expected[::-1], 3)
    assert load_image(path).shape == (*size[::-1], 3)
    png = save_image(tmp_path, "photo.png", Image.new("RGB", (2000, 1000)))
    assert load_image(png, min_side).shape == (1000, 2000, 3)


def test_transform_changes_little_with_a_reduced_jpeg(tmp_path: Path):
    rng = np.random.default_rng(0)
    smooth = noise_image(rng, 24, 32).resize((2048, 1536), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATE_RIGHT
    path = save_image(tmp_path, "photo.jpg", smooth, exif=exif, quality=90)
    transform = Transform(64)
    reduced = load_image(path, transform.min_side)
    assert reduced.shape == (512, 384, 3)
    difference = transform(load_image(path)).astype(float) - transform(reduced)
    assert abs(difference).mean() < 1


def test_augment_has_twice_the_pixels_of_its_smallest_crop():
    """The smallest crop has 0.35 of the square's area, and sides in the ratio of 1.25."""
    transform = Transform(224)
    assert transform.min_side == 224
    smallest = math.sqrt(0.35 / 1.25) * 2 * transform.augment_min_side
    assert 2 * 224 <= smallest < 2 * 226


@pytest.mark.parametrize("augment", [False, True])
def test_dataset_decodes_for_its_transform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: bool
):
    path = save_image(tmp_path, "photo.jpg", Image.new("RGB", (2000, 1500)))
    passed = []
    monkeypatch.setattr(
        "data.load_image", lambda *arguments: passed.append(arguments) or load_image(*arguments)
    )
    dataset = ImageCaptionDataset(
        Split([path], [["a dog"]]), Config(image_size=64, augment=augment)
    )
    assert dataset[0]["pixels"].shape == (64, 64, 3)
    transform = dataset.transform
    assert passed == [(path, transform.augment_min_side if augment else transform.min_side)]


# ---------------------------------------------------------------- list_images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def listed(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_images(folder)]


SUFFIXES = "jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif jp2 j2k ppm pgm pbm pnm pfm"
SUFFIXES += " mpo tga ico icns dds qoi pcx psd sgi"


@pytest.mark.parametrize("suffix", SUFFIXES.split())
def test_list_images_lists_every_raster_format(tmp_path: Path, suffix: str):
    require_format(suffix)
    touch(tmp_path, f"a.{suffix}", f"sub/B.{suffix.upper()}")
    assert listed(tmp_path) == [f"a.{suffix}", f"sub/B.{suffix.upper()}"]


@pytest.mark.parametrize(
    "suffix", ["avif", "jfif", "jpe", "ppm", "tga", "jp2", "mpo", "apng", "webp", "bmp", "gif"]
)
def test_load_image_reads_every_raster_format(tmp_path: Path, suffix: str):
    require_format(suffix)
    image = Image.new("RGB", (16, 16), (200, 40, 40))
    path = save_image(tmp_path, f"image.{suffix}", image)
    assert (abs(load_image(path).astype(int) - (200, 40, 40)) < 8).all()


@pytest.mark.parametrize("suffix", ["eps", "ps", "wmf", "emf", "pdf", "mpg", "h5", "grib", "svg"])
def test_list_images_lists_no_other_format(tmp_path: Path, suffix: str):
    touch(tmp_path, f"a.{suffix}")
    assert listed(tmp_path) == []


def test_list_images_follows_links_without_loops(tmp_path: Path):
    """An image in a folder and in a link to that folder is listed once, in the folder."""
    touch(tmp_path, "photos/z/1.jpg", "elsewhere/2.jpg", "elsewhere/more/3.jpg")
    photos = tmp_path / "photos"
    (photos / "all").symlink_to(photos)
    (photos / "a").symlink_to(photos / "z")
    (photos / "z" / "up").symlink_to("..")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(photos)
    (photos / "self").symlink_to("self")
    (photos / "gone").symlink_to("nowhere")
    assert listed(photos) == ["linked/2.jpg", "linked/more/3.jpg", "z/1.jpg"]


def test_list_images_passes_over_hidden_and_system_files(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    touch(tmp_path, "a.jpg", "._a.jpg", ".hidden.jpg", ".thumbnails/a.jpg", "@eaDir/a.jpg")
    touch(
        tmp_path, "__MACOSX/a.jpg", "Thumbnails/a.jpg", "thumbs/a.jpg", "jpg", ".jpg", ".DS_Store"
    )
    (tmp_path / "folder.jpg").mkdir()
    touch(tmp_path, "folder.jpg/b.jpg")
    assert listed(tmp_path) == ["a.jpg", "folder.jpg/b.jpg"]
    assert capsys.readouterr().out == "images: left out 1 files: 1 without suffix\n"


def test_list_images_of_a_hidden_folder(tmp_path: Path):
    """The folder itself may be hidden or called like a system's."""
    for name in (".photos", "thumbs"):
        touch(tmp_path, f"{name}/a.jpg")
        assert listed(tmp_path / name) == ["a.jpg"]


def test_list_images_counts_each_suffix_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    touch(tmp_path, "a.jpg", "a.MOV", "b.mov", "c.txt", "sub/d.mov", "e.heic", "f.heic")
    list_images(tmp_path)
    message = "images: left out 6 files: 3 .mov, 2 .heic, 1 .txt (HEIF images are read after: pip"
    stdout = capsys.readouterr().out
    assert stdout.startswith(message)
    assert stdout.count("\n") == 1


def test_list_images_counts_unreadable_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    touch(tmp_path, "a.jpg", "locked/b.jpg", "locked too/b.jpg")

    def scandir(path: str, original: Callable = os.scandir) -> object:
        if "locked" in path:
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr("os.scandir", scandir)
    assert listed(tmp_path) == ["a.jpg"]
    stdout = capsys.readouterr().out
    assert "left out 2 folders that cannot be read: " in stdout
    assert "locked too/: Permission denied" in stdout


def test_list_images_uses_pillow_heif_where_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    registered = types.ModuleType("pillow_heif")
    registered.register_heif_opener = lambda: Image.register_extension("HEIF", ".heic")
    touch(tmp_path, "a.heic")
    with pytest.raises(UserError, match=r"a.heic: .*pip install pillow-heif"):
        load_image(tmp_path / "a.heic")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pillow_heif", registered)
        patched.setattr(Image, "EXTENSION", dict(Image.registered_extensions()))
        data._readable_formats.cache_clear()
        assert listed(tmp_path) == ["a.heic"]
    data._readable_formats.cache_clear()
    assert listed(tmp_path) == []


# ---------------------------------------------------------------- images in a search


@pytest.fixture
def searcher(trained: Path, tmp_path: Path) -> inference.Searcher:
    checkpoint = Path(shutil.copy(trained / "last.pt", tmp_path / "w.pt"))
    return inference.Searcher(checkpoint, device="cpu", num_workers=0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, two of them nearly black, and a damaged one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, color in (("a.png", "red"), ("b.jp2", (9, 9, 9)), ("c.jfif", (5, 5, 5))):
        save_image(folder, name, Image.new("RGB", (64, 64), color))
    (folder / "damaged.jp2").write_bytes((folder / "b.jp2").read_bytes()[:100])
    return folder


def test_search_says_what_it_searches_and_skips(
    searcher: inference.Searcher, photos: Path, capsys: pytest.CaptureFixture
):
    (matches,) = searcher.search(["a red circle"], photos)
    assert {match.path.name for match in matches} == {"a.png", "b.jp2", "c.jfif"}
    stdout = capsys.readouterr().out
    assert f"searching 4 images in {photos}\n" in stdout
    assert "skipped 1 of 4 images:" in stdout
    assert f"{photos / 'damaged.jp2'}: cannot be read as an image: " in stdout
    assert "2 of 3 images are nearly black" in stdout


def test_search_says_how_many_test_images_it_searches(
    searcher: inference.Searcher,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(trained.parent.parent)  # its data folder is relative
    searcher.search(["a red circle"])
    data_dir = searcher.config.data_dir
    assert f"searching the 12 test images of {data_dir}\n" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_search_shows_images_that_vanished_as_gray(
    searcher: inference.Searcher,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    spoil: Callable,
):
    """They were indexed, and vanish or become unreadable before they are shown."""
    results = searcher.search(["a red circle"], photos)
    spoil(photos / "a.png")
    inference.show_matches(results, tmp_path / "matches.png")
    assert f"not shown: {photos / 'a.png'}: cannot be read" in capsys.readouterr().out
    assert (tmp_path / "matches.png").stat().st_size > 0


def test_thumbnails_decode_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_image(tmp_path, "photo.jpg", Image.new("RGB", (4000, 3000)))
    sizes = []

    def load(*arguments: object) -> np.ndarray:
        sizes.append(load_image(*arguments).shape)
        return load_image(*arguments)

    monkeypatch.setattr(inference, "load_image", load)
    assert inference._thumbnail(path).size == (300, 225)
    assert sizes == [(750, 1000, 3)]


def test_classify_ranks_each_text_once(searcher: inference.Searcher, photos: Path):
    texts = ["a red circle", "a  red circle", "a blue square", "a red circle"]
    matches = searcher.classify(photos / "a.png", texts)
    assert sorted(match.query for match in matches) == ["a blue square", "a red circle"]
    assert sum(match.score for match in matches) == pytest.approx(1)


class Buggy(Dataset):
    """A bug in a DataLoader worker."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug")])
def test_bug_in_a_worker_keeps_its_traceback(error: Exception):
    @cli_errors
    def main(_: object) -> None:
        list(DataLoader(Buggy(error), num_workers=1))

    with pytest.raises(type(error), match=r"(?s)Traceback.*a bug"):
        main([])


@pytest.mark.slow
def test_killed_worker_is_one_line():
    class Killed(Buggy):
        def __getitem__(self, index: int) -> object:
            os.kill(os.getpid(), signal.SIGKILL)

    @cli_errors
    def main(_: object) -> None:
        list(DataLoader(Killed(ValueError()), num_workers=1))

    message = error_message(main)
    assert "a DataLoader worker died; try --num-workers 0" in message


# ---------------------------------------------------------------- sampling of captions and images


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """14 different images of noise, with 1 to 4 captions each.

    Caption j of image i begins with "p{i}c{j}". The captions have many different lengths.
    """
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    paths = []
    captions = []
    for i in range(14):
        paths.append(save_image(folder, f"{i}.png", noise_image(rng, 30, 40)))
        captions.append([f"p{i}c{j}" + " dog" * (3 * i + j) for j in range(1 + i % 4)])
    return Split(paths, captions)


def tokenizer_of(split: Split, max_length: int = 64) -> Tokenizer:
    return build_wordpiece_tokenizer(split.texts, max_length)


def load_epochs(split: Split, epochs: tuple[int, ...] = (0,), **settings: Any) -> list[Epoch]:
    """The pairs of these successive epochs, from one iterator over the training batches."""
    settings = {"image_size": 32, "batch_size": 4, "num_workers": 0} | settings
    config = Config(**settings, epochs=epochs[-1] + 1)
    tokenizer = tokenizer_of(split)
    text_of_ids = {tuple(tokenizer.encode(text).ids): text for text in split.texts}
    loader = build_train_loader(split, tokenizer, config, CPU, start_epoch=epochs[0])
    batches = iter(loader)
    loaded = []
    for _ in epochs:
        pairs = []
        for batch in itertools.islice(batches, loader.batch_sampler.steps_per_epoch):
            captions = []
            for ids, mask in batch["texts"]:
                for token_ids, token_mask in zip(ids, mask, strict=True):
                    captions.append(text_of_ids[tuple(token_ids[token_mask.bool()].tolist())])
            pairs += zip(captions, batch["pixels"].clone(), strict=True)
        loaded.append(pairs)
    assert next(batches, None) is None
    return loaded


def captions_of(epoch: Epoch) -> list[str]:
    return [caption for caption, _ in epoch]


def image_of(caption: str) -> str:
    """The image that a caption of `noise` belongs to: "p3" of "p3c1 dog"."""
    return caption.partition("c")[0]


def images_of(epoch: Epoch) -> list[str]:
    return [image_of(caption) for caption in captions_of(epoch)]


def assert_same_pairs(one: Epoch, other: Epoch) -> None:
    assert captions_of(one) == captions_of(other)
    for (_, ours), (_, theirs) in zip(one, other, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def three_epochs(noise: Split) -> list[Epoch]:
    return load_epochs(noise, (0, 1, 2))


def test_dataset_behaves_as_pytorch_dataset(noise: Split):
    """It has a length, int indices and dict items; i and len + i are the same image."""
    dataset = ImageCaptionDataset(noise, Config(image_size=32, augment=False))
    assert isinstance(dataset, Dataset)
    assert len(dataset) == 14
    for i, (path, captions) in enumerate(zip(noise.paths, noise.captions, strict=True)):
        expected = Transform(32)(load_image(path))
        for item in (dataset[i], dataset[len(dataset) + i]):  # epochs 0 and 1
            assert item.keys() == {"pixels", "caption"}
            assert item["pixels"].shape == (32, 32, 3)
            assert item["pixels"].dtype == np.uint8
            assert (item["pixels"] == expected).all()
            assert item["caption"] in captions


def test_dataset_augments_the_same_image_anew_in_each_epoch(noise: Split):
    """The caption is sampled anew too; the same index gives the same item."""
    dataset = ImageCaptionDataset(noise, Config(image_size=32))
    captions = []
    for i in range(len(dataset)):
        first = dataset[i]
        again = dataset[i]
        second = dataset[len(dataset) + i]
        assert (first["pixels"] == again["pixels"]).all()
        assert first["caption"] == again["caption"]
        assert (first["pixels"] != second["pixels"]).any()
        assert image_of(first["caption"]) == image_of(second["caption"]) == f"p{i}"
        captions.append((first["caption"], second["caption"]))
    assert any(one != other for one, other in captions)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_dataset_works_with_a_plain_pytorch_loader(noise: Split, num_workers: int):
    """With PyTorch's own sampler and collate function."""
    dataset = ImageCaptionDataset(noise, Config(image_size=32))
    batches = list(DataLoader(dataset, batch_size=7, num_workers=num_workers))
    assert [tuple(batch["pixels"].shape) for batch in batches] == [(7, 32, 32, 3)] * 2
    captions = [caption for batch in batches for caption in batch["caption"]]
    assert [image_of(caption) for caption in captions] == [f"p{i}" for i in range(14)]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_loader_samples_the_same_with_any_number_of_workers(
    noise: Split, three_epochs: list[Epoch], num_workers: int
):
    """The captions and pixels of all epochs, in their order."""
    loaded = load_epochs(noise, (0, 1, 2), num_workers=num_workers)
    for one, other in zip(loaded, three_epochs, strict=True):
        assert_same_pairs(one, other)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_samples_the_same_after_resume(
    noise: Split, three_epochs: list[Epoch], num_workers: int
):
    (epoch,) = load_epochs(noise, (2,), num_workers=num_workers)
    assert_same_pairs(epoch, three_epochs[2])


def test_workers_load_the_next_epoch_before_it_starts(
    noise: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So that no epoch waits for its first batch."""
    original = ImageCaptionDataset.__getitem__

    def load_and_record(self: ImageCaptionDataset, index: int) -> dict[str, Any]:
        (tmp_path / str(index // len(self))).touch()
        return original(self, index)

    monkeypatch.setattr(ImageCaptionDataset, "__getitem__", load_and_record)
    config = Config(image_size=32, batch_size=4, num_workers=1, epochs=3)
    batches = iter(build_train_loader(noise, tokenizer_of(noise), config, CPU, start_epoch=1))
    for _ in range(3):  # epoch 1
        next(batches)
    deadline = time.monotonic() + 60
    while not (tmp_path / "2").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_loader_neither_uses_nor_changes_global_generator(noise: Split, three_epochs: list[Epoch]):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        before = torch.get_rng_state()
        (epoch,) = load_epochs(noise)
        assert_same_pairs(epoch, three_epochs[0])
        assert torch.equal(torch.get_rng_state(), before)


def test_loader_samples_the_same_with_any_batch_size(noise: Split, three_epochs: list[Epoch]):
    """An image's caption and pixels do not depend on the other images of its batch."""
    (epoch,) = load_epochs(noise, (1,), batch_size=7)
    pixels_of = dict(epoch)
    for caption, pixels in three_epochs[1]:
        assert torch.equal(pixels, pixels_of[caption])


@pytest.mark.parametrize("chunk_size", [2, 3, 14])
def test_loader_samples_the_same_with_any_chunk_size(
    noise: Split, three_epochs: list[Epoch], chunk_size: int
):
    (epoch,) = load_epochs(noise, (1,), chunk_size=chunk_size)
    assert_same_pairs(epoch, three_epochs[1])


@pytest.mark.parametrize(("settings", "number"), [({}, 1), ({}, 2), ({"seed": 1}, 0)])
def test_loader_samples_anew_for_each_epoch_and_seed(
    noise: Split, three_epochs: list[Epoch], settings: dict[str, int], number: int
):
    """Captions, pixels and order differ from those of epoch 0 of seed 0."""
    (epoch,) = load_epochs(noise, (number,), **settings)
    first = three_epochs[0]
    assert captions_of(epoch) != captions_of(first)
    assert set(captions_of(epoch)) != set(captions_of(first))
    assert images_of(epoch) != images_of(first)

    first_pixels = dict(first)
    repeated = [(caption, pixels) for caption, pixels in epoch if caption in first_pixels]
    assert repeated
    for caption, pixels in repeated:
        assert not torch.equal(pixels, first_pixels[caption])


def test_sampler_repeats_no_image_and_drops_incomplete_batch(three_epochs: list[Epoch]):
    """14 images are three batches of 4."""
    for epoch in three_epochs:
        images = images_of(epoch)
        assert len(images) == len(set(images)) == 12


def test_sampler_yields_every_image_if_batches_divide_them(noise: Split):
    (epoch,) = load_epochs(noise, batch_size=7)
    assert set(images_of(epoch)) == {f"p{i}" for i in range(14)}


@pytest.mark.slow
def test_dataset_samples_captions_of_an_image_evenly(noise: Split):
    epochs = load_epochs(noise, tuple(range(100)), batch_size=14, augment=False)
    counts = Counter()
    for epoch in epochs:
        counts.update(captions_of(epoch))
    for captions in noise.captions:
        assert sum(counts[caption] for caption in captions) == 100
        assert all(counts[caption] > 50 / len(captions) for caption in captions)


def test_loader_pairs_each_caption_with_its_own_image(noise: Split):
    """The mean color of the pixels is nearest to that of the caption's own image."""
    (epoch,) = load_epochs(noise, batch_size=14, augment=False, image_size=40)
    means = {}
    for i, path in enumerate(noise.paths):
        center = load_image(path)[:, 5:35]
        means[f"p{i}"] = center.mean((0, 1))
    for caption, pixels in epoch:
        mean = pixels.double().mean((1, 2)).numpy()
        distances = {image: abs(means[image] - mean).sum() for image in means}
        assert min(distances, key=distances.get) == image_of(caption)


# ---------------------------------------------------------------- transform


def half_red_images(folder: Path, captions: list[str]) -> Split:
    """An image for each caption, red on the left and blue on the right."""
    image = Image.new("RGB", (64, 48), (200, 60, 60))
    image.paste((60, 60, 200), (32, 0, 64, 48))
    path = save_image(folder, "halves.png", image)
    return Split([path] * len(captions), [[caption] for caption in captions])


def is_flipped(pixels: Tensor) -> bool:
    """Whether an image of `half_red_images` is red on the right."""
    red = pixels[0].double().mean(0)
    return bool(red[:8].mean() < red[-8:].mean())


def test_augment_never_flips_if_caption_mentions_left_or_right(tmp_path: Path):
    sided = ["a dog on the left", "Right: a dog", "a RIGHT-handed man", "the dog's left, muddy paw"]
    sided += ["the leftmost dog", "a righthand turn", "it looks rightward"]
    plain = ["a dog on the grass", "a bright light", "a leftover pie", "two dogs"]
    split = half_red_images(tmp_path, sided + plain)
    flips = Counter()
    for epoch in load_epochs(split, tuple(range(25)), batch_size=8):
        flips.update(caption for caption, pixels in epoch if is_flipped(pixels))
    assert not set(flips) & set(sided)
    assert all(3 <= flips[caption] <= 22 for caption in plain), flips


def test_augment_crops_and_jitters_as_albumentations_does():
    """Where the image is less than twice the size, to the last bit."""
    transform = Transform(64)
    import albumentations as A  # here, because `Transform` keeps it from asking the network

    jitter = A.ColorJitter((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (0, 0), p=0.8)
    library = A.Compose([A.RandomResizedCrop((64, 64), (0.35, 1.0), (0.8, 1.25)), jitter])
    pixels = np.asarray(noise_image(np.random.default_rng(0), 100, 100))
    for i in range(20):
        rng = np.random.default_rng(i)
        library.set_random_seed(int(rng.integers(2**31)))
        expected = library(image=transform.flip(pixels) if rng.random() < 0.5 else pixels)
        found = transform.augment(pixels, "a dog", np.random.default_rng(i))
        assert (found == expected["image"]).all()


def test_flip_reverses_the_columns():
    pixels = np.asarray(noise_image(np.random.default_rng(0), 5, 7))
    assert (Transform(32).flip(pixels) == pixels[:, ::-1]).all()


def test_augment_crops_squares_anywhere_in_a_long_image(tmp_path: Path):
    """The image becomes brighter from left to right, so brightness shows the position."""
    row = np.linspace(0, 255, 800).astype(np.uint8)
    ramp = np.tile(row[:, None], (40, 1, 3))
    path = save_image(tmp_path, "ramp.png", Image.fromarray(ramp))
    split = Split([path] * 40, [["a dog on the left"]] * 40)
    (epoch,) = load_epochs(split, batch_size=40)
    means = [pixels.double().mean() for _, pixels in epoch]
    ranges = [np.ptp(pixels.numpy()) for _, pixels in epoch]
    assert min(means) < 64
    assert max(means) > 192
    range_of_square = 255 * 40 / 800
    assert max(ranges) < range_of_square * 1.3 * 1.3 + 2  # jitter of contrast and brightness


@pytest.mark.parametrize("side", [8, 200])
def test_transform_resizes_without_aliasing(side: int):
    """Stripes two pixels wide become almost gray in a smaller image."""
    row = np.array([0, 0, 255, 255], np.uint8)
    stripes = np.tile(row[None, :, None], (side, side // 4, 3))
    pixels = Transform(32)(stripes)
    assert len(np.unique(pixels)) > 2
    if side > 32:
        assert np.ptp(pixels.astype(int)[1:-1, 1:-1]) < 100


def test_augment_turns_no_color_into_another(tmp_path: Path):
    split = half_red_images(tmp_path, ["a dog on the left"] * 8)
    for epoch in load_epochs(split, tuple(range(10)), batch_size=8):
        for _, pixels in epoch:
            red, green, blue = pixels.double()
            colored = (red > green + 20) | (blue > green + 20)
            assert colored.double().mean() > 0.9
            assert (red[:, 0] > blue[:, 0]).all()
            assert (blue[:, -1] > red[:, -1]).all()


def test_loader_keeps_demo_scenes_unchanged_in_every_epoch(shapes: Path):
    split = read_splits(shapes)["train"]
    config = parse(Config, ["--demo"])
    epochs = load_epochs(split, (0, 1), batch_size=48, augment=config.augment, image_size=128)
    originals = {load_image(path).tobytes() for path in split.paths}
    for epoch in epochs:
        assert {pixels.permute(1, 2, 0).numpy().tobytes() for _, pixels in epoch} == originals


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_uint8_in_channels_last_memory(noise: Split, num_workers: int):
    config = Config(image_size=32, batch_size=4, num_workers=num_workers, epochs=1)
    batches = list(build_train_loader(noise, tokenizer_of(noise), config, CPU))
    assert len(batches) == 3
    for batch in batches:
        assert batch.keys() == {"pixels", "texts", "caption_ids"}
        pixels = batch["pixels"]
        assert pixels.shape == (4, 3, 32, 32)
        assert pixels.dtype == torch.uint8
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        for ids, mask in batch["texts"]:
            assert ids.shape == mask.shape
            assert ids.dtype == mask.dtype == torch.int64


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
def test_collate_pads_captions_in_four_buckets_on_the_cpu(
    noise: Split, batch_size: int, chunk_size: int, sizes: list[int]
):
    """A bucket is at most one chunk, padded only to its own longest caption."""
    settings = {"image_size": 32, "batch_size": batch_size, "chunk_size": chunk_size}
    config = Config(**settings, num_workers=0, epochs=1)
    lengths = set()
    for batch in build_train_loader(noise, tokenizer_of(noise), config, CPU):
        assert [len(ids) for ids, _ in batch["texts"]] == sizes
        for ids, mask in batch["texts"]:
            assert mask.sum(dim=1).max() == ids.shape[1]
            lengths.add(ids.shape[1])
    assert len(lengths) > 3


@pytest.mark.parametrize(("chunk_size", "sizes"), [(0, [14]), (4, [4, 4, 4, 2])])
def test_collate_pads_captions_in_one_bucket_or_chunks_on_a_gpu(
    noise: Split, chunk_size: int, sizes: list[int]
):
    config = Config(image_size=32, batch_size=14, chunk_size=chunk_size, num_workers=0)
    loader = build_train_loader(noise, tokenizer_of(noise), config, CUDA)
    batch = loader.collate_fn([loader.dataset[i] for i in range(14)])
    assert [len(ids) for ids, _ in batch["texts"]] == sizes


def test_collate_gives_equal_captions_equal_ids(noise: Split):
    """The ids follow the order of the texts."""
    captions = ["a dog", "a cat on a mat", "A dog", "a dog"]
    pixels = np.zeros((8, 8, 3), np.uint8)
    items = [{"pixels": pixels, "caption": caption} for caption in captions]
    ids = collate(items, tokenizer_of(noise), bucket_size=8)["caption_ids"]
    assert ids.dtype == torch.int64
    cat = ids[3]  # the longest
    upper = ids[1]
    assert ids.tolist() == [ids[0], upper, ids[0], cat]
    assert len({int(number) for number in (ids[0], upper, cat)}) == 3


@pytest.mark.slow
def test_caption_ids_are_equal_in_all_processes():
    command = "from data import _caption_id; print(_caption_id('a dog'))"
    run = subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert int(run.stdout) == data._caption_id("a dog")


@pytest.mark.parametrize("batch_size", [4, 14])
def test_batches_are_sorted_by_caption_length(noise: Split, batch_size: int):
    (epoch,) = load_epochs(noise, batch_size=batch_size)
    for start in range(0, len(epoch), batch_size):
        lengths = [len(caption) for caption in captions_of(epoch)[start : start + batch_size]]
        assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    ("num_workers", "device", "cores", "local_world_size", "expected"),
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
def test_loader_chooses_number_of_workers(
    noise: Split,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    device: str,
    cores: int,
    local_world_size: int,
    expected: int,
):
    """With -1: four on the CPU, one per core of this process on a GPU. Else as given."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world_size))
    config = Config(image_size=32, batch_size=4, num_workers=num_workers)
    loader = build_train_loader(noise, tokenizer_of(noise), config, torch.device(device))
    assert loader.num_workers == expected
    assert not loader.persistent_workers  # they end with the iterator over all epochs
    assert loader.pin_memory == (device == "cuda")


def test_tokenize_truncates_captions_to_max_length(noise: Split):
    longest = max(noise.texts, key=len)
    ids, mask = tokenize(tokenizer_of(noise, max_length=8), ["dog", longest])
    assert mask.sum(dim=1).tolist() == [3, 8]
    assert ids.shape == (2, 8)
