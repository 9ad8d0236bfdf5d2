"""The loss, the encoders and their projection heads, and checkpoints."""

import copy
import io
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, CONFIG, PRETRAINED_CONFIG, ROOT, build, random_pixels, script
from PIL import Image
from timm.layers import DropPath
from timm.models import save_for_hf
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip import modeling_clip

import trainer
from config import Config, UserError, parse
from data import Transform, atomic_write, list_images, load_image, stack_images, tokenize
from models import (
    CLIP,
    Checkpoint,
    ImageEncoder,
    TextEncoder,
    build_image_encoder,
    build_text_encoder,
    build_wordpiece_tokenizer,
    chance_loss,
    contrastive_loss,
    eval_image_size,
    keep_depthwise_float32,
    load_checkpoint,
    load_clip,
    load_tower,
    make_checkpoint,
)


@torch.no_grad()
def embeddings(model: CLIP, tokenizer: Tokenizer, config: Config) -> Tensor:
    """Of four images, then of `CAPTIONS`."""
    images = model.encode_image(random_pixels(config, seed=1))
    texts = model.encode_text(*tokenize(tokenizer, CAPTIONS))
    return torch.cat([images, texts])


def save(path: Path, model: CLIP, tokenizer: Tokenizer, config: Config) -> Path:
    content = make_checkpoint(model, tokenizer, config, "a red circle")
    atomic_write(path, lambda file: torch.save(content, file))
    return path


def save_and_load(path: Path, model: CLIP, tokenizer: Tokenizer, config: Config) -> Checkpoint:
    return load_checkpoint(save(path, model, tokenizer, config))


def user_error(function: Callable, *arguments: object) -> str:
    """The one line of the `UserError` that `function(*arguments)` raises."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def small_model() -> tuple[CLIP, Tokenizer]:
    return build(CONFIG)


@pytest.fixture(scope="module")
def checkpoint_path(
    small_model: tuple[CLIP, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The checkpoint of `small_model`; never written to."""
    return save(tmp_path_factory.mktemp("checkpoint") / "best.pt", *small_model, CONFIG)


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
    wordpiece = build_wordpiece_tokenizer(CAPTIONS, 32)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=wordpiece, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    )
    size = wordpiece.get_vocab_size()
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
    without_tokenizer = shutil.ignore_patterns("tokenizer*")
    shutil.copytree(folder / "vit", folder / "vit_alone", ignore=without_tokenizer)
    return {path.name: path for path in folder.iterdir()}


def pretrained_config(backbones: dict[str, Path]) -> Config:
    return replace(
        PRETRAINED_CONFIG,
        image_encoder=f"local-dir:{backbones['image']}",
        text_encoder=str(backbones["text"]),
    )


# ---------------------------------------------------------------- loss


def paper_loss(image: np.ndarray, text: np.ndarray, t: float) -> float:
    """Figure 3 of the paper, from the joint embeddings on."""

    def cross_entropy_loss(logits: np.ndarray, labels: np.ndarray, axis: int) -> float:
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=axis, keepdims=True))
        return -log_probabilities[labels, labels].mean()

    logits = np.dot(image, text.T) * np.exp(t)
    labels = np.arange(len(logits))
    loss_i = cross_entropy_loss(logits, labels, axis=0)
    loss_t = cross_entropy_loss(logits, labels, axis=1)
    return (loss_i + loss_t) / 2


def unit_vectors(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 8, generator=generator), dim=-1)


@pytest.mark.parametrize("batch_size", [2, 5, 33])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_contrastive_loss_matches_paper_and_transformers(
    batch_size: int, temperature: float
) -> None:
    images = unit_vectors(batch_size, seed=0)
    texts = unit_vectors(batch_size, seed=1)
    scale = torch.tensor(1 / temperature)
    loss = contrastive_loss(images, texts, scale).item()
    assert loss == pytest.approx(
        paper_loss(images.numpy(), texts.numpy(), np.log(1 / temperature)), abs=1e-4
    )
    if hasattr(modeling_clip, "image_text_contrastive_loss"):  # not in older versions
        logits = scale * texts @ images.T  # (B, D) @ (D, B)
        transformers_loss = modeling_clip.image_text_contrastive_loss(logits).item()
        assert loss == pytest.approx(transformers_loss, abs=1e-4)


