"""Searches pictures with trained weights.

python inference.py --weights runs/demo/best.pt --n 8
python inference.py --weights runs/clip/best.pt --images ~/Pictures --query "a dog on a beach" --query "snow"
python inference.py --weights runs/clip/best.pt --image photo.jpg --query "a dog" --query "a cat"
python inference.py --weights runs/clip/best.pt --evaluate
"""

import hashlib
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure  # not pyplot: a figure alone never asks for a display
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
    stack,
    tokenize,
)
from models import EVAL_SCALE, Tower, eval_image_size, load_checkpoint, load_tower, pick_device

RECALLS_AT = (1, 5, 10)
SCORES_PER_BLOCK = 2**24  # of a block of the ranking: 64 MB
METRICS = [
    f"{way}_{name}" for way in ("t2i", "i2t") for name in (*(f"r{k}" for k in RECALLS_AT), "medr")
]


# ---------------------------------------------------------------- embedding


class ImageDataset(Dataset):
    """Pictures ready for the encoder, (S, S, 3) `uint8`; for one that cannot be read, the error."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.transform = paths, Transform(size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray | UserError:
        try:
            return self.transform(load_image(self.paths[i]))
        except UserError as error:
            return error


@torch.inference_mode()
def encode_images(
    image: Tower, paths: list[Path], config: Config, device: torch.device
) -> tuple[Tensor, dict[int, UserError]]:
    """Unit vectors (R, D) of the R readable ones of `paths`, in order, and what is wrong with each of the others."""
    # On the CPU the encoder needs every core, and forking off it now would have each of its gigabytes' pages copied.
    workers = 0 if device.type == "cpu" and config.num_workers < 0 else config.num_workers
    batches = build_loader(
        ImageDataset(paths, eval_image_size(image, config)),
        workers,
        device,
        collate_fn=list,
        batch_size=64,
    )
    embeddings, rows, broken = torch.empty(len(paths), config.projection_dim), 0, {}
    for items in progress(batches, "embedding pictures", leave=False):
        broken |= {
            rows + len(broken) + i: item
            for i, item in enumerate(items)
            if isinstance(item, UserError)
        }
        if readable := [item for item in items if isinstance(item, np.ndarray)]:
            embeddings[rows : rows + len(readable)] = image(stack(readable).to(device)).cpu()
            rows += len(readable)
    return embeddings[:rows], broken


@torch.inference_mode()
def encode_texts(
    encode_text: Callable[[Tensor, Tensor], Tensor],
    tokenizer: Tokenizer,
    texts: list[str],
    device: torch.device,
) -> Tensor:
    """Unit vectors (Q, D) on the CPU, in the order of `texts`."""
    by_length = sorted(
        range(len(texts)), key=lambda i: len(texts[i])
    )  # so that little of a batch is padding
    embeddings = []
    for start in progress(range(0, len(texts), 256), "embedding texts", leave=False):
        ids, mask = tokenize(tokenizer, [texts[i] for i in by_length[start : start + 256]])
        embeddings.append(encode_text(ids.to(device), mask.to(device)).cpu())
    return torch.cat(embeddings)[np.argsort(by_length)]


# ---------------------------------------------------------------- ranking


def cosine_similarity(left: Tensor, right: Tensor) -> Tensor:
    """Of unit vectors on the CPU, (L, D) @ (D, R), by NumPy, whose BLAS is faster than torch's (README, Speed)."""
    return torch.from_numpy(left.numpy() @ right.numpy().T)


