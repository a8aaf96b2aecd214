"""The report: opened in a real browser, written again, and written from partial data."""

import base64
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli.errors import StageError
from pipeline.datasets import reader
from pipeline.embeddings import inputs
from pipeline.embeddings.rows import bernoulli_entropy
from pipeline.reports import create as create_report
from tests.conftest import (
    REPOSITORY,
    make_embeddings,
    make_idx_set,
    make_shards,
    outputs_of,
    smoke_config,
)
from tests.datasets.test_reader import damage_one_record
from tests.faults.hostile_source import IDS, NAMES
from tests.forked import run_command
from tests.reports.browser import Browser, needs_browser

HOSTILE = "tests.faults.hostile_source.open_hostile:x"
# Sections of a report of 3 latents, and its figures.
SECTIONS = [
    "reconstructions",
    "largest-losses",
    "class-losses",
    "latent-space",
    "traversals",
    "prior-samples",
    "latents",
    "neighbours",
    "probes",
    "loss-curves",
    "lineage",
    "counts",
]
PLOTS = [
    "curve_kl.png",
    "curve_loss.png",
    "curve_reconstruction_loss.png",
    "kl_per_latent.png",
    "largest_losses.png",
    "pca.png",
    "prior_samples.png",
    "reconstructions.png",
    "traversals.png",
    "tsne.png",
]


def make_report_of(out, data, model=None, **settings) -> pathlib.Path:
    split = settings.pop("split", ["test"])
    input_ = None
    if isinstance(data, pathlib.Path):
        input_ = inputs.ShardsInput(str(data), split, "quarantine")
    elif data:
        input_ = data
    settings = {"run_dir": None, **settings}
    model_dir = None if model is None else str(model)
    return pathlib.Path(
        create_report.make_report(str(out), input_=input_, model_dir=model_dir, **settings)
    )


@pytest.fixture(scope="module")
def reported(data_dir, trained, tmp_path_factory) -> pathlib.Path:
    """An export of train and test with a reference and its report."""
    directory = tmp_path_factory.mktemp("reported")
    model = trained / "export"
    make_embeddings(data_dir, model, directory / "before")
    out = directory / "out"
    make_embeddings(data_dir, model, out, split="train,test", reference=directory / "before")
    make_report_of(out, data_dir, model, split=["train", "test"])
    return out


@pytest.fixture(scope="module")
def two_latents(data_dir, tmp_path_factory) -> pathlib.Path:
    """A model with 2 latents, its export and report."""
    from trainer.runs import train

    directory = tmp_path_factory.mktemp("two")
    train.train(smoke_config(data_dir, latent_dim=2), workdir=str(directory / "run"))
    make_embeddings(data_dir, directory / "run" / "export", directory / "out")
    make_report_of(directory / "out", data_dir, directory / "run" / "export")
    return directory / "out"


@pytest.fixture(scope="module")
def browser():
    needs_browser()
    browser = Browser()
    yield browser
    browser.close()


def assert_sound(browser: Browser, page: pathlib.Path) -> None:
    """The page fetches nothing, logs nothing, and all images load and have alt texts."""
    browser.asked_for(), browser.complaints()  # Those of the page before.
    browser.open(page.as_uri())
    assert browser.asked_for() == [page.as_uri()]
    assert browser.complaints() == []
    images = browser.run(
        "return [...document.images].map(i => [i.alt, i.complete && i.naturalWidth,"
        # Canvases stand in place of the scatters.
        "  (i.closest('[data-map]')?.querySelector('canvas') ?? i).clientWidth])"
    )
    assert images and all(alt and natural and shown for alt, natural, shown in images)


def test_every_figure_is_there_and_nothing_is_fetched_or_logged(browser, reported):
    page = reported / "report.html"
    assert_sound(browser, page)
    ids = browser.run("return [...document.querySelectorAll('section')].map(s => s.id)")
    assert ids == [*SECTIONS[:10], "drift", *SECTIONS[10:]]
    for section in {*SECTIONS[:8], "loss-curves"} - {"class-losses"}:
        count = browser.run(f"return document.querySelectorAll('#{section} img').length")
        assert count >= 1, section
    # Each link leads to a section, and each section has a link.
    links = browser.run("return [...document.querySelectorAll('nav a')].map(a => a.hash)")
    assert links == [f"#{i}" for i in ids]
    text = browser.run("return document.body.innerText")
    manifest = json.loads((reported / "manifest.json").read_text())
    for expected in ("export_id", "dataset_id", "model_id"):
        assert manifest[expected] in text
    assert "322 records read = 322 written + 0 quarantined" in text
    assert "trained on 272 rows of train, evaluated on 50 of test" in text.lower()
    assert browser.run("return document.documentElement.lang") == "en"