def test_contrastive_loss_is_symmetric() -> None:
    images = unit_vectors(6, seed=0)
    texts = unit_vectors(6, seed=1)
    scale = torch.tensor(14.0)
    loss = contrastive_loss(images, texts, scale)
    assert loss.item() == pytest.approx(contrastive_loss(texts, images, scale).item())


def loss_of_equal_embeddings(batch_size: int) -> float:
    equal = unit_vectors(1, seed=0).expand(batch_size, -1)
    return contrastive_loss(equal, equal, torch.tensor(14.0)).item()


@pytest.mark.parametrize("batch_size", [2, 64])
def test_contrastive_loss_of_equal_embeddings_is_log_batch_size(batch_size: int) -> None:
    assert loss_of_equal_embeddings(batch_size) == pytest.approx(np.log(batch_size), rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_chance_loss_is_the_loss_of_equal_embeddings(batch_size: int) -> None:
    assert chance_loss(batch_size) == pytest.approx(loss_of_equal_embeddings(batch_size), rel=1e-5)


def loss_and_gradients(caption_ids: Tensor | None, rows: slice = slice(None)) -> list[Tensor]:
    """Of six pairs."""
    inputs = [unit_vectors(6, seed=0), unit_vectors(6, seed=1), torch.tensor(14.0)]
    for tensor in inputs:
        tensor.requires_grad_()
    loss = contrastive_loss(*inputs, rows, caption_ids)
    return [loss, *torch.autograd.grad(loss, inputs)]


def test_contrastive_loss_ignores_ids_that_all_differ() -> None:
    """To the last bit, gradients included."""
    ids = torch.tensor([5, -(2**63), 2**63 - 1, 0, 1, 2])
    for ours, theirs in zip(loss_and_gradients(ids), loss_and_gradients(None), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [slice(None), slice(0, 3), slice(3, 6)])
def test_contrastive_loss_takes_no_equal_captions_as_negatives(rows: slice) -> None:
    """Each pair's two losses are over the pairs with other captions and itself."""
    ids = torch.tensor([7, 8, 7, 9, 8, 7])
    images, texts = unit_vectors(6, seed=0), unit_vectors(6, seed=1)
    losses = []
    for i in range(6)[rows]:
        others = [j for j in range(6) if ids[j] != ids[i]]
        for query, targets in ((images[i], texts), (texts[i], images)):
            logits = 14.0 * targets[[i, *others]] @ query
            losses.append(-logits.log_softmax(dim=0)[0])
    loss, *gradients = loss_and_gradients(ids, rows)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)


GATHERED_LOSS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_models
import torch
from config import Config
from models import contrastive_loss
from trainer import Distributed

