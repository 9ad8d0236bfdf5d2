"""The model is CLIP as the paper has it, and a weights file alone brings it back: whole, anywhere, and harmlessly."""

import io
import os
import pickle
import pickletools
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, CONFIG, build, pictures, script
from PIL import Image
from timm.layers import DropPath
from timm.models import save_for_hf
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from config import Config, UserError
from data import Transform, atomic_write, load_image, stack, tokenize
from models import (
    CHECKPOINT_FORMAT,
    CLIP,
    ImageEncoder,
    TextEncoder,
    build_image_encoder,
    build_wordpiece_tokenizer,
    contrastive_loss,
    eval_image_size,
    load_checkpoint,
    load_clip,
    load_text_encoder,
    load_tower,
    make_checkpoint,
    text_encoder_from_scratch,
)


@torch.no_grad()
def embeddings(model: CLIP, tokenizer, config: Config) -> torch.Tensor:
    return torch.cat(
        [
            model.encode_image(pictures(config, seed=1)),
            model.encode_text(*tokenize(tokenizer, CAPTIONS)),
        ]
    )


def saved(path: Path, model: CLIP, tokenizer, config: Config) -> Path:
    atomic_write(
        path,
        lambda file: torch.save(make_checkpoint(model, tokenizer, config, "a red circle"), file),
    )
    return path


@pytest.fixture(scope="module")
def tiny() -> tuple:
    return build(CONFIG)


@pytest.fixture(scope="module")
def packed(tiny: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("packed") / "best.pt", *tiny, CONFIG)


@pytest.fixture
def weights(packed: Path) -> dict:
    """The content of a weights file, for a test to tamper with."""
    content = load_checkpoint(packed)
    content["image_encoder"] = {
        **content["image_encoder"],
        "arguments": {**content["image_encoder"]["arguments"]},
    }
    return content


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as timm and transformers save pretrained models; never written to."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(1)
    image = timm.create_model("test_resnet", num_classes=10)
    image.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    save_for_hf(
        image,
        folder / "image",
        safe_serialization=True,
        model_args={"num_classes": 10, "in_chans": 3},
    )
    words = build_wordpiece_tokenizer(CAPTIONS, 32)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    )
    size = words.get_vocab_size()
    models = {
        "text": DistilBertModel(
            DistilBertConfig(vocab_size=size, dim=64, hidden_dim=64, n_layers=1, n_heads=2)
        ),
        "t5": T5Model(
            T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        "vit": ViTModel(
            ViTConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            )
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    shutil.copytree(
        folder / "vit", folder / "vit_alone", ignore=shutil.ignore_patterns("tokenizer*")
    )
    return {path.name: path for path in folder.iterdir()}


def pretrained_config(backbones: dict[str, Path]) -> Config:
    return replace(
        CONFIG,
        image_encoder=f"local-dir:{backbones['image']}",
        text_encoder=str(backbones["text"]),
        pretrained=True,
    )


# ---------------------------------------------------------------- the loss


def paper_loss(image: np.ndarray, text: np.ndarray, t: float) -> float:
    """Figure 3 of the paper, from the joint embeddings on."""

    def cross_entropy_loss(logits: np.ndarray, labels: np.ndarray, axis: int) -> float:
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=axis, keepdims=True))
        return -log_probabilities[labels, labels].mean()

    logits = np.dot(image, text.T) * np.exp(t)
    labels = np.arange(len(logits))
    return (
        cross_entropy_loss(logits, labels, axis=0) + cross_entropy_loss(logits, labels, axis=1)
    ) / 2


