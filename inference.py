"""Evaluation and search with a trained model.

python inference.py --weights runs/demo/best.pt --n 8
python inference.py --weights runs/clip/best.pt --images my/folder --query "a dog on a beach"
python inference.py --weights runs/clip/best.pt --like photo.jpg --images my/folder
python inference.py --weights runs/clip/best.pt --image photo.jpg --query "a dog" --query "a cat"
python inference.py --weights runs/clip/best.pt --evaluate
python inference.py --weights runs/clip/best.pt --serve
"""

import functools
import hashlib
import html
import json
import math
import os
import signal
import socket
import sys
import tempfile
import textwrap
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure  # not pyplot, which may look for a display
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config import Config, SearchConfig, UserError, cli_errors, parse, printable, progress
from data import (
    DECODING,
    ImageSource,
    Split,
    Transform,
    atomic_write,
    build_loader,
    leads_outside,
    list_images,
    load_image,
    read_splits,
    remove_leftovers,
    stack_images,
    tokenize,
)
from models import (
    CLIP,
    EVAL_SCALE,
    References,
    Tower,
    eval_image_size,
    load_checkpoint,
    load_clip,
    load_tower,
    pick_device,
)

RECALL_KS = (1, 5, 10)
DIRECTIONS = {"t2i": "text to image", "i2t": "image to text"}
MEASURES = [*(f"r{k}" for k in RECALL_KS), "medr"]
METRICS = [f"{way}_{measure}" for way in DIRECTIONS for measure in MEASURES]
RECALLS = [name for name in METRICS if not name.endswith("medr")]
ENCODE_BATCH = 64  # images, of at most ENCODE_PIXELS in all
ENCODE_PIXELS = 64 * 384**2
INDEX_FORMAT = 2
SCORES_PER_BLOCK = 2**24  # that are computed at once: 64 MB of float32
GROUP = 64  # scores of which `_candidates` compares the maximum first
MAX_QUERIES = 1024  # per matrix product
MAX_MATCHES = 2**17  # queries times n, per matrix product
CACHED_BYTES = 2**24  # of images: fewer stay in the processor's cache between queries
# Nearest neighbor normalization; chosen on the dev split of Flickr8k (tests/benchmarks/RESULTS.md).
NNN_K = 16  # nearest references, of at least MIN_REFERENCES
NNN_ALPHA = 0.75  # weight of the bias
MAX_REFERENCES = 10_000
MIN_REFERENCES = 1000  # 100 hurt, 1,000 help (tests/benchmarks/RESULTS.md)
MAX_PLOTTED = 20  # queries in a figure; a thousand would take minutes to plot
THUMBNAIL_SIDE = 300  # pixels
DARK = 16  # an image whose pixels are all below this, of 255, is nearly black


# ---------------------------------------------------------------- encoding


class ImageDataset(Dataset):
    """Images at the encoder's size, (S, S, 3) `uint8`; for an unreadable file its `UserError`."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths
        self.transform = Transform(size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | UserError:
        try:
            return self.transform(load_image(self.paths[index], self.transform.min_side))
        except UserError as error:
            return error


def collate_images(items: list[np.ndarray | UserError]) -> dict[str, Any]:
    """Items of `ImageDataset` as a batch, {"pixels": (b, 3, S, S), "num_dark": int, "errors": ...}.

    `pixels` are of the b readable images, None if there are none; `errors` of the others, by their
    index in the batch.
    """
    images = [item for item in items if not isinstance(item, UserError)]
    return {
        "pixels": stack_images(images) if images else None,
        "num_dark": sum(bool(image.max() < DARK) for image in images),
        "errors": {i: item for i, item in enumerate(items) if isinstance(item, UserError)},
    }


def build_image_loader(
    tower: Tower, paths: list[Path], config: Config, device: torch.device
) -> DataLoader:
    """Batches of images for `encode_images`; workers, if there are any, are kept."""
    num_workers = config.num_workers
    if num_workers < 0 and device.type == "cpu":
        # The encoder needs every core, and after a fork each page of the process's memory is
        # copied when it is next written.
        num_workers = 0
    size = eval_image_size(tower, config)
    dataset = ImageDataset(paths, size)
    batch_size = max(1, min(ENCODE_BATCH, ENCODE_PIXELS // size**2))
    return build_loader(
        dataset,
        num_workers,
        device,
        collate_images,
        batch_bytes=batch_size * 3 * size**2,
        batch_size=batch_size,
        keep_workers=True,
    )


@torch.inference_mode()
def encode_images(
    tower: Tower,
    paths: list[Path],
    config: Config,
    device: torch.device,
    batches: Iterable[dict[str, Any]] | None = None,
) -> tuple[Tensor, dict[int, UserError]]:
    """Encodes the image files `paths`; `batches` may be a `build_image_loader` of the same paths.

    Returns unit vectors (R, D) on the CPU of the R readable files, in the order of `paths`, and
    the error of each other file by its index in `paths`. The vectors stay on the device until all
    are there, 1 GB for a million of dimension 256, so that no batch waits for the one before.
    """
    if batches is None:
        batches = build_image_loader(tower, paths, config, device)
    embeddings = torch.empty(len(paths), config.projection_dim, device=device)
    num_encoded = num_dark = 0
    errors: dict[int, UserError] = {}
    for batch in progress(batches, "encoding images", leave=False):
        start = num_encoded + len(errors)  # index in `paths` of the batch's first item
        errors |= {start + i: error for i, error in batch["errors"].items()}
        num_dark += batch["num_dark"]
        if batch["pixels"] is not None:
            pixels = batch["pixels"].to(device, non_blocking=True)  # (b, 3, S, S)
            embeddings[num_encoded : num_encoded + len(pixels)] = tower(pixels)
            num_encoded += len(pixels)
    if 2 * num_dark > num_encoded:
        print(f"{num_dark:,} of {num_encoded:,} images are nearly black; are their values scaled?")
    return embeddings[:num_encoded].cpu(), errors


@torch.inference_mode()
def encode_texts(
    tower: Tower, tokenizer: Tokenizer, texts: list[str], device: torch.device
) -> Tensor:
    """Encodes texts to unit vectors (Q, D) on the CPU, in the order of `texts`."""
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # batches with less padding
    embeddings = []
    for start in progress(range(0, len(texts), 256), "encoding texts", leave=False):
        ids, mask = _tokenize(tokenizer, [texts[i] for i in by_length[start : start + 256]])
        embeddings.append(tower(ids.to(device), mask.to(device)).cpu())
    return torch.cat(embeddings)[np.argsort(by_length)]


def _tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """`data.tokenize`; a stranger's tokenizer can raise anything, such as a PanicException."""
    try:
        return tokenize(tokenizer, texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"the checkpoint's tokenizer cannot encode a text: {error}") from None


