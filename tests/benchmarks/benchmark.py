"""Measures speed and memory: each figure is a ratio between things that run in turn.

pip install -r requirements.txt -r tests/benchmarks/requirements.txt
DATA="--data-dir path/to/flickr8k --image-encoder path/to/timm-folder"
DATA="$DATA --text-encoder path/to/transformers-folder"
python tests/benchmarks/benchmark.py $DATA
python tests/benchmarks/benchmark.py $DATA --only search second_query
python tests/benchmarks/benchmark.py $DATA --only search --full
python tests/benchmarks/benchmark.py --device cuda

The encoders are folders with pretrained weights, as timm and transformers save them. Each
measurement has a process of its own, so that it does not inherit the memory or the threads of
another. All run on the CPU; `--device` runs benchmark_gpu.py instead, which needs no folders.
README.md has the results.
"""

import csv
import itertools
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
from functools import partial
from pathlib import Path
from typing import Any

from measuring import measuring_parser

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
Row = tuple[str, str, str]  # what, figure, target
MEASUREMENTS: dict[str, Callable[[Namespace], Iterator[Row]]] = {}
CHILDREN: dict[str, Callable[..., dict]] = {}
LARGE = "ResNet-50 + DistilBERT"
SMALL = "small encoders"
ENCODERS = {LARGE: (224, 32, 5), SMALL: (128, 64, 12)}  # image size, batch size, steps of one epoch
BASELINE_STEPS = 5


def measurement(function: Callable) -> Callable:
    """Decorates a function that yields rows of the table; `--only` selects it by its name."""
    MEASUREMENTS[function.__name__] = function
    return function


def child(function: Callable) -> Callable:
    """Decorates a function that `run_child` calls in a process of its own."""
    CHILDREN[function.__name__] = function
    return function


def main() -> None:
    parser = measuring_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(MEASUREMENTS),
        choices=MEASUREMENTS,
        help="run only these measurements",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="also rank ten million vectors: 10 GB on disk, 20 GB of memory",
    )
    parser.add_argument("--device", help="run benchmark_gpu.py on this device instead")
    parser.add_argument(
        "--child", nargs="+", help="(internal) the function to run, and its arguments"
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
    print(f"\n{time.perf_counter() - started:.0f} s in total")


def run_child(options: Namespace, name: str, *arguments: object) -> dict:
    """The result of one of the `CHILDREN`, run in a process of its own."""
    command = [sys.executable, __file__, "--data-dir", options.data_dir]
    command += ["--image-encoder", options.image_encoder, "--text-encoder", options.text_encoder]
    command += ["--child", name, *map(str, arguments)]
    # These variables may restrict NumPy's BLAS to the instructions of older processors.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")
    }
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{name} {arguments} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_megabytes() -> float:
    """This process's peak memory without the file pages that are mapped into it now; Linux only."""
    status = Path("/proc/self/status").read_text()
    peak, mapped = (
        int(re.search(rf"{name}:\s+(\d+)", status).group(1)) for name in ("VmHWM", "RssFile")
    )
    return (peak - mapped) / 1024


# ---------------------------------------------------------------- training


@measurement
def training(options: Namespace) -> Iterator[Row]:
    """Speed of `trainer.py` over its bare encoders, open_clip's program and the tutorial's loop.

    `trainer.py` runs before and after the baselines.
    """
    num_images = max(batch_size * steps for _, batch_size, steps in ENCODERS.values())
    save_small_data_set(options.data_dir, Path("data"), num_images)
    save_untrained_text_encoders(options.text_encoder)
    for encoders, (size, batch_size, steps) in ENCODERS.items():
        speeds: dict[str, list[float]] = {}
        for name in ("train_ours", "train_open_clip", "train_tutorial", "train_ours"):
            num_steps = steps if name == "train_ours" else BASELINE_STEPS
            result = run_child(options, name, encoders, num_steps)
            for program, speed in result.items():
                speeds.setdefault(program, []).append(speed)
        speed = {program: statistics.median(values) for program, values in speeds.items()}
        ours, bare = speed["trainer.py"], speed["bare"]
        what = f"{encoders}, {size} px, batch size {batch_size}: pairs/s of trainer.py over"
        yield f"{what} its bare encoders", f"{ours:.1f} / {bare:.1f} = {ours / bare:.3f}", "≥ 0.95"
        for name in ("open_clip", "tutorial"):
            ratio = ours / speed[name]
            limit = bare / speed[name]
            figure = f"{ours:.1f} / {speed[name]:.1f} = {ratio:.2f}, at most {limit:.2f}"
            yield f"{what} {name}", figure, "≥ 1.3" if encoders == LARGE else "≥ 2"