def unit_vectors(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("batch", [2, 5, 33])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_the_loss_is_that_of_the_papers_figure_3_and_of_transformers(
    batch: int, temperature: float
) -> None:
    image, text, scale = (
        unit_vectors(batch, 0),
        unit_vectors(batch, 1),
        torch.tensor(1 / temperature),
    )
    loss = contrastive_loss(image, text, scale)
    assert loss.item() == pytest.approx(
        paper_loss(image.numpy(), text.numpy(), np.log(1 / temperature)), abs=1e-4
    )
    assert loss.item() == pytest.approx(
        image_text_contrastive_loss(scale * text @ image.T).item(), abs=1e-4
    )


def test_the_loss_does_not_ask_which_side_is_the_picture() -> None:
    image, text, scale = unit_vectors(6, 0), unit_vectors(6, 1), torch.tensor(14.0)
    assert contrastive_loss(image, text, scale).item() == pytest.approx(
        contrastive_loss(text, image, scale).item()
    )


@pytest.mark.parametrize("batch", [2, 64])
def test_embeddings_that_are_all_the_same_lose_the_logarithm_of_the_batch(batch: int) -> None:
    same = unit_vectors(1, 0).expand(batch, -1)
    assert contrastive_loss(same, same, torch.tensor(14.0)).item() == pytest.approx(
        np.log(batch), rel=1e-5
    )


def test_the_loss_teaches_both_sides_and_the_temperature() -> None:
    inputs = [
        tensor.requires_grad_()
        for tensor in (unit_vectors(6, 0), unit_vectors(6, 1), torch.tensor(14.0))
    ]
    for gradient in torch.autograd.grad(contrastive_loss(*inputs), inputs):
        assert gradient.abs().sum() > 0


def test_the_temperature_starts_at_0_07_and_the_scale_ends_at_100(tiny: tuple) -> None:
    model = CLIP(tiny[0].image, tiny[0].text, Config.temperature)
    assert model.logit_scale.requires_grad
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    model.clamp_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    model.logit_scale.data.fill_(9.0)
    model.clamp_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(100)


# ---------------------------------------------------------------- the encoders


def test_both_encoders_give_unit_vectors_in_float32(tiny: tuple) -> None:
    model, tokenizer = tiny
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = embeddings(model, tokenizer, CONFIG)
    assert vectors.shape == (8, CONFIG.projection_dim)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(8))


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_padding_does_not_change_an_embedding(kind: str) -> None:
    model, tokenizer = build(replace(CONFIG, text_encoder=kind))
    with torch.no_grad():
        alone = model.encode_text(*tokenize(tokenizer, CAPTIONS[:1]))
        ids, mask = tokenize(tokenizer, [CAPTIONS[0], " ".join(CAPTIONS * 2)])
        padded = model.encode_text(ids, mask)[:1]
    assert mask[0].sum() < mask.shape[1]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050"])
