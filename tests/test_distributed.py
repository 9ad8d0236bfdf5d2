"""`torchrun`: several processes train like one on the whole batch, and write one run.

It is also the program that torchrun starts in some of the tests.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import (
    CONFIG,
    FILES,
    STEPS,
    TINY,
    at_step,
    build,
    curve,
    max_relative_error,
    names_in,
    random_pixels,
    script,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import inference
import trainer
from config import Config, UserError, parse
from data import EpochBatchSampler
from models import contrastive_loss, load_checkpoint
from trainer import Distributed

CASES = {"gathered": [], "chunked": ["--chunk-size", "3"], "local": []}
Steps = dict[str, list | dict]  # what `record_five_steps` returns


# ---------------------------------------------------------------- programs for torchrun


def record_five_steps(*flags: str) -> Steps:
    """Trains for five steps.

    Returns the losses of the whole batches, the gradients of each step, and the parameters before
    and after all steps.
    """
    config = parse(Config, list(flags))
    run = trainer.setup(config, None, trainer.Distributed.init(config))
    trainer.set_train_mode(run.model, run.config)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # of DistilBERT's attention in transformers 4
            module.dropout_prob = 0.0
        elif isinstance(module, _BatchNorm):
            module.eval()
            # timm initializes some with zero, and no gradient passes a zero.
            nn.init.ones_(module.weight)
    parameters = dict(run.model.named_parameters())
    gradients = []

    def record_gradients(*_: object) -> None:
        gradients.append({name: value.grad.clone() for name, value in parameters.items()})

    run.optimizer.register_step_pre_hook(record_gradients)
    before = copies(parameters)
    losses = [trainer.train_step(run, batch) for _, batch in zip(range(5), run.loader)]
    losses = trainer.reduce_losses(run, losses, last_step=5)
    return {"losses": losses, "gradients": gradients, "before": before, "after": copies(parameters)}


def copies(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def all_gather_inputs(world_size: int) -> tuple[Tensor, Tensor]:
    """Rows (B, D) of all processes, and each process's weights of them (world_size, B, D)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3 * world_size, 2, generator=generator)
    weights = torch.randn(world_size, 3 * world_size, 2, generator=generator)
    return rows, weights


def record_all_gather(distributed: Distributed) -> dict[str, Tensor]:
    """The gathered rows, and the gradient of this process's rows: each process has its own loss."""
    rows, weights = all_gather_inputs(distributed.world_size)
    local = rows[distributed.local_slice(len(rows))].clone().requires_grad_()
    gathered = distributed.all_gather(local)
    (gathered.square() * weights[distributed.rank]).sum().backward()
    return {"gathered": gathered.detach(), "gradient": local.grad}


def record_cases(cases: str, *flags: str) -> None:
    """Records `all_gather` and each of `cases`, in a file for each process."""
    distributed = Distributed.init(Config(device="cpu"))
    rank = distributed.rank
    torch.save(record_all_gather(distributed), f"all_gather-{rank}.pt")
    Distributed.init = lambda _: distributed
    for case in cases.split():
        if case == "local":  # the last case: the pairs of the other processes are no negatives
            Distributed.all_gather = lambda _, local: local
            trainer.contrastive_loss = lambda images, texts, scale, *_: contrastive_loss(
                images, texts, scale
            )
        torch.save(record_five_steps(*flags, *CASES[case]), f"{case}-{rank}.pt")
    distributed.close()


def train_and_kill_rank_1(step: str, *flags: str) -> None:
    """A training run in which the second process is killed at a step, counted from 1."""
    rank = os.environ["RANK"]
    steps = iter(range(1, 1_000_000))
    Path(f"{rank}.pid").write_text(str(os.getpid()))

    def loss(*batch: object) -> Tensor:
        if next(steps) == int(step) and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return contrastive_loss(*batch)

    trainer.contrastive_loss = loss
    trainer.SAVE_SECONDS = 0
    trainer.main(list(flags))