@pytest.mark.parametrize("name", ["reported", "two_latents"])
def test_it_can_be_read_on_a_phone_and_in_the_dark(name, request):
    needs_browser()
    page = request.getfixturevalue(name) / "report.html"
    phone = Browser(dark=True, width=360, height=740)
    try:
        assert_sound(phone, page)
        # What is wide scrolls by itself: the page does not.
        assert phone.run("return document.documentElement.scrollWidth") <= 360
        assert phone.run("return parseFloat(getComputedStyle(document.body).fontSize)") >= 14
        paper, ink = phone.run(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        brightness = [sum(map(int, c[c.index("(") + 1 : -1].split(",")[:3])) for c in (paper, ink)]
        assert brightness[0] < 100 < 600 < brightness[1]
        # Plots come in their dark look.
        sources = phone.run(
            "return [...document.querySelectorAll('.plot picture')].map("
            "p => p.querySelector('img').currentSrc === p.querySelector('source').srcset)"
        )
        assert sources and all(sources)
    finally:
        phone.close()


def test_two_latents_have_their_space_and_the_chart_of_decoded_points(browser, two_latents):
    assert_sound(browser, two_latents / "report.html")
    for section in ("latent-space", "decoded-grid"):
        assert browser.run(f"return document.querySelectorAll('#{section} img').length") == 1
    names = {path.name for path in (two_latents / "plots").iterdir()}
    assert {"latent_space.png", "decoded_grid.png"} < names and "tsne.png" not in names
    chart = Image.open(two_latents / "plots" / "decoded_grid.png")
    assert chart.width % 20 == chart.height % 20 == 0


def test_the_plots_lie_beside_it(reported):
    assert sorted(path.name for path in (reported / "plots").iterdir()) == PLOTS
    for path in (reported / "plots").iterdir():
        with Image.open(path) as image:
            image.load()
            assert len(image.convert("L").getcolors(1 << 24)) > 5, f"{path.name} is empty"


def test_the_third_picture_is_the_difference(reported):
    page = (reported / "report.html").read_text()
    reach = int(re.search(r"brighter by (\d+) of 255", page)[1])
    url = r'alt="[^"]* above its reconstruction" src="data:image/png;base64,([^"]*)"'
    columns = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(u)))) for u in re.findall(url, page)
    ]
    assert len(columns) == 48
    original, picture, difference = np.split(np.array(columns, np.float64), 3, axis=1)
    expected = np.clip(127.5 * (1 + (picture - original) / reach), 0, 255)
    assert np.abs(difference - expected).max() <= 0.5
    assert reach == round(np.percentile(np.abs(picture - original), 99))


def test_the_losses_of_classes(reported, data_dir):
    """In order of the median above the entropy; all rows are in the sample."""
    dataset, floors = reader.Dataset(str(data_dir)), {}
    for entry in (entry for split in ("train", "test") for entry in dataset.shards(split)):
        shard = dataset.read_shard(entry)
        floors |= dict(zip(shard.ids, bernoulli_entropy(shard.images), strict=True))
    table = pa.concat_tables(map(pq.read_table, sorted((reported / "embeddings").iterdir())))
    classes = np.array(table["class"].to_pylist())
    losses = table["reconstruction_loss"].to_numpy()
    excess = losses - [floors[record_id] for record_id in table["id"].to_pylist()]
    expected = []
    for name in np.unique(classes):
        low, median, high = np.percentile(losses[classes == name], (25, 50, 75))
        above = np.median(excess[classes == name])
        texts = [name, f"{median:,.1f}", f"{low:,.1f} to {high:,.1f}"]
        expected.append((-above, [*texts, str((classes == name).sum()), f"{above:,.1f}"]))
    page = (reported / "report.html").read_text()
    [rows] = re.findall('<table class="classes">(.*?)</table>', page)
    shown = [re.findall("<td>([^<]+)</td>", row) for row in rows.split("<tr>")[2:]]
    assert shown == [row for _, row in sorted(expected)]


