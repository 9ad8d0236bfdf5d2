"""Checkpoints from strangers: they cause no connection, and a bad one is an error of one line."""

import shutil
import socket
import time
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
import timm
import torch
from conftest import error_message

from config import UserError
from inference import Searcher
from inference import main as search
from models import load_checkpoint
from trainer import main as train
from trainer import resumed_config

SEARCH = ["--num-workers", "0", "--device", "cpu"]
REMOVE = ...  # the value for `tampered` that removes a field
HUB = "nobody/no-such-model"


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list:
    """The hosts and addresses that this process tries to connect to; every attempt fails."""
    attempts = []

    def refuse(*address: object, **_: object) -> None:
        attempts.append(address)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if hasattr(huggingface_hub.utils, "reset_sessions"):  # huggingface_hub 0
        huggingface_hub.utils.reset_sessions()  # sessions of earlier tests are offline
    return attempts


def tampered(checkpoint: Path, field: str, value: object) -> Path:
    """A copy of `checkpoint` with another value of a field, such as "config/image_size"."""
    content = torch.load(checkpoint, weights_only=True)
    *parents, name = field.split("/")
    part = content
    for parent in parents:
        part[parent] = dict(part[parent])
        part = part[parent]
    if value is REMOVE:
        del part[name]
    else:
        part[name] = value
    torch.save(content, "stranger.pt")
    return Path("stranger.pt")


# ---------------------------------------------------------------- connections


def test_connections_records_attempt(connections: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture notices a download, so that an empty list means that there was none."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    with pytest.raises(Exception):  # noqa: B017
        timm.create_model("hf-hub:timm/test_resnet.r160_in1k", pretrained=True)
    assert connections


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_encoder/name", f"hf-hub:{HUB}"),
        ("image_encoder/name", f"hf_hub:{HUB}"),
        ("image_encoder/name", "local-dir:planted"),
        ("image_encoder/name", "test_resnet.r160_in1k"),
        ("image_encoder/arguments", {"checkpoint_path": "w.pt"}),
        ("image_encoder/arguments", {"pretrained": True}),
        ("image_encoder/arguments", {"pretrained_cfg": {"hf_hub_id": HUB}}),
        (
            "text_encoder",
            {
                "model_type": "timm_backbone",
                "backbone": f"hf-hub:{HUB}",
                "use_pretrained_backbone": True,
            },
        ),
        ("text_encoder", {"model_type": "timm_wrapper", "architecture": f"hf-hub:{HUB}"}),
        (
            "text_encoder",
            {
                "model_type": "detr",
                "backbone": f"hf-hub:{HUB}",
                "use_timm_backbone": True,
                "vocab_size": 9,
            },
        ),
        ("text_encoder", {"model_type": HUB}),
        ("text_encoder", {"model_type": "t5"}),
    ],
)
def test_search_rejects_model_from_elsewhere_without_connection(
    field: str, value: object, checkpoint: Path, images: Path, connections: list
) -> None:
    """The checkpoint names a model on a hub or in a file, or one that is not supported."""
    file = tampered(checkpoint, field, value)
    error_message(search, "--weights", file, "--images", images, *SEARCH)
    assert connections == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config/image_encoder", f"hf-hub:{HUB}"),
        ("config/text_encoder", HUB),
        ("config/pretrained", True),
        ("config/download_url", "https://example.org"),
        ("text_encoder/_name_or_path", HUB),
        (
            "text_encoder/auto_map",
            {"AutoModel": f"{HUB}--evil.Model", "AutoConfig": f"{HUB}--evil.Config"},
        ),
        ("text_encoder/attn_implementation", "kernels-community/flash-attn"),
        ("text_encoder/_attn_implementation", "kernels-community/flash-attn"),
        ("text_encoder/_attn_implementation_internal", "kernels-community/flash-attn"),
        ("text_encoder/quantization_config", {"quant_method": "awq"}),
        ("text_encoder/trust_remote_code", True),
        ("text_encoder/pretrained_model_name_or_path", HUB),
    ],
)
def test_search_ignores_remote_names_in_settings(
    field: str, value: object, checkpoint: Path, images: Path, connections: list
) -> None:
    """The result is the same or an error, without a connection."""
    expected = Searcher(checkpoint, "cpu", 0).search(["a red circle"], images)[0]
    file = tampered(checkpoint, field, value)
    try:
        assert Searcher(file, "cpu", 0).search(["a red circle"], images)[0] == expected
    except UserError as error:
        assert "\n" not in str(error)
    assert connections == []


def test_resume_ignores_download_url_of_checkpoint(
    trained: Path, workdir: Path, connections: list
) -> None:
    """The resumed run downloads its data from the default URL only."""
    content = torch.load(trained / "last.pt", weights_only=True)
    content["config"] |= {
        "data_dir": "data/flickr8k",
        "download_url": "http://stranger.example/",
        "demo": False,
    }
    (workdir / "runs/demo").mkdir(parents=True)
    torch.save(content, "runs/demo/last.pt")
    shutil.copy(trained / "best.pt", "runs/demo")  # without it the run is not resumed at all
    error_message(train, "--resume", "runs/demo/last.pt")
    assert "stranger.example" not in str(connections)
    assert "github.com" in str(connections)


# ---------------------------------------------------------------- tampered fields

