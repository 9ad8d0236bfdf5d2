"""Shared by the tests: a small data set, a finished run on it, and helpers to run the scripts."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
torch.set_num_threads(1)  # in this process too

import trainer  # noqa: E402
from config import Config  # noqa: E402
from data import generate_shapes  # noqa: E402
from models import CLIP, build_clip  # noqa: E402

# Flags of a small training run on the fixture `shapes`.
TINY = ["--demo", "--image-size", "32", "--batch-size", "8", "--epochs", "2"]
TINY += ["--num-workers", "0", "--device", "cpu"]
STEPS = 6  # per epoch of such a run: 48 images in batches of 8
FILES = ["best.pt", "curves.png", "last.pt", "metrics.csv", "test.json"]  # of a run's folder
TIMES = ["seconds", "pairs_per_second"]  # the columns in which equal runs may differ

CAPTIONS = [
    "a red circle",
    "a small green square, and a blue triangle below it",
    "two diamonds",
    "Ein großer Kreis",
]
CONFIG = Config(
    image_encoder="test_resnet",
    image_size=64,
    text_encoder="distilbert",
    pretrained=False,
    text_layers=1,
    text_width=64,
    projection_dim=16,
    dropout=0.1,
    drop_path=0.0,
)


# Of pretrained encoders, whose size is not chosen.
PRETRAINED_CONFIG = replace(CONFIG, pretrained=True, text_layers=0, text_width=0)


# ---------------------------------------------------------------- commands


@functools.cache
def without_network() -> list[str]:
    """A command prefix that cuts off the network, empty where the system does not allow it."""
    prefix = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare"):
        return []
    allowed = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else []


def script(
    *command: str, cwd: Path, network: bool = True, processes: int = 0
) -> subprocess.CompletedProcess:
    """Runs a script such as `trainer.py ...` as a process, or as several by torchrun."""
    name, *arguments = command
    prefix = [] if network else without_network()
    torchrun = []
    if processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    cache = str(cwd.with_name(f"{cwd.name}-cache"))  # empty
    caches = {"HF_HOME": cache, "TORCH_HOME": cache}
    with subprocess.Popen(
        [*prefix, sys.executable, *torchrun, str(ROOT / name), *arguments],
        cwd=cwd,
        env=os.environ | caches,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=240)
        except BaseException:
            process.terminate()  # torchrun then ends its own processes
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def error_message(main: Callable, *arguments: object) -> str:
    """The one line of the error with which `main(arguments)` ends."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


def at_step(step: int, effect: float | BaseException) -> Callable:
    """A loss that at one step, counted from 1, raises `effect` or is multiplied by it."""
    steps = iter(range(1, 1_000_000))

    def loss(*batch: object, original: Callable = trainer.contrastive_loss) -> Tensor:
        value = original(*batch)
        if next(steps) != step:
            return value
        if isinstance(effect, BaseException):
            raise effect
        return value * effect

    return loss


# ---------------------------------------------------------------- files of a run


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, weights_only=True)["model"]


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def curve(run_dir: Path) -> pd.DataFrame:
    """`metrics.csv` to the last digit, without its two columns of times."""
    return pd.read_csv(run_dir / "metrics.csv", dtype=str).drop(columns=TIMES)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def copy_images(shapes: Path, workdir: Path, count: int) -> Path:
    """The first images of the fixture `shapes` in `images`, a folder in the current directory."""
    (workdir / "images").mkdir()
    for source in sorted((shapes / "Images").iterdir())[:count]:
        shutil.copy(source, workdir / "images")
    return Path("images")


# ---------------------------------------------------------------- small models


def build(config: Config) -> tuple[CLIP, Tokenizer]:
    """An untrained model, with batch-norm statistics of a batch, and its tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = build_clip(config, CAPTIONS)
    if not config.pretrained:
        model.encode_image(random_pixels(config))
    return model.eval(), tokenizer


def random_pixels(config: Config, seed: int = 0, count: int = 4) -> Tensor:
    """Random images (count, 3, S, S) `uint8`."""
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def max_relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance of a pair of tensors, relative to the norm of the second.

    The norm counts as at least 1e-5 of the norm of all, because some tensors are zero but for
    rounding, such as the gradient of a key's bias.
    """
    assert ours.keys() == theirs.keys()
    total = sum(tensor.double().square().sum() for tensor in theirs.values()).sqrt()
    assert total > 0
    errors = [
        (ours[name] - tensor).double().norm() / (tensor.double().norm() + 1e-5 * total)
        for name, tensor in theirs.items()
    ]
    return max(errors).item()


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training, 12 dev and 12 test scenes in Kaggle's layout; never written to."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(folder, train=48, dev=12, test=12)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The folder of a finished small run on `shapes`, which is beside `runs`; never written to."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(shapes, folder / "shapes")
    before = Path.cwd()
    os.chdir(folder)
    try:
        trainer.main([*TINY, "--data-dir", "shapes"])
    finally:
        os.chdir(before)
    return folder / "runs" / "demo"


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def checkpoint(trained: Path, workdir: Path) -> Path:
    """A checkpoint without an index: `w.pt` in the current directory."""
    shutil.copy(trained / "best.pt", workdir / "w.pt")
    return Path("w.pt")


@pytest.fixture
def images(shapes: Path, workdir: Path) -> Path:
    """A folder of four images: `images` in the current directory."""
    return copy_images(shapes, workdir, 4)
