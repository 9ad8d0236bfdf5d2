"""The embedding index, `Searcher`, and the command line of inference.py."""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import error_message, script
from PIL import Image

import inference
from config import UserError
from inference import METRICS, RECALLS, Match, Searcher, format_metrics, main, plot_matches
from models import load_checkpoint

FLAGS = ["--num-workers", "0", "--device", "cpu"]
QUERIES = ["a large red circle at the top left", "one blue square, small, in the bottom right"]


@pytest.fixture
def checkpoint(trained: Path, workdir: Path) -> Path:
    """A copy of best.pt in the current directory, without an index."""
    return Path(shutil.copy(trained / "best.pt", workdir / "best.pt"))


@pytest.fixture
def image_dir(shapes: Path, workdir: Path) -> Path:
    """A folder of ten images, one of them in a subfolder."""
    folder = workdir / "images"
    (folder / "more").mkdir(parents=True)
    sources = sorted((shapes / "Images").iterdir())[:10]
    for source in sources[:9]:
        shutil.copy(source, folder)
    shutil.copy(sources[9], folder / "more")
    return folder


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were encoded since the list was last cleared."""
    names: list[str] = []
    original = inference.encode_images

    def encode_images(tower: Callable, paths: list[Path], *rest: object) -> tuple:
        names.extend(path.name for path in paths)
        return original(tower, paths, *rest)

    monkeypatch.setattr(inference, "encode_images", encode_images)
    return names


# ---------------------------------------------------------------- search and its index


def search(checkpoint: Path, image_dir: Path | str, n: int = 100) -> list[list[Match]]:
    """The results of a new `Searcher` for `QUERIES`."""
    return Searcher(checkpoint, "cpu", 0).search(QUERIES, str(image_dir), n)


def paths_of(matches: list[Match]) -> list[Path]:
    return [match.path for match in matches]


def assert_same_matches(ours: list[Match], theirs: list[Match]) -> None:
    """The same order, and the same cosines up to rounding."""
    assert paths_of(ours) == paths_of(theirs)
    expected = [match.score for match in theirs]
    assert [match.score for match in ours] == pytest.approx(expected, abs=1e-5)


def test_search_ranks_each_image_once_by_cosine(checkpoint: Path, image_dir: Path) -> None:
    for query, matches in zip(QUERIES, search(checkpoint, image_dir), strict=True):
        assert {match.query for match in matches} == {query}
        assert [match.rank for match in matches] == list(range(1, 11))
        scores = [match.score for match in matches]
        assert scores == sorted(scores, reverse=True)
        assert all(-1.001 <= score <= 1.001 for score in scores)
        assert sorted(paths_of(matches)) == sorted(image_dir.rglob("*.png"))


def test_search_is_repeatable_and_reuses_the_index(
    checkpoint: Path, image_dir: Path, encoded: list[str]
) -> None:
    """Also if the folder is given as a relative path."""
    first = search(checkpoint, image_dir)
    assert len(encoded) == 10
    encoded.clear()
    assert search(checkpoint, image_dir) == first
    relative = search(checkpoint, os.path.relpath(image_dir))
    for matches, expected in zip(relative, first, strict=True):
        assert paths_of(matches) == [Path(os.path.relpath(match.path)) for match in expected]
        ranks_and_scores = [(match.rank, match.score) for match in matches]
        assert ranks_and_scores == [(match.rank, match.score) for match in expected]
    assert encoded == []


def test_search_results_do_not_depend_on_other_queries(checkpoint: Path, image_dir: Path) -> None:
    searcher = Searcher(checkpoint, "cpu", 0)
    together = searcher.search(QUERIES, str(image_dir), 3)
    for query, matches in zip(QUERIES, together, strict=True):
        (alone,) = searcher.search([query], str(image_dir), 3)
        assert_same_matches(alone, matches)


def test_index_encodes_only_new_and_changed_images(
    checkpoint: Path, image_dir: Path, encoded: list[str]
) -> None:
    """The results are those of a complete rebuild."""
    search(checkpoint, image_dir)
    names = sorted(path.name for path in image_dir.rglob("*.png"))
    encoded.clear()
    Image.new("RGB", (90, 90), "red").save(image_dir / names[2])
    Image.new("RGB", (90, 90), "blue").save(image_dir / "new.png")
    (image_dir / names[4]).unlink()
    updated = search(checkpoint, image_dir)
    assert sorted(encoded) == sorted([names[2], "new.png"])
    assert set(paths_of(updated[0])) == set(image_dir.rglob("*.png"))
    shutil.rmtree(checkpoint.with_suffix(".index"))
    for matches, expected in zip(updated, search(checkpoint, image_dir), strict=True):
        assert_same_matches(matches, expected)


def test_index_notices_a_changed_image_of_equal_file_size(
    checkpoint: Path, image_dir: Path, encoded: list[str]
) -> None:
    image = image_dir / "flat.bmp"
    Image.new("RGB", (90, 90), "red").save(image)
    search(checkpoint, image_dir)
    encoded.clear()
    Image.new("RGB", (90, 90), "blue").save(image)
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1_000_000_000))
    search(checkpoint, image_dir)
    assert encoded == ["flat.bmp"]


def test_index_drops_a_removed_image_without_encoding(
    checkpoint: Path, image_dir: Path, encoded: list[str]
) -> None:
    first = paths_of(search(checkpoint, image_dir)[0])
    encoded.clear()
    first[0].unlink()
    assert paths_of(search(checkpoint, image_dir)[0]) == first[1:]
    assert encoded == []


def test_index_is_kept_for_each_folder(
    checkpoint: Path, image_dir: Path, encoded: list[str]
) -> None:
    other = Path(shutil.copytree(image_dir, image_dir.with_name("other")))
    (other / "more").rename(other / "less")
    for folder in (image_dir, other):
        search(checkpoint, folder)
    assert len(encoded) == 20
    encoded.clear()
    for folder in (image_dir, other, image_dir):
        paths = paths_of(search(checkpoint, folder)[0])
        assert all(path.is_relative_to(folder) for path in paths)
    assert encoded == []


def test_index_is_rebuilt_for_another_checkpoint_of_equal_name(
    checkpoint: Path, image_dir: Path, encoded: list[str]
) -> None:
    before = search(checkpoint, image_dir)
    content = torch.load(checkpoint, weights_only=True)
    name = "image.head.projection.weight"
    content["model"][name] = content["model"][name].flip(0)
    torch.save(content, checkpoint)
    encoded.clear()
    after = search(checkpoint, image_dir)
    assert len(encoded) == 10
    assert before != after
    encoded.clear()
    assert search(checkpoint, image_dir) == after
    assert encoded == []


def array_in(index: Path) -> Path:
    (path,) = index.glob("*.npy")
    return path


def listing_in(index: Path) -> Path:
    (path,) = index.glob("*.json")
    return path


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def change_array(index: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = array_in(index)
    np.save(path, change(np.load(path)))


def with_nan(embeddings: np.ndarray) -> np.ndarray:
    embeddings[3] = np.nan
    return embeddings


def swap_two_images(index: Path) -> None:
    path = listing_in(index)
    content = json.loads(path.read_text())
    images = content["images"]
    images[0], images[1] = images[1], images[0]
    path.write_text(json.dumps(content))


DAMAGES = {
    "array empty": lambda index: truncate(array_in(index), 0),
    "array truncated in its header": lambda index: truncate(array_in(index), 20),
    "array truncated": lambda index: truncate(array_in(index), 1000),
    "array is text": lambda index: array_in(index).write_text("not an array"),
    "array missing": lambda index: array_in(index).unlink(),
    "array with NaN": lambda index: change_array(index, with_nan),
    "array without last row": lambda index: change_array(index, lambda rows: rows[:-1]),
    "array without last column": lambda index: change_array(index, lambda rows: rows[:, :-1]),
    "array of float64": lambda index: change_array(index, lambda rows: rows.astype(np.float64)),
    "array of objects": lambda index: change_array(index, lambda rows: rows.astype(object)),
    "list empty": lambda index: truncate(listing_in(index), 0),
    "list truncated": lambda index: truncate(listing_in(index), 100),
    "list is not UTF-8": lambda index: listing_in(index).write_bytes(b"\xff\xfe\xff"),
    "list is a JSON array": lambda index: listing_in(index).write_text("[]"),
    "list is null": lambda index: listing_in(index).write_text("null"),
    "list edited": swap_two_images,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_index_is_rebuilt_with_a_message_when_damaged(
    damage: Callable[[Path], None],
    checkpoint: Path,
    image_dir: Path,
    encoded: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = search(checkpoint, image_dir)
    damage(checkpoint.with_suffix(".index"))
    encoded.clear()
    capsys.readouterr()
    assert search(checkpoint, image_dir) == expected
    assert len(encoded) == 10
    assert re.search(r"best\.index.*is damaged and built again", capsys.readouterr().out)
    encoded.clear()
    assert search(checkpoint, image_dir) == expected
    assert encoded == []


@pytest.mark.parametrize("constant", ["EVAL_SCALE", "DECODING", "NNN_K", "NNN_ALPHA"])
def test_index_is_rebuilt_for_another_way_of_encoding(
    constant: str,
    checkpoint: Path,
    image_dir: Path,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search(checkpoint, image_dir)
    encoded.clear()
    monkeypatch.setattr(inference, constant, getattr(inference, constant) + 1)
    search(checkpoint, image_dir)
    assert len(encoded) == 10


def test_search_works_where_no_index_can_be_saved(
    checkpoint: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = search(checkpoint, image_dir)
    shutil.rmtree(checkpoint.with_suffix(".index"))
    checkpoint.with_suffix(".index").write_text("a file, not a folder")
    assert search(checkpoint, image_dir) == expected
    assert "the index is not saved: " in capsys.readouterr().out


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can write to every folder"
)
def test_search_works_in_a_read_only_folder(checkpoint: Path, image_dir: Path) -> None:
    checkpoint.parent.chmod(0o555)
    try:
        assert len(search(checkpoint, image_dir)[0]) == 10
    finally:
        checkpoint.parent.chmod(0o755)


def test_search_skips_counts_and_names_unreadable_images(
    checkpoint: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each search, because they are not in the index."""
    (image_dir / "broken.jpg").write_text("no image")
    (image_dir / "dangling.png").symlink_to("nowhere.png")
    complete = min(image_dir.glob("*.png"))
    (image_dir / "truncated.png").write_bytes(complete.read_bytes()[:200])
    for _ in range(2):
        results = search(checkpoint, image_dir)
        stdout = capsys.readouterr().out
        assert "skipped 3 of 13 images:" in stdout
        for name in ("broken.jpg", "dangling.png", "truncated.png"):
            assert name in stdout
        assert len(results[0]) == 10


