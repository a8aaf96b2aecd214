"""The stages as functions of Python, in this process."""

import ast
import gc
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import weakref

import numpy as np
import pandas
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from configs import smoke
from pipeline.api import StageError, UsageError, export, preprocess
from pipeline.api.data_sets import spec_of
from pipeline.api.keywords import PreprocessKeywords
from pipeline.sources import conversion
from pipeline.sources.readers.array_layout import in_memory
from tests.conftest import REPOSITORY, blobs, outputs_of, smoke_config
from trainer.api import train
from trainer.runs.stop_signal import StopSignal

# Prints the flags of a command, and those that are no keywords.
FLAGS = """
import importlib, json, sys
from pipeline.cli import flag_parsing
command = importlib.import_module(sys.argv[1])
names = flag_parsing.values_of(sys.argv[1])
print(json.dumps([sorted(names), list(getattr(command, "COMMAND_LINE_ONLY", ()))]))
"""
LIGHT = """
import sys
from absl import flags
names = {*flags.FLAGS}
import pipeline.api, trainer.api
assert {*flags.FLAGS} == names, {*flags.FLAGS} - names
assert not {"apache_beam", "tensorflow", "keras"} & {*sys.modules}
"""


def python(code: str, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *args]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_the_keywords_are_the_flags_and_an_import_is_light():
    # Keyword that is no flag -> what stands for it on a command line.
    only_in_python = {"beam_args": "further flags"}
    in_place_of_flags = {"data_dir": "--config.data_dir", "overrides": "--config.KEY"}
    light = python(LIGHT)
    commands = {
        "pipeline.preprocess": (preprocess, {**only_in_python, "images": "--source"}),
        "pipeline.export": (export, only_in_python),
        "trainer.main": (train, in_place_of_flags),
    }
    running = {module: python(FLAGS, module) for module in commands}
    for module, (function, others) in commands.items():
        names, only_on_command_line = json.loads(running[module].communicate()[0])
        keywords = {*inspect.signature(function).parameters}
        assert keywords - others.keys() == {*names} - {*only_on_command_line}
    assert light.wait() == 0


