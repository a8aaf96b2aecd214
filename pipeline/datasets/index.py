"""The index of a shard: a row of 50 bytes for each record, in the order of the shard.

With the indexes, a job finds ids, equal images, labels and places of records, and reads no shard.
They lie in `index/`, made with the shards and named in the manifest. An index is a function of its
shard, so one that is missing or damaged is made anew.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.formats import tfrecord
from pipeline.sources.splits import in_order
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import FileEntry, is_shard

DIRECTORY = "index"
# Start of the name of the file with the hashes of ids that were removed, and stay out.
_BARRED = f"{DIRECTORY}/barred-"
_DTYPE = np.dtype(
    [
        ("id", "<u8", (2,)),  # The hash of the id, see placement.id_hashes.
        ("image", "<u8", (2,)),  # The hash of the pixels, see image_hashes.
        ("label", "<i8"),
        ("offset", "<u8"),  # Of the record's frame in the unpacked file.
        ("lowest", "u1"),  # Smallest and largest value of the pixels.
        ("highest", "u1"),
    ]
)


class Index:
    """The rows of a shard's index."""

    def __init__(self, rows: np.ndarray):
        """`rows` are of the index's structured dtype, (n,)."""
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> np.ndarray:
        """Hashes of ids, uint64 (n, 2); the second numbers ascend."""
        return self.rows["id"]

    @property
    def images(self) -> np.ndarray:
        """Hashes of images, uint64 (n, 2)."""
        return self.rows["image"]

    @property
    def offsets(self) -> np.ndarray:
        """Where each record's frame begins in the unpacked file: uint64 (n,)."""
        return self.rows["offset"]

    def positions_of_ids(self, ids: np.ndarray) -> np.ndarray:
        """The position of each id in the shard, int64 (m,); −1 if the shard does not hold it.

        Args:
          ids: hashes of ids, uint64 (m, 2).
        """
        if not len(self):
            return np.full(len(ids), -1, np.int64)
        keys = np.ascontiguousarray(self.ids[:, 1])
        positions = np.minimum(np.searchsorted(keys, ids[:, 1]), len(self) - 1)
        return np.where((self.ids[positions] == ids).all(axis=1), positions, -1)

    def to_bytes(self) -> bytes:
        """An .npy file."""
        buffer = io.BytesIO()
        np.save(buffer, self.rows)
        return buffer.getvalue()


class Builder:
    """Collects the rows of a shard's index, record by record in the order of the shard."""

    def __init__(self):
        self._parts, self._end = [np.empty(0, _DTYPE)], 0

    def add(
        self,
        id_hashes: np.ndarray,
        images: Sequence[bytes],
        labels: np.ndarray,
        num_bytes: Sequence[int],
    ) -> np.ndarray:
        """Adds n > 0 records.

        Args:
          id_hashes: uint64 (n, 2), see placement.id_hashes.
          images: the records' pixels, H·W·C bytes each.
          labels: int64 (n,).
          num_bytes: lengths of the serialized records.

        Returns:
          The pixels, uint8 (n, H·W·C).
        """
        rows = np.empty(len(images), _DTYPE)
        rows["id"], rows["image"], rows["label"] = id_hashes, image_hashes(images), labels
        ends = self._end + np.cumsum(np.array(num_bytes) + tfrecord.FRAME_BYTES)
        rows["offset"][0], rows["offset"][1:] = self._end, ends[:-1]
        self._end = int(ends[-1])
        pixels = np.frombuffer(b"".join(images), np.uint8).reshape(len(rows), -1)
        rows["lowest"], rows["highest"] = pixels.min(axis=1), pixels.max(axis=1)
        self._parts.append(rows)
        return pixels

    def index(self) -> Index:
        """The index of all records added."""
        return Index(np.concatenate(self._parts))


