"""`--chunk-size`: the same optimizer step with the activations of one chunk in memory at a time."""

import json
import math
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    max_relative_error,
    names_in,
    random_pixels,
    script,
)
from timm.layers import DropPath
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
import trainer
from data import collate
from models import CLIP, TokenBatches, contrastive_loss

BATCH_SIZE = 10
ModelAndTokenizer = tuple[CLIP, Tokenizer]


@pytest.fixture
def tiny() -> ModelAndTokenizer:
    """A model in train mode with dropout and stochastic depth, and its tokenizer."""
    model, tokenizer = build(replace(CONFIG, dropout=0.3, drop_path=0.3))
    for norm in batch_norms(model):
        # timm initializes some with zero, and no gradient passes a zero.
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.train(), tokenizer


def make_batch(tokenizer: Tokenizer, chunk_size: int) -> dict[str, Any]:
    """Ten pairs as the training loader yields them, without `caption_ids`."""
    pixels = random_pixels(CONFIG, count=BATCH_SIZE).permute(0, 2, 3, 1).numpy()
    items = []
    for i in range(BATCH_SIZE):
        caption = " ".join([CAPTIONS[i % 4]] * (1 + i // 4))
        items.append({"pixels": pixels[i], "caption": caption})
    batch = collate(items, tokenizer, bucket_size=min(3, chunk_size or BATCH_SIZE))
    del batch["caption_ids"]  # which the model does not take
    return batch


def gradients(model: CLIP, outputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The gradient of the loss with respect to each parameter; the model's own are zeroed."""
    contrastive_loss(*outputs).backward()
    copies = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return copies


def encode_and_keep_activations(
    model: CLIP, pixels: Tensor, texts: TokenBatches, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same chunks in the same order, with all activations in memory."""
    text_embeddings = [model.encode_text(ids, mask) for ids, mask in texts]
    chunks = pixels.tensor_split(math.ceil(len(pixels) / chunk_size))
    image_embeddings = [model.encode_image(chunk) for chunk in chunks]
    return torch.cat(image_embeddings), torch.cat(text_embeddings), model.logit_scale.exp()


def batch_norms(model: CLIP) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def without_randomness(model: CLIP) -> CLIP:
    """The model in train mode, without dropout and stochastic depth."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # of DistilBERT's attention in transformers 4
            module.dropout_prob = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def deterministic(model: CLIP) -> CLIP:
    """The model in train mode, where each embedding depends on its own input only."""
    for norm in batch_norms(without_randomness(model)):
        norm.eval()
    return model


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 4, 5, BATCH_SIZE])
def test_chunked_gradients_with_dropout_equal_those_of_kept_activations(
    tiny: ModelAndTokenizer, chunk_size: int, precision: torch.dtype
):
    """Both have the same chunks and seed. Another seed gives other gradients."""
    model, tokenizer = tiny
    batch = make_batch(tokenizer, chunk_size)

    def gradients_of(encode: Any, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        # Autocast caches 16-bit copies of the weights, in which `keep_activations` would sum the
        # gradients of all chunks in 16 bits. Recomputed chunks are each added in float32.
        autocast = torch.autocast(
            "cpu",
            precision,
            enabled=precision is not torch.float32,
            cache_enabled=encode is not keep_activations,
        )
        with autocast:
            outputs = encode(**batch, chunk_size=chunk_size)
        return gradients(model, outputs)

    def keep_activations(**inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return encode_and_keep_activations(model, **inputs)

    chunked = gradients_of(model, seed=1)
    kept = gradients_of(keep_activations, seed=1)
    other_seed = gradients_of(keep_activations, seed=2)
    assert max_relative_error(chunked, kept) < 1e-4
    assert max_relative_error(chunked, other_seed) > 0.1
    zero = {name for name, gradient in kept.items() if gradient.norm() < 1e-4}
    assert all(name.endswith("k_lin.bias") for name in zero)  # attention ignores a key's bias


def test_chunked_encode_applies_dropout_in_both_towers(tiny: ModelAndTokenizer):
    model, tokenizer = tiny
    for norm in batch_norms(model):
        norm.eval()
    batch = make_batch(tokenizer, 4)
    first_images, first_texts, _ = model(**batch, chunk_size=4)
    second_images, second_texts, _ = model(**batch, chunk_size=4)
    assert (first_images - second_images).abs().max() > 0.01
    assert (first_texts - second_texts).abs().max() > 0.01


@pytest.mark.parametrize("chunk_size", [1, 3, 5, BATCH_SIZE, 64])
def test_chunked_gradients_equal_those_of_the_whole_batch(tiny: ModelAndTokenizer, chunk_size: int):
    """Without dropout and batch statistics."""
    model, tokenizer = tiny
    deterministic(model)
    whole = gradients(model, model(**make_batch(tokenizer, 0)))
    chunked = gradients(model, model(**make_batch(tokenizer, chunk_size), chunk_size=chunk_size))
    assert max_relative_error(chunked, whole) < 1e-4


def test_chunked_loss_has_the_whole_batch_as_negatives(tiny: ModelAndTokenizer):
    """Not only the pairs of a chunk, which would give a smaller loss."""
    model, tokenizer = tiny
    deterministic(model)
    whole = contrastive_loss(*model(**make_batch(tokenizer, 0)))
    images, texts, scale = model(**make_batch(tokenizer, 5), chunk_size=5)
    assert contrastive_loss(images, texts, scale).item() == pytest.approx(whole.item(), rel=1e-5)
    first_half = contrastive_loss(images[:5], texts[:5], scale)
    second_half = contrastive_loss(images[5:], texts[5:], scale)
    assert (first_half + second_half).item() / 2 < whole.item() - 0.3


# ---------------------------------------------------------------- batch norm


def bn_statistics(model: CLIP) -> dict[str, Tensor]:
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith(kinds)}


def bn_statistics_after_step(model: CLIP, batch: dict, chunk_size: int) -> dict[str, Tensor]:
    """The statistics after a forward and a backward pass."""
    gradients(model, model(**batch, chunk_size=chunk_size))
    return bn_statistics(model)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[bool]:
    return [torch.equal(ours[name], value) for name, value in theirs.items()]


@pytest.mark.parametrize("chunk_size", [4, 5])
def test_bn_statistics_count_each_chunk_once(tiny: ModelAndTokenizer, chunk_size: int):
    model, tokenizer = tiny
    without_randomness(model)
    batch = make_batch(tokenizer, chunk_size)
    before = bn_statistics(model)
    momenta = [norm.momentum for norm in batch_norms(model)]

    other = deepcopy(model)
    other.encode_text(*batch["texts"][0])
    for chunk in batch["pixels"].tensor_split(math.ceil(BATCH_SIZE / chunk_size)):
        other.encode_image(chunk)

    after = bn_statistics_after_step(model, batch, chunk_size)
    assert len(after) == 3 * len(momenta) > 0
    assert all(equal(after, bn_statistics(other)))
    assert not any(equal(after, before))
    assert [norm.momentum for norm in batch_norms(model)] == momenta
    assert all(momenta)


def test_bn_statistics_count_twice_without_frozen_bn_stats(
    tiny: ModelAndTokenizer, monkeypatch: pytest.MonkeyPatch
):
    """So the test above detects the error that `frozen_bn_stats` prevents."""
    model, tokenizer = tiny
    batch = make_batch(tokenizer, 4)
    other = deepcopy(model)
    after = bn_statistics_after_step(model, batch, 4)
    monkeypatch.setattr(models, "frozen_bn_stats", lambda tower: nullcontext())
    assert not any(equal(after, bn_statistics_after_step(other, batch, 4)))


def test_bn_statistics_in_eval_mode_stay_unchanged(tiny: ModelAndTokenizer):
    model, tokenizer = tiny
    deterministic(model)
    before = bn_statistics(model)
    after = bn_statistics_after_step(model, make_batch(tokenizer, 4), 4)
    assert all(equal(after, before))


# ---------------------------------------------------------------- memory


def num_graph_nodes(embeddings: Tensor) -> int:
    """The number of autograd's nodes that the embeddings depend on."""
    nodes, to_visit = set(), [embeddings.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node and node not in nodes:
            nodes.add(node)
            to_visit += [child for child, _ in node.next_functions]
    return len(nodes)


def test_chunks_keep_no_graph_of_their_first_pass(tiny: ModelAndTokenizer):
    """Else its small allocations fragment the heap, and memory grows with the batch."""
    model, tokenizer = tiny
    kept, _, _ = model(**make_batch(tokenizer, 0))
    chunked, _, _ = model(**make_batch(tokenizer, 5), chunk_size=5)
    assert num_graph_nodes(kept) > 100
    assert num_graph_nodes(chunked) <= 5  # of two chunks and their concatenation


MEASURE_PEAK_MEMORY = """
import json, re, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from conftest import CAPTIONS, CONFIG, build, random_pixels
from data import tokenize
from models import contrastive_loss

model, tokenizer = build(CONFIG)
model.train()
peaks = []
for batch_size, chunk_size in ((32, 32), (512, 32), (512, 0)):
    bucket_size = chunk_size or batch_size // 4
    captions = (CAPTIONS * 128)[:bucket_size]
    texts = [tokenize(tokenizer, captions) for _ in range(batch_size // bucket_size)]
    pixels = random_pixels(CONFIG, count=batch_size)
    contrastive_loss(*model(pixels, texts, chunk_size)).backward()
    status = Path("/proc/self/status").read_text()  # getrusage begins at the parent's peak
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]))
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from Linux")
def test_chunked_peak_memory_is_that_of_one_chunk(tmp_path: Path):
    """Whatever the batch size. The peaks are measured after steps of growing memory."""
    program = tmp_path / "measure.py"
    tests = str(Path(__file__).parent)
    program.write_text(MEASURE_PEAK_MEMORY.format(root=str(ROOT), tests=tests))
    result = script(str(program), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    small, chunked, whole = json.loads(result.stdout)  # kilobytes
    assert whole - small > 100 * 1024
    assert chunked - small < (whole - small) / 4


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_chunked_run_resumes_bit_for_bit(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    """An interrupted and resumed run with chunks and dropout ends like an uninterrupted one."""
    flags = [*TINY, "--data-dir", str(shapes), "--chunk-size", "4"]
    flags += ["--dropout", "0.3", "--drop-path", "0.3"]
    (workdir / "uninterrupted").mkdir()
    result = script("trainer.py", *flags, cwd=workdir / "uninterrupted")
    assert result.returncode == 0, result.stderr
    uninterrupted = workdir / "uninterrupted/runs/demo"
    interrupted = workdir / "runs/demo"
    assert names_in(uninterrupted) == FILES
    losses = pd.read_csv(uninterrupted / "metrics.csv")["train_loss"]
    assert losses[1] < losses[0]

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trainer, "contrastive_loss", at_step(STEPS + 3, KeyboardInterrupt()))
        trainer.main(flags)
    assert len(curve(interrupted)) == 1
    trainer.main(["--resume", "runs/demo/last.pt"])
    assert_same_tensors(interrupted / "last.pt", uninterrupted / "last.pt")
    pd.testing.assert_frame_equal(curve(interrupted), curve(uninterrupted))


@pytest.mark.slow
def test_train_step_encodes_at_most_a_chunk_at_a_time(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = {"ImageEncoder": set(), "TextEncoder": set()}
    original = models.checkpointed_encode

    def encode(tower: nn.Module, *inputs: Tensor) -> Tensor:
        sizes[type(tower.encoder).__name__].add(len(inputs[0]))
        return original(tower, *inputs)

    monkeypatch.setattr(models, "checkpointed_encode", encode)
    trainer.main([*TINY, "--epochs", "1", "--chunk-size", "3", "--data-dir", str(shapes)])
    assert sizes == {"ImageEncoder": {3, 2}, "TextEncoder": {2}}  # of batches of 8