dist = Distributed.init(Config(device="cpu"))
images, texts = test_models.unit_vectors(6, seed=0), test_models.unit_vectors(6, seed=1)
ids = torch.tensor([7, 2**62 + 1, 7, 9, 2**62 + 1, 7])
whole = contrastive_loss(images, texts, torch.tensor(14.0), caption_ids=ids)
rows = dist.local_slice(6)
parts = [dist.all_gather(tensor[rows]) for tensor in (images, texts)]
loss = contrastive_loss(*parts, torch.tensor(14.0), rows, dist.all_gather(ids[rows]))
torch.testing.assert_close(dist.all_reduce_mean(loss), whole)
assert contrastive_loss(*parts, torch.tensor(14.0), rows) != loss
dist.close()
"""


@pytest.mark.slow
def test_contrastive_loss_knows_equal_captions_of_other_processes(workdir: Path) -> None:
    program = GATHERED_LOSS.format(root=str(ROOT), tests=str(ROOT / "tests"))
    (workdir / "gathered.py").write_text(program)
    run = script(str(workdir / "gathered.py"), cwd=workdir, processes=2)
    assert run.returncode == 0, run.stderr


def test_contrastive_loss_of_equal_captions_alone_is_zero() -> None:
    loss, *gradients = loss_and_gradients(torch.full((6,), 3))
    assert loss.item() == 0
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_contrastive_loss_has_a_gradient_for_every_input() -> None:
    inputs = [unit_vectors(6, seed=0), unit_vectors(6, seed=1), torch.tensor(14.0)]
    for tensor in inputs:
        tensor.requires_grad_()
    for gradient in torch.autograd.grad(contrastive_loss(*inputs), inputs):
        assert gradient.abs().sum() > 0


def test_clamp_logit_scale_limits_the_temperature(small_model: tuple[CLIP, Tokenizer]) -> None:
    """To 0.01 at least and 100 at most. It is 0.07 at the start."""
    towers = small_model[0]
    model = CLIP(towers.image, towers.text, Config.temperature)
    assert model.logit_scale.requires_grad
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    model.clamp_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    for value, limit in ((9.0, 100), (-9.0, 0.01)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.exp().item() == pytest.approx(limit)


# ---------------------------------------------------------------- encoders


def test_clip_embeddings_are_float32_unit_vectors(small_model: tuple[CLIP, Tokenizer]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = embeddings(*small_model, CONFIG)
    assert vectors.shape == (8, CONFIG.projection_dim)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(8))


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_encode_text_ignores_padding(kind: str) -> None:
    model, tokenizer = build(replace(CONFIG, text_encoder=kind))
    with torch.no_grad():
        alone = model.encode_text(*tokenize(tokenizer, CAPTIONS[:1]))
        ids, mask = tokenize(tokenizer, [CAPTIONS[0], " ".join(CAPTIONS * 2)])
        padded = model.encode_text(ids, mask)[:1]
    assert mask[0].sum() < mask.shape[1]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_text_encoder_is_the_mean_of_the_last_hidden_states(
    small_model: tuple[CLIP, Tokenizer],
) -> None:
    """Over the tokens of each text, without padding."""
    model, tokenizer = small_model
    encoder = model.text.encoder
    with torch.no_grad():
        features = encoder(*tokenize(tokenizer, CAPTIONS))
        for caption, feature in zip(CAPTIONS, features, strict=True):
            ids, mask = tokenize(tokenizer, [caption])
            hidden_states = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(feature, hidden_states[0].mean(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050"])
def test_image_encoder_normalizes_pixels_as_timm(name: str) -> None:
    encoder = ImageEncoder(name, 64).eval()
    inputs = []
    encoder.model.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    pixels = random_pixels(CONFIG)
    with torch.no_grad():
        encoder(pixels)
    mean = torch.tensor(encoder.model.pretrained_cfg["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(encoder.model.pretrained_cfg["std"]).view(1, 3, 1, 1)
    torch.testing.assert_close(inputs[0], (pixels.float() / 255 - mean) / std)


def test_image_encoder_feature_dim_is_its_output_width() -> None:
    """For this model timm's `num_features` is another number."""
    encoder = ImageEncoder("mobilenetv3_small_050", 64).eval()
    assert encoder.feature_dim == encoder(random_pixels(CONFIG)).shape[-1]
    assert encoder.feature_dim != encoder.model.num_features


def test_image_encoder_starts_with_fresh_batch_norm_stats() -> None:
    """The forward pass that finds `feature_dim` does not change them."""
    state = ImageEncoder("test_resnet", 64).state_dict()
    stats = {name: value for name, value in state.items() if "running" in name}
    for name, value in stats.items():
        initial = 1.0 if "var" in name else 0.0
        assert torch.equal(value, torch.full_like(value, initial))


def drop_path_rates(encoder: ImageEncoder) -> list[float]:
    """Of the blocks with stochastic depth, from the input to the output."""
    return [block.drop_prob for block in encoder.modules() if isinstance(block, DropPath)]


@pytest.mark.slow
def test_drop_path_rate_grows_with_depth_and_is_zero_in_evaluation() -> None:
    encoder = build_image_encoder(replace(CONFIG, image_encoder="resnet50", drop_path=0.4))
    growing = [0.4 * block / 15 for block in range(1, 16)]  # the first of 16 blocks has none
    assert drop_path_rates(encoder) == pytest.approx(growing)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            # timm starts the last norm of a block with zero. Such a block has no effect.
            nn.init.ones_(module.weight)
            module.eval()
    pixels = random_pixels(CONFIG)
    with torch.no_grad():
        assert not torch.allclose(encoder(pixels), encoder(pixels), rtol=0.01)
        encoder.eval()
        assert torch.equal(encoder(pixels), encoder(pixels))