def save_small_data_set(data_dir: str, folder: Path, num_images: int) -> None:
    """Training images of Flickr8k, with 8 each for dev and test, in Kaggle's layout.

    Also writes the training images with one caption each as open_clip's table.
    """
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
        for name, captions in zip(names[: num_images + 16], split.captions):
            writer.writerows([name, caption] for caption in captions)
    first_captions = [captions[0] for captions in split.captions[:num_images]]
    write_pairs(list(zip(split.paths, first_captions)), Path("pairs.csv"))
    parts = {
        "train": names[:num_images],
        "dev": names[num_images : num_images + 8],
        "test": names[num_images + 8 : num_images + 16],
    }
    for name, part in parts.items():
        (folder / f"Flickr_8k.{name}Images.txt").write_text("\n".join(part))


def save_untrained_text_encoders(tokenizer_folder: str) -> None:
    """Saves a DistilBERT with random weights, and a BERT of six layers for open_clip, as folders.

    The two differ in token types alone. open_clip 3.3 supports BERT but not DistilBERT.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    for kind, options in (("distilbert", {}), ("bert", {"num_hidden_layers": 6})):
        AutoModel.from_config(AutoConfig.for_model(kind, **options)).save_pretrained(kind)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(kind)


def training_config(options: Namespace, encoders: str) -> Any:
    """The `Config` of a measurement; all layers are trained, as the baselines do."""
    from config import Config

    size, batch_size, _ = ENCODERS[encoders]
    names = {"image_encoder": "resnet50", "text_encoder": "distilbert", "pretrained": False}
    if encoders == SMALL:
        image_encoder = f"local-dir:{options.image_encoder}"
        names = {"image_encoder": image_encoder, "text_encoder": options.text_encoder}
    return Config(
        data_dir="data",
        image_size=size,
        batch_size=batch_size,
        epochs=4,
        freeze_image_encoder=0.0,
        freeze_text_encoder=0.0,
        drop_path=0.0,
        device="cpu",
        **names,
    )


@child
def train_ours(options: Namespace, encoders: str, steps: str) -> dict[str, float]:
    """Pairs/s of an epoch of `trainer.py`, and of the encoders alone on batches in memory."""
    import torch

    import trainer
    from data import Split, build_train_loader
    from models import contrastive_loss

    config = training_config(options, encoders)
    num_pairs = int(steps) * config.batch_size
    run = trainer.setup(config, None, trainer.Distributed.init(config))
    split = run.splits["train"]
    short_split = Split(split.paths[:num_pairs], split.captions[:num_pairs])
    run.loader = build_train_loader(short_split, run.tokenizer, config, run.dist.device)
    batches = list(itertools.islice(run.loader, run.steps_per_epoch))
    assert len(batches) == int(steps)

    def train_loop() -> list[float]:
        """Pairs/s of the second and the third of four epochs, whose batches are all loaded ahead.

        No worker is left afterwards that would load during the other measurement.
        """
        iterator = iter(run.loader)
        seconds = []
        for epoch in range(3):
            started = time.perf_counter()
            trainer.train_epoch(run, epoch, iterator)
            seconds.append(time.perf_counter() - started)
        return [num_pairs / value for value in seconds[1:]]  # the first warms up

    def train_bare() -> None:
        for batch in batches:
            contrastive_loss(*run.model(batch["pixels"], batch["texts"])).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

    speeds = {"trainer.py": train_loop()}
    speeds["bare"] = [num_pairs / seconds_of(train_bare) for _ in range(2)]
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    return {name: statistics.median(values) for name, values in speeds.items()}


@child
def train_open_clip(options: Namespace, encoders: str, steps: str) -> dict[str, float]:
    """Pairs/s that open_clip's own training program reports, without its first two steps.

    By then its DataLoader workers have decoded most of the few batches, which is to its advantage.
    The same is true of the tutorial's loop.
    """
    import baselines

    size, batch_size, _ = ENCODERS[encoders]
    image_encoder = "resnet50"
    text_encoder = str(Path("bert").absolute())
    if encoders == SMALL:
        image_encoder = "tf_efficientnet_lite0"
        text_encoder = options.text_encoder
    baselines.add_open_clip_model(image_encoder, text_encoder, size)
    lines = Path("pairs.csv").read_text().splitlines()
    Path("some_pairs.csv").write_text("\n".join(lines[: 1 + int(steps) * batch_size]))
    arguments = ["--batch-size", str(batch_size), "--workers", "4", "--logs", "none"]
    arguments += ["--precision", "fp32"]
    speeds = baselines.train_open_clip(Path("some_pairs.csv"), *arguments)
    return {"open_clip": statistics.median(speeds[2:])}


@child
def train_tutorial(options: Namespace, encoders: str, steps: str) -> dict[str, float]:
    """Pairs/s of the loop of moein-shariatnia/OpenAI-CLIP, without its first two steps."""
    from baselines import Tutorial, TutorialDataset
    from torch.utils.data import Subset

    from data import read_splits
    from models import build_clip

    config = training_config(options, encoders)
    split = read_splits("data")["train"]
    # The text encoder is a folder, so that it has the vocabulary of the tokenizer in the folder.
    model, _ = build_clip(config)
    paths = []  # of each caption's image
    for path, captions in zip(split.paths, split.captions):
        paths += [path] * len(captions)
    dataset = TutorialDataset(paths, split.texts, config.text_encoder, config.image_size, {})
    subset = Subset(dataset, range(int(steps) * config.batch_size))
    speeds = []
    started = time.perf_counter()
    for _ in Tutorial(model, subset, config.batch_size).train_epoch():
        speeds.append(config.batch_size / (time.perf_counter() - started))
        started = time.perf_counter()
    return {"tutorial": statistics.median(speeds[2:])}


# ---------------------------------------------------------------- batches larger than memory


@measurement
def chunks(options: Namespace) -> Iterator[Row]:
    """Memory and time of a step with `--chunk-size` by batch size; the small encoders at 128 px."""
    small = run_child(options, "train_in_chunks", 32, 32)["megabytes"]
    large = run_child(options, "train_in_chunks", 2048, 32)["megabytes"]
    what = "peak memory of a step in chunks of 32, batch size 32 / batch size 2,048"
    yield what, f"{small:.0f} / {large:.0f} MB", "that of the chunk"
    ratio = run_child(options, "train_in_chunks", 256, 64)["ratio"]
    what = "time of a step of 256 pairs in chunks of 64 over the same step without chunks"
    yield what, f"{ratio:.2f}", "≤ 1.5"


@child
def train_in_chunks(options: Namespace, batch_size: str, chunk_size: str) -> dict[str, float]:
    """Peak memory of two steps in chunks.

    Up to batch size 256 also the time of a step in chunks over that of a step without.
    """
    import torch

    from models import build_clip, contrastive_loss, pick_device

    num_pairs, chunk = int(batch_size), int(chunk_size)
    pick_device("cpu")
    model, _ = build_clip(training_config(options, SMALL))
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    pixels = torch.randint(256, (num_pairs, 3, 128, 128), dtype=torch.uint8)
    # 14 tokens are the average length of Flickr8k's captions.
    ids = torch.randint(1000, 20_000, (num_pairs, 14))
    texts = [(part, torch.ones_like(part)) for part in ids.split(chunk)]

    def train_step(chunk_size: int) -> None:
        contrastive_loss(*model(pixels, texts, chunk_size)).backward()
        optimizer.step()
        optimizer.zero_grad()

    train_step(chunk)
    train_step(chunk)
    result = {"megabytes": peak_megabytes()}
    if num_pairs <= 256:
        train_step(0)
        ratios = []
        for _ in range(3):
            seconds = seconds_of(lambda: train_step(chunk))
            ratios.append(seconds / seconds_of(lambda: train_step(0)))
        result["ratio"] = statistics.median(ratios)
    return result


# ---------------------------------------------------------------- search


@measurement
def search(options: Namespace) -> Iterator[Row]:
    """Ranking of unit vectors of dimension 256 on one core and on all, with FAISS in turn; recall.

    FAISS runs with one thread and with as many as cores, and the faster one counts. The floor is
    the time to read the array once from memory.
    """
    sizes = [10**4, 10**5, 10**6]
    if options.full:
        sizes.append(10**7)
    for num_images in sizes:
        array = Path(f"vectors{num_images}.npy").absolute()
        run_child(options, "generate_vectors", array, num_images)
        for num_queries, cores in itertools.product((1, 8, 1000), sorted({1, os.cpu_count()})):
            if num_images <= 10**6:
                result = run_child(options, "rank", array, num_queries, cores, "both")
            else:  # both do not fit into 24 GiB together
                result = run_child(options, "rank", array, num_queries, cores, "ours")
                result |= run_child(options, "rank", array, num_queries, cores, "faiss")
            ours, floor, one, every = (
                1000 * result[name] for name in ("ours", "floor", "faiss, 1 thread", "faiss")
            )
            figure = (
                f"{ours:,.1f} ms, {result['megabytes']:.0f} MB; FAISS {one:,.1f} / {every:,.1f}"
            )
            figure += f" ms: **{ours / min(one, every):.2f}**"
            target = "≤ 1 of FAISS"
            if num_queries == 1:
                target += ", ≤ 1.3 of the floor"
                figure += f"; floor {floor:,.1f} ms: {ours / floor:.2f}"
            yield f"{num_queries:,} queries, {num_images:,} images, {cores} cores", figure, target
        array.unlink()
    recall = run_child(options, "large_recall", 31_000)
    figure = f"{recall['seconds']:.0f} s, {recall['megabytes']:,.0f} MB"
    what = "recall of 155,000 captions for 31,000 images"
    yield what, figure, "bounded memory; 19 GB as one matrix"


@child
def generate_vectors(options: Namespace, array: str, num_vectors: str) -> dict:
    """Saves random unit vectors (N, 256) as an array."""
    import numpy as np

    rng = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(array, "w+", np.float32, (int(num_vectors), 256))
    for start in range(0, len(vectors), 100_000):
        part = rng.standard_normal((min(100_000, len(vectors) - start), 256), np.float32)
        vectors[start : start + 100_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    vectors.flush()
    return {}


@child
def rank(
    options: Namespace, array: str, num_queries: str, cores: str, which: str
) -> dict[str, float]:
    """Seconds of a ranking by ours and by FAISS, in turn, and of one read of the array.

    `which` is "ours", "faiss" or "both".
    """
    # Before the import of NumPy, torch and FAISS, which start one thread per core.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])

    import numpy as np
    import torch

    from inference import top_matches
    from models import pick_device

    # 1. The vectors, and what to measure.
    pick_device("cpu")
    images = torch.from_numpy(np.load(array, mmap_mode="c"))  # (N, 256)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(int(num_queries), 256, generator=generator)
    queries = torch.nn.functional.normalize(queries)  # (Q, 256)
    result = {}
    works: dict[str, Callable[[], object]] = {}
    if which != "faiss":
        top_matches(queries, images, 8)
        result["megabytes"] = peak_megabytes()
        works["ours"] = lambda: top_matches(queries, images, 8)
        works["floor"] = lambda: images.sum()
    if which != "ours":
        import faiss

        def search_with_one_thread() -> None:
            faiss.omp_set_num_threads(1)
            index.search(queries.numpy(), 8)
            faiss.omp_set_num_threads(int(cores))

        index = faiss.IndexFlatIP(256)
        for start in range(0, len(images), 100_000):
            index.add(images[start : start + 100_000].numpy())
        works["faiss"] = lambda: index.search(queries.numpy(), 8)
        works["faiss, 1 thread"] = search_with_one_thread

    # 2. Rounds of measurements.
    num_rounds = 9 if len(queries) < 1000 else 3
    if len(images) * len(queries) > 10**8:
        num_rounds = 1
    repeats = 4 if len(images) * len(queries) <= 10**8 else 1
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(num_rounds):
        for name, work in works.items():
            time.sleep(0.1)  # until the threads of the library before are asleep
            times[name].append(min(seconds_of(work) for _ in range(repeats)))
    if which == "both":
        ours = top_matches(queries, images, 8)[1].numpy()
        same = (ours == index.search(queries.numpy(), 8)[1]).mean()
        assert same > 0.999, f"only {same:.2%} of the matches are FAISS's"
    return result | {name: statistics.median(values) for name, values in times.items()}


@child
def large_recall(options: Namespace, num_images: str) -> dict[str, float]:
    """Time and memory of `retrieval_metrics` for random embeddings, five captions per image."""
    import torch

    from inference import retrieval_metrics
    from models import pick_device

    pick_device("cpu")
    num_texts = 5 * int(num_images)
    images = torch.nn.functional.normalize(torch.randn(int(num_images), 256))
    texts = torch.nn.functional.normalize(torch.randn(num_texts, 256))
    image_of_text = torch.arange(num_texts) // 5
    seconds = seconds_of(lambda: retrieval_metrics(images, texts, image_of_text))
    return {"seconds": seconds, "megabytes": peak_megabytes()}


@measurement
def scale(options: Namespace) -> Iterator[Row]:
    """Reading generated data folders of COCO's size and of a million images, five captions each."""
    for num_images, seconds in ((118_000, 3), (1_000_000, 40)):
        run_child(options, "generate_large", num_images)
        result = run_child(options, "read_large", num_images)
        what = f"reading {num_images:,} images with five captions each"
        yield what, f"{result['read']:.1f} s, {result['peak']:,.0f} MB", f"≤ {seconds} s"
        yield f"{what}: their headers", f"{result['headers']:.0f} s", "≤ 60 s"
        what += ": all processes, after an epoch of four DataLoader workers"
        yield what, f"{result['megabytes']:,.0f} MB", "≤ 1,500 MB"