def test_names_and_ids_from_outside_are_text(browser, trained, tmp_path):
    from pipeline.datasets.building import create as create_set
    from pipeline.sources import conversion

    settings = create_set.Settings("blobs", 1, 0.1, 0, "none")
    make_embeddings(HOSTILE, trained / "export", tmp_path / "out", num_shards=1)
    input_ = inputs.SourceInput(conversion.SourceSpec(HOSTILE), settings, ["test"])
    page = make_report_of(tmp_path / "out", input_, trained / "export")
    assert_sound(browser, page)
    assert browser.run("return document.querySelectorAll('b').length") == 0
    scripts = browser.run("return [...document.scripts].map(s => s.id || s.textContent)")
    assert scripts == ["scatter-data", (REPOSITORY / "pipeline/reports/scatter.js").read_text()]
    titles = browser.run("return [...document.querySelectorAll('figure')].map(f => f.title)")
    for record_id in IDS:
        assert any(record_id in title for title in titles), record_id
    captions = browser.run(
        "const captions = document.querySelectorAll('#reconstructions figcaption');"
        "return [...captions].map(f => f.textContent)"
    )
    assert set(captions) == set(NAMES)
    lines = (tmp_path / "out" / "projector" / "metadata.tsv").read_text().split("\n")
    assert len(lines) == len(IDS) + 2 and all(line.count("\t") == 2 for line in lines[:-1])
    assert {path.name for path in (tmp_path).iterdir()} == {"out"}


def test_written_again_it_is_the_same(reported, data_dir, trained):
    before = outputs_of(reported)
    make_report_of(reported, data_dir, trained / "export", split=["train", "test"])
    assert outputs_of(reported) == before
    export_id = json.loads((reported / "manifest.json").read_text())["export_id"]
    assert create_report.is_current(str(reported), export_id)


def test_without_images_or_model_it_shows_the_other_sections(browser, reported, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reported, out)
    before = {path.name for path in (out / "plots").iterdir()}
    page = make_report_of(out, None)
    ids_script = "return [...document.querySelectorAll('section')].map(s => s.id)"
    assert_sound(browser, page)
    assert browser.run(ids_script) == [
        "largest-losses", "class-losses", "latent-space", "latents", "neighbours", "probes",
        "drift", "lineage", "counts",
    ]  # fmt: skip
    after = {path.name for path in (out / "plots").iterdir()}
    assert after == {"pca.png", "tsne.png", "kl_per_latent.png"} < before
    assert not (out / "projector" / "sprite.png").exists()


def test_few_and_no_rows(trained, tmp_path):
    """An export of one row, or none, gets a report."""
    for count in (1, 2, 4):
        directory = tmp_path / str(count)
        make_idx_set(directory / "idx", num_train=5, num_test=count)
        data = directory / "data"
        make_shards(f"idx:{directory / 'idx'}", data, num_shards=1)
        make_embeddings(data, trained / "export", directory / "out")
        page = make_report_of(directory / "out", data, trained / "export")
        assert f"{count} records read = {count} written" in page.read_text()
    shard = tmp_path / "4" / "data" / "blobs-test.tfrecord-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:10])
    settings = {"on_corrupt": "quarantine", "max_quarantined": "100%", "overwrite": True}
    make_embeddings(tmp_path / "4" / "data", trained / "export", tmp_path / "4" / "out", **settings)
    page = make_report_of(tmp_path / "4" / "out", tmp_path / "4" / "data", trained / "export")
    assert "4 records read = 0 written + 4 quarantined" in page.read_text()


def test_rows_without_means_and_in_other_formats(data_dir, trained, tmp_path):
    for number, settings in enumerate(
        ({"fields": ("kl",)}, {"fields": ("z",), "embedding_format": "npy"},
         {"fields": ("mean",), "embedding_format": "tfrecord", "images": "none"})
    ):  # fmt: skip
        out = tmp_path / str(number)
        make_embeddings(data_dir, trained / "export", out, **settings)
        page = make_report_of(out, data_dir, trained / "export").read_text()
        assert 'id="lineage"' in page
        assert ('id="latent-space"' in page) == ("mean" in settings["fields"])