def test_pixels_are_normalised_inside_the_model_as_timm_says(name: str) -> None:
    encoder = ImageEncoder(name, 64).eval()
    seen = []
    encoder.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = pictures(CONFIG)
    with torch.no_grad():
        encoder(pixels)
    mean, std = (
        torch.tensor(encoder.model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std")
    )
    torch.testing.assert_close(seen[0], (pixels.float() / 255 - mean) / std)


def test_the_width_of_an_encoder_is_read_from_what_it_returns() -> None:
    encoder = ImageEncoder("mobilenetv3_small_050", 64).eval()
    assert encoder.feature_dim == encoder(pictures(CONFIG)).shape[-1] != encoder.model.num_features


def test_measuring_the_width_leaves_batch_norm_as_it_was() -> None:
    fresh = {
        key: value
        for key, value in ImageEncoder("test_resnet", 64).state_dict().items()
        if "running" in key
    }
    assert all(
        torch.equal(value, torch.full_like(value, float("var" in key)))
        for key, value in fresh.items()
    )


def chances_to_skip(encoder: ImageEncoder) -> list[float]:
    """Of those of its blocks that are skipped at all, from the input to the output."""
    return [block.drop_prob for block in encoder.modules() if isinstance(block, DropPath)]


def test_blocks_of_the_image_encoder_are_skipped_in_training_alone_the_last_most_often() -> None:
    encoder = build_image_encoder(replace(CONFIG, image_encoder="resnet50", drop_path=0.4))
    assert chances_to_skip(encoder) == pytest.approx(
        [0.4 * block / 15 for block in range(1, 16)]
    )  # of 16 blocks
    for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.ones_(
            norm.weight
        )  # timm starts some with nought, with which a block does nothing to skip
        norm.eval()
    with torch.no_grad():
        one, other = (encoder(pictures(CONFIG)) for _ in range(2))
        assert not torch.allclose(one, other, rtol=0.01)
        encoder.eval()
        assert torch.equal(encoder(pictures(CONFIG)), encoder(pictures(CONFIG)))


@pytest.mark.parametrize(
    "name", ["resnet50", "tiny_vit_5m_224"]
)  # of which the second skips some by itself
def test_no_block_is_skipped_where_that_is_turned_off(name: str, tmp_path: Path) -> None:
    config = replace(CONFIG, image_encoder=name, image_size=224, drop_path=0.0)
    model, tokenizer = build(config)
    again = load_clip(load_checkpoint(saved(tmp_path / "w.pt", model, tokenizer, config)))
    assert not any(chances_to_skip(model.image.encoder))
    assert not any(chances_to_skip(again.image.encoder))


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_the_setting_counts_and_not_what_a_folder_says_of_skipping(
    drop_path: float, tmp_path: Path
) -> None:
    save_for_hf(timm.create_model("test_resnet"), tmp_path, model_args={"drop_path_rate": 0.5})
    encoder = build_image_encoder(
        replace(CONFIG, image_encoder=f"local-dir:{tmp_path}", drop_path=drop_path)
    )
    assert max(chances_to_skip(encoder)) == pytest.approx(drop_path)


def test_weights_of_a_run_that_skips_blocks_go_on_skipping_as_their_config_says(
    tmp_path: Path,
) -> None:
    config = replace(CONFIG, drop_path=0.3)
    model, tokenizer = build(config)
    weights = load_checkpoint(saved(tmp_path / "w.pt", model, tokenizer, config))
    again = load_clip(weights)
    assert chances_to_skip(again.image.encoder) == chances_to_skip(model.image.encoder) != []
    assert torch.equal(embeddings(again, tokenizer, config), embeddings(model, tokenizer, config))
    weights["image_encoder"]["arguments"]["drop_path_rate"] = 5.0  # as a stranger may write there
    assert chances_to_skip(load_tower(weights, "image").encoder) == chances_to_skip(
        model.image.encoder
    )


def test_weights_from_before_blocks_were_skipped_skip_none(packed: Path, tmp_path: Path) -> None:
    content = torch.load(packed, weights_only=True)
    del content["config"]["drop_path"]
    torch.save(content, tmp_path / "old.pt")
    weights = load_checkpoint(tmp_path / "old.pt")
    assert weights["config"].drop_path == 0.0
    assert not any(chances_to_skip(load_tower(weights, "image").encoder))


def test_an_image_encoder_whose_blocks_cannot_be_skipped_is_one_line_with_the_way_out() -> None:
    config = replace(CONFIG, image_encoder="ghostnet_050")
    with pytest.raises(UserError, match=r"--image-encoder ghostnet_050: .*--drop-path 0") as error:
        build_image_encoder(replace(config, drop_path=0.1))
    one_line(error)
    assert build_image_encoder(replace(config, drop_path=0.0)).feature_dim == 1280


def test_pretrained_folders_load_with_the_very_weights_that_they_hold(
    backbones: dict[str, Path],
) -> None:
    model, tokenizer = build(pretrained_config(backbones))
    held = timm.create_model(
        f"local-dir:{backbones['image']}", pretrained=True, num_classes=0
    ).state_dict()
    assert held.keys() == model.image.encoder.model.state_dict().keys()
    assert all(
        torch.equal(value, held[name])
        for name, value in model.image.encoder.model.state_dict().items()
    )
    held = AutoModel.from_pretrained(backbones["text"]).state_dict()
    assert held.keys() == model.text.encoder.model.state_dict().keys()
    assert all(
        torch.equal(value, held[name])
        for name, value in model.text.encoder.model.state_dict().items()
    )
    assert model.image.encoder.mean.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])
    held = Tokenizer.from_file(str(backbones["text"] / "tokenizer.json"))
    assert [tokenizer.encode(caption).ids for caption in CAPTIONS] == [
        held.encode(text).ids for text in CAPTIONS
    ]


