"""Trains CLIP on pictures with captions.

python trainer.py --demo
python trainer.py
python trainer.py --data-dir my/folder --name mine --epochs 20
python trainer.py --resume runs/clip/last.pt
torchrun --nproc_per_node=4 trainer.py --batch-size 1024
"""

import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_single_autograd
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from config import DEMO_DEFAULTS, Config, UserError, cli_errors, parse, progress
from data import (
    Split,
    atomic_write,
    build_train_loader,
    download_flickr8k,
    generate_shapes,
    open_image,
    read_splits,
)
from inference import METRICS, RECALLS_AT, evaluate, format_metrics
from models import (
    CLIP,
    TokenBatches,
    Tower,
    build_image_encoder,
    contrastive_loss,
    load_checkpoint,
    load_clip,
    load_text_encoder,
    make_checkpoint,
    pick_device,
    text_encoder_from_scratch,
)

MAY_CHANGE_ON_RESUME = {"chunk_size", "data_dir", "download_url", "device", "num_workers", "resume"}
LOG_EVERY = 10
RECALLS = [name for name in METRICS if not name.endswith("medr")]


@cli_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(Config, argv)
    checkpoint = load_checkpoint(config.resume) if config.resume else None
    if checkpoint:
        config = resumed_config(argv, checkpoint, config.resume)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        train(config, checkpoint)
    except KeyboardInterrupt:
        last = Path("runs", config.name, "last.pt")
        sys.exit(
            f"stopped; to go on: python trainer.py --resume {last}" if last.exists() else "stopped"
        )


def resumed_config(argv: list[str] | None, checkpoint: dict[str, Any], path: str) -> Config:
    """The settings of the checkpoint, with what may differ on another machine taken from the command line."""
    if "optimizer" not in checkpoint:
        raise UserError(f"--resume {path}: holds no training state; resume from a run's last.pt")
    saved = asdict(checkpoint["config"]) | {
        "resume": path,
        "download_url": Config.download_url,
    }  # not from a stranger
    config = parse(Config, argv, saved)
    for name, value in asdict(config).items():
        if value != saved[name] and name not in MAY_CHANGE_ON_RESUME:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the run to resume has {saved[name]}; leave it out"
            )
    return config


