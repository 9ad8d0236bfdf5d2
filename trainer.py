"""Trains CLIP on images with captions.

python trainer.py --demo
python trainer.py
python trainer.py --data-dir my/folder --name mine --epochs 20
python trainer.py --init-from runs/clip/best.pt --data-dir my/folder --name mine
python trainer.py --resume runs/clip/last.pt
torchrun --nproc_per_node=4 trainer.py --batch-size 1024
"""

import hashlib
import importlib.util
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from config import (
    DEMO_DEFAULTS,
    Config,
    UserError,
    cli_errors,
    parse,
    printable,
    progress,
)
from data import (
    Split,
    atomic_write,
    build_train_loader,
    check_data_dir,
    leads_outside,
    load_image,
    open_image,
    prepare_data_dir,
    read_splits,
    remove_leftovers,
)
from inference import (
    DIRECTIONS,
    METRICS,
    RECALL_KS,
    RECALLS,
    build_image_loader,
    encode_references,
    evaluate,
    format_metrics,
)
from models import (
    CLIP,
    Checkpoint,
    TrainingState,
    build_clip,
    chance_loss,
    check_value,
    contrastive_loss,
    eval_image_size,
    freeze,
    keep_depthwise_float32,
    load_checkpoint,
    load_clip,
    make_checkpoint,
    pick_device,
    short,
)

MAY_CHANGE_ON_RESUME = {"chunk_size", "data_dir", "download_url", "device", "epochs"}
MAY_CHANGE_ON_RESUME |= {"num_workers", "resume", "allow_changed_data"}
# The settings that a run with `--init-from` cannot change.
ARCHITECTURE = ("image_encoder", "text_encoder", "text_layers", "text_width", "projection_dim")
ARCHITECTURE += ("max_length", "temperature")
LOCK = ".lock"  # in a run's folder while a process trains the run; contains the process's id
LOG_EVERY = 10  # steps; reading a loss waits for the device
SAVE_SECONDS = 60  # at least, between the checkpoints of two epochs
SCALER_RULES = {  # of the state of a gradient scaler, for `check_value`
    "scale": (1e-30, 1e30),
    "growth_factor": (1.0, 100.0),
    "backoff_factor": (0.0, 1.0),
    "growth_interval": range(1_000_000),
    "_growth_tracker": range(1_000_000),
}
METRICS_COLUMNS = ["epoch", "seconds", "pairs_per_second", "lr", "train_loss", *METRICS]


@cli_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(Config, argv)
    checkpoint = None
    if config.resume:
        checkpoint = load_checkpoint(config.resume)
        config = resumed_config(argv, checkpoint, config.resume)
    elif config.init_from:
        checkpoint = load_checkpoint(config.init_from)
        config = initialized_config(argv, checkpoint, config.init_from)
    signal.signal(signal.SIGTERM, partial(_stop, os.getpid()))
    train(config, checkpoint)


def _stop(main_process: int, *_: Any) -> None:
    """Handles SIGTERM as Ctrl-C is. A DataLoader worker inherits it while it starts."""
    if os.getpid() != main_process:
        os._exit(1)  # without a traceback
    raise KeyboardInterrupt


def resumed_config(argv: list[str] | None, checkpoint: Checkpoint, path: str) -> Config:
    """The settings of the checkpoint, with those that may change from the command line.

    Raises `UserError` for a checkpoint without training state, for any other setting, and if
    `--data-dir` is needed.
    """
    if checkpoint.training is None:
        raise UserError(f"--resume {path}: has no training state; resume from a run's last.pt")
    saved = saved_config(checkpoint.config, path)
    config = parse(Config, argv, default=saved)
    fixed = [field.name for field in fields(Config) if field.name not in MAY_CHANGE_ON_RESUME]
    check_unchanged(config, saved, fixed)
    if not config.data_dir:
        raise UserError(
            f"--resume {path}: its data is outside of the current folder, in "
            f"{checkpoint.config.data_dir}; pass --data-dir to read it"
        )
    epochs_done = len(checkpoint.training.history)
    if config.epochs < epochs_done:
        raise UserError(f"--epochs {config.epochs}: {path} has {epochs_done} epochs already")
    return config


def saved_config(config: Config, path: str) -> Config:
    """The settings of the checkpoint at `path` that a resume takes.

    A checkpoint from a stranger does not choose where data is downloaded from. Unless it is in a
    folder of `runs`, it chooses neither the device, nor the number of workers, nor a data folder
    outside of the current folder, which is then empty.
    """
    saved = replace(config, resume=path, download_url=Config.download_url, allow_changed_data=False)
    run_dir = Path(os.path.abspath(path)).parent
    if run_dir.parent == Path("runs").absolute():  # a run is resumed where it is
        return replace(saved, name=run_dir.name)
    data_dir = "" if leads_outside(saved.data_dir) else saved.data_dir
    return replace(saved, data_dir=data_dir, num_workers=Config.num_workers, device=Config.device)


