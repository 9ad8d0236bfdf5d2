"""Every command that the README shows is read from it and run, the long ones with tiny settings."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
from conftest import ROOT, TINY, script
from timm.models._hub import save_for_hf
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

import inference
import trainer
from models import build_wordpiece_tokenizer

README = (ROOT / "README.md").read_text()
PROGRAMS = ("benchmark", "comparison", "ablation")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
SMALL = [
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--image-size",
    "32",
    "--num-workers",
    "0",
    "--device",
    "cpu",
]
SMALL_ENCODERS = [
    "--image-encoder",
    "test_resnet",
    "--text-encoder",
    "distilbert",
    "--no-pretrained",
]
SMALL_ENCODERS += ["--text-layers", "1", "--text-width", "64"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shapes: Path, trained: Path) -> Path:
    """A folder in which all that the README's commands name is there, in small."""
    place = tmp_path_factory.mktemp("readme")
    for data in ("data/flickr8k", "data/shapes", "path/to/flickr8k", "path/to/folder"):
        shutil.copytree(shapes, place / data)
    shutil.copytree(shapes / "Images", place / "path/to/pictures")
    shutil.copy(shapes / "Images" / "00000.png", place / "photo.jpg")
    (place / "queries.txt").write_text("a red circle\na blue square\n")
    for run in ("clip", "mine", "demo", "standins"):
        shutil.copytree(trained, place / "runs" / run)
    save_folders(place / "path/to/timm-folder", place / "path/to/transformers-folder")
    return place


def save_folders(for_timm: Path, for_transformers: Path) -> None:
    save_for_hf(timm.create_model("test_resnet"), for_timm, safe_serialization=True)
    pieces = build_wordpiece_tokenizer(["a red circle at the top left"], max_length=32)
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(tokenizer_object=pieces, **named).save_pretrained(for_transformers)
    config = DistilBertConfig(
        vocab_size=pieces.get_vocab_size(), dim=32, n_layers=1, n_heads=2, hidden_dim=64
    )
    DistilBertModel(config).save_pretrained(for_transformers)


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if line.startswith("python trainer.py")]
)
def test_each_training_command_trains(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    arguments = shlex.split(command)[2:]
    name = arguments[arguments.index("--name") + 1] if "--name" in arguments else "clip"
    if "--resume" in arguments:
        shutil.rmtree(place / "runs/clip")
        trainer.main([*SMALL, *SMALL_ENCODERS, "--data-dir", "data/shapes"])
        trainer.main(arguments)
    elif "--demo" in arguments:
        trainer.main([*arguments, *TINY])
        name = "demo"
    else:
        shutil.rmtree(place / "runs" / name, ignore_errors=True)
        trainer.main([*arguments, *SMALL, *([] if "path/to/timm" in command else SMALL_ENCODERS)])
    assert (place / "runs" / name / "test.json").exists()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("torchrun ")])
def test_each_command_for_several_processes_trains(command: str, place: Path) -> None:
    arguments = shlex.split(command.partition(" trainer.py")[2])
    name = arguments[arguments.index("--name") + 1] if "--name" in arguments else "clip"
    shutil.rmtree(place / "runs" / name, ignore_errors=True)
    done = script("trainer.py", *arguments, *SMALL, *SMALL_ENCODERS, cwd=place, processes=2)
    assert done.returncode == 0, done.stderr
    assert (place / "runs" / name / "test.json").exists()


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if line.startswith("python inference.py")]
)
def test_each_search_command_answers(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    command, _, redirected = command.partition(" < ")
    monkeypatch.setattr(
        "sys.stdin", io.StringIO(Path(redirected).read_text() if redirected else "")
    )
    arguments = shlex.split(command)[2:]
    output = Path(
        arguments[arguments.index("--output") + 1] if "--output" in arguments else "matches.png"
    )
    output.unlink(missing_ok=True)
    inference.main([*arguments, "--num-workers", "0", "--device", "cpu"])
    assert (
        "R@1" in capsys.readouterr().out if "--evaluate" in arguments else output.stat().st_size > 0
    )


def test_the_other_commands_install_what_is_here() -> None:
    others = [
        line
        for line in COMMANDS
        if not re.match(r"(python|torchrun .*) (trainer|inference)\.py", line)
    ]
    assert others[:2] == [
        "pip install -r requirements.txt",
        "pip install -r tests/requirements.txt",
    ]
    ours = (
        "python -m pytest tests",
        "tests/requirements",
        "tests/benchmarks/requirements",
        *(f"tests/benchmarks/{program}.py" for program in PROGRAMS),
    )
    for command in others[2:]:
        assert any(known in command for known in ours)
    for path in re.findall(r"[\w/-]+\.txt", " ".join(others)):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_measurement_knows_the_flags_of_its_commands(program: str) -> None:
    commands = [
        line for line in COMMANDS if line.startswith(f"python tests/benchmarks/{program}.py")
    ]
    assert commands
    help = script(f"tests/benchmarks/{program}.py", "--help", cwd=ROOT).stdout
    for command in commands:
        for flag in re.findall(r"--[\w-]+", command.partition(" --settings ")[0]):
            assert f"{flag} " in help


def test_the_ablation_has_a_row_for_each_change(place: Path) -> None:
    (command,) = [
        line for line in COMMANDS if line.startswith("python tests/benchmarks/ablation.py")
    ]
    arguments, settings = (shlex.split(part) for part in command.split(" --settings "))
    changes = ["recipe", "mean of weights", "two captions a picture"]
    program = (
        str(ROOT / arguments[1]),
        *arguments[2:],
        "--only",
        *changes,
        "--settings",
        *settings,
        *SMALL,
    )
    done = script(*program, cwd=place)
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]] == [
        f"| {change}" for change in changes
    ]


def test_the_comparison_has_a_row_for_weights_of_ours(place: Path) -> None:
    (command,) = [line for line in COMMANDS if "--weights runs/standins" in line]
    command = re.sub(r" --(open-clip-lr|tutorial-times) \S+", "", command)
    done = script(*shlex.split(command)[1:], "--image-size", "32", cwd=place)
    recall = json.loads((place / "runs/standins/test.json").read_text())["t2i_r10"]
    assert done.stdout.splitlines()[2].startswith("| trainer.py |")
    assert f" / {recall:.1f} | " in done.stdout


def test_the_program_of_ones_own_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    (program,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out.count(".png") == 3


def test_the_example_of_own_data_is_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from PIL import Image

    from data import read_splits

    (example,) = re.findall(r"^```text\n(image,caption\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    more = "".join(f"{i}.jpg,caption {i}\n" for i in range(10))
    (tmp_path / "captions.txt").write_text(example + more)
    for name in {line.split(",")[0] for line in (example + more).splitlines()[1:]}:
        (tmp_path / "Images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "Images" / name)
    splits = read_splits(tmp_path)
    captions = {
        path.name: texts
        for split in splits.values()
        for path, texts in zip(split.paths, split.captions)
    }
    assert captions["cat.jpg"] == ["a grey cat asleep on a sofa", "a cat, curled up, on cushions"]
    assert len(captions["beach 1.png"]) == 2


def test_every_file_that_is_linked_is_here() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_every_name_in_the_reading_table_is_in_its_file() -> None:
    for row in re.findall(r"^\| .* \| `.*` in `\w+\.py` \|$", README, re.MULTILINE):
        *names, file = re.findall(r"`([^`]+)`", row.split("|")[2])
        for name in names:
            assert re.search(rf"(class|def) {name.split('.')[-1]}\b", (ROOT / file).read_text()), (
                name,
                file,
            )
