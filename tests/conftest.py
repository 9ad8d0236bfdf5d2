"""What the tests share: a small data set of shapes, a run on it, and the command lines as a user types them."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
os.environ.update(
    HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
)  # tiny models: one is enough

import trainer  # noqa: E402
from config import Config  # noqa: E402
from data import generate_shapes  # noqa: E402
from models import (  # noqa: E402
    CLIP,
    Tower,
    build_image_encoder,
    load_text_encoder,
    text_encoder_from_scratch,
)
from trainer import main as train  # noqa: E402

TINY = [
    "--demo",
    "--image-size",
    "32",
    "--batch-size",
    "8",
    "--epochs",
    "2",
    "--num-workers",
    "0",
    "--device",
    "cpu",
]
STEPS = 6  # of such a run in an epoch: 48 pictures in batches of 8
FILES = ["best.pt", "curves.png", "last.pt", "metrics.csv", "test.json"]
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


# ---------------------------------------------------------------- commands


@functools.cache
def without_network() -> list[str]:
    """What to put before a command so that it has no network, where this system lets a user do that."""
    cut_off = ["unshare", "--map-root-user", "--net"]
    possible = (
        shutil.which("unshare")
        and subprocess.run([*cut_off, "true"], capture_output=True).returncode == 0
    )
    return cut_off if possible else []


def script(
    *command: str, cwd: Path, network: bool = True, processes: int = 0
) -> subprocess.CompletedProcess:
    """Runs `trainer.py ...` or `inference.py ...` in a process of its own, or in so many that torchrun starts."""
    name, *arguments = command
    cut_off = [] if network else without_network()
    environment = os.environ | {
        "HF_HOME": str(cwd / "empty-cache"),
        "TORCH_HOME": str(cwd / "empty-cache"),
    }
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes
        else []
    )
    with subprocess.Popen(
        [*cut_off, sys.executable, *torchrun, str(ROOT / name), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            printed, said = process.communicate(timeout=240)
        except BaseException:
            process.terminate()  # upon which torchrun ends its own
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, printed, said)


def at_step(step: int, what: object):
    """A loss that, at one step counted from 1, is multiplied by `what` or raises it."""
    steps = iter(range(1, 1_000_000))

    def loss(*batch: object, original=trainer.contrastive_loss) -> Tensor:
        value = original(*batch)
        if next(steps) != step:
            return value
        if isinstance(what, BaseException):
            raise what
        return value * what

    return loss


# ---------------------------------------------------------------- what a run leaves


def tensors(weights: Path) -> dict[str, Tensor]:
    return torch.load(weights, weights_only=True)["model"]


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def curve(folder: Path) -> pd.DataFrame:
    """`metrics.csv` to the last digit, without its two columns of times."""
    return pd.read_csv(folder / "metrics.csv", dtype=str).drop(columns=TIMES)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- tiny models


def build(config: Config) -> tuple[CLIP, Tokenizer]:
    """An untrained model whose batch-norm statistics are no longer those of a fresh one, and its tokeniser."""
    torch.manual_seed(0)
    load = (
        load_text_encoder(config)
        if config.pretrained
        else text_encoder_from_scratch(config, CAPTIONS)
    )
    image, (text, tokenizer) = build_image_encoder(config), load
    model = CLIP(Tower(image, config), Tower(text, config), config.temperature)
    if not config.pretrained:
        model.encode_image(pictures(config))
    return model.eval(), tokenizer


def pictures(config: Config, seed: int = 0, count: int = 4) -> Tensor:
    generator, side = torch.Generator().manual_seed(seed), config.image_size
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """How far apart two sets of tensors are: the worst of them, as a share of its length.

    What is next to nothing beside the others, such as the gradient of a key's bias, which is nought but for rounding,
    is measured by a hundred-thousandth of their length.
    """
    assert ours.keys() == theirs.keys()
    total = sum(tensor.double().square().sum() for tensor in theirs.values()).sqrt()
    assert total > 0
    apart = [
        (ours[name] - tensor).double().norm() / (tensor.double().norm() + 1e-5 * total)
        for name, tensor in theirs.items()
    ]
    return max(apart).item()


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training, 12 dev and 12 test scenes in the Kaggle layout; never written to."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(folder, train=48, dev=12, test=12)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The run folder of a finished tiny training; never written to."""
    workdir = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(workdir)
    try:
        train([*TINY, "--data-dir", str(shapes)])
    finally:
        os.chdir(before)
    return workdir / "runs" / "demo"


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