@dataclass(frozen=True)
class Distributed:
    """The process that trains: its device, its precision, and which it is of how many (torchrun's rank and world)."""

    device: torch.device
    precision: torch.dtype  # of the encoders in training
    rank: int  # the first, 0, speaks for all, validates and writes
    world_size: int

    @classmethod
    def init(cls, config: Config) -> "Distributed":
        """Joins those that torchrun started. A plain `python trainer.py` is 0 of 1: no process group is made."""
        device, precision = pick_device(config.device), torch.float32
        if config.precision != "auto":
            precision = getattr(torch, config.precision)
        elif device.type == "cuda":
            precision = (
                torch.bfloat16
                if torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16
            )
        if not torch.distributed.is_torchelastic_launched():
            return cls(device, precision, rank=0, world_size=1)
        # Hours, as the others wait while the first fetches data or validates; of a death torchrun tells the others.
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        torch.distributed.init_process_group(backend, timeout=timedelta(hours=6), device_id=own)
        if torch.distributed.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the first speaks for all)
            for stop in (signal.SIGTERM, signal.SIGINT):
                signal.signal(stop, signal.SIG_DFL)
        return cls(
            device, precision, torch.distributed.get_rank(), torch.distributed.get_world_size()
        )

    def local_slice(self, batch_size: int) -> slice:
        """Which pairs of each batch are its own."""
        if batch_size % self.world_size:
            raise UserError(
                f"--batch-size {batch_size}: cannot be shared evenly among {self.world_size} processes"
            )
        share = batch_size // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """The model as each process trains it: with the same weights, and the mean of all gradients."""
        if self.world_size == 1:
            return model
        if (
            self.device.type == "cuda"
        ):  # batch norm in training mode sees the whole batch; torch has it for CUDA alone
            from timm.layers import convert_sync_batchnorm

            convert_sync_batchnorm(model)
        return DistributedDataParallel(model, forward_sync_buffers=False, static_graph=True)

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        """From its own rows (R, D) to those of all (B, D); gradients flow back to the process that a row came from."""
        return (
            rows
            if self.world_size == 1
            else all_gather_single_autograd(rows, 0, torch.distributed.group.WORLD)
        )

    def all_reduce_mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of all processes' `values`."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values / self.world_size

    def main_process_first(self, work: Callable[[], None]) -> None:
        """Has the first process `work`, then the first of each machine, where machines share no files."""
        for leads in (self.rank == 0, os.environ.get("LOCAL_RANK", "0") == "0"):
            if leads:
                work()
            self.barrier()

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Ends the group, when all are done."""
        self.barrier()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@dataclass
class Run:
    """A training run: all that `last.pt` keeps, and what it works on."""

    config: Config
    run_dir: Path
    dist: Distributed
    model: CLIP
    ddp_model: nn.Module  # the model; of several processes, what keeps it the same in all
    tokenizer: Tokenizer
    splits: dict[str, Split]
    loader: DataLoader
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    history: list[dict[str, float]]  # the rows of metrics.csv
    writer: Any = None  # TensorBoard's writer, where that is installed


def train(config: Config, checkpoint: dict[str, Any] | None) -> None:
    """Trains from the start, or on from a checkpoint, and scores the best weights on the test split."""
    run = setup(config, checkpoint)
    print_summary(run)
    if first := run.dist.rank == 0:  # it alone validates and writes
        open_run_dir(run, resumed=checkpoint is not None)
    for epoch in range(len(run.history), config.epochs):
        started = time.perf_counter()
        loss = train_epoch(run, epoch)
        if first:
            validate_and_save(run, loss, time.perf_counter() - started)
    if first:
        test_best(run)
    run.dist.close()


def train_epoch(run: Run, epoch: int) -> float:
    """One pass over the training pictures; returns the mean loss of its steps, and raises if one is not finite."""
    set_train_mode(run.model, run.config)
    seeds = np.random.SeedSequence((run.config.seed, epoch, run.dist.rank))
    torch.manual_seed(
        int(seeds.generate_state(1, np.uint64)[0])
    )  # so that a resumed run draws the same dropout
    run.loader.batch_sampler.set_epoch(epoch)
    losses: list[float] = []
    unread: list[Tensor] = []  # reading a loss waits for the device, so it is done now and then
    with progress(run.loader, f"epoch {epoch + 1}", unit="step") as bar:
        for pixels, texts in bar:
            lr = run.scheduler.get_last_lr()[-1]
            unread.append(train_step(run, pixels, texts))
            if len(unread) == LOG_EVERY or len(losses) + len(unread) == len(run.loader):
                losses += reduce_losses(
                    run, unread, first_step=epoch * len(run.loader) + len(losses) + 1
                )
                speed = len(losses) * run.config.batch_size / max(bar.format_dict["elapsed"], 1e-3)
                log_scalars(
                    run,
                    epoch * len(run.loader) + len(losses),
                    {"train/loss": losses[-1], "train/lr": lr},
                )
                bar.set_postfix_str(
                    f"loss {losses[-1]:.3f}, lr {lr:.1e}, {speed:.0f} pairs/s", refresh=False
                )
                unread = []
    return sum(losses) / len(losses)


def train_step(run: Run, pixels: Tensor, texts: TokenBatches) -> Tensor:
    """One step of the weights on this process's rows of a batch; returns their loss, which nobody has waited for."""
    process, chunk_size = run.dist, run.config.chunk_size
    pixels = pixels.to(process.device, non_blocking=True)
    texts = [
        tuple(tensor.to(process.device, non_blocking=True) for tensor in group) for group in texts
    ]
    lower = (
        process.precision is not torch.float32
    )  # in whose cache of weights no chunks' gradients may be summed
    with torch.autocast(
        process.device.type, process.precision, enabled=lower, cache_enabled=not chunk_size
    ):
        image_embeddings, text_embeddings, logit_scale = run.ddp_model(pixels, texts, chunk_size)
    everyones = (
        process.all_gather(image_embeddings),
        process.all_gather(text_embeddings),
    )  # (B, D), the negatives of all
    loss = contrastive_loss(*everyones, logit_scale, process.local_slice(run.config.batch_size))
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.scheduler.step()
    run.model.clamp_logit_scale()
    return loss.detach()


