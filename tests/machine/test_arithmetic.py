"""Training and export on two instruction sets: what differs, by how much, and where it is said."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from pipeline.machine import arithmetic
from tests.conftest import make_embeddings, make_shards, run_command, smoke_config, state_of

# Between instruction sets: of rows, and of weights and optimizer slots after 30 steps.
_ROWS, _WEIGHTS = 1e-5, 1e-4


def columns_of(path) -> dict[str, np.ndarray]:
    table = pyarrow.parquet.read_table(path).to_pydict()
    return {name: np.array(table[name]) for name in ("mean", "log_var", "kl")}


def test_other_instruction_sets_agree_within_a_tolerance(idx_dir, trained, tmp_path):
    from trainer.runs import train

    here = arithmetic.kind()
    if "CPU" not in here or "SSE41" in here:
        pytest.skip(f"{here}: expected a processor with a newer instruction set than SSE41")
    other = here.replace(here.split(",")[0], "CPU SSE41")
    data, model, out = tmp_path / "data", trained / "export", tmp_path / "out"
    make_shards(f"idx:{idx_dir}", data)
    make_embeddings(data, model, tmp_path / "before")
    make_shards(f"idx:{idx_dir}", data, append=True, id_prefix="more-")
    whole = make_embeddings(data, model, tmp_path / "here")
    train.train(smoke_config(data, num_epochs=3), workdir=str(tmp_path / "run"))

    done = run_command(
        "tests.machine.train_and_export",
        *(data, tmp_path / "other_run"),
        *(f"--data_dir={data}", f"--model_dir={model}", f"--output_dir={out}", "--noreport"),
        f"--reuse_from={tmp_path}/before",
        env={"ONEDNN_MAX_CPU_ISA": "SSE41"},
    )
    # The 50 rows that are taken over are counted by the kind that computed them.
    said = f"differ ({other}: 50 rows; {here}: 50 rows)"
    assert said in done.stderr or f"differ ({here}: 50 rows; {other}: 50 rows)" in done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["export_id"] == whole["export_id"]
    assert "CPU" not in (out / "manifest.json").read_text()
    for path in sorted(out.glob("embeddings/*.parquet")):
        theirs, ours = columns_of(path), columns_of(tmp_path / "here" / "embeddings" / path.name)
        for name, values in ours.items():
            np.testing.assert_allclose(theirs[name], values, rtol=0, atol=_ROWS, err_msg=name)
    for run, kind in (("run", here), ("other_run", other)):
        lines = (tmp_path / run / "timings.jsonl").read_text().splitlines()
        assert {json.loads(line)["kind"] for line in lines} == {kind}
    ours, theirs = state_of(tmp_path / "run"), state_of(tmp_path / "other_run")
    for name in ours.keys() - {"about", "name"}:
        np.testing.assert_allclose(theirs[name], ours[name], rtol=0, atol=_WEIGHTS, err_msg=name)
