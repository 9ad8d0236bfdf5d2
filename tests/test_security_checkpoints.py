"""Damaged and hostile checkpoint files are rejected, and nothing in them is run.

CLIP_MUTATIONS=10000 python -m pytest tests/test_security_checkpoints.py -k mutated
"""

import base64
import json
import math
import os
import pickle
import pickletools
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIG, ROOT, build, error_message
from tokenizers import Regex
from tokenizers.normalizers import Replace
from torch import Tensor, nn

import trainer
from config import UserError
from data import tokenize
from models import CHECKPOINT_FORMAT, Checkpoint, load_checkpoint, load_clip, make_checkpoint

MUTATIONS = int(os.environ.get("CLIP_MUTATIONS", "300"))
WEIGHT = "image.head.linear.weight"  # a matrix (16, 16)


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model; never written to."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    model, tokenizer = build(CONFIG)
    torch.save(make_checkpoint(model, tokenizer, CONFIG, "a red circle"), path)
    return path


@pytest.fixture
def checkpoint(checkpoint_path: Path) -> Checkpoint:
    """A valid checkpoint, for a test to modify."""
    return load_checkpoint(checkpoint_path)


def modified(source: Path, change: Callable[[dict], Any], target: Path) -> Path:
    """A copy of a checkpoint file whose content `change` has modified."""
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


def set_field(content: dict, *path: Any, value: Any) -> None:
    *parents, name = path
    for parent in parents:
        content = content[parent]
    content[name] = value


def load_error(path: Path) -> str:
    """The one line with which a checkpoint is rejected, when it is read or its model is built."""
    with pytest.raises(UserError) as error:
        load_clip(load_checkpoint(path))
    assert "\n" not in str(error.value)
    return str(error.value)