def test_encode_images_is_the_same_with_a_kept_loader(checkpoint: Path, image_dir: Path) -> None:
    """To the last bit, with a worker, twice, and where images of a batch cannot be read."""
    searcher = Searcher(checkpoint, "cpu", 0)
    tower, device = searcher.image_tower, torch.device("cpu")
    paths = sorted(image_dir.glob("*.png"))
    for index in (0, 4, len(paths) - 1):
        paths[index].write_text("no image")
    expected, expected_errors = inference.encode_images(tower, paths, searcher.config, device)
    assert list(expected_errors) == [0, 4, len(paths) - 1]
    assert len(expected) == len(paths) - 3
    config = replace(searcher.config, num_workers=1)
    loader = inference.build_image_loader(tower, paths, config, device)
    for _ in range(2):
        found, errors = inference.encode_images(tower, paths, config, device, loader)
        assert torch.equal(found, expected)
        assert {i: str(e) for i, e in errors.items()} == {
            i: str(e) for i, e in expected_errors.items()
        }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_encode_images_counts_errors_over_batches(
    checkpoint: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Also where no image of a batch can be read."""
    searcher = Searcher(checkpoint, "cpu", 0)
    tower, device = searcher.image_tower, torch.device("cpu")
    paths = sorted(image_dir.glob("*.png"))[:8]
    expected, _ = inference.encode_images(tower, paths, searcher.config, device)
    broken = [0, 1, 2, 5]
    for index in broken:
        paths[index].write_text("no image")
    monkeypatch.setattr(inference, "ENCODE_BATCH", batch_size)
    found, errors = inference.encode_images(tower, paths, searcher.config, device)
    assert list(errors) == broken
    for index, error in errors.items():
        assert paths[index].name in str(error)
    readable = [index for index in range(8) if index not in broken]
    torch.testing.assert_close(found, expected[readable])


@pytest.mark.parametrize(("num_workers", "expected"), [(-1, 0), (0, 0), (1, 1)])
def test_search_on_cpu_starts_no_worker_by_default(
    checkpoint: Path,
    image_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    expected: int,
) -> None:
    passed = []
    original = inference.build_loader

    def build_loader(dataset: object, num_workers: int, *rest: object, **options: object) -> object:
        passed.append(num_workers)
        return original(dataset, 0, *rest, **options)

    monkeypatch.setattr(inference, "build_loader", build_loader)
    searcher = Searcher(checkpoint, device="cpu", num_workers=num_workers)
    searcher.search(["a red circle"], str(image_dir))
    assert passed == [expected]


@pytest.mark.parametrize("content", [{}, {"notes.txt": "no image"}, {"broken.jpg": "no image"}])
def test_search_rejects_a_folder_without_readable_images(
    content: dict[str, str], checkpoint: Path, workdir: Path
) -> None:
    (workdir / "empty").mkdir()
    for name, text in content.items():
        (workdir / "empty" / name).write_text(text)
    with pytest.raises(UserError, match=r"empty: .*image"):
        search(checkpoint, "empty")


def test_search_rejects_a_missing_folder(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="--images no/such: "):
        search(checkpoint, "no/such")


# ---------------------------------------------------------------- output and command line


def run(checkpoint: Path, *arguments: object) -> None:
    """Runs the command with these arguments on the CPU."""
    main(["--weights", str(checkpoint), *map(str, arguments), *FLAGS])


def run_error(checkpoint: Path, *arguments: object) -> str:
    """The one line of the error with which the command ends."""
    return error_message(main, "--weights", checkpoint, *arguments, *FLAGS)


def query_flags(queries: list[str]) -> list[str]:
    flags = []
    for query in queries:
        flags += ["--query", query]
    return flags


def parse_matches(stdout: str) -> list[tuple[int, float, str]]:
    """Rank, score, and path or text of each match."""
    rows = re.findall(r"^ *(\d+) +(-?\d\.\d{3})  (\S.*)$", stdout, re.MULTILINE)
    return [(int(rank), float(score), name) for rank, score, name in rows]


@pytest.mark.parametrize(
    ("n", "num_shown", "queries"),
    [
        (1, 1, QUERIES[:1]),
        (3, 3, QUERIES[:1]),
        (8, 8, [*QUERIES, "$x_1^2$ <&> ü " + "long " * 99]),
        (25, 10, QUERIES),
    ],
)
def test_command_prints_and_plots_n_matches_of_each_query(
    n: int,
    num_shown: int,
    queries: list[str],
    checkpoint: Path,
    image_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(checkpoint, "--images", image_dir, "--n", n, *query_flags(queries))
    stdout = capsys.readouterr().out
    expected = []
    for matches in Searcher(checkpoint, "cpu", 0).search(queries, str(image_dir), n):
        assert [match.rank for match in matches] == list(range(1, num_shown + 1))
        expected += [(match.rank, round(match.score, 3), str(match.path)) for match in matches]
    assert len(expected) == num_shown * len(queries)
    assert parse_matches(stdout) == expected
    for query in queries:
        assert f"\n{query}\n" in stdout
    with Image.open("matches.png") as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 150
        assert len(set(figure.convert("L").resize((50, 50)).tobytes())) > 5


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 25])
def test_plot_matches_shows_rank_score_name_and_query(
    n: int, num_queries: int, shapes: Path, workdir: Path
) -> None:
    paths = sorted((shapes / "Images").iterdir())[:n]
    results = []
    for index in range(num_queries):
        query = f"query {index}"
        scores = [0.9 - i / 100 for i in range(len(paths))]
        matches = zip(scores, paths)
        results.append([Match(query, i, s, s, p) for i, (s, p) in enumerate(matches, start=1)])
    figure = plot_matches(results)
    blocks = figure.subfigs or [figure]
    assert [block.get_suptitle() for block in blocks] == [row[0].query for row in results]
    for matches, block in zip(results, blocks, strict=True):
        titles = [ax.get_title() for ax in block.axes if ax.images]
        expected = [f"{match.rank}.  {match.score:.3f}\n{match.path.name}" for match in matches]
        assert titles == expected
        assert len(block.axes) < n + 8  # few empty cells


def test_command_without_query_uses_the_example_query(
    checkpoint: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(checkpoint, "--images", image_dir)
    assert f"\n{load_checkpoint(checkpoint).example_query}\n" in capsys.readouterr().out


def test_command_without_images_ranks_the_test_split(
    trained: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained.parent.parent)
    checkpoint = Path(shutil.copy(trained / "last.pt", tmp_path / "last.pt"))
    run(checkpoint, "--n", 100, "--output", tmp_path / "grid.png")
    names = [Path(path).name for *_, path in parse_matches(capsys.readouterr().out)]
    test_images = (shapes / "Flickr_8k.testImages.txt").read_text().split()
    assert sorted(names) == sorted(test_images)


def test_command_without_images_and_data_set_names_the_flag(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = checkpoint.parent / "far" / "away"
    far.mkdir(parents=True)
    monkeypatch.chdir(far)
    assert "--images" in run_error(checkpoint)


def test_command_evaluate_prints_the_test_metrics_of_training(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.parent.parent)
    run(trained / "best.pt", "--evaluate")
    metrics = json.loads((trained / "test.json").read_text())
    stdout = capsys.readouterr().out
    assert metrics.keys() >= set(METRICS)
    assert format_metrics(metrics) in stdout
    for name in RECALLS:
        assert f"{metrics[name]:.1f}" in stdout


@pytest.mark.parametrize("output", ["no/such/folder/grid.png", "grid.png/inside.png"])
def test_command_rejects_an_output_that_cannot_be_written(
    output: str, checkpoint: Path, image_dir: Path
) -> None:
    Path("grid.png").write_text("a file")
    assert output in run_error(checkpoint, "--images", image_dir, "--output", output)


@pytest.mark.parametrize(
    "output", ["found.PNG", "found.jpg", "found.pdf", "found.csv", "found.CSV"]
)
def test_command_output_format_follows_the_suffix(
    output: str, checkpoint: Path, image_dir: Path
) -> None:
    """In upper or lower case."""
    run(checkpoint, "--images", image_dir, "--n", 2, "--output", output)
    first_bytes = {".png": b"\x89PNG", ".jpg": b"\xff\xd8", ".pdf": b"%PDF", ".csv": b"query,rank,"}
    suffix = Path(output).suffix.lower()
    assert Path(output).read_bytes().startswith(first_bytes[suffix])


def test_command_ranks_texts_for_an_image(
    checkpoint: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By probabilities, which add up to one."""
    image = next(image_dir.glob("*.png"))
    texts = [*QUERIES, "a green diamond"]
    run(checkpoint, "--image", image, *query_flags(texts))
    ranks, probabilities, ranked_texts = zip(*parse_matches(capsys.readouterr().out))
    assert ranks == (1, 2, 3)
    assert sorted(ranked_texts) == sorted(texts)
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=0.002)
    assert Path("matches.png").stat().st_size > 5000


