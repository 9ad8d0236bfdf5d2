"""What the tests share: a small data set of shapes, a run on it, and the command lines as a user types them."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # tiny models: one is enough

from data import draw_shapes  # noqa: E402
from trainer import main as train  # noqa: E402

TINY = ["--demo", "--image-size", "32", "--batch-size", "8", "--epochs", "2", "--num-workers", "0", "--device", "cpu"]


@functools.cache
def without_network() -> list[str]:
    """What to put before a command so that it has no network, where this system lets a user do that."""
    cut_off = ["unshare", "--map-root-user", "--net"]
    possible = shutil.which("unshare") and subprocess.run([*cut_off, "true"], capture_output=True).returncode == 0
    return cut_off if possible else []


def script(*command: str, cwd: Path, network: bool = True) -> subprocess.CompletedProcess:
    """Runs `trainer.py ...` or `inference.py ...` in a process of its own."""
    name, *arguments = command
    cut_off = [] if network else without_network()
    environment = os.environ | {"HF_HOME": str(cwd / "empty-cache"), "TORCH_HOME": str(cwd / "empty-cache")}
    return subprocess.run(
        [*cut_off, sys.executable, str(ROOT / name), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training, 12 dev and 12 test scenes in the Kaggle layout; never written to."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    draw_shapes(folder, train=48, dev=12, test=12)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The run folder of a finished tiny training; never written to."""
    workplace = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(workplace)
    try:
        train([*TINY, "--data-dir", str(shapes)])
    finally:
        os.chdir(before)
    return workplace / "runs" / "demo"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
