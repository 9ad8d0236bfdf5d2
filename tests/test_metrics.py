"""Retrieval metrics against a naive count, and exact ranking of a large index."""

import math
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import inference
from config import Config
from data import Split
from inference import METRICS, RECALLS, evaluate, recall_at_k, retrieval_metrics, top_matches
from models import build_wordpiece_tokenizer

# ---------------------------------------------------------------- metrics


def naive_metrics(
    images: np.ndarray, texts: np.ndarray, image_of_text: list[int]
) -> dict[str, float]:
    """Counts ranks one by one. An equal score ranks before the right answer."""
    scores = (texts @ images.T).tolist()
    t2i = []
    for row, image in zip(scores, image_of_text):
        t2i.append(sum(score >= row[image] for score in row))
    i2t = []
    for image in range(len(images)):
        own = [row[image] for row, owner in zip(scores, image_of_text) if owner == image]
        others = [row[image] for row, owner in zip(scores, image_of_text) if owner != image]
        i2t.append(1 + sum(score >= max(own) for score in others))
    values = []
    for ranks in (np.array(t2i), np.array(i2t)):
        values += [100 * np.mean(ranks <= k) for k in (1, 5, 10)]
        values.append(np.median(ranks))
    return dict(zip(METRICS, values))


@st.composite
def retrieval_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Embeddings of images with 1 to 4 captions each, in any order, and the image of each text.

    They are small integers, so that scores are exact and often equal.
    """
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=14))
    image_of_text = draw(st.permutations(np.repeat(range(len(counts)), counts).tolist()))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    images = rng.integers(-2, 3, (len(counts), 3)).astype(np.float32)
    texts = rng.integers(-2, 3, (len(image_of_text), 3)).astype(np.float32)
    return images, texts, image_of_text


@settings(max_examples=150, deadline=None)
@given(case=retrieval_cases(), scores_per_block=st.sampled_from([1, 30, 1024]))
def test_retrieval_metrics_match_naive_count(case: tuple, scores_per_block: int) -> None:
    """Recall and median rank, in blocks of any size."""
    images, texts, image_of_text = case
    metrics = retrieval_metrics(
        torch.from_numpy(images),
        torch.from_numpy(texts),
        torch.tensor(image_of_text),
        scores_per_block=scores_per_block,
    )
    assert metrics == pytest.approx(naive_metrics(images, texts, image_of_text))


def test_retrieval_metrics_of_worked_example() -> None:
    """Ties, and unequal numbers of captions: 3 of image 0, 2 of image 1 and 1 of each other."""
    scores = torch.tensor(
        [  # one column per image; in the comment the image of the text, and the rank of that image
            [9.0, 1, 1, 1, 1, 1],  # image 0, rank 1
            [2.0, 3, 2, 0, 0, 0],  # image 0, rank 3: one larger and one equal score
            [0.0, 1, 1, 1, 1, 1],  # image 0, rank 6
            [4.0, 4, 0, 0, 0, 0],  # image 1, rank 2: one equal score
            [0.0, 7, 0, 0, 0, 0],  # image 1, rank 1
            [0.0, 0, 5, 0, 0, 0],  # image 2, rank 1
            [0.0, 0, 0, 1, 0, 0],  # image 3, rank 1
            [0.0, 0, 0, 0, 3, 0],  # image 4, rank 1
            [0.0, 0, 0, 0, 0, 3],  # image 5, rank 1
        ]
    )
    t2i_ranks = [1, 3, 6, 2, 1, 1, 1, 1, 1]
    # The best score of an image's own texts is 9, 7, 5, 1, 3 and 3. Only for image 3 do texts of
    # other images score as much: two of them score 1.
    i2t_ranks = [1, 1, 1, 3, 1, 1]
    metrics = retrieval_metrics(torch.eye(6), scores, torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5]))
    assert metrics["t2i_r1"] == pytest.approx(100 * 6 / 9)
    assert metrics["t2i_r5"] == pytest.approx(100 * 8 / 9)
    assert metrics["t2i_r10"] == 100
    assert metrics["i2t_r1"] == pytest.approx(100 * 5 / 6)
    assert metrics["i2t_r5"] == 100
    assert metrics["i2t_r10"] == 100
    assert metrics["t2i_medr"] == np.median(t2i_ranks)
    assert metrics["i2t_medr"] == np.median(i2t_ranks)


@pytest.mark.parametrize("value", [0.5, math.nan, math.inf])
def test_retrieval_metrics_are_zero_for_equal_embeddings(value: float) -> None:
    images = torch.full((20, 4), value)
    texts = torch.full((100, 4), value)
    metrics = retrieval_metrics(images, texts, torch.arange(20).repeat_interleave(5))
    assert metrics == {**dict.fromkeys(RECALLS, 0.0), "t2i_medr": 20, "i2t_medr": 96}


def test_retrieval_metrics_rank_nan_before_the_right_answer() -> None:
    """One text whose embedding is NaN is not found, and ranks first for every image."""
    texts = torch.eye(12)
    texts[3] = math.nan
    metrics = retrieval_metrics(torch.eye(12), texts, torch.arange(12))
    assert metrics["t2i_r10"] == pytest.approx(100 * 11 / 12)
    assert metrics["i2t_r1"] == 0.0


def test_retrieval_metrics_of_perfect_model() -> None:
    """Recall 100 and median rank 1."""
    texts = torch.eye(12).repeat_interleave(5, 0)
    metrics = retrieval_metrics(torch.eye(12), texts, torch.arange(12).repeat_interleave(5))
    assert metrics == {**dict.fromkeys(RECALLS, 100.0), "t2i_medr": 1.0, "i2t_medr": 1.0}


@settings(max_examples=100, deadline=None)
@given(
    captions=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=14),
    scores_per_block=st.sampled_from([1, 30, 1024]),
    seed=st.integers(0, 10_000),
)
def test_retrieval_metrics_count_every_image_of_a_text(
    captions: list[list[int]], scores_per_block: int, seed: int
) -> None:
    """`captions[i]` are the texts of image i, by their numbers. Each text is ranked once."""
    rng = np.random.default_rng(seed)
    numbers = sorted({number for texts in captions for number in texts})
    images = rng.integers(-2, 3, (len(captions), 3)).astype(np.float32)
    texts = rng.integers(-2, 3, (len(numbers), 3)).astype(np.float32)
    right = np.array([[number in own for own in captions] for number in numbers])
    expected = []
    for scores, is_right in ((texts @ images.T, right), (images @ texts.T, right.T)):
        ranks = [
            1 + sum(row[~own] >= row[own].max()) for row, own in zip(scores, is_right, strict=True)
        ]
        expected += [100 * np.mean(np.array(ranks) <= k) for k in (1, 5, 10)]
        expected.append(np.median(ranks))
    metrics = retrieval_metrics(
        torch.from_numpy(images),
        torch.from_numpy(texts),
        torch.arange(len(captions)).repeat_interleave(torch.tensor([len(c) for c in captions])),
        scores_per_block=scores_per_block,
        text_ids=torch.tensor([numbers.index(number) for own in captions for number in own]),
    )
    assert metrics == pytest.approx(dict(zip(METRICS, expected)))


def class_prompts(folder: Path, count: int = 120) -> Split:
    """Images of 8 brightnesses, each with the prompt of its class."""
    paths, captions = [], []
    for i in range(count):
        paths.append(folder / f"{i}.png")
        Image.new("L", (32, 32), 30 * (i % 8)).save(paths[-1])
        captions.append([f"a photo of class {i % 8}"])
    return Split(paths, captions)


class PerfectTower(torch.nn.Module):
    """Encodes the class of an image or a text of `class_prompts` as one of 8 unit vectors."""

    def __init__(self, encode: Callable) -> None:
        super().__init__()
        self.encode = encode

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.eye(8)[self.encode(*inputs)]


def test_evaluate_gives_a_perfect_classifier_100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = class_prompts(tmp_path)
    tokenizer = build_wordpiece_tokenizer(split.texts, 16)
    class_of_token = {tokenizer.token_to_id(str(i)): i for i in range(8)}
    encoded = []

    def encode_text(ids: Tensor, mask: Tensor) -> Tensor:
        encoded.append(len(ids))
        return torch.tensor(
            [class_of_token[row[mask.bool()[i]][-2].item()] for i, row in enumerate(ids)]
        )

    model = SimpleNamespace(
        image=PerfectTower(lambda pixels: pixels[:, 0, 0, 0].long() // 30),
        text=PerfectTower(encode_text),
    )
    monkeypatch.setattr(inference, "eval_image_size", lambda *_: 32)
    config = Config(projection_dim=8)
    metrics = evaluate(model, tokenizer, split, config, torch.device("cpu"))
    assert metrics == {**dict.fromkeys(RECALLS, 100.0), "t2i_medr": 1.0, "i2t_medr": 1.0}
    assert encoded == [8]


def test_evaluate_lets_workers_load_images_while_it_encodes_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []

    class Loader:
        def __iter__(self) -> Iterator[dict]:  # where a DataLoader starts its workers
            events.append("images")
            return iter([])

    def encode_texts(*_: object) -> Tensor:
        events.append("texts")
        return torch.eye(8)

    monkeypatch.setattr(inference, "encode_texts", encode_texts)
    monkeypatch.setattr(inference, "encode_images", lambda *_: (torch.eye(8).repeat(15, 1), {}))
    model = SimpleNamespace(image=None, text=None)
    evaluate(model, None, class_prompts(tmp_path), Config(), torch.device("cpu"), loader=Loader())
    assert events == ["images", "texts"]


def test_metrics_are_six_recalls_and_two_median_ranks() -> None:
    assert METRICS[:4] == ["t2i_r1", "t2i_r5", "t2i_r10", "t2i_medr"]
    assert METRICS[4:] == ["i2t_r1", "i2t_r5", "i2t_r10", "i2t_medr"]
    assert METRICS[:3] + METRICS[4:7] == RECALLS


@given(ranks=st.lists(st.integers(1, 20), min_size=1, max_size=50), k=st.integers(1, 20))
def test_recall_at_k_is_percentage_of_ranks_up_to_k(ranks: list[int], k: int) -> None:
    found = [rank for rank in ranks if rank <= k]
    expected = 100 * len(found) / len(ranks)
    assert recall_at_k(torch.tensor(ranks), k) == pytest.approx(expected)


# ---------------------------------------------------------------- ranking


@pytest.mark.parametrize("n", [1, 3, 30, 500])
def test_top_matches_are_the_head_of_a_full_sort(n: int) -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(4, 8)).astype(np.float32)
    images = rng.normal(size=(30, 8)).astype(np.float32)
    scores, indices = top_matches(torch.from_numpy(queries), torch.from_numpy(images), n)
    all_scores = queries @ images.T
    assert indices.tolist() == np.argsort(-all_scores, axis=1)[:, :n].tolist()
    np.testing.assert_allclose(scores.numpy(), -np.sort(-all_scores, axis=1)[:, :n], rtol=1e-5)


@pytest.mark.parametrize("n", [1, 8, 70, 2000])
@pytest.mark.parametrize("num_images", [63, 1000, 1111])
@pytest.mark.parametrize("scores_per_block", [1, 600, 2**24])
def test_top_matches_are_exact_for_any_block_size(
    n: int, num_images: int, scores_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "SCORES_PER_BLOCK", scores_per_block)
    monkeypatch.setattr(inference, "MAX_QUERIES", 2)  # of the three
    images = torch.randn(num_images, 16, generator=torch.Generator().manual_seed(n))
    scores, indices = top_matches(images[:3], images, n)
    expected_scores, expected_indices = (images[:3] @ images.T).sort(descending=True)
    assert indices.tolist() == expected_indices[:, :n].tolist()
    torch.testing.assert_close(scores, expected_scores[:, :n])


def test_top_matches_contain_a_nan_of_a_large_index() -> None:
    """NaN ranks first, so that a search notices it."""
    images = torch.randn(1000, 16)
    images[777] = math.nan
    scores, _ = top_matches(images[:2], images, 3)
    assert not scores.isfinite().all()


def test_top_matches_memory_does_not_grow_with_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "SCORES_PER_BLOCK", 2**16)
    peaks = []
    for num_images in (20_000, 400_000):
        images = torch.zeros(num_images, 8)
        tracemalloc.start()
        top_matches(images[:4], images, 8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("num_queries", [1, 4])
def test_top_matches_are_exact_for_an_index_beyond_the_cache(
    num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By threads, each of which reads a part of the images."""
    monkeypatch.setattr(inference, "CACHED_BYTES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    images = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    queries = images[-num_queries:]
    scores, indices = top_matches(queries, images, 1000)
    expected_scores, expected_indices = (queries @ images.T).sort(descending=True)
    assert indices.tolist() == expected_indices.tolist()
    torch.testing.assert_close(scores, expected_scores)


# ---------------------------------------------------------------- hub correction


def test_hub_bias_equals_naive_mean_of_nearest_references() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = normalize(torch.randn(50, 8, generator=generator), dim=-1)
    references = normalize(torch.randn(40, 8, generator=generator), dim=-1).half()
    for block_size in (7, 4096):
        bias = inference.hub_bias(embeddings, references, block_size)
        for embedding, value in zip(embeddings, bias, strict=True):
            cosines = sorted(float(embedding @ reference.float()) for reference in references)
            nearest = cosines[-inference.NNN_K :]
            assert value == pytest.approx(inference.NNN_ALPHA * np.mean(nearest), abs=1e-5)


def test_hub_bias_stops_a_hub_from_winning() -> None:
    """An image near to all texts is the first match of most of them, until it is corrected."""
    generator = torch.Generator().manual_seed(0)
    common = torch.zeros(16)
    common[0] = 1.0
    images = normalize(torch.randn(30, 16, generator=generator), dim=-1)
    texts = normalize(0.8 * images + common, dim=-1)  # nearer to the hub than to their images
    references = normalize(torch.randn(200, 16, generator=generator) / 4 + common, dim=-1)
    images[0] = common  # the hub
    image_of_text = torch.arange(30)
    raw = retrieval_metrics(images, texts, image_of_text)
    bias = inference.hub_bias(images, references)
    corrected = retrieval_metrics(images, texts, image_of_text, image_bias=bias)
    assert bias.argmax() == 0
    assert corrected["t2i_r1"] > raw["t2i_r1"] + 20


def test_retrieval_metrics_subtract_both_biases() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 8, generator=generator)
    texts = torch.randn(30, 8, generator=generator)
    image_bias = torch.randn(12, generator=generator)
    text_bias = torch.randn(30, generator=generator)
    image_of_text = torch.arange(30) % 12
    metrics = retrieval_metrics(images, texts, image_of_text, 5, image_bias, text_bias)
    ones = torch.ones(30, 1)
    # The same by an additional dimension, for each direction on its own.
    t2i = retrieval_metrics(
        torch.hstack([images, -image_bias[:, None]]), torch.hstack([texts, ones]), image_of_text
    )
    i2t = retrieval_metrics(
        torch.hstack([images, ones[:12]]), torch.hstack([texts, -text_bias[:, None]]), image_of_text
    )
    for name in METRICS:
        assert metrics[name] == pytest.approx((t2i if name.startswith("t2i") else i2t)[name])


