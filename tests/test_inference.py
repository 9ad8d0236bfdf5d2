"""A search ranks each picture once and keeps an index that is never stale; recall follows the field's protocol."""

import io
import json
import math
import os
import re
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import inference
from config import UserError
from inference import (
    METRICS,
    Match,
    Searcher,
    format_metrics,
    main,
    plot_matches,
    recall_at_k,
    retrieval_metrics,
    top_matches,
)
from models import load_checkpoint

FLAGS = ["--num-workers", "0", "--device", "cpu"]
QUERIES = ["a large red circle at the top left", "one blue square, small, in the middle centre"]

# ---------------------------------------------------------------- recall


RECALLS = [lambda ranks, k=k: 100 * np.mean(ranks <= k) for k in (1, 5, 10)]


def naive_metrics(
    images: np.ndarray, texts: np.ndarray, image_of_text: list[int]
) -> dict[str, float]:
    """Ranks counted one by one; whatever scores the same as the right answer ranks before it."""
    scores, of = (texts @ images.T).tolist(), image_of_text
    t2i = [sum(not other < row[of[i]] for other in row) for i, row in enumerate(scores)]
    i2t = []
    for j in range(len(images)):
        best = max(scores[i][j] for i in range(len(texts)) if of[i] == j)
        i2t.append(1 + sum(not scores[i][j] < best for i in range(len(texts)) if of[i] != j))
    values = [f(np.array(ranks)) for ranks in (t2i, i2t) for f in (*RECALLS, np.median)]
    return dict(zip(METRICS, values))


@st.composite
def retrieval_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Small whole numbers, so that scores are exact and often the same; 1 to 4 captions a picture, in any order."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=14))
    image_of_text = draw(
        st.permutations([picture for picture, count in enumerate(counts) for _ in range(count)])
    )
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    images, texts = (
        rng.integers(-2, 3, (size, 3)).astype(np.float32)
        for size in (len(counts), len(image_of_text))
    )
    return images, texts, image_of_text


@settings(max_examples=150, deadline=None)
@given(case=retrieval_cases(), block=st.sampled_from([1, 3, 1024]))
def test_recall_and_median_rank_are_those_of_a_naive_count_in_blocks_of_any_size(
    case: tuple, block: int
) -> None:
    images, texts, of = case
    metrics = retrieval_metrics(*map(torch.from_numpy, (images, texts)), torch.tensor(of), block)
    assert metrics == pytest.approx(naive_metrics(images, texts, of))


def test_a_case_worked_out_by_hand_with_ties_and_unequal_captions() -> None:
    """Six pictures of which the first has three captions, the second two and the others one each.

    Scores of texts (rows) and pictures; the right one in brackets. Rank counts the equals first:
    text 0 [9] 1 1 1 1 1 is 1st; text 1 [2] 3 2 0 0 0 is 3rd (one better, one the same); text 2 [0] 1 1 1 1 1 is 6th;
    text 3 4 [4] 0 0 0 0 is 2nd; text 4 0 [7] 0 0 0 0 is 1st; the texts 5 to 8 are the highest of their row, so 1st.
    Picture 0 has 9, 2 and 0 of its own, and no other above 9: 1st. Picture 1 has 7 at best: 1st.
    Picture 2 has 5, and text 1 and 2 of others score 2 and 1: 1st. Picture 3 has 1 of text 6, and two others score 1.
    """
    scores = torch.zeros(9, 6)
    scores[0] = torch.tensor([9.0, 1, 1, 1, 1, 1])
    scores[1] = torch.tensor([2.0, 3, 2, 0, 0, 0])
    scores[2] = torch.tensor([0.0, 1, 1, 1, 1, 1])
    scores[3] = torch.tensor([4.0, 4, 0, 0, 0, 0])
    scores[4, 1], scores[5, 2], scores[6, 3], scores[7, 4], scores[8, 5] = 7.0, 5.0, 1.0, 3.0, 3.0
    metrics = retrieval_metrics(torch.eye(6), scores, torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5]))
    t2i, i2t = [1, 3, 6, 2, 1, 1, 1, 1, 1], [1, 1, 1, 3, 1, 1]
    assert metrics["t2i_r1"] == pytest.approx(100 * 6 / 9)
    assert metrics["t2i_r5"] == pytest.approx(100 * 8 / 9)
    assert metrics["t2i_r10"] == metrics["i2t_r5"] == metrics["i2t_r10"] == 100
    assert metrics["i2t_r1"] == pytest.approx(100 * 5 / 6)
    assert (metrics["t2i_medr"], metrics["i2t_medr"]) == (np.median(t2i), np.median(i2t))


