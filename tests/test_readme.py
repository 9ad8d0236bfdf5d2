"""The commands, links and names in the documents are right; long commands run in small."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
from conftest import ROOT, TINY, script
from PIL import Image
from timm.models._hub import save_for_hf
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

import inference
import trainer
from config import Config, SearchConfig, parse
from data import read_splits
from models import build_wordpiece_tokenizer

README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / ".github/CONTRIBUTING.md",
    ROOT / "tests/README.md",
    ROOT / "tests/benchmarks/README.md",
    ROOT / "tests/benchmarks/RESULTS.md",
]
PROGRAMS = ("benchmark", "comparison", "ablation")
SMALL = ["--epochs", "1", "--batch-size", "8", "--image-size", "32"]
SMALL += ["--num-workers", "0", "--device", "cpu"]
SMALL_ENCODERS = ["--image-encoder", "test_resnet", "--text-encoder", "distilbert"]
SMALL_ENCODERS += ["--no-pretrained", "--text-layers", "1", "--text-width", "64"]


def code_blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(*prefixes: str) -> list[str]:
    """The lines of all bash blocks of all documents that start with a prefix, each once."""
    lines: dict[str, None] = {}
    for document in DOCUMENTS:
        for block in code_blocks(document, "bash"):
            lines |= dict.fromkeys(block.splitlines())
    return [line for line in lines if line.startswith(prefixes)]


def value_of(flag: str, arguments: list[str], default: str) -> str:
    return arguments[arguments.index(flag) + 1] if flag in arguments else default


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, shapes: Path, trained: Path) -> Path:
    """A folder with a small version of every file that the commands name."""
    folder = tmp_path_factory.mktemp("readme")
    for data in ("data/flickr8k", "data/shapes", "path/to/flickr8k", "path/to/folder", "shapes"):
        shutil.copytree(shapes, folder / data)
    shutil.copytree(shapes / "Images", folder / "path/to/images")
    shutil.copy(shapes / "Images" / "00000.png", folder / "photo.jpg")
    (folder / "queries.txt").write_text("a red circle\na blue square\n")
    for run in ("clip", "mine", "demo", "small"):
        shutil.copytree(trained, folder / "runs" / run)
    save_encoders(folder / "path/to/timm-folder", folder / "path/to/transformers-folder")
    return folder


def save_encoders(timm_folder: Path, transformers_folder: Path) -> None:
    save_for_hf(timm.create_model("test_resnet"), timm_folder, safe_serialization=True)
    tokenizer = build_wordpiece_tokenizer(["a red circle at the top left"], max_length=32)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(transformers_folder)
    vocab_size = tokenizer.get_vocab_size()
    config = DistilBertConfig(vocab_size=vocab_size, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    DistilBertModel(config).save_pretrained(transformers_folder)


# ---------------------------------------------------------------- commands


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("python trainer.py"))
def test_training_commands(command: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    arguments = shlex.split(command)[2:]
    name = value_of("--name", arguments, "clip")
    if "--resume" in arguments:
        shutil.rmtree(workspace / "runs/clip")
        trainer.main([*SMALL, *SMALL_ENCODERS, "--data-dir", "data/shapes"])
        trainer.main(arguments)
    elif "--demo" in arguments:
        trainer.main([*arguments, *TINY])
        name = "demo"
    else:
        shutil.rmtree(workspace / "runs" / name, ignore_errors=True)
        encoders = [] if "path/to/timm" in command else SMALL_ENCODERS
        trainer.main([*arguments, *SMALL, *encoders])
    assert (workspace / "runs" / name / "test.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("torchrun "))
def test_torchrun_commands(command: str, workspace: Path) -> None:
    arguments = shlex.split(command.partition(" trainer.py")[2])
    name = value_of("--name", arguments, "clip")
    shutil.rmtree(workspace / "runs" / name, ignore_errors=True)
    done = script("trainer.py", *arguments, *SMALL, *SMALL_ENCODERS, cwd=workspace, processes=2)
    assert done.returncode == 0, done.stderr
    assert (workspace / "runs" / name / "test.json").exists()


@pytest.mark.parametrize("command", commands("python inference.py"))
def test_inference_commands(
    command: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(workspace)
    command, _, redirected = command.partition(" < ")
    text = Path(redirected).read_text() if redirected else ""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    arguments = shlex.split(command)[2:]
    if "--serve" in arguments:  # it would not return; see tests/test_page.py
        assert parse(SearchConfig, arguments).serve
        return
    output = Path(value_of("--output", arguments, "matches.png"))
    output.unlink(missing_ok=True)
    inference.main([*arguments, "--num-workers", "0", "--device", "cpu"])
    if "--evaluate" in arguments:
        assert "R@1" in capsys.readouterr().out
    else:
        assert output.stat().st_size > 0


def test_quick_start_installs_runs_and_tests() -> None:
    first, second = code_blocks(README, "bash")[:2]
    assert first.splitlines()[0] == "pip install -r requirements.txt"
    assert "python trainer.py --demo" in first
    assert second.splitlines()[0] == "pip install -r tests/requirements.txt"
    test_command = second.splitlines()[1]
    assert test_command in (ROOT / ".ci/run").read_text()


def test_other_commands_name_files_that_exist() -> None:
    known = ("python trainer.py", "python inference.py", "torchrun")
    others = [line for line in commands("") if not line.startswith(known)]
    allowed = ("pip install", "python -m pytest", "python tests/benchmarks/", "bash .ci/run")
    for command in others:
        assert re.sub(r"^CLIP_[A-Z]+=\d+ ", "", command).startswith(allowed), command
        for path in re.findall(r"[\w/-]+\.(?:txt|py)", command):
            assert (ROOT / path).is_file(), path


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_measuring_commands_use_flags_that_exist(program: str) -> None:
    help_text = script(f"tests/benchmarks/{program}.py", "--help", cwd=ROOT).stdout
    found = commands(f"python tests/benchmarks/{program}.py")
    assert found
    for command in found:
        for flag in re.findall(r"--[\w-]+", command.partition(" --settings ")[0]):
            assert f"{flag} " in help_text


@pytest.mark.slow
def test_ablation_command_prints_a_row_per_change(workspace: Path) -> None:
    (command,) = commands("python tests/benchmarks/ablation.py")
    arguments, settings = (shlex.split(part) for part in command.split(" --settings "))
    changes = ["recipe", "EMA of the weights 0.99", "two captions per image"]
    program = [str(ROOT / arguments[1]), *arguments[2:], "--only", *changes]
    done = script(*program, "--settings", *settings, *SMALL, cwd=workspace)
    rows = done.stdout.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {change}" for change in changes]


@pytest.mark.slow
def test_comparison_command_scores_our_checkpoints(workspace: Path) -> None:
    (command,) = [line for line in commands("python tests") if "--weights runs/small" in line]
    command = re.sub(r" --(open-clip-lr|tutorial-times) \S+", "", command)
    command = re.sub(r" runs/seed\d/best.pt", "", command)
    done = script(*shlex.split(command)[1:], "--image-size", "32", cwd=workspace)
    recall = json.loads((workspace / "runs/small/test.json").read_text())["t2i_r10"]
    assert done.stdout.splitlines()[2].startswith("| trainer.py |")
    assert f" / {recall:.1f} | " in done.stdout


def test_python_example_runs(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(workspace)
    (program,) = code_blocks(README, "python")
    exec(program, {})
    assert capsys.readouterr().out.count(".png") == 3


def test_flags_of_the_recipes_exist() -> None:
    recipes = re.findall(r"^\| .* \| `(--[^`]+)`", README.read_text(), re.MULTILINE)
    assert len(recipes) > 5
    for flags in recipes:
        if flags != "--data-dir":
            assert parse(Config, shlex.split(flags)) != Config()


def test_example_of_own_data_is_read(tmp_path: Path) -> None:
    (example,) = [block for block in code_blocks(README, "text") if block.startswith("image,")]
    rows = example + "".join(f"{i}.jpg,caption {i}\n" for i in range(10))
    (tmp_path / "captions.txt").write_text(rows)
    for name in {line.split(",")[0] for line in rows.splitlines()[1:]}:
        path = tmp_path / "Images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    captions = {}
    for split in read_splits(tmp_path).values():
        for path, texts in zip(split.paths, split.captions):
            captions[path.name] = texts
    assert captions["cat.jpg"] == ["a gray cat asleep on a sofa", "a cat, curled up, on cushions"]
    assert len(captions["beach 1.png"]) == 2


# ---------------------------------------------------------------- references


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", document.read_text()):
        assert (document.parent / target).is_file(), target


def test_names_of_functions_are_in_the_files_given() -> None:
    references = re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in `(\w+\.py)`", README.read_text())
    assert len(references) > 10
    for names, file in references:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"(class|def) {name.split('.')[-1]}\b", source), (name, file)


def test_ablations_of_the_method_table_exist() -> None:
    program = (ROOT / "tests/benchmarks/ablation.py").read_text()
    rows = re.findall(r"^\| .* \| `[^|]+\.py` \| `([^`]+)` \|$", README.read_text(), re.MULTILINE)
    assert len(rows) > 4
    for change in rows:
        assert f'"{change}"' in program, change


def test_guarantees_name_tests_that_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", (ROOT / "tests/README.md").read_text())
    assert len(names) > 15
    for name in names:
        assert f"def {name}(" in sources or (ROOT / f"tests/{name}.py").is_file(), name