FORMS = {
    "splits": lambda x, y: x,
    "floats": lambda x, y: x / np.float32(255),
    "channels first": lambda x, y: np.stack([x, x, x // 2], axis=1),
    "channels last, not contiguous": lambda x, y: np.stack([x, x, x // 2])[:, ::-1].transpose(
        1, 2, 3, 0
    ),
    "counted last": lambda x, y: np.moveaxis(x, 0, -1),
    "rows of pixels": lambda x, y: np.tile(x, 3)[:, :, :12].reshape(len(x), -1),
    "bool": lambda x, y: x > 100,
}
LABELS = {
    "numbers": lambda y: y,
    "one-hot": lambda y: np.eye(12)[y],
    "words": lambda y: np.array([f"class {n}" for n in y]),
    "a list": lambda y: y.tolist(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", LABELS)
def test_arrays_are_read_as_those_of_an_npz(tmp_path, form, labels):
    arrays = {split: (FORMS[form](x, y), LABELS[labels](y)) for split, (x, y) in blobs().items()}
    names = {f"{kind}_{s}": pair[i] for s, pair in arrays.items() for i, kind in enumerate("xy")}
    np.savez(tmp_path / "set.npz", **names)
    keywords, options = PreprocessKeywords(), PipelineOptions([])
    read = []
    for source in (arrays, f"npz:{tmp_path}/set.npz"):
        with spec_of(source, keywords, options) as spec:
            opened = conversion.open_converted(spec)
            indices = np.arange(opened.num_records)
            records = opened.read(indices)
            facts = opened.fingerprint(), opened.ids(indices), opened.class_names, len(opened.notes)
            read.append((*facts, records.images.tobytes(), records.labels.tolist()))
    assert read[0] == read[1]


def test_a_data_set_of_arrays_has_the_bytes_of_that_of_an_npz(tmp_path):
    images, labels = blobs()["train"]
    np.savez(tmp_path / "set.npz", x=images, y=labels)
    names = [f"blob {n}" for n in range(10)]
    settings = {"name": "blobs", "num_shards": 2, "class_names": names}
    of_file = preprocess(f"npz:{tmp_path}/set.npz", tmp_path / "file", **settings)
    of_arrays = preprocess(images=images, labels=labels, output_dir=tmp_path / "arrays", **settings)
    assert outputs_of(tmp_path / "file") == outputs_of(tmp_path / "arrays")
    assert of_arrays.dataset_id == of_file.dataset_id and not of_arrays.reused
    assert not any(in_memory._READ_NOW.values())
    more = {"images": images[:20], "labels": labels[:20], "id_prefix": "more/", **settings}
    grown = preprocess(output_dir=of_arrays, append=True, **more)
    assert sum(grown.splits.values()) == len(images) + 20 and grown.class_names[3] == "blob 3"
    assert preprocess(output_dir=of_arrays, append=True, **more).reused


def test_no_array_stays_in_memory(tmp_path):
    images = blobs(num_train=60)["train"][0]
    kept = weakref.ref(images)
    preprocess(images=images, output_dir=tmp_path / "set")
    del images
    gc.collect()
    assert kept() is None


def test_columns_of_a_table_and_numbers_of_numpy_are_taken(tmp_path):
    images, labels = blobs()["train"]
    words = np.array([f"blob {n}" for n in labels])
    settings = {"num_shards": 1, "seed": 3, "validation_fraction": 0.25}
    plain = preprocess(images=images, labels=words, output_dir=tmp_path / "plain", **settings)
    numbers = {"num_shards": np.int64(1), "seed": np.uint8(3)}
    numbers["validation_fraction"] = np.float32(0.25)
    table = pandas.DataFrame({"label": words})["label"].astype(object)
    same = preprocess(images=images, labels=table, output_dir=tmp_path / "table", **numbers)
    assert same.dataset_id == plain.dataset_id
    assert outputs_of(tmp_path / "table") == outputs_of(tmp_path / "plain")


def test_a_view_is_hashed_in_blocks():
    view = np.broadcast_to(np.zeros((28, 28), np.uint8), (100_000, 28, 28))  # 78 MB
    tracemalloc.start()
    with in_memory.readable(view):
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({}, UsageError, "expected either a source or images"),
        ({"source": "sample", "images": [0]}, UsageError, "expected either a source or images"),
        ({"source": "sample", "labels": [1, 2]}, UsageError, "labels in arrays"),
        ({"source": "sample", "labels": "all"}, UsageError, "--labels=all: expected one of auto"),
        ({"source": "sample", "image_size": (28, 0)}, UsageError, "--image_size=(28, 0): expected"),
        ({"source": "sample", "name": "a-b"}, UsageError, "--name=a-b: expected at most 100 bytes"),
        ({"source": "sample", "num_shards": 0}, UsageError, "a number from 1 to 99999"),
        ({"source": "sample", "seed": None}, UsageError, "--seed=None: expected a whole number"),
        ({"source": "sample", "pixel_range": (1, 0)}, UsageError, "two numbers with LOW < HIGH"),
        ({"source": "sample", "class_names": ["a", "a"]}, UsageError, "distinct, non-empty names"),
        ({"source": "sample", "beam_args": ["--rnner=x"]}, UsageError, "did you mean --runner?"),
        ({"source": "sample", "output_dir": ""}, UsageError, "--output_dir=: is empty"),
        ({"source": "npz:absent"}, StageError, "no such file"),
        ({"images": np.zeros((9, 4, 4, 5))}, StageError, "(9, 4, 4, 5); expected uint8 (n, H, W)"),
        ({"images": np.full((9, 4, 5), 300)}, UsageError, "--pixel_range"),
        ({"images": [[1], [2, 3]]}, UsageError, "numpy.stack makes one"),
        ({"images": {"train": np.zeros((9, 4, 5)), "b": [0]}}, UsageError, "['b']: expected the"),
        ({"images": {"test": (1, 2, 3)}}, UsageError, "a tuple of 3; expected (images, labels)"),
        ({"images": {"test": [0]}, "labels": [0]}, UsageError, "expected the labels in the dict"),
        ({"images": np.array(["a", None])}, UsageError, "holds Python objects; expected numbers"),
        ({"images": [0], "beam_args": ["--direct_num_workers=2"]}, UsageError, "other processes"),
        ({"source": "arrays:0123"}, UsageError, "no such arrays in this process"),
        ({"images": np.zeros((9, 4, 5)), "source": "sample"}, UsageError, "and not both"),
        ({"images": {}}, UsageError, "an empty dict; expected one of the splits"),
        ({"images": {"tset": [0]}}, UsageError, "['tset']: expected the splits train"),
        ({"images": np.ma.masked_array([1, 2], [0, 1])}, UsageError, "has masked values"),
        ({"images": "folder:/x"}, UsageError, "expected arrays; pass it as source"),
        # Any text is true in Python, and True is the number 1.
        ({"source": "sample", "overwrite": "false"}, UsageError, "expected True or False"),
        ({"source": "sample", "append": "no"}, UsageError, "--append=no: expected True or False"),
        ({"source": "sample", "grayscale": 1}, UsageError, "expected True or False"),
        ({"source": "sample", "seed": True}, UsageError, "--seed=True: expected a whole number"),
        ({"source": "sample", "num_shards": True}, UsageError, "a number from 1 to 99999"),
        ({"source": "sample", "validation_fraction": "0.2"}, UsageError, "expected a number"),
        ({"source": "sample", "output_dir": 5}, UsageError, "--output_dir=5: expected a path"),
        ({"sorce": "sample"}, TypeError, "preprocess() got an unexpected keyword argument 'sorce'"),
    ],
)
def test_wrong_keywords_raise(tmp_path, keywords, error, message):
    with pytest.raises(error) as raised:
        preprocess(**{"output_dir": tmp_path / "out", **keywords})
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_wrong_keywords_of_other_functions_raise(trained, data_dir, tmp_path):
    model, out = trained / "export", tmp_path / "out"
    images = blobs()["test"][0]
    for keywords, message in (
        ({}, "--data_dir=None --source=None: expected one of the two"),
        ({"data_dir": data_dir, "source": images}, "--source=arrays: expected one of the two"),
        ({"data_dir": data_dir, "name": "x"}, "--name=x: applies to a --source only"),
        ({"data_dir": data_dir, "labels": images}, "--labels=arrays: applies to a --source"),
        ({"data_dir": data_dir, "images": images}, "`source` takes arrays of images"),
        ({"data_dir": data_dir, "fields": ["mu"]}, "--fields=['mu']: expected some of mean"),
    ):
        with pytest.raises(UsageError) as raised:
            export(model_dir=model, output_dir=out, **keywords)
        assert message in str(raised.value)
    with pytest.raises(UsageError, match="--model_dir is not set"):
        export(output_dir=out, data_dir=data_dir)
    few = smoke.get_config().unlock()
    del few["beta"]
    (tmp_path / "no_function.py").write_text("x = 1")
    (tmp_path / "exits.py").write_text("def get_config():\n    raise SystemExit(3)")
    for config, overrides, message in (
        ("smok", {}, "--config=smok: no such config"),
        (few, {}, "a config without beta"),
        ("smoke", {"num_epoch": 3}, "--config.num_epoch: no such key in the config; did you mean"),
        ("smoke", {"num_epochs": "3"}, "--config.num_epochs=3: is of type str, expected int"),
        ("smoke", {"num_epochs": True}, "--config.num_epochs=True: is of type bool, expected int"),
        ("smoke", {"overwrite": "False"}, "--overwrite='False': expected True or False"),
        ("smoke", {"data_dir": images}, "--data_dir: is of type ndarray; expected a path"),
        (None, {}, "config=None: expected the name of a config"),
        (tmp_path / "no_function.py", {}, "the file has no get_config()"),
        (tmp_path / "exits.py", {}, "exits.py:2: SystemExit: 3"),
        ("smoke", {"workdir": ""}, "--workdir=: is empty"),
    ):
        with pytest.raises(UsageError) as raised:
            train(**{"config": config, "data_dir": data_dir, "workdir": out, **overrides})
        assert message in str(raised.value)
    assert not out.exists()


def test_three_calls_in_a_thread_end_as_the_commands_do(tmp_path):
    """Twice each: the second call finds all of it done."""
    results: list = []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    config = smoke_config("")

    def work() -> None:
        for _ in range(2):
            data = preprocess(images=blobs(num_train=60), output_dir=tmp_path / "set")
            model = train(config=config, data_dir=data, workdir=tmp_path / "run", num_epochs=1)
            rows = export(
                model_dir=model, data_dir=data, output_dir=tmp_path / "rows", report=False
            )
            results.append((data, model, rows))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (data, model, rows), (same_data, same_model, same_rows) = results
    assert (data.reused, same_data.reused) == (False, True)
    assert (rows.computed, same_rows.computed, same_rows.reused) == (50, 0, 50)
    assert model == same_model and rows.export_id == same_rows.export_id
    for result, key in ((data, "dataset_id"), (model, "model_id"), (rows, "export_id")):
        with open(result.manifest) as file:
            assert json.load(file)[key] == getattr(result, key)
    assert model.metrics["test"].keys() >= {"loss", "elbo"} and "step" not in model.metrics["test"]
    assert os.listdir(rows.embeddings) and os.path.isdir(model)
    assert (config.data_dir, config.num_epochs) == ("", 2)  # As it was.
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    images = blobs(num_train=60)["test"]
    again = export(
        model_dir=model,
        source={"test": images},
        reuse_from=rows,
        output_dir=tmp_path / "more",
        report=False,
    )
    assert (again.computed, again.reused) == (0, 50)  # The same records, whatever they come from.


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_goes_on_from_its_files(tmp_path, when_written, interruptible):
    settings = {"images": blobs(), "num_shards": 4}
    preprocess(**settings, output_dir=tmp_path / "whole")
    when_written("train-00002", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        preprocess(**settings, output_dir=tmp_path / "stopped")
    finished = [*(tmp_path / "stopped" / ".progress").glob("*train*")]
    assert finished and not (tmp_path / "stopped" / "manifest.json").exists()
    preprocess(**settings, output_dir=tmp_path / "stopped")
    assert outputs_of(tmp_path / "whole") == outputs_of(tmp_path / "stopped")


def test_the_first_sigint_stops_a_run_and_the_second_raises(interruptible):
    received = threading.Event()
    with pytest.raises(KeyboardInterrupt), StopSignal(received.set) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert received.wait(10) and stop.received
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_steps_run_in_a_notebook_too(tmp_path):
    """Beam's own part for notebooks needs packages that this one does not."""
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    shell.instance()
    try:
        assert preprocess(images=blobs(num_train=60)["train"][0], output_dir=tmp_path / "set")
    finally:
        shell.clear_instance()


NOTEBOOK = REPOSITORY / "docs" / "quickstart.ipynb"


def test_the_notebook_calls_the_functions_with_their_keywords():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in codes)
    functions, num_calls = {"preprocess": preprocess, "train": train, "export": export}, 0
    for node in ast.walk(ast.parse("\n".join("".join(cell["source"]) for cell in codes))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in functions:
            keywords = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(functions[node.func.id]).bind(**keywords)
            num_calls += 1
    assert num_calls == 3


@pytest.mark.long
def test_the_notebook_runs():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, 4)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    [share] = [o["text"] for o in outputs if o["output_type"] == "stream" and "% of" in o["text"]]
    assert int(share.partition("%")[0]) > 80


@pytest.mark.parametrize("place", ["data_dir", "workdir", "the config's data_dir"])
def test_training_takes_no_signed_url(tmp_path, place):
    url = "https://host/set?X-Amz-Signature=s3cret"
    places = {"config": "smoke", "data_dir": tmp_path, "workdir": tmp_path / "run"}
    if place in places:
        places[place] = url
    else:
        places |= {"config": smoke_config(url), "data_dir": None}
    with pytest.raises(UsageError, match="dir=https://host/set: expected a path or URL without"):
        train(**places)
    assert not (tmp_path / "run").exists()
