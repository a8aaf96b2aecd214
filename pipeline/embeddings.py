"""Embeddings of a shard as a Parquet file: its columns, and its name."""

import hashlib
import io

import numpy as np

from pipeline import shards


def parquet(
    shard: shards.Shard, outputs: dict[str, np.ndarray], *, model_id: str, dataset_id: str
) -> bytes:
    """The embeddings of a shard as a Parquet file, a row for each record in order.

    Columns: id (string), label (int64), mean and log_var (lists of latent_dim float32),
    reconstruction_loss and kl (float32, nats per image), record_sha (sha256 of the record's
    bytes, hex); model_id and dataset_id stand in the file's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def vectors(values: np.ndarray) -> pa.Array:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), pa.float32())
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    table = pa.table(
        {
            "id": pa.array(shard.ids, pa.string()),
            "label": pa.array(shard.labels, pa.int64()),
            "mean": vectors(outputs["mean"]),
            "log_var": vectors(outputs["log_var"]),
            "reconstruction_loss": pa.array(outputs["reconstruction_loss"], pa.float32()),
            "kl": pa.array(outputs["kl"], pa.float32()),
            "record_sha": pa.array(
                [hashlib.sha256(record).hexdigest() for record in shard.records], pa.string()
            ),
        }
    ).replace_schema_metadata({"model_id": model_id, "dataset_id": dataset_id})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def file_names(shard_name: str) -> tuple[str, str]:
    """Names of a shard's Parquet file and contact sheet."""
    stem = shard_name.replace(".tfrecord", "")
    return f"{stem}.parquet", f"{stem}.png"