def test_a_text_encoder_saved_in_half_precision_is_trained_in_float32(
    backbones: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(backbones["text"], tmp_path / "half")
    AutoModel.from_pretrained(backbones["text"], dtype=torch.float16).save_pretrained(
        tmp_path / "half"
    )
    encoder, _ = load_text_encoder(replace(CONFIG, text_encoder=str(tmp_path / "half")))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("flag", "name", "load"),
    [
        ("--text-encoder", "nobody/no-such-text-model", load_text_encoder),
        ("--text-encoder", "no/such/folder", load_text_encoder),
        ("--image-encoder", "no_such_image_model", build_image_encoder),
        ("--image-encoder", "local-dir:no/such/folder", build_image_encoder),
        ("--image-encoder", "resnet50", build_image_encoder),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line_with_every_way_out(
    flag: str, name: str, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load(replace(CONFIG, text_encoder=name, image_encoder=name, pretrained=True))
    message = one_line(error)
    assert message.startswith(f"{flag} {name}: ")
    assert "--no-pretrained" in message
    assert "--demo" in message


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", None])
def test_a_folder_whose_weights_did_not_arrive_whole_is_one_line(
    content: bytes | None, backbones: dict[str, Path], tmp_path: Path
) -> None:
    for flag, folder, load in (
        ("--image", "image", build_image_encoder),
        ("--text", "text", load_text_encoder),
    ):
        shutil.copytree(backbones[folder], tmp_path / folder)
        file = tmp_path / folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100] if content is None else content)
        named = {
            "image_encoder": f"local-dir:{tmp_path / folder}",
            "text_encoder": str(tmp_path / folder),
        }
        with pytest.raises(UserError) as error:
            load(replace(CONFIG, **named, pretrained=True))
        assert one_line(error).startswith(
            f"{flag}-encoder {named[f'{folder}_encoder']}: cannot be loaded"
        )


@pytest.mark.parametrize("folder", ["t5", "vit", "vit_alone"])
@pytest.mark.parametrize(
    "load",
    [load_text_encoder, lambda config: text_encoder_from_scratch(config, CAPTIONS)],
    ids=["pretrained", "from scratch"],
)
def test_a_folder_that_holds_no_text_encoder_is_refused_by_name(
    folder: str, load, backbones: dict[str, Path]
) -> None:
    with pytest.raises(UserError) as error:
        load(replace(CONFIG, text_encoder=str(backbones[folder]), text_layers=0, text_width=0))
    assert one_line(error).startswith(f"--text-encoder {backbones[folder]}: ")


@pytest.mark.parametrize(
    "name", ["t5-small", "google/vit-base-patch16-224", "openai/clip-vit-base-patch32", "wombat"]
)
def test_a_name_that_is_no_text_encoder_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError) as error:
        text_encoder_from_scratch(replace(CONFIG, text_encoder=name), CAPTIONS)
    assert one_line(error).startswith(f"--text-encoder {name}: ")


# ---------------------------------------------------------------- the weights file


@pytest.mark.parametrize(
    ("image", "text"),
    [("test_resnet", "distilbert"), ("mobilenetv3_small_050", "bert"), ("test_vit", "distilbert")],
)
def test_saved_and_loaded_weights_give_the_same_embeddings(
    image: str, text: str, tmp_path: Path
) -> None:
    config = replace(CONFIG, image_encoder=image, text_encoder=text, temperature=0.05)
    model, tokenizer = build(config)
    model.logit_scale.data.fill_(3.3)
    weights = load_checkpoint(saved(tmp_path / "w.pt", model, tokenizer, config))
    again = load_clip(weights)
    assert not again.training
    assert torch.equal(
        embeddings(again, weights["tokenizer"], config), embeddings(model, tokenizer, config)
    )
    assert again.logit_scale.item() == pytest.approx(3.3)
    assert weights["config"].image_encoder == image
    assert weights["example_query"] == "a red circle"


def test_a_weights_file_holds_tensors_and_plain_values_alone(packed: Path) -> None:
    def kinds(value: object) -> set[type]:
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return (
            {type(value)}.union(*map(kinds, inner))
            if isinstance(value, dict | list | tuple)
            else {type(value)}
        )

    plain = {bool, int, float, str, list, tuple, dict, type(None), torch.Tensor}
    assert (
        kinds(dict(torch.load(packed, weights_only=True)))
        - {type(torch.nn.Linear(1, 1).state_dict())}
        <= plain
    )


def test_a_weights_file_names_no_place_on_the_machine_that_trained_it(
    backbones: dict[str, Path], workdir: Path
) -> None:
    config = replace(
        pretrained_config(backbones),
        data_dir=str(workdir / "data"),
        resume=str(workdir / "last.pt"),
    )
    file = saved(Path("w.pt"), *build(config), config)
    with zipfile.ZipFile(file) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    for secret in (str(workdir), *map(str, backbones.values()), str(Path.home()), "local-dir:"):
        assert secret.encode() not in content