def torchrun(world_size: int, *command: str, cwd: Path) -> subprocess.CompletedProcess:
    result = script(*command, cwd=cwd, processes=world_size)
    assert result.returncode == 0, result.stderr
    return result


# ---------------------------------------------------------------- parity with one process

SAME = [(2, "gathered"), (2, "chunked"), (4, "gathered")]


@pytest.fixture(scope="module")
def flags(shapes: Path) -> list[str]:
    """Flags of a training run without dropout and gradient clipping."""
    return [*TINY, "--data-dir", str(shapes), "--dropout", "0", "--clip-norm", "1e6"]


@pytest.fixture(scope="module")
def single(flags: list[str]) -> Steps:
    """Five steps of one process."""
    return record_five_steps(*flags)


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, flags: list[str]
) -> dict[tuple[int, str], list[dict]]:
    """What each of two and of four processes records, by world size and case."""
    records = {}
    for world_size, cases in ((2, list(CASES)), (4, ["gathered"])):
        folder = tmp_path_factory.mktemp(f"{world_size} processes")
        torchrun(world_size, __file__, "record_cases", " ".join(cases), *flags, cwd=folder)
        for case in ("all_gather", *cases):
            files = [folder / f"{case}-{rank}.pt" for rank in range(world_size)]
            records[world_size, case] = [torch.load(file) for file in files]
    return records


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_all_gather_sums_the_gradients_of_all_processes(recorded: dict, world_size: int):
    """Each process's rows have the gradient of the sum of the losses of all processes."""
    rows, weights = all_gather_inputs(world_size)
    leaf = rows.clone().requires_grad_()
    (leaf.square() * weights).sum().backward()
    processes = recorded[world_size, "all_gather"]
    assert len(processes) == world_size
    for process, gradient in zip(processes, leaf.grad.chunk(world_size)):
        assert torch.equal(process["gathered"], rows)
        torch.testing.assert_close(process["gradient"], gradient)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "case"), SAME)
def test_train_step_has_loss_and_gradients_of_one_process(
    single: Steps, recorded: dict, world_size: int, case: str
):
    """In each of five steps, whose gradients differ from one another."""
    assert len(single["losses"]) == len(single["gradients"]) == 5
    for process in recorded[world_size, case]:
        assert process["losses"] == pytest.approx(single["losses"], rel=1e-5)
        for ours, theirs in zip(process["gradients"], single["gradients"], strict=True):
            assert max_relative_error(ours, theirs) < 1e-3
    for one, other in pairwise(single["gradients"]):
        assert max_relative_error(one, other) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "case"), SAME)
def test_train_step_moves_parameters_as_in_one_process(
    single: Steps, recorded: dict, world_size: int, case: str
):
    for process in recorded[world_size, case]:
        for name, value in single["after"].items():
            # The gradient of a key's bias is only rounding, of which AdamW makes a step.
            if not name.endswith("k_lin.bias"):
                moved = (value - single["before"][name]).norm()
                assert moved > 1e-3, name
                assert (process["after"][name] - value).norm() < moved / 100, name


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "case"), SAME)
def test_train_step_keeps_all_processes_identical(recorded: dict, world_size: int, case: str):
    main_process, *others = recorded[world_size, case]
    for other in others:
        for name, value in main_process["after"].items():
            assert torch.equal(other["after"][name], value), name


@pytest.mark.slow
def test_train_step_differs_with_local_negatives_only(single: Steps, recorded: dict):
    """So the tests above detect a gather that is missing."""
    for process in recorded[2, "local"]:
        loss_pairs = zip(process["losses"], single["losses"], strict=True)
        assert max(ours / theirs for ours, theirs in loss_pairs) < 0.8
        for ours, theirs in zip(process["gradients"], single["gradients"], strict=True):
            assert max_relative_error(ours, theirs) > 0.1


# ---------------------------------------------------------------- parts of a batch