def initialized_config(argv: list[str] | None, checkpoint: Checkpoint, path: str) -> Config:
    """The settings of the command line, with the architecture of the checkpoint.

    Image size and stochastic depth are the checkpoint's unless they are given. The encoders count
    as pretrained: batch-norm statistics are kept, and the fractions to freeze apply. Raises
    `UserError` for another architecture.
    """
    inherited = (*ARCHITECTURE, "image_size", "drop_path")
    settings = {name: getattr(checkpoint.config, name) for name in inherited}
    saved = Config(**settings, pretrained=True, init_from=path)
    config = parse(Config, argv, default=saved)
    check_unchanged(config, saved, ARCHITECTURE)
    if config.drop_path < 0:  # -1 is the encoder's rate, which the checkpoint has
        config = replace(config, drop_path=saved.drop_path)
    return config


def check_unchanged(config: Config, saved: Config, names: Iterable[str]) -> None:
    """Raises `UserError` for a flag that differs from the checkpoint's setting."""
    for name in names:
        old, new = getattr(saved, name), getattr(config, name)
        if old != new:
            flag = name.replace("_", "-")
            if isinstance(new, bool):
                typed = f"--{flag}" if new else f"--no-{flag}"
            else:
                typed = f"--{flag} {new}"
            raise UserError(f"{typed}: the checkpoint has {old}; leave the flag out")


# ---------------------------------------------------------------- processes


class _AllGather(torch.autograd.Function):
    """Concatenates the tensors (b, ...) of all processes to (B, ...)."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Each process has a loss of its own that depends on these rows: sum over the processes.
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


@dataclass(frozen=True)
class Distributed:
    """This process among those that torchrun started, and the device that it trains on."""

    device: torch.device
    precision: torch.dtype  # of the forward pass in training
    rank: int
    world_size: int

    @classmethod
    def init(cls, config: Config) -> "Distributed":
        """Joins the process group; a plain `python trainer.py` makes none and is rank 0 of 1."""
        device = pick_device(config.device)
        precision = _training_precision(config, device)
        if not torch.distributed.is_torchelastic_launched():
            return cls(device, precision, rank=0, world_size=1)
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend,
            # The others wait while the main process downloads or validates. If a process dies,
            # torchrun stops the others, so that the timeout need not.
            timeout=timedelta(hours=6),
            device_id=device if device.type == "cuda" else None,
        )
        rank = torch.distributed.get_rank()
        if rank > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (only the main process prints)
            for stop in (signal.SIGTERM, signal.SIGINT):
                signal.signal(stop, signal.SIG_DFL)
        return cls(device, precision, rank, torch.distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this process prints, validates and writes."""
        return self.rank == 0

    @property
    def is_first_of_machine(self) -> bool:
        """Whether this process generates and checks the data of its machine."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def local_slice(self, batch_size: int) -> slice:
        """The part of each batch that this process encodes."""
        if batch_size % self.world_size:
            raise UserError(
                f"--batch-size {batch_size}: cannot be divided evenly among "
                f"{self.world_size} processes"
            )
        local_batch_size = batch_size // self.world_size
        return slice(self.rank * local_batch_size, (self.rank + 1) * local_batch_size)

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """The model, or the DDP wrapper that keeps it equal in all processes."""
        if self.world_size == 1:
            return model
        if self.device.type == "cuda":  # torch has synchronized batch norm for CUDA only
            from timm.layers import convert_sync_batchnorm

            convert_sync_batchnorm(model)
        ddp_model = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)
        # Buffers are fixed, local or synchronized. Not an argument: torch has renamed it.
        ddp_model.broadcast_buffers = False
        return ddp_model

    def all_gather(self, local: Tensor) -> Tensor:
        """The rows of all processes (B, ...) from those of this one (b, ...), with gradients."""
        return local if self.world_size == 1 else _AllGather.apply(local)

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over the processes; `values` is overwritten."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values / self.world_size

    def main_process_first(self, work: Callable[[], None]) -> None:
        """Calls `work` in the main process, and then in the first process of each machine.

        The main process calls it twice, so a second call must do nothing.
        """
        for has_turn in (self.is_main, self.is_first_of_machine):
            if has_turn:
                work()
            self.barrier()

    def barrier(self) -> None:
        """Waits until all processes are here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Waits for all processes and destroys the process group."""
        self.barrier()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _training_precision(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of autocast; for "auto" bfloat16 or float16 on CUDA, whichever the GPU supports."""
    if config.precision != "auto":
        return getattr(torch, config.precision)
    if device.type != "cuda":
        return torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


