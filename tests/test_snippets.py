"""The Python of the docs does what the page says, on a real run."""

import importlib.util
import json
import pathlib
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY, make_embeddings
from trainer.runs import metrics

# The page's sections with a snippet that computes means.
SECTIONS = ("TensorFlow", "Keras", "TensorFlow Lite", "ONNX", "NumPy")


def snippet(page: str, heading: str, number: int = 0) -> str:
    """A block of Python in a section of a page."""
    section = (REPOSITORY / "docs" / page).read_text().split(f"\n## {heading}\n")[1]
    return re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.S)[number]


@pytest.fixture(scope="module")
def rows(data_dir, trained, tmp_path_factory) -> dict[str, np.ndarray]:
    """id -> mean, as vae-export writes it."""
    out = tmp_path_factory.mktemp("rows") / "out"
    make_embeddings(data_dir, trained / "export", out, images="none")
    return {row["id"]: row["mean"] for row in pq.read_table(out / "embeddings").to_pylist()}


@pytest.fixture(scope="module")
def page(data_dir, trained, tmp_path_factory):
    """Runs a snippet of docs/model.md after those before it; returns its variables."""
    scratch, variables = tmp_path_factory.mktemp("model"), {}
    paths = {"run": trained, "mnist": data_dir}

    def run(heading: str) -> dict:
        code = snippet("model.md", heading).replace("(28, 28, 1)", "(12, 8, 1)")

        def path(match: re.Match) -> str:
            return str(paths.get(match[1], scratch / match[1]))

        exec(re.sub(r"/tmp/(\w+)", path, code), variables)
        return variables

    run("Images")
    run("TensorFlow")
    return run


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_snippet_gives_the_means_of_the_export(heading, page, rows):
    variables = page(heading)
    assert len(variables["ids"]) == len(rows) == 50
    expected = np.array([rows[record_id.decode()] for record_id in variables["ids"]])
    np.testing.assert_allclose(variables["mean"], expected, atol=3e-6, rtol=0)


def test_every_snippet_of_the_page_is_run():
    text = (REPOSITORY / "docs" / "model.md").read_text()
    assert text.count("```python") == 1 + len(SECTIONS)


def test_the_signatures_are_those_of_the_page(trained, page):
    model, text = page("TensorFlow")["model"], (REPOSITORY / "docs" / "model.md").read_text()
    sizes = {"n": None, "latent_dim": 3, "H": 12, "W": 8, "C": 1}
    listed: dict[tuple[str, str], dict] = {}
    for row in re.findall(r"^\| `\w+` \| (?:in|out)put .*$", text, re.M):
        signature, direction, name, dtype, shape, _ = (c.strip("` ") for c in row[1:-1].split("|"))
        dims = [sizes[size] for size in shape.split(", ")]
        listed.setdefault((signature, direction), {})[name] = dtype, dims
    real = {}
    for name, function in model.signatures.items():
        inputs = function.structured_input_signature[1]
        for direction, tensors in ("input", inputs), ("output", function.structured_outputs):
            real[name, direction] = {
                key: (spec.dtype.name, spec.shape.as_list()) for key, spec in tensors.items()
            }
    for direction in ("input", "output"):
        default = real.pop(("serving_default", direction))
        assert default == real["encode", direction]
    assert listed == real


def follow(workdir: pathlib.Path, log, is_running) -> None:
    variables: dict = {}
    exec(snippet("train.md", "MLflow, Weights & Biases"), variables)
    variables["follow"](workdir, log, is_running, poll_secs=0)


def test_a_follower_sees_each_line_of_a_resumed_run_once(trained, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    logged = []

    def write(up_to_step: int, *numbers: int) -> None:
        file = metrics.JsonLines(str(tmp_path / metrics.METRICS), up_to_step=up_to_step)
        for number in numbers:
            file.append(lines[number])

    def rounds():
        yield True  # The trainer has written nothing yet.
        write(0, 0, 1)
        yield True
        write(22, 2)
        yield True
        write(11, 2)  # Resumed from the checkpoint after the first epoch.
        yield True
        write(22, 3, 4)
        yield False

    running = rounds()
    follow(tmp_path, lambda values, step: logged.append((values, step)), lambda: next(running))
    assert (tmp_path / metrics.METRICS).read_bytes() == (trained / "metrics.jsonl").read_bytes()
    assert logged == [
        ({f"{split}/{name}": value for name, value in line.items()}, step)
        for line in lines
        for split, step in [(line.pop("split"), line.pop("step"))]
    ]


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="no mlflow")
def test_mlflow_takes_the_lines(trained, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # A database needs more packages.
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    with mlflow.start_run() as run:
        follow(trained, mlflow.log_metrics, lambda: False)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "validation/loss")
    assert [metric.step for metric in history] == [11, 22]
