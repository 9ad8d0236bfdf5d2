"""The evaluator of comparison.py gives the same recalls as inference.py; benchmark_gpu.py runs."""

import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import hub_biases, recalls, trainer_py
from conftest import script

from inference import RECALLS, hub_bias, retrieval_metrics


@pytest.mark.parametrize("corrected", (True, False))
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tied", (True, False))
def test_recalls_agrees_with_retrieval_metrics(tied: bool, seed: int, corrected: bool) -> None:
    """Also where many cosines are equal, and images have different numbers of captions."""
    rng = np.random.default_rng(seed)
    image_of_text = np.sort(np.concatenate([np.arange(40), rng.integers(0, 40, 100)]))
    if tied:  # unit vectors whose products are exact, in any order of summation
        images = rng.choice([-0.25, 0.25], (40, 16)).astype(np.float32)
        flips = np.where(rng.random((140, 16)) < 0.2, -1, 1).astype(np.float32)
        texts = images[image_of_text] * flips
    else:
        images = unit_vectors(rng, 40)
        texts = images[image_of_text] + 0.7 * unit_vectors(rng, 140)
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    biases = ours_biases = (0.0, 0.0)
    if corrected:
        references = rng.choice([-0.25, 0.25], (50, images.shape[1])).astype(np.float32)
        biases = (hub_biases(images, references), hub_biases(texts, references))
        ours_biases = [
            hub_bias(torch.from_numpy(x), torch.from_numpy(references)) for x in (images, texts)
        ]
    independent = recalls(images, texts, image_of_text, *biases)
    ours = retrieval_metrics(
        torch.from_numpy(images),
        torch.from_numpy(texts),
        torch.from_numpy(image_of_text),
        256,
        *ours_biases,
    )
    assert independent == pytest.approx({name: ours[name] for name in RECALLS})
    assert 0 < independent["t2i_r1"] < 100
    assert 0 < independent["i2t_r1"] < 100


def unit_vectors(rng: np.random.Generator, num_vectors: int) -> np.ndarray:
    vectors = rng.standard_normal((num_vectors, 8), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_trainer_py_scores_a_checkpoint_as_its_run_did(trained: Path, shapes: Path) -> None:
    options = Namespace(data_dir=str(shapes), split="test", image_size=32)
    row = trainer_py(options, str(trained / "best.pt"), Path())
    metrics = json.loads((trained / "test.json").read_text())
    assert [row[name] for name in RECALLS] == pytest.approx([metrics[name] for name in RECALLS])
    assert row["pairs"] == 2 * 48


@pytest.mark.slow
def test_benchmark_of_a_gpu_runs_on_the_cpu(workdir: Path) -> None:
    """With small encoders and few images; only memory is measured on a GPU alone."""
    done = script("tests/benchmarks/benchmark.py", "--device", "cpu", cwd=workdir)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:-2]]
    assert len(rows) == 9
    for what, figure, *_ in rows:
        ratio = re.fullmatch(r"([\d.,]+) / ([\d.,]+) = ([\d.]+)", figure)
        assert ratio or not re.search("over|less", what), what
        if ratio:
            above, below, quotient = (float(number.replace(",", "")) for number in ratio.groups())
            assert quotient == pytest.approx(above / below, abs=0.05)