# tiny_vit_5m_224 has stochastic depth by default.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "tiny_vit_5m_224"])
def test_drop_path_zero_disables_stochastic_depth(name: str, tmp_path: Path) -> None:
    config = replace(CONFIG, image_encoder=name, image_size=224, drop_path=0.0)
    model, tokenizer = build(config)
    restored = load_clip(save_and_load(tmp_path / "w.pt", model, tokenizer, config))
    assert not any(drop_path_rates(model.image.encoder))
    assert not any(drop_path_rates(restored.image.encoder))


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_drop_path_overrides_the_rate_of_a_folder(drop_path: float, tmp_path: Path) -> None:
    save_for_hf(timm.create_model("test_resnet"), tmp_path, model_args={"drop_path_rate": 0.5})
    config = replace(CONFIG, image_encoder=f"local-dir:{tmp_path}", drop_path=drop_path)
    encoder = build_image_encoder(config)
    assert max(drop_path_rates(encoder)) == pytest.approx(drop_path)


def test_load_clip_takes_the_drop_path_rate_from_the_config(tmp_path: Path) -> None:
    config = replace(CONFIG, drop_path=0.3)
    model, tokenizer = build(config)
    rates = drop_path_rates(model.image.encoder)
    assert rates != []
    checkpoint = save_and_load(tmp_path / "w.pt", model, tokenizer, config)
    restored = load_clip(checkpoint)
    assert drop_path_rates(restored.image.encoder) == rates
    expected = embeddings(model, tokenizer, config)
    assert torch.equal(embeddings(restored, tokenizer, config), expected)
    checkpoint.image_encoder["arguments"]["drop_path_rate"] = 5.0  # a modified file
    assert drop_path_rates(load_tower(checkpoint, "image").encoder) == rates


def test_load_checkpoint_without_drop_path_has_rate_zero(
    checkpoint_path: Path, tmp_path: Path
) -> None:
    """Checkpoints older than the setting lack it."""
    content = torch.load(checkpoint_path, weights_only=True)
    del content["config"]["drop_path"]
    torch.save(content, tmp_path / "old.pt")
    checkpoint = load_checkpoint(tmp_path / "old.pt")
    assert checkpoint.config.drop_path == 0.0
    assert not any(drop_path_rates(load_tower(checkpoint, "image").encoder))


def test_build_image_encoder_rejects_unsupported_drop_path() -> None:
    config = replace(CONFIG, image_encoder="ghostnet_050")
    with pytest.raises(UserError, match=r"--image-encoder ghostnet_050: .*--drop-path 0") as error:
        build_image_encoder(replace(config, drop_path=0.1))
    assert "\n" not in str(error.value)
    assert build_image_encoder(replace(config, drop_path=0.0)).feature_dim == 1280


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ghostnet_050", "densenet121", "vgg11"])
def test_build_image_encoder_leaves_out_default_drop_path(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, image_encoder=name, drop_path=Config.drop_path)
    encoder = build_image_encoder(config)
    assert encoder.drop_path == 0.0
    stdout = capsys.readouterr().out
    assert stdout == f"model: {name} has no stochastic depth and is trained without it\n"


def test_build_image_encoder_has_default_drop_path(capsys: pytest.CaptureFixture[str]) -> None:
    encoder = build_image_encoder(replace(CONFIG, drop_path=Config.drop_path))
    assert encoder.drop_path == 0.1
    assert max(drop_path_rates(encoder)) == pytest.approx(0.1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "rate"), [("test_resnet", 0.1), ("ghostnet_050", 0.0)])