def test_no_export_or_another_model_is_refused(data_dir, trained, two_latents, reported, tmp_path):
    with pytest.raises(StageError, match="output_dir=.*: no such directory; expected the output"):
        make_report_of(tmp_path / "nothing", data_dir, trained / "export")
    with pytest.raises(StageError, match="made the export; expected the same"):
        make_report_of(reported, None, two_latents.parent / "run" / "export")


def test_images_of_another_set_or_split_are_refused(reported, data_dir, trained, tmp_path):
    """They would show other images under the ids of the export."""
    for split in (["test"], ["train", "validation"]):
        with pytest.raises(StageError, match="the images are not those of the export .split is"):
            make_report_of(reported, data_dir, trained / "export", split=split)
    make_idx_set(tmp_path / "idx", num_train=20, num_test=10)
    make_shards(f"idx:{tmp_path / 'idx'}", tmp_path / "other")
    with pytest.raises(StageError, match="not those of the export .dataset_id is"):
        make_report_of(reported, tmp_path / "other", trained / "export", split=["train", "test"])


@pytest.mark.parametrize("fault", ["gone", "damaged", "cut"])
def test_missing_images_are_counted_in_a_warning(data_dir, trained, tmp_path, fault):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data_dir, data)
    make_embeddings(data, trained / "export", out)
    path = data / "blobs-test.tfrecord-00001-of-00004"
    if fault == "gone":
        path.unlink()
    elif fault == "damaged":
        damage_one_record(data, path.name)
    else:
        path.write_bytes(path.read_bytes()[:-70])
    input_ = inputs.ShardsInput(str(data), ["test"], "fail")
    page = make_report_of(out, input_, trained / "export").read_text()
    assert "images that were exported could not be read any more" in page