@child
def generate_large(options: Namespace, num_images: str) -> dict:
    """A data folder of hard links to a small image, 10,000 in each subfolder."""
    from PIL import Image

    folder = Path(f"large{num_images}")
    names = []
    for index in range(int(num_images)):
        name = f"{index // 10_000:03d}/{index:07d}.jpg"
        path = folder / "images" / name
        if index % 10_000 == 0:
            path.parent.mkdir(parents=True)
            first = path
            Image.new("RGB", (64, 48)).save(path)
        else:
            os.link(first, path)
        names.append(name)
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for name in names:
            for number in range(5):
                caption = f"a dog runs on the beach with a red ball in its mouth {name} {number}"
                writer.writerow([name, caption])
    return {}


@child
def read_large(options: Namespace, num_images: str) -> dict[str, float]:
    """Time and memory of the folder's images, headers, and captions in DataLoader workers.

    Memory is proportional: pages that n processes share count 1 / n in each.
    """
    from torch.utils.data import DataLoader, Dataset

    import data

    class Texts(Dataset):
        def __len__(self) -> int:
            return len(split.paths)

        def __getitem__(self, index: int) -> int:
            return len(str(split.paths[index])) + len(split.captions[index][0])

    def megabytes(pid: int) -> float:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(re.search(r"Pss:\s+(\d+)", text).group(1)) / 1024

    def read_headers() -> None:
        for path in split.paths:
            with data.open_image(path):
                pass

    started = time.perf_counter()
    split = data.read_splits(f"large{num_images}")["train"]
    result = {"read": time.perf_counter() - started, "peak": peak_megabytes()}
    loader = DataLoader(
        Texts(), batch_size=256, shuffle=True, num_workers=4, persistent_workers=True
    )
    batches = iter(loader)
    for _ in batches:
        pass
    pids = [os.getpid(), *(worker.pid for worker in batches._workers)]
    result["megabytes"] = sum(megabytes(pid) for pid in pids)
    result["headers"] = seconds_of(read_headers)
    return result