def test_run_saves_the_drop_path_that_it_has(
    name: str, rate: float, shapes: Path, workdir: Path
) -> None:
    """Its checkpoints contain the rate itself, not that it was left to the encoder."""
    flags = ["--demo", "--data-dir", str(shapes), "--image-encoder", name, "--drop-path", "-1"]
    flags += ["--image-size", "32", "--batch-size", "8", "--device", "cpu", "--num-workers", "0"]
    config = parse(Config, flags)
    run = trainer.setup(config, None, trainer.Distributed.init(config))
    assert run.config.drop_path == rate
    content = trainer.checkpoint_of(run)
    assert content["config"]["drop_path"] == rate


@pytest.mark.parametrize("drop_path", [-0.5, -2.0, 0.95, float("nan")])
def test_config_rejects_drop_path_out_of_range(drop_path: float) -> None:
    with pytest.raises(ValueError, match=r"--drop-path .*must be between"):
        Config(drop_path=drop_path)


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    ours = model.state_dict()
    theirs = other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_build_clip_loads_pretrained_folders_exactly(backbones: dict[str, Path]) -> None:
    model, tokenizer = build(pretrained_config(backbones))
    image_name = f"local-dir:{backbones['image']}"
    image_model = timm.create_model(image_name, pretrained=True, num_classes=0)
    assert_same_state(model.image.encoder.model, image_model)
    assert_same_state(model.text.encoder.model, AutoModel.from_pretrained(backbones["text"]))
    assert model.image.encoder.mean.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])
    stored = Tokenizer.from_file(str(backbones["text"] / "tokenizer.json"))
    for caption in CAPTIONS:
        assert tokenizer.encode(caption).ids == stored.encode(caption).ids