def test_loss_curves_of_a_killed_run(reported, tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    shutil.copytree(reported, out)
    with pytest.raises(StageError, match=r"--run_dir=.*: has no metrics\.jsonl; expected"):
        make_report_of(out, None, run_dir=str(run))
    run.mkdir()
    lines = [
        {"epoch": 1, "split": "train", "loss": 3.0}, {"epoch": 2, "split": "train", "loss": 2.0},
        [1], {"epoch": 3}, {"epoch": 4, "split": "train", "loss": "much"},
    ]  # fmt: skip
    text = "\n".join([*map(json.dumps, lines), '{"epoch": 5, "spl'])
    (run / "metrics.jsonl").write_text(text)
    assert 'id="loss-curves"' in make_report_of(out, None, run_dir=str(run)).read_text()
    assert (out / "plots" / "curve_loss.png").exists()
    # A plot of the earlier report that this one lacks is removed.
    assert not (out / "plots" / "curve_kl.png").exists()


def test_records_of_two_splits_with_equal_ids_are_told_apart(trained, tmp_path):
    from pipeline.datasets.building import create as create_set
    from pipeline.sources import conversion

    source = "tests.reports.test_report.open_twins:x"
    make_embeddings(source, trained / "export", tmp_path / "out", split="train,test", num_shards=1)
    settings = create_set.Settings("blobs", 1, 0.1, 0, "none")
    input_ = inputs.SourceInput(conversion.SourceSpec(source), settings, ["train", "test"])
    ids_by_shard = {task: {f"{i}" for i in range(20)} for task in input_.sizes}
    images = dict(input_.images(ids_by_shard))
    assert len(images) > 20
    for (task, _), image in images.items():
        assert (image == (255 if "-test." in task else 0)).all()


class Twins:
    """Dark images in train, bright ones in test, and the same ids."""

    image_shape, class_names, split_sizes = (
        (12, 8, 1),
        ["dark", "bright"],
        {"train": 20, "test": 20},
    )

    def fingerprint(self):
        return "twins"

    def ids(self, indices):
        return [str(i % 20).encode() for i in indices]

    def where(self, index):
        return str(index)

    def read(self, indices):
        bright = np.asarray(indices) >= 20
        images = np.zeros((len(indices), 12, 8, 1), np.uint8)
        images[bright] = 255
        return images, bright.astype(np.int64)


def open_twins(path):
    return Twins()


def test_the_projector_of_tensorboard_reads_the_files(reported, data_dir):
    from google.protobuf import text_format
    from tensorboard.plugins.projector import projector_config_pb2

    bundle = reported / "projector"
    config = projector_config_pb2.ProjectorConfig()
    text_format.Parse((bundle / "projector_config.pbtxt").read_text(), config)
    [embedding] = config.embeddings
    tensors = np.loadtxt(bundle / embedding.tensor_path, delimiter="\t", ndmin=2)
    header, *lines = (bundle / embedding.metadata_path).read_text().splitlines()
    assert tensors.shape == (322, 3) and len(lines) == 322
    assert header.split("\t") == ["class", "id", "label"]
    sprite = np.asarray(Image.open(bundle / embedding.sprite.image_path))
    width, height = embedding.sprite.single_image_dim
    columns = sprite.shape[1] // width
    assert columns == 18 and sprite.shape[0] == columns * height  # 18² ≥ 322
    dataset = reader.Dataset(str(data_dir))
    images = {}
    for split in ("train", "test"):
        for entry in dataset.shards(split):
            shard = dataset.read_shard(entry)
            images |= dict(zip(shard.ids, shard.images[..., 0], strict=True))
    for index, line in enumerate(lines):
        row, column = divmod(index, columns)
        picture = sprite[row * height : (row + 1) * height, column * width : (column + 1) * width]
        np.testing.assert_array_equal(picture, images[line.split("\t")[1]])


def test_tensorboard_serves_the_projector(reported):
    bundle = reported / "projector"
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={bundle}", "--port=0"]
    server = subprocess.Popen(
        [*command, "--load_fast=false"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        lines = iter(server.stderr.readline, "")
        address = next(match[0] for line in lines if (match := re.search(r"http://\S+/", line)))
        assert_served(f"{address}data/plugin/projector/", bundle)
    finally:
        server.kill()
        server.communicate()


def assert_served(address: str, bundle: pathlib.Path) -> None:
    """TensorBoard's projector serves the files in projector/."""

    def served(path: str) -> bytes:
        with urllib.request.urlopen(f"{address}{path}", timeout=60) as answer:
            return answer.read()

    assert json.loads(served("runs")) == ["."]
    [info] = json.loads(served("info?run=."))["embeddings"]
    assert (info["tensorName"], info["tensorShape"]) == ("mean", [322, 3])
    tensors = np.frombuffer(served("tensor?run=.&name=mean"), np.float32).reshape(322, 3)
    np.testing.assert_allclose(tensors, np.loadtxt(bundle / "tensors.tsv"), rtol=1e-6)
    assert served("metadata?run=.&name=mean") == (bundle / "metadata.tsv").read_bytes()
    assert served("sprite_image?run=.&name=mean") == (bundle / "sprite.png").read_bytes()


def test_the_commands_write_it_and_remove_a_stale_one(data_dir, trained, tmp_path):
    model, out = trained / "export", tmp_path / "out"
    flags = [f"--data_dir={data_dir}", f"--model_dir={model}", f"--output_dir={out}"]
    assert f"export: {out}/report.html" in run_command("pipeline.export", *flags).stdout
    first = outputs_of(out)
    (out / "report.html").unlink()
    (tmp_path / "latest").symlink_to("out")  # A pointer is followed once.
    done = run_command("pipeline.report", *flags[:2], f"--output_dir={tmp_path}/latest")
    assert done.stdout == f"report: {out}/report.html\n" and outputs_of(out) == first
    run_command("pipeline.export", *flags, "--split=train", "--overwrite", "--noreport")
    names = {path.name for path in out.iterdir()}
    assert not names & {"report.html", "report.json", "plots", "projector"}


def test_no_file_of_a_report_that_names_a_record_is_missed(reported, data_dir):
    from tests.embeddings.test_absence import assert_no_file_is_missed, records_of

    page = (reported / "report.html").read_text()
    records = [record for record in records_of(data_dir) if record[0] in page][::4]
    for record_id, serialized in records:
        found = assert_no_file_is_missed(reported, record_id, serialized)
        assert {"report.html", "projector/metadata.tsv", "projector/sprite.png"} <= found
        is_loss = f'title="{record_id}, labelled' in page
        is_pair = f'title="{record_id} above' in page
        assert ("plots/largest_losses.png" in found) == is_loss
        assert ("plots/reconstructions.png" in found) == is_pair
        assert any(name.startswith("images/") for name in found)