def test_hub_bias_of_fewer_references_than_k_is_their_mean() -> None:
    embeddings = normalize(torch.randn(5, 8), dim=-1)
    references = normalize(torch.randn(3, 8), dim=-1)
    expected = inference.NNN_ALPHA * (embeddings @ references.T).mean(dim=1)
    torch.testing.assert_close(inference.hub_bias(embeddings, references), expected)


def test_encode_references_samples_pairs_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 10,000, and none of fewer than 1,000."""

    def vectors(names: list[str]) -> Tensor:
        numbers = [int(name.partition(" ")[0]) for name in names]
        return torch.tensor([[n // 128, n % 128] for n in numbers]).float()  # exact in float16

    def encode_texts(_: object, __: object, texts: list[str], ___: object) -> Tensor:
        captions.append(texts)
        return -vectors(texts)

    def encode_images(_: object, paths: list[Path], *__: object) -> tuple[Tensor, dict]:
        return vectors([path.name for path in paths]), {}

    def sample(count: int, seed: int) -> inference.References | None:
        paths = [Path(str(i)) for i in range(count)]
        split = Split(paths, [[f"{i} one", f"{i} two"] for i in range(count)])
        config = Config(seed=seed)
        return inference.encode_references(model, None, split, config, torch.device("cpu"))

    captions: list[list[str]] = []
    model = SimpleNamespace(image=None, text=None)
    monkeypatch.setattr(inference, "encode_texts", encode_texts)
    monkeypatch.setattr(inference, "encode_images", encode_images)
    first, again, other = sample(10_500, 3), sample(10_500, 3), sample(10_500, 4)
    for references in (first, again, other):
        assert len(references.images.unique(dim=0)) == len(references.images) == 10_000
        assert torch.equal(references.images, -references.texts)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert captions[0] == captions[1] != captions[2]
    assert {text.partition(" ")[2] for text in captions[0]} == {"one", "two"}
    assert sample(999, 0) is None
    assert len(sample(1000, 0).images) == 1000


def test_evaluate_corrects_images_by_texts_and_texts_by_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts, of_images, of_texts = (
        normalize(torch.randn(count, 8, generator=generator), dim=-1) for count in (20, 40, 30, 30)
    )
    references = inference.References(of_images.half(), of_texts.half())
    split = Split([Path(str(i)) for i in range(20)], [[f"{i} a", f"{i} b"] for i in range(20)])
    monkeypatch.setattr(inference, "encode_texts", lambda *_: texts)
    monkeypatch.setattr(inference, "encode_images", lambda *_: (images, {}))
    model = SimpleNamespace(image=None, text=None)
    metrics = evaluate(model, None, split, Config(), torch.device("cpu"), references, loader=[])
    expected = retrieval_metrics(
        images,
        texts,
        torch.arange(20).repeat_interleave(2),
        image_bias=inference.hub_bias(images, references.texts),
        text_bias=inference.hub_bias(texts, references.images),
    )
    assert {name: metrics[f"{name}_nnn"] for name in METRICS} == expected