def test_command_reads_queries_from_stdin(
    checkpoint: Path,
    image_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One per line, without the empty lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUERIES[0]}\n\n{QUERIES[1]}\n"))
    run(checkpoint, "--images", image_dir, "--n", 2, "--query", "-")
    stdout = capsys.readouterr().out
    assert len(parse_matches(stdout)) == 4
    for query in QUERIES:
        assert f"\n{query}\n" in stdout


def test_figure_has_the_first_queries_and_a_table_has_all(
    checkpoint: Path,
    image_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So that a thousand queries do not take minutes, for an image that cannot be read."""
    monkeypatch.setattr(inference, "MAX_PLOTTED", 1)
    flags = ["--images", image_dir, "--n", 2]
    run(checkpoint, *flags, "--query", QUERIES[0], "--output", "one.png")
    assert "the figure has" not in capsys.readouterr().out
    both = [*flags, "--query", QUERIES[0], "--query", QUERIES[1]]
    run(checkpoint, *both, "--output", "both.png")
    stdout = capsys.readouterr().out
    assert "the figure has the first 1 queries; --output matches.csv has all" in stdout
    assert len(parse_matches(stdout)) == 4
    assert Path("both.png").read_bytes() == Path("one.png").read_bytes()
    run(checkpoint, *both, "--output", "both.csv")
    assert "the figure has" not in capsys.readouterr().out
    assert len(pd.read_csv("both.csv")) == 4


def test_command_reads_texts_for_an_image_from_stdin(
    checkpoint: Path,
    image_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(QUERIES)))
    run(checkpoint, "--image", next(image_dir.glob("*.png")), "--query", "-")
    texts = [text for *_, text in parse_matches(capsys.readouterr().out)]
    assert sorted(texts) == sorted(QUERIES)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="search"),
        pytest.param(["--evaluate"], id="evaluate"),
        pytest.param(["--image", "image.png"], id="texts for an image"),
    ],
)
def test_command_reports_a_missing_data_set(
    flags: list[str], checkpoint: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, where the test split is required."""
    far = image_dir.parent / "far" / "away"
    far.mkdir(parents=True)
    shutil.copy(next(image_dir.glob("*.png")), far / "image.png")
    monkeypatch.chdir(far)
    message = run_error(checkpoint, *flags)
    assert re.match(r"error: \S+, the data set of the training, is not here", message)


@pytest.mark.slow
def test_command_works_without_a_display(
    checkpoint: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["--weights", "best.pt", "--images", "images", *FLAGS]
    process = script("inference.py", *arguments, cwd=image_dir.parent)
    assert process.returncode == 0, process.stderr
    assert Path("matches.png").stat().st_size > 5000
    assert len(parse_matches(process.stdout)) == 8


# ---------------------------------------------------------------- hub correction


@pytest.fixture
def corrected(checkpoint: Path) -> Path:
    """`checkpoint` with references, as a run on 1,000 or more training images has them."""
    content = torch.load(checkpoint, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, content["config"]["projection_dim"], generator=generator)
    vectors = torch.nn.functional.normalize(vectors, dim=-1).half()
    content["references"] = {"images": vectors, "texts": vectors.flip(0)}
    torch.save(content, checkpoint)
    return checkpoint


def test_search_subtracts_the_bias_of_each_image(corrected: Path, image_dir: Path) -> None:
    searcher = Searcher(corrected, "cpu", 0)
    paths, embeddings = searcher.index_images(image_dir)
    bias = inference.hub_bias(embeddings, searcher.checkpoint.references.texts)
    cosines = searcher.encode_texts(QUERIES) @ embeddings.T
    for i, matches in enumerate(searcher.search(QUERIES, image_dir, 100)):
        assert len(matches) == len(paths)
        assert matches == sorted(matches, key=lambda match: -match.score)
        for match in matches:
            index = paths.index(match.path)
            assert match.cosine == pytest.approx(cosines[i, index].item(), abs=1e-5)
            assert match.score == pytest.approx(match.cosine - bias[index].item(), abs=1e-5)


def test_search_without_nnn_ranks_by_cosine(
    corrected: Path, image_dir: Path, encoded: list[str]
) -> None:
    """As a checkpoint without references, and with the same index."""
    with_bias = search(corrected, image_dir)
    encoded.clear()
    searcher = Searcher(corrected, "cpu", 0, nnn=False)
    for matches, others in zip(searcher.search(QUERIES, image_dir, 100), with_bias, strict=True):
        assert [match.score for match in matches] == [match.cosine for match in matches]
        ours = {match.path: match.cosine for match in matches}
        for match in others:
            assert ours[match.path] == pytest.approx(match.cosine, abs=1e-5)
    assert encoded == []


def test_search_without_references_has_no_bias(checkpoint: Path, image_dir: Path) -> None:
    for matches in search(checkpoint, image_dir):
        assert [match.score for match in matches] == [match.cosine for match in matches]
    (array,) = (checkpoint.with_suffix(".index")).glob("*.npy")
    assert np.load(array).shape == (10, Searcher(checkpoint).config.projection_dim)


@pytest.mark.parametrize("flags", [[], ["--no-nnn"]])
def test_command_prints_score_and_cosine(
    flags: list[str], corrected: Path, image_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    run(corrected, "--images", image_dir, "--query", QUERIES[0], *flags)
    header = "rank  cosine  image" if flags else "rank   score  cosine  image"
    assert header in capsys.readouterr().out.splitlines()


def test_similar_has_no_hub_correction(corrected: Path, image_dir: Path) -> None:
    searcher = Searcher(corrected, "cpu", 0)
    assert searcher.nnn
    image = min(image_dir.glob("*.png"))
    paths, embeddings = searcher.index_images(image_dir)
    cosines = (embeddings @ searcher.encode_images([image]).T)[:, 0]
    matches = searcher.similar(image, image_dir, 100)
    assert len(matches) == len(paths)
    for match in matches:
        assert match.score == match.cosine
        assert match.score == pytest.approx(cosines[paths.index(match.path)].item(), abs=1e-5)


def test_search_subtracts_the_bias_of_images_new_in_the_index(
    corrected: Path, image_dir: Path
) -> None:
    search(corrected, image_dir)
    Image.new("RGB", (90, 90), "blue").save(image_dir / "new.png")
    updated = search(corrected, image_dir)
    shutil.rmtree(corrected.with_suffix(".index"))
    for matches, expected in zip(updated, search(corrected, image_dir), strict=True):
        assert_same_matches(matches, expected)


@pytest.mark.parametrize("flags", [[], ["--no-nnn"]])
def test_evaluate_prints_the_metrics_with_hub_correction(
    flags: list[str], corrected: Path, shapes: Path, capsys: pytest.CaptureFixture
) -> None:
    run(corrected, "--data-dir", shapes, "--evaluate", *flags)
    assert ("with hub correction: " in capsys.readouterr().out) == (not flags)


# ---------------------------------------------------------------- similar images, the Python API


def test_similar_ranks_the_image_itself_first(
    checkpoint: Path, image_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    image = sorted(image_dir.glob("*.png"))[3]
    matches = Searcher(checkpoint, "cpu", 0).similar(image, image_dir, 4)
    assert matches[0].path == image
    assert matches[0].score == pytest.approx(1, abs=1e-4)
    assert len(matches) == 4
    run(checkpoint, "--like", image, "--images", image_dir, "--n", "4")
    assert [path for *_, path in parse_matches(capsys.readouterr().out)] == [
        str(match.path) for match in matches
    ]


def test_searcher_takes_paths_and_pil_images(checkpoint: Path, image_dir: Path) -> None:
    searcher = Searcher(checkpoint, "cpu", 0)
    path = sorted(image_dir.glob("*.png"))[0]
    with Image.open(path) as image:
        assert torch.equal(searcher.encode_images([image]), searcher.encode_images([str(path)]))
        ours = searcher.classify(image, QUERIES)
        assert searcher.similar(image, image_dir, 1)[0].path == path
    theirs = searcher.classify(path, QUERIES)
    assert [match.score for match in ours] == [match.score for match in theirs]


def test_searcher_leaves_a_pil_image_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    """A large JPEG file is decoded at a part of its size, but not one that is open already."""
    Image.new("RGB", (2000, 1600), "red").save(tmp_path / "large.jpg")
    with Image.open(tmp_path / "large.jpg") as image:
        Searcher(checkpoint, "cpu", 0).encode_images([image])
        assert image.size == (2000, 1600)


def test_searcher_takes_a_string_as_one_query(checkpoint: Path, image_dir: Path) -> None:
    searcher = Searcher(checkpoint, "cpu", 0)
    (matches,) = searcher.search(QUERIES[0], image_dir, 3)
    assert matches == searcher.search([QUERIES[0]], image_dir, 3)[0]
    assert len(searcher.encode_texts(QUERIES[0])) == 1
    (match,) = searcher.classify(matches[0].path, QUERIES[0])
    assert (match.query, match.score) == (QUERIES[0], 1.0)
    for action in (lambda: searcher.search([], image_dir), lambda: searcher.encode_texts([])):
        with pytest.raises(UserError, match="at least one"):
            action()


def test_searcher_rejects_no_matches(checkpoint: Path, image_dir: Path) -> None:
    searcher = Searcher(checkpoint, "cpu", 0)
    image = next(image_dir.glob("*.png"))
    for search in (
        lambda: searcher.search(QUERIES, image_dir, 0),
        lambda: searcher.similar(image, image_dir, -1),
        lambda: searcher.classify(image, QUERIES, 0),
    ):
        with pytest.raises(UserError, match="must be at least 1"):
            search()


def test_index_images_returns_embeddings_to_save(corrected: Path, image_dir: Path) -> None:
    searcher = Searcher(corrected, "cpu", 0)
    paths, embeddings = searcher.index_images(image_dir)
    expected = searcher.encode_images(paths)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)
    assert embeddings.shape == (10, searcher.config.projection_dim)


@pytest.mark.parametrize("flags", [[], ["--evaluate"]])
def test_data_dir_names_a_data_set_that_was_moved(
    flags: list[str], checkpoint: Path, shapes: Path, capsys: pytest.CaptureFixture
) -> None:
    moved = shutil.copytree(shapes, "elsewhere/moved")
    run(checkpoint, "--data-dir", moved, "--n", "3", *flags)
    assert "test 12" in capsys.readouterr().out


def test_probability_of_a_single_text_is_explained(
    checkpoint: Path, image_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    image = next(image_dir.glob("*.png"))
    run(checkpoint, "--image", image, "--query", "a dog")
    assert "always 1" in capsys.readouterr().out
    run(checkpoint, "--image", image, "--query", "a dog", "--query", "a cat")
    assert "always 1" not in capsys.readouterr().out


def test_plot_probabilities_shows_each_as_a_number(image_dir: Path) -> None:
    path = next(image_dir.glob("*.png"))
    matches = [Match("a dog", 1, 0.75, 0.3, path), Match("a cat", 2, 0.25, 0.2, path)]
    figure = inference.plot_probabilities(matches)
    bar_ax = figure.axes[1]
    labels = [text.get_text() for text in bar_ax.texts]
    assert labels == ["0.750", "0.250"]
    assert bar_ax.get_xlim()[1] > 1  # room for the numbers


def test_query_image_has_the_size_of_the_indexed_images(checkpoint: Path, image_dir: Path) -> None:
    """Of a run with augmentation, whose images are larger in evaluation than in training."""
    content = torch.load(checkpoint, weights_only=True)
    content["config"] |= {"augment": True, "image_size": 64}
    torch.save(content, checkpoint)
    searcher = Searcher(checkpoint, "cpu", 0)
    paths, embeddings = searcher.index_images(image_dir)
    torch.testing.assert_close(searcher.encode_images(paths), embeddings, rtol=0, atol=1e-5)


def test_classify_gives_the_softmax_of_the_scaled_cosines(
    checkpoint: Path, image_dir: Path
) -> None:
    """As the loss does, with the temperature that was learned."""
    searcher = Searcher(checkpoint, "cpu", 0)
    image = min(image_dir.glob("*.png"))
    cosines = (searcher.encode_images([image]) @ searcher.encode_texts(QUERIES).T)[0]
    scale = load_checkpoint(checkpoint).model["logit_scale"].exp()
    expected = dict(zip(QUERIES, (scale * cosines).softmax(dim=0).tolist(), strict=True))
    for match in searcher.classify(image, QUERIES):
        assert match.score == pytest.approx(expected[match.query], abs=1e-5)