def test_a_weights_file_alone_rebuilds_the_model_in_a_new_process_without_a_network(
    backbones: dict[str, Path], workdir: Path
) -> None:
    folders = {name: workdir / name for name in ("image", "text")}
    for name, folder in folders.items():
        shutil.copytree(backbones[name], folder)
    config = replace(pretrained_config(folders), data_dir=str(workdir / "data"))
    model, tokenizer = build(config)
    file = saved(workdir / "w.pt", model, tokenizer, config)
    for folder in folders.values():
        shutil.rmtree(folder)
    (workdir / "mine").mkdir()
    for i, pixels in enumerate(pictures(config)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(workdir / "mine" / f"{i}.png")
    asked = ["--images", "mine", "--num-workers", "0", "--device", "cpu", "--query", CAPTIONS[1]]
    done = script("inference.py", "--weights", file.name, *asked, cwd=workdir, network=False)
    assert done.returncode == 0, done.stderr
    (index,) = (workdir / "w.index").glob("*.npy")
    size = eval_image_size(model.image, config)
    views = stack(
        [Transform(size)(load_image(path)) for path in sorted((workdir / "mine").iterdir())]
    )
    with torch.no_grad():
        expected = model.encode_image(views)
        best = (model.encode_text(*tokenize(tokenizer, CAPTIONS[1:2])) @ expected.T).max().item()
    torch.testing.assert_close(torch.from_numpy(np.load(index)), expected, rtol=0, atol=1e-5)
    assert f"   1  {best:6.3f}" in done.stdout


@pytest.mark.parametrize(
    ("encoder", "image_size", "augment", "size"),
    [
        ("test_resnet", 224, True, 288),  # training crops show things larger
        ("test_resnet", 128, True, 160),
        ("test_resnet", 200, True, 256),
        ("test_resnet", 32, True, 32),
        ("test_resnet", 200, False, 200),
        ("test_vit", 224, True, 224),  # takes one size only
    ],
)
def test_pictures_are_embedded_larger_than_training_crops_at_a_size_that_can_be_halved_five_times(
    encoder: str, image_size: int, augment: bool, size: int
):
    config = replace(CONFIG, image_encoder=encoder, image_size=image_size, augment=augment)
    model, _ = build(config)
    assert eval_image_size(model.image, config) == size
    assert model.encode_image(pictures(replace(config, image_size=size))).shape == (
        4,
        CONFIG.projection_dim,
    )


class Hostile:
    """Unpickled carelessly, it makes the file `planted` in the current folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("planted",)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: None, id="missing"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.mkdir(), id="a folder"),
        pytest.param(lambda path: path.write_text("a red circle\n"), id="text"),
        pytest.param(
            lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
            id="another state dict",
        ),
        pytest.param(lambda path: torch.save(torch.zeros(3), path), id="a tensor"),
        pytest.param(
            lambda path: torch.save({"format": "clip weights 0"}, path), id="another format"
        ),
        pytest.param(
            lambda path: torch.save({"format": CHECKPOINT_FORMAT}, path),
            id="nothing but the format",
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
def test_what_is_not_a_weights_file_is_refused_in_one_line_and_never_run(
    write, workdir: Path
) -> None:
    write(workdir / "w.pt")
    with pytest.raises(UserError, match=re.escape(str(workdir / "w.pt"))) as error:
        load_checkpoint(workdir / "w.pt")
    one_line(error)
    assert not (workdir / "planted").exists()


def test_the_hostile_file_would_do_harm_if_it_were_unpickled_carelessly(workdir: Path) -> None:
    """Shown without unpickling: the file names a call and its argument, and that call does the harm."""
    operations = [
        (operation.name, argument)
        for operation, argument, _ in pickletools.genops(pickle.dumps(Hostile()))
    ]
    call, arguments = Hostile().__reduce__()
    named = [argument for name, argument in operations if name == "SHORT_BINUNICODE"]
    assert named == [call.__module__, call.__name__, *arguments]
    assert "REDUCE" in dict(operations)  # upon which whoever unpickles it makes the call
    call(*arguments)
    assert (workdir / "planted").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_cut_off_weights_file_is_refused(share: float, packed: Path, tmp_path: Path) -> None:
    whole = packed.read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="not a whole weights file"):
        load_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet50", "local-dir:planted", "no_such_model"])
def test_a_weights_file_can_ask_for_no_image_encoder_from_elsewhere(
    name: str, weights: dict
) -> None:
    weights["image_encoder"]["name"] = name
    with pytest.raises(UserError, match=re.escape(name)):
        load_clip(weights)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "features_only"])
def test_a_weights_file_can_hand_timm_no_argument_but_shapes(
    argument: str, weights: dict, packed: Path
) -> None:
    weights["image_encoder"]["arguments"][argument] = str(packed)
    with pytest.raises(UserError, match=argument):
        load_clip(weights)


def test_a_weights_file_can_ask_for_no_text_encoder_that_transformers_lacks(weights: dict) -> None:
    weights["text_encoder"] = {**weights["text_encoder"], "model_type": "wombat"}
    with pytest.raises(UserError, match="wombat"):
        load_clip(weights)


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(
            lambda weights: weights["image_encoder"]["arguments"].update(num_classes=10**7),
            id="classes",
        ),
        pytest.param(
            lambda weights: weights["image_encoder"].update(name="test_vit"), id="architecture"
        ),
        pytest.param(
            lambda weights: weights["text_encoder"].update(vocab_size=10**10), id="vocabulary"
        ),
        pytest.param(lambda weights: weights["text_encoder"].update(n_layers=2), id="layers"),
        pytest.param(
            lambda weights: weights.update(config=replace(CONFIG, projection_dim=65536)),
            id="projection",
        ),
        pytest.param(lambda weights: weights["model"].popitem(), id="a tensor too few"),
        pytest.param(
            lambda weights: weights["model"].update({"text.more": torch.zeros(1)}),
            id="a tensor too many",
        ),
    ],
)
def test_declared_sizes_that_do_not_fit_the_tensors_are_refused_before_memory_is_taken(
    tamper, weights: dict
) -> None:
    tamper(weights)
    with pytest.raises(UserError, match="do not fit"):
        load_clip(weights)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("cut off"), KeyboardInterrupt()]
)
def test_writing_that_fails_midway_leaves_what_was_there(
    error: BaseException, tmp_path: Path
) -> None:
    def write(file) -> None:
        file.write(b"half of the n")
        raise error

    (tmp_path / "w.pt").write_text("former")
    with pytest.raises((UserError, KeyboardInterrupt)):
        atomic_write(tmp_path / "w.pt", write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"w.pt": "former"}


@pytest.mark.parametrize(
    "save", [lambda file: file.write(b"new"), lambda file: torch.save(torch.ones(9), file)]
)
def test_a_reader_that_dies_while_weights_are_written_is_not_blamed_on_the_file(
    save: Callable, tmp_path: Path
) -> None:
    class Interrupted(io.BytesIO):
        def write(self, content: bytes) -> int:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    (tmp_path / "w.pt").write_text("former")
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        atomic_write(tmp_path / "w.pt", lambda file: save(Interrupted()))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"w.pt": "former"}


def test_writing_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("former")
    atomic_write(tmp_path / "w.pt", lambda file: file.write(b"new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"w.pt": "new"}


def test_the_same_captions_give_the_same_word_pieces() -> None:
    vocabularies = [build_wordpiece_tokenizer(CAPTIONS, 64).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_a_text_encoder_is_as_wide_as_its_states(tiny: tuple) -> None:
    model, tokenizer = tiny
    encoder: TextEncoder = model.text.encoder
    assert (
        encoder(*tokenize(tokenizer, CAPTIONS)).shape
        == (4, encoder.feature_dim)
        == (4, CONFIG.text_width)
    )


@pytest.mark.parametrize("width", [1, 48, 200, 400])
@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_a_text_encoder_may_be_of_any_width(kind: str, width: int) -> None:
    encoder, tokenizer = text_encoder_from_scratch(
        replace(CONFIG, text_encoder=kind, text_width=width), CAPTIONS
    )
    assert encoder(*tokenize(tokenizer, CAPTIONS)).shape == (4, width)