@pytest.mark.parametrize("value", [0.5, math.nan, math.inf])
def test_a_model_that_tells_nothing_apart_scores_0(value: float) -> None:
    image_of_text = torch.arange(20).repeat_interleave(5)
    metrics = retrieval_metrics(
        torch.full((20, 4), value), torch.full((100, 4), value), image_of_text
    )
    assert {metrics[name] for name in METRICS if "_r" in name} == {0.0}
    assert (metrics["t2i_medr"], metrics["i2t_medr"]) == (20, 96)


def test_one_embedding_that_is_not_a_number_is_not_found() -> None:
    texts = torch.eye(12)
    texts[3] = math.nan
    metrics = retrieval_metrics(torch.eye(12), texts, torch.arange(12))
    assert metrics["t2i_r10"] == pytest.approx(100 * 11 / 12)
    assert metrics["i2t_r1"] == 0.0  # it stands before the right text of every picture


def test_a_perfect_model_scores_100_and_median_rank_1() -> None:
    metrics = retrieval_metrics(
        torch.eye(12), torch.eye(12).repeat_interleave(5, 0), torch.arange(12).repeat(5).sort()[0]
    )
    assert metrics == {name: 1.0 if name.endswith("medr") else 100.0 for name in METRICS}


@given(ranks=st.lists(st.integers(1, 20), min_size=1, max_size=50), k=st.integers(1, 20))
def test_recall_at_k_is_the_percentage_of_ranks_up_to_k(ranks: list[int], k: int) -> None:
    assert recall_at_k(torch.tensor(ranks), k) == pytest.approx(
        100 * len([r for r in ranks if r <= k]) / len(ranks)
    )


@pytest.mark.parametrize("n", [1, 3, 30, 500])
def test_the_top_matches_are_the_head_of_a_full_sort(n: int) -> None:
    rng = np.random.default_rng(0)
    queries, images = (rng.normal(size=(size, 8)).astype(np.float32) for size in (4, 30))
    scores, positions = top_matches(torch.from_numpy(queries), torch.from_numpy(images), n)
    everything = queries @ images.T
    assert positions.tolist() == np.argsort(-everything, axis=1)[:, :n].tolist()
    np.testing.assert_allclose(scores.numpy(), -np.sort(-everything, axis=1)[:, :n], rtol=1e-5)


@pytest.mark.parametrize("n", [1, 8, 70, 2000])
@pytest.mark.parametrize("pictures", [63, 1000, 1111])
@pytest.mark.parametrize("at_once", [1, 600, 2**24])
def test_the_top_matches_are_exact_in_blocks_of_any_size(
    n: int, pictures: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "SCORES_PER_BLOCK", at_once)
    images = torch.randn(pictures, 16, generator=torch.Generator().manual_seed(n))
    scores, positions = top_matches(images[:3], images, n)
    expected, order = (images[:3] @ images.T).sort(descending=True)
    assert positions.tolist() == order[:, :n].tolist()
    torch.testing.assert_close(scores, expected[:, :n])


def test_what_is_not_a_number_comes_first_in_a_large_index_so_that_it_is_noticed() -> None:
    images = torch.randn(1000, 16)
    images[777] = math.nan
    scores, _ = top_matches(images[:2], images, 3)
    assert not scores.isfinite().all()