class Hostile:
    """Unpickled without restrictions, it makes the folder `planted` in the current folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("planted",)


# ---------------------------------------------------------------- reading a file


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: None, id="missing"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.mkdir(), id="a folder"),
        pytest.param(lambda path: path.write_text("a red circle\n"), id="text"),
        pytest.param(
            lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), id="another state dict"
        ),
        pytest.param(lambda path: torch.save(torch.zeros(3), path), id="a tensor"),
        pytest.param(
            lambda path: torch.save({"format": "clip weights 0"}, path), id="another format"
        ),
        pytest.param(
            lambda path: torch.save({"format": CHECKPOINT_FORMAT}, path), id="only the format"
        ),
        pytest.param(
            lambda path: torch.save({"format": CHECKPOINT_FORMAT, "model": Hostile()}, path),
            id="hostile",
        ),
        pytest.param(lambda path: path.write_bytes(pickle.dumps(Hostile())), id="hostile pickle"),
        pytest.param(
            lambda path: torch.save(Hostile(), path, _use_new_zipfile_serialization=False),
            id="hostile old format",
        ),
    ],
)
def test_load_checkpoint_rejects_other_files_and_runs_nothing(
    write: Callable, workdir: Path
) -> None:
    path = workdir / "w.pt"
    write(path)
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not (workdir / "planted").exists()


def test_hostile_pickle_makes_a_folder_if_unpickled(workdir: Path) -> None:
    """Checked without unpickling: the pickle names a call and its argument; this makes the call."""
    operations = [
        (operation.name, argument)
        for operation, argument, _ in pickletools.genops(pickle.dumps(Hostile()))
    ]
    call, arguments = Hostile().__reduce__()
    strings = [argument for name, argument in operations if name == "SHORT_BINUNICODE"]
    assert strings == [call.__module__, call.__name__, *arguments]
    assert "REDUCE" in dict(operations)  # the operation that makes the call
    call(*arguments)
    assert (workdir / "planted").exists()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.999])
def test_load_checkpoint_rejects_a_truncated_file(
    fraction: float, checkpoint_path: Path, tmp_path: Path
) -> None:
    content = checkpoint_path.read_bytes()
    (tmp_path / "w.pt").write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "w.pt")


# ---------------------------------------------------------------- building its model


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet50", "local-dir:planted", "no_such_model"])
def test_load_clip_rejects_image_encoder_that_timm_lacks(name: str, checkpoint: Checkpoint) -> None:
    """Names that timm would load from a hub or a folder are rejected too."""
    checkpoint.image_encoder["name"] = name
    with pytest.raises(UserError, match=re.escape(name)):
        load_clip(checkpoint)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "features_only"])
def test_load_clip_rejects_other_timm_arguments(
    argument: str, checkpoint: Checkpoint, checkpoint_path: Path
) -> None:
    checkpoint.image_encoder["arguments"][argument] = str(checkpoint_path)
    with pytest.raises(UserError, match=argument):
        load_clip(checkpoint)


def test_load_clip_rejects_text_encoder_that_transformers_lacks(checkpoint: Checkpoint) -> None:
    checkpoint.text_encoder["model_type"] = "wombat"
    with pytest.raises(UserError, match="wombat"):
        load_clip(checkpoint)


def set_projection_dim(checkpoint: Checkpoint) -> None:
    checkpoint.config = replace(checkpoint.config, projection_dim=65536)


@pytest.mark.parametrize(
    "modify",
    [
        pytest.param(
            lambda checkpoint: checkpoint.image_encoder["arguments"].update(num_classes=10**7),
            id="classes",
        ),
        pytest.param(
            lambda checkpoint: checkpoint.image_encoder.update(name="test_vit"), id="architecture"
        ),
        pytest.param(
            lambda checkpoint: checkpoint.text_encoder.update(vocab_size=10**10), id="vocabulary"
        ),
        pytest.param(lambda checkpoint: checkpoint.text_encoder.update(n_layers=2), id="layers"),
        pytest.param(set_projection_dim, id="projection"),
        pytest.param(lambda checkpoint: checkpoint.model.popitem(), id="a tensor too few"),
        pytest.param(
            lambda checkpoint: checkpoint.model.update({"text.more": torch.zeros(1)}),
            id="a tensor too many",
        ),
    ],
)
def test_load_clip_rejects_sizes_that_do_not_fit_the_tensors(
    modify: Callable, checkpoint: Checkpoint
) -> None:
    """Most of these sizes do not fit in memory: they are rejected before it is allocated."""
    modify(checkpoint)
    with pytest.raises(UserError, match="do not fit"):
        load_clip(checkpoint)


# ---------------------------------------------------------------- records of the file


def records(path: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return archive.infolist()


def data_offset(content: bytes, record: zipfile.ZipInfo) -> int:
    """Where the record's data starts, behind its header, its name and the padding."""
    header = record.header_offset
    return (
        header
        + 30
        + sum(int.from_bytes(content[header + i : header + i + 2], "little") for i in (26, 28))
    )


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def rewrite(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], **options: int
) -> Path:
    """A copy of a zip archive with other contents of its records."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", **options) as copy:
        for name in archive.namelist():
            copy.writestr(name, change(name, archive.read(name)))
    return target


def test_load_checkpoint_names_the_damaged_record(checkpoint_path: Path, tmp_path: Path) -> None:
    """One flipped bit in the middle of any record."""
    content = checkpoint_path.read_bytes()
    path = tmp_path / "w.pt"
    for record in records(checkpoint_path)[::7]:
        path.write_bytes(content)
        flip_bit(path, data_offset(content, record) + record.file_size // 2)
        assert record.filename in load_error(path)


def test_load_checkpoint_rejects_compressed_records(checkpoint_path: Path, tmp_path: Path) -> None:
    options = {"compression": zipfile.ZIP_DEFLATED}
    path = rewrite(checkpoint_path, tmp_path / "w.pt", lambda name, data: data, **options)
    assert "compressed" in load_error(path)


def test_load_checkpoint_rejects_two_records_of_one_name(
    checkpoint_path: Path, tmp_path: Path
) -> None:
    path = rewrite(checkpoint_path, tmp_path / "w.pt", lambda name, data: data)
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.namelist()[0]
        archive.writestr(first.upper(), b"")
    assert "two records of one name" in load_error(path)


def endless_hash(name: str, data: bytes) -> bytes:
    """A pickle of {t: None}, where t is a tuple of two equal tuples, and so on, 60 deep."""
    if not name.endswith("data.pkl"):
        return data
    steps = [pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.EMPTY_TUPLE]
    for index in range(60):
        put, get = pickle.BINPUT + bytes([index]), pickle.BINGET + bytes([index])
        steps.append(put + get + pickle.TUPLE2)
    return b"".join([*steps, pickle.NONE, pickle.SETITEM, pickle.STOP])


def test_load_checkpoint_rejects_endless_hash(checkpoint_path: Path, tmp_path: Path) -> None:
    path = rewrite(checkpoint_path, tmp_path / "w.pt", endless_hash)
    assert "too many values" in load_error(path)


def many_values(name: str, data: bytes) -> bytes:
    count = 3_000_000
    values = pickle.EMPTY_LIST + pickle.MARK + pickle.NONE * count + pickle.APPENDS + pickle.STOP
    return pickle.PROTO + b"\2" + values if name.endswith("data.pkl") else data


def test_load_checkpoint_rejects_millions_of_values(checkpoint_path: Path, tmp_path: Path) -> None:
    path = rewrite(checkpoint_path, tmp_path / "w.pt", many_values)
    assert "too many values" in load_error(path)


# ---------------------------------------------------------------- tensors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.zeros(16, 16).to_sparse(), id="sparse"),
        pytest.param(lambda: torch.zeros(16, 16).to_sparse_csr(), id="sparse rows"),
        pytest.param(lambda: torch.zeros(16, 16, device="meta"), id="meta"),
        pytest.param(
            lambda: torch.quantize_per_tensor(torch.zeros(16, 16), 1.0, 0, torch.qint8),
            id="quantized",
        ),
        pytest.param(lambda: torch.nested.nested_tensor([torch.zeros(16)]), id="nested"),
        pytest.param(lambda: torch.zeros(1, 1).expand(16, 16), id="stride 0"),
        pytest.param(lambda: torch.zeros(1).expand(10**5, 10**5), id="stride 0, 40 GB"),
        pytest.param(lambda: torch.zeros(17, 16)[1:], id="part of a storage"),
        pytest.param(lambda: torch.zeros(32).as_strided((16, 16), (1, 1)), id="overlapping"),
        pytest.param(lambda: nn.Parameter(torch.zeros(16, 16)), id="parameter"),
        pytest.param(lambda: torch.zeros(16, 16, requires_grad=True), id="with gradient"),
        pytest.param(lambda: torch.zeros(16, 16, dtype=torch.complex64), id="complex"),
        pytest.param(lambda: torch.zeros(16, 16, dtype=torch.complex64).conj().imag, id="negated"),
        pytest.param(lambda: torch.zeros(16, 16).half(), id="float16"),
        pytest.param(lambda: torch.zeros(16, 16, dtype=torch.int64), id="int64"),
        pytest.param(lambda: torch.zeros(16), id="vector"),
        pytest.param(lambda: 0.0, id="number"),
        pytest.param(lambda: [0.0], id="list"),
    ],
)
def test_load_checkpoint_rejects_other_tensors(
    make: Callable, checkpoint_path: Path, tmp_path: Path
) -> None:
    """Each in the place of a dense matrix of `float32`."""
    load_error(
        modified(
            checkpoint_path,
            lambda c: set_field(c, "model", WEIGHT, value=make()),
            tmp_path / "w.pt",
        )
    )


def test_load_checkpoint_rejects_a_shared_storage(checkpoint_path: Path, tmp_path: Path) -> None:
    def share(content: dict) -> None:
        content["model"][WEIGHT] = content["model"]["text.head.linear.weight"]

    error = load_error(modified(checkpoint_path, share, tmp_path / "w.pt"))
    assert "of its own storage" in error


@pytest.mark.parametrize("scale", [math.nan, math.inf, 4.7, -4.7])
def test_load_checkpoint_rejects_logit_scale_outside_the_clamp(
    scale: float, checkpoint_path: Path, tmp_path: Path
) -> None:
    def change(content: dict) -> None:
        content["model"]["logit_scale"] = torch.tensor(scale)

    assert "logit_scale" in load_error(modified(checkpoint_path, change, tmp_path / "w.pt"))


# ---------------------------------------------------------------- plain values


def nested_lists() -> list:
    """2^60 items for a program that visits them all."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("text_encoder", "n_layers"), 10**7),
        (("text_encoder", "n_layers"), 2.0),
        (("text_encoder", "n_layers"), True),
        (("text_encoder", "dropout"), math.nan),
        (("text_encoder", "attention_dropout"), 2.0),
        (("text_encoder", "max_position_embeddings"), 10**9),
        (("text_encoder", "max_position_embeddings"), 63),
        (("text_encoder", "activation"), "evil\nname"),
        (("text_encoder", "model_type"), "gptj"),
        pytest.param(("text_encoder", "more"), 10**5000, id="5000 digits"),
        (("text_encoder", "more"), nested_lists()),
        (("config", "temperature"), math.nan),
        (("config", "image_size"), 64.0),
        (("config", "seed"), True),
        (("config", "more"), nested_lists()),
        (("config", ("a", "tuple")), 1),
        (("image_encoder", "arguments", "num_classes"), 10**12),
        (("image_encoder", "arguments", "drop_path_rate"), math.nan),
        (("image_encoder", "arguments", "global_pool"), ""),
        (("image_encoder", "arguments", "img_size"), [10**9]),
        (("image_encoder", "more"), 1),
        (("example_query",), "a" * 10**6),
        (("more",), 1),
    ],
)
def test_load_checkpoint_rejects_other_values(
    path: tuple, value: Any, checkpoint_path: Path, tmp_path: Path
) -> None:
    load_error(
        modified(checkpoint_path, lambda c: set_field(c, *path, value=value), tmp_path / "w.pt")
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("return_dict", False),
        ("output_hidden_states", True),
        ("chunk_size_feed_forward", 3),
        ("dtype", "float16"),
        ("id2label", {"more": nested_lists()}),
    ],
)
def test_load_clip_ignores_settings_that_change_the_output_format(
    name: str, value: Any, checkpoint_path: Path, tmp_path: Path
) -> None:
    path = modified(
        checkpoint_path,
        lambda c: set_field(c, "text_encoder", name, value=value),
        tmp_path / "w.pt",
    )
    if name == "id2label":
        load_error(path)
    else:
        assert_equal_results(results(path), results(checkpoint_path))


