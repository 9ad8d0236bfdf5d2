"""Damaged or hostile index files are rejected and built again; leftovers are removed."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import copy_images, error_message

import inference
from config import UserError
from inference import Searcher

QUERY = ["a red circle"]


@pytest.fixture
def checkpoint(trained: Path, workdir: Path) -> Path:
    """A copy of best.pt in the current directory, without an index."""
    return Path(shutil.copy(trained / "best.pt", workdir))


@pytest.fixture
def images(shapes: Path, workdir: Path) -> Path:
    """A folder of eight images that a test may change."""
    return copy_images(shapes, workdir, 8)


def search(checkpoint: Path, images: Path) -> dict[str, float]:
    """The cosine of each image, by its name."""
    matches = Searcher(checkpoint, "cpu", 0).search(QUERY, images)[0]
    return {match.path.name: match.cosine for match in matches}


def array_of(checkpoint: Path) -> Path:
    (path,) = checkpoint.with_suffix(".index").glob("*.npy")
    return path


def listing_of(checkpoint: Path) -> Path:
    (path,) = checkpoint.with_suffix(".index").glob("*.json")
    return path


def swap_rows(array: np.ndarray) -> None:
    array[[0, 1]] = array[[1, 0]]


def scale(array: np.ndarray) -> None:
    array *= 2


def flip_bit(array: np.ndarray) -> None:
    array.view(np.uint32)[3, 5] ^= 1


@pytest.mark.parametrize("damage", [swap_rows, scale, flip_bit])
def test_index_with_a_damaged_array_is_built_again(
    damage: Callable, checkpoint: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    expected = search(checkpoint, images)
    array = np.load(array_of(checkpoint))
    damage(array)
    np.save(array_of(checkpoint), array)
    capsys.readouterr()
    assert search(checkpoint, images) == expected
    assert "is damaged and built again" in capsys.readouterr().out
    assert search(checkpoint, images) == expected
    assert "is damaged" not in capsys.readouterr().out


def change_list(checkpoint: Path, change: Callable[[list], None]) -> None:
    """Changes the listed images, and renames the array as a stranger would."""
    array = array_of(checkpoint)
    listing = listing_of(checkpoint)
    content = json.loads(listing.read_text())
    change(content["images"])
    listing.write_text(json.dumps(content))
    digest = inference._digest(listing.read_text())
    array.rename(array.with_name(f"{listing.stem}-{digest}.npy"))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda images: images.__setitem__(1, images[0]), id="an image twice"),
        pytest.param(lambda images: images[0].append([]), id="a list"),
        pytest.param(lambda images: images.__setitem__(0, 5), id="a number"),
        pytest.param(lambda images: images.pop(), id="an image too few"),
    ],
)
def test_index_with_another_list_is_built_again(
    change: Callable, checkpoint: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    expected = search(checkpoint, images)
    change_list(checkpoint, change)
    capsys.readouterr()
    assert search(checkpoint, images) == expected
    assert "is damaged and built again" in capsys.readouterr().out


def test_index_notices_that_two_images_swapped_names(checkpoint: Path, images: Path) -> None:
    """Of equal size and time of change."""
    one, other = sorted(images.iterdir())[:2]
    size = max(one.stat().st_size, other.stat().st_size)
    for path in (one, other):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, (1e9, 1e9))
    before = search(checkpoint, images)
    assert before[one.name] != before[other.name]
    one.rename("third")
    other.rename(one)
    Path("third").rename(other)
    after = search(checkpoint, images)
    assert after[one.name] == pytest.approx(before[other.name], abs=1e-6)
    assert after[other.name] == pytest.approx(before[one.name], abs=1e-6)


@pytest.mark.parametrize("file", [array_of, listing_of])
def test_index_replaces_a_named_pipe(file: Callable, checkpoint: Path, images: Path) -> None:
    """Reading it would block for ever."""
    expected = search(checkpoint, images)
    path = file(checkpoint)
    path.unlink()
    os.mkfifo(path)
    assert search(checkpoint, images) == expected
    assert path.is_file()


def test_search_rejects_a_named_pipe_as_weights(workdir: Path) -> None:
    os.mkfifo("w.pt")
    assert "w.pt" in error_message(inference.main, "--weights", "w.pt")


def test_search_removes_leftovers_of_killed_searches_only(checkpoint: Path, images: Path) -> None:
    search(checkpoint, images)
    index = checkpoint.with_suffix(".index")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = index / f"a.json.{platform.node()}.{dead.pid}.tmp"
    in_use = index / f"a.npy.{platform.node()}.{os.getppid()}.tmp"
    leftover.touch()
    in_use.touch()
    search(checkpoint, images)
    assert not leftover.exists()
    assert in_use.exists()


def test_encode_images_bounds_the_pixels_of_a_batch(
    checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here 2 images; by default 64 of up to 384 x 384, but 2 of 2048 x 2048."""
    sizes = []
    original = inference.build_loader

    def build_loader(*arguments: object, batch_size: int, **options: object) -> object:
        sizes.append(batch_size)
        return original(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(inference, "build_loader", build_loader)
    monkeypatch.setattr(inference, "ENCODE_PIXELS", 2 * 32**2)
    search(checkpoint, images)
    assert sizes == [2]


def test_classify_rejects_embeddings_that_are_not_finite(checkpoint: Path, images: Path) -> None:
    searcher = Searcher(checkpoint, "cpu", 0)
    searcher.image_tower.head.linear.weight.data.fill_(np.nan)
    with pytest.raises(UserError, match="not finite"):
        searcher.classify(next(images.iterdir()), ["a", "b"])
