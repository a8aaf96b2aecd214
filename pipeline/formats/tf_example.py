"""One record as a tf.Example: encode, parse, and the one place where pixels become floats.

    {id: bytes, image: raw uint8 bytes of H×W×C in C order, label: int64}

Encoding is written out by hand: the promise that shards are byte-identical needs
one byte string per record, and protobuf promises none across its versions.
Parsing goes through protobuf, so that a valid Example of any writer is read. No
TensorFlow is needed for either.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# The label of a record without a label.
UNLABELLED = -1


class Record(NamedTuple):
    """One parsed record: id, image as raw bytes, label."""

    id: bytes
    image: bytes
    label: int


def _varint(value: int) -> bytes:
    """Protobuf's base-128 encoding of a number ≥ 0."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field (wire type 2)."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


@functools.lru_cache(maxsize=64)
def _bytes_prefix(name: bytes, length: int) -> bytes:
    """The bytes before the value in the map entry of a bytes feature."""
    # Features.feature (field 1): entry {key (1), value (2): Feature {bytes_list (1): {value (1)}}}.
    value = b"\x0a" + _varint(length)
    bytes_list = b"\x0a" + _varint(len(value) + length) + value
    feature = b"\x12" + _varint(len(bytes_list) + length) + bytes_list
    entry = _field(1, name) + feature
    return b"\x0a" + _varint(len(entry) + length) + entry


@functools.lru_cache(maxsize=4096)
def _label_entry(label: int) -> bytes:
    """The map entry of the label: Feature {int64_list (3): {value (1), packed}}."""
    packed = _field(1, _varint(label & 0xFFFFFFFFFFFFFFFF))
    return _field(1, _field(1, b"label") + _field(2, _field(3, packed)))


# Bytes of the label's entry, for labels below 128, and the entry of UNLABELLED.
_LABEL_BYTES = len(_label_entry(0))
_UNLABELLED_ENTRY = _label_entry(UNLABELLED)


@functools.lru_cache(maxsize=64)
def _header(length: int) -> bytes:
    """The bytes before the features: Example.features (field 1)."""
    return b"\x0a" + _varint(length)


def encode(record_id: bytes, image: bytes, label: int) -> bytes:
    """Serializes one record as a tf.Example, its features in the order id, image, label.

    Args:
      record_id: unique in the data set.
      image: uint8 pixels, H·W·C bytes in C order.
      label: an int64.
    """
    body = b"".join(
        (
            _bytes_prefix(b"id", len(record_id)),
            record_id,
            _bytes_prefix(b"image", len(image)),
            image,
            _label_entry(label),
        )
    )
    return _header(len(body)) + body