# ---------------------------------------------------------------- loop


@dataclass
class Run:
    """A training run."""

    config: Config
    run_dir: Path
    dist: Distributed
    model: CLIP
    ddp_model: nn.Module  # `model` itself if there is one process
    tokenizer: Tokenizer
    splits: dict[str, Split]
    data_digest: dict[str, dict[str, Any]]  # of the function of that name
    loader: DataLoader  # of the training batches of all epochs that remain
    dev_loader: DataLoader  # of the dev images
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    history: list[dict[str, float]]  # the rows of metrics.csv
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # not yet in best.pt
    saved_at: float = field(default_factory=time.monotonic)
    writer: Any = None  # of TensorBoard, if it is installed

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.batch_sampler.steps_per_epoch


def train(config: Config, checkpoint: Checkpoint | None) -> None:
    """Trains from the start or from a checkpoint, and scores the best epoch on the test split."""
    dist = Distributed.init(config)
    with lock_run_dir(Path("runs", config.name)) if dist.is_main else nullcontext():
        run = setup(config, checkpoint, dist)
        print_summary(run)
        if dist.is_main:
            open_run_dir(run)
        try:
            train_epochs(run)
            if dist.is_main:
                test_best(run)
        except KeyboardInterrupt:
            command = f"python trainer.py --resume {shlex.quote(str(run.run_dir / 'last.pt'))}"
            sys.exit(f"stopped; resume with: {printable(command)}")
        finally:
            if run.writer:
                run.writer.close()
        dist.close()


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Creates the run's folder and makes this process the only one that writes into it.

    The system releases the lock when the process ends, however it ends; DataLoader workers do not
    inherit it. Raises `UserError` if another process has it.
    """
    lock = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+")
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be created: {error.strerror}") from None
    with file:
        try:
            import fcntl  # not on Windows, where runs are not locked

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"{run_dir}: process {file.read(20)} is training this run; wait until it has "
                "ended, or choose another --name"
            ) from None
        except (OSError, ImportError):  # a file system or a system without locks
            pass
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                lock.unlink()
            with suppress(OSError):  # not empty
                run_dir.rmdir()
                run_dir.parent.rmdir()


def train_epochs(run: Run) -> None:
    """Trains, validates and saves the epochs that remain."""
    # One iterator, so that its workers load the next epoch's batches during validation. They end
    # with it, when this function returns.
    batches = iter(run.loader)
    for epoch in range(len(run.history), run.config.epochs):
        started = time.perf_counter()
        loss = train_epoch(run, epoch, batches)
        if run.dist.is_main:
            validate_and_save(run, loss, time.perf_counter() - started)


def train_epoch(run: Run, epoch: int, batches: Iterator[dict[str, Any]]) -> float:
    """Trains on the next `steps_per_epoch` of `batches`; returns the mean loss of the steps.

    Raises `UserError` if a loss is not finite.
    """
    set_train_mode(run.model, run.config)
    seed_epoch(run.config.seed, epoch, run.dist.rank)
    num_steps = run.steps_per_epoch
    losses: list[float] = []
    pending: list[Tensor] = []  # losses that are still on the device
    epoch_batches = itertools.islice(batches, num_steps)
    with progress(epoch_batches, f"epoch {epoch + 1}", unit="step", total=num_steps) as bar:
        for step, batch in enumerate(bar, start=1):
            lr = run.scheduler.get_last_lr()[-1]
            pending.append(train_step(run, batch))
            if step % LOG_EVERY == 0 or step == num_steps:
                global_step = epoch * num_steps + step
                losses += reduce_losses(run, pending, global_step)
                pending = []
                log_scalars(run, global_step, {"train/loss": losses[-1], "train/lr": lr})
                speed = step * run.config.batch_size / max(bar.format_dict["elapsed"], 1e-3)
                text = f"loss {losses[-1]:.3f}, lr {lr:.1e}, {speed:.0f} pairs/s"
                bar.set_postfix_str(text, refresh=False)
    return sum(losses) / len(losses)


def train_step(run: Run, batch: dict[str, Any]) -> Tensor:
    """One optimizer step on this process's part of a batch; returns its loss, on the device."""
    config, dist = run.config, run.dist
    # 1. Move the batch to the device.
    to_device = partial(Tensor.to, device=dist.device, non_blocking=True)
    pixels = to_device(batch["pixels"])  # (b, 3, S, S)
    texts = [(to_device(ids), to_device(mask)) for ids, mask in batch["texts"]]
    caption_ids = to_device(batch["caption_ids"])  # (b,)

    # 2. Encode.
    is_16_bit = dist.precision is not torch.float32
    with torch.autocast(dist.device.type, dist.precision, enabled=is_16_bit):
        image_embeddings, text_embeddings, logit_scale = run.ddp_model(
            pixels, texts, config.chunk_size
        )  # (b, D), (b, D), ()

    # 3. The loss of the local pairs, with the pairs of all processes as negatives.
    all_images = dist.all_gather(image_embeddings)  # (B, D)
    all_texts = dist.all_gather(text_embeddings)  # (B, D)
    local_slice = dist.local_slice(config.batch_size)
    all_ids = dist.all_gather(caption_ids)  # (B,)
    loss = contrastive_loss(all_images, all_texts, logit_scale, local_slice, all_ids)

    # 4. Update the weights.
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.scheduler.step()
    run.model.clamp_logit_scale()
    return loss.detach()