@pytest.mark.parametrize("pretrained", [True, False], ids=["pretrained", "from scratch"])
def test_build_text_encoder_converts_half_precision_to_float32(
    pretrained: bool, backbones: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(backbones["text"], folder)
    AutoModel.from_pretrained(backbones["text"]).half().save_pretrained(folder)
    config = replace(PRETRAINED_CONFIG, text_encoder=str(folder), pretrained=pretrained)
    encoder, _ = build_text_encoder(config)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("flag", "name", "build_encoder"),
    [
        ("--text-encoder", "nobody/no-such-text-model", build_text_encoder),
        ("--text-encoder", "no/such/folder", build_text_encoder),
        ("--image-encoder", "no_such_image_model", build_image_encoder),
        ("--image-encoder", "local-dir:no/such/folder", build_image_encoder),
        ("--image-encoder", "resnet50", build_image_encoder),
    ],
)
def test_unavailable_encoder_error_lists_the_alternatives(
    flag: str,
    name: str,
    build_encoder: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = replace(PRETRAINED_CONFIG, text_encoder=name, image_encoder=name)
    message = user_error(build_encoder, config)
    assert message.startswith(f"{flag} {name}: ")
    assert "--no-pretrained" in message
    assert "--demo" in message


def test_unavailable_encoder_from_scratch_is_not_told_to_be_from_scratch() -> None:
    message = user_error(build_image_encoder, replace(CONFIG, image_encoder="resnet5"))
    assert message.startswith("--image-encoder resnet5: cannot be loaded")
    assert "--no-pretrained" not in message


@pytest.mark.parametrize("flags", [{"text_layers": 2}, {"text_width": 64}])
def test_size_of_a_pretrained_text_encoder_cannot_be_chosen(
    flags: dict[str, int], backbones: dict[str, Path]
) -> None:
    config = replace(pretrained_config(backbones), **flags)
    assert "--no-pretrained" in user_error(build_text_encoder, config)


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\n", b"", None],
    ids=["Git LFS pointer", "empty", "truncated"],
)
@pytest.mark.parametrize(
    ("part", "build_encoder"),
    [("image", build_image_encoder), ("text", build_text_encoder)],
    ids=["image", "text"],
)
def test_build_encoder_rejects_a_folder_with_damaged_weights(
    part: str,
    build_encoder: Callable,
    content: bytes | None,
    backbones: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / part
    shutil.copytree(backbones[part], folder)
    file = folder / "model.safetensors"
    if content is None:
        content = file.read_bytes()[:-100]
    file.write_bytes(content)
    name = f"local-dir:{folder}" if part == "image" else str(folder)
    config = replace(PRETRAINED_CONFIG, **{f"{part}_encoder": name})
    message = user_error(build_encoder, config)
    assert message.startswith(f"--{part}-encoder {name}: cannot be loaded")


@pytest.mark.parametrize("folder", ["t5", "vit", "vit_alone"])
@pytest.mark.parametrize("pretrained", [True, False], ids=["pretrained", "from scratch"])
def test_build_text_encoder_rejects_a_folder_of_another_model(
    folder: str, pretrained: bool, backbones: dict[str, Path]
) -> None:
    config = replace(PRETRAINED_CONFIG, text_encoder=str(backbones[folder]), pretrained=pretrained)
    message = user_error(build_text_encoder, config, CAPTIONS)
    assert message.startswith(f"--text-encoder {backbones[folder]}: ")


@pytest.mark.parametrize(
    "name", ["t5-small", "google/vit-base-patch16-224", "openai/clip-vit-base-patch32", "wombat"]
)
def test_build_text_encoder_rejects_the_name_of_another_model(name: str) -> None:
    message = user_error(build_text_encoder, replace(CONFIG, text_encoder=name), CAPTIONS)
    assert message.startswith(f"--text-encoder {name}: ")


def test_build_wordpiece_tokenizer_is_deterministic() -> None:
    vocabularies = [build_wordpiece_tokenizer(CAPTIONS, 64).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_text_encoder_feature_dim_is_its_hidden_size(small_model: tuple[CLIP, Tokenizer]) -> None:
    model, tokenizer = small_model
    encoder: TextEncoder = model.text.encoder
    assert encoder.feature_dim == CONFIG.text_width
    assert encoder(*tokenize(tokenizer, CAPTIONS)).shape == (4, encoder.feature_dim)


@pytest.mark.skipif("modernbert" not in CONFIG_MAPPING, reason="newer than this transformers")
@pytest.mark.parametrize("layers", [2, 25])
def test_modernbert_of_any_depth_is_restored_from_its_checkpoint(
    layers: int, tmp_path: Path
) -> None:
    """Its configuration lists the kind of attention of each layer, 22 by default."""
    config = replace(CONFIG, text_encoder="modernbert", text_layers=layers)
    model, tokenizer = build(config)
    restored = load_clip(save_and_load(tmp_path / "w.pt", model, tokenizer, config))
    assert_same_state(restored, model)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("microsoft/deberta-v3-small", "deberta-v2"), ("nomic-ai/nomic-bert-2048", "nomic_bert")],
)
def test_name_of_the_hub_chooses_its_architecture(name: str, kind: str) -> None:
    pytest.importorskip(f"transformers.models.{kind.replace('-', '_')}")
    config = replace(CONFIG, text_encoder=name)
    encoder, _ = build_text_encoder(config, CAPTIONS)
    assert encoder.model.config.model_type == kind


@pytest.mark.parametrize("width", [1, 48, 200, 400])
@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_build_text_encoder_supports_any_width(kind: str, width: int) -> None:
    config = replace(CONFIG, text_encoder=kind, text_width=width)
    encoder, tokenizer = build_text_encoder(config, CAPTIONS)
    assert encoder(*tokenize(tokenizer, CAPTIONS)).shape == (4, width)


# ---------------------------------------------------------------- depthwise convolutions


def depthwise_convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels
    ]


def depthwise_float32_model() -> CLIP:
    model, _ = build(replace(CONFIG, image_encoder="test_efficientnet"))
    keep_depthwise_float32(model.image.encoder)
    return model


@torch.no_grad()
def scale_depthwise_weights(model: CLIP, factor: float) -> None:
    for convolution in depthwise_convolutions(model):
        convolution.weight.mul_(factor)


