"""Images and a model to embeddings: `export`, and what it shares with the command of that name."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from pipeline.api.data_sets import settings_of, spec_of
from pipeline.api.keywords import ExportKeywords, ImageSetKeywords, taking
from pipeline.api.rules import ALL
from pipeline.cli import quiet
from pipeline.cli.errors import UsageError
from pipeline.storage import files

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

    from pipeline.embeddings.inputs import Input
    from pipeline.stages.pointer import Target


@dataclasses.dataclass(frozen=True)
class Export(os.PathLike[str]):
    """A finished export, which other functions take as the path of its directory."""

    directory: str  # Local path or URL; with `latest`, perhaps that of an equal, earlier export.
    export_id: str  # 16 hex digits
    model_id: str
    class_names: tuple[str, ...]  # class_names[i] is the name of label i; () without labels
    computed: int  # Rows.
    reused: int  # Rows that were taken over, or were there.
    quarantined: int  # Unreadable records, which are listed in quarantine/.
    metrics: Mapping[str, float]  # Means over all rows, in nats per image, and active_units.
    warnings: tuple[str, ...]  # Distributions that have drifted from those of `reference`.

    def __fspath__(self) -> str:
        return self.directory

    @property
    def embeddings(self) -> str:
        """The directory of the files of rows, which holds nothing else."""
        return files.join(self.directory, "embeddings")

    @property
    def manifest(self) -> str:
        """The path or URL of manifest.json."""
        return files.join(self.directory, "manifest.json")


@contextlib.contextmanager
def opened_input(
    keywords: ExportKeywords,
    options: "PipelineOptions",
    *,
    on_corrupt: str,
    exports: Sequence[str] = (),
) -> Iterator["Input"]:
    """Within the block, the images that the keywords name.

    Args:
      keywords: of `export`.
      options: Beam's.
      on_corrupt: what to do if a shard is damaged, see reader.Dataset.
      exports: directories; if no name is set, the first that holds an export says the name of a
        source's set.

    Raises:
      UsageError: the keywords name no image set, or two.
      StageError: the image set cannot be read, or a source's model has no manifest.
    """
    from pipeline.datasets import naming
    from pipeline.embeddings import inputs
    from pipeline.stages import manifest as manifest_lib

    source, data_dir = keywords.source, keywords.path("data_dir")
    if (source is None) == (data_dir is None):
        shown = source if source is None or isinstance(source, str) else "arrays"
        raise UsageError(
            f"--data_dir={data_dir} --source={shown}: expected one of the two: a data set that "
            "pipeline.preprocess made, or a source of images"
        )
    splits = None if keywords.split == (ALL,) else keywords.split
    if data_dir is not None:
        for name in keywords.changed_names(ImageSetKeywords):
            if name != "beam_args":
                value = getattr(keywords, name)
                shown = "arrays" if name == "labels" and not isinstance(value, str) else value
                raise UsageError(
                    f"--{name}={shown}: applies to a --source only, not to a finished data set; "
                    "remove the flag, or name a --source"
                )
        splits = ("test",) if keywords.split is None else splits
        yield cast("Input", inputs.ShardsInput(data_dir, splits, on_corrupt))
        return
    with spec_of(source, keywords, options) as source_spec:
        if (model_dir := keywords.path("model_dir")) is not None:
            model = manifest_lib.read_manifest(model_dir, "train", "--model_dir")
            names = tuple(model.get("class_names", ()))
            source_spec = dataclasses.replace(source_spec, model_class_names=names)
        settings = settings_of(keywords, compression="none")
        for directory in exports:
            if settings.name is None:
                settings = dataclasses.replace(settings, name=naming.existing_name(directory))
        yield cast("Input", inputs.SourceInput(source_spec, settings, splits))


def make(
    keywords: ExportKeywords,
    *,
    on_rows: Callable[[dict[str, Any]], None] = lambda manifest: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Makes an export with its report and moves the pointer to it; raises as `export`.

    Args:
      keywords: of `export`.
      on_rows: called with the manifest when the rows are finished, and the report is not.
      say: called with each line on report and pointer.

    Returns:
      The manifest, as of embeddings.create.make_export.
    """
    quiet.import_beam()
    from pipeline.embeddings import create as create_export
    from pipeline.embeddings.shard import ExportSettings
    from pipeline.reports import create as create_report
    from pipeline.runners import cluster
    from pipeline.runners import options as beam_options
    from pipeline.stages import gate, pointer, quarantine

    model_dir = keywords.required_path("model_dir")
    output_dir = keywords.required_path("output_dir")
    source = keywords.source if isinstance(keywords.source, str) else None
    if not isinstance(keywords.images, str):
        raise UsageError(
            "--images: arrays; expected sheets, all or none: `source` takes arrays of images"
        )
    options = beam_options.parse_options(keywords.beam_args)
    data_dir = keywords.path("data_dir")
    cluster.check_paths(
        options, source=source, data_dir=data_dir, model_dir=model_dir, output_dir=output_dir
    )
    latest, seen = keywords.path("latest"), None
    if latest:
        pointer.check(latest, output_dir)
        seen = pointer.read(latest)
        _check_unpublished(keywords, seen)
    reference = keywords.path("reference")
    reuse_dir = _reuse_dir(keywords, seen)
    exports = [] if keywords.overwrite else [output_dir]
    exports += [reuse_dir] if reuse_dir else []
    with opened_input(keywords, options, on_corrupt=keywords.on_corrupt, exports=exports) as input_:
        request = create_export.Request(
            input=input_,
            model_dir=model_dir,
            output_dir=output_dir,
            reuse_dir=reuse_dir,
            reference_dir=pointer.resolve(reference) if reference else None,
            settings=ExportSettings(
                fields=tuple(keywords.fields),
                embedding_format=keywords.embedding_format,
                images=keywords.images,
                z_seed=keywords.z_seed,
            ),
            requirements=gate.parse(keywords.require),
            allow_missing=keywords.on_corrupt == "quarantine" or keywords.source is not None,
            max_quarantined=quarantine.parse_limit(str(keywords.max_quarantined)),
            overwrite=keywords.overwrite,
            options=options,
            fast_math=keywords.fast_math,
            only_if_new=seen is not None and keywords.reuse_from is None,
        )
        manifest = create_export.make_export(request)
        on_rows(manifest)
        directory, export_id = manifest["directory"], manifest["export_id"]
        create_report.remove_stale(directory, export_id)  # After overwrite.
        if keywords.report and not create_report.is_current(directory, export_id):
            page = create_report.make_report(
                directory, input_=input_, model_dir=model_dir, run_dir=keywords.path("run_dir")
            )
            say(page)
    if latest:
        moved = pointer.move(latest, directory, seen=seen, is_new=True)
        say(f"{latest} {'names' if moved else 'still names'} {directory}")
    return manifest


