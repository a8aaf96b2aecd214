"""Files of rows: every format holds the same rows, and common readers read them."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.errors import StageError
from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows
from pipeline.stages import manifest as manifest_lib
from tests.conftest import make_embeddings

FIELDS = ("mean", "log_var", "z", "reconstruction_loss", "kl", "elbo")
TASK = "blobs-test.tfrecord-00001-of-00004"
CLASSES = {"class_names": ["zéro", "one"], "split": "test"}


def random_rows(count: int, latent_dim: int = 3) -> rows.Rows:
    generator = np.random.default_rng(count)
    shas = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(count)]
    columns = {
        field: generator.normal(size=(count, latent_dim) if field in rows.VECTORS else count)
        for field in FIELDS
    }
    return rows.Rows(
        [f"a/{i} ü" for i in range(count)],
        generator.integers(-1, 300, count),
        shas,
        {field: values.astype(np.float32) for field, values in columns.items()},
    )


def assert_same_rows(a: rows.Rows, b: rows.Rows) -> None:
    assert (a.ids, a.shas) == (b.ids, b.shas)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.columns.keys() == b.columns.keys()
    for field in a.columns:
        np.testing.assert_array_equal(a.columns[field], b.columns[field])
        assert a.columns[field].dtype == b.columns[field].dtype == np.float32


@pytest.mark.parametrize("embedding_format", row_files.FORMATS)
@pytest.mark.parametrize("count", [1, 7])
def test_written_rows_are_read_back(embedding_format, count, tmp_path):
    expected, directory = random_rows(count), str(tmp_path)
    settings = {"embedding_format": embedding_format, "model_id": "m", **CLASSES}
    files = row_files.write(directory, TASK, expected, **settings)
    assert all(entry["num_examples"] == count for entry in files)
    assert_same_rows(row_files.read(directory, TASK, files), expected)
    keys = row_files.read_keys(directory, TASK, files)
    assert (keys.ids, keys.shas) == (expected.ids, expected.shas)
    np.testing.assert_array_equal(keys.labels, expected.labels)
    head = row_files.read(directory, TASK, files, num_rows=3)
    assert_same_rows(head, expected.take(range(min(3, count))))
    assert files == row_files.write(directory, TASK, expected, **settings)
    path = tmp_path / files[0]["name"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StageError, match="damaged"):
        row_files.read(directory, TASK, files)


@pytest.mark.parametrize("embedding_format", row_files.FORMATS)
def test_a_shard_without_rows_has_files_too(embedding_format, tmp_path):
    settings = {"embedding_format": embedding_format, "model_id": "m", **CLASSES}
    files = row_files.write(str(tmp_path), TASK, random_rows(0), **settings)
    names = row_files.row_names(TASK, embedding_format, FIELDS)
    assert {entry["name"] for entry in files} <= set(names)
    assert row_files.read(str(tmp_path), TASK, files).ids == []


def test_no_flipped_bit_gives_other_keys(tmp_path):
    expected, directory = random_rows(7), str(tmp_path)
    settings = {"embedding_format": "parquet", "model_id": "m", **CLASSES}
    files = row_files.write(directory, TASK, expected, **settings)
    path = tmp_path / files[0]["name"]
    data, num_damaged = path.read_bytes(), 0
    for position in range(0, len(data), 5):
        byte = data[position] ^ (1 << position % 8)
        path.write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
        try:
            keys = row_files.read_keys(directory, TASK, files)
        except StageError:
            num_damaged += 1
        else:
            assert (keys.ids, keys.shas) == (expected.ids, expected.shas), position
            np.testing.assert_array_equal(keys.labels, expected.labels)
    assert num_damaged > 100
    # Nor does a file that another program wrote.
    odd = expected._replace(shas=["z" * 64, *expected.shas[1:]])
    entries = row_files.write(directory, TASK, odd, **settings)
    fewer = [{**entry, "num_examples": 6} for entry in files]
    for wrong, written in ((entries, odd), (fewer, expected)):
        row_files.write(directory, TASK, written, **settings)
        with pytest.raises(StageError, match="the number of rows or a record_sha is wrong"):
            row_files.read_keys(directory, TASK, wrong)


@pytest.fixture(scope="module")
def in_formats(data_dir, trained, tmp_path_factory):
    """The same export in each format."""
    directories = {}
    for embedding_format in row_files.FORMATS:
        directories[embedding_format] = tmp_path_factory.mktemp(embedding_format) / "out"
        make_embeddings(
            data_dir,
            trained / "export",
            directories[embedding_format],
            fields=FIELDS,
            embedding_format=embedding_format,
            images="none",
        )
    return directories


def read_all(directory) -> dict[str, rows.Rows]:
    manifest = manifest_lib.read_manifest(str(directory), "export", "export_dir")
    return {t: row_files.read(str(directory), t, manifest["files"]) for t in manifest["shards"]}


def test_every_format_holds_the_same_rows(in_formats):
    parquet, *others = (read_all(directory) for directory in in_formats.values())
    assert sum(len(shard.ids) for shard in parquet.values()) == 50
    for other in others:
        for task, shard in parquet.items():
            assert_same_rows(shard, other[task])


def test_fields_are_consistent(in_formats):
    for shard in read_all(in_formats["parquet"]).values():
        columns = shard.columns
        np.testing.assert_array_equal(
            columns["elbo"], -(columns["reconstruction_loss"] + columns["kl"])
        )
        kl = rows.kl_per_latent(columns["mean"], columns["log_var"]).sum(axis=1)
        np.testing.assert_allclose(columns["kl"], kl, rtol=1e-4)
        epsilon = (columns["z"] - columns["mean"]) / np.exp(columns["log_var"] / 2)
        expected = rows.noise(shard.shas, latent_dim=3, seed=0)
        np.testing.assert_allclose(epsilon, expected, rtol=1e-3, atol=1e-4)


def test_pandas_polars_duckdb_arrow_and_tensorflow_read_it(in_formats):
    import duckdb
    import pandas as pd
    import polars as pl
    import pyarrow.dataset
    import tensorflow as tf

    expected = rows.concatenated(list(read_all(in_formats["parquet"]).values()))
    folder = in_formats["parquet"] / "embeddings"
    glob = f"{folder}/*.parquet"
    frames = {
        "pandas": pd.read_parquet(folder),
        "polars": pl.read_parquet(glob).to_pandas(),
        "duckdb": duckdb.sql(f"select * from '{glob}'").df(),
        "arrow": pyarrow.dataset.dataset(folder).to_table().to_pandas(),
    }
    for name, frame in frames.items():
        assert frame["id"].tolist() == expected.ids, name
        assert frame["label"].tolist() == expected.labels.tolist(), name
        assert frame["class"].tolist() == list(map(str, expected.labels)), name
        assert set(frame["split"]) == {"test"}, name
        np.testing.assert_array_equal(np.stack(frame["mean"]), expected.columns["mean"], name)
    examples = []
    for path in sorted(in_formats["tfrecord"].glob("embeddings/*.tfrecord")):
        for record in tf.data.TFRecordDataset(str(path)):
            features = {
                "id": tf.io.FixedLenFeature([], tf.string),
                "class": tf.io.FixedLenFeature([], tf.string),
                "mean": tf.io.FixedLenFeature([3], tf.float32),
                "kl": tf.io.FixedLenFeature([1], tf.float32),
            }
            examples.append(tf.io.parse_single_example(record, features))
    assert [example["id"].numpy().decode() for example in examples] == expected.ids
    np.testing.assert_array_equal(
        [example["mean"] for example in examples], expected.columns["mean"]
    )


@given(st.permutations(range(20)), st.integers(1, 9))
def test_noise_depends_on_the_record_and_not_on_its_position(order, latent_dim):
    shas = random_rows(20).shas
    noise = rows.noise(shas, latent_dim=latent_dim, seed=4)
    part = rows.noise([shas[i] for i in order[:7]], latent_dim=latent_dim, seed=4)
    np.testing.assert_array_equal(part, noise[list(order[:7])])
    assert noise.shape == (20, latent_dim)


def test_noise_is_normal_and_depends_on_the_seed():
    shas = random_rows(4_000).shas
    first = rows.noise(shas, latent_dim=5, seed=0)
    second = rows.noise(shas, latent_dim=5, seed=1)
    for values in (first, second):
        # Five standard errors of 20,000 independent normal numbers.
        assert abs(values.mean()) < 5 / math.sqrt(20_000)
        assert abs(values.var() - 1) < 5 * math.sqrt(2 / 20_000)
        correlations = np.corrcoef(values.T) - np.eye(5)
        assert abs(correlations).max() < 5 / math.sqrt(4_000)
        assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / 20_000)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / math.sqrt(20_000)