# ---------------------------------------------------------------- tokenizers

TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "[X]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}
MANY = {**TEMPLATE, "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 9}
LONG_REPLACEMENT = base64.b64encode(b"\4\0\0\0" + b"\0" * 4 + b"a" * 1000).decode()
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(("padding",), None, id="no padding"),
        pytest.param(("padding", "strategy"), {"Fixed": 10**9}, id="padding to a length"),
        pytest.param(("padding", "pad_to_multiple_of"), 10**9, id="padding to a multiple"),
        pytest.param(("padding", "pad_id"), 10**5, id="padding id"),
        pytest.param(("truncation",), None, id="no truncation"),
        pytest.param(("truncation", "max_length"), 10**9, id="truncation to a length"),
        pytest.param(("truncation", "stride"), 64, id="truncation with a stride"),
        pytest.param(("truncation", "strategy"), "OnlySecond", id="truncation of the second text"),
        pytest.param(("normalizer",), {"type": "Prepend", "prepend": "x" * 10**6}, id="prepend"),
        pytest.param(
            ("normalizer",),
            {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6},
            id="replace",
        ),
        pytest.param(
            ("normalizer",),
            {"type": "Precompiled", "precompiled_charsmap": LONG_REPLACEMENT},
            id="precompiled",
        ),
        pytest.param(
            ("pre_tokenizer",),
            {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 9},
            id="bytes of bytes",
        ),
        pytest.param(
            ("pre_tokenizer",),
            {
                "type": "Split",
                "pattern": {"Regex": "(a+)+$"},
                "behavior": "Isolated",
                "invert": False,
            },
            id="split by a slow pattern",
        ),
        pytest.param(("post_processor",), TEMPLATE, id="template without its token"),
        pytest.param(("post_processor",), MANY, id="template that repeats the text"),
        pytest.param(("post_processor", "sep"), ["[SEP]", 10**6], id="id outside the vocabulary"),
        pytest.param(("model", "unk_token"), "missing", id="no unknown token"),
        pytest.param(("model", "vocab", "a piece"), 10**6, id="large id"),
        pytest.param(("model", "vocab"), {}, id="no vocabulary"),
        pytest.param(
            ("model",), {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}, id="unigram"
        ),
        pytest.param(("model", "type"), "Evil", id="other model"),
    ],
)
def test_load_checkpoint_rejects_other_tokenizers(
    path: tuple, value: Any, checkpoint_path: Path, tmp_path: Path
) -> None:
    def change(content: dict) -> None:
        parts = json.loads(content["tokenizer"])
        set_field(parts, *path, value=value)
        content["tokenizer"] = json.dumps(parts)

    load_error(modified(checkpoint_path, change, tmp_path / "w.pt"))


