import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pipeline.formats import tf_example

records = st.tuples(
    st.binary(max_size=300), st.binary(max_size=5000), st.integers(-(2**63), 2**63 - 1)
)


def tensorflow_bytes(record_id: bytes, image: bytes, label: int) -> bytes:
    import tensorflow as tf

    feature = {
        "id": tf.train.Feature(bytes_list=tf.train.BytesList(value=[record_id])),
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    return example.SerializeToString(deterministic=True)


@hypothesis.given(records)
def test_encode_is_what_tensorflow_writes_and_parse_gives_it_back(record):
    encoded = tf_example.encode(*record)
    assert encoded == tensorflow_bytes(*record)
    assert tuple(tf_example.parse(encoded)) == record


@hypothesis.given(records, st.data())
def test_the_short_way_to_parse_tells_what_the_long_one_does(record, data):
    """Whatever is changed in the bytes: the record that protobuf finds, or its error."""
    changed = bytearray(tf_example.encode(*record[:2], record[2] % 128))
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    found = tf_example._parse_encoded(bytes(changed))
    if found:
        assert tf_example.encode(*found) == changed
        assert tensorflow_bytes(*found) == changed


@pytest.mark.parametrize("label", [0, 127, tf_example.UNLABELLED])
def test_records_as_preprocess_writes_them_take_the_short_way(label):
    record = (b"test-0000001", bytes(range(256)) * 3, label)
    assert tf_example._parse_encoded(tf_example.encode(*record)) == record
    # Pixels that end like the entry of another label.
    record = (b"id", bytes(200) + tf_example._label_entry(tf_example.UNLABELLED), label)
    assert tf_example._parse_encoded(tf_example.encode(*record)) == record


@pytest.mark.parametrize(
    ("serialized", "message"),
    [
        (b"", "feature 'id' has 0 values; expected 1"),
        (b"\x0a\x05abc", "5 bytes that are no tf.Example"),
        (tf_example.encode(b"a", b"b", 1)[:-1], "no tf.Example"),
    ],
)
def test_what_is_no_record_is_refused(serialized, message):
    with pytest.raises(ValueError, match=message):
        tf_example.parse(serialized)


def test_every_pixel_survives_the_way_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    floats = tf_example.to_floats(pixels).numpy()
    assert (floats.min(), floats.max(), floats.dtype) == (0, 1, np.float32)
    np.testing.assert_array_equal(tf_example.to_pixels(floats), pixels)