def places_in(ordered: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """For each of some hashes of images, its first place in a sorted array; −1 without one.

    Args:
      ordered: uint64 (m, 2), sorted by the first numbers.
      hashes: uint64 (n, 2).

    Returns:
      int64 (n,).
    """
    if not len(ordered):
        return np.full(len(hashes), -1, np.int64)
    # Different images with equal first numbers do not occur: 64 bits of a hash.
    places = np.searchsorted(np.ascontiguousarray(ordered[:, 0]), hashes[:, 0])
    places = np.minimum(places, len(ordered) - 1)
    return np.where((ordered[places] == hashes).all(axis=1), places, -1)


def are_among(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each hash is among some others: bool (n,).

    Args:
      hashes: uint64 (n, 2).
      others: uint64 (m, 2), sorted by both numbers.
    """
    return places_in(others, hashes) >= 0


def image_hashes(images: Iterable[bytes]) -> np.ndarray:
    """The first 16 bytes of each image's sha256, uint64 (n, 2), leading bytes first.

    Args:
      images: H·W·C bytes each, or arrays of as many uint8.
    """
    joined = b"".join([hashlib.sha256(image).digest()[:16] for image in images])
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)


def file_name(shard: str) -> str:
    """The index's file below the data set, for the file name of a shard.

    The name matches no pattern such as `*.tfrecord-*`.
    """
    return f"{DIRECTORY}/{shard.replace('.tfrecord-', '-').removesuffix('.gz')}.npy"


def entry_of(files: Mapping[str, FileEntry], shard: FileEntry) -> FileEntry | None:
    """The manifest entry of a shard's index; None in a set of an earlier version.

    Args:
      files: name -> entry of all files of the data set.
      shard: the shard's entry.
    """
    return files.get(file_name(shard["name"]))


def read(directory: str, shard: FileEntry, entry: FileEntry | None) -> Index | None:
    """The index of a shard; None if the index is missing or damaged, or is not the shard's.

    Args:
      directory: the data set's.
      shard: the shard's manifest entry.
      entry: the index's manifest entry, if there is one.
    """
    if entry is None:
        return None
    try:
        data = manifest_lib.read_file(directory, entry)
        rows = np.load(io.BytesIO(data), allow_pickle=False)
    except (StageError, OSError, ValueError, EOFError):
        return None
    is_right = rows.dtype == _DTYPE and rows.shape == (shard["num_examples"],)
    return Index(rows) if is_right else None


class Damaged(StageError):
    """Indexes are missing or damaged."""

    def __init__(self, shards: Sequence[FileEntry]):
        """`shards` are the entries of their shards."""
        self.shards = shards
        names = ", ".join(file_name(shard["name"]) for shard in shards[:3])
        super().__init__(
            f"{names}{', …' if len(shards) > 3 else ''}: missing or damaged; expected the indexes "
            "of the shards: run python -m pipeline.preprocess --append, which makes them anew"
        )


class Places(NamedTuple):
    """Where n records are."""

    shards: np.ndarray  # int64 (n,): numbers of shards in `Indexes.shards`; −1 for none
    positions: np.ndarray  # int64 (n,), in the shard


class Indexes:
    """The indexes of a data set, each read when it is asked for."""

    def __init__(self, directory: str, files: Iterable[FileEntry]):
        """`files` are the manifest's."""
        self.directory = directory
        self._files = {entry["name"]: entry for entry in files}
        self.shards = [entry for entry in self._files.values() if is_shard(entry)]

    def by_split(self) -> dict[str, list[FileEntry]]:
        """The splits that have shards, in their order -> the shards."""
        splits = in_order({shard["split"] for shard in self.shards})
        return {split: [s for s in self.shards if s["split"] == split] for split in splits}

    def read(self, shard: FileEntry) -> Index | None:
        """As the function `read`."""
        return read(self.directory, shard, entry_of(self._files, shard))

    def __getitem__(self, shard: FileEntry) -> Index:
        """The index of a shard.

        Raises:
          Damaged: the index is missing or damaged.
        """
        index = self.read(shard)
        if index is None:
            raise Damaged([shard])
        return index

    def ids(self) -> np.ndarray:
        """Hashes of the ids of all records, uint64 (n, 2)."""
        return np.concatenate(
            [np.empty((0, 2), np.uint64), *(self[shard].ids for shard in self.shards)]
        )

    def find(self, ids: np.ndarray) -> Places:
        """Where each id is, if the set holds it.

        Args:
          ids: hashes of ids, uint64 (n, 2).

        Raises:
          Damaged: names every index that is missing or damaged.
        """
        shards, positions = np.full(len(ids), -1, np.int64), np.full(len(ids), -1, np.int64)
        damaged = []
        for number, shard in enumerate(self.shards):
            index = self.read(shard)
            if index is None:
                damaged.append(shard)
                continue
            matches = index.positions_of_ids(ids)
            is_here = matches >= 0
            shards[is_here], positions[is_here] = number, matches[is_here]
        if damaged:
            raise Damaged(damaged)
        return Places(shards, positions)

    def rows(self, places: Places) -> np.ndarray:
        """The rows of n records, (n,)."""
        rows = np.empty(len(places.shards), _DTYPE)
        for number in np.unique(places.shards).tolist():
            mask = places.shards == number
            rows[mask] = self[self.shards[number]].rows[places.positions[mask]]
        return rows


def is_barred(name: str) -> bool:
    """Whether a file of a data set holds the hashes of removed ids."""
    return name.startswith(_BARRED)


def barred_name(number: int) -> str:
    """The file that the removal with this number writes."""
    return f"{_BARRED}{number:04d}.npy"


def read_barred(directory: str, files: Iterable[FileEntry]) -> np.ndarray:
    """Hashes of the ids that were removed from a data set: uint64 (n, 2), sorted.

    Args:
      directory: the data set's.
      files: the manifest's.

    Raises:
      StageError: the file is missing or damaged.
    """
    for entry in files:
        if is_barred(entry["name"]):
            return np.load(io.BytesIO(manifest_lib.read_file(directory, entry)))
    return np.empty((0, 2), np.uint64)


def statistics_name(split: str) -> str:
    """The file, below the data set, of a split's statistics."""
    return f"{DIRECTORY}/statistics-{split}.npz"