def test_load_checkpoint_takes_the_normalizer_of_deberta(
    checkpoint_path: Path, tmp_path: Path
) -> None:
    def change(content: dict) -> None:
        parts = json.loads(content["tokenizer"])
        parts["normalizer"] = json.loads(normalizer.__getstate__())
        content["tokenizer"] = json.dumps(parts)

    normalizer = Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")  # as transformers 5 builds it
    path = modified(checkpoint_path, change, tmp_path / "w.pt")
    tokenizer = load_checkpoint(path).tokenizer
    assert tokenizer.encode("red  \n circle").ids == tokenizer.encode("red circle").ids


def test_load_checkpoint_rejects_endless_json(checkpoint_path: Path, tmp_path: Path) -> None:
    load_error(
        modified(checkpoint_path, lambda c: c.update(tokenizer="[" * 10**5), tmp_path / "w.pt")
    )


# ---------------------------------------------------------------- training state


def first_average(content: dict) -> dict[str, Tensor]:
    return content["optimizer"]["state"][0]


def set_average(make: Callable[[Tensor], Any]) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        state = first_average(content)
        state["exp_avg"] = make(state["exp_avg"])

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_average(lambda average: torch.zeros(1)), id="short average"),
        pytest.param(
            set_average(lambda average: torch.zeros(1).expand(average.shape)), id="stride 0"
        ),
        pytest.param(set_average(lambda average: average.long()), id="integers"),
        pytest.param(set_average(lambda average: average.to_sparse()), id="sparse"),
        pytest.param(set_average(lambda average: 0.0), id="a number"),
        pytest.param(
            lambda c: c["optimizer"]["state"].update({10**6: first_average(c)}), id="shared"
        ),
        pytest.param(
            lambda c: c["optimizer"]["state"].update({-1: c["optimizer"]["state"].pop(0)}),
            id="index -1",
        ),
        pytest.param(lambda c: first_average(c).update(more=torch.zeros(1)), id="more tensors"),
        pytest.param(lambda c: first_average(c).pop("exp_avg_sq"), id="a tensor too few"),
        pytest.param(lambda c: c["history"][0].pop("lr"), id="a column too few"),
        pytest.param(lambda c: c["history"][0].update(more=1.0), id="a column too many"),
        pytest.param(lambda c: c["history"][0].update(lr=math.nan), id="NaN"),
        pytest.param(lambda c: c["history"][0].update(lr="0.1"), id="text"),
        pytest.param(lambda c: c["history"][0].update(epoch=7), id="another epoch"),
        pytest.param(lambda c: c["history"].extend(c["history"] * 5), id="more epochs"),
        pytest.param(lambda c: c.update(scaler={"scale": math.inf}), id="scale"),
        pytest.param(lambda c: c.update(scaler={"more": 1.0}), id="scaler"),
        pytest.param(lambda c: c.pop("history"), id="no history"),
    ],
)
def test_resume_rejects_other_training_state(
    change: Callable, trained: Path, shapes: Path, workdir: Path
) -> None:
    """A short average would be read and written past its end."""
    shutil.copytree(trained, "runs/demo")
    modified(trained / "last.pt", change, workdir / "runs/demo/last.pt")
    message = error_message(trainer.main, "--resume", "runs/demo/last.pt", "--data-dir", shapes)
    assert "runs/demo/last.pt" in message