def test_the_memory_of_a_ranking_does_not_grow_with_the_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "SCORES_PER_BLOCK", 2**16)
    peaks = []
    for pictures in (20_000, 400_000):
        images = torch.zeros(1, 8).expand(pictures, 8).contiguous()
        tracemalloc.start()
        top_matches(images[:4], images, 8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


# ---------------------------------------------------------------- the index


@pytest.fixture
def weights(trained: Path, workdir: Path) -> Path:
    """A weights file of one's own, without an index yet, in the current directory."""
    return Path(shutil.copy(trained / "best.pt", workdir / "best.pt"))


@pytest.fixture
def pictures(shapes: Path, workdir: Path) -> Path:
    """Ten pictures, one of them in a folder of its own."""
    (workdir / "pictures" / "more").mkdir(parents=True)
    for i, source in enumerate(sorted((shapes / "Images").iterdir())[:10]):
        shutil.copy(source, workdir / "pictures" / ("more" if i == 9 else "") / source.name)
    return workdir / "pictures"


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that were run through the model since the list was last cleared."""
    names: list[str] = []
    original = inference.encode_images

    def counted(
        encode_image: Callable, paths: list[Path], *rest: object, **options: object
    ) -> tuple:
        names.extend(path.name for path in paths)
        return original(encode_image, paths, *rest, **options)

    monkeypatch.setattr(inference, "encode_images", counted)
    return names


def searched(
    weights: Path, pictures: Path | str, n: int = 100
) -> list[list[tuple[int, float, Path]]]:
    """What a process of its own would find."""
    found = Searcher(weights, "cpu", 0).search(QUERIES, str(pictures), n)
    return [[(match.rank, match.score, match.path) for match in row] for row in found]


def test_each_picture_is_ranked_once_by_its_cosine(weights: Path, pictures: Path) -> None:
    for row in searched(weights, pictures):
        ranks, scores, paths = zip(*row)
        assert ranks == tuple(range(1, 11))
        assert list(scores) == sorted(scores, reverse=True)
        assert all(-1.001 <= score <= 1.001 for score in scores)
        assert sorted(paths) == sorted(pictures.rglob("*.png"))


def test_the_same_question_has_the_same_answer_and_the_index_is_reused(
    weights: Path, pictures: Path, embedded: list[str]
) -> None:
    first = searched(weights, pictures)
    assert len(embedded) == 10
    embedded.clear()
    assert searched(weights, pictures) == first
    assert searched(weights, os.path.relpath(pictures)) == [
        [(rank, score, Path(os.path.relpath(path))) for rank, score, path in row] for row in first
    ]
    assert embedded == []


def test_queries_do_not_change_each_others_answers(weights: Path, pictures: Path) -> None:
    searcher = Searcher(weights, "cpu", 0)
    together = searcher.search(QUERIES, str(pictures), 3)
    for query, row in zip(QUERIES, together):
        (alone,) = searcher.search([query], str(pictures), 3)
        assert [match.path for match in alone] == [match.path for match in row]
        assert [match.score for match in alone] == pytest.approx(
            [match.score for match in row], abs=1e-5
        )


def test_only_what_is_new_is_embedded(
    weights: Path, pictures: Path, shapes: Path, embedded: list[str]
) -> None:
    searched(weights, pictures)
    names = sorted(path.name for path in pictures.rglob("*.png"))
    embedded.clear()
    Image.new("RGB", (90, 90), "red").save(pictures / names[2])
    Image.new("RGB", (90, 90), "blue").save(pictures / "new.png")
    (pictures / names[4]).unlink()
    found = searched(weights, pictures)
    assert sorted(embedded) == sorted([names[2], "new.png"])
    assert {path for _, _, path in found[0]} == set(pictures.rglob("*.png"))
    shutil.rmtree(weights.with_suffix(".index"))
    for row, anew in zip(found, searched(weights, pictures)):
        assert [path for *_, path in row] == [path for *_, path in anew]
        assert [score for _, score, _ in row] == pytest.approx(
            [score for _, score, _ in anew], abs=1e-5
        )


def test_a_picture_changed_to_one_of_the_same_size_is_noticed(
    weights: Path, pictures: Path, embedded: list[str]
) -> None:
    picture = pictures / "flat.bmp"
    Image.new("RGB", (90, 90), "red").save(picture)
    searched(weights, pictures)
    embedded.clear()
    Image.new("RGB", (90, 90), "blue").save(picture)
    os.utime(picture, ns=(0, picture.stat().st_mtime_ns + 1_000_000_000))
    searched(weights, pictures)
    assert embedded == ["flat.bmp"]


def test_a_removed_picture_is_found_no_more_and_nothing_is_embedded(
    weights: Path, pictures: Path, embedded: list[str]
) -> None:
    first = searched(weights, pictures)
    embedded.clear()
    gone = first[0][0][2]
    gone.unlink()
    assert [path for *_, path in searched(weights, pictures)[0]] == [
        path for *_, path in first[0][1:]
    ]
    assert embedded == []


def test_two_folders_do_not_evict_each_other(
    weights: Path, pictures: Path, embedded: list[str]
) -> None:
    other = Path(shutil.copytree(pictures, pictures.with_name("other")))
    (other / "more").rename(other / "less")
    for folder in (pictures, other):
        searched(weights, folder)
    assert len(embedded) == 20
    embedded.clear()
    for folder in (pictures, other, pictures):
        assert all(path.is_relative_to(folder) for *_, path in searched(weights, folder)[0])
    assert embedded == []


def test_other_weights_under_the_same_name_make_a_new_index(
    weights: Path, pictures: Path, embedded: list[str]
) -> None:
    before = searched(weights, pictures)
    content = torch.load(weights, weights_only=True)
    content["model"]["image.head.projection.weight"] = content["model"][
        "image.head.projection.weight"
    ].flip(0)
    torch.save(content, weights)
    embedded.clear()
    after = searched(weights, pictures)
    assert len(embedded) == 10
    assert before != after
    embedded.clear()
    assert searched(weights, pictures) == after
    assert embedded == []


def array(index: Path) -> Path:
    (path,) = index.glob("*.npy")
    return path


def listing(index: Path) -> Path:
    (path,) = index.glob("*.json")
    return path


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def resave(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


def with_nan(embeddings: np.ndarray) -> np.ndarray:
    embeddings[3] = np.nan
    return embeddings


def swap_two_pictures(path: Path) -> None:
    content = json.loads(path.read_text())
    content["pictures"][0], content["pictures"][1] = content["pictures"][1], content["pictures"][0]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda index: cut(array(index), 0), id="array emptied"),
        pytest.param(lambda index: cut(array(index), 20), id="array cut in its header"),
        pytest.param(lambda index: cut(array(index), 1000), id="array cut"),
        pytest.param(lambda index: array(index).write_text("not an array"), id="array overwritten"),
        pytest.param(lambda index: array(index).unlink(), id="array missing"),
        pytest.param(lambda index: resave(array(index), with_nan), id="a row is not a number"),
        pytest.param(
            lambda index: resave(array(index), lambda rows: rows[:-1]), id="a row too few"
        ),
        pytest.param(
            lambda index: resave(array(index), lambda rows: rows[:, :-1]), id="too narrow"
        ),
        pytest.param(
            lambda index: resave(array(index), lambda rows: rows.astype(np.float64)),
            id="other numbers",
        ),
        pytest.param(
            lambda index: resave(array(index), lambda rows: rows.astype(object)),
            id="pickled objects",
        ),
        pytest.param(lambda index: cut(listing(index), 0), id="list emptied"),
        pytest.param(lambda index: cut(listing(index), 100), id="list cut"),
        pytest.param(
            lambda index: listing(index).write_bytes(b"\xff\xfe\xff"), id="list is not text"
        ),
        pytest.param(lambda index: listing(index).write_text("[]"), id="list of another kind"),
        pytest.param(lambda index: listing(index).write_text("null"), id="list is null"),
        pytest.param(lambda index: swap_two_pictures(listing(index)), id="list edited"),
    ],
)
def test_a_torn_or_tampered_index_is_made_anew_and_said(
    damage: Callable[[Path], None],
    weights: Path,
    pictures: Path,
    embedded: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = searched(weights, pictures)
    damage(weights.with_suffix(".index"))
    embedded.clear()
    capsys.readouterr()
    assert searched(weights, pictures) == whole
    assert len(embedded) == 10
    assert re.search(r"best\.index.*made anew", capsys.readouterr().out)
    embedded.clear()
    assert searched(weights, pictures) == whole
    assert embedded == []


def test_an_index_of_pictures_that_were_embedded_another_way_is_made_anew(
    weights: Path, pictures: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched(weights, pictures)
    embedded.clear()
    monkeypatch.setattr(inference, "EVAL_SCALE", 8 / 7)
    searched(weights, pictures)
    assert len(embedded) == 10


def test_a_place_where_no_index_can_be_kept_is_searched_all_the_same(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = searched(weights, pictures)
    shutil.rmtree(weights.with_suffix(".index"))
    weights.with_suffix(".index").write_text("in the way")
    assert searched(weights, pictures) == expected
    assert "index is not kept" in capsys.readouterr().out


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is read-only to root"
)
def test_a_read_only_folder_is_searched_all_the_same(weights: Path, pictures: Path) -> None:
    weights.parent.chmod(0o555)
    try:
        assert len(searched(weights, pictures)[0]) == 10
    finally:
        weights.parent.chmod(0o755)


def test_pictures_that_cannot_be_read_are_skipped_counted_and_named(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "broken.jpg").write_text("no picture")
    (pictures / "gone.png").symlink_to("nowhere.png")
    whole = sorted(pictures.glob("*.png"))[0]
    (pictures / "cut.png").write_bytes(whole.read_bytes()[:200])
    for _ in range(2):
        found = searched(weights, pictures)
        said = capsys.readouterr().out
        assert "skipped 3 of 13 pictures" in said
        assert all(name in said for name in ("broken.jpg", "gone.png", "cut.png"))
        assert len(found[0]) == 10


@pytest.mark.parametrize(("asked", "workers"), [("-1", 0), ("0", 0), ("1", 1)])
def test_no_process_is_forked_to_embed_on_the_cpu_unless_told_so(
    weights: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, asked: str, workers: int
) -> None:
    seen, original = [], inference.build_loader

    def loader(dataset: object, number: int, *rest: object, **options: object) -> object:
        seen.append(number)
        return original(dataset, 0, *rest, **options)

    monkeypatch.setattr(inference, "build_loader", loader)
    Searcher(weights, device="cpu", num_workers=int(asked)).search(["a red circle"], str(pictures))
    assert seen == [workers]


@pytest.mark.parametrize("content", [{}, {"notes.txt": "no picture"}, {"broken.jpg": "no picture"}])
def test_a_folder_without_a_readable_picture_is_an_error(
    content: dict[str, str], weights: Path, workdir: Path
) -> None:
    (workdir / "empty").mkdir()
    for name, text in content.items():
        (workdir / "empty" / name).write_text(text)
    with pytest.raises(UserError, match=r"empty: .*picture"):
        searched(weights, "empty")


def test_a_folder_that_is_missing_is_an_error(weights: Path) -> None:
    with pytest.raises(UserError, match="--images no/such: "):
        searched(weights, "no/such")


# ---------------------------------------------------------------- the command


def rows_of(printed: str) -> list[tuple[int, float, str]]:
    rows = re.findall(r"^ *(\d+) +(-?\d\.\d{3})  (\S.*)$", printed, re.MULTILINE)
    return [(int(rank), float(score), path) for rank, score, path in rows]


@pytest.mark.parametrize(
    ("n", "shown", "queries"),
    [
        (1, 1, QUERIES[:1]),
        (3, 3, QUERIES[:1]),
        (8, 8, [*QUERIES, "$x_1^2$ <&> ü " + "long " * 99]),
        (25, 10, QUERIES),
    ],
)
def test_the_command_prints_and_draws_n_matches_of_each_query(
    n: int,
    shown: int,
    queries: list[str],
    weights: Path,
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [word for query in queries for word in ("--query", query)]
    main(["--weights", str(weights), "--images", str(pictures), "--n", str(n), *asked, *FLAGS])
    printed = capsys.readouterr().out
    found = [
        match
        for row in Searcher(weights, "cpu", 0).search(queries, str(pictures), n)
        for match in row
    ]
    assert [rank for rank, *_ in rows_of(printed)] == list(range(1, shown + 1)) * len(queries)
    assert rows_of(printed) == [
        (match.rank, round(match.score, 3), str(match.path)) for match in found
    ]
    assert all(f"\n{query}\n" in printed for query in queries)
    with Image.open("matches.png") as grid:
        assert grid.format == "PNG"
        assert min(grid.size) > 150
        assert len(set(grid.convert("L").resize((50, 50)).tobytes())) > 5


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 25])
def test_the_grid_shows_every_match_with_its_rank_score_name_and_query(
    n: int, queries: int, shapes: Path, workdir: Path
) -> None:
    paths = sorted((shapes / "Images").iterdir())[:n]
    matches = [
        [Match(f"query {q}", i + 1, 0.9 - i / 100, path) for i, path in enumerate(paths)]
        for q in range(queries)
    ]
    figure = plot_matches(matches)
    blocks = figure.subfigs or [figure]
    assert [block.get_suptitle() for block in blocks] == [row[0].query for row in matches]
    for row, block in zip(matches, blocks):
        titles = [axes.get_title() for axes in block.axes if axes.images]
        assert titles == [f"{match.rank}.  {match.score:.3f}\n{match.path.name}" for match in row]
        assert len(block.axes) < n + 8


def test_without_a_query_the_weights_own_example_is_asked(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--weights", str(weights), "--images", str(pictures), *FLAGS])
    assert f"\n{load_checkpoint(weights)['example_query']}\n" in capsys.readouterr().out


def test_without_a_folder_the_test_pictures_of_the_data_set_are_ranked(
    trained: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained.parent.parent)
    weights = shutil.copy(trained / "last.pt", tmp_path / "last.pt")
    main(["--weights", str(weights), "--n", "100", "--output", str(tmp_path / "grid.png"), *FLAGS])
    test_pictures = (shapes / "Flickr_8k.testImages.txt").read_text().split()
    assert sorted(Path(path).name for *_, path in rows_of(capsys.readouterr().out)) == sorted(
        test_pictures
    )


def test_without_a_folder_and_without_the_data_set_one_line_asks_for_images(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weights.parent / "far" / "away").mkdir(parents=True)
    monkeypatch.chdir(weights.parent / "far" / "away")
    with pytest.raises(SystemExit, match="--images") as stop:
        main(["--weights", str(weights), *FLAGS])
    assert "\n" not in stop.value.code


def test_evaluate_prints_the_recalls_that_training_found(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.parent.parent)
    main(["--weights", str(trained / "best.pt"), "--evaluate", *FLAGS])
    metrics = json.loads((trained / "test.json").read_text())
    printed = capsys.readouterr().out
    assert format_metrics(metrics) in printed
    assert all(f"{metrics[name]:.1f}" in printed for name in METRICS if "_r" in name)


@pytest.mark.parametrize("output", ["no/such/folder/grid.png", "grid.png/inside.png"])
def test_an_output_that_cannot_be_written_is_one_line(
    output: str, weights: Path, pictures: Path
) -> None:
    Path("grid.png").write_text("a file")
    with pytest.raises(SystemExit, match=re.escape(output)) as stop:
        main(["--weights", str(weights), "--images", str(pictures), "--output", output, *FLAGS])
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(
    "output", ["found.PNG", "found.jpg", "found.pdf", "found.csv", "found.CSV"]
)
def test_the_ending_of_the_output_says_what_is_written_whatever_its_case(
    output: str, weights: Path, pictures: Path
) -> None:
    main(
        [
            "--weights",
            str(weights),
            "--images",
            str(pictures),
            "--n",
            "2",
            "--output",
            output,
            *FLAGS,
        ]
    )
    start = {".png": b"\x89PNG", ".jpg": b"\xff\xd8", ".pdf": b"%PDF", ".csv": b"query,rank,"}
    assert Path(output).read_bytes().startswith(start[Path(output).suffix.lower()])


def test_asked_the_other_way_round_the_texts_are_ranked_for_a_picture(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, texts = next(pictures.glob("*.png")), [*QUERIES, "a green diamond"]
    asked = [word for text in texts for word in ("--query", text)]
    main(["--weights", str(weights), "--image", str(picture), *asked, *FLAGS])
    ranks, probabilities, found = zip(*rows_of(capsys.readouterr().out))
    assert ranks == (1, 2, 3)
    assert sorted(found) == sorted(texts)
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=0.002)
    assert Path("matches.png").stat().st_size > 5000


def test_a_dash_reads_the_queries_from_standard_input(
    weights: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUERIES[0]}\n\n{QUERIES[1]}\n"))
    main(["--weights", str(weights), "--images", str(pictures), "--n", "2", "--query", "-", *FLAGS])
    printed = capsys.readouterr().out
    assert len(rows_of(printed)) == 4
    assert all(f"\n{query}\n" in printed for query in QUERIES)


def test_a_dash_reads_the_texts_for_a_picture_too(
    weights: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(QUERIES)))
    main(
        [
            "--weights",
            str(weights),
            "--image",
            str(next(pictures.glob("*.png"))),
            "--query",
            "-",
            *FLAGS,
        ]
    )
    assert sorted(text for _, _, text in rows_of(capsys.readouterr().out)) == sorted(QUERIES)


@pytest.mark.parametrize("asked", [[], ["--evaluate"], ["--image", "picture.png"]])
def test_weights_that_have_left_their_data_say_so_in_one_line(
    asked: list[str], weights: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (far := pictures.parent / "far/away").mkdir(parents=True)
    shutil.copy(next(pictures.glob("*.png")), far / "picture.png")
    monkeypatch.chdir(far)
    with pytest.raises(
        SystemExit, match=r"^error: \S+, where the weights were trained, is not here"
    ):
        main(["--weights", str(weights), *asked, *FLAGS])


def test_the_command_opens_no_display(
    weights: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    done = script(
        "inference.py", "--weights", "best.pt", "--images", "pictures", *FLAGS, cwd=pictures.parent
    )
    assert done.returncode == 0, done.stderr
    assert Path("matches.png").stat().st_size > 5000
    assert len(rows_of(done.stdout)) == 8
