"""`--chunk-size`: the same step of the weights, with the activations of one chunk in memory instead of a batch's."""

import json
import math
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import (
    CAPTIONS,
    CONFIG,
    FILES,
    ROOT,
    STEPS,
    TINY,
    assert_same_tensors,
    at_step,
    build,
    curve,
    farthest,
    names_in,
    pictures,
    script,
)
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
import trainer
from data import collate
from models import CLIP, TokenBatches, contrastive_loss

BATCH = 10
Batch = tuple[Tensor, TokenBatches]


@pytest.fixture
def tiny() -> tuple:
    """A model in training mode, with dropout in its heads and its text encoder, blocks of its image encoder that are
    skipped, and its tokeniser."""
    model, tokenizer = build(replace(CONFIG, dropout=0.3, drop_path=0.3))
    for norm in norms(model):
        nn.init.uniform_(
            norm.weight, 0.5, 1.5
        )  # timm starts some with nought, before which nothing has a gradient
    return model.train(), tokenizer


def batch_of(tokenizer, chunk_size: int) -> Batch:
    """Ten pairs as the training loader gives them."""
    captions = [" ".join([CAPTIONS[i % 4]] * (1 + i // 4)) for i in range(BATCH)]
    pixels = pictures(CONFIG, count=BATCH).permute(0, 2, 3, 1).numpy()
    return collate(list(zip(pixels, captions)), tokenizer, min(3, chunk_size or BATCH))


def gradients(
    model: CLIP, embeddings_and_scale: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    """Of every parameter that the loss depends on; the model's own are left empty."""
    contrastive_loss(*embeddings_and_scale).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def plainly(
    model: CLIP, pixels: Tensor, texts: TokenBatches, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same chunks in the same order, with all their activations kept."""
    text_embeddings = [model.encode_text(ids, mask) for ids, mask in texts]
    image_embeddings = [
        model.encode_image(chunk)
        for chunk in pixels.tensor_split(math.ceil(len(pixels) / chunk_size))
    ]
    return torch.cat(image_embeddings), torch.cat(text_embeddings), model.logit_scale.exp()


def norms(model: CLIP) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def without_chance(model: CLIP) -> CLIP:
    """The model in training mode, without dropout and with every block in its place."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def still(model: CLIP) -> CLIP:
    """The model in training mode, without what makes a chunk differ from the batch: chance and batch statistics."""
    for norm in norms(without_chance(model)):
        norm.eval()
    return model


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, BATCH])
def test_with_dropout_the_gradients_are_those_of_the_same_chunks_with_all_activations_kept(
    tiny: tuple, chunk_size: int, precision: torch.dtype
):
    model, tokenizer = tiny
    batch = batch_of(tokenizer, chunk_size)
    found = []
    for encode, seed in ((model, 1), (plainly, 1), (plainly, 2)):
        torch.manual_seed(seed)
        inputs = (*batch, chunk_size) if encode is model else (model, *batch, chunk_size)
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            embeddings_and_scale = encode(*inputs)
        found.append(gradients(model, embeddings_and_scale))
    chunked, kept, of_other_draws = found
    assert farthest(chunked, kept) < 1e-4
    assert farthest(chunked, of_other_draws) > 0.1
    nought = {name for name, gradient in kept.items() if gradient.norm() < 1e-4}
    assert all(name.endswith("k_lin.bias") for name in nought)  # a key's bias moves no attention


def test_dropout_is_at_work_in_both_towers(tiny: tuple):
    model, tokenizer = tiny
    for norm in norms(model):
        norm.eval()
    for one, other in zip(*(model(*batch_of(tokenizer, 4), chunk_size=4)[:2] for _ in range(2))):
        assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("chunk_size", [1, 3, 5, BATCH, 64])
def test_without_dropout_and_batch_statistics_the_gradients_are_those_of_the_whole_batch(
    tiny: tuple, chunk_size: int
):
    model, tokenizer = still(tiny[0]), tiny[1]
    whole = gradients(model, model(*batch_of(tokenizer, 0)))
    chunked = gradients(model, model(*batch_of(tokenizer, chunk_size), chunk_size))
    assert farthest(chunked, whole) < 1e-4


def test_each_pair_has_all_others_as_its_negatives_and_not_those_of_its_chunk_alone(tiny: tuple):
    model, tokenizer = still(tiny[0]), tiny[1]
    whole = contrastive_loss(*model(*batch_of(tokenizer, 0)))
    images, texts, scale = model(*batch_of(tokenizer, 5), chunk_size=5)
    assert contrastive_loss(images, texts, scale).item() == pytest.approx(whole.item(), rel=1e-5)
    halves = [
        contrastive_loss(images[half], texts[half], scale) for half in (slice(5), slice(5, None))
    ]
    assert sum(halves).item() / 2 < whole.item() - 0.3


# ---------------------------------------------------------------- batch norm


def statistics(model: CLIP) -> dict[str, Tensor]:
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith(kinds)}


def after_a_step(model: CLIP, batch: Batch, chunk_size: int) -> dict[str, Tensor]:
    gradients(model, model(*batch, chunk_size))
    return statistics(model)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[bool]:
    return [torch.equal(ours[name], value) for name, value in theirs.items()]


@pytest.mark.parametrize("chunk_size", [4, 5])
def test_batch_norm_counts_each_chunk_once_in_its_statistics(tiny: tuple, chunk_size: int):
    model, tokenizer = without_chance(tiny[0]), tiny[1]
    batch, before, momenta = (
        batch_of(tokenizer, chunk_size),
        statistics(model),
        [norm.momentum for norm in norms(model)],
    )
    other = deepcopy(model)
    other.encode_text(*batch[1][0])
    for chunk in batch[0].tensor_split(math.ceil(BATCH / chunk_size)):
        other.encode_image(chunk)
    after = after_a_step(model, batch, chunk_size)
    assert len(after) == 3 * len(momenta) > 0
    assert all(equal(after, statistics(other)))
    assert not any(equal(after, before))
    assert [norm.momentum for norm in norms(model)] == momenta
    assert all(momenta)


def test_it_would_count_them_twice_if_nobody_kept_its_statistics(
    tiny: tuple, monkeypatch: pytest.MonkeyPatch
):
    model, tokenizer = tiny
    batch, other = batch_of(tokenizer, 4), deepcopy(model)
    after = after_a_step(model, batch, 4)
    monkeypatch.setattr(models, "frozen_bn_stats", lambda tower: nullcontext())
    assert not any(equal(after, after_a_step(other, batch, 4)))


def test_statistics_that_stand_still_are_left_alone(tiny: tuple):
    model, tokenizer = still(tiny[0]), tiny[1]
    before = statistics(model)
    assert all(equal(after_a_step(model, batch_of(tokenizer, 4), 4), before))


# ---------------------------------------------------------------- memory

STEPS_THAT_GROW = """
import json, resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from conftest import CAPTIONS, CONFIG, build, pictures
from data import tokenize
from models import contrastive_loss

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

model, tokenizer = build(CONFIG)
model.train()
peaks = []
for batch, chunk_size in ((32, 32), (512, 32), (512, 0)):
    group = chunk_size or batch // 4
    texts = [tokenize(tokenizer, (CAPTIONS * 128)[:group]) for _ in range(batch // group)]
    contrastive_loss(*model(pictures(CONFIG, count=batch), texts, chunk_size)).backward()
    peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_memory_holds_one_chunk_of_activations_however_large_the_batch(tmp_path: Path):
    (tmp_path / "steps.py").write_text(
        STEPS_THAT_GROW.format(root=str(ROOT), tests=str(Path(__file__).parent))
    )
    done = script(str(tmp_path / "steps.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    small, chunked, whole = json.loads(
        done.stdout
    )  # the peak after each of three steps, larger ones later
    assert whole - small > 100 * 1024  # kilobytes
    assert chunked - small < (whole - small) / 4


# ---------------------------------------------------------------- the command


def test_a_run_in_chunks_trains_and_goes_on_after_a_break_as_if_there_had_been_none(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = [
        *TINY,
        "--dropout",
        "0.3",
        "--drop-path",
        "0.3",
        "--chunk-size",
        "4",
        "--data-dir",
        str(shapes),
    ]
    (workdir / "unbroken").mkdir()
    done = script("trainer.py", *flags, cwd=workdir / "unbroken")
    assert done.returncode == 0, done.stderr
    unbroken, broken = workdir / "unbroken/runs/demo", workdir / "runs/demo"
    assert names_in(unbroken) == FILES
    losses = pd.read_csv(unbroken / "metrics.csv")["train_loss"]
    assert losses[1] < losses[0]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trainer, "contrastive_loss", at_step(STEPS + 3, KeyboardInterrupt()))
        trainer.main(flags)
    assert len(curve(broken)) == 1
    trainer.main(["--resume", "runs/demo/last.pt"])
    assert_same_tensors(broken / "last.pt", unbroken / "last.pt")
    pd.testing.assert_frame_equal(curve(broken), curve(unbroken))


def test_a_step_of_the_trainer_encodes_no_more_at_a_time_than_a_chunk(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, original = {"ImageEncoder": set(), "TextEncoder": set()}, models.checkpointed_encode

    def encode(tower: nn.Module, *inputs: Tensor) -> Tensor:
        seen[type(tower.encoder).__name__].add(len(inputs[0]))
        return original(tower, *inputs)

    monkeypatch.setattr(models, "checkpointed_encode", encode)
    trainer.main([*TINY, "--epochs", "1", "--chunk-size", "3", "--data-dir", str(shapes)])
    assert seen == {"ImageEncoder": {3, 2}, "TextEncoder": {2}}  # of batches of eight
