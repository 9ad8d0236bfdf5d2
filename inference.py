"""Evaluation and search with a trained model.

python inference.py --weights runs/demo/best.pt --n 8
python inference.py --weights runs/clip/best.pt --images ~/Pictures --query "a dog on a beach"
python inference.py --weights runs/clip/best.pt --image photo.jpg --query "a dog" --query "a cat"
python inference.py --weights runs/clip/best.pt --evaluate
"""

import hashlib
import json
import math
import os
import sys
import textwrap
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
from torch.utils.data import Dataset

from config import Config, SearchConfig, UserError, cli_errors, parse, progress
from data import (
    Split,
    Transform,
    atomic_write,
    build_loader,
    list_images,
    load_image,
    read_splits,
    stack_images,
    tokenize,
)
from models import (
    CLIP,
    EVAL_SCALE,
    Tower,
    eval_image_size,
    load_checkpoint,
    load_clip,
    load_tower,
    pick_device,
)

RECALL_KS = (1, 5, 10)
DIRECTIONS = {"t2i": "text to image", "i2t": "image to text"}
METRICS = [f"{way}_{name}" for way in DIRECTIONS for name in ("r1", "r5", "r10", "medr")]
RECALLS = [name for name in METRICS if not name.endswith("medr")]
ENCODE_BATCH = 64  # images
SCORES_PER_BLOCK = 2**24  # of a ranking: 64 MB of float32
GROUP = 64  # scores of which `_candidates` compares the maximum first


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
            return self.transform(load_image(self.paths[index]))
        except UserError as error:
            return error


@torch.inference_mode()
def encode_images(
    tower: Tower, paths: list[Path], config: Config, device: torch.device
) -> tuple[Tensor, dict[int, UserError]]:
    """Encodes image files.

    Returns unit vectors (R, D) on the CPU of the R readable files, in the order of `paths`, and
    the error of each other file by its index in `paths`.
    """
    num_workers = config.num_workers
    if num_workers < 0 and device.type == "cpu":
        # The encoder needs every core, and after a fork each page of the process's memory is
        # copied when it is next written.
        num_workers = 0
    dataset = ImageDataset(paths, eval_image_size(tower, config))
    loader = build_loader(dataset, num_workers, device, collate_fn=list, batch_size=ENCODE_BATCH)
    embeddings = torch.empty(len(paths), config.projection_dim)
    num_encoded = 0
    errors: dict[int, UserError] = {}
    start = 0  # index in `paths` of the batch's first item
    for items in progress(loader, "encoding images", leave=False):
        images = []
        for index, item in enumerate(items, start=start):
            if isinstance(item, UserError):
                errors[index] = item
            else:
                images.append(item)
        if images:
            batch = stack_images(images).to(device)  # (b, 3, S, S)
            embeddings[num_encoded : num_encoded + len(images)] = tower(batch).cpu()
        num_encoded += len(images)
        start += len(items)
    return embeddings[:num_encoded], errors


@torch.inference_mode()
def encode_texts(
    tower: Tower, tokenizer: Tokenizer, texts: list[str], device: torch.device
) -> Tensor:
    """Encodes texts to unit vectors (Q, D) on the CPU, in the order of `texts`."""
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # batches with less padding
    embeddings = []
    for start in progress(range(0, len(texts), 256), "encoding texts", leave=False):
        ids, mask = tokenize(tokenizer, [texts[i] for i in by_length[start : start + 256]])
        embeddings.append(tower(ids.to(device), mask.to(device)).cpu())
    return torch.cat(embeddings)[np.argsort(by_length)]


# ---------------------------------------------------------------- ranking


def cosine_similarity(left: Tensor, right: Tensor) -> Tensor:
    """Cosines of unit vectors on the CPU, (L, D) @ (D, R) -> (L, R).

    By NumPy, whose BLAS is faster than torch's here (tests/benchmarks/README.md).
    """
    return torch.from_numpy(left.numpy() @ right.numpy().T)