@torch.no_grad()
def encode_in_bfloat16(model: CLIP) -> Tensor:
    """Image embeddings under autocast. Asserts that depthwise convolutions stay in float32."""
    dtypes = []
    hooks = [
        convolution.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
        for convolution in depthwise_convolutions(model)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        image_embeddings = model.encode_image(random_pixels(CONFIG))
    for hook in hooks:
        hook.remove()
    assert dtypes == [torch.float32] * len(hooks)
    assert dtypes != []
    return image_embeddings


@pytest.mark.parametrize(
    "copy_model",
    [copy.deepcopy, lambda model: AveragedModel(model).module],
    ids=["deepcopy", "AveragedModel"],
)
def test_keep_depthwise_float32_in_a_copy_uses_its_own_weights(copy_model: Callable) -> None:
    """The float32 forward of a copy must not be that of the original convolutions."""
    original = depthwise_float32_model()
    before = encode_in_bfloat16(original)
    copied = copy_model(original)
    assert torch.equal(encode_in_bfloat16(copied), before)

    scale_depthwise_weights(copied, -1.0)
    of_copy = encode_in_bfloat16(copied)
    assert not torch.equal(of_copy, before)
    assert torch.equal(encode_in_bfloat16(original), before)
    not_copied = depthwise_float32_model()
    not_copied.load_state_dict(copied.state_dict())
    assert torch.equal(of_copy, encode_in_bfloat16(not_copied))

    scale_depthwise_weights(original, 3.0)
    assert not torch.equal(encode_in_bfloat16(original), before)
    assert torch.equal(encode_in_bfloat16(copied), of_copy)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("image", "text"),
    [("test_resnet", "distilbert"), ("mobilenetv3_small_050", "bert"), ("test_vit", "distilbert")],
)
def test_load_clip_restores_the_embeddings(image: str, text: str, tmp_path: Path) -> None:
    config = replace(CONFIG, image_encoder=image, text_encoder=text, temperature=0.05)
    model, tokenizer = build(config)
    model.logit_scale.data.fill_(3.3)
    checkpoint = save_and_load(tmp_path / "w.pt", model, tokenizer, config)
    restored = load_clip(checkpoint)
    assert not restored.training
    expected = embeddings(model, tokenizer, config)
    assert torch.equal(embeddings(restored, checkpoint.tokenizer, config), expected)
    assert restored.logit_scale.item() == pytest.approx(3.3)
    assert checkpoint.config.image_encoder == image
    assert checkpoint.example_query == "a red circle"


