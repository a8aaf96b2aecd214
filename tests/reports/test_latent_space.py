"""Samples, maps, neighbours and probes: against what they have to be."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.embeddings import row_sample, rows, summary
from pipeline.reports import latent_space, projector
from pipeline.stages import manifest as manifest_lib
from tests.conftest import make_embeddings


def clusters(count: int, latent_dim: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(count + latent_dim)
    labels = generator.integers(0, num_classes, count)
    centres = generator.normal(size=(num_classes, latent_dim)) * 6
    means = centres[labels] + generator.normal(size=(count, latent_dim))
    return means.astype(np.float32), labels


def sample_of(labels: np.ndarray) -> row_sample.Sample:
    shas = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(len(labels))]
    of = rows.Rows([f"r{i}" for i in range(len(labels))], labels, shas, {})
    return row_sample.Sample(of, ["t"] * len(labels))


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=200), st.integers(1, 220))
def test_a_stratified_sample_has_of_each_class_its_share(labels, max_rows):
    labels = np.array(labels)
    drawn = row_sample.stratified(sample_of(labels), max_rows, seed=0)
    count = min(max_rows, len(labels))
    assert len(set(drawn.rows.ids)) == len(drawn.rows.ids) == len(drawn.tasks) == count
    for label in np.unique(labels):
        share = (labels == label).sum() * count / len(labels)
        assert abs((drawn.rows.labels == label).sum() - share) < 1
    assert drawn.rows.ids == row_sample.stratified(sample_of(labels), max_rows, seed=0).rows.ids


def test_another_seed_draws_others_and_another_order_the_same():
    found = sample_of(np.arange(300) % 3)
    first = set(row_sample.stratified(found, 60, seed=0).rows.ids)
    assert first != set(row_sample.stratified(found, 60, seed=1).rows.ids)
    turned = found.take(np.arange(300)[::-1])
    assert set(row_sample.stratified(turned, 60, seed=0).rows.ids) == first


def test_heads_are_the_first_rows_of_every_shard(data_dir, trained, tmp_path):
    out = tmp_path / "out"
    make_embeddings(data_dir, trained / "export", out, split="train,test")
    manifest = manifest_lib.read_manifest(str(out), "export", "export_dir")
    found = row_sample.heads(manifest, lambda _: str(out), 100)
    whole = row_sample.heads(manifest, lambda _: str(out), 10**6)
    assert len(whole.rows.ids) == 322 and 100 <= len(found.rows.ids) <= 108
    for task, of_shard in manifest["shards"].items():
        head = [i for i, t in zip(found.rows.ids, found.tasks, strict=True) if t == task]
        every = [i for i, t in zip(whole.rows.ids, whole.tasks, strict=True) if t == task]
        assert head == every[: len(head)] and len(every) == of_shard["written"]


def test_the_summary_is_that_of_all_rows(data_dir, trained, tmp_path):
    out = tmp_path / "out"
    manifest = make_embeddings(data_dir, trained / "export", out, split="train,test")
    every = row_sample.heads(manifest, lambda _: str(out), 10**6).rows.columns
    found = summary.read(str(out), manifest["files"])["summary"]
    for name in ("reconstruction_loss", "kl"):
        assert found[name] == pytest.approx(every[name].astype(np.float64).mean(), rel=1e-12)
    means = every["mean"].astype(np.float64)
    of_latents = {key: [latent[key] for latent in found["latents"]] for key in found["latents"][0]}
    np.testing.assert_allclose(of_latents["mean"], means.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(of_latents["variance"], means.var(axis=0), rtol=1e-9)
    kl = rows.kl_per_latent(every["mean"], every["log_var"])
    np.testing.assert_allclose(of_latents["kl"], kl.mean(axis=0), rtol=1e-9)
    assert sum(of_latents["kl"]) == pytest.approx(found["kl"], rel=1e-4)
    assert found["active_units"] == (means.var(axis=0) > 0.01).sum()
    losses = [loss for loss, *_ in found["worst"]]
    assert losses == sorted(every["reconstruction_loss"].tolist(), reverse=True)[:32]


def test_two_latents_are_shown_as_they_are_and_more_by_pca_and_tsne():
    means, labels = clusters(60, 2, 3)
    [found] = latent_space.maps(means, labels)
    np.testing.assert_array_equal(found.points, means)
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


def test_there_is_no_map_of_what_is_all_the_same():
    assert latent_space.maps(np.ones((50, 8), np.float32), np.zeros(50, np.int64)) == []
    [found] = latent_space.maps(*clusters(50, 1, 3))
    assert found.points.shape == (50, 2)


def test_neighbours_are_the_nearest():
    means, labels = clusters(200, 4, 5)
    found = latent_space.neighbours(means, labels, num_queries=7, num_neighbours=3)
    assert len(found) == 7 and len({labels[of[0]] for of in found}) == 5
    for query, *near in found:
        distances = ((means - means[query]) ** 2).sum(axis=1)
        assert near == [i for i in np.argsort(distances, kind="stable") if i != query][:3]
    # Of equal embeddings none is its own neighbour.
    same = latent_space.neighbours(np.ones((9, 2)), np.zeros(9), num_queries=3, num_neighbours=4)
    assert all(of[0] not in of[1:] and len(set(of)) == 5 for of in same)


def test_probes_tell_what_can_be_told():
    means, labels = clusters(300, 4, 3)
    found = latent_space.accuracies(means, labels, ["test"] * 300)
    assert found.knn > 0.95 and found.linear > 0.95 and found.largest_class < 0.5
    noise = np.random.default_rng(0).normal(size=(300, 4))
    found = latent_space.accuracies(noise, labels, ["train"] * 200 + ["test"] * 100)
    assert found.knn < 0.6 and "taught on 200" in found.how
    assert "two classes" in latent_space.accuracies(means, np.zeros(300), ["test"] * 300)
    assert "two classes" in latent_space.accuracies(means[:3], labels[:3], ["test"] * 3)


@pytest.mark.parametrize(
    "count, shape",
    [(1, (28, 28, 1)), (10_000, (28, 28, 1)), (10_000, (300, 200, 3)), (50, (5, 2_000, 4))],
)
def test_a_sprite_keeps_within_its_limits(count, shape):
    sprite = projector.Sprite([f"r{i}" for i in range(count)], shape)
    height, width, _ = sprite._pixels.shape
    assert max(height, width) <= 8_192
    assert (height // sprite.size[0]) * (width // sprite.size[1]) >= count
    sprite.add(f"r{count - 1}", np.full(shape, 255, np.uint8))
    sprite.add("another", np.full(shape, 255, np.uint8))
    lit = int((sprite._pixels[..., 0] > 0).sum())
    assert lit == sprite.size[0] * sprite.size[1]