@measurement
def encoding(options: Namespace) -> Iterator[Row]:
    """Encoding a folder's image files, over the image encoder's bare forward on the same pixels."""
    for encoder, num_images in (("resnet50", 384), ("tf_efficientnet_lite0", 1280)):
        speed = run_child(options, "encode_folder", encoder, 224, num_images)
        ours, bare = speed["ours"], speed["bare"]
        what = f"images/s encoded from files over bare forward, {encoder}, 224 px"
        yield what, f"{ours:.0f} / {bare:.0f} = {ours / bare:.3f}", "≥ 0.95"
    speed = run_child(options, "encode_photos")
    reduced, full = speed["reduced"], speed["full"]
    what = "images/s of 12-megapixel photos, decoded at the size needed over in full, one thread"
    yield what, f"{reduced:.1f} / {full:.1f} = {reduced / full:.1f}", "> 1"


@child
def encode_photos(options: Namespace) -> dict[str, float]:
    """Images/s of `encode_images` for generated photos, by how they are decoded."""
    import numpy as np
    import torch
    from PIL import Image

    import inference
    from config import Config
    from models import ImageEncoder, Tower

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    paths = []
    for index in range(24):
        small = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        paths.append(Path(f"photo{index}.jpg"))
        Image.fromarray(small).resize((4000, 3000)).save(paths[-1], quality=90)
    config = Config(image_size=224, num_workers=0)
    tower = Tower(ImageEncoder("tf_efficientnet_lite0", 224), config).eval()
    original = inference.load_image

    def images_per_second() -> float:
        work = seconds_of(
            lambda: inference.encode_images(tower, paths, config, torch.device("cpu"))
        )
        return len(paths) / work

    images_per_second()  # warms up
    speeds = {"reduced": images_per_second()}
    inference.load_image = lambda path, min_side=0: original(path)
    speeds["full"] = images_per_second()
    return speeds


