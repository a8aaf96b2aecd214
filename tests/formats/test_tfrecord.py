import gzip
import struct

import hypothesis
import hypothesis.strategies as st
import pytest

from pipeline.cli.errors import StageError
from pipeline.formats import tf_example, tfrecord

RECORDS = st.lists(st.binary(max_size=60), max_size=8)


def some_records(count: int = 5) -> list[bytes]:
    return [tf_example.encode(b"train-%07d" % i, bytes([i] * 40), i) for i in range(count)]


def written(tmp_path, records, name="shard") -> bytes:
    with open(tmp_path / name, "wb") as file:
        tfrecord.write(file, name, records)
    return (tmp_path / name).read_bytes()


def split(data: bytes, name: str = "shard"):
    """(offset, record) of the good, and the faults."""
    found = list(tfrecord.scan(data, name))
    faults = [f for f in found if isinstance(f, tfrecord.Fault)]
    return [f for f in found if not isinstance(f, tfrecord.Fault)], faults


def test_tensorflow_reads_what_is_written_and_writes_what_is_read(tmp_path):
    import tensorflow as tf

    records = some_records()
    with open(tmp_path / "ours", "wb") as file:
        assert tfrecord.write(file, "ours", records) == len(records)
    assert [x.numpy() for x in tf.data.TFRecordDataset(str(tmp_path / "ours"))] == records

    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for record in records:
            writer.write(record)
    data = (tmp_path / "theirs").read_bytes()
    assert data == (tmp_path / "ours").read_bytes()
    assert list(tfrecord.records(data, "theirs")) == records


def test_tensorflow_beam_and_gzip_read_what_is_packed(tmp_path):
    import apache_beam as beam
    import tensorflow as tf
    from apache_beam.testing.util import assert_that, equal_to

    from pipeline.runners import options as beam_options
    from pipeline.runners import run as runner

    records = some_records()
    packed, plain = written(tmp_path, records, "ours.gz"), written(tmp_path, records, "ours")
    assert gzip.decompress(packed) == plain
    assert written(tmp_path, records, "again.gz") == packed  # No name and no time in it.
    read = tf.data.TFRecordDataset(str(tmp_path / "ours.gz"), compression_type="GZIP")
    assert [x.numpy() for x in read] == records
    pipeline = beam.Pipeline(runner=runner.make_runner(beam_options.parse_options([])))
    assert_that(pipeline | beam.io.ReadFromTFRecord(str(tmp_path / "ours.gz")), equal_to(records))
    pipeline.run()


@hypothesis.given(RECORDS, st.booleans())
def test_what_is_written_is_read(tmp_path_factory, records, packed):
    name = "shard.gz" if packed else "shard"
    data = written(tmp_path_factory.mktemp("shard"), records, name)
    good, faults = split(data, name)
    assert [record for _, record in good] == records
    assert not faults


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    data = written(tmp_path, some_records(2))
    whole = len(data) // 2  # Both records are of one length, so a cut here is no damage.
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(StageError, match=r"at byte (0|\d+)"):
            list(tfrecord.records(bytes(damaged), "shard"))
        if place not in (0, whole):
            with pytest.raises(StageError, match="runs past the end"):
                list(tfrecord.records(data[:place], "shard"))


def test_every_flipped_bit_costs_one_record_and_is_named_with_its_offset(tmp_path):
    records = some_records(4)
    data = written(tmp_path, records)
    size = len(data) // 4
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        good, faults = split(bytes(damaged))
        hit = place // size
        assert [record for _, record in good] == records[:hit] + records[hit + 1 :]
        assert [fault.offset for fault in faults] == [hit * size]


@hypothesis.given(st.data())
def test_what_is_missing_or_in_between_costs_only_the_records_it_touches(tmp_path_factory, data):
    """Cuts a piece out of a file, or puts foreign bytes in: the other records are found."""
    records = some_records(6)
    whole = written(tmp_path_factory.mktemp("shard"), records)
    size = len(whole) // 6
    start = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(start, len(whole)))
    foreign = data.draw(st.binary(max_size=40))
    good, faults = split(whole[:start] + foreign + whole[end:])
    before, after = records[: start // size], records[-(-end // size) :]
    if end == start and start % size == 0:
        before, after = records[: start // size], records[start // size :]
    found = [record for _, record in good]
    assert found[: len(before)] == before
    assert found[len(found) - len(after) :] == after
    assert all(record in records for record in found)
    if len(found) < 6 and (start % size or end % size or foreign):
        assert faults
    assert all(0 <= fault.offset <= len(whole) + 40 for fault in faults)


def test_lengths_that_lie_are_found_out(tmp_path):
    data = written(tmp_path, some_records(2))
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        packed = struct.pack("<Q", length)
        crc = struct.pack("<I", tfrecord._masked_crc(packed))
        good, faults = split(packed + crc + data)
        assert [record for _, record in good] == some_records(2)
        assert faults[0].offset == 0


@pytest.mark.parametrize("size", [1, 10, 100])
def test_zeros_hold_no_record(size):
    good, faults = split(bytes(size * 10_000))
    assert not good
    assert [fault.offset for fault in faults] == [0]


def test_of_a_damaged_gzip_file_the_records_before_are_had(tmp_path):
    import random

    generator = random.Random(3)
    records = [generator.randbytes(3_000) for _ in range(60)]
    packed = written(tmp_path, records, "shard.gz")
    assert len(packed) > 150_000
    cases = {
        "cut": packed[:100_000],
        "flipped": packed[:100_000] + bytes([packed[100_000] ^ 255]) + packed[100_001:],
        "something after": packed + b"x",
    }
    for name, data in cases.items():
        good, faults = split(data, "shard.gz")
        found = [record for _, record in good]
        assert found == [record for record in records if record in found], name
        assert found[:20] == records[:20]
        assert faults and "gzip stream" in faults[-1].reason, name