def top_matches(queries: Tensor, images: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n images with the largest cosine for each query, exactly.

    `queries` (Q, D) and `images` (N, D) are unit vectors on the CPU. Returns cosines and indices
    of images, both (Q, min(n, N)), largest first. Images are ranked in blocks, so that memory does
    not grow with their number.
    """
    query_array, image_array = queries.numpy(), images.numpy()
    best_scores = np.empty((len(queries), 0), np.float32)
    best_indices = np.empty((len(queries), 0), np.int64)
    block_size = GROUP * math.ceil(SCORES_PER_BLOCK / GROUP / len(queries))
    for start in range(0, len(images), block_size):
        scores = query_array @ image_array[start : start + block_size].T  # (Q, D) @ (D, b)
        candidates = _candidates(scores, n)  # (Q, c)
        scores = np.take_along_axis(scores, candidates, axis=1)
        # Merge the block's best with the best of the blocks before.
        scores, indices = _topk(scores, start + candidates, n)
        best_scores, best_indices = _topk(
            np.hstack([best_scores, scores]), np.hstack([best_indices, indices]), n
        )
    order = np.argsort(-best_scores, axis=1)
    best_scores = np.take_along_axis(best_scores, order, axis=1)
    best_indices = np.take_along_axis(best_indices, order, axis=1)
    return torch.from_numpy(best_scores), torch.from_numpy(best_indices)


def _candidates(scores: np.ndarray, n: int) -> np.ndarray:
    """Columns (Q, c) of `scores` (Q, b) that contain each row's n largest, in no order.

    Columns form groups of 64. Every top-n score lies in one of the n groups with the largest
    maxima, and the maxima of all groups are found faster than the n largest scores.
    """
    num_rows, num_columns = scores.shape
    num_groups = num_columns // GROUP
    if num_groups <= n:
        return np.broadcast_to(np.arange(num_columns), scores.shape)
    # Group g has the columns g, g + num_groups, g + 2 * num_groups, ...
    grouped = scores[:, : GROUP * num_groups].reshape(num_rows, GROUP, num_groups)
    maxima = grouped.max(axis=1)  # (Q, num_groups)
    groups = np.argpartition(maxima, -n, axis=1)[:, -n:]  # (Q, n)
    members = groups[:, :, None] + num_groups * np.arange(GROUP)  # (Q, n, 64)
    rest = np.arange(GROUP * num_groups, num_columns)  # in no group
    rest = np.broadcast_to(rest, (num_rows, len(rest)))
    return np.hstack([members.reshape(num_rows, -1), rest])


def _topk(scores: np.ndarray, indices: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n largest scores of each row (Q, b), in no order, and their `indices`."""
    n = min(n, scores.shape[1])
    columns = np.argpartition(scores, -n, axis=1)[:, -n:]
    return np.take_along_axis(scores, columns, axis=1), np.take_along_axis(indices, columns, axis=1)


# ---------------------------------------------------------------- metrics


def retrieval_metrics(
    image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor, block_size: int = 256
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent and median rank, text to image (t2i) and back (i2t).

    Protocol of Hodosh et al. (2013) as the field uses it: each of the M texts ranks all N images.
    Each image ranks all texts, and the first of its own texts counts. An equal score ranks before
    the right answer, so that a model with equal embeddings scores 0.

    `image_embeddings` (N, D), `text_embeddings` (M, D), `image_of_text` (M,): index of the image
    that each text belongs to.
    """
    num_images, num_texts = len(image_embeddings), len(text_embeddings)
    t2i_ranks = torch.empty(num_texts)
    for start in range(0, num_texts, block_size):
        rows = slice(start, start + block_size)
        scores = cosine_similarity(text_embeddings[rows], image_embeddings)  # (b, N)
        right = scores.gather(1, image_of_text[rows, None])  # (b, 1)
        # Not >=, so that a NaN ranks before the right answer. Counts the right answer itself.
        t2i_ranks[rows] = (~(scores < right)).sum(dim=1)
    i2t_ranks = torch.empty(num_images)
    for start in range(0, num_images, block_size):
        rows = slice(start, start + block_size)
        scores = cosine_similarity(image_embeddings[rows], text_embeddings)  # (b, M)
        own = image_of_text == torch.arange(num_images)[rows, None]  # (b, M)
        best_own = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)  # (b, 1)
        i2t_ranks[rows] = 1 + (~(scores < best_own) & ~own).sum(dim=1)
    metrics = {}
    for direction, ranks in (("t2i", t2i_ranks), ("i2t", i2t_ranks)):
        for k in RECALL_KS:
            metrics[f"{direction}_r{k}"] = recall_at_k(ranks, k)
        metrics[f"{direction}_medr"] = float(np.median(ranks))
    return metrics


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Percentage of `ranks`, which start at 1, that are k or better."""
    return 100 * (ranks <= k).sum().item() / len(ranks)


def evaluate(
    model: CLIP, tokenizer: Tokenizer, split: Split, config: Config, device: torch.device
) -> dict[str, float]:
    """`retrieval_metrics` of a split: each image once, with all its captions.

    Raises `UserError` for an image that cannot be read.
    """
    images, errors = encode_images(model.image, split.paths, config, device)
    if errors:
        raise next(iter(errors.values()))
    texts = encode_texts(model.text, tokenizer, split.texts, device)
    captions_per_image = torch.tensor([len(captions) for captions in split.captions])
    image_of_text = torch.arange(len(images)).repeat_interleave(captions_per_image)
    return retrieval_metrics(images, texts, image_of_text)


def format_metrics(metrics: dict[str, float]) -> str:
    """The metrics in one line."""
    parts = []
    for direction, name in DIRECTIONS.items():
        recalls = " / ".join(f"{metrics[f'{direction}_r{k}']:.1f}" for k in RECALL_KS)
        median_rank = metrics[f"{direction}_medr"]
        parts.append(f"{name} R@1/5/10 {recalls}, median rank {median_rank:g}")
    return "; ".join(parts)


# ---------------------------------------------------------------- the embedding index

Signature = tuple[str, int, int]  # absolute path, size in bytes, modification time in nanoseconds


def _file_signature(path: Path) -> Signature:
    """Identifies the content of a file without reading it."""
    try:
        stat = path.stat()
    except OSError:  # such as a dangling link; `load_image` will name it
        return os.path.abspath(path), -1, -1
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


class EmbeddingIndex:
    """The embeddings of one folder's images, in files beside the checkpoint that made them.

    `NAME.json` lists the images. The embeddings are a plain .npy array (N, D) `float32`, mapped
    into memory. Its file name contains the digest of the list, so that a list is never used with
    the array of another.
    """

    def __init__(self, folder: Path, name: str, model_id: str, projection_dim: int) -> None:
        self.folder = folder
        self.name = _digest(name)
        self.model_id = model_id
        self.projection_dim = projection_dim

    def read(self) -> tuple[list[Signature], np.ndarray]:
        """The images and their embeddings; both empty if there is no valid index of this model."""
        empty = [], np.empty((0, self.projection_dim), np.float32)
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
            embeddings = np.load(array, mmap_mode="c", allow_pickle=False)
            self._validate(signatures, embeddings)
        except Exception as error:  # a damaged or hostile file can raise anything
            print(f"{listing}: is damaged and built again ({error})")
            return empty
        return signatures, embeddings

    def _validate(self, signatures: list[Signature], embeddings: np.ndarray) -> None:
        shape = (len(signatures), self.projection_dim)
        if embeddings.shape != shape or embeddings.dtype != np.float32:
            raise ValueError("its array does not fit its list")
        row_sums = embeddings @ np.ones(self.projection_dim, np.float32)
        if not np.isfinite(row_sums).all():
            raise ValueError("its array contains values that are not finite")

    def write(self, signatures: list[Signature], embeddings: np.ndarray) -> None:
        """Replaces the index; prints a line if the folder cannot be written."""
        text = json.dumps({"model": self.model_id, "images": signatures})
        array = self._array_path(text)
        try:
            self.folder.mkdir(exist_ok=True)
            atomic_write(array, lambda file: np.save(file, embeddings))
            atomic_write(self.folder / f"{self.name}.json", lambda file: file.write(text.encode()))
        except (OSError, UserError) as error:
            print(f"the index is not saved: {error}")
            return
        for old_array in set(self.folder.glob(f"{self.name}-*.npy")) - {array}:
            old_array.unlink(missing_ok=True)

    def _array_path(self, listing: str) -> Path:
        return self.folder / f"{self.name}-{_digest(listing)}.npy"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]  # a path may not be UTF-8


# ---------------------------------------------------------------- search


@dataclass(frozen=True)
class Match:
    """A text and an image that match.

    `score` is their cosine (`Searcher.search`) or the text's probability (`Searcher.classify`).
    """

    query: str
    rank: int
    score: float
    path: Path


class Searcher:
    """A checkpoint ready for queries.

    Searcher("best.pt").search(["a dog"], images="my/folder", n=8)
    """

    def __init__(self, weights: str | Path, device: str = "auto", num_workers: int = -1) -> None:
        """Raises `UserError` if `weights` is not a checkpoint of this program."""
        self.checkpoint_path = Path(weights)
        self.checkpoint = load_checkpoint(weights)
        self.config = replace(self.checkpoint.config, num_workers=num_workers)
        self.tokenizer = self.checkpoint.tokenizer
        self.device = pick_device(device)

    @cached_property
    def image_tower(self) -> Tower:
        tower = load_tower(self.checkpoint, "image")
        return tower.to(self.device, memory_format=torch.channels_last)

    @cached_property
    def text_tower(self) -> Tower:
        return load_tower(self.checkpoint, "text").to(self.device)

    def search(
        self, queries: list[str], images: str | Path | None = None, n: int = 8
    ) -> list[list[Match]]:
        """For each query its n best matches, best first.

        Searches the images in the folder `images` and its subfolders, or without one the test
        images of the data set that the model was trained on.
        """
        paths, image_embeddings = self.index_images(images)
        query_embeddings = encode_texts(self.text_tower, self.tokenizer, queries, self.device)
        scores, indices = top_matches(query_embeddings, image_embeddings, n)  # (Q, n)
        if not scores.isfinite().all():
            raise UserError(f"{self.checkpoint_path}: is damaged, its cosines are not finite")
        results = []
        for query, row_scores, row_indices in zip(queries, scores.tolist(), indices.tolist()):
            hits = zip(row_scores, row_indices)
            matches = [Match(query, i, score, paths[at]) for i, (score, at) in enumerate(hits, 1)]
            results.append(matches)
        return results

    def classify(self, image: str | Path, texts: list[str], n: int = 8) -> list[Match]:
        """The n most probable of `texts` for an image: zero-shot classification, section 3.1."""
        path = Path(image)
        transform = Transform(eval_image_size(self.image_tower, self.config))
        pixels = stack_images([transform(load_image(path))])  # (1, 3, S, S)
        with torch.inference_mode():
            image_embedding = self.image_tower(pixels.to(self.device)).cpu()  # (1, D)
        text_embeddings = encode_texts(self.text_tower, self.tokenizer, texts, self.device)
        cosines = cosine_similarity(image_embedding, text_embeddings)[0]  # (Q,)
        logits = self.checkpoint.model["logit_scale"].exp() * cosines
        scores, indices = logits.softmax(dim=0).topk(min(n, len(texts)))
        hits = zip(scores.tolist(), indices.tolist())
        return [Match(texts[at], i, score, path) for i, (score, at) in enumerate(hits, start=1)]

    def index_images(self, images: str | Path | None = None) -> tuple[list[Path], Tensor]:
        """The readable images and their embeddings (N, D); see `search` for `images`.

        Embeddings are kept in an index beside the checkpoint. Only images that are new or changed
        since then, by path, size and modification time, are encoded. Unreadable ones are tried
        again.
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
            embeddings = np.concatenate([embeddings, new_embeddings.numpy()])

        # 3. Order the embeddings as the images, and save them.
        found = [(p, s) for p, s in zip(paths, signatures) if s in row_of]
        if not found:
            raise UserError(f"{images}: contains no image that can be read")
        found_signatures = [signature for _, signature in found]
        embeddings = embeddings[[row_of[signature] for signature in found_signatures]]
        if found_signatures != known:
            index.write(found_signatures, embeddings)
        return [path for path, _ in found], torch.from_numpy(embeddings)

    def _list_images(self, images: str | Path | None) -> list[Path]:
        if images is None:
            return self.test_split().paths
        paths = list_images(Path(images))
        if not paths:
            raise UserError(f"--images {images}: is not a folder that contains images")
        return paths

    def _open_index(self, images: str | Path | None) -> EmbeddingIndex:
        folder = self.checkpoint_path.with_suffix(".index")
        if images is None:
            name = os.path.abspath(self.config.data_dir) + " test split"
        else:
            name = os.path.abspath(images)
        # Embeddings of images encoded at another scale are not reused.
        model_id = f"{self.checkpoint.fingerprint} at {EVAL_SCALE:.3f}"
        return EmbeddingIndex(folder, name, model_id, self.config.projection_dim)

    def test_split(self) -> Split:
        """The test split of the data set that the model was trained on.

        Raises `UserError` if the data set is not where it was.
        """
        if Path(self.config.data_dir).is_dir():
            return read_splits(self.config.data_dir)["test"]
        raise UserError(
            f"{self.config.data_dir}, the data set of the training, is not here; pass --images"
        )


# ---------------------------------------------------------------- output


def show_matches(results: list[list[Match]], output: Path) -> None:
    """Prints the matches of each query and saves them as a figure or a table."""
    for matches in results:
        print(f"\n{matches[0].query}\nrank  cosine  image")
        for match in matches:
            print(f"{match.rank:4}  {match.score:6.3f}  {match.path}")
    _save(results, lambda: plot_matches(results), output)


def show_probabilities(matches: list[Match], output: Path) -> None:
    """Prints the texts for one image and saves them as a figure or a table."""
    print(f"\n{matches[0].path}\nrank   prob.  text")
    for match in matches:
        print(f"{match.rank:4}  {match.score:6.3f}  {match.query}")
    _save([matches], lambda: plot_probabilities(matches), output)


def _save(results: list[list[Match]], plot: Any, output: Path) -> None:
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
    print(f"\nsaved {output}")


def plot_matches(results: list[list[Match]]) -> Figure:
    """A grid of images for each query, with rank, cosine and file name."""
    n = max(len(matches) for matches in results)
    # Between 4 and 8 columns, with as few empty cells as possible.
    columns = min(n, min(range(4, 9), key=lambda columns: -n % columns))
    rows = math.ceil(n / columns)
    width = max(columns, 2)
    height = len(results) * (rows * 2.3 + 0.6)  # inches
    dpi = min(110, 30_000 / height)  # the PNG format has a limit
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
            name = match.path.name.encode(errors="backslashreplace").decode()  # may not be UTF-8
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
    image_ax.set_title(matches[0].path.name[-40:], parse_math=False)
    image_ax.axis("off")
    bar_ax.barh(range(len(matches)), [match.score for match in matches])
    labels = [_wrap(match.query, 40) for match in matches]
    bar_ax.set_yticks(range(len(matches)), labels, fontsize=8, parse_math=False)
    bar_ax.set(xlim=(0, 1), xlabel="probability", ylim=(len(matches) - 0.5, -0.5))
    return figure


def _wrap(text: str, width: int) -> str:
    """At most two lines of text."""
    return textwrap.fill(textwrap.shorten(text, 2 * width), width)


def _thumbnail(path: Path) -> Image.Image:
    image = Image.fromarray(load_image(path))
    image.thumbnail((300, 300))
    return image


# ---------------------------------------------------------------- command line


def read_queries(config: SearchConfig) -> list[str]:
    """The queries of the command line; for "-" the lines of standard input."""
    if config.query != ["-"]:
        return config.query
    with suppress(UnicodeDecodeError):
        lines = [line.strip() for line in sys.stdin if line.strip()]
        if lines:
            return lines
    raise UserError("--query -: standard input contains no line of UTF-8 text")


@cli_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(SearchConfig, argv)
    searcher = Searcher(config.weights, config.device, config.num_workers)
    if config.evaluate:
        split = searcher.test_split()
        model = load_clip(searcher.checkpoint)
        model.to(searcher.device, memory_format=torch.channels_last)
        metrics = evaluate(model, searcher.tokenizer, split, searcher.config, searcher.device)
        print(format_metrics(metrics))
    elif config.image:
        texts = read_queries(config) or searcher.test_split().texts
        show_probabilities(searcher.classify(config.image, texts, config.n), config.output)
    else:
        queries = read_queries(config) or [searcher.checkpoint.example_query]
        show_matches(searcher.search(queries, config.images, config.n), config.output)


if __name__ == "__main__":
    main()