@child
def encode_folder(options: Namespace, encoder: str, size: str, num_images: str) -> dict[str, float]:
    """Images/s of `encode_images` and of the image encoder alone, in turn."""
    import torch

    from config import Config, SearchConfig
    from data import Transform, load_image, read_splits, stack_images
    from inference import encode_images
    from models import ImageEncoder, Tower, pick_device

    device = pick_device("cpu")
    # Without augmentation images are encoded at exactly this size.
    config = Config(image_size=int(size), augment=False, num_workers=SearchConfig.num_workers)
    tower = Tower(ImageEncoder(encoder, int(size)), config)
    tower.eval().to(memory_format=torch.channels_last)
    paths = read_splits(options.data_dir)["train"].paths[: int(num_images)]
    transform = Transform(int(size))
    batches = []
    for start in range(0, len(paths), 64):
        batch = paths[start : start + 64]
        batches.append(stack_images(transform(load_image(path)) for path in batch))

    @torch.inference_mode()
    def encode_bare() -> None:
        for pixels in batches:
            tower(pixels)

    encode_bare()  # warms up
    works = {"ours": lambda: encode_images(tower, paths, config, device), "bare": encode_bare}
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(3):
        for name, work in works.items():
            speeds[name].append(len(paths) / seconds_of(work))
    return {name: statistics.median(values) for name, values in speeds.items()}


