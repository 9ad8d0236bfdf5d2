"""The evaluator of comparison.py, written apart from inference.py, agrees with it."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import recalls, trainer_py
from torch.nn.functional import normalize

from inference import METRICS, retrieval_metrics

RECALLS = [name for name in METRICS if not name.endswith("medr")]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tied", (True, False))
def test_both_evaluators_give_the_same_recalls(tied: bool, seed: int):
    """Also where many cosine_similarity are equal, and where pictures have unequal numbers of captions."""
    rng = np.random.default_rng(seed)
    of = np.sort(np.concatenate([np.arange(40), rng.integers(0, 40, 100)]))
    if tied:  # products of these are exact, in any order of summation
        images = rng.choice([-0.25, 0.25], (40, 16))
        texts = images[of] * np.where(rng.random((140, 16)) < 0.2, -1, 1)
    else:
        images = rng.standard_normal((40, 8))
        texts = images[of] + 0.7 * rng.standard_normal((140, 8))
    apart = recalls(images, texts, of)
    ours = retrieval_metrics(
        *(normalize(torch.tensor(x).float(), dim=1) for x in (images, texts)), torch.tensor(of)
    )
    assert apart == pytest.approx({name: ours[name] for name in RECALLS})
    assert 0 < apart["t2i_r1"] < 100
    assert 0 < apart["i2t_r1"] < 100


def test_weights_score_as_in_their_own_run(trained: Path, shapes: Path):
    options = Namespace(data_dir=str(shapes), split="test", image_size=32)
    row = trainer_py(options, str(trained / "best.pt"), Path())
    own = json.loads((trained / "test.json").read_text())
    assert [row[name] for name in RECALLS] == pytest.approx([own[name] for name in RECALLS])
    assert row["pairs"] == 2 * 48