def set_train_mode(model: CLIP, config: Config) -> None:
    """Pretrained batch-norm statistics stay: those of a batch cost 14 of 34 points of recall (README)."""
    model.train()
    for tower in (model.image, model.text):
        tower.encoder.train(any(tensor.requires_grad for tensor in tower.encoder.parameters()))
    for module in model.image.modules():
        if config.pretrained and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def reduce_losses(run: Run, losses: list[Tensor], first_step: int) -> list[float]:
    """The losses of whole batches, the mean over the processes; raises if one is not finite."""
    values = run.dist.all_reduce_mean(torch.stack(losses)).tolist()
    for step, value in enumerate(values, start=first_step):
        if not math.isfinite(value):
            raise UserError(
                f"step {step}: the loss is {value}. Try lower rates (--image-lr, --text-lr, --head-lr)"
            )
    return values


# ---------------------------------------------------------------- preparing


def setup(config: Config, checkpoint: dict[str, Any] | None) -> Run:
    """Everything of a run, ready for its next epoch."""
    folder, process = Path("runs") / config.name, Distributed.init(config)
    rows = process.local_slice(config.batch_size)
    if process.rank == 0:
        check_run_dir(folder, config, checkpoint)
    torch.manual_seed(config.seed)
    model, tokenizer, splits = prepare_model_and_data(config, checkpoint, process)
    model.to(process.device, memory_format=torch.channels_last)
    replica = process.wrap_ddp(model)
    loader = build_train_loader(splits["train"], tokenizer, config, process.device, rows)
    optimizer = torch.optim.AdamW(param_groups(model, config), fused=True)
    schedule = LambdaLR(optimizer, warmup_then_cosine(config.epochs * len(loader), config.warmup))
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.precision is torch.float16)
    run = Run(
        config,
        folder,
        process,
        model,
        replica,
        tokenizer,
        splits,
        loader,
        optimizer,
        schedule,
        scaler,
        [],
    )
    if checkpoint:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.scheduler.load_state_dict(checkpoint["schedule"])
        if checkpoint["scaler"]:  # a scaler's state is empty in a run whose precision needed none
            run.scaler.load_state_dict(checkpoint["scaler"])
        run.history += checkpoint["history"]
    return run


def check_run_dir(folder: Path, config: Config, checkpoint: dict[str, Any] | None) -> None:
    """Refuses to overwrite a run, and to resume one of which a part is missing."""
    if (
        not checkpoint
        and (folder / "last.pt").exists()
        and not (config.demo and config.name == DEMO_DEFAULTS["name"])
    ):
        raise UserError(
            f"{folder}/last.pt exists: go on with --resume {folder}/last.pt, or choose another --name"
        )
    if checkpoint and checkpoint["history"] and not (folder / "best.pt").exists():
        raise UserError(f"{folder}/best.pt: missing; a run is resumed with its whole folder")


def prepare_model_and_data(
    config: Config, checkpoint: dict[str, Any] | None, process: Distributed
) -> tuple[CLIP, Tokenizer, dict[str, Split]]:
    """Pretrained weights come first: where they cannot be had, that is said before any data is fetched."""
    if (
        config.data_dir not in (Config.data_dir, DEMO_DEFAULTS["data_dir"])
        and not Path(config.data_dir).exists()
    ):
        raise UserError(f"--data-dir {config.data_dir}: no such folder")
    encoders = None
    if config.pretrained and not checkpoint:
        print(f"model: loading the pretrained {config.text_encoder} and {config.image_encoder}")
        encoders = *load_text_encoder(config), build_image_encoder(config)
    splits = prepare_data(config, process)
    if checkpoint:
        model, tokenizer = load_clip(checkpoint), checkpoint["tokenizer"]
    else:
        encoders = encoders or (
            *text_encoder_from_scratch(config, splits["train"].texts),
            build_image_encoder(config),
        )
        text, tokenizer, image = encoders
        model = CLIP(Tower(image, config), Tower(text, config), config.temperature)
    for tower, share in (
        (model.image, config.freeze_image_encoder),
        (model.text, config.freeze_text_encoder),
    ):
        tensors = list(tower.encoder.parameters())  # from the input to the output
        for tensor in tensors[: round(share * len(tensors)) if config.pretrained else 0]:
            tensor.requires_grad_(False)
    for module in (
        model.image.modules()
    ):  # depthwise kernels, whose gradients a CPU computes four times slower in bf16
        if (
            isinstance(module, nn.Conv2d)
            and module.groups == module.in_channels
            and module.weight.requires_grad
        ):
            # torch's way to take one function out of autocast, made for those with gradients of their own
            module.forward = torch.amp.custom_fwd(
                module.forward, device_type="cpu", cast_inputs=torch.float32
            )
    return model, tokenizer, splits