# ---------------------------------------------------------------- hub correction


def encode_references(
    model: CLIP, tokenizer: Tokenizer, split: Split, config: Config, device: torch.device
) -> References | None:
    """Embeddings of at most 10,000 training images and one caption of each, sampled by the seed.

    None for a training split that is too small to estimate the bias of hubs from.
    """
    if len(split.paths) < MIN_REFERENCES:
        return None
    rng = np.random.default_rng(config.seed)
    indices = np.sort(rng.permutation(len(split.paths))[:MAX_REFERENCES])
    captions = []
    for index in indices:
        captions.append(split.captions[index][rng.integers(len(split.captions[index]))])
    paths = [split.paths[index] for index in indices]
    images, errors = encode_images(model.image, paths, config, device)
    if errors:
        raise next(iter(errors.values()))
    texts = encode_texts(model.text, tokenizer, captions, device)
    return References(images.half(), texts.half())


def hub_bias(embeddings: Tensor, references: Tensor, block_size: int = 4096) -> Tensor:
    """The bias (N,) to subtract from the cosines of unit vectors (N, D) with queries.

    Nearest neighbor normalization (arXiv 2410.24114): a constant times the mean of the k largest
    cosines with `references` (R, D), queries of the training data. It is large for a hub, which is
    near to every query and would crowd out right answers.
    """
    queries = references.float().numpy()
    k = min(NNN_K, len(queries))
    bias = np.empty(len(embeddings), np.float32)
    for start in range(0, len(embeddings), block_size):
        block = embeddings[start : start + block_size].numpy()
        cosines = block @ queries.T  # (b, D) @ (D, R)
        nearest = np.partition(cosines, -k, axis=1)[:, -k:]  # (b, k)
        bias[start : start + block_size] = NNN_ALPHA * nearest.mean(axis=1)
    return torch.from_numpy(bias)


# ---------------------------------------------------------------- ranking


def cosine_similarity(left: Tensor, right: Tensor) -> Tensor:
    """Cosines of unit vectors on the CPU, (L, D) @ (D, R) -> (L, R).

    By NumPy, whose BLAS is faster than torch's here (tests/benchmarks/README.md).
    """
    return torch.from_numpy(left.numpy() @ right.numpy().T)