LAST = Path("runs/demo/last.pt")


def restored(shapes: Path) -> trainer.Run:
    """The run that resumes from `LAST`."""
    checkpoint = load_checkpoint(LAST)
    flags = ["--resume", str(LAST), "--data-dir", str(shapes)]
    config = trainer.resumed_config(flags, checkpoint, str(LAST))
    return trainer.setup(config, checkpoint, trainer.Distributed.init(config))


def test_resume_takes_rates_and_steps_from_the_settings(
    trained: Path, shapes: Path, workdir: Path
) -> None:
    """Whatever the file has for them."""

    def change(content: dict) -> None:
        for group in content["optimizer"]["param_groups"]:
            group.update(lr=1e9, betas=(5.0, 5.0), eps=math.nan, weight_decay=-1.0, maximize=True)
        for state in content["optimizer"]["state"].values():
            state["step"].fill_(math.nan)
        content["schedule"] = {"last_epoch": 10**9, "base_lrs": [math.nan]}

    shutil.copytree(trained, LAST.parent)
    theirs = restored(shapes)
    modified(trained / "last.pt", change, LAST)
    ours = restored(shapes)
    group = ours.optimizer.state_dict()["param_groups"]
    assert group == theirs.optimizer.state_dict()["param_groups"]
    saved = torch.load(trained / "last.pt", weights_only=True)
    assert theirs.optimizer.state_dict()["param_groups"] == saved["optimizer"]["param_groups"]
    own = {"lr_lambdas", "_step_count"}  # functions, and how often this object was used
    expected = {name: value for name, value in saved["schedule"].items() if name not in own}
    for run in (ours, theirs):
        schedule = run.scheduler.state_dict()
        assert {name: schedule[name] for name in schedule.keys() - own} == expected
        for index, state in run.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                assert torch.equal(value, saved["optimizer"]["state"][index][name])