def make_distributed(rank: int, world_size: int, device: str = "cpu") -> Distributed:
    return Distributed(torch.device(device), torch.float32, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
def test_batch_sampler_divides_each_batch_among_processes(world_size: int):
    """The parts have equal sizes, no pair twice, and are those of `local_slice`."""
    whole = EpochBatchSampler(50, 12, 3, range(2, 5))
    parts = [EpochBatchSampler(50, 12, 3, range(2, 5), r, world_size) for r in range(world_size)]
    slices = [make_distributed(rank, world_size).local_slice(12) for rank in range(world_size)]
    indices = []
    for batch, *local_batches in zip(whole, *parts, strict=True):
        assert local_batches == [batch[local_slice] for local_slice in slices]
        joined = list(chain(*local_batches))
        assert joined == batch
        assert {len(local_batch) for local_batch in local_batches} == {12 // world_size}
        indices += joined
    assert len(indices) == len(set(indices)) == 3 * 48
    assert [index // 50 for index in indices] == [2] * 48 + [3] * 48 + [4] * 48
    assert {len(sampler) for sampler in parts} == {len(whole)} == {12}


@pytest.mark.parametrize(("batch_size", "world_size"), [(9, 2), (8, 3), (2, 4)])
def test_local_slice_rejects_an_indivisible_batch(batch_size: int, world_size: int):
    """The error names the flag and the number of processes."""
    message = rf"--batch-size {batch_size}: .*\b{world_size} processes"
    for rank in range(world_size):
        with pytest.raises(UserError, match=message) as error:
            make_distributed(rank, world_size).local_slice(batch_size)
        assert "\n" not in str(error.value)


def test_wrap_ddp_synchronizes_batch_norm_and_keeps_the_state_dict(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(trainer, "DistributedDataParallel", lambda model, **_: model)
    model, _ = build(CONFIG)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model.encode_image(random_pixels(CONFIG))
        assert make_distributed(0, 2, "cuda").wrap_ddp(model) is model
        assert torch.equal(model.encode_image(random_pixels(CONFIG)), before)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def two_process_run(
    tmp_path_factory: pytest.TempPathFactory, shapes: Path
) -> tuple[Path, subprocess.CompletedProcess]:
    """The working folder and the output of a small run by `torchrun --nproc_per_node=2`."""
    folder = tmp_path_factory.mktemp("two processes")
    dropout = ["--dropout", "0.3", "--drop-path", "0.3"]
    result = torchrun(2, "trainer.py", *TINY, *dropout, "--data-dir", str(shapes), cwd=folder)
    return folder, result


@pytest.mark.slow
def test_two_processes_write_one_run(two_process_run: tuple, trained: Path):
    """With the files and columns of any other run."""
    folder, _ = two_process_run
    assert names_in(folder) == ["runs"]
    assert names_in(folder / "runs") == ["demo"]
    run_dir = folder / "runs/demo"
    assert names_in(run_dir) == names_in(trained) == FILES
    table = pd.read_csv(run_dir / "metrics.csv")
    assert list(table.columns) == list(pd.read_csv(trained / "metrics.csv").columns)
    assert list(table["epoch"]) == [1, 2]
    assert table.notna().all(axis=None)
    assert torch.isfinite(torch.tensor(table.to_numpy())).all()


@pytest.mark.slow
def test_two_processes_print_each_line_once(two_process_run: tuple):
    _, result = two_process_run
    lines = result.stdout.splitlines()
    assert {line: count for line, count in Counter(lines).items() if count > 1} == {}
    for start in (
        "config: ",
        "device: cpu, float32, 2 processes",
        "epoch 1 of 2",
        "epoch 2 of 2",
        "test, with the",
    ):
        assert len([line for line in lines if line.startswith(start)]) == 1, start
    assert result.stderr == ""


@pytest.mark.slow
def test_search_loads_a_checkpoint_of_two_processes(
    two_process_run: tuple, workdir: Path, shapes: Path, capsys: pytest.CaptureFixture
):
    folder, _ = two_process_run
    flags = ["--n", "3", "--num-workers", "0", "--device", "cpu", "--data-dir", str(shapes)]
    inference.main(["--weights", str(folder / "runs/demo/best.pt"), *flags])
    assert capsys.readouterr().out.count(".png") > 3


@pytest.mark.slow
def test_two_processes_reject_an_indivisible_batch(workdir: Path, shapes: Path):
    """Before anything is read or written, with the same line in each process."""
    flags = [*TINY, "--batch-size", "9", "--data-dir", str(shapes)]
    result = script("trainer.py", *flags, cwd=workdir, processes=2)
    assert result.returncode != 0
    errors = {line for line in result.stderr.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1, result.stderr
    assert re.search(r"--batch-size 9: .*\b2 processes", errors.pop())
    assert result.stdout == ""
    assert names_in(workdir) == []


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trainer, "contrastive_loss", at_step(STEPS + 1, KeyboardInterrupt()))
        patch.setattr(trainer, "SAVE_SECONDS", 0)
        trainer.main([*TINY, "--data-dir", str(shapes), "--epochs", "3"])
    first_epoch = curve(Path("runs/demo"))
    assert list(first_epoch["epoch"]) == ["1"]
    command = ["trainer.py", "--resume", "runs/demo/last.pt", "--epochs", "2"]
    result = torchrun(2, *command, cwd=workdir)
    assert result.stdout.count("3 epochs become 2") == 1
    assert_finished(Path("runs/demo"), first_epoch)


def assert_finished(run_dir: Path, first_epoch: pd.DataFrame) -> None:
    """Asserts that a run has two epochs and that its first one is unchanged."""
    assert names_in(run_dir) == FILES
    table = curve(run_dir)
    assert list(table["epoch"]) == ["1", "2"]
    assert table[:1].equals(first_epoch)


# ---------------------------------------------------------------- a killed process


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads Linux's list of processes")
def test_one_killed_process_stops_all_and_the_run_resumes(workdir: Path, shapes: Path):
    """One process resumes it from the last whole epoch."""
    flags = [*TINY, "--data-dir", str(shapes)]
    started = time.monotonic()
    result = script(
        __file__, "train_and_kill_rank_1", str(STEPS + 3), *flags, cwd=workdir, processes=2
    )
    assert result.returncode != 0
    assert time.monotonic() - started < 60
    for rank in range(2):
        assert not Path("/proc", Path(f"{rank}.pid").read_text()).exists()
    assert len(load_checkpoint("runs/demo/last.pt").training.history) == 1
    first_epoch = curve(Path("runs/demo"))
    trainer.main(["--resume", "runs/demo/last.pt"])
    assert_finished(Path("runs/demo"), first_epoch)


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize(("local_rank", "count"), [("0", 1), ("1", 0)])
def test_only_the_first_process_of_a_machine_checks_the_images(
    local_rank: str, count: int, workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    checked = []
    monkeypatch.setattr(trainer, "check_images", lambda *arguments: checked.append(arguments))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    config = parse(Config, [*TINY, "--data-dir", str(shapes)])
    trainer.setup(config, None, Distributed.init(config))
    assert len(checked) == count


@pytest.mark.slow
def test_one_process_makes_no_group_and_no_ddp_wrapper(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    original = trainer.train_step

    def step(run: trainer.Run, batch: dict) -> Tensor:
        has_group = torch.distributed.is_initialized()
        is_wrapped = run.ddp_model is not run.model
        seen.append((has_group, is_wrapped, run.dist.rank, run.dist.world_size))
        return original(run, batch)

    monkeypatch.setattr(trainer, "train_step", step)
    trainer.main([*TINY, "--epochs", "1", "--data-dir", str(shapes)])
    assert seen == [(False, False, 0, 1)] * STEPS
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    globals()[program](*arguments)
