"""Names and texts from files cannot change what a terminal shows, or look like a line of ours."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY, error_message
from PIL import Image

from config import UserError, printable
from data import list_images, read_splits
from inference import Searcher
from inference import main as search
from trainer import main as train

pytestmark = pytest.mark.filterwarnings("error:Glyph")  # matplotlib prints the character
SEARCH = ["--num-workers", "0", "--device", "cpu"]
HOSTILE = "\x1b[31m\r\x07\x9b\u202e\u2066\nerror: fake"
ESCAPED = r"\x1b[31m\r\x07\x9b\u202e\u2066\nerror: fake"
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]|^ *error: fake", re.M)


@pytest.fixture(autouse=True)
def terminal(capsys: pytest.CaptureFixture) -> Iterator[list[str]]:
    """Fails a test whose output is unsafe; tests may append other texts to be checked."""
    texts: list[str] = []
    yield texts
    for text in (*texts, *capsys.readouterr()):
        assert not UNSAFE.search(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HOSTILE, ESCAPED),
        ("tab\t\x00\x7f\x85\u2028\u200f", r"tab\t\x00\x7f\x85\u2028\u200f"),
        ("собака 犬 🐶 \u200d a\\b", "собака 犬 🐶 \u200d a\\b"),
        ("caf\udce9", r"caf\udce9"),  # a byte that is not UTF-8
        (Path("a\nb"), r"a\nb"),
    ],
)
def test_printable_escapes_control_characters_only(text: object, expected: str) -> None:
    assert printable(text) == expected


def test_user_error_is_printable(terminal: list[str]) -> None:
    terminal.append(str(UserError(f"{HOSTILE}: HTTP Error 404: {HOSTILE}")))


def test_read_splits_prints_hostile_names_safely(workdir: Path, terminal: list[str]) -> None:
    folder = workdir / f"data {HOSTILE}"
    (folder / "Images").mkdir(parents=True)
    rows = {"image": [], "caption": []}
    for i in range(120):
        name = f"{i}{HOSTILE}.png"
        Image.new("RGB", (32, 32)).save(folder / "Images" / name)
        rows["image"].append(name)
        rows["caption"].append(f"{HOSTILE} {i}")
    rows["image"].append(f"absent{HOSTILE}")
    rows["caption"].append("its image is missing")
    pd.DataFrame(rows).to_csv(folder / "captions.csv", index=False)
    assert len(read_splits(folder)["test"].paths) == 12
    for path in folder.glob("Images/1*"):
        path.unlink()
    with pytest.raises(UserError) as error:
        read_splits(folder)
    terminal.append(str(error.value))


def test_list_images_prints_hostile_suffixes_safely(workdir: Path) -> None:
    (workdir / f"a.{HOSTILE}").touch()
    assert list_images(workdir) == []


def test_search_prints_hostile_names_safely(
    checkpoint: Path, images: Path, capsys: pytest.CaptureFixture, terminal: list[str]
) -> None:
    """In lists, for damaged files and a damaged index, in errors; a table keeps the names."""
    folder = images.rename(HOSTILE)
    name = f"a{HOSTILE}.png"
    next(folder.iterdir()).rename(folder / name)
    (folder / f"damaged{HOSTILE}.png").touch()
    weights = Path(shutil.copy(checkpoint, f"{HOSTILE}.pt"))
    flags = ["--weights", str(weights), "--images", str(folder), *SEARCH]
    search([*flags, "--query", HOSTILE, "--output", f"{HOSTILE}.csv"])
    table = pd.read_csv(f"{HOSTILE}.csv", lineterminator="\n")
    assert f"{HOSTILE}/{name}" in list(table["path"])
    next(weights.with_suffix(".index").glob("*.json")).write_text("damaged")
    search([*flags, "--like", str(folder / name)])
    search(["--weights", str(weights), "--image", str(folder / name), "--query", HOSTILE, *SEARCH])
    stdout = capsys.readouterr().out
    terminal.append(stdout)
    for line in ("skipped 1 of 5 images", "is damaged and built again", f"{ESCAPED}/a{ESCAPED}"):
        assert line in stdout
    terminal.append(error_message(search, *flags, "--like", folder / "absent"))


def test_search_prints_hostile_checkpoint_safely(
    checkpoint: Path, images: Path, terminal: list[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["example_query"] = HOSTILE
    content["config"]["data_dir"] = HOSTILE
    torch.save(content, checkpoint)
    search(["--weights", str(checkpoint), "--images", str(images), *SEARCH])
    terminal.append(error_message(search, "--weights", checkpoint))
    for change in ({HOSTILE: 1}, {"precision": HOSTILE}, {"name": f"/{HOSTILE}"}):
        torch.save(content | {"config": content["config"] | change}, "changed.pt")
        with pytest.raises(UserError) as error:
            Searcher("changed.pt", "cpu", 0)
        terminal.append(str(error.value))


@pytest.mark.slow
def test_train_prints_hostile_names_safely(
    shapes: Path, workdir: Path, capsys: pytest.CaptureFixture, terminal: list[str]
) -> None:
    data = shutil.copytree(shapes, workdir / HOSTILE)
    table = pd.read_csv(data / "captions.txt")
    table["caption"] += HOSTILE
    table.to_csv(data / "captions.txt", index=False)
    train([*TINY, "--epochs", "1", "--data-dir", HOSTILE, "--name", f"run{HOSTILE}"])
    stdout = capsys.readouterr().out
    terminal.append(stdout)
    assert f"saved in runs/run{ESCAPED}: " in stdout
    assert stdout.splitlines()[-1].startswith("python inference.py --weights ")