# ---------------------------------------------------------------- memory

# Prints the memory in MB that hostile.pt takes at its peak, in addition to that of a valid file.
MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
from config import UserError
from models import load_checkpoint, load_clip

load_clip(load_checkpoint("valid.pt"))  # imports what is needed
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_clip(load_checkpoint("hostile.pt"))
    print("accepted", file=sys.stderr)
except UserError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def set_history_of_lists(content: dict) -> None:
    content["history"] = [[] for _ in range(900_000)]


def set_large_vocabulary(content: dict) -> None:
    tokenizer = json.loads(content["tokenizer"])
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), 900_000)}
    content["tokenizer"] = json.dumps(tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit is that of Linux")
@pytest.mark.parametrize("change", [set_history_of_lists, set_large_vocabulary])
def test_hostile_checkpoint_takes_bounded_memory(
    change: Callable, checkpoint_path: Path, workdir: Path
) -> None:
    """At most 500 MB and twice the size of the file, before it is rejected."""
    shutil.copy(checkpoint_path, "valid.pt")
    hostile = modified(checkpoint_path, change, Path("hostile.pt"))
    command = [sys.executable, "-c", MEASURE.format(root=str(ROOT))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert process.stderr == ""
    assert float(process.stdout) < 500 + 2 * hostile.stat().st_size / 2**20


# ---------------------------------------------------------------- mutated files

SWAPS = (None, True, -1, 10**30, math.nan, "x", b"x", [], {}, (), [None], {"x": 1}, torch.zeros(2))


def results(path: Path) -> dict[str, Any]:
    """What a search or a resumed run takes from a checkpoint, as tensors and plain values."""
    checkpoint = load_checkpoint(path)
    model = load_clip(checkpoint)
    ids, mask = tokenize(checkpoint.tokenizer, ["a red circle", "two ☃ and a longer text"])
    with torch.inference_mode():
        embeddings = model.encode_text(ids, mask)
    return {
        "embeddings": embeddings,
        "config": checkpoint.config,
        "query": checkpoint.example_query,
        "history": checkpoint.training and checkpoint.training.history,
        **model.state_dict(),
    }


def assert_equal_results(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = (
            torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        )
        assert same, name


def fields(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside dicts and lists."""
    if not isinstance(value, dict | list):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [field for key, item in items for field in fields(item, (*path, key))]
    return [path, *inner] if path else inner


def mutate(source: Path, target: Path, rng: random.Random) -> str:
    """Writes a mutation of a file, and returns what it is."""
    kind = rng.choice(["flip", "truncate", "swap", "swap"])
    content = source.read_bytes()
    if kind == "flip":
        offset, bit = rng.randrange(len(content)), rng.randrange(8)
        target.write_bytes(content)
        flip_bit(target, offset, bit)
        return f"bit {bit} of byte {offset}"
    if kind == "truncate":
        length = rng.randrange(len(content))
        target.write_bytes(content[:length])
        return f"{length} bytes"
    loaded = torch.load(source, weights_only=True)
    path = rng.choice(fields(loaded))
    old = loaded
    for key in path:
        old = old[key]
    new = rng.choice([swap for swap in SWAPS if type(swap) is not type(old)])
    set_field(loaded, *path, value=new)
    torch.save(loaded, target)
    return f"{path} is {new!r}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutated_checkpoint_is_one_line_or_equal_results(
    trained: Path, shapes: Path, workdir: Path
) -> None:
    """Bits flipped, the end cut off, or a value replaced by one of another type.

    300 mutations by a fixed seed; the command for 10,000 is at the top of this file.
    """
    rng = random.Random(0)
    expected = {name: results(trained / name) for name in ("best.pt", "last.pt")}
    shutil.copytree(trained, LAST.parent)
    optimizer = restored(shapes).optimizer.state_dict()
    num_accepted = 0
    for _ in range(MUTATIONS):
        name = rng.choice(list(expected))
        what = mutate(trained / name, LAST, rng)
        try:
            ours = results(LAST)
            if name == "last.pt":
                resumed = restored(shapes).optimizer.state_dict()
        except UserError as error:
            assert "\n" not in str(error), what
            continue
        num_accepted += 1
        try:
            assert_equal_results(ours, expected[name])
            if name == "last.pt":
                assert resumed["param_groups"] == optimizer["param_groups"]
                for index, state in optimizer["state"].items():
                    assert_equal_results(resumed["state"][index], state)
        except AssertionError as error:
            raise AssertionError(f"{name}: {what}") from error
    print(f"\n{MUTATIONS} mutations, {num_accepted} accepted")
    assert num_accepted < MUTATIONS / 2