def top_matches(
    query_embeddings: Tensor, image_embeddings: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """The n best pictures of each query: cosine_similarity and positions, both (Q, min(n, N)), best first.

    Exact; a block of the pictures at a time, so that memory does not grow with their number.
    """
    queries, images = query_embeddings.numpy(), image_embeddings.numpy()
    best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    block = 64 * math.ceil(SCORES_PER_BLOCK / 64 / len(queries))
    for start in range(0, len(images), block):
        scores = queries @ images[start : start + block].T  # (Q, D) @ (D, b)
        columns = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        if (
            groups := scores.shape[1] // 64
        ) > n:  # the best are in the n groups of 64 with the largest maxima
            maxima = scores[:, : 64 * groups].reshape(-1, 64, groups).max(axis=1)  # (Q, groups)
            members = _topk(maxima, columns, n)[1][:, :, None] + groups * np.arange(
                64
            )  # (Q, n, 64)
            columns = np.hstack([members.reshape(len(queries), -1), columns[:, 64 * groups :]])
            scores = np.take_along_axis(scores, columns, axis=1)
        found = _topk(scores, start + columns, n)
        best = _topk(*(np.hstack(parts) for parts in zip(best, found)), n)
    order = np.argsort(-best[0], axis=1)
    return tuple(torch.from_numpy(np.take_along_axis(part, order, axis=1)) for part in best)


def _topk(scores: np.ndarray, positions: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n largest of each row (Q, b), in no order, and what `positions` has at their places."""
    n = min(n, scores.shape[1])
    places = np.argpartition(scores, -n, axis=1)[:, -n:]
    return np.take_along_axis(scores, places, axis=1), np.take_along_axis(positions, places, axis=1)


def retrieval_metrics(
    image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor, block: int = 256
) -> dict[str, float]:
    """Recalls at 1, 5 and 10 in percent, and median ranks, text to image (t2i) and image to text (i2t).

    By the protocol of Hodosh et al. (2013), as the field uses it: each of the M texts ranks all N pictures, and each
    picture all texts, where the first of its own texts counts. Whatever scores the same ranks before the right answer,
    so that a model that tells nothing apart scores 0.

    `image_embeddings` (N, D), `text_embeddings` (M, D), `image_of_text` (M,): which of the N each text belongs to.
    """
    text_to_image, image_to_text = (
        torch.empty(len(text_embeddings)),
        torch.empty(len(image_embeddings)),
    )  # ranks
    for start in range(0, len(text_embeddings), block):
        scores = cosine_similarity(
            text_embeddings[start : start + block], image_embeddings
        )  # (b, N)
        right = scores.gather(1, image_of_text[start : start + block, None])  # (b, 1)
        text_to_image[start : start + block] = (~(scores < right)).sum(
            dim=1
        )  # itself, and what is not worse
    for start in range(0, len(image_embeddings), block):
        scores = cosine_similarity(
            image_embeddings[start : start + block], text_embeddings
        )  # (b, M)
        own = image_of_text == torch.arange(start, start + len(scores))[:, None]  # (b, M)
        best = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)  # (b, 1)
        image_to_text[start : start + block] = 1 + (~(scores < best) & ~own).sum(dim=1)
    metrics = []
    for ranks in (text_to_image, image_to_text):
        metrics += [recall_at_k(ranks, k) for k in RECALLS_AT] + [float(np.median(ranks))]
    return dict(zip(METRICS, metrics))


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Percentage of `ranks`, counted from 1, that are among the first k."""
    return 100 * (ranks <= k).sum().item() / len(ranks)


def evaluate(
    image: Tower,
    text: Tower,
    tokenizer: Tokenizer,
    split: Split,
    config: Config,
    device: torch.device,
) -> dict[str, float]:
    """`retrieval_metrics` of a split: each picture once, and all its captions."""
    images, broken = encode_images(image, split.paths, config, device)
    if broken:
        raise next(iter(broken.values()))
    texts = encode_texts(text, tokenizer, split.texts, device)
    image_of_text = [picture for picture, captions in enumerate(split.captions) for _ in captions]
    return retrieval_metrics(images, texts, torch.tensor(image_of_text))


def format_metrics(metrics: dict[str, float]) -> str:
    """The metrics in one line."""
    ways = []
    for way, name in (("t2i", "text to image"), ("i2t", "image to text")):
        recalls = " / ".join(f"{metrics[f'{way}_r{k}']:.1f}" for k in RECALLS_AT)
        ways.append(f"{name} R@1/5/10 {recalls}, median rank {metrics[f'{way}_medr']:g}")
    return "; ".join(ways)


@dataclass(frozen=True)
class Match:
    """A text and a picture that fit; `score` is their cosine, or the probability of the text (`classify`)."""

    query: str
    rank: int
    score: float
    path: Path


class Searcher:
    """Trained weights, ready to be asked: `Searcher("best.pt").search(["a dog"], images="my/folder", n=8)`."""

    def __init__(self, weights: str | Path, device: str = "auto", num_workers: int = -1) -> None:
        """Raises `UserError` where `weights` is not a file of ours."""
        self.weights_path = Path(weights)
        self.weights = load_checkpoint(weights)
        self.config = replace(self.weights["config"], num_workers=num_workers)
        self.tokenizer, self.device = self.weights["tokenizer"], pick_device(device)

    @cached_property
    def image_tower(self) -> Tower:
        return load_tower(self.weights, "image").to(self.device, memory_format=torch.channels_last)

    @cached_property
    def text_tower(self) -> Tower:
        return load_tower(self.weights, "text").to(self.device)

    def search(self, queries: list[str], images: str = "", n: int = 8) -> list[list[Match]]:
        """For each query its n best matches, best first, among the pictures in and below the folder `images`; without
        one, among the test pictures of the training's data set."""
        paths, image_embeddings = self.index_images(images)
        query_embeddings = encode_texts(self.text_tower, self.tokenizer, queries, self.device)
        scores, positions = top_matches(query_embeddings, image_embeddings, n)
        if not scores.isfinite().all():
            raise UserError(
                f"{self.weights_path}: the weights are damaged, cosine_similarity are not numbers"
            )
        return [
            [
                Match(query, rank, score, paths[at])
                for rank, (score, at) in enumerate(zip(*found), start=1)
            ]
            for query, *found in zip(queries, scores.tolist(), positions.tolist())
        ]

    def classify(self, image: str | Path, texts: list[str], n: int = 8) -> list[Match]:
        """The n most probable of `texts` for a picture: zero-shot classification, section 3.1 of the paper."""
        pixels = stack(
            [Transform(eval_image_size(self.image_tower, self.config))(load_image(Path(image)))]
        )
        with torch.inference_mode():
            embedding = self.image_tower(pixels.to(self.device)).cpu()
        text_embeddings = encode_texts(self.text_tower, self.tokenizer, texts, self.device)
        logits = (
            self.weights["model"]["logit_scale"].exp()
            * cosine_similarity(embedding, text_embeddings)[0]
        )  # (Q,)
        scores, positions = (
            found.tolist() for found in logits.softmax(dim=0).topk(min(n, len(texts)))
        )
        return [
            Match(texts[at], i + 1, score, Path(image))
            for i, (score, at) in enumerate(zip(scores, positions))
        ]

    def index_images(self, images: str = "") -> tuple[list[Path], Tensor]:
        """The readable pictures and their embeddings (N, D), from the index beside the weights as far as it has them.

        What can be reused is decided picture by picture, by path, size and time of change.
        """
        paths = list_images(Path(images)) if images else self.test_split().paths
        if not paths:
            raise UserError(f"--images {images}: not a folder that holds pictures")
        states = [_file_signature(path) for path in paths]
        name = os.path.abspath(images or self.config.data_dir) + ("" if images else " test split")
        folder = self.weights_path.with_suffix(".index")
        maker = f"{self.weights['fingerprint']} at {EVAL_SCALE:.3f}"  # of pictures at another scale nothing is kept
        index = EmbeddingIndex(folder, name, maker, self.config.projection_dim)
        known, embeddings = index.read()
        if states == known:
            return paths, torch.from_numpy(embeddings)
        rows = {state: row for row, state in enumerate(known)}
        if new := [i for i, state in enumerate(states) if state not in rows]:
            fresh, broken = encode_images(
                self.image_tower, [paths[i] for i in new], self.config, self.device
            )
            if broken:
                print(
                    f"skipped {len(broken)} of {len(paths)} pictures:", *broken.values(), sep="\n  "
                )
            readable = [i for position, i in enumerate(new) if position not in broken]
            rows |= {states[i]: len(known) + row for row, i in enumerate(readable)}
            embeddings = np.concatenate([embeddings, fresh.numpy()])
        if not (kept := [i for i, state in enumerate(states) if state in rows]):
            raise UserError(f"{images}: holds no picture that can be read")
        embeddings = embeddings[[rows[states[i]] for i in kept]]
        if [states[i] for i in kept] != known:
            index.write([states[i] for i in kept], embeddings)
        return [paths[i] for i in kept], torch.from_numpy(embeddings)

    def test_split(self) -> Split:
        """That of the data set that the weights were trained on; raises `UserError` where it is not here."""
        if Path(self.config.data_dir).is_dir():
            return read_splits(self.config.data_dir)["test"]
        raise UserError(
            f"{self.config.data_dir}, where the weights were trained, is not here; give --images"
        )


def _file_signature(path: Path) -> tuple[str, int, int]:
    """What tells a picture from its former self: its path, size in bytes and time of change in nanoseconds."""
    try:
        stat = path.stat()
    except OSError:  # such as a dangling link; reading it will say what is wrong
        return os.path.abspath(path), -1, -1
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


class EmbeddingIndex:
    """The embeddings of one folder's pictures, kept beside the weights that made them.

    `NAME.json` lists the pictures; the array, a plain .npy (N, D) `float32` that is mapped into memory, bears in its
    name the digest of that list, so that the two cannot be of different times.
    """

    def __init__(self, folder: Path, name: str, weights: str, width: int) -> None:
        self.folder, self.name, self.weights, self.feature_dim = (
            folder,
            _digest(name),
            weights,
            width,
        )

    def read(self) -> tuple[list[tuple], np.ndarray]:
        """Nothing where there is no index, or where it is not whole or of other weights."""
        nothing = [], np.empty((0, self.feature_dim), np.float32)
        listing = self.folder / f"{self.name}.json"
        if not listing.is_file():
            return nothing
        try:
            text = listing.read_text()
            content = json.loads(text)
            if content["weights"] != self.weights:
                return nothing
            states = [tuple(state) for state in content["pictures"]]
            embeddings = np.load(
                self.folder / f"{self.name}-{_digest(text)}.npy", mmap_mode="c", allow_pickle=False
            )
            fits = (
                embeddings.shape == (len(states), self.feature_dim)
                and embeddings.dtype == np.float32
            )
            if (
                not fits
                or not np.isfinite(embeddings @ np.ones(self.feature_dim, np.float32)).all()
            ):
                raise ValueError("its array does not fit its list")
        except Exception as error:  # whatever a torn or tampered file brings about
            print(f"{listing}: damaged, so it is made anew ({error})")
            return nothing
        return states, embeddings

    def write(self, states: list[tuple], embeddings: np.ndarray) -> None:
        text = json.dumps({"weights": self.weights, "pictures": states})
        array = self.folder / f"{self.name}-{_digest(text)}.npy"
        try:
            self.folder.mkdir(exist_ok=True)
            atomic_write(array, lambda file: np.save(file, embeddings))
            atomic_write(self.folder / f"{self.name}.json", lambda file: file.write(text.encode()))
        except (OSError, UserError) as error:
            print(f"the index is not kept: {error}")
            return
        for former in set(self.folder.glob(f"{self.name}-*.npy")) - {array}:
            former.unlink(missing_ok=True)


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]  # a path may be no UTF-8


# ---------------------------------------------------------------- showing


def show(matches: list[list[Match]], output: Path, of_picture: bool = False) -> None:
    """Prints the matches of each query, or the texts `of_picture`, and saves them: a table or a picture by `output`."""
    for found in matches:
        title, score, column = (
            (found[0].path, "prob.", "text")
            if of_picture
            else (found[0].query, "cosine", "picture")
        )
        print(f"\n{title}\nrank  {score:>6}  {column}")
        for match in found:
            print(
                f"{match.rank:4}  {match.score:6.3f}  {match.query if of_picture else match.path}"
            )
    if output.suffix.lower() == ".csv":
        import pandas as pd  # here, as a search that draws does without it

        table = pd.DataFrame([match for found in matches for match in found])
        atomic_write(
            output, lambda file: table.to_csv(file, index=False, errors="backslashreplace")
        )
    else:
        figure = plot_probabilities(matches[0]) if of_picture else plot_matches(matches)
        atomic_write(output, lambda file: figure.savefig(file, format=output.suffix[1:].lower()))
    print(f"\nsaved {output}")


def plot_matches(matches: list[list[Match]]) -> Figure:
    """A grid: each query, and below it its matches with rank, cosine and file name."""
    n = max(len(found) for found in matches)
    columns = min(
        n, min(range(4, 9), key=lambda width: -n % width)
    )  # as few empty places as can be
    rows = math.ceil(n / columns)
    height = len(matches) * (rows * 2.3 + 0.6)
    figure = Figure(
        figsize=(max(columns, 2) * 2, height), dpi=min(110, 30_000 / height), layout="constrained"
    )
    for found, block in zip(matches, np.atleast_1d(figure.subfigures(len(matches), 1))):
        block.suptitle(wrapped(found[0].query, 13 * max(columns, 2)), parse_math=False)
        bare = {"frame_on": False, "xticks": [], "yticks": []}
        for match, place in zip(
            found, block.subplots(rows, columns, squeeze=False, subplot_kw=bare).flat
        ):
            place.imshow(thumbnail(match.path))
            name = match.path.name.encode(errors="backslashreplace").decode()  # it may be no text
            title = (
                f"{match.rank}.  {match.score:.3f}\n{name if len(name) <= 28 else '…' + name[-27:]}"
            )
            place.set_title(title, fontsize=8, parse_math=False)
    return figure


def plot_probabilities(found: list[Match]) -> Figure:
    """A picture, and beside it the probabilities of the texts as bars."""
    figure = Figure(figsize=(11, max(3.0, 0.5 * len(found) + 1)), dpi=110, layout="constrained")
    picture, bars = figure.subplots(1, 2, width_ratios=(1, 1.2))
    picture.imshow(thumbnail(found[0].path))
    picture.set_title(found[0].path.name[-40:], parse_math=False)
    picture.axis("off")
    bars.barh(range(len(found)), [match.score for match in found])
    bars.set_yticks(
        range(len(found)),
        [wrapped(match.query, 40) for match in found],
        fontsize=8,
        parse_math=False,
    )
    bars.set(xlim=(0, 1), xlabel="probability", ylim=(len(found) - 0.5, -0.5))
    return figure


def read_queries(config: SearchConfig) -> list[str]:
    """The queries of the command line, or with "-" those on standard input, a line each."""
    if config.query != ["-"]:
        return config.query
    with suppress(UnicodeDecodeError):
        if lines := [line.strip() for line in sys.stdin if line.strip()]:
            return lines
    raise UserError("--query -: standard input holds no line of UTF-8 text")


def wrapped(text: str, width: int) -> str:
    return textwrap.fill(textwrap.shorten(text, 2 * width), width)


def thumbnail(path: Path) -> Image.Image:
    picture = Image.fromarray(load_image(path))
    picture.thumbnail((300, 300))
    return picture


@cli_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(SearchConfig, argv)
    searcher = Searcher(config.weights, config.device, config.num_workers)
    if config.evaluate:
        split, towers = searcher.test_split(), (searcher.image_tower, searcher.text_tower)
        print(
            format_metrics(
                evaluate(*towers, searcher.tokenizer, split, searcher.config, searcher.device)
            )
        )
    elif config.image:
        texts = read_queries(config) or searcher.test_split().texts
        show(
            [searcher.classify(config.image, texts, config.n)], Path(config.output), of_picture=True
        )
    else:
        queries = read_queries(config) or [searcher.weights["example_query"]]
        show(searcher.search(queries, config.images, config.n), Path(config.output))


if __name__ == "__main__":
    main()
