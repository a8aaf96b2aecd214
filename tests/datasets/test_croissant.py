"""mlcroissant accepts croissant.json of every set, and reads in it what the manifest says."""

import json
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import mlcroissant
import pytest

from pipeline.datasets import croissant, reader
from tests.conftest import REPOSITORY, make_idx_set, make_shards

# What only a publisher knows.
_PUBLISHED = {
    "datePublished": "2026-11-27",
    "url": "https://example.org/blobs",
    "license": "https://spdx.org/licenses/CC0-1.0.html",
    "creator": {"@type": "sc:Person", "name": "Ada"},
}
_UNDATED = 'Property "https://schema.org/datePublished" is recommended, but does not exist.'


def described(directory: pathlib.Path, caplog) -> mlcroissant.Dataset:
    """A set's croissant.json, which says what the manifest says."""
    caplog.clear()
    croissant_set = mlcroissant.Dataset(jsonld=directory / croissant.FILE)
    metadata = croissant_set.metadata
    manifest = reader.Dataset(str(directory)).manifest
    # mlcroissant logs further warnings, for example of the context.
    assert len(caplog.records) == 1
    assert not metadata.ctx.issues.errors
    assert metadata.ctx.issues.warnings == {f"[Metadata({manifest['name']})] {_UNDATED}"}

    shards = [entry for entry in manifest["files"] if "split" in entry]
    files = {file.content_url: (file.sha256, file.content_size) for file in metadata.file_objects}
    assert files == {entry["name"]: (entry["sha256"], f"{entry['bytes']} B") for entry in shards}
    [file_set] = metadata.file_sets
    included = {path.name for glob in file_set.includes for path in directory.glob(glob)}
    assert included == files.keys()

    assert (metadata.name, manifest["dataset_id"]) == (manifest["name"], metadata.cite_as[-17:-1])
    total = sum(manifest["splits"].values())
    assert metadata.description.startswith(f"{total:,} images of ")
    for split, count in manifest["splits"].items():
        assert f" {split} {count:,}" in metadata.description
    record_sets = {record_set.id: record_set for record_set in metadata.record_sets}
    fields = {field.name: field for field in record_sets["records"].fields}
    assert fields["image"].array_shape_tuple == tuple(manifest["image_shape"])
    pattern = fields["split"].source.transforms[0].regex
    for entry in shards:
        assert re.search(pattern, entry["name"])[1] == entry["split"]
    splits = [record["splits/name"] for record in croissant_set.records("splits")]
    assert splits == list(manifest["splits"])
    assert ("classes" in record_sets) == bool(manifest["class_names"])
    if manifest["class_names"]:
        classes = [tuple(record.values()) for record in croissant_set.records("classes")]
        assert classes == list(enumerate(manifest["class_names"]))
    return croissant_set


def test_sets_with_and_without_labels_packed_and_grown(data_dir, idx_dir, tmp_path, caplog):
    described(data_dir, caplog)
    for name, settings in (("none", {"labels": "none"}), ("gz", {"compression": "gzip"})):
        make_shards(f"idx:{idx_dir}", tmp_path / name, num_shards=1, **settings)
        described(tmp_path / name, caplog)
    before = (tmp_path / "none" / croissant.FILE).read_bytes()
    more = make_idx_set(tmp_path / "more", num_train=20, num_test=3)
    settings = {"labels": "none", "append": True, "id_prefix": "more-"}
    make_shards(f"idx:{more}", tmp_path / "none", num_shards=1, **settings)
    described(tmp_path / "none", caplog)
    assert (tmp_path / "none" / croissant.FILE).read_bytes() != before


def test_a_publisher_adds_what_the_file_lacks(data_dir, caplog):
    text = (data_dir / croissant.FILE).read_text()
    metadata = mlcroissant.Dataset(jsonld=json.loads(text) | _PUBLISHED).metadata
    assert not metadata.ctx.issues.errors | metadata.ctx.issues.warnings
    assert not caplog.records


def test_the_snippet_of_the_docs(data_dir, capsys):
    page = (REPOSITORY / "docs" / "preprocess.md").read_text()
    [snippet] = re.findall(r"```python\n(import mlcroissant.*?)```", page, re.S)
    exec(snippet.replace("/tmp/mnist", str(data_dir)), {})
    assert capsys.readouterr().out == "".join(f"{label} {label}\n" for label in range(10))


def test_mlcroissant_has_no_reader_of_tfrecords(data_dir, caplog):
    """So docs/preprocess.md names another for the records."""
    with pytest.raises(mlcroissant.GenerationError) as caught:
        next(iter(described(data_dir, caplog).records("records")))
    assert "None of the provided encoding formats" in str(caught.value.__cause__)


@hypothesis.given(st.lists(st.text(max_size=4), unique=True, min_size=1))
@hypothesis.settings(max_examples=20)
def test_any_class_names_and_splits(class_names):
    data = croissant.croissant_json(
        name="été_1",
        dataset_id="0" * 16,
        image_shape=(2, 3, 3),
        class_names=class_names,
        splits={"train": [], "extra": []},
        compression="none",
    )
    croissant_set = mlcroissant.Dataset(jsonld=json.loads(data))
    assert not croissant_set.metadata.ctx.issues.errors
    [train, extra] = croissant_set.records("splits")
    assert train == {"splits/name": "train", "splits/url": "cr:TrainingSplit"}
    assert extra["splits/name"] == "extra"
    names = [record["classes/name"] for record in croissant_set.records("classes")]
    assert names == class_names