@functools.cache
def _example_class() -> Any:
    """The protobuf class of tf.Example, from a descriptor pool of its own.

    A pool of its own, because TensorFlow registers the same message in the
    default one as soon as anything imports it.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    package = "vae_pipeline"
    file = descriptor_pb2.FileDescriptorProto(
        name="vae_pipeline/example.proto", package=package, syntax="proto3"
    )
    field = descriptor_pb2.FieldDescriptorProto
    repeated, single = field.LABEL_REPEATED, field.LABEL_OPTIONAL

    def message(into: Any, name: str, *fields: tuple[str, Any, Any]) -> Any:
        descriptor = into.add(name=name)
        for number, (field_name, label, kind) in enumerate(fields, 1):
            added = descriptor.field.add(name=field_name, number=number, label=label)
            if isinstance(kind, str):
                added.type, added.type_name = field.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                added.type = kind
        return descriptor

    messages = file.message_type
    message(messages, "BytesList", ("value", repeated, field.TYPE_BYTES))
    message(messages, "FloatList", ("value", repeated, field.TYPE_FLOAT))
    message(messages, "Int64List", ("value", repeated, field.TYPE_INT64))
    message(
        messages,
        "Feature",
        ("bytes_list", single, "BytesList"),
        ("float_list", single, "FloatList"),
        ("int64_list", single, "Int64List"),
    )
    features = message(messages, "Features", ("feature", repeated, "Features.FeatureEntry"))
    entry = message(
        features.nested_type,
        "FeatureEntry",
        ("key", single, field.TYPE_STRING),
        ("value", single, "Feature"),
    )
    entry.options.map_entry = True
    message(messages, "Example", ("features", single, "Features"))

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Example"))


@functools.lru_cache(maxsize=64)
def _image_bytes(length: int) -> int:
    """Length of the image in a map entry of `length` bytes."""
    size = max(0, length)
    while size > 0 and size + len(_bytes_prefix(b"image", size)) > length:
        size -= 1
    return size


def _parse_encoded(data: bytes) -> Record | None:
    """Parses bytes that `encode` wrote, several times as fast as protobuf; None for others.

    Computes the positions for a short id, and for a label below 128 or UNLABELLED, and then checks
    that `encode` gives the same bytes.
    """
    if len(data) < 128:
        return None
    label, label_bytes = data[-1], _LABEL_BYTES
    if data.endswith(_UNLABELLED_ENTRY):
        label, label_bytes = UNLABELLED, len(_UNLABELLED_ENTRY)
    start = len(_header(len(data))) + len(_bytes_prefix(b"id", 1))
    end = start + data[start - 1]  # The byte before the id is its length.
    image = end + len(_bytes_prefix(b"image", _image_bytes(len(data) - label_bytes - end)))
    record = Record(data[start:end], data[image:-label_bytes], label)
    return record if encode(*record) == data else None


def parse(serialized: bytes) -> Record:
    """Reads one record from a serialized tf.Example.

    Raises:
      ValueError: the bytes are no tf.Example, or a feature is missing or of another type.
    """
    record = _parse_encoded(serialized)
    if record:
        return record
    from google.protobuf.message import DecodeError

    try:
        feature = _example_class().FromString(serialized).features.feature
    except DecodeError as error:
        raise ValueError(f"{len(serialized)} bytes that are no tf.Example ({error})") from error
    # A missing key gives an empty feature, which _only refuses.
    return Record(
        id=_only("id", feature["id"].bytes_list.value),
        image=_only("image", feature["image"].bytes_list.value),
        label=_only("label", feature["label"].int64_list.value),
    )


def encode_features(features: Mapping[str, bytes | int | np.ndarray]) -> bytes:
    """Features as a tf.Example, keys in order; values are bytes, an int, or float32 (n,)."""
    example = _example_class()()
    for name, value in sorted(features.items()):
        feature = example.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif isinstance(value, int):
            feature.int64_list.value.append(value)
        else:
            feature.float_list.value.extend(value.tolist())
    serialized: bytes = example.SerializeToString(deterministic=True)
    return serialized


def parse_features(serialized: bytes) -> dict[str, Any]:
    """Parses the bytes of `encode_features`; arrays become lists of floats."""
    features: dict[str, Any] = {}
    for name, feature in _example_class().FromString(serialized).features.feature.items():
        if feature.HasField("float_list"):
            features[name] = list(feature.float_list.value)
        else:
            values = feature.bytes_list.value or feature.int64_list.value
            features[name] = _only(name, values)
    return features


def _only(name: str, values: Any) -> Any:
    if len(values) != 1:
        raise ValueError(
            f"feature {name!r} has {len(values)} values; expected 1: a record holds "
            "id (bytes), image (bytes) and label (int64)"
        )
    return values[0]


def to_floats(pixels: Any) -> Any:
    """uint8 pixels in 0..255 to float32 in [0, 1]; a tf.Tensor of any shape."""
    import tensorflow as tf

    # TensorFlow turns `/ 255.0` into this product in most graphs, but not in all; written as a
    # product, every graph has the same bits.
    return tf.cast(pixels, tf.float32) * (1 / 255)


def to_pixels(floats: np.ndarray) -> np.ndarray:
    """float32 in [0, 1] to uint8 pixels in 0..255, rounded; an array of any shape."""
    return np.clip(np.rint(floats * 255.0), 0, 255).astype(np.uint8)
