"""croissant.json: a data set described in the vocabulary Croissant, which catalogues index.

The specification is https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import FileEntry

FILE = "croissant.json"
# The format has no media type; the specification then asks for the URL of its description.
_TFRECORD = "https://www.tensorflow.org/tutorials/load_data/tfrecord"
# Terms of the vocabulary, of which mlcroissant expects all in the context.
_TERMS = (
    *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field"),
    *("fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset"),
    *("jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex"),
    *("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform"),
)
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "name": {"@container": "@language"},
    "description": {"@container": "@language"},
    "data": {"@id": "cr:data", "@type": "@json"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    **{term: f"cr:{term}" for term in _TERMS},
}
# Split -> its meaning; other splits have none in the vocabulary.
_MEANINGS = {
    "train": "cr:TrainingSplit",
    "validation": "cr:ValidationSplit",
    "test": "cr:TestSplit",
}


def croissant_json(
    *,
    name: str,
    dataset_id: str,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    splits: Mapping[str, Sequence[FileEntry]],
    compression: str,
) -> bytes:
    """The contents of croissant.json.

    The file lacks what only a publisher knows: creator, url and datePublished.

    Args:
      name: the data set's name.
      dataset_id: 16 hex digits.
      image_shape: (H, W, C).
      class_names: class_names[i] is the name of label i.
      splits: split -> manifest entries of its shards, in order.
      compression: of the shards: "none" or "gzip".
    """
    encodings = [_TFRECORD] if compression == "none" else ["application/gzip", _TFRECORD]
    shards = [entry for entries in splits.values() for entry in entries]
    num_records = {s: sum(e["num_examples"] for e in entries) for s, entries in splits.items()}
    counts = ", ".join(f"{split} {count:,}" for split, count in num_records.items())
    size = "×".join(map(str, image_shape))
    labels = f"labels of {len(class_names)} classes" if class_names else "no labels"
    references = {"references": {"field": {"@id": "classes/label"}}} if class_names else {}
    record_sets = [
        _enumeration(
            "splits",
            "cr:Split",
            key="name",
            types={"name": "sc:Text", "url": "sc:URL"},
            rows=[(split, _MEANINGS.get(split)) for split in splits],
        ),
        {
            "@type": "cr:RecordSet",
            "@id": "records",
            "name": "records",
            "description": "One tf.Example for each image.",
            "key": {"@id": "records/id"},
            "field": [
                _field(
                    "split",
                    "The split, which stands in the file's name.",
                    ["sc:Text"],
                    extract={"fileProperty": "filename"},
                    transform={"regex": r"^\w+-(\w+)\.tfrecord-"},
                    references={"field": {"@id": "splits/name"}},
                ),
                _field("id", "The feature `id`: UTF-8.", ["sc:Text"]),
                _field(
                    "image",
                    f"The feature `image`: {size} raw bytes, in the order height, width, channel.",
                    ["cr:UInt8", "sc:ImageObject"],
                    isArray=True,
                    arrayShape=",".join(map(str, image_shape)),
                ),
                _field(
                    "label",
                    "The feature `label`: the number of the class; -1 for an image without one.",
                    ["cr:Int64"],
                    **references,
                ),
            ],
        },
    ]
    if class_names:
        types = {"label": "cr:Int64", "name": "sc:Text"}
        rows = list(enumerate(class_names))
        record_sets.append(
            _enumeration("classes", "sc:Enumeration", key="label", types=types, rows=rows)
        )
    return manifest_lib.readable_json(
        {
            "@context": _CONTEXT,
            "@type": "sc:Dataset",
            "conformsTo": "http://mlcommons.org/croissant/1.1",
            "name": name,
            "description": f"{sum(num_records.values()):,} images of {size} values from 0 to 255, "
            f"with {labels}: {counts}. TFRecord shards of tf.Examples, dataset_id {dataset_id}.",
            "version": "1.0.0",  # As in dataset_info.json; dataset_id tells versions apart.
            "identifier": dataset_id,
            "citeAs": f"Data set {name}, dataset_id {dataset_id}.",
            "license": {
                "@type": "sc:CreativeWork",
                "name": "unknown",
                "description": "The job that made this data set knows no license of its images.",
            },
            "distribution": [
                *(
                    {
                        "@type": "cr:FileObject",
                        "@id": entry["name"],
                        "name": entry["name"],
                        "contentUrl": entry["name"],
                        "contentSize": f"{entry['bytes']} B",
                        "encodingFormat": encodings,
                        "sha256": entry["sha256"],
                    }
                    for entry in shards
                ),
                {
                    "@type": "cr:FileSet",
                    "@id": "shards",
                    "name": "shards",
                    "description": "All shards.",
                    "encodingFormat": encodings,
                    "includes": [f"{name}-{split}.tfrecord-*" for split in splits],
                },
            ],
            "recordSet": record_sets,
        }
    )


def _field(name: str, description: str, types: Sequence[str], **further: Any) -> dict[str, Any]:
    """A field of `records`: a feature of a tf.Example, unless `further` extracts something else."""
    source = {
        "fileSet": {"@id": "shards"},
        "extract": further.pop("extract", {"column": name}),
    }
    if "transform" in further:
        source["transform"] = further.pop("transform")
    return {
        "@type": "cr:Field",
        "@id": f"records/{name}",
        "name": name,
        "description": description,
        "dataType": types,
        "source": source,
        **further,
    }


def _enumeration(
    name: str, kind: str, *, key: str, types: Mapping[str, str], rows: Sequence[Sequence[Any]]
) -> dict[str, Any]:
    """A record set whose records stand in the file itself."""
    ids = [f"{name}/{column}" for column in types]
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "dataType": kind,
        "key": {"@id": f"{name}/{key}"},
        "field": [
            {"@type": "cr:Field", "@id": i, "name": column, "dataType": types[column]}
            for i, column in zip(ids, types, strict=True)
        ],
        "data": [dict(zip(ids, row, strict=True)) for row in rows],
    }
