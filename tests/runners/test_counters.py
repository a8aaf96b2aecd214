"""What the runner's own page shows: counters of records, and how long the model's calls took."""

import apache_beam as beam
import pytest

from tests.conftest import make_embeddings, make_folder_set, make_shards


@pytest.fixture
def results(monkeypatch) -> list[beam.runners.runner.PipelineResult]:
    """The results of the pipelines that the test runs."""
    results, run = [], beam.Pipeline.run

    def keeping(pipeline, *arguments):
        results.append(run(pipeline, *arguments))
        return results[-1]

    monkeypatch.setattr(beam.Pipeline, "run", keeping)
    return results


def counters(result, namespace: str) -> dict[str, int]:
    return {
        counter.key.metric.name: counter.committed
        for counter in result.metrics().query()["counters"]
        if counter.key.metric.namespace == namespace
    }


def test_preprocess_counts_the_records_of_its_manifest(tmp_path, results):
    images = make_folder_set(tmp_path / "set", num_train=60, num_test=0)
    for path in sorted(images.rglob("*.png"))[::20]:
        path.write_bytes(path.read_bytes()[:50])
    manifest = make_shards(f"folder:{images}", tmp_path / "out", max_quarantined="3")
    account = manifest["records"]
    assert account["quarantined"] == 3
    assert counters(results[0], "vae-preprocess") == {
        "records_written": account["written"],
        "records_quarantined": account["quarantined"],
    }


def test_export_counts_the_rows_and_times_each_call_of_the_model(
    data_dir, trained, tmp_path, results
):
    model, settings = trained / "export", {"images": "none"}
    make_embeddings(data_dir, model, tmp_path / "first", split="test", **settings)
    manifest = make_embeddings(
        data_dir, model, tmp_path / "all", split="test,train", reuse_from=tmp_path / "first"
    )
    done = manifest["done"].values()
    assert counters(results[1], "vae-export") == {
        "records_computed": sum(counts["computed"] for counts in done),
        "records_reused": sum(counts["reused"] for counts in done),
        "records_quarantined": 0,
    }
    (calls,) = results[1].metrics().query()["distributions"]
    assert calls.key.metric.name == "model_call_msecs"
    # The shards are smaller than a batch.
    assert calls.committed.count == sum(counts["computed"] > 0 for counts in done)
    assert 0 <= calls.committed.min <= calls.committed.max <= calls.committed.sum