def set_train_mode(model: CLIP, config: Config) -> None:
    """Train mode, except for frozen encoders and pretrained batch-norm statistics.

    Statistics of a batch in place of the pretrained ones cost 14 points of recall
    (tests/benchmarks/RESULTS.md).
    """
    model.train()
    for tower in (model.image, model.text):
        is_trained = any(parameter.requires_grad for parameter in tower.encoder.parameters())
        tower.encoder.train(is_trained)
    if config.pretrained:
        for module in model.image.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seeds dropout and stochastic depth, so that a resumed run samples the same as before."""
    sequence = np.random.SeedSequence((seed, epoch, rank))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def reduce_losses(run: Run, losses: list[Tensor], last_step: int) -> list[float]:
    """The mean over the processes of the loss of each step, of which the last is `last_step`.

    Raises `UserError` if one is not finite.
    """
    values = run.dist.all_reduce_mean(torch.stack(losses)).tolist()
    for step, value in enumerate(values, start=last_step - len(values) + 1):
        if not math.isfinite(value):
            raise UserError(
                f"step {step}: the loss is {value}. Try lower learning rates "
                "(--image-lr, --text-lr, --head-lr)"
            )
    return values


# ---------------------------------------------------------------- setup


def setup(config: Config, checkpoint: Checkpoint | None, dist: Distributed) -> Run:
    """Everything of a run, ready for its next epoch."""
    dist.local_slice(config.batch_size)  # raises if the batch cannot be divided
    if config.chunk_size and dist.device.type == "mps":
        raise UserError("--chunk-size: not supported on MPS, where torch does not repeat dropout")
    run_dir = Path("runs") / config.name
    if dist.is_main:
        check_run_dir(run_dir, config, checkpoint)
    check_data_dir(config)

    if config.resume:
        print_resume(config, checkpoint)

    torch.manual_seed(config.seed)
    model, tokenizer, splits = setup_model_and_data(config, checkpoint, dist)
    digest = data_digest(splits)
    saved_digest = checkpoint.training.data if config.resume else None
    if saved_digest and not config.allow_changed_data:
        check_data_unchanged(saved_digest, digest, config)
    elif dist.is_first_of_machine:
        check_images(splits, eval_image_size(model.image, config))

    # -1, the default, becomes the encoder's rate: 0 if it has no stochastic depth.
    config = replace(config, drop_path=model.image.encoder.drop_path)
    if config.pretrained:
        freeze(model.image.encoder, config.freeze_image_encoder)
        freeze(model.text.encoder, config.freeze_text_encoder)
    if dist.device.type == "cpu":
        keep_depthwise_float32(model.image.encoder)
    model.to(dist.device, memory_format=torch.channels_last)
    ddp_model = dist.wrap_ddp(model)

    start_epoch = len(checkpoint.training.history) if config.resume else 0
    loader = build_train_loader(
        splits["train"], tokenizer, config, dist.device, dist.rank, dist.world_size, start_epoch
    )
    dev_loader = build_image_loader(model.image, splits["dev"].paths, config, dist.device)
    fused = dist.device.type in ("cpu", "cuda")  # not in every torch on other devices
    optimizer = torch.optim.AdamW(param_groups(model, config), fused=fused)
    scheduler = build_scheduler(
        optimizer, config, loader.batch_sampler.steps_per_epoch, start_epoch
    )
    use_scaler = dist.precision is torch.float16
    scaler = torch.amp.GradScaler(dist.device.type, enabled=use_scaler)
    run = Run(
        config=config,
        run_dir=run_dir,
        dist=dist,
        model=model,
        ddp_model=ddp_model,
        tokenizer=tokenizer,
        splits=splits,
        data_digest=digest,
        loader=loader,
        dev_loader=dev_loader,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        history=[],
    )
    if config.resume:
        restore(run, checkpoint.training, config.resume)
    return run


def check_run_dir(run_dir: Path, config: Config, checkpoint: Checkpoint | None) -> None:
    """Raises `UserError` if a run would be overwritten, or resumed without all of its files."""
    last, best = run_dir / "last.pt", run_dir / "best.pt"
    is_default_demo = config.demo and config.name == DEMO_DEFAULTS["name"]
    may_replace = config.resume or is_default_demo
    if last.exists() and not may_replace:
        quoted = shlex.quote(str(last))
        raise UserError(f"{last} exists: resume it with --resume {quoted}, or pass another --name")
    if best.exists() and not may_replace:
        raise UserError(f"{best} exists: pass another --name")
    is_outside = config.resume and not same_folder(Path(config.resume).parent, run_dir)
    if is_outside and any(path.name != LOCK for path in run_dir.glob("*")):
        raise UserError(
            f"--resume {config.resume}: would write into another run, {run_dir}; copy the folder "
            "of this file to runs under another name and resume from there"
        )
    if config.resume and checkpoint.training.history and not best.exists():
        raise UserError(f"{best}: is missing; a run is resumed with its whole folder")


def print_resume(config: Config, checkpoint: Checkpoint) -> None:
    """Prints a line if the number of epochs has changed, or if all epochs are done."""
    saved_epochs = checkpoint.config.epochs
    if config.epochs != saved_epochs:
        print(f"resume: {saved_epochs} epochs become {config.epochs}, with their learning rates")
    elif config.epochs == len(checkpoint.training.history):
        print(f"resume: all {saved_epochs} epochs are done; a larger --epochs trains longer")


def setup_model_and_data(
    config: Config, checkpoint: Checkpoint | None, dist: Distributed
) -> tuple[CLIP, Tokenizer, dict[str, Split]]:
    """The model of a checkpoint, of pretrained encoders or from scratch; and the splits."""
    if checkpoint:
        splits = load_splits(config, dist)
        if config.init_from:  # the new run has its own dropout and stochastic depth
            checkpoint = replace(checkpoint, config=config)
        return load_clip(checkpoint), checkpoint.tokenizer, splits
    if config.pretrained:
        # Encoders first: if they cannot be loaded, that is said before any data is downloaded.
        names = printable(f"{config.text_encoder} and {config.image_encoder}")
        print(f"model: loading the pretrained {names}")
        model, tokenizer = build_clip(config)
        return model, tokenizer, load_splits(config, dist)
    splits = load_splits(config, dist)
    model, tokenizer = build_clip(config, captions=splits["train"].texts)
    return model, tokenizer, splits


def same_folder(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def load_splits(config: Config, dist: Distributed) -> dict[str, Split]:
    """The splits of the data folder, which is downloaded or generated first if it may be.

    Raises `UserError` for fewer training images than a batch.
    """
    dist.main_process_first(lambda: prepare_data_dir(config))
    splits = read_splits(config.data_dir)
    num_images = len(splits["train"].paths)
    if num_images < config.batch_size:
        raise UserError(
            f"--batch-size {config.batch_size}: the training split has only {num_images} images"
        )
    return splits


def check_images(splits: dict[str, Split], size: int) -> None:
    """Reads the header of every image, so that a broken one is named before the first step.

    Test images are read completely, as they are for the size of evaluation, because they are used
    only when the training is over. Not needed when a run is resumed with the data that it was
    started with.
    """
    for name, split in splits.items():
        for path in progress(split.paths, f"checking {name} images", leave=False):
            if name == "test":
                load_image(path, size)
            else:
                with open_image(path):
                    pass


def param_groups(model: CLIP, config: Config) -> list[dict[str, Any]]:
    """Parameters with their learning rates and weight decay.

    New heads have a larger learning rate than pretrained encoders. They come last, because the last
    learning rate is logged. Only matrices decay, not biases, gains or the temperature.
    """
    heads = [model.logit_scale, *model.image.head.parameters(), *model.text.head.parameters()]
    parts = (
        (model.image.encoder.parameters(), config.image_lr),
        (model.text.encoder.parameters(), config.text_lr),
        (heads, config.head_lr),
    )
    groups = []
    for parameters, lr in parts:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        decay = [parameter for parameter in trained if parameter.ndim > 1]
        no_decay = [parameter for parameter in trained if parameter.ndim <= 1]
        groups.append({"params": decay, "lr": lr, "weight_decay": config.weight_decay})
        groups.append({"params": no_decay, "lr": lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int, start_epoch: int
) -> LambdaLR:
    """The learning rates of all steps, at the first step of `start_epoch`."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # which LambdaLR requires to start at a later step
    factor = warmup_then_cosine(config.epochs * steps_per_epoch, config.warmup)
    return LambdaLR(optimizer, factor, last_epoch=start_epoch * steps_per_epoch - 1)


