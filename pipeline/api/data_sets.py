"""Image sets to data sets: `preprocess`, and what it shares with the command of that name."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.api.keywords import ImageSetKeywords, PreprocessKeywords, taking
from pipeline.cli import quiet
from pipeline.cli.errors import UsageError
from pipeline.stages import gate
from pipeline.storage import files

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

    from pipeline.datasets.building import create
    from pipeline.datasets.profile import drift
    from pipeline.sources import conversion


@dataclasses.dataclass(frozen=True)
class DataSet(os.PathLike[str]):
    """A finished data set, which other functions take as the path of its directory."""

    directory: str  # Local path or URL.
    dataset_id: str  # 16 hex digits
    image_shape: tuple[int, int, int]  # (H, W, C)
    class_names: tuple[str, ...]  # class_names[i] is the name of label i; () without labels
    splits: Mapping[str, int]  # Split -> number of records.
    quarantined: int  # Unreadable records, which are listed in quarantine/.
    warnings: tuple[str, ...]
    reused: bool  # Whether the directory was finished already, and nothing is new.

    def __fspath__(self) -> str:
        return self.directory

    @property
    def manifest(self) -> str:
        """The path or URL of manifest.json."""
        return files.join(self.directory, "manifest.json")


@contextlib.contextmanager
def spec_of(
    source: Any, keywords: ImageSetKeywords, options: "PipelineOptions"
) -> Iterator["conversion.SourceSpec"]:
    """Within the block, a source or arrays of this process can be opened by the spec.

    Args:
      source: as in --source, or arrays.
      keywords: the conversion, and perhaps the labels of the arrays.
      options: Beam's.

    Raises:
      UsageError: arrays with several processes, or keywords that do not fit each other.
      StageError: class_names=@DATA_DIR is no data set with classes.
    """
    from pipeline.runners import run
    from pipeline.sources import opened_source
    from pipeline.sources.readers.array_layout import in_memory

    if isinstance(source, str):
        if not isinstance(keywords.labels, str):
            raise UsageError(
                f"--labels: labels in arrays, and --source={source} is none; expected auto or none"
            )
        yield keywords.source_spec(source)
        return
    if not run.is_in_this_process(options):
        raise UsageError(
            f"--beam_args={' '.join(keywords.beam_args)}: other processes cannot read the arrays "
            "of this process; expected Beam's local runner with one worker: leave them out, or "
            "save numpy.savez(FILE, x=images, y=labels) and pass source='npz:FILE'"
        )
    labels = None
    if not isinstance(keywords.labels, str):
        labels, keywords = keywords.labels, dataclasses.replace(keywords, labels="auto")
    with in_memory.readable(source, labels) as name:
        try:
            yield keywords.source_spec(name)
        finally:  # Else the arrays would stay in memory.
            opened_source.open_source_once.cache_clear()


@contextlib.contextmanager
def requested(keywords: PreprocessKeywords) -> Iterator["create.Request"]:
    """Within the block, the job that the keywords describe can be run; imports Beam.

    Raises:
      UsageError: keywords that do not fit each other.
      StageError: class_names=@DATA_DIR is no data set with classes.
    """
    quiet.import_beam()
    from pipeline.datasets.building import create
    from pipeline.runners import cluster
    from pipeline.runners import options as beam_options
    from pipeline.stages import quarantine

    source = keywords.source if keywords.images is None else keywords.images
    if (keywords.source is None) == (keywords.images is None):
        raise UsageError(
            f"--source={keywords.source}: expected either a source or images, and not both"
        )
    options = beam_options.parse_options(keywords.beam_args)
    output_dir = keywords.path("output_dir") or ""
    cluster.check_paths(options, source=keywords.source, output_dir=output_dir)
    reference = _reference(keywords)
    with spec_of(source, keywords, options) as source_spec:
        yield create.Request(
            source_spec=source_spec,
            settings=settings_of(keywords, compression=keywords.compression),
            output_dir=output_dir,
            max_quarantined=quarantine.parse_limit(str(keywords.max_quarantined)),
            overwrite=keywords.overwrite,
            options=options,
            on_changed=keywords.on_changed,
            reread=keywords.reread,
            requirements=gate.parse(keywords.require),
            reference=reference,
        )


def _reference(keywords: PreprocessKeywords) -> "drift.Profile | None":
    """What the records of the job are compared with.

    Raises:
      UsageError: the reference is the directory to write.
      StageError: the reference is no finished data set, or a damaged one.
    """
    from pipeline.datasets.profile import drift
    from pipeline.stages import manifest as manifest_lib

    directory, output_dir = keywords.path("reference"), keywords.path("output_dir")
    if directory is None:
        return None
    if output_dir and not keywords.append and files.is_within(directory, output_dir):
        raise UsageError(
            f"--reference={directory}: is the directory to write; expected an earlier data set: "
            "name another one, or pass --append to compare new records with those in the data set"
        )
    manifest = manifest_lib.read_manifest(directory, "preprocess", "--reference")
    return drift.read(directory, manifest)


def settings_of(keywords: ImageSetKeywords, compression: str) -> "create.Settings":
    """The settings of a data set."""
    from pipeline.datasets.building import create

    return create.Settings(
        name=keywords.name,
        num_shards=None if keywords.num_shards == "auto" else int(keywords.num_shards),
        validation_fraction=keywords.validation_fraction,
        seed=keywords.seed,
        compression=compression,
    )


def make(keywords: PreprocessKeywords) -> dict[str, Any]:
    """Creates a data set or appends to one; raises as `preprocess`.

    Returns:
      The manifest, with the key "reused" if there was nothing to do.
    """
    keywords.required_path("output_dir")
    with requested(keywords) as request:
        from pipeline.datasets.building import append, create

        return (append.append_records if keywords.append else create.create_dataset)(request)


def warnings(manifest: Mapping[str, Any]) -> list[str]:
    """What a user should look at in a data set that `make` has returned."""
    num_changed = manifest.get("num_changed", 0)
    if not manifest.get("reused"):
        num_changed = manifest.get("last_append", {}).get("changed", 0)
    changed = (
        f"{num_changed:,} records have another image or label in the source than in the data set, "
        "which keeps its own: --on_changed=replace takes the new ones"
    )
    return [*gate.warnings(manifest), *([changed] if num_changed else [])]


@taking(PreprocessKeywords)
def preprocess(keywords: PreprocessKeywords) -> DataSet:
    """Writes an image set as the TFRecord shards of a data set, or appends it to one.

    The keywords are the flags of vae-preprocess, which `vae-preprocess --help` explains, and
    these:

    Args:
      source: the image set, as in --source; or leave it out and pass `images`.
      images: an array uint8 (n, H, W) or (n, H, W, C), or of the other shapes and dtypes that
        docs/preprocess.md lists for NumPy arrays; or a dict from train, validation and test to
        such an array, or to (images, labels). The data set is that of the arrays in an .npz file.
      labels: the labels of an array `images`: integers (n,), one-hot rows (n, K) or words (n,);
        or "none", to ignore labels.
      output_dir: the directory of the data set; local path or URL.
      beam_args: flags of Beam, such as ["--direct_num_workers=4"].

    Returns:
      The data set, whether it was made now or before.

    Raises:
      UsageError: keywords, or a configuration, that are wrong.
      StageError: the images or the directory cannot be used, or a bound of `require` does not hold.
      OSError: a disk is full, a path is not readable.
    """
    quiet.prepare()
    manifest = make(keywords)
    height, width, channels = manifest["image_shape"]
    return DataSet(
        directory=keywords.required_path("output_dir"),
        dataset_id=manifest["dataset_id"],
        image_shape=(height, width, channels),
        class_names=tuple(manifest["class_names"]),
        splits=dict(manifest["splits"]),
        quarantined=manifest["records"]["quarantined"],
        warnings=tuple(warnings(manifest)),
        reused=bool(manifest.get("reused")),
    )