NO_PADDING = (
    '{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"[UNK]":1},"unk_token":"[UNK]"}}'
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config", REMOVE),
        ("config", []),
        ("config/image_size", "64"),
        ("config/image_size", 10**9),
        ("config/projection_dim", 2.5),
        ("config/evil", 1),
        ("image_encoder", REMOVE),
        ("image_encoder", "test_resnet"),
        ("image_encoder/name", ["test_resnet"]),
        ("image_encoder/arguments", None),
        ("image_encoder/arguments", {"in_chans": 10**12}),
        ("image_encoder/arguments", {"global_pool": "evil"}),
        ("image_encoder/arguments", {"num_classes": "many"}),
        ("text_encoder", REMOVE),
        ("text_encoder", []),
        ("text_encoder/model_type", REMOVE),
        ("text_encoder/model_type", ["distilbert"]),
        ("text_encoder/dim", 65),
        ("text_encoder/dim", "wide"),
        ("text_encoder/n_layers", 10**7),
        ("text_encoder/n_layers", -1),
        ("text_encoder/n_heads", 0),
        ("text_encoder/activation", "evil"),
        ("text_encoder/vocab_size", 2**62),
        ("text_encoder/pad_token_id", 10**6),
        ("tokenizer", REMOVE),
        ("tokenizer", "{}"),
        ("tokenizer", 5),
        ("tokenizer", NO_PADDING.replace('"a":0', '"a":999999')),
        ("example_query", REMOVE),
        ("example_query", 5),
        ("model", REMOVE),
        ("model", []),
        ("model/image.head.linear.weight", None),
    ],
)
def test_search_rejects_tampered_checkpoint(
    field: str, value: object, checkpoint: Path, images: Path
) -> None:
    file = tampered(checkpoint, field, value)
    query = ["--query", "a"] if field == "tokenizer" else []
    error_message(search, "--weights", file, "--images", images, *query, *SEARCH)


def test_classify_rejects_checkpoint_without_logit_scale(checkpoint: Path, images: Path) -> None:
    image = next(images.iterdir())
    file = tampered(checkpoint, "model/logit_scale", REMOVE)
    queries = ["--query", "a", "--query", "b"]
    error_message(search, "--weights", file, "--image", image, *queries, *SEARCH)


def test_search_rejects_huge_layer_count_quickly(checkpoint: Path, images: Path) -> None:
    file = tampered(checkpoint, "text_encoder/n_layers", 10**7)
    started = time.monotonic()
    error_message(search, "--weights", file, "--images", images, *SEARCH)
    assert time.monotonic() - started < 20  # seconds


def test_load_checkpoint_keeps_settings(trained: Path) -> None:
    config = asdict(load_checkpoint(trained / "best.pt").config)
    assert torch.load(trained / "best.pt", weights_only=True)["config"] == config


# ---------------------------------------------------------------- settings of a stranger


OUTSIDE = ["/data/photos", "../photos", "data/../../photos"]


@pytest.mark.parametrize("data_dir", OUTSIDE)
@pytest.mark.parametrize("flags", [[], ["--evaluate"], ["--image", "images/00000.png"]])
def test_search_reads_data_outside_the_folder_only_by_flag(
    data_dir: str, flags: list[str], checkpoint: Path, images: Path, shapes: Path
) -> None:
    stranger = tampered(checkpoint, "config/data_dir", data_dir)
    message = error_message(search, "--weights", stranger, *flags, *SEARCH)
    assert message.startswith(f"error: {data_dir}, the data set of the training, is outside")
    assert "--data-dir" in message
    search(["--weights", str(stranger), *flags, "--data-dir", str(shapes), *SEARCH])


def test_search_takes_workers_and_device_from_the_user(checkpoint: Path, images: Path) -> None:
    stranger = tampered(checkpoint, "config/num_workers", 256)
    searcher = Searcher(tampered(stranger, "config/device", "cuda:7"), "cpu")
    assert searcher.config.num_workers == -1
    assert searcher.device == torch.device("cpu")


@pytest.mark.parametrize("data_dir", OUTSIDE)
def test_resume_from_elsewhere_reads_data_outside_the_folder_only_by_flag(
    data_dir: str, trained: Path, workdir: Path
) -> None:
    stranger = tampered(trained / "last.pt", "config/data_dir", data_dir)
    message = error_message(train, "--resume", stranger)
    assert data_dir in message
    assert "pass --data-dir" in message
    config = resumed_config(["--data-dir", data_dir], load_checkpoint(stranger), str(stranger))
    assert config.data_dir == data_dir
    assert list(workdir.iterdir()) == [workdir / stranger]


def test_resume_from_elsewhere_takes_workers_and_device_from_the_user(
    trained: Path, workdir: Path
) -> None:
    changed = tampered(trained / "last.pt", "config/num_workers", 256)
    stranger = tampered(changed, "config/device", "cuda:7")
    config = resumed_config([], load_checkpoint(stranger), str(stranger))
    assert (config.num_workers, config.device) == (-1, "auto")
    Path("runs/demo").mkdir(parents=True)
    own = Path(shutil.move(stranger, "runs/demo/last.pt"))
    config = resumed_config([], load_checkpoint(own), str(own))
    assert (config.num_workers, config.device) == (256, "cuda:7")