def add_logit_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives `CLIP` the additional parameter `logit_bias`, as SigLIP has it."""
    original = CLIP.__init__

    def init(self: CLIP, *arguments: object) -> None:
        original(self, *arguments)
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    monkeypatch.setattr(CLIP, "__init__", init)


def test_load_clip_restores_an_additional_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_logit_bias(monkeypatch)
    model, tokenizer = build(CONFIG)
    model.logit_bias.data.fill_(-3.5)
    restored = load_clip(save_and_load(tmp_path / "w.pt", model, tokenizer, CONFIG))
    assert restored.logit_bias.item() == -3.5


@pytest.mark.parametrize("name", ["logit_bias", "image.encoder.bias", "audio.head.norm.weight"])
def test_load_clip_names_an_unknown_tensor(name: str, checkpoint_path: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_path)
    checkpoint.model[name] = torch.zeros(1)
    assert user_error(load_clip, checkpoint).endswith(f"do not fit its model: {name}")


def test_load_clip_names_a_missing_tensor(
    checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(checkpoint_path)
    add_logit_bias(monkeypatch)
    assert user_error(load_clip, checkpoint).endswith("do not fit its model: logit_bias")


def types_in(value: object) -> set[type]:
    """The type of a value and of all that it contains."""
    types = {type(value)}
    contained = []
    if isinstance(value, dict):
        contained = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple):
        contained = value
    for item in contained:
        types |= types_in(item)
    return types


def test_make_checkpoint_contains_tensors_and_plain_values(checkpoint_path: Path) -> None:
    plain = {bool, int, float, str, list, tuple, dict, OrderedDict, type(None), Tensor}
    assert types_in(torch.load(checkpoint_path, weights_only=True)) <= plain


def test_make_checkpoint_contains_no_local_paths(backbones: dict[str, Path], workdir: Path) -> None:
    config = replace(
        pretrained_config(backbones),
        data_dir=str(workdir / "data"),
        resume=str(workdir / "last.pt"),
    )
    file = save(Path("w.pt"), *build(config), config)
    with zipfile.ZipFile(file) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    for path in (str(workdir), *map(str, backbones.values()), str(Path.home()), "local-dir:"):
        assert path.encode() not in content


@pytest.mark.slow
def test_inference_requires_the_checkpoint_alone(backbones: dict[str, Path], workdir: Path) -> None:
    """In a new process, without the pretrained folders and without a network."""
    folders = {name: workdir / name for name in ("image", "text")}
    for name, folder in folders.items():
        shutil.copytree(backbones[name], folder)
    config = replace(pretrained_config(folders), data_dir=str(workdir / "data"))
    model, tokenizer = build(config)
    file = save(workdir / "w.pt", model, tokenizer, config)
    for folder in folders.values():
        shutil.rmtree(folder)

    images = workdir / "mine"
    images.mkdir()
    for i, pixels in enumerate(random_pixels(config)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(images / f"{i}.png")
    flags = ["--images", "mine", "--num-workers", "0", "--device", "cpu", "--query", CAPTIONS[1]]
    done = script("inference.py", "--weights", file.name, *flags, cwd=workdir, network=False)
    assert done.returncode == 0, done.stderr

    transform = Transform(eval_image_size(model.image, config))
    inputs = stack_images(transform(load_image(path)) for path in list_images(images))
    with torch.no_grad():
        expected = model.encode_image(inputs)
        query = model.encode_text(*tokenize(tokenizer, CAPTIONS[1:2]))
    (index,) = (workdir / "w.index").glob("*.npy")
    torch.testing.assert_close(torch.from_numpy(np.load(index)), expected, rtol=0, atol=1e-5)
    best = (query @ expected.T).max().item()
    assert f"   1  {best:6.3f}" in done.stdout


@pytest.mark.parametrize(
    ("encoder", "image_size", "augment", "size"),
    [
        ("test_resnet", 224, True, 288),
        ("test_resnet", 128, True, 160),
        ("test_resnet", 200, True, 256),
        ("test_resnet", 32, True, 32),
        ("test_resnet", 200, False, 200),  # without training crops
        ("test_vit", 224, True, 224),  # supports one size only
    ],
)
def test_eval_image_size_is_larger_and_a_multiple_of_32(
    encoder: str, image_size: int, augment: bool, size: int
) -> None:
    """Training crops enlarge what they show, so evaluation uses larger images."""
    config = replace(CONFIG, image_encoder=encoder, image_size=image_size, augment=augment)
    model, _ = build(config)
    assert eval_image_size(model.image, config) == size
    image_embeddings = model.encode_image(random_pixels(replace(config, image_size=size)))
    assert image_embeddings.shape == (4, CONFIG.projection_dim)


# ---------------------------------------------------------------- writing files


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("cut off"), KeyboardInterrupt()]
)
def test_atomic_write_keeps_the_former_file_on_an_error(
    error: BaseException, tmp_path: Path
) -> None:
    def write(file: io.BufferedWriter) -> None:
        file.write(b"half of the n")
        raise error

    (tmp_path / "w.pt").write_text("former")
    with pytest.raises((UserError, KeyboardInterrupt)):
        atomic_write(tmp_path / "w.pt", write)
    assert contents(tmp_path) == {"w.pt": "former"}


def write_after_another_error(file: io.IOBase) -> None:
    try:
        raise KeyError("such as a missing font")
    except KeyError:
        file.write(b"new")


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write(b"new"),
        lambda file: torch.save(torch.ones(9), file),
        write_after_another_error,
    ],
    ids=["file.write", "torch.save", "handler"],
)
def test_atomic_write_passes_on_the_error_of_a_worker(write: Callable, tmp_path: Path) -> None:
    """A DataLoader worker that dies during the write is not an error of the file."""

    class Interrupted(io.BytesIO):
        def write(self, content: bytes) -> int:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    (tmp_path / "w.pt").write_text("former")
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        atomic_write(tmp_path / "w.pt", lambda file: write(Interrupted()))
    assert contents(tmp_path) == {"w.pt": "former"}


def test_atomic_write_replaces_the_former_file(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("former")
    atomic_write(tmp_path / "w.pt", lambda file: file.write(b"new"))
    assert contents(tmp_path) == {"w.pt": "new"}