def top_matches(queries: Tensor, images: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n images with the largest inner product with each query, exactly.

    `queries` (Q, D) and `images` (N, D) are on the CPU; of unit vectors the inner product is the
    cosine. Returns inner products and indices of images, both (Q, min(n, N)), largest first. Images
    are ranked in blocks, so that memory does not grow with their number.
    """
    n = min(n, len(images))
    max_queries = max(1, min(MAX_QUERIES, MAX_MATCHES // max(1, n)))
    parts = [_top_matches(part.numpy(), images.numpy(), n) for part in queries.split(max_queries)]
    scores, indices = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts))
    return scores, indices


def _top_matches(queries: np.ndarray, images: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """As `top_matches`, for at most `MAX_QUERIES`: a block then has at least 16,384 images."""
    num_queries = len(queries)
    best_scores = np.full((num_queries, n), -np.inf, np.float32)
    best_indices = np.zeros((num_queries, n), np.int64)
    block_size = GROUP * math.ceil(SCORES_PER_BLOCK / GROUP / num_queries)
    buffer = np.empty((block_size, num_queries), np.float32)
    for start in range(0, len(images), block_size):
        block = images[start : start + block_size]  # (b, D)
        scores = buffer[: GROUP * math.ceil(len(block) / GROUP)]
        scores[len(block) :] = -np.inf  # fills the last group
        _inner_products(block, queries, out=scores[: len(block)])
        row, query = _candidates(scores, n, best_scores[:, -1])  # (c,) each
        # Merge the block's best with the best of the blocks before.
        score = np.concatenate([scores[row, query], best_scores.ravel()])
        index = np.concatenate([start + row, best_indices.ravel()])
        query = np.concatenate([query, np.repeat(np.arange(num_queries), n)])
        order = np.lexsort((score, query))  # each query's candidates, largest last
        end = np.searchsorted(query[order], np.arange(num_queries), side="right")
        order = order[end[:, None] - 1 - np.arange(n)]  # (Q, n)
        best_scores, best_indices = score[order], index[order]
    return best_scores, best_indices


def _inner_products(images: np.ndarray, queries: np.ndarray, out: np.ndarray) -> None:
    """(b, D) @ (D, Q) -> `out` (b, Q)."""
    if len(queries) > 4 or images.nbytes <= CACHED_BYTES or not hasattr(np, "vecdot"):
        np.matmul(images, queries.T, out=out)
        return

    # A matrix product takes up to three times as long for one query, and one thread does not read
    # the images as fast as memory allows.
    def multiply(rows: slice) -> None:
        for column, query in enumerate(queries):
            np.vecdot(images[rows], query, out=out[rows, column])

    num_threads = torch.get_num_threads()
    bounds = np.linspace(0, len(images), num_threads + 1, dtype=int)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(multiply, map(slice, bounds[:-1], bounds[1:])))  # raises what a thread raises


def _candidates(scores: np.ndarray, n: int, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns (c,) of `scores` (b, Q) that contain each column's n largest, in no order.

    Scores below the column's `bound` (Q,) may be left out. The rows form groups of 64. Every top-n
    score lies in one of the n groups with the largest maxima and is not less than the least of
    these maxima, and the maxima of all groups are found faster than the n largest scores.
    """
    num_rows, num_columns = scores.shape
    grouped = scores.reshape(GROUP, -1, num_columns)  # group g has the rows g, g + num_groups, ...
    num_groups = grouped.shape[1]
    if num_groups < n:
        n = min(n, num_rows)
        rows = np.argpartition(scores, -n, axis=0)[-n:]  # (n, Q)
        return rows.ravel(), np.tile(np.arange(num_columns), n)
    maxima = grouped.max(axis=0)  # (num_groups, Q)
    groups = np.argpartition(maxima, -n, axis=0)[-n:]  # (n, Q)
    maxima = np.take_along_axis(maxima, groups, axis=0)
    bound = np.maximum(bound, maxima[0])  # the least of the n
    rank, column = np.nonzero(~(maxima < bound))  # not >=, because of NaN
    group = groups[rank, column]  # (g,)
    members = grouped[:, group, column]  # (64, g)
    member, hit = np.nonzero(~(members < bound[column]))
    return group[hit] + num_groups * member, column[hit]


# ---------------------------------------------------------------- metrics


def retrieval_metrics(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_of_text: Tensor,
    scores_per_block: int = SCORES_PER_BLOCK,
    image_bias: Tensor | float = 0.0,
    text_bias: Tensor | float = 0.0,
    text_ids: Tensor | None = None,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent and median rank, text to image (t2i) and back (i2t).

    Protocol of Hodosh et al. (2013) as the field uses it: each of the M texts ranks all N images.
    Each image ranks all texts, and the first of its own texts counts. If several images have the
    same text, the first of them counts. An equal score ranks before the right answer, so that a
    model with equal embeddings scores 0.

    `image_embeddings` (N, D), `text_embeddings` (M, D), `image_of_text` (M,): index of the image
    that each text belongs to. The biases (N,) and (M,) are subtracted from the cosines. If images
    share texts, there are P captions: `image_of_text` (P,) is the image of each caption, and
    `text_ids` (P,) its text.
    """
    if text_ids is None:
        text_ids = torch.arange(len(text_embeddings))
    pairs = torch.stack([text_ids, image_of_text]).unique(dim=1)  # (2, P)
    t2i_ranks = _first_right_ranks(
        text_embeddings, image_embeddings, image_bias, pairs, scores_per_block
    )
    i2t_ranks = _first_right_ranks(
        image_embeddings, text_embeddings, text_bias, pairs.flip(0), scores_per_block
    )
    metrics = {}
    for direction, ranks in zip(DIRECTIONS, (t2i_ranks, i2t_ranks)):
        for k in RECALL_KS:
            metrics[f"{direction}_r{k}"] = recall_at_k(ranks, k)
        metrics[f"{direction}_medr"] = float(np.median(ranks))
    return metrics


def _first_right_ranks(
    queries: Tensor, items: Tensor, bias: Tensor | float, pairs: Tensor, scores_per_block: int
) -> Tensor:
    """For each query (Q, D) the rank of the first of its right answers among the items (N, D).

    `pairs` (2, P) are queries and their right answers, without repetition. Every wrong item ranks
    before the right one unless its score is less.
    """
    ranks = torch.empty(len(queries))
    # Few blocks: threads wait for each other several times in each, which is slow beside processes
    # that load images.
    block_size = max(1, scores_per_block // len(items))
    for start in range(0, len(queries), block_size):
        scores = cosine_similarity(queries[start : start + block_size], items) - bias  # (b, N)
        in_block = (pairs[0] >= start) & (pairs[0] < start + block_size)
        query, item = pairs[:, in_block] - torch.tensor([[start], [0]])
        right = scores[query, item]  # (p,)
        best = torch.full((len(scores),), -math.inf).scatter_reduce(0, query, right, "amax")  # (b,)
        num_before = (~(scores < best[:, None])).sum(dim=1)  # right ones too
        num_right = torch.zeros_like(num_before).index_add(
            0, query, (~(right < best[query])).long()
        )
        ranks[start : start + block_size] = 1 + num_before - num_right
    return ranks


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Percentage of `ranks`, which start at 1, that are k or better."""
    return 100 * (ranks <= k).sum().item() / len(ranks)


def evaluate(
    model: CLIP,
    tokenizer: Tokenizer,
    split: Split,
    config: Config,
    device: torch.device,
    references: References | None = None,
    loader: DataLoader | None = None,
) -> dict[str, float]:
    """`retrieval_metrics` of a split: each image once, and each text once.

    With `references` also the metrics with hub correction, whose names end in `_nnn`. `loader` is
    a `build_image_loader` of the split's images. Raises `UserError` for an image that cannot be
    read.
    """
    captions = split.texts
    row_of = {text: row for row, text in enumerate(dict.fromkeys(captions))}
    text_ids = torch.tensor([row_of[text] for text in captions])
    captions_per_image = torch.tensor([len(own) for own in split.captions])
    image_of_text = torch.arange(len(split.paths)).repeat_interleave(captions_per_image)

    if loader is None:
        loader = build_image_loader(model.image, split.paths, config, device)
    batches = iter(loader)  # its workers load images while the texts are encoded
    texts = encode_texts(model.text, tokenizer, list(row_of), device)
    images, errors = encode_images(model.image, split.paths, config, device, batches)
    if errors:
        raise next(iter(errors.values()))
    metrics = retrieval_metrics(images, texts, image_of_text, text_ids=text_ids)
    if references:
        image_bias = hub_bias(images, references.texts)
        text_bias = hub_bias(texts, references.images)
        corrected = retrieval_metrics(
            images,
            texts,
            image_of_text,
            image_bias=image_bias,
            text_bias=text_bias,
            text_ids=text_ids,
        )
        metrics |= {f"{name}_nnn": value for name, value in corrected.items()}
    return metrics


def format_metrics(metrics: dict[str, float], suffix: str = "") -> str:
    """The metrics whose names end in `suffix` in one line."""
    parts = []
    for direction, name in DIRECTIONS.items():
        recalls = " / ".join(f"{metrics[f'{direction}_r{k}{suffix}']:.1f}" for k in RECALL_KS)
        median_rank = metrics[f"{direction}_medr{suffix}"]
        parts.append(f"{name} R@1/5/10 {recalls}, median rank {median_rank:g}")
    return "; ".join(parts)


# ---------------------------------------------------------------- the embedding index

# Absolute path, size in bytes, mtime and ctime (which a rename changes too) in nanoseconds, inode.
Signature = tuple[str, int, int, int, int]


def _file_signature(path: Path) -> Signature:
    """Identifies the content of a file without reading it."""
    try:
        stat = path.stat()
    except OSError:  # such as a dangling link; `load_image` will name it
        return os.path.abspath(path), -1, -1, -1, -1
    path = os.path.abspath(path)
    return path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


class EmbeddingIndex:
    """The embeddings of one folder's images, in files beside the checkpoint that made them.

    `NAME.json` lists the images. The embeddings are a plain .npy array (N, `width`) `float32`,
    mapped into memory. Its file name contains the digest of the list, and the list its checksum, so
    that neither a damaged array nor that of another list is used.
    """

    def __init__(self, folder: Path, name: str, model_id: str, width: int) -> None:
        self.folder = folder
        self.name = _digest(name)
        self.model_id = model_id
        self.width = width

    def read(self) -> tuple[list[Signature], np.ndarray]:
        """The images and their embeddings; both empty if there is no valid index of this model."""
        empty = [], np.empty((0, self.width), np.float32)
        remove_leftovers(self.folder)
        listing = self.folder / f"{self.name}.json"
        if not listing.is_file():
            return empty
        try:
            text = listing.read_text()
            content = json.loads(text)
            if content.get("model") != self.model_id:
                return empty
            signatures = [tuple(signature) for signature in content["images"]]
            array = self._array_path(text)
            if not array.is_file():  # a named pipe would block
                raise ValueError("its array is missing")
            embeddings = np.load(array, mmap_mode="c", allow_pickle=False)
            self._validate(signatures, embeddings)
            if zlib.crc32(embeddings) != content["checksum"]:
                raise ValueError("its array has another checksum")
        except Exception as error:  # a damaged or hostile file can raise anything
            print(printable(f"{listing}: is damaged and built again ({error})"))
            return empty
        return signatures, embeddings

    def _validate(self, signatures: list[Signature], embeddings: np.ndarray) -> None:
        shape = (len(signatures), self.width)
        if embeddings.shape != shape or embeddings.dtype != np.float32:
            raise ValueError("its array does not fit its list")
        if len(set(signatures)) < len(signatures):
            raise ValueError("its list contains an image twice")
        row_sums = embeddings @ np.ones(self.width, np.float32)
        if not np.isfinite(row_sums).all():
            raise ValueError("its array contains values that are not finite")

    def write(self, signatures: list[Signature], embeddings: np.ndarray) -> None:
        """Replaces the index; prints a line if the folder cannot be written."""
        checksum = zlib.crc32(np.ascontiguousarray(embeddings))
        content = {"model": self.model_id, "images": signatures, "checksum": checksum}
        text = json.dumps(content)
        array = self._array_path(text)
        try:
            self.folder.mkdir(exist_ok=True)
            atomic_write(array, lambda file: np.save(file, embeddings))
            atomic_write(self.folder / f"{self.name}.json", lambda file: file.write(text.encode()))
        except (OSError, UserError) as error:
            print(printable(f"the index is not saved: {error}"))
            return
        for old_array in set(self.folder.glob(f"{self.name}-*.npy")) - {array}:
            with suppress(OSError):  # on Windows, while a searcher has it mapped
                old_array.unlink()

    def _array_path(self, listing: str) -> Path:
        return self.folder / f"{self.name}-{_digest(listing)}.npy"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]  # a path may not be UTF-8


# ---------------------------------------------------------------- search


@dataclass(frozen=True)
class Match:
    """A text and an image that match.

    `score` is what they are ranked by: their cosine, with hub correction less the image's bias
    (`Searcher.search`), or the text's probability (`Searcher.classify`).
    """

    query: str
    rank: int
    score: float
    cosine: float
    path: Path


class Searcher:
    """A checkpoint ready for queries.

    searcher = Searcher("best.pt")
    searcher.search(["a dog"], images="my/folder", n=8)  # images that match texts
    searcher.similar("photo.jpg", images="my/folder")  # images that are like an image
    searcher.classify("photo.jpg", ["a dog", "a cat"])  # probabilities of texts
    """

    def __init__(
        self,
        weights: str | Path,
        device: str = "auto",
        num_workers: int = -1,
        nnn: bool = True,
        data_dir: str | Path | None = None,
    ) -> None:
        """Without `nnn` images are ranked by their cosines, without hub correction. `data_dir` is
        the folder of the data set, if it is not where the model was trained. A checkpoint may come
        from anyone, so that its own path is used only inside the current folder.

        Raises `UserError` if `weights` is not a checkpoint of this program.
        """
        self.checkpoint_path = Path(weights)
        self.checkpoint = load_checkpoint(weights, mmap=True)
        self.config = replace(self.checkpoint.config, num_workers=num_workers)
        self.trusts_data_dir = data_dir is not None or not leads_outside(self.config.data_dir)
        if data_dir is not None:
            self.config = replace(self.config, data_dir=str(data_dir))
        self.tokenizer = self.checkpoint.tokenizer
        self.device = pick_device(device)
        self.has_bias = self.checkpoint.references is not None
        self.nnn = nnn and self.has_bias

    @cached_property
    def image_tower(self) -> Tower:
        tower = load_tower(self.checkpoint, "image")
        return tower.to(self.device, memory_format=torch.channels_last)

    @cached_property
    def text_tower(self) -> Tower:
        return load_tower(self.checkpoint, "text").to(self.device)

    def search(
        self, queries: str | list[str], images: str | Path | None = None, n: int = 8
    ) -> list[list[Match]]:
        """For each query (a string is one query) its n best matches, best first.

        Searches the images in the folder `images` and its subfolders, or without one the test
        images of the data set that the model was trained on. Each call lists the folder and
        verifies the index: pass many queries at once.
        """
        queries = _as_list(queries)
        vectors = self.encode_texts(queries)  # (Q, D)
        image_set = self._load_embeddings(images)
        return self._rank(queries, vectors, image_set, n, correct=self.nnn)

    def similar(
        self, image: ImageSource, images: str | Path | None = None, n: int = 8
    ) -> list[Match]:
        """The n images most similar to an image, by cosine; see `search` for `images`."""
        name = "image" if isinstance(image, Image.Image) else str(image)
        # Without hub correction, whose bias is estimated for queries that are texts.
        vectors = self.encode_images([image])  # (1, D)
        image_set = self._load_embeddings(images)
        return self._rank([name], vectors, image_set, n, correct=False)[0]

    def _rank(
        self,
        queries: list[str],
        vectors: Tensor,
        image_set: tuple[list[Path], Tensor],  # of `_load_embeddings`
        n: int,
        correct: bool,
    ) -> list[list[Match]]:
        """The n best of the `image_set` for each of the unit vectors (Q, D) of `queries`."""
        _check_n(n)
        paths, embeddings = image_set  # (N, D), or (N, D + 1) with minus the bias
        if self.has_bias:
            weight_of_bias = torch.full((len(queries), 1), float(correct))
            vectors = torch.hstack([vectors, weight_of_bias])  # (Q, D + 1)
        scores, indices = top_matches(vectors, embeddings, n)  # (Q, n)
        if not scores.isfinite().all():
            raise UserError(f"{self.checkpoint_path}: is damaged, its cosines are not finite")
        cosines = scores - embeddings[indices, -1] if correct else scores
        results = []
        for i, query in enumerate(queries):
            hits = zip(scores[i].tolist(), cosines[i].tolist(), indices[i].tolist())
            matches = []
            for rank, (score, cosine, row) in enumerate(hits, start=1):
                matches.append(Match(query, rank, score, cosine, paths[row]))
            results.append(matches)
        return results

    def encode_texts(self, texts: str | list[str]) -> Tensor:
        """Unit vectors (Q, D) of texts, on the CPU."""
        texts = _as_list(texts)
        if not texts:
            raise UserError("no text was passed, but at least one is needed")
        return encode_texts(self.text_tower, self.tokenizer, texts, self.device)

    @torch.inference_mode()
    def encode_images(self, images: list[ImageSource]) -> Tensor:
        """Unit vectors (N, D) of image files or PIL images, on the CPU.

        Raises `UserError` for a file that cannot be read as an image.
        """
        transform = Transform(eval_image_size(self.image_tower, self.config))
        embeddings = []
        for image in images:
            pixels = stack_images([transform(load_image(image, transform.min_side))])
            embeddings.append(self.image_tower(pixels.to(self.device)).cpu())  # (1, D)
        return torch.cat(embeddings)

    def classify(self, image: ImageSource, texts: str | list[str], n: int = 8) -> list[Match]:
        """The n most probable of `texts` for an image.

        This is zero-shot classification (arXiv 2103.00020, section 3.1), without hub correction.
        """
        path = Path("image") if isinstance(image, Image.Image) else Path(image)
        return self._rank_texts(path, self.encode_images([image]), _as_list(texts), n)

    def _rank_texts(self, path: Path, vector: Tensor, texts: list[str], n: int) -> list[Match]:
        """The n most probable of `texts` for the unit vector (1, D) of the image `path`."""
        _check_n(n)
        texts = list(dict.fromkeys(" ".join(text.split()) for text in texts))  # each once
        text_embeddings = self.encode_texts(texts)  # (Q, D)
        cosines = cosine_similarity(vector, text_embeddings)[0]  # (Q,)
        logits = self.checkpoint.model["logit_scale"].exp() * cosines
        if not logits.isfinite().all():
            raise UserError(f"{self.checkpoint_path}: is damaged, its cosines are not finite")
        probabilities, indices = logits.softmax(dim=0).topk(min(n, len(texts)))
        matches = []
        for rank, (score, i) in enumerate(zip(probabilities.tolist(), indices.tolist()), start=1):
            matches.append(Match(texts[i], rank, score, cosines[i].item(), path))
        return matches

    def index_images(self, images: str | Path | None = None) -> tuple[list[Path], Tensor]:
        """The readable images and their embeddings (N, D); see `search` for `images`.

        Embeddings are kept in an index beside the checkpoint. Only images that are new or changed
        since then, by path, size, times and inode, are encoded. Unreadable ones are tried again.
        """
        paths, embeddings = self._load_embeddings(images)
        return paths, embeddings[:, : self.config.projection_dim]

    def _load_embeddings(self, images: str | Path | None) -> tuple[list[Path], Tensor]:
        """As `index_images`, with a last column of minus the images' bias if there are references.

        With it, corrected scores are one inner product, with queries that end in 1.
        """
        # 1. List the images and read the index.
        paths = self._list_images(images)
        signatures = [_file_signature(path) for path in paths]
        index = self._open_index(images)
        known, embeddings = index.read()
        if signatures == known:
            return paths, torch.from_numpy(embeddings)  # mapped into memory, not copied
        row_of = {signature: row for row, signature in enumerate(known)}

        # 2. Encode what is not in it.
        missing = [(p, s) for p, s in zip(paths, signatures) if s not in row_of]
        if missing:
            missing_paths = [path for path, _ in missing]
            new_embeddings, errors = encode_images(
                self.image_tower, missing_paths, self.config, self.device
            )
            if errors:
                print(f"skipped {len(errors)} of {len(paths)} images:")
                print(*(f"  {error}" for error in errors.values()), sep="\n")
            encoded = [s for i, (_, s) in enumerate(missing) if i not in errors]
            row_of |= {signature: row for row, signature in enumerate(encoded, start=len(known))}
            if self.has_bias:
                bias = hub_bias(new_embeddings, self.checkpoint.references.texts)
                new_embeddings = torch.hstack([new_embeddings, -bias[:, None]])
            embeddings = np.concatenate([embeddings, new_embeddings.numpy()])

        # 3. Order the embeddings as the images, and save them.
        found = [(p, s) for p, s in zip(paths, signatures) if s in row_of]
        if not found:
            raise UserError(f"{images or self.config.data_dir}: contains no image that can be read")
        found_signatures = [signature for _, signature in found]
        embeddings = embeddings[[row_of[signature] for signature in found_signatures]]
        if found_signatures != known:
            index.write(found_signatures, embeddings)
        return [path for path, _ in found], torch.from_numpy(embeddings)

    def _list_images(self, images: str | Path | None) -> list[Path]:
        if images is None:
            paths = self.test_split.paths
            data_dir = printable(self.config.data_dir)
            print(f"searching the {len(paths):,} test images of {data_dir}")
            return paths
        paths = list_images(Path(images))
        if not paths:
            raise UserError(f"--images {images}: is not a folder that contains images")
        print(f"searching {len(paths):,} images in {printable(images)}")
        return paths

    def _open_index(self, images: str | Path | None) -> EmbeddingIndex:
        folder = self.checkpoint_path.with_suffix(".index")
        if images is None:
            name = os.path.abspath(self.config.data_dir) + " test split"
        else:
            name = os.path.abspath(images)
        # Nothing is reused that was decoded otherwise or made with another size or correction.
        settings = f"{INDEX_FORMAT} {EVAL_SCALE:.3f} {NNN_K} {NNN_ALPHA} {DECODING}"
        model_id = f"{self.checkpoint.fingerprint} {settings}"
        return EmbeddingIndex(folder, name, model_id, self.config.projection_dim + self.has_bias)

    @cached_property
    def test_split(self) -> Split:
        """The test split of the data set that the model was trained on.

        Raises `UserError` if the data set is not where it was, or its path is not trusted.
        """
        data_dir = self.config.data_dir
        if self.trusts_data_dir and Path(data_dir).exists():
            return read_splits(data_dir)["test"]
        place = "not here" if self.trusts_data_dir else "outside of the current folder"
        raise UserError(
            f"{data_dir}, the data set of the training, is {place}; "
            "pass --data-dir to read it, or --images to search another folder"
        )


def _as_list(texts: str | list[str]) -> list[str]:
    """A string is one text, not a list of its letters."""
    return [texts] if isinstance(texts, str) else list(texts)


def _check_n(n: int) -> None:
    if n < 1:
        raise UserError(f"n is {n}, but must be at least 1")


# ---------------------------------------------------------------- output


def show_matches(results: list[list[Match]], output: Path) -> None:
    """Prints the matches of each query and saves them as a figure or a table."""
    for matches in results:
        corrected = any(match.score != match.cosine for match in matches)
        print(f"\n{printable(matches[0].query)}")
        print("rank   score  cosine  image" if corrected else "rank  cosine  image")
        for match in matches:
            score = f"{match.score:6.3f}  " if corrected else ""
            print(f"{match.rank:4}  {score}{match.cosine:6.3f}  {printable(match.path)}")
    plotted = results[:MAX_PLOTTED]
    if len(plotted) < len(results) and output.suffix.lower() != ".csv":
        print(f"\nthe figure has the first {MAX_PLOTTED} queries; --output matches.csv has all")
    _save(results, lambda: plot_matches(plotted), output)


def show_probabilities(matches: list[Match], output: Path) -> None:
    """Prints the texts for one image and saves them as a figure or a table."""
    print(f"\n{printable(matches[0].path)}\nrank   prob.  text")
    if len(matches) == 1:
        print("      (the probability of a single text is always 1)")
    for match in matches:
        print(f"{match.rank:4}  {match.score:6.3f}  {printable(match.query)}")
    _save([matches], lambda: plot_probabilities(matches), output)


def _save(results: list[list[Match]], plot: Callable[[], Figure], output: Path) -> None:
    """Saves what `output` ends in: a table, or the figure that `plot` makes."""
    if output.suffix.lower() == ".csv":
        import pandas as pd  # here, because a search that saves a figure does not need it

        table = pd.DataFrame([match for matches in results for match in matches])
        atomic_write(
            output, lambda file: table.to_csv(file, index=False, errors="backslashreplace")
        )
    else:
        figure = plot()
        file_format = output.suffix[1:].lower()
        atomic_write(output, lambda file: figure.savefig(file, format=file_format))
    print(f"\nsaved {printable(output)}")


def plot_matches(results: list[list[Match]]) -> Figure:
    """A grid of images for each query, with rank, score and file name."""
    n = max(len(matches) for matches in results)
    # Between 4 and 8 columns, with as few empty cells as possible.
    columns = min(n, min(range(4, 9), key=lambda columns: -n % columns))
    rows = math.ceil(n / columns)
    width = max(columns, 2)
    height = len(results) * (rows * 2.3 + 0.6)  # inches
    dpi = min(110, 30_000 / height)  # Matplotlib cannot draw 2**16 pixels
    figure = Figure(figsize=(2 * width, height), dpi=dpi, layout="constrained")
    blocks = np.atleast_1d(figure.subfigures(len(results), 1))
    for matches, block in zip(results, blocks):
        block.suptitle(_wrap(matches[0].query, 13 * width), parse_math=False)
        axes = block.subplots(
            rows,
            columns,
            squeeze=False,
            subplot_kw={"frame_on": False, "xticks": [], "yticks": []},
        )
        for match, ax in zip(matches, axes.flat):
            ax.imshow(_thumbnail(match.path))
            name = printable(match.path.name)
            if len(name) > 28:
                name = "…" + name[-27:]
            title = f"{match.rank}.  {match.score:.3f}\n{name}"
            ax.set_title(title, fontsize=8, parse_math=False)
    return figure


def plot_probabilities(matches: list[Match]) -> Figure:
    """An image, and beside it the probabilities of the texts as bars."""
    height = max(3.0, 0.5 * len(matches) + 1)  # inches
    figure = Figure(figsize=(11, height), dpi=110, layout="constrained")
    image_ax, bar_ax = figure.subplots(1, 2, width_ratios=(1, 1.2))
    image_ax.imshow(_thumbnail(matches[0].path))
    image_ax.set_title(printable(matches[0].path.name)[-40:], parse_math=False)
    image_ax.axis("off")
    bars = bar_ax.barh(range(len(matches)), [match.score for match in matches])
    bar_ax.bar_label(bars, [f"{match.score:.3f}" for match in matches], padding=3, fontsize=8)
    labels = [_wrap(match.query, 40) for match in matches]
    bar_ax.set_yticks(range(len(matches)), labels, fontsize=8, parse_math=False)
    bar_ax.set(
        xlim=(0, 1.15), xticks=(0, 0.5, 1), xlabel="probability", ylim=(len(matches) - 0.5, -0.5)
    )
    return figure


def _wrap(text: str, width: int) -> str:
    """At most two lines of text."""
    return textwrap.fill(printable(text), width, max_lines=2)


def _thumbnail(path: Path) -> Image.Image:
    """The image at 300 pixels or less; a gray one, and a line, if it can no longer be read."""
    try:
        image = Image.fromarray(load_image(path, THUMBNAIL_SIDE))
    except UserError as error:  # it was readable when it was indexed
        print(f"not shown: {error}")
        return Image.new("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE), "lightgray")
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return image


# ---------------------------------------------------------------- page

# Captions in two lines below the thumbnails; four columns, two on a phone.
PAGE_CSS = """
.grid-wrap { max-height: none !important; }
.grid-container {
  grid-template-columns: repeat(auto-fill, minmax(max(140px, 22%), 1fr)) !important; }
.thumbnail-lg { aspect-ratio: auto !important; height: auto !important; }
.thumbnail-lg > img { aspect-ratio: 1; height: auto !important; object-fit: contain !important; }
.caption-label { position: static !important; max-width: none !important; border: none !important;
  white-space: pre-line !important; overflow-wrap: anywhere; }
"""
SCROLL_TO_DETAILS = """() => document.querySelectorAll(".details").forEach(
  element => element.scrollIntoView({block: "nearest", behavior: "smooth"}))"""


class Page:
    """The answers of the page that `serve` opens, from encoders and an index in memory."""

    def __init__(self, searcher: Searcher, images: Path | None) -> None:
        self.searcher = searcher
        self.image_set = searcher._load_embeddings(images)
        examples = [searcher.checkpoint.example_query]
        if images is None:
            captions = searcher.test_split.captions
            examples += [texts[0] for texts in captions[:: math.ceil(len(captions) / 3)]]
        self.examples = list(dict.fromkeys(examples))
        _ = searcher.text_tower, searcher.image_tower  # loads them

    def search(self, query: str, n: int) -> tuple[list, list[Path]]:
        if not query.strip():
            raise UserError("the query is empty, but needs at least one word")
        return self._best(self.searcher.encode_texts([query]), n, correct=self.searcher.nnn)

    def similar(self, vector: Tensor, n: int) -> tuple[list, list[Path]]:
        return self._best(vector, n, correct=False)

    def _best(self, vector: Tensor, n: int, correct: bool) -> tuple[list, list[Path]]:
        """Thumbnails with captions of the n best images for a unit vector (1, D), and paths."""
        matches = self.searcher._rank(["query"], vector, self.image_set, n, correct)[0]
        items = []
        for match in matches:
            caption = f"{match.rank}.  {match.score:.3f}\n{printable(match.path.name)}"
            items.append((_thumbnail(match.path), caption))
        return items, [match.path for match in matches]

    def upload(self, path: str) -> tuple[None, Image.Image, Tensor]:
        """A thumbnail and the unit vector (1, D) of an image; None empties the upload's control."""
        try:
            vector = self.searcher.encode_images([path])
            return None, _thumbnail(Path(path)), vector
        except UserError as error:
            raise UserError(str(error).replace(path, Path(path).name)) from None
        finally:
            Path(path).unlink(missing_ok=True)

    def classify(self, vector: Tensor, texts: str) -> dict[str, float]:
        """The probability of each line of `texts`."""
        lines = [line for line in texts.splitlines() if line.strip()]
        matches = self.searcher._rank_texts(Path("image"), vector, lines, len(lines))
        return {match.query: match.score for match in matches}


def build_layout(page: Page, n: int) -> Any:
    """The page's controls, as `gradio.Blocks`."""
    import gradio as gr

    def shown(handler: Callable) -> Callable:
        """`handler`, whose `UserError` is shown on the page, where messages are HTML."""

        @functools.wraps(handler)
        def run(*arguments: Any) -> Any:
            try:
                if any(argument is None for argument in arguments):
                    raise UserError("nothing is given; type a text or upload an image")
                return handler(*arguments)
            except UserError as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from None

        return run

    def show(paths: list[Path], event: gr.SelectData) -> tuple[Any, Image.Image, str]:
        path = paths[event.index]
        return gr.Column(visible=True), Image.fromarray(load_image(path)), printable(path)

    def add_slider() -> Any:
        return gr.Slider(1, max(n, 100), n, step=1, precision=0, label="number of images")

    def add_gallery() -> list[Any]:
        paths = gr.State([])
        with gr.Row():
            with gr.Column(scale=3):
                gallery = gr.Gallery(
                    show_label=False, allow_preview=False, format="jpeg", buttons=[]
                )
            with gr.Column(scale=2, visible=False, elem_classes="details") as details:
                image = gr.Image(label="full size", format="jpeg", buttons=["fullscreen"])
                path = gr.Textbox(label="path", buttons=["copy"])
        selected = gallery.select(shown(show), paths, [details, image, path])
        selected.then(None, js=SCROLL_TO_DETAILS)
        return [gallery, paths]

    def add_upload() -> tuple[Any, Any]:
        vector = gr.State()
        with gr.Row():
            # Not gr.Image, which decodes any format of Pillow before our limits apply.
            file = gr.File(label="upload an image", height=160)
            preview = gr.Image(
                label="query", format="jpeg", height=160, interactive=False, buttons=[]
            )
        cleared = file.upload(lambda: (None, None), None, [preview, vector])  # of the last upload
        return vector, cleared.then(shown(page.upload), file, [file, preview, vector])

    latest = {"trigger_mode": "always_last", "queue": False}  # the queue would add 50 ms
    with gr.Blocks(title="Search images", analytics_enabled=False) as blocks:
        with gr.Tab("Search"):
            query = gr.Textbox(label="query", placeholder="type a sentence and press Enter")
            number = add_slider()
            examples = gr.Examples([[text] for text in page.examples], query)
            results = add_gallery()
            for event in (query.submit, number.input, examples.load_input_event.then):
                event(shown(page.search), [query, number], results, **latest)
        with gr.Tab("Similar images"):
            vector, uploaded = add_upload()
            number = add_slider()
            results = add_gallery()
            for event in (uploaded.success, number.input):
                event(shown(page.similar), [vector, number], results, **latest)
        with gr.Tab("Classify"):
            vector, _ = add_upload()
            texts = gr.Textbox(label="texts, one a line", lines=4)
            button = gr.Button("Classify")
            label = gr.Label(label="probabilities")
            button.click(shown(page.classify), [vector, texts], label)
    return blocks


def serve(searcher: Searcher, config: SearchConfig) -> None:
    """Serves a page to search with until it is stopped.

    Raises `UserError` if gradio is missing or the address cannot be used.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as on Ctrl-C
    # The folder is for thumbnails, and for uploads until they are read.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_EXAMPLES_CACHE=folder)
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
        try:
            import gradio as gr

            socket.create_server((config.host, config.port)).close()
        except ImportError:
            raise UserError("--serve requires gradio: pip install gradio") from None
        except OSError as error:
            message = f"--host {config.host} --port {config.port}: {error.strerror}"
            raise UserError(message) from None
        if int(gr.__version__.partition(".")[0]) < 6:
            raise UserError(f"gradio {gr.__version__}: is too old; pip install --upgrade gradio")
        blocks = build_layout(Page(searcher, config.images), config.n)
        blocks.launch(
            server_name=config.host,
            server_port=config.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size="100mb",
            footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=PAGE_CSS,
        )
        print(f"open http://{config.host}:{config.port} in a browser; Ctrl-C stops")
        try:
            while True:
                time.sleep(1)
        finally:
            blocks.close(verbose=False)


# ---------------------------------------------------------------- command line


def read_queries(config: SearchConfig) -> list[str]:
    """The queries of the command line; for "-" the lines of standard input."""
    if config.query != ["-"]:
        return config.query
    with suppress(UnicodeError):
        lines = [line.strip() for line in sys.stdin or [] if line.strip()]
        "".join(lines).encode()  # raises for other bytes, which stdin lets through in some locales
        if lines:
            return lines
    raise UserError("--query -: standard input contains no line of UTF-8 text")


def print_evaluation(searcher: Searcher) -> None:
    """Prints the metrics of the test split, without and with hub correction."""
    split = searcher.test_split
    checkpoint = searcher.checkpoint
    model = load_clip(checkpoint).to(searcher.device, memory_format=torch.channels_last)
    references = checkpoint.references if searcher.nnn else None
    metrics = evaluate(
        model, searcher.tokenizer, split, searcher.config, searcher.device, references
    )
    print(format_metrics(metrics))
    if references:
        print(f"with hub correction: {format_metrics(metrics, '_nnn')}")


@cli_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(SearchConfig, argv)
    searcher = Searcher(
        config.weights, config.device, config.num_workers, config.nnn, config.data_dir
    )
    if config.serve:
        serve(searcher, config)
    elif config.evaluate:
        print_evaluation(searcher)
    elif config.image:
        texts = read_queries(config) or searcher.test_split.texts
        show_probabilities(searcher.classify(config.image, texts, config.n), config.output)
    elif config.like:
        matches = searcher.similar(config.like, config.images, config.n)
        show_matches([matches], config.output)
    else:
        queries = read_queries(config) or [searcher.checkpoint.example_query]
        show_matches(searcher.search(queries, config.images, config.n), config.output)


if __name__ == "__main__":
    main()