def prepare_data(config: Config, process: Distributed) -> dict[str, Split]:
    """The splits, after a look into the header of every picture, so that a broken one shows before the first step."""
    process.main_process_first(lambda: prepare_dataset(config))
    splits = read_splits(config.data_dir)
    if (pictures := len(splits["train"].paths)) < config.batch_size:
        raise UserError(
            f"--batch-size {config.batch_size}: the training split holds only {pictures} pictures"
        )
    for path in progress(
        [path for split in splits.values() for path in split.paths],
        "checking pictures",
        leave=False,
    ):
        with open_image(path):
            pass
    return splits


def prepare_dataset(config: Config) -> None:
    """Fetches Flickr8k, or draws the demo's shapes, where the default folder is absent."""
    folder = Path(config.data_dir)
    if config.demo and config.data_dir == DEMO_DEFAULTS["data_dir"] and not folder.exists():
        generate_shapes(folder)
    elif config.data_dir == Config.data_dir and not folder.exists():
        download_flickr8k(folder, config.download_url)


def param_groups(model: CLIP, config: Config) -> list[dict[str, Any]]:
    """New heads learn fast and pretrained encoders slowly; only matrices decay, not gains, biases or temperature."""
    rates = {
        "image": config.image_lr,
        "text": config.text_lr,
        "head": config.head_lr,
    }  # the last one is shown
    groups: dict[tuple[str, bool], list[Tensor]] = {
        (part, matrix): [] for part in rates for matrix in (True, False)
    }
    for name, parameter in model.named_parameters():
        part = "head" if ".head." in name or name == "logit_scale" else name.partition(".")[0]
        if parameter.requires_grad:
            groups[part, parameter.ndim > 1].append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": config.weight_decay if matrix else 0.0,
        }
        for (part, matrix), parameters in groups.items()
        if parameters
    ]


def warmup_then_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """The factor on every rate at a step: a line up to 1 over the first `warmup` of the steps, then a cosine to 0."""
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2

    return factor


# ---------------------------------------------------------------- validating and saving


def validate(model: CLIP, run: Run, split: str) -> dict[str, float]:
    """The recalls of a split; of the run's model after an epoch, of its best weights at the end."""
    model.eval()
    return evaluate(
        model.image, model.text, run.tokenizer, run.splits[split], run.config, run.dist.device
    )


def best_epoch(history: list[dict[str, float]]) -> int:
    """The epoch with the largest sum of the six recalls on the dev split; the first of equals."""
    return max(history, key=lambda row: sum(row[name] for name in RECALLS))["epoch"]


def checkpoint_of(run: Run) -> dict[str, Any]:
    return make_checkpoint(
        run.model, run.tokenizer, run.config, example_query=run.splits["test"].captions[0][0]
    )


def save_checkpoint(run: Run) -> None:
    """`last.pt`, with everything needed to go on, and the report that is made of it."""
    state = {
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
    }
    content = {**checkpoint_of(run), **state, "history": run.history}
    atomic_write(run.run_dir / "last.pt", lambda file: torch.save(content, file))
    write_metrics(run)


def open_run_dir(run: Run, resumed: bool) -> None:
    """The run's folder, with `last.pt` before the first step."""
    try:
        run.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{run.run_dir}: cannot be made into the run's folder: {error.strerror}"
        ) from None
    if importlib.util.find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        run.writer = SummaryWriter(
            run.run_dir / "events", purge_step=len(run.history) * len(run.loader) + 1
        )
    for half_written in run.run_dir.glob("*.tmp"):  # by a run that was killed
        half_written.unlink()
    if resumed:
        write_metrics(run)  # it may have been killed before
    else:
        save_checkpoint(run)
        for leftover in ("best.pt", "test.json", "curves.png"):  # of an earlier demo
            (run.run_dir / leftover).unlink(missing_ok=True)