SECOND_QUERY = """
import sys
from inference import Searcher
searcher = Searcher("best.pt", data_dir=sys.argv[1])
print(searcher.search(["two dogs play in the snow"], n=8)[0][0].score)
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
def second_query(options: Namespace) -> Iterator[Row]:
    """A query on images in the index, over `import torch` and loading the text encoder alone."""
    num_images = run_child(options, "save_checkpoint")["images"]
    commands = {
        "ours": [SECOND_QUERY, options.data_dir],
        "alone": [TEXT_ENCODER_ALONE, options.text_encoder],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for turn in range(6):
        for name, command in commands.items():
            started = time.perf_counter()
            process = subprocess.run(
                [sys.executable, "-c", *command], env=environment, capture_output=True, text=True
            )
            seconds = time.perf_counter() - started
            assert process.returncode == 0, process.stderr
            if turn == 0:  # builds the index
                continue
            times[name].append(seconds)
            if name == "ours":  # it has imported none of the slow packages
                assert process.stdout.endswith("[]\n"), process.stdout
    ours, alone = statistics.median(times["ours"]), statistics.median(times["alone"])
    what = (
        f"a second query over {num_images:,} images, over import torch and the text encoder alone"
    )
    yield what, f"{ours:.2f} / {alone:.2f} s = {ours / alone:.2f}", "≤ 1.5"


@child
def save_checkpoint(options: Namespace) -> dict[str, int]:
    """Saves an untrained checkpoint of the small encoders as best.pt."""
    from dataclasses import replace

    import torch

    from data import read_splits
    from models import build_clip, make_checkpoint

    config = replace(training_config(options, SMALL), data_dir=options.data_dir)
    model, tokenizer = build_clip(config)
    torch.save(make_checkpoint(model, tokenizer, config, example_query="a dog"), "best.pt")
    return {"images": len(read_splits(options.data_dir)["test"].paths)}


@measurement
def page_query(options: Namespace) -> Iterator[Row]:
    """A query of the page of `--serve`, with its thumbnails, without gradio's part."""
    seconds = run_child(options, "query_page")["seconds"]
    yield "a query of the page over 10,000 images", f"{1000 * seconds:.0f} ms", "< 100 ms"


@child
def query_page(options: Namespace) -> dict[str, float]:
    """Seconds of a query over random vectors of 10,000 images, some of which are the same."""
    import torch

    from data import read_splits
    from inference import Page, Searcher

    save_checkpoint(options)
    page = Page(Searcher("best.pt", "cpu", data_dir=options.data_dir), None)
    paths, vectors = page.image_set
    vectors = torch.nn.functional.normalize(torch.randn(10_000, vectors.shape[1]))
    page.image_set = [paths[i % len(paths)] for i in range(10_000)], vectors
    texts = read_splits(options.data_dir)["test"].texts[:100]
    page.search(texts[0], 8)  # warms up
    times = [seconds_of(partial(page.search, text, 8)) for text in texts]
    return {"seconds": statistics.median(times)}


if __name__ == "__main__":
    if "--device" in sys.argv:
        import benchmark_gpu

        benchmark_gpu.main()
    else:
        main()