def warmup_then_cosine(total_steps: int, warmup: float) -> Callable[[int], float]:
    """The factor on the learning rates at a step, counted from 0.

    It rises linearly to 1 over the first `warmup` of the steps and falls to 0 along half a cosine.
    """
    warmup_steps = max(1, round(total_steps * warmup))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        decay_steps = max(1, total_steps - warmup_steps)
        return (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps)) / 2

    return factor


def restore(run: Run, training: TrainingState, path: str) -> None:
    """Sets the optimizer's state, the scaler and the history of a `Run` to those of a checkpoint.

    Only AdamW's averages, the scaler's scale and the history come from the file: the learning rates
    and the number of steps follow from the settings. Raises `UserError` for a state that does not
    fit the model, which the optimizer's native code would take unchecked.
    """
    try:
        check_history(training.history, run.config)
        check_value(training.scaler, SCALER_RULES, "its scaler")
        num_steps = len(training.history) * run.steps_per_epoch
        state = optimizer_state(run.optimizer, training, num_steps)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"--resume {path}: cannot be resumed: {error}") from None
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
    if training.scaler:  # the precision may have needed none so far
        scale = {name: training.scaler[name] for name in ("scale", "_growth_tracker")}
        run.scaler.load_state_dict(run.scaler.state_dict() | scale)
    run.history += training.history


