import shutil

import numpy as np
import pytest

from pipeline.cli.errors import StageError
from pipeline.datasets import reader
from pipeline.formats import tf_example, tfrecord


def test_dataset_reads_back_what_the_source_holds(data_dir, idx_dir):
    from pipeline import sources

    source = sources.open_source(f"idx:{idx_dir}")
    dataset = reader.Dataset(str(data_dir))
    expected = {}
    everything = np.arange(sum(source.split_sizes.values()))
    for record_id, image, label in zip(
        source.ids(everything), *source.read(everything), strict=True
    ):
        expected[record_id.decode()] = (image.tobytes(), label)
    records, per_split = {}, {}
    for split in dataset.splits:
        for entry in dataset.shards(split):
            shard = dataset.read_shard(entry)
            for record_id, image, label in zip(shard.ids, shard.images, shard.labels, strict=True):
                assert record_id not in records
                records[record_id] = (image.tobytes(), label)
                per_split.setdefault(split, set()).add(record_id.split("-")[0])
    assert records == expected
    assert per_split == {"train": {"train"}, "validation": {"train"}, "test": {"test"}}


def test_tensorflow_datasets_and_beam_read_the_directory(data_dir):
    import apache_beam as beam
    import tensorflow_datasets as tfds
    from apache_beam.testing.util import assert_that, equal_to

    from pipeline.runners import options as beam_options
    from pipeline.runners import run as runner

    dataset = reader.Dataset(str(data_dir))
    builder = tfds.builder_from_directory(str(data_dir))
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    for split in dataset.splits:
        read = builder.as_dataset(split=split, read_config=in_order)
        images = [example["image"] for example in tfds.as_numpy(read)]
        np.testing.assert_array_equal(images, dataset.read_images(split))

    ids = [i for entry in dataset.shards("test") for i in dataset.read_shard(entry).ids]
    pipeline = beam.Pipeline(runner=runner.make_runner(beam_options.parse_options([])))
    read = (
        pipeline
        | beam.io.ReadFromTFRecord(str(data_dir / "blobs-test.tfrecord-*"))
        | beam.Map(lambda record: tf_example.parse(record).id.decode())
    )
    assert_that(read, equal_to(ids))
    pipeline.run()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing, though manifest.json lists it"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged: .* bytes with sha256"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "damaged"),
    ],
)
def test_a_damaged_shard_is_an_error_that_names_it(idx_dir, tmp_path, damage, message):
    from tests.conftest import make_shards

    make_shards(f"idx:{idx_dir}", tmp_path / "out", num_shards=2)
    damage(tmp_path / "out" / "blobs-train.tfrecord-00001-of-00002")
    with pytest.raises(StageError, match=message) as error:
        reader.Dataset(str(tmp_path / "out")).read_images("train")
    assert "blobs-train.tfrecord-00001-of-00002" in str(error.value)


def damage_one_record(directory, name: str) -> int:
    """Flips a bit in the second record of a shard; returns its offset."""
    path = directory / name
    data = bytearray(path.read_bytes())
    offset = len(data) // sum(1 for _ in tfrecord.records(bytes(data), name))
    data[offset + 30] ^= 4
    path.write_bytes(bytes(data))
    return offset


def test_records_that_can_be_had_are_had_on_request(data_dir, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(data_dir, out)
    name = "blobs-train.tfrecord-00001-of-00004"
    offset = damage_one_record(out, name)
    with pytest.raises(StageError, match=f"{name}: damaged"):
        reader.Dataset(str(out)).read_images("train")

    images, damaged_shards = reader.Dataset(str(out), on_corrupt="quarantine").read_split("train")
    whole = reader.Dataset(str(data_dir))
    place = whole.shards("train")[0]["num_examples"] + 1
    np.testing.assert_array_equal(images, np.delete(whole.read_images("train"), place, axis=0))
    [damaged] = damaged_shards
    assert (damaged.name, damaged.num_records, damaged.faults[0].offset) == (name, 1, offset)
    [line] = damaged.lines(str(out))
    assert line["where"] == f"{out}/{name} byte {offset}"
    assert "checksum" in line["reason"]


@pytest.mark.parametrize(
    ("damage", "num_left", "reason"),
    [
        (lambda path: path.unlink(), 0, "the file is missing"),
        (lambda path: path.write_bytes(b""), 0, "the file ends after 0 of"),
        (lambda path: path.write_bytes(b"x" * 100), 0, "length is wrong"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), -1, "past the end"),
    ],
)
def test_what_is_left_of_a_shard(data_dir, tmp_path, damage, num_left, reason):
    out = tmp_path / "out"
    shutil.copytree(data_dir, out)
    dataset = reader.Dataset(str(out), on_corrupt="quarantine")
    entry = dataset.shards("train")[2]
    damage(out / entry["name"])
    shard = dataset.read_shard(entry)
    assert len(shard.ids) == (num_left if num_left >= 0 else entry["num_examples"] + num_left)
    assert reason in shard.faults[0].reason


def test_whole_records_of_another_file_are_no_damage_to_put_up_with(data_dir, tmp_path):
    """A shard in another's place has no fault in any record, and is still the wrong one."""
    out = tmp_path / "out"
    shutil.copytree(data_dir, out)
    dataset = reader.Dataset(str(out), on_corrupt="quarantine")
    first, second = sorted(dataset.shards("train"), key=lambda e: e["num_examples"])[:2]
    shutil.copy(out / second["name"], out / first["name"])
    with pytest.raises(StageError, match="is not the file in the manifest"):
        dataset.read_shard(first)


def test_no_such_split(data_dir):
    with pytest.raises(StageError, match="--split=tset: .* has train, validation, test"):
        reader.Dataset(str(data_dir)).shards("tset")
