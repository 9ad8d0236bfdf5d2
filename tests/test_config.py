"""The command lines as a user types them: what they default to, what comes first, and what they refuse."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import script

from config import DEMO_DEFAULTS, Config, SearchConfig, parse
from inference import main as search
from trainer import main as train

RUN = {
    "data_dir": "my/pictures",
    "name": "mine",
    "epochs": 40,
    "batch_size": 16,
    "pretrained": False,
    "demo": True,
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------- defaults


def test_training_defaults_are_the_real_thing():
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
    assert (config.dropout, config.drop_path) == (0.3, 0.1)
    assert config.head_lr > config.image_lr and config.head_lr > config.text_lr


def test_search_defaults_show_eight_pictures_in_a_file():
    config = parse(SearchConfig, ["--weights", "w.pt"])
    assert (config.weights, config.n, config.output) == ("w.pt", 8, "matches.png")
    assert config.query == [] and config.images == "" and config.evaluate is False


def test_the_parsed_defaults_are_those_of_the_class():
    assert parse(Config, []) == Config()
    assert parse(SearchConfig, ["--weights", "w.pt"]) == SearchConfig(weights="w.pt")


@pytest.mark.parametrize(
    ("name", "settings"), [("trainer.py", Config), ("inference.py", SearchConfig)]
)
def test_help_shows_every_flag_and_its_default_without_network_data_or_cache(
    name: str, settings: type, workdir: Path
):
    shown = script(name, "--help", cwd=workdir, network=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert not list(workdir.iterdir())
    entries = {
        entry.split(maxsplit=1)[0]: "".join(entry.split())
        for entry in re.split(r"\n  (?=-)", shown.stdout)
    }
    defaults = parse(settings, ["--weights", "w.pt"] if settings is SearchConfig else [])
    for field in fields(settings):
        entry = next(
            text
            for key, text in entries.items()
            if key.strip(",").replace("_", "-") == flag(field.name)
        )
        assert flag(field.name) in entry
        assert len(field.metadata["help"]) > 10
        if field.name != "weights":
            assert f"(default:{''.join(str(getattr(defaults, field.name)).split())})" in entry
    assert ("--no-pretrained" in shown.stdout) == (settings is Config)


# ---------------------------------------------------------------- what comes first


def test_the_demo_replaces_defaults():
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
@pytest.mark.parametrize("demo_stands_first", [True, False])
def test_the_demo_never_replaces_a_flag_that_was_given_even_its_default(
    given: list[str], name: str, value: object, demo_stands_first: bool
):
    config = parse(Config, ["--demo", *given] if demo_stands_first else [*given, "--demo"])
    assert asdict(config) == asdict(Config()) | DEMO_DEFAULTS | {"demo": True, name: value}


def test_other_defaults_such_as_a_resumed_runs_are_taken_whole():
    assert asdict(parse(Config, [], RUN)) == asdict(Config()) | RUN


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--epochs", "3"], "epochs", 3),
        (["--epochs", str(Config().epochs)], "epochs", Config().epochs),
        (["--name", Config().name], "name", Config().name),
        (["--pretrained"], "pretrained", True),
    ],
)
def test_other_defaults_never_replace_a_flag_that_was_given(
    given: list[str], name: str, value: object
):
    assert asdict(parse(Config, given, RUN)) == asdict(Config()) | RUN | {name: value}


def test_reading_one_command_line_leaves_nothing_behind_for_the_next():
    parse(Config, ["--demo"])
    parse(Config, [], RUN)
    parse(SearchConfig, ["--weights", "w.pt", "--query", "a dog"])
    assert parse(Config, []) == Config()
    assert parse(SearchConfig, ["--weights", "w.pt"]).query == []


def test_a_settings_file_beside_the_script_is_not_read(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    Path("trainer.args").write_text("--epochs 99")
    monkeypatch.setattr("sys.argv", ["trainer.py"])
    assert parse(Config) == Config()


# ---------------------------------------------------------------- flags that scripts rely on


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--data-dir", "my/pictures"], "data_dir", "my/pictures"),
        (["--image-encoder", "local-dir:backbone"], "image_encoder", "local-dir:backbone"),
        (["--text-encoder", "bert-base-uncased"], "text_encoder", "bert-base-uncased"),
        (["--no-pretrained"], "pretrained", False),
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
def test_each_flag_sets_its_own_setting_alone(given: list[str], name: str, value: object):
    assert asdict(parse(Config, given)) == asdict(Config()) | {name: value}


@pytest.mark.parametrize(
    "given",
    [
        ["--query", "a dog", "--query", "snow, and a man"],
        ["--query", "a dog", "snow, and a man"],
        ["--query=a dog", "--n", "3", "--query=snow, and a man"],
    ],
)
def test_a_query_may_be_repeated(given: list[str]):
    assert parse(SearchConfig, ["--weights", "w.pt", *given]).query == ["a dog", "snow, and a man"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "flag_and_what_is_allowed"),
    [
        (["--batch-size", "1"], ["--batch-size", "2 to"]),
        (["--chunk-size", "-1"], ["--chunk-size", "0 to"]),
        (["--batch-size", "many"], ["--batch-size", "int", "many"]),
        (["--temperature", "0"], ["--temperature", "0.01 to"]),
        (["--temperature", "-1"], ["--temperature", "0.01 to"]),
        (["--temperature", "nan"], ["--temperature", "0.01 to"]),
        (["--epochs", "0"], ["--epochs", "1 to"]),
        (["--epochs", "1.5"], ["--epochs", "int", "1.5"]),
        (["--epochs"], ["--epochs", "expected one argument"]),
        (["--drop-path", "1"], ["--drop-path", "0.0 to 0.9"]),
        (["--image-lr", "inf"], ["--image-lr", "0.0 to 1.0"]),
        (["--num-workers", "-2"], ["--num-workers", "-1 to"]),
        (["--seed", "-1"], ["--seed", "0 to"]),
        (["--precision", "half"], ["--precision", "half", "bfloat16"]),
        (["--name", "../elsewhere"], ["--name", "folder"]),
        (["--name", ""], ["--name", "folder"]),
        (["--demo", "perhaps"], ["--demo", "yes/no", "perhaps"]),
        (["--demo", "--batch-size", "1"], ["--batch-size", "2 to"]),
        (["--learning-rate", "1"], ["--learning-rate", "--help"]),
        (["--epoch", "3"], ["--epoch", "--help"]),
        (["left-over"], ["left-over", "--help"]),
        (["--demo", "--epochs", "2", "3"], ["unrecognized arguments: 3", "--help"]),
    ],
)
def test_the_trainer_refuses_with_one_line_and_status_two(
    arguments: list[str],
    flag_and_what_is_allowed: list[str],
    workdir: Path,
    capsys: pytest.CaptureFixture,
):
    assert_refused(train, arguments, flag_and_what_is_allowed, workdir, capsys)


@pytest.mark.parametrize(
    ("arguments", "flag_and_what_is_allowed"),
    [
        ([], ["--weights", "required"]),
        (["--weights", "w.pt", "--n", "0"], ["--n", "1 to"]),
        (["--weights", "w.pt", "--n", "-3"], ["--n", "1 to"]),
        (["--weights", "w.pt", "--n", "eight"], ["--n", "int", "eight"]),
        (["--weights", "w.pt", "--query", " "], ["--query", "words"]),
        (["--weights", "w.pt", "--query"], ["--query", "at least one"]),
        (["--weights", "w.pt", "--output", "matches.docx"], ["--output", ".png", "matches.docx"]),
        (["--weights", "w.pt", "--epochs", "2"], ["--epochs", "--help"]),
        (["--weight", "w.pt"], ["--weights", "required"]),
        (["--weights", "w.pt", "--out", "matches.png"], ["--out", "--help"]),
        (["--weights", "w.pt", "a dog"], ["a dog", "--help"]),
    ],
)
def test_the_search_refuses_with_one_line_and_status_two(
    arguments: list[str],
    flag_and_what_is_allowed: list[str],
    workdir: Path,
    capsys: pytest.CaptureFixture,
):
    assert_refused(search, arguments, flag_and_what_is_allowed, workdir, capsys)


def assert_refused(
    main, arguments: list[str], said: list[str], workdir: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed, error = capsys.readouterr()
    assert end.value.code == 2
    assert printed == ""
    assert error.count("\n") == 1 and error.endswith("\n")
    assert all(words in error for words in said), error
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        (Config, {"batch_size": 1}, "--batch-size"),
        (Config, {"temperature": float("nan")}, "--temperature"),
        (SearchConfig, {"weights": "w.pt", "n": 0}, "--n"),
    ],
)
def test_impossible_settings_are_refused_in_python_too(settings: type, values: dict, said: str):
    with pytest.raises(ValueError, match=said):
        settings(**values)


@pytest.mark.parametrize("settings", [Config(), SearchConfig(weights="w.pt")])
def test_settings_cannot_be_changed(settings: Config | SearchConfig):
    with pytest.raises(AttributeError):
        settings.device = "cpu"