def _check_unpublished(keywords: ExportKeywords, seen: "Target | None") -> None:
    """Raises a UsageError if `overwrite` would change the export that `latest` names."""
    from pipeline.stages import manifest as manifest_lib

    if seen is None or not keywords.overwrite:
        return
    is_there = files.exists(files.join(seen.directory, manifest_lib.MANIFEST))
    if is_there and files.is_within(keywords.required_path("output_dir"), seen.directory):
        raise UsageError(
            f"--overwrite: --latest={keywords.latest} names {seen.directory}, and its readers "
            "would find it half-written; export into a new directory"
        )


def _reuse_dir(keywords: ExportKeywords, seen: "Target | None") -> str | None:
    """The export whose rows are taken over, if any."""
    from pipeline.stages import pointer

    if reuse_from := keywords.path("reuse_from"):
        return pointer.resolve(reuse_from)
    # Without an id, what `latest` names is gone or damaged.
    return seen.directory if seen and seen.export_id else None


@taking(ExportKeywords)
def export(keywords: ExportKeywords) -> Export:
    """Writes the embeddings of images by a published model, and a report.

    The keywords are the flags of vae-export, which `vae-export --help` explains, and these:

    Args:
      model_dir: the directory export/ in a workdir of training, or trainer.api.Model.
      output_dir: the directory of the export; local path or URL.
      data_dir: a data set, or DataSet; or leave it out and name a source.
      source: the images, as in --source; or what `images` of `preprocess` takes.
      labels: the labels of an array `source`; as for `preprocess`.
      beam_args: flags of Beam, such as ["--direct_num_workers=4"].

    Returns:
      The export, whether it was made now or before.

    Raises:
      UsageError: keywords, or a configuration, that are wrong.
      StageError: an input or the directory cannot be used, or a bound of `require` does not hold.
      OSError: a disk is full, a path is not readable.
    """
    quiet.prepare()
    manifest = make(keywords)
    computed = sum(counts["computed"] for counts in manifest["done"].values())
    return Export(
        directory=manifest["directory"],
        export_id=manifest["export_id"],
        model_id=manifest["model_id"],
        class_names=tuple(manifest.get("class_names", ())),
        computed=computed,
        reused=manifest["records"]["written"] - computed,
        quarantined=manifest["records"]["quarantined"],
        metrics=dict(manifest["metrics"]),
        warnings=tuple(manifest.get("drift", {}).get("warnings", ())),
    )
