"""Measures training, encoding, memory and ranking on a machine with a GPU, in three minutes.

python tests/benchmarks/benchmark.py --device cuda

It needs no folder: ResNet-50 + DistilBERT are from scratch, and the images are generated, or those
of `--data-dir`, at 500 x 375 pixels. Baselines are measured in the same process. `--device cpu`
runs the same code with small encoders and few images.
"""

import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import trainer  # noqa: E402
from config import Config  # noqa: E402
from data import list_images  # noqa: E402
from inference import build_image_loader, encode_images, top_matches  # noqa: E402
from models import TokenBatches, contrastive_loss, pick_device  # noqa: E402

Row = tuple[str, str, str]  # what, figure, target


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""

    config: Config
    steps: int  # per epoch
    dev: int  # images
    chunked_batches: tuple[int, ...]  # batch sizes of steps with `--chunk-size`
    vectors: tuple[int, ...]  # numbers of embeddings to rank


COMMON = Config(data_dir="data", pretrained=False, text_encoder="distilbert", num_workers=14)
GPU = Sizes(
    config=replace(COMMON, epochs=12, drop_path=0.0),
    steps=46,  # of Flickr8k
    dev=1000,
    chunked_batches=(512, 2048, 8192),
    vectors=(10**6, 10**7),
)
SMALL = {"image_encoder": "test_resnet", "image_size": 32, "text_layers": 1, "text_width": 64}
CPU = Sizes(
    config=replace(COMMON, epochs=3, drop_path=0.0, batch_size=8, num_workers=1, **SMALL),
    steps=3,
    dev=8,
    chunked_batches=(8, 16),
    vectors=(10**3, 10**4),
)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", required=True, help="cuda, or cpu to try the program")
    parser.add_argument("--data-dir", help="folder of Flickr8k; default: generated images")
    parser.add_argument("--num-workers", type=int, help="DataLoader workers; default: 14")
    options = parser.parse_args()
    sizes = CPU if options.device == "cpu" else GPU
    config = replace(sizes.config, device=options.device)
    if options.num_workers is not None:
        config = replace(config, num_workers=options.num_workers)

    started = time.perf_counter()
    print("| what | measured | target |\n| --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):
            source = list_images(Path(options.data_dir).absolute()) if options.data_dir else []
            os.chdir(folder)
            save_data_set(sizes, source)
            run = trainer.setup(config, None, trainer.Distributed.init(config))
            run.run_dir.mkdir(parents=True)
        for measure in (training, encoding, chunks, ranking):
            for row in measure(run, sizes):
                print(f"| {' | '.join(row)} |", flush=True)
        os.chdir(ROOT)
    print(f"\n{time.perf_counter() - started:.0f} s in total")


def save_data_set(sizes: Sizes, source: list[Path]) -> None:
    """A data set of 500 x 375 JPEGs with captions of 12 of 30,000 words, in Kaggle's layout.

    The images are 256 of `source`, or generated, and links to them.
    """
    rng = np.random.default_rng(0)
    images = Path("data/Images")
    images.mkdir(parents=True)
    num_train = sizes.steps * sizes.config.batch_size
    names = [f"{i}.jpg" for i in range(num_train + 2 * sizes.dev)]
    for i, name in enumerate(names):
        if i >= 256:
            os.link(images / names[i % 256], images / name)
            continue
        if source:
            image = Image.open(source[i % len(source)]).convert("RGB")
        else:
            image = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        image.resize((500, 375)).save(images / name, quality=90)
    words = rng.integers(0, 30_000, (5 * len(names), 12))
    captions = [" ".join(f"w{word}" for word in caption) for caption in words]
    table = pd.DataFrame({"image": np.repeat(names, 5), "caption": captions})
    table.to_csv("data/captions.txt", index=False)
    ends = (0, num_train, num_train + sizes.dev, len(names))
    for split, start, end in zip(("train", "dev", "test"), ends, ends[1:]):
        Path(f"data/Flickr_8k.{split}Images.txt").write_text("\n".join(names[start:end]))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The time of `work`, with all that it starts on the device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- training


def training(run: trainer.Run, sizes: Sizes) -> Iterator[Row]:
    """The loop, and whole epochs with validation and saving, over the bare encoders.

    They are measured before and after; their batches are on the device.
    """
    config, device = run.config, run.dist.device
    with redirect_stdout(sys.stderr):
        batches = load_batches(run, 8)
        bare = [bare_step_seconds(run, batches) for _ in range(2)][1:]  # the first warms up
        trainer.open_run_dir(run)
        whole = seconds_of(lambda: trainer.train_epochs(run), device) / config.epochs
        bare.append(bare_step_seconds(run, batches))
        validation = seconds_of(lambda: trainer.validate(run.model, run), device)
        saving = seconds_of(lambda: trainer.save_checkpoint(run), device)
        reading = read_seconds(run.loader, 2 * sizes.steps) / sizes.steps / 2
    bare_step = statistics.mean(bare)
    bare_speed = config.batch_size / bare_step
    speeds = [row["pairs_per_second"] for row in run.history[1:]]
    loop = statistics.median(speeds)

    what = f"pairs/s of the loop over its bare encoders, {config.num_workers} workers"
    yield what, f"{loop:,.0f} / {bare_speed:,.0f} = {loop / bare_speed:.3f}", "≥ 0.95"
    bare_epoch = sizes.steps * bare_step
    what = f"seconds of the bare steps of an epoch over the whole epoch, mean of {config.epochs}"
    yield what, f"{bare_epoch:.2f} / {whole:.2f} = {bare_epoch / whole:.3f}", "≥ 0.80"
    figure = f"{validation:.2f} s, {saving:.2f} s"
    yield f"validation of {sizes.dev:,} images; saving, at most once a minute", figure, ""
    speed = config.batch_size / reading
    cores = 0.95 * bare_speed / speed * config.num_workers
    figure = f"{speed:,.0f} pairs/s; {cores:.1f} workers"
    yield "loading alone; cores per GPU for 0.95 of the bare encoders", figure, ""


def load_batches(run: trainer.Run, count: int) -> list[tuple[Tensor, TokenBatches]]:
    """Pixels and texts of training batches, on the device; fewer on the CPU."""
    device = run.dist.device
    batches = []
    for _, batch in zip(range(min(count, run.steps_per_epoch)), run.loader):
        texts = [(ids.to(device), mask.to(device)) for ids, mask in batch["texts"]]
        batches.append((batch["pixels"].to(device), texts))
    return batches


def bare_step_seconds(run: trainer.Run, batches: list[tuple[Tensor, TokenBatches]]) -> float:
    """Seconds of a step of the encoders, the loss and the optimizer alone."""
    trainer.set_train_mode(run.model, run.config)
    device, precision = run.dist.device, run.dist.precision
    num_steps = 40 if device.type == "cuda" else len(batches)

    def steps() -> None:
        for step in range(num_steps):
            pixels, texts = batches[step % len(batches)]
            with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
                embeddings = run.model(pixels, texts)
            contrastive_loss(*embeddings).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

    return seconds_of(steps, device) / num_steps


def read_seconds(loader: DataLoader, count: int) -> float:
    """Seconds to load `count` batches, after the first ones of all workers."""
    batches = iter(loader)
    for _ in range(min(loader.num_workers, len(loader) - count)):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - started


# ---------------------------------------------------------------- encoding


def encoding(run: trainer.Run, sizes: Sizes) -> Iterator[Row]:
    """Encoding image files over the image encoder's bare forward on the same pixels."""
    config, device = run.config, run.dist.device
    tower = run.model.image.eval()
    paths = run.splits["train"].paths
    loader = build_image_loader(tower, paths, config, device)
    pixels = [batch["pixels"].to(device) for _, batch in zip(range(16), loader)]

    @torch.inference_mode()
    def encode_bare() -> None:
        for batch in pixels:
            tower(batch)

    encode_bare()  # warms up
    num_bare = sum(len(batch) for batch in pixels)
    bare = num_bare / statistics.median(seconds_of(encode_bare, device) for _ in range(3))
    encode = partial(encode_images, tower, paths, config, device, loader)
    ours = len(paths) / statistics.median(seconds_of(encode, device) for _ in range(3))
    reading = len(paths) / seconds_of(lambda: list(map(len, loader)), device)
    size = loader.dataset.transform.min_side
    what = f"images/s encoded from files over bare forward, {size} px, {config.num_workers} workers"
    yield what, f"{ours:,.0f} / {bare:,.0f} = {ours / bare:.3f}", "≥ 0.60"
    cores = 0.95 * bare / reading * config.num_workers
    figure = f"{reading:,.0f} images/s; {cores:.1f} workers"
    yield "loading alone; cores per GPU for 0.95 of the bare forward", figure, ""


# ---------------------------------------------------------------- memory and ranking


def chunks(run: trainer.Run, sizes: Sizes) -> Iterator[Row]:
    """Peak memory on the device of steps with `--chunk-size`, less the batch itself."""
    size, device = run.config.image_size, run.dist.device
    chunk_size = sizes.chunked_batches[0] // 4
    trainer.set_train_mode(run.model, run.config)
    figures = []
    for batch_size in sizes.chunked_batches:
        run.config = replace(run.config, batch_size=batch_size, chunk_size=chunk_size)
        batch = random_batch(batch_size, chunk_size, size)
        trainer.train_step(run, batch)  # warms up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        speed = batch_size / seconds_of(partial(trainer.train_step, run, batch), device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        gigabytes = (peak - batch["pixels"].nbytes) / 1e9
        figures.append(f"{batch_size:,}: {gigabytes:.2f} GB, {speed:,.0f} pairs/s")
    what = f"peak memory of a step in chunks of {chunk_size}, by batch size"
    yield what, "; ".join(figures), "flat"


def random_batch(batch_size: int, chunk_size: int, size: int) -> dict[str, Any]:
    """A training batch of noise, with captions of 14 tokens."""
    pixels = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(5, 100, (batch_size, 14))
    return {
        "pixels": pixels.contiguous(memory_format=torch.channels_last),
        "texts": [(part, torch.ones_like(part)) for part in ids.split(chunk_size)],
        "caption_ids": torch.arange(batch_size),
    }


def ranking(run: trainer.Run, sizes: Sizes) -> Iterator[Row]:
    """Ranking on the CPU, whose threads training on a GPU leaves free, by number of embeddings."""
    pick_device("cpu")
    device = torch.device("cpu")
    for num_vectors in sizes.vectors:
        images = torch.empty(num_vectors, 256)
        for part in images.split(100_000):
            generated = torch.randn(part.shape, device=run.dist.device)
            part.copy_(torch.nn.functional.normalize(generated))
        times = []
        for num_queries in (1, 1000):
            queries = images[:num_queries].clone()
            rank = partial(top_matches, queries, images, 8)
            times.append(1000 * min(seconds_of(rank, device) for _ in range(2)))
        figure = f"{times[0]:,.1f} ms; {times[1]:,.0f} ms"
        yield f"1 query; 1,000 queries, {num_vectors:,} embeddings", figure, ""


if __name__ == "__main__":
    main()
