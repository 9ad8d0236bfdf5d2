"""The command lines: defaults, precedence, help and errors."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, script

import inference
import trainer
from config import DEMO_DEFAULTS, Config, SearchConfig, parse

RESUMED = {
    "data_dir": "my/images",
    "name": "mine",
    "epochs": 40,
    "batch_size": 16,
    "pretrained": False,
    "demo": True,
}
NO_DEFAULT = {"weights": "(required)", "query": "(repeatable)"}  # in place of a default in --help


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class HelpEntry(NamedTuple):
    flags: list[str]
    text: str  # with its default, on one line


def help_entries(stdout: str) -> list[HelpEntry]:
    """The entries of the box of options that --help prints, with or without its frame."""
    lines = re.findall(r"^[│ ] (.*?)[│ ]*$", stdout, flags=re.MULTILINE)
    entries = []
    for entry in re.split(r"\n(?=-)", "\n".join(lines)):
        usage, text = re.split(r"\s{2,}", entry, maxsplit=1)
        entries.append(HelpEntry(re.findall(r"--[\w-]+", usage), " ".join(text.split())))
    return entries


# ---------------------------------------------------------------- defaults


def test_config_defaults_train_pretrained_encoders_on_flickr8k():
    config = parse(Config, [])
    assert config.data_dir == "data/flickr8k"
    assert (
        config.download_url == "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
    )
    assert (config.image_encoder, config.text_encoder) == ("resnet50", "distilbert-base-uncased")
    assert config.pretrained and not config.demo and not config.resume
    assert (config.freeze_image_encoder, config.freeze_text_encoder) == (0.5, 0.0)
    assert (config.image_size, config.projection_dim) == (224, 256)
    assert config.temperature == 0.07
    assert (config.dropout, config.drop_path) == (
        0.3,
        -1,
    )  # 0.1 if the encoder has stochastic depth
    assert config.head_lr > config.image_lr and config.head_lr > config.text_lr


def test_search_config_defaults_show_eight_images_in_a_file():
    config = parse(SearchConfig, ["--weights", "w.pt"])
    assert config.weights == Path("w.pt")
    assert (config.n, config.output) == (8, Path("matches.png"))
    assert config.query == [] and config.images is None and config.evaluate is False


def test_parse_without_flags_returns_the_defaults_of_the_class():
    assert parse(Config, []) == Config()
    assert parse(SearchConfig, ["--weights", "w.pt"]) == SearchConfig(weights=Path("w.pt"))


# ---------------------------------------------------------------- help


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"), [("trainer.py", Config), ("inference.py", SearchConfig)]
)
def test_help_shows_each_flag_with_its_default(name: str, settings: type, workdir: Path):
    """It needs no network, data or cache, and writes no file."""
    result = script(name, "--help", cwd=workdir, network=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert not list(workdir.iterdir())
    defaults = parse(settings, ["--weights", "w.pt"] if settings is SearchConfig else [])
    entries = help_entries(result.stdout)
    for field in fields(settings):
        text = next(entry.text for entry in entries if flag(field.name) in entry.flags)
        description, bracket, default = text.rpartition("(")
        assert len(description) > 10, field.name
        value = getattr(defaults, field.name)
        expected = "(default: '')" if value == "" else f"(default: {value})"
        expected = NO_DEFAULT.get(field.name, expected)
        # Without spaces: a long value is wrapped.
        assert (bracket + default).replace(" ", "") == expected.replace(" ", "")
    assert ("--no-pretrained" in result.stdout) == (settings is Config)


@pytest.mark.parametrize(
    ("main", "settings"), [(trainer.main, Config), (inference.main, SearchConfig)]
)
def test_help_has_one_entry_for_each_flag(
    main: Callable, settings: type, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    entries = help_entries(capsys.readouterr().out)
    expected = [["--help"]]
    for field in fields(settings):
        flags = [flag(field.name)]
        if field.type is bool:
            flags.append(flag(f"no_{field.name}"))
        expected.append(flags)
    assert [entry.flags for entry in entries] == expected


def test_help_with_demo_has_the_defaults_of_the_demo(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        trainer.main(["--demo", "--help"])
    texts = {entry.flags[0]: entry.text for entry in help_entries(capsys.readouterr().out)}
    assert "(default: data/shapes)" in texts["--data-dir"]
    assert "(default: 7)" in texts["--epochs"]


# ---------------------------------------------------------------- precedence


def test_demo_replaces_defaults():
    config = parse(Config, ["--demo"])
    assert asdict(config) == asdict(Config()) | DEMO_DEFAULTS | {"demo": True}
    assert (config.data_dir, config.name, config.pretrained) == ("data/shapes", "demo", False)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--epochs", "2"], "epochs", 2),
        (["--epochs", str(Config().epochs)], "epochs", Config().epochs),
        (["--image-size", str(Config().image_size)], "image_size", Config().image_size),
        (["--data-dir", Config().data_dir], "data_dir", Config().data_dir),
        (["--pretrained"], "pretrained", True),
        (["--name", "clip"], "name", "clip"),
        (["--text-layers", "0"], "text_layers", 0),
    ],
)
@pytest.mark.parametrize("demo_first", [True, False])
def test_demo_never_replaces_a_given_flag(
    given: list[str], name: str, value: object, demo_first: bool
):
    """Not even a flag that is set to its default."""
    config = parse(Config, ["--demo", *given] if demo_first else [*given, "--demo"])
    assert asdict(config) == asdict(Config()) | DEMO_DEFAULTS | {"demo": True, name: value}


def test_parse_takes_all_settings_of_another_default():
    """Such as those of a resumed run."""
    assert asdict(parse(Config, [], Config(**RESUMED))) == asdict(Config()) | RESUMED


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--epochs", "3"], "epochs", 3),
        (["--epochs", str(Config().epochs)], "epochs", Config().epochs),
        (["--name", Config().name], "name", Config().name),
        (["--pretrained"], "pretrained", True),
    ],
)
def test_another_default_never_replaces_a_given_flag(given: list[str], name: str, value: object):
    config = parse(Config, given, Config(**RESUMED))
    assert asdict(config) == asdict(Config()) | RESUMED | {name: value}


def test_parse_keeps_nothing_for_the_next_command_line():
    parse(Config, ["--demo"])
    parse(Config, [], Config(**RESUMED))
    parse(SearchConfig, ["--weights", "w.pt", "--query", "a dog"])
    assert parse(Config, []) == Config()
    assert parse(SearchConfig, ["--weights", "w.pt"]).query == []


def test_parse_reads_no_file_of_arguments(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    Path("trainer.args").write_text("--epochs 99")
    monkeypatch.setattr("sys.argv", ["trainer.py"])
    assert parse(Config) == Config()


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--data-dir", "my/images"], "data_dir", "my/images"),
        (["--data_dir", "my/images"], "data_dir", "my/images"),
        (["--image-encoder", "local-dir:backbone"], "image_encoder", "local-dir:backbone"),
        (["--text-encoder", "bert-base-uncased"], "text_encoder", "bert-base-uncased"),
        (["--no-pretrained"], "pretrained", False),
        (["--no_pretrained"], "pretrained", False),
        (["--pretrained"], "pretrained", True),
        (["--epochs", "3"], "epochs", 3),
        (["--batch-size", "2"], "batch_size", 2),
        (["--chunk-size", "32"], "chunk_size", 32),
        (["--image-size", "96"], "image_size", 96),
        (["--num-workers", "0"], "num_workers", 0),
        (["--seed", "7"], "seed", 7),
        (["--name", "mine"], "name", "mine"),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--resume", "runs/clip/last.pt"], "resume", "runs/clip/last.pt"),
        (["--temperature=0.5"], "temperature", 0.5),
    ],
)
def test_parse_sets_one_setting_by_each_flag(given: list[str], name: str, value: object):
    assert asdict(parse(Config, given)) == asdict(Config()) | {name: value}


@pytest.mark.parametrize(
    "given",
    [
        ["--query", "a dog", "--query", "snow, and a man"],
        ["--query=a dog", "--n", "3", "--query=snow, and a man"],
    ],
)
def test_parse_collects_repeated_queries(given: list[str]):
    assert parse(SearchConfig, ["--weights", "w.pt", *given]).query == ["a dog", "snow, and a man"]


@pytest.mark.parametrize("name", ["images", "image"])
def test_parse_reads_none_as_a_path(name: str):
    config = parse(SearchConfig, ["--weights", "w.pt", flag(name), "None"])
    assert getattr(config, name) == Path("None")


def test_importing_config_imports_neither_torch_nor_transformers():
    program = "import sys, config; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch-size", "1"], ["--batch-size 1", "between 2 and"]),
        (["--chunk-size", "-1"], ["--chunk-size -1", "between 0 and"]),
        (["--batch-size", "many"], ["--batch-size", "int", "many"]),
        (["--temperature", "0"], ["--temperature 0", "between 0.01 and"]),
        (["--temperature", "-1"], ["--temperature -1", "between 0.01 and"]),
        (["--temperature", "nan"], ["--temperature nan", "between 0.01 and"]),
        (["--epochs", "0"], ["--epochs 0", "between 1 and"]),
        (["--epochs", "1.5"], ["--epochs", "int", "1.5"]),
        (["--epochs"], ["--epochs", "Expected 1 value"]),
        (["--drop-path", "1"], ["--drop-path 1", "between 0.0 and 0.9"]),
        (["--image-lr", "inf"], ["--image-lr inf", "between 0.0 and 1.0"]),
        (["--num-workers", "-2"], ["--num-workers -2", "between -1 and"]),
        (["--seed", "-1"], ["--seed -1", "between 0 and"]),
        (["--precision", "half"], ["--precision", "half", "bfloat16"]),
        (["--name", "../elsewhere"], ["--name", "folder"]),
        (["--name", ""], ["--name", "folder"]),
        (["--demo", "perhaps"], ["Unrecognized options: perhaps", "--help"]),
        (["--demo", "--batch-size", "1"], ["--batch-size 1", "between 2 and"]),
        (["--learning-rate", "1"], ["Unrecognized options: --learning-rate", "--help"]),
        (["--epoch", "3"], ["--epoch,", "Perhaps you meant: --epochs", "--help"]),
        (["left-over"], ["Unrecognized options: left-over", "--help"]),
        (["--demo", "--epochs", "2", "3"], ["Unrecognized options: 3", "--help"]),
    ],
)
def test_trainer_rejects_a_bad_command_line(
    arguments: list[str], expected: list[str], workdir: Path, capsys: pytest.CaptureFixture
):
    assert_rejected(trainer.main, arguments, expected, workdir, capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["--weights", "required"]),
        (["--weights", "w.pt", "--n", "0"], ["--n 0", "between 1 and"]),
        (["--weights", "w.pt", "--n", "-3"], ["--n -3", "between 1 and"]),
        (["--weights", "w.pt", "--n", "eight"], ["--n", "int", "eight"]),
        (["--weights", "w.pt", "--query", " "], ["--query", "at least one word"]),
        (["--weights", "w.pt", "--query"], ["--query", "Expected 1 value"]),
        (["--weights", "w.pt", "--query", "a dog", "snow"], ["Unrecognized options: snow"]),
        (["--weights", "w.pt", "--output", "matches.docx"], ["--output", ".png", "matches.docx"]),
        (["--weights", "w.pt", "--epochs", "2"], ["Unrecognized options: --epochs", "--help"]),
        (["--weight", "w.pt"], ["--weights", "required"]),
        (["--weights", "w.pt", "--out", "matches.png"], ["--out,", "meant: --output", "--help"]),
        (["--weights", "w.pt", "a dog"], ["Unrecognized options: a dog", "--help"]),
    ],
)
def test_inference_rejects_a_bad_command_line(
    arguments: list[str], expected: list[str], workdir: Path, capsys: pytest.CaptureFixture
):
    assert_rejected(inference.main, arguments, expected, workdir, capsys)


def assert_rejected(
    main: Callable,
    arguments: list[str],
    expected: list[str],
    workdir: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Asserts status 2 and one box on stderr that contains all of `expected`."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    stdout, stderr = capsys.readouterr()
    assert end.value.code == 2
    assert stdout == ""
    message = " ".join(re.sub("[│╭╮╰╯─]", " ", stderr).split())
    assert message.count("For full helptext") == 1  # the last line of a box
    assert "Traceback" not in message
    assert all(part in message for part in expected), stderr
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (Config, {"batch_size": 1}, "--batch-size"),
        (Config, {"temperature": float("nan")}, "--temperature"),
        (SearchConfig, {"weights": Path("w.pt"), "n": 0}, "--n"),
    ],
)
def test_settings_out_of_range_raise_value_error(settings: type, values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        settings(**values)


@pytest.mark.parametrize("settings", [Config(), SearchConfig(weights=Path("w.pt"))])
def test_settings_are_frozen(settings: Config | SearchConfig):
    with pytest.raises(AttributeError):
        settings.device = "cpu"


# ---------------------------------------------------------------- flags that exclude others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluate", "--images", "photos"], "--images: has no effect with --evaluate"),
        (["--evaluate", "--query", "a dog"], "--query: has no effect with --evaluate"),
        (["--image", "x.jpg", "--images", "photos"], "--images: has no effect with --image"),
        (["--like", "x.jpg", "--query", "a dog"], "--query: has no effect with --like"),
        (["--like", "x.jpg", "--image", "y.jpg"], "--like: has no effect with --image"),
        (["--images", "photos", "--data-dir", "d"], "--data-dir: has no effect with --images"),
        (["--serve", "--query", "a dog"], "--query: has no effect with --serve"),
        (["--serve", "--like", "x.jpg"], "--like: has no effect with --serve"),
        (["--serve", "--image", "x.jpg"], "--image: has no effect with --serve"),
        (["--serve", "--evaluate"], "--evaluate: has no effect with --serve"),
        (["--evaluate", "--output", "x.csv"], "--output: has no effect with --evaluate"),
        (["--serve", "--output", "x.png"], "--output: has no effect with --serve"),
        (["--port", "80"], "--host and --port: have no effect without --serve"),
        (["--serve", "--port", "65536"], "--port 65536: must be between 1 and 65535"),
    ],
)
def test_search_config_rejects_flags_without_effect(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(SearchConfig, ["--weights", "best.pt", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_config_rejects_demo_with_init_from():
    with pytest.raises(ValueError, match=r"--init-from: .* --demo"):
        Config(demo=True, init_from="best.pt")


def test_config_rejects_resume_with_init_from():
    with pytest.raises(ValueError, match=r"--init-from: .* --resume"):
        Config(resume="last.pt", init_from="best.pt")


def test_parse_ignores_the_arguments_of_a_notebook_kernel(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert parse(Config) == Config()
    assert parse(Config, ["--epochs", "3"]).epochs == 3