def validate_and_save(run: Run, loss: float, seconds: float) -> None:
    """Validates, and writes the epoch's row and weights."""
    epoch, metrics = len(run.history) + 1, validate(run.model, run, "dev")
    speed, lr = (
        len(run.loader) * run.config.batch_size / seconds,
        run.optimizer.param_groups[-1]["lr"],
    )
    row = {
        "epoch": epoch,
        "seconds": seconds,
        "pairs_per_second": speed,
        "lr": lr,
        "train_loss": loss,
    }
    run.history.append(row | metrics)
    print(
        f"epoch {epoch} of {run.config.epochs}: loss {loss:.3f}, {seconds:.0f} s; dev {format_metrics(metrics)}"
    )
    log_scalars(run, epoch, {f"dev/{name}": value for name, value in metrics.items()})
    if best_epoch(run.history) == epoch:
        atomic_write(run.run_dir / "best.pt", lambda file: torch.save(checkpoint_of(run), file))
    save_checkpoint(run)


def write_metrics(run: Run) -> None:
    """`metrics.csv` with a row an epoch, and `curves.png`."""
    table = pd.DataFrame(
        run.history, columns=["epoch", "seconds", "pairs_per_second", "lr", "train_loss", *METRICS]
    )
    atomic_write(run.run_dir / "metrics.csv", lambda file: table.to_csv(file, index=False))
    if len(table):
        figure = plot_curves(table, math.log(run.config.batch_size), best_epoch(run.history))
        atomic_write(run.run_dir / "curves.png", lambda file: figure.savefig(file, format="png"))


def log_scalars(run: Run, step: int, values: dict[str, float]) -> None:
    for name, value in values.items() if run.writer else ():
        run.writer.add_scalar(name, value, step)


def plot_curves(table: pd.DataFrame, chance: float, best: int) -> Figure:
    """The training loss with its chance level, and the recalls on the dev split both ways."""
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    loss, *ways = figure.subplots(1, 3)
    loss.plot(table["epoch"], table["train_loss"], marker=".", label="training")
    loss.axhline(chance, color="gray", linestyle=":", label="chance, ln(batch)")
    loss.set(title="contrastive loss", xlabel="epoch", ylabel="nats", ylim=(0, None))
    for axes, way, title in zip(ways, ("t2i", "i2t"), ("text to image", "image to text")):
        for k in RECALLS_AT:
            axes.plot(table["epoch"], table[f"{way}_r{k}"], marker=".", label=f"R@{k}")
        axes.set(title=f"{title}, dev split", xlabel="epoch", ylabel="recall, %", ylim=(0, 102))
    for axes in (loss, *ways):
        axes.axvline(
            best, color="black", linewidth=0.8, linestyle="--", label=f"best epoch, {best}"
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def print_summary(run: Run) -> None:
    """The settings, the device and the sizes, once."""
    config, model, process = run.config, run.model, run.dist
    print("config:", ", ".join(f"{name}={value!r}" for name, value in asdict(config).items()))
    millions = [
        sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.image, model.text)
    ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(
        f"model: {millions[0]:.1f} M image + {millions[1]:.1f} M text parameters, {trained:.1f} M of them trained"
    )
    kind = f"{str(process.precision).removeprefix('torch.')}, {process.world_size} process{'es' * (process.world_size > 1)}"
    print(
        f"device: {process.device}, {kind}; {len(run.loader)} steps an epoch of {config.batch_size} pairs"
    )
    print(f"loss at chance: ln({config.batch_size}) = {math.log(config.batch_size):.3f}")


def test_best(run: Run) -> None:
    """Scores the best weights on the test split, once, and says what to do next."""
    best = load_checkpoint(run.run_dir / "best.pt")
    metrics = validate(
        load_clip(best).to(run.dist.device, memory_format=torch.channels_last), run, "test"
    )
    atomic_write(
        run.run_dir / "test.json", lambda file: file.write(json.dumps(metrics, indent=2).encode())
    )
    print(f"test, with the weights of epoch {best_epoch(run.history)}: {format_metrics(metrics)}")
    print(f"saved in {run.run_dir}: best.pt, last.pt, metrics.csv, curves.png, test.json")
    print(
        f"python inference.py --weights {run.run_dir / 'best.pt'} --n 8 --query {shlex.quote(best['example_query'])}"
    )


if __name__ == "__main__":
    main()
