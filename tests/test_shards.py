import numpy as np
import pytest

from pipeline import examples, shards, tfrecord
from pipeline.errors import StageError


def some_records(count: int = 5) -> list[bytes]:
    return [examples.encode(b"train-%07d" % i, bytes([i] * 40), i) for i in range(count)]


def test_tensorflow_reads_what_is_written_and_writes_what_is_read(tmp_path):
    import tensorflow as tf

    records = some_records()
    entry = tfrecord.write_file(str(tmp_path), "ours", records)
    assert entry["num_examples"] == len(records)
    assert [x.numpy() for x in tf.data.TFRecordDataset(str(tmp_path / "ours"))] == records

    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for record in records:
            writer.write(record)
    data = (tmp_path / "theirs").read_bytes()
    assert data == (tmp_path / "ours").read_bytes()
    assert list(tfrecord.records(data, "theirs")) == records


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    tfrecord.write_file(str(tmp_path), "shard", some_records(2))
    data = (tmp_path / "shard").read_bytes()
    whole = len(data) // 2  # Both records are of one length, so a cut here is no damage.
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(StageError, match=r"byte (0|\d+)"):
            list(tfrecord.records(bytes(damaged), "shard"))
        if place not in (0, whole):
            with pytest.raises(StageError, match="runs past the end"):
                list(tfrecord.records(data[:place], "shard"))


def test_dataset_reads_back_what_the_source_holds(data_dir, idx_dir):
    from pipeline import sources

    source = sources.open_source(f"idx:{idx_dir}")
    dataset = shards.Dataset(str(data_dir))
    expected = {}
    everything = np.arange(sum(source.split_sizes.values()))
    for record_id, image, label in zip(
        source.ids(everything), *source.read(everything), strict=True
    ):
        expected[record_id.decode()] = (image.tobytes(), label)
    found, per_split = {}, {}
    for split in dataset.splits:
        for entry in dataset.shards(split):
            shard = dataset.read_shard(entry)
            for record_id, image, label in zip(shard.ids, shard.images, shard.labels, strict=True):
                assert record_id not in found
                found[record_id] = (image.tobytes(), label)
                per_split.setdefault(split, set()).add(record_id.split("-")[0])
    assert found == expected
    assert per_split == {"train": {"train"}, "validation": {"train"}, "test": {"test"}}


def test_tensorflow_datasets_and_beam_read_the_directory(data_dir):
    import apache_beam as beam
    import tensorflow_datasets as tfds
    from apache_beam.testing.util import assert_that, equal_to

    from pipeline import beam_runner

    dataset = shards.Dataset(str(data_dir))
    builder = tfds.builder_from_directory(str(data_dir))
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    for split in dataset.splits:
        read = builder.as_dataset(split=split, read_config=in_order)
        images = [example["image"] for example in tfds.as_numpy(read)]
        np.testing.assert_array_equal(images, dataset.read_images(split))

    ids = [i for entry in dataset.shards("test") for i in dataset.read_shard(entry).ids]
    pipeline = beam.Pipeline(runner=beam_runner.make_runner(beam_runner.parse_options([])))
    read = (
        pipeline
        | beam.io.ReadFromTFRecord(str(data_dir / "blobs-test.tfrecord-*"))
        | beam.Map(lambda record: examples.parse(record).id.decode())
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
        shards.Dataset(str(tmp_path / "out")).read_images("train")
    assert "blobs-train.tfrecord-00001-of-00002" in str(error.value)


def test_no_such_split(data_dir):
    with pytest.raises(StageError, match="split 'tset': .* has train, validation, test"):
        shards.Dataset(str(data_dir)).shards("tset")
