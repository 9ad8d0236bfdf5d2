"""Prints the table of README's "Speed": every figure a ratio between things that were run in turn.

pip install -r requirements.txt -r tests/benchmarks/requirements.txt
python tests/benchmarks/benchmark.py --data-dir path/to/flickr8k --image-encoder path/to/timm-folder --text-encoder path/to/folder
python tests/benchmarks/benchmark.py --data-dir ... --only search second_query
python tests/benchmarks/benchmark.py --data-dir ... --only search --full

The encoders are folders with pretrained weights, as `timm` and `transformers` save them. Each measurement has a process
of its own, so that none inherits another's memory or threads.
"""

import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

from measuring import measuring_parser

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
MEASUREMENTS: dict[str, Callable[[Namespace], Iterator[tuple[str, str, str]]]] = {}
PAIRS = {  # image size, batch, steps of one round
    "ResNet-50 + DistilBERT": (224, 32, 5),
    "stand-ins": (128, 64, 12),
}


def measurement(function: Callable) -> Callable:
    """Gives `function` a name on the command line; it yields rows: what, figure, target."""
    MEASUREMENTS[function.__name__] = function
    return function


def main() -> None:
    parser = measuring_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(MEASUREMENTS),
        choices=MEASUREMENTS,
        help="some rows alone",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="rank ten million vectors too: 10 GB on disk, 20 in memory",
    )
    parser.add_argument(
        "--child", nargs="+", help="(of the program itself) one measured process, and its arguments"
    )
    options = parser.parse_args()
    if options.child:
        name, *arguments = options.child
        with redirect_stdout(sys.stderr):
            result = CHILDREN[name](options, *arguments)
        print(json.dumps(result))
        return
    started = time.perf_counter()
    print("| what | measured | target |\n| --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in options.only:
            for row in MEASUREMENTS[name](options):
                print(f"| {' | '.join(row)} |", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def child(options: Namespace, name: str, *arguments: object) -> dict:
    """What one measurement returns, run in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--data-dir",
        options.data_dir,
        "--image-encoder",
        options.image_encoder,
    ]
    command += ["--text-encoder", options.text_encoder, "--child", name, *map(str, arguments)]
    # As on any machine that does not hold NumPy's BLAS to the instructions of older processors.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} {arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def own_megabytes() -> float:
    """The most memory that this process ever had, past the file pages that are mapped into it now; of Linux."""
    status = Path("/proc/self/status").read_text()
    peak, mapped = (
        int(re.search(rf"{name}:\s+(\d+)", status).group(1)) for name in ("VmHWM", "RssFile")
    )
    return (peak - mapped) / 1024


# ---------------------------------------------------------------- training


@measurement
def training(options: Namespace) -> Iterator[tuple[str, str, str]]:
    """`trainer.py` with its bare encoders, open_clip's program, the tutorial's loop, and the first again."""
    pictures = max(batch * steps for _, batch, steps in PAIRS.values())
    small_data_set(options.data_dir, Path("data"), pictures)
    save_untrained(options.text_encoder)
    for pair, (size, batch, steps) in PAIRS.items():
        speeds: dict[str, list[float]] = {
            "trainer.py": [],
            "bare": [],
            "open_clip": [],
            "tutorial": [],
        }
        for name in ("ours", "open_clip", "tutorial", "ours"):
            for what, speed in child(options, name, pair, steps if name == "ours" else 5).items():
                speeds[what].append(speed)
        speed = {name: statistics.median(values) for name, values in speeds.items()}
        what = f"{pair}, {size} px, batch {batch}: pairs/s of trainer.py over"
        share = speed["trainer.py"] / speed["bare"]
        yield (
            f"{what} its bare encoders",
            f"{speed['trainer.py']:.1f} / {speed['bare']:.1f} = {share:.3f}",
            "≥ 0.95",
        )
        for name in ("open_clip", "tutorial"):
            ratio, ceiling = speed["trainer.py"] / speed[name], speed["bare"] / speed[name]
            figure = f"{speed['trainer.py']:.1f} / {speed[name]:.1f} = {ratio:.2f}, at most {ceiling:.2f}"
            yield f"{what} {name}", figure, "≥ 1.3" if size == 224 else "≥ 2"


def small_data_set(data_dir: str, folder: Path, train: int) -> None:
    """`train` pictures of Flickr8k and eight each for dev and test, in Kaggle's layout; and open_clip's table."""
    from baselines import write_pairs

    from data import read_splits

    with redirect_stdout(sys.stderr):
        split = read_splits(data_dir)["train"]
    folder.mkdir()
    (folder / "Images").symlink_to(split.paths[0].parent)
    names = [path.name for path in split.paths]
    with (folder / "captions.txt").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["image", "caption"])
        for name, captions in zip(names[: train + 16], split.captions):
            writer.writerows([name, caption] for caption in captions)
    write_pairs(
        [(path, captions[0]) for path, captions in zip(split.paths[:train], split.captions)],
        folder / "pairs.csv",
    )
    for kind, part in (
        ("train", names[:train]),
        ("dev", names[train : train + 8]),
        ("test", names[train + 8 :][:8]),
    ):
        (folder / f"Flickr_8k.{kind}Images.txt").write_text("\n".join(part))


def save_untrained(tokenizer_folder: str) -> None:
    """DistilBERT with random weights, and the BERT of six layers that open_clip gets in its place, as folders.

    The two differ in token types alone; open_clip 3.3 builds BERT but not DistilBERT.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    for kind, options in (("distilbert", {}), ("bert", {"num_hidden_layers": 6})):
        AutoModel.from_config(AutoConfig.for_model(kind, **options)).save_pretrained(kind)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(kind)


def training_config(options: Namespace, pair: str):
    from config import Config

    size, batch, _ = PAIRS[pair]
    encoders = {
        "image_encoder": f"local-dir:{options.image_encoder}",
        "text_encoder": options.text_encoder,
    }
    if pair != "stand-ins":
        encoders = {"image_encoder": "resnet50", "text_encoder": "distilbert", "pretrained": False}
    whole = {
        "freeze_image_encoder": 0.0,
        "freeze_text_encoder": 0.0,
        "drop_path": 0.0,
    }  # as the others train them
    return Config(data_dir="data", image_size=size, batch_size=batch, epochs=4, **encoders, **whole)


def ours(options: Namespace, pair: str, steps: str) -> dict[str, float]:
    """Pairs/s of an epoch of `trainer.py`, and of the encoders alone on batches of such an epoch, in turn."""
    import torch

    import trainer

    config = training_config(options, pair)
    run = trainer.setup(config, None)
    run.loader.batch_sampler.num_images = int(steps) * config.batch_size
    batches = list(
        trainer.build_train_loader(run.splits["train"], run.tokenizer, config, run.dist.device)
    )[: int(steps)]

    def bare() -> None:
        for pixels, texts in batches:
            trainer.contrastive_loss(*run.model(pixels, texts)).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

    trainer.train_epoch(run, 0)
    pairs = int(steps) * config.batch_size
    speeds: dict[str, list[float]] = {"trainer.py": [], "bare": []}
    for epoch in (1, 2):
        speeds["trainer.py"].append(
            pairs / seconds(lambda epoch=epoch: trainer.train_epoch(run, epoch))
        )
        speeds["bare"].append(pairs / seconds(bare))
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    return {name: statistics.median(values) for name, values in speeds.items()}


def open_clip(options: Namespace, pair: str, steps: str) -> dict[str, float]:
    """Pairs/s that open_clip's own training program reports, past its first two steps.

    Its readers have decoded most of the few batches by then, which is to its advantage; so too in the tutorial's loop.
    """
    from baselines import describe_to_open_clip, train_open_clip

    size, batch, _ = PAIRS[pair]
    if pair == "stand-ins":
        image, text = "tf_efficientnet_lite0", options.text_encoder
    else:
        image, text = "resnet50", str(Path("bert").absolute())
    describe_to_open_clip(image, text, size)
    rows = Path("data/pairs.csv").read_text().splitlines()[: 1 + int(steps) * batch]
    Path("some_pairs.csv").write_text("\n".join(rows))
    arguments = [
        "--batch-size",
        str(batch),
        "--workers",
        "4",
        "--logs",
        "none",
        "--precision",
        "fp32",
    ]
    return {"open_clip": statistics.median(train_open_clip(Path("some_pairs.csv"), *arguments)[2:])}


def tutorial(options: Namespace, pair: str, steps: str) -> dict[str, float]:
    """Pairs/s of the loop of moein-shariatnia/OpenAI-CLIP: its loader, its padding, its loss."""
    from baselines import Tutorial, TutorialRows
    from torch.utils.data import Subset
    from transformers import AutoModel

    from data import read_splits
    from models import (
        CLIP,
        Tower,
        build_image_encoder,
        load_text_encoder,
        text_encoder_from_scratch,
    )

    config = training_config(options, pair)
    split = read_splits("data")["train"]
    text, _ = (
        load_text_encoder(config)
        if config.pretrained
        else text_encoder_from_scratch(config, split.texts)
    )
    if not config.pretrained:  # with the vocabulary of its tokeniser
        text.model = AutoModel.from_pretrained("distilbert")
    model = CLIP(Tower(build_image_encoder(config), config), Tower(text, config), 1.0)
    paths = [path for path, captions in zip(split.paths, split.captions) for _ in captions]
    folder = options.text_encoder if config.pretrained else "distilbert"
    rows = TutorialRows(paths, split.texts, folder, config.image_size, {})
    speeds, started = [], time.perf_counter()
    for _ in Tutorial(
        model, Subset(rows, range(int(steps) * config.batch_size)), config.batch_size
    ).epoch():
        speeds.append(config.batch_size / (time.perf_counter() - started))
        started = time.perf_counter()
    return {"tutorial": statistics.median(speeds[2:])}


# ---------------------------------------------------------------- batches larger than memory


@measurement
def chunks(options: Namespace) -> Iterator[tuple[str, str, str]]:
    """Memory and time of a step with `--chunk-size 32`, by the size of the batch; the small encoders at 128 px."""
    peaks = {batch: child(options, "step", batch, 32)["megabytes"] for batch in (32, 2048)}
    figure = f"{peaks[32]:.0f} / {peaks[2048]:.0f} MB"
    yield (
        "peak memory of a step in chunks of 32, batch 32 / batch 2,048",
        figure,
        "that of the chunk",
    )
    slower = child(options, "step", 256, 64)["slower"]
    yield (
        "time of a step of 256 pairs in chunks of 64 over the whole at once",
        f"{slower:.2f}",
        "≤ 1.5",
    )


def step(options: Namespace, batch: str, chunk: str) -> dict[str, float]:
    """Peak memory of two steps in chunks, and the time of two more over that of the same steps without chunks."""
    import torch

    from models import contrastive_loss, pick_device

    pick_device("cpu")
    model, _, _ = small_encoders(options)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    pixels = torch.randint(256, (int(batch), 3, 128, 128), dtype=torch.uint8)
    ids = torch.randint(
        1000, 20_000, (int(batch), 14)
    )  # as long as Flickr8k's captions are on average
    texts = [(part, torch.ones_like(part)) for part in ids.split(int(chunk))]

    def one_step(chunk_size: int) -> None:
        contrastive_loss(*model(pixels, texts, chunk_size)).backward()
        optimizer.step()
        optimizer.zero_grad()

    one_step(int(chunk))
    one_step(int(chunk))
    result = {"megabytes": own_megabytes()}
    if int(batch) <= 256:
        one_step(0)
        ratios = [
            seconds(lambda: one_step(int(chunk))) / seconds(lambda: one_step(0)) for _ in range(3)
        ]
        result["slower"] = statistics.median(ratios)
    return result


def small_encoders(options: Namespace):
    """The small encoders as one model, with their tokeniser and settings."""
    import torch

    from models import CLIP, Tower, build_image_encoder, load_text_encoder

    config = training_config(options, "stand-ins")
    text, tokenizer = load_text_encoder(config)
    model = CLIP(
        Tower(build_image_encoder(config), config), Tower(text, config), config.temperature
    )
    return model.to(memory_format=torch.channels_last), tokenizer, config


# ---------------------------------------------------------------- search


@measurement
def search(options: Namespace) -> Iterator[tuple[str, str, str]]:
    """Ranking unit vectors of width 256, with FAISS in turn, and the time to read the array once from memory."""
    for vectors in (10**4, 10**5, 10**6, *([10**7] if options.full else [])):
        array = Path(f"vectors{vectors}.npy").absolute()
        child(options, "draw_vectors", array, vectors)
        for queries in (1, 1000):
            if vectors <= 10**6:
                found = child(options, "rank", array, queries, "both")
            else:  # both do not fit into 24 GiB together
                found = child(options, "rank", array, queries, "ours") | child(
                    options, "rank", array, queries, "faiss"
                )
            milliseconds, faiss, floor = (1000 * found[name] for name in ("ours", "faiss", "floor"))
            figure = f"{milliseconds:,.1f} ms, {found['megabytes']:.0f} MB; FAISS {faiss:,.1f} ms"
            target = "no slower than FAISS"
            if queries == 1:
                target += ", ≤ 1.3 of the floor"
                figure += f"; floor {floor:,.1f} ms: {milliseconds / floor:.2f}"
            yield (
                f"{queries:,} queries, {vectors:,} pictures",
                f"{figure}: {milliseconds / faiss:.2f}",
                target,
            )
        array.unlink()
    recall = child(options, "large_recall")
    figure = f"{recall['seconds']:.0f} s, {recall['megabytes']:,.0f} MB"
    yield (
        "recall of 155,000 captions for 31,000 pictures",
        figure,
        "bounded memory; 19 GB as one matrix",
    )


def draw_vectors(options: Namespace, array: str, vectors: str) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    vectors_map = np.lib.format.open_memmap(array, "w+", np.float32, (int(vectors), 256))
    for start in range(0, len(vectors_map), 100_000):
        part = rng.standard_normal((min(100_000, len(vectors_map) - start), 256), np.float32)
        vectors_map[start : start + 100_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    vectors_map.flush()


def rank(options: Namespace, array: str, queries: str, which: str) -> dict[str, float]:
    """Seconds of a ranking by ours and by FAISS, in turn, and of one read of the array, all threads."""
    import faiss
    import numpy as np
    import torch

    from inference import top_matches
    from models import pick_device

    pick_device("cpu")
    images = torch.from_numpy(np.load(array, mmap_mode="c"))
    asked = torch.nn.functional.normalize(
        torch.randn(int(queries), 256, generator=torch.Generator().manual_seed(1))
    )
    result = {}
    if which != "faiss":
        top_matches(asked, images, 8)
        result["megabytes"] = own_megabytes()
    works: dict[str, Callable] = {
        "ours": lambda: top_matches(asked, images, 8),
        "floor": lambda: images.sum(),
    }
    if which == "faiss":
        works = {}
    if which != "ours":
        index = faiss.IndexFlatIP(256)
        for start in range(0, len(images), 100_000):
            index.add(images[start : start + 100_000].numpy())
        works["faiss"] = lambda: index.search(asked.numpy(), 8)
    rounds = 9 if int(queries) == 1 else 3
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds if len(images) <= 10**6 else 1):
        for name, work in works.items():
            time.sleep(0.1)  # until the threads of the library before are asleep
            times[name].append(
                min(seconds(work) for _ in range(4 if len(images) * len(asked) <= 10**8 else 1))
            )
    if which == "both":
        same = (
            top_matches(asked, images, 8)[1].numpy() == index.search(asked.numpy(), 8)[1]
        ).mean()
        assert same > 0.999, f"only {same:.2%} of the matches are FAISS's"
    return result | {name: statistics.median(values) for name, values in times.items()}


def large_recall(options: Namespace) -> dict[str, float]:
    import torch

    from inference import retrieval_metrics
    from models import pick_device

    pick_device("cpu")
    images = torch.nn.functional.normalize(torch.randn(31_000, 256))
    texts = torch.nn.functional.normalize(torch.randn(155_000, 256))
    taken = seconds(lambda: retrieval_metrics(images, texts, torch.arange(155_000) // 5))
    return {"seconds": taken, "megabytes": own_megabytes()}


@measurement
def folder(options: Namespace) -> Iterator[tuple[str, str, str]]:
    """Embedding pictures from their files, over the image encoder's bare forward on the same pixels."""
    for encoder, size, pictures in (("resnet50", 224, 384), ("tf_efficientnet_lite0", 224, 1280)):
        found = child(options, "embed", encoder, size, pictures)
        figure = f"{found['ours']:.0f} / {found['bare']:.0f} = {found['ours'] / found['bare']:.3f}"
        yield (
            f"pictures/s embedded from files over bare forward, {encoder}, {size} px",
            figure,
            "≥ 0.95",
        )


def embed(options: Namespace, encoder: str, size: str, pictures: str) -> dict[str, float]:
    import torch

    from config import Config, SearchConfig
    from data import Transform, load_image, read_splits, stack
    from inference import encode_images
    from models import ImageEncoder, Tower, pick_device

    device = pick_device("cpu")
    # Without augmentation pictures are embedded at the very size.
    config = Config(image_size=int(size), augment=False, num_workers=SearchConfig("").num_workers)
    tower = (
        Tower(ImageEncoder(encoder, int(size)), config).eval().to(memory_format=torch.channels_last)
    )
    paths = read_splits(options.data_dir)["train"].paths[: int(pictures)]
    transform = Transform(int(size))
    batches = [
        stack([transform(load_image(path)) for path in paths[i : i + 64]])
        for i in range(0, len(paths), 64)
    ]

    @torch.inference_mode()
    def bare() -> None:
        for pixels in batches:
            tower(pixels)

    bare()
    works = {"ours": lambda: encode_images(tower, paths, config, device), "bare": bare}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(3):
        for name, work in works.items():
            times[name].append(len(paths) / seconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


SECOND_QUERY = """
from inference import Searcher
searcher = Searcher("weights.pt")
print(searcher.search(["two dogs play in the snow"], n=8)[0][0].score)
import sys
print(sorted({"timm", "albumentations", "cv2", "pandas"} & set(sys.modules)))
"""
TEXT_ENCODER_ALONE = """
import sys
import torch
from transformers import AutoModel, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
AutoModel.from_pretrained(sys.argv[1])
"""


@measurement
def second_query(options: Namespace) -> Iterator[tuple[str, str, str]]:
    """A query on pictures that are embedded already, over `import torch` and loading the text encoder alone."""
    pictures = child(options, "save_weights")["pictures"]
    commands = {"ours": [SECOND_QUERY], "alone": [TEXT_ENCODER_ALONE, options.text_encoder]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(6):
        for name, command in commands.items():
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", *command], env=environment, capture_output=True, text=True
            )
            if turn:  # the first embeds
                times[name].append(time.perf_counter() - started)
            assert done.returncode == 0, done.stderr
            assert not turn or name == "alone" or done.stdout.endswith("[]\n"), done.stdout
    ours, alone = statistics.median(times["ours"]), statistics.median(times["alone"])
    what = (
        f"a second query over {pictures:,} pictures, over import torch and the text encoder alone"
    )
    yield what, f"{ours:.2f} / {alone:.2f} s = {ours / alone:.2f}", "≤ 1.5"


def save_weights(options: Namespace) -> dict[str, int]:
    from dataclasses import replace

    import torch

    from data import read_splits
    from models import make_checkpoint

    model, tokenizer, config = small_encoders(options)
    torch.save(
        make_checkpoint(model, tokenizer, replace(config, data_dir=options.data_dir), "a dog"),
        "weights.pt",
    )
    return {"pictures": len(read_splits(options.data_dir)["test"].paths)}


CHILDREN: dict[str, Callable] = {
    work.__name__: work
    for work in (
        ours,
        open_clip,
        tutorial,
        step,
        draw_vectors,
        rank,
        large_recall,
        embed,
        save_weights,
    )
}

if __name__ == "__main__":
    main()
