"""Samples, summaries, maps, neighbours and probes."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets import reader
from pipeline.embeddings import rows, summary
from pipeline.embeddings.comparison import row_sample
from pipeline.formats import projector
from pipeline.reports import latent_space
from pipeline.stages import manifest as manifest_lib
from tests.conftest import make_embeddings
from tests.datasets.test_verify import reseal


def clusters(count: int, latent_dim: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(count + latent_dim)
    labels = generator.integers(0, num_classes, count)
    centres = generator.normal(size=(num_classes, latent_dim)) * 6
    means = centres[labels] + generator.normal(size=(count, latent_dim))
    return means.astype(np.float32), labels


def sample_of(labels: np.ndarray) -> row_sample.Sample:
    shas = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(len(labels))]
    sampled_rows = rows.Rows([f"r{i}" for i in range(len(labels))], labels, shas, {})
    return row_sample.Sample(sampled_rows, ["t"] * len(labels))


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=200), st.integers(1, 220))
def test_a_stratified_sample_has_its_share_of_each_class(labels, max_rows):
    labels = np.array(labels)
    drawn = row_sample.stratified(sample_of(labels), max_rows, seed=0)
    count = min(max_rows, len(labels))
    assert len(set(drawn.rows.ids)) == len(drawn.rows.ids) == len(drawn.tasks) == count
    for label in np.unique(labels):
        share = (labels == label).sum() * count / len(labels)
        assert abs((drawn.rows.labels == label).sum() - share) < 1
    assert drawn.rows.ids == row_sample.stratified(sample_of(labels), max_rows, seed=0).rows.ids


def test_the_draw_depends_on_the_seed_and_not_on_the_order():
    sample = sample_of(np.arange(300) % 3)
    first = set(row_sample.stratified(sample, 60, seed=0).rows.ids)
    assert first != set(row_sample.stratified(sample, 60, seed=1).rows.ids)
    reversed_sample = sample.take(np.arange(300)[::-1])
    assert set(row_sample.stratified(reversed_sample, 60, seed=0).rows.ids) == first


def test_heads_are_the_first_rows_of_every_shard(data_dir, trained, tmp_path):
    out = tmp_path / "out"
    make_embeddings(data_dir, trained / "export", out, split="train,test")
    manifest = manifest_lib.read_manifest(str(out), "export", "export_dir")
    sample = row_sample.heads(str(out), manifest, 100)
    everything = row_sample.heads(str(out), manifest, 10**6)
    assert len(everything.rows.ids) == 322 and 100 <= len(sample.rows.ids) <= 108
    for task, shard_manifest in manifest["shards"].items():
        head = [i for i, t in zip(sample.rows.ids, sample.tasks, strict=True) if t == task]
        ids = [i for i, t in zip(everything.rows.ids, everything.tasks, strict=True) if t == task]
        assert head == ids[: len(head)] and len(ids) == shard_manifest["written"]


def test_the_summary_covers_all_rows(data_dir, trained, tmp_path):
    out = tmp_path / "out"
    manifest = make_embeddings(data_dir, trained / "export", out, split="train,test")
    columns = row_sample.heads(str(out), manifest, 10**6).rows.columns
    totals = summary.read(str(out), manifest["files"])["summary"]
    for name in ("reconstruction_loss", "kl"):
        assert totals[name] == pytest.approx(columns[name].astype(np.float64).mean(), rel=1e-12)
    means = columns["mean"].astype(np.float64)
    latents = {key: [latent[key] for latent in totals["latents"]] for key in totals["latents"][0]}
    np.testing.assert_allclose(latents["mean"], means.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(latents["variance"], means.var(axis=0), rtol=1e-9)
    kl = rows.kl_per_latent(columns["mean"], columns["log_var"])
    np.testing.assert_allclose(latents["kl"], kl.mean(axis=0), rtol=1e-9)
    assert sum(latents["kl"]) == pytest.approx(totals["kl"], rel=1e-4)
    assert totals["active_units"] == (means.var(axis=0) > 0.01).sum()
    everything = row_sample.heads(str(out), manifest, 10**6).rows
    dataset = reader.Dataset(str(data_dir))
    shards = [dataset.read_shard(e) for split in ("train", "test") for e in dataset.shards(split)]
    images = {i: x for s in shards for i, x in zip(s.ids, s.images, strict=True)}
    floor = rows.bernoulli_entropy(np.stack([images[i] for i in everything.ids]))
    excess = columns["reconstruction_loss"].astype(np.float64) - floor
    assert excess.min() > 0  # Shannon: the cross-entropy is above the entropy.
    order = np.argsort(-excess)[:32]
    assert [(w[1], w[4]) for w in totals["worst"]] == [
        (everything.ids[i], excess[i]) for i in order
    ]


def test_the_entropy_is_that_of_each_pixel():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (300, 3, 2, 3), np.uint8)
    x = np.clip(images / 255, 1e-300, 1)
    y = np.clip(1 - images / 255, 1e-300, 1)
    expected = -(x * np.log(x) + y * np.log(y)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(rows.bernoulli_entropy(images), expected, rtol=1e-5)
    assert not rows.bernoulli_entropy(255 * (images % 2)).any()
    assert len(rows.bernoulli_entropy(images[:0])) == 0


def test_a_pastel_image_is_not_odd_for_its_colours():
    """Its loss is larger than that of a badly reconstructed digit, and cannot be smaller."""
    pastel, digit = np.full((8, 8, 3), 128, np.uint8), np.zeros((8, 8, 3), np.uint8)
    losses = np.array([134.0, 90.0], np.float32)
    of_shard = rows.Rows(
        ["pastel", "digit"], np.zeros(2), ["", ""], {"reconstruction_loss": losses}
    )
    by_loss = rows.sums(of_shard)
    by_excess = rows.sums(of_shard, rows.bernoulli_entropy(np.stack([pastel, digit])))
    assert [row[1] for row in by_loss["worst"]] == ["pastel", "digit"]
    assert [row[1] for row in by_excess["worst"]] == ["digit", "pastel"]
    both = summary.summary({"a": by_excess, "b": by_excess})["worst"]
    assert [row[1] for row in both] == ["digit", "digit", "pastel", "pastel"]
    assert both[0][4] == 90.0 and both[2][4] < 1


def test_ranks_of_an_earlier_version_are_made_anew(data_dir, trained, tmp_path):
    make_embeddings(data_dir, trained / "export", tmp_path / "1")
    fresh = (tmp_path / "1" / "statistics.json").read_bytes()
    old = json.loads(fresh)
    for sums in old["shards"].values():
        sums["worst"] = [rank[:3] for rank in sums["worst"]]
    data = manifest_lib.readable_json(old)
    (tmp_path / "1" / "statistics.json").write_bytes(data)

    def relist(manifest):
        entry = manifest_lib.file_entry("statistics.json", data)
        manifest["files"] = [entry if e["name"] == entry["name"] else e for e in manifest["files"]]

    reseal(tmp_path / "1", relist)
    manifest = make_embeddings(
        data_dir, trained / "export", tmp_path / "2", reuse_from=tmp_path / "1"
    )
    assert sum(counts["computed"] for counts in manifest["done"].values()) == 0
    assert (tmp_path / "2" / "statistics.json").read_bytes() == fresh


def test_two_latents_are_shown_as_they_are_and_more_by_pca_and_tsne():
    means, labels = clusters(60, 2, 3)
    [latent_map] = latent_space.maps(means, labels)
    np.testing.assert_array_equal(latent_map.points, means)
    means, labels = clusters(120, 8, 3)
    pca, tsne = latent_space.maps(means, labels)
    centred = means - means.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(abs(pca.points), abs(centred @ axes[:2].T), atol=1e-3)
    # Clusters that are far apart stay apart: the nearest point is of the same class.
    distances = ((tsne.points[:, None] - tsne.points) ** 2).sum(-1) + np.eye(120) * 1e9
    assert (labels[distances.argmin(axis=1)] == labels).mean() > 0.95
    again = latent_space.maps(means, labels)[1]
    np.testing.assert_array_equal(again.points, tsne.points)


def test_there_is_no_map_of_equal_embeddings():
    assert latent_space.maps(np.ones((50, 8), np.float32), np.zeros(50, np.int64)) == []
    [latent_map] = latent_space.maps(*clusters(50, 1, 3))
    assert latent_map.points.shape == (50, 2)


def test_neighbours_are_the_nearest():
    means, labels = clusters(200, 4, 5)
    lists = latent_space.neighbours(means, labels, num_queries=7, num_neighbours=3)
    assert len(lists) == 7 and len({labels[query] for query, *_ in lists}) == 5
    for query, *nearest in lists:
        distances = ((means - means[query]) ** 2).sum(axis=1)
        assert nearest == [i for i in np.argsort(distances, kind="stable") if i != query][:3]
    # Among equal embeddings none is its own neighbour.
    lists = latent_space.neighbours(np.ones((9, 2)), np.zeros(9), num_queries=3, num_neighbours=4)
    assert all(query not in nearest and len({query, *nearest}) == 5 for query, *nearest in lists)


def test_probes_find_classes_and_nothing_in_noise():
    means, labels = clusters(300, 4, 3)
    result = latent_space.accuracies(means, labels, ["test"] * 300)
    assert result.knn > 0.95 and result.linear > 0.95 and result.largest_class < 0.5
    noise = np.random.default_rng(0).normal(size=(300, 4))
    result = latent_space.accuracies(noise, labels, ["train"] * 200 + ["test"] * 100)
    assert result.knn < 0.6 and "trained on 200" in result.rows_used
    assert "two classes" in latent_space.accuracies(means, np.zeros(300), ["test"] * 300)
    assert "two classes" in latent_space.accuracies(means[:3], labels[:3], ["test"] * 3)


@pytest.mark.parametrize(
    "count, shape",
    [(1, (28, 28, 1)), (10_000, (28, 28, 1)), (10_000, (300, 200, 3)), (50, (5, 2_000, 4))],
)
def test_a_sprite_keeps_within_its_limits(count, shape):
    sprite = projector.Sprite([f"r{i}" for i in range(count)], shape)
    height, width, _ = sprite.pixels.shape
    assert max(height, width) <= 8_192
    assert (height // sprite.size[0]) * (width // sprite.size[1]) >= count
    sprite.add(f"r{count - 1}", np.full(shape, 255, np.uint8))
    sprite.add("another", np.full(shape, 255, np.uint8))
    lit = int((sprite.pixels[..., 0] > 0).sum())
    assert lit == sprite.size[0] * sprite.size[1]