def data_digest(splits: dict[str, Split]) -> dict[str, dict[str, Any]]:
    """What identifies each split: numbers and hashes of its image names and captions."""
    digest = {}
    for name, split in splits.items():
        digest[name] = {
            "images": len(split.paths),
            "captions": len(split.texts),
            "image names": _hash([path.name for path in split.paths]),
            "texts": _hash(list(split.captions)),
        }
    return digest


def _hash(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_data_unchanged(saved: dict[str, Any], digest: dict[str, Any], config: Config) -> None:
    """Raises `UserError` if the splits are not those of the checkpoint. Pixels are not compared.

    `saved` is the `data_digest` of the checkpoint, `digest` that of the data now.
    """
    changes = []
    for name, current in digest.items():
        before = saved.get(name) if type(saved.get(name)) is dict else {}
        for count, content in (("images", "image names"), ("captions", "texts")):
            if before.get(count) != current[count]:
                changes.append(
                    f"{name} has {current[count]} {count}, not {short(before.get(count))}"
                )
            elif before.get(content) != current[content]:
                changes.append(f"{name} has other {count}")
    if changes:
        raise UserError(
            f"{config.data_dir}: is not the data that the run was started with: "
            f"{', '.join(changes)}; pass --allow-changed-data to resume with it"
        )


def check_history(history: list[Any], config: Config) -> None:
    """Raises `ValueError` unless it has a row of finite numbers for each of its epochs."""
    numbers = dict.fromkeys(METRICS_COLUMNS, (-1e300, 1e300))
    for epoch, row in enumerate(history, start=1):
        if type(row) is not dict or row.keys() != numbers.keys() or epoch > config.epochs:
            raise ValueError(f"its history has no such row as epoch {epoch} of metrics.csv")
        check_value(row, numbers | {"epoch": {epoch}}, "its history")


def optimizer_state(
    optimizer: torch.optim.Optimizer, training: TrainingState, num_steps: int
) -> dict[int, dict[str, Tensor]]:
    """AdamW's state after `num_steps`. Raises `ValueError` if it does not fit the parameters.

    With a gradient scaler some steps were skipped, and their number comes from the file.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {}
    for index, state in training.optimizer.items():
        if type(index) is not int or index not in range(len(parameters)):
            raise ValueError(f"its optimizer has a state {short(index)}, but no such parameter")
        if state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"its optimizer state {index} is not that of AdamW")
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameters[index].shape or not state[name].is_floating_point():
                raise ValueError(f"its optimizer state {index} does not fit its parameter")
        # A scalar; `sum` also takes a tensor of another shape, which a file may contain.
        step = state["step"].sum().item() if training.scaler else num_steps
        if not 0 <= step < 2**24:
            raise ValueError(f"its optimizer has made {step} steps")
        states[index] = {"step": torch.tensor(float(int(step)))}
        for name in ("exp_avg", "exp_avg_sq"):  # with the strides of the parameter
            average = torch.empty_like(parameters[index], requires_grad=False)
            states[index][name] = average.copy_(state[name])
    return states


# ---------------------------------------------------------------- validation and files


def validate(model: CLIP, run: Run) -> dict[str, float]:
    """The retrieval metrics of a model on the dev split."""
    model.eval()
    dev, device = run.splits["dev"], run.dist.device
    return evaluate(model, run.tokenizer, dev, run.config, device, loader=run.dev_loader)


def best_epoch(history: list[dict[str, float]]) -> int:
    """The epoch with the largest sum of the six recalls on dev; the last of equal ones."""
    best = max(history, key=lambda row: (sum(row[name] for name in RECALLS), row["epoch"]))
    return best["epoch"]


def open_run_dir(run: Run) -> None:
    """Prepares the run's folder, with `last.pt` before the first step."""
    if importlib.util.find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        next_step = len(run.history) * run.steps_per_epoch + 1
        run.writer = SummaryWriter(run.run_dir / "events", purge_step=next_step)
    remove_leftovers(run.run_dir)
    if run.config.resume:
        write_metrics(run)  # metrics.csv may contain epochs that last.pt lacks
        write_curves(run)
    else:
        save_checkpoint(run)
        check_restorable(run)
        write_metrics(run)
        for former in ("best.pt", "test.json", "curves.png"):  # of an earlier demo
            (run.run_dir / former).unlink(missing_ok=True)


def check_restorable(run: Run) -> None:
    """Loads the `last.pt` that was saved before the first step, and removes it if that fails.

    Otherwise an encoder that cannot be restored would be noticed when its training is over.
    """
    last = run.run_dir / "last.pt"
    try:
        load_clip(load_checkpoint(last))
    except UserError as error:
        last.unlink()
        raise UserError(
            f"--image-encoder {run.config.image_encoder}, --text-encoder "
            f"{run.config.text_encoder}: one cannot be restored from a checkpoint: {error}"
        ) from None


def validate_and_save(run: Run, loss: float, seconds: float) -> None:
    """Ends an epoch: validates, prints a line, and writes the metrics.

    The checkpoints and the figure are written at most once in `SAVE_SECONDS` seconds, and after the
    last epoch: writing 1.4 GB takes longer than an epoch of a small data set on a GPU.
    """
    epoch = len(run.history) + 1
    metrics = validate(run.model, run)
    row = {
        "epoch": epoch,
        "seconds": seconds,
        "pairs_per_second": run.steps_per_epoch * run.config.batch_size / seconds,
        "lr": run.optimizer.param_groups[-1]["lr"],
        "train_loss": loss,
    }
    run.history.append(row | metrics)
    progress_text = f"epoch {epoch} of {run.config.epochs}: loss {loss:.3f}, {seconds:.0f} s"
    print(f"{progress_text}; dev {format_metrics(metrics)}")
    global_step = epoch * run.steps_per_epoch
    log_scalars(run, global_step, {f"dev/{name}": value for name, value in metrics.items()})
    if best_epoch(run.history) == epoch:
        weights = run.model.state_dict().items()
        run.best_weights = {name: value.to("cpu", copy=True) for name, value in weights}
    is_last = epoch == run.config.epochs
    if is_last or time.monotonic() - run.saved_at >= SAVE_SECONDS:
        save_checkpoint(run)
        write_curves(run)
    write_metrics(run)


def checkpoint_of(run: Run) -> dict[str, Any]:
    """What a search needs; its example query is the first test caption."""
    example_query = run.splits["test"].captions[0][0]
    return make_checkpoint(run.model, run.tokenizer, run.config, example_query)


def save_checkpoint(run: Run) -> None:
    """Writes `best.pt`, if there is a new one, and `last.pt`, with everything needed to resume.

    In this order, so that `last.pt` names no best epoch that `best.pt` lacks.
    """
    content = checkpoint_of(run)
    if run.best_weights:
        (run.run_dir / "test.json").unlink(missing_ok=True)  # of the former best.pt
        best = content | {"model": run.best_weights}
        atomic_write(run.run_dir / "best.pt", lambda file: torch.save(best, file))
        run.best_weights = {}
    content |= {
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.scheduler.state_dict(),  # the name in the file format
        "scaler": run.scaler.state_dict(),
        "history": run.history,
        "data": run.data_digest,
    }
    atomic_write(run.run_dir / "last.pt", lambda file: torch.save(content, file))
    run.saved_at = time.monotonic()


def write_metrics(run: Run) -> None:
    """Writes `metrics.csv`, one row per epoch."""
    table = pd.DataFrame(run.history, columns=METRICS_COLUMNS)
    atomic_write(run.run_dir / "metrics.csv", lambda file: table.to_csv(file, index=False))


def write_curves(run: Run) -> None:
    """Writes `curves.png`, if there is an epoch to plot."""
    if run.history:
        chance = chance_loss(run.config.batch_size)
        figure = plot_curves(pd.DataFrame(run.history), chance, best_epoch(run.history))
        atomic_write(run.run_dir / "curves.png", lambda file: figure.savefig(file, format="png"))


def log_scalars(run: Run, step: int, values: dict[str, float]) -> None:
    """Writes values to TensorBoard's event file, if TensorBoard is installed."""
    if run.writer:
        for name, value in values.items():
            run.writer.add_scalar(name, value, step)


def plot_curves(table: pd.DataFrame, chance: float, best: int) -> Figure:
    """The training loss with its value at chance, and the recalls on dev in both directions."""
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    loss_ax, t2i_ax, i2t_ax = figure.subplots(1, 3)
    loss_ax.plot(table["epoch"], table["train_loss"], marker=".", label="training")
    loss_ax.axhline(chance, color="gray", linestyle=":", label="at chance")
    loss_ax.set(title="contrastive loss", xlabel="epoch", ylabel="nats", ylim=(0, None))
    for ax, (direction, title) in zip((t2i_ax, i2t_ax), DIRECTIONS.items()):
        for k in RECALL_KS:
            ax.plot(table["epoch"], table[f"{direction}_r{k}"], marker=".", label=f"R@{k}")
        ax.set(title=f"{title}, dev split", xlabel="epoch", ylabel="recall, %", ylim=(0, 102))
    for ax in (loss_ax, t2i_ax, i2t_ax):
        label = f"best epoch, {best}"
        ax.axvline(best, color="black", linewidth=0.8, linestyle="--", label=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


def print_summary(run: Run) -> None:
    """Prints the settings, the sizes and the device."""
    config, model, dist = run.config, run.model, run.dist
    print("config:", ", ".join(f"{name}={value!r}" for name, value in asdict(config).items()))
    image_millions = sum(p.numel() for p in model.image.parameters()) / 1e6
    text_millions = sum(p.numel() for p in model.text.parameters()) / 1e6
    trained_millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(
        f"model: {image_millions:.1f} M image + {text_millions:.1f} M text parameters, "
        f"{trained_millions:.1f} M of them trained"
    )
    precision = str(dist.precision).removeprefix("torch.")
    processes = "1 process" if dist.world_size == 1 else f"{dist.world_size} processes"
    print(
        f"device: {dist.device}, {precision}, {processes}; "
        f"{run.steps_per_epoch} steps per epoch of {config.batch_size} pairs"
    )
    print(f"loss at chance: {chance_loss(config.batch_size):.3f}")


def test_best(run: Run) -> None:
    """Scores the best epoch on the test split, and prints a command to search with it.

    The references for the hub correction are added to `best.pt`.
    """
    best = run.run_dir / "best.pt"
    checkpoint = load_checkpoint(best)
    model = load_clip(checkpoint).to(run.dist.device, memory_format=torch.channels_last)
    config, device = run.config, run.dist.device
    references = encode_references(model, run.tokenizer, run.splits["train"], config, device)
    query = checkpoint.example_query
    content = make_checkpoint(model, run.tokenizer, config, query, references)
    atomic_write(best, lambda file: torch.save(content, file))

    metrics = evaluate(model, run.tokenizer, run.splits["test"], config, device, references)
    text = json.dumps(metrics, indent=2).encode()
    atomic_write(run.run_dir / "test.json", lambda file: file.write(text))
    print(f"test, with the weights of epoch {best_epoch(run.history)}: {format_metrics(metrics)}")
    if references:
        print(f"test, with hub correction: {format_metrics(metrics, '_nnn')}")
    run_dir = printable(run.run_dir)
    print(f"saved in {run_dir}: best.pt, last.pt, metrics.csv, curves.png, test.json")
    command = ["python", "inference.py", "--weights", str(best), "--n", "8"]
    if leads_outside(content["config"]["data_dir"]):
        command += ["--data-dir", config.data_dir]
    print(printable(f"{shlex.join(command)} --query={shlex.quote(query)}"))


if __name__ == "__main__":
    main()
