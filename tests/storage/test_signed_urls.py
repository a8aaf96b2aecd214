"""What a signed URL holds beside its address reaches no log, message, manifest or other file."""

import io
import traceback

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.api import preprocess
from pipeline.cli import signed_urls
from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import conversion
from tests import conftest
from tests.forked import run_command
from tests.storage.signed_server import SECRET, holds_secret, serving

QUERY = f"?X-Amz-Expires=3600&X-Amz-Signature={SECRET}"


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("signed")
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    labels = np.arange(20) % 2
    np.savez(directory / "digits.npz", x_train=images, y_train=labels)
    np.save(directory / "digits.npy", images)
    header = ",".join(["label", *(f"pixel{n}" for n in range(64))])
    rows = np.c_[labels, images.reshape(20, -1)]
    np.savetxt(directory / "digits.csv", rows, fmt="%d", delimiter=",", header=header, comments="")
    encoded = [png(image) for image in images[1:]]
    table = pa.table({"image": [*encoded, b"damaged"], "label": labels})
    pq.write_table(table, directory / "digits.parquet")
    (directory / "damaged.npz").write_bytes(b"PK" * 100)
    with serving(directory) as url:
        yield url


def check_no_secret(done, *directories) -> None:
    assert not holds_secret(f"{done.stdout}{done.stderr}".encode()), done.stderr
    for directory in directories:
        for path in directory.rglob("*"):
            assert not holds_secret(path.name.encode())
            assert path.is_dir() or not holds_secret(path.read_bytes()), path


long = pytest.mark.long


@pytest.mark.parametrize(
    "kind", ["npz", "parquet", pytest.param("npy", marks=long), pytest.param("csv", marks=long)]
)
def test_a_set_at_a_signed_url_is_known_by_its_address(server, tmp_path, kind):
    address, out = f"{kind}:{server}/digits.{kind}", tmp_path / "out"
    flags = ["--max_quarantined=1", "--validation_fraction=0"]
    arguments = [f"--source={address}{QUERY}", f"--output_dir={out}", *flags]
    done = run_command("pipeline.preprocess", *arguments)
    assert f"reads {address}: " in done.stderr and list(out.glob("digits-train.tfrecord-*"))
    check_no_secret(done, tmp_path)
    if kind == "parquet":
        [quarantined] = (out / "quarantine").iterdir()
        assert f'"where": "{server}/digits.parquet#19"' in quarantined.read_text()
    # Tomorrow's signature is of the same set.
    arguments[0] = f"--source={address}?X-Amz-Date=1&X-Amz-Signature={SECRET}"
    done = run_command("pipeline.preprocess", *arguments)
    assert "already finished" in done.stdout
    done = run_command("pipeline.preprocess", *arguments, "--append")
    assert "nothing to append" in done.stdout
    check_no_secret(done, tmp_path)


@long
def test_workers_of_their_own_open_a_signed_url(server, tmp_path):
    done = run_command(
        "pipeline.preprocess",
        f"--source=npz:{server}/digits.npz{QUERY}",
        f"--output_dir={tmp_path}/out",
        "--direct_running_mode=multi_processing",
        "--direct_num_workers=2",
    )
    assert "finished: 20 read = 20 written" in done.stdout
    check_no_secret(done, tmp_path)


@long
def test_an_export_of_a_signed_url_holds_its_address_alone(server, trained, tmp_path):
    out = tmp_path / "out"
    done = run_command(
        "pipeline.export",
        f"--source=npz:{server}/digits.npz{QUERY}",
        "--image_size=12x8",
        "--split=all",
        f"--model_dir={trained}/export",
        f"--output_dir={out}",
    )
    assert "20 read = 20 written" in done.stdout and (out / "report.html").exists()
    check_no_secret(done, tmp_path)


FAILING = {
    "nothing there": (1, "--source=npz:{url}/none.npz{query}"),
    "a refusal": (1, "--source=csv:{url}/digits.csv?X-Amz-Signature=x{secret}"),
    "a strange answer": (1, "--source=npy:{url}/broken{query}"),
    "damage": (1, "--source=npz:{url}/damaged.npz{query}"),
    "an image set of another kind": (1, "--source=parquet:{url}/digits.npz{query}"),
    "an unknown kind": (2, "--source=tar:{url}/digits.tar{query}"),
    "a kind of directories": (2, "--source=folder:{url}/{query}"),
    "a function that fails": (1, "--source=tests.storage.signed_server.open_it:{url}/a{query}"),
    "an unknown flag": (2, "--sauce=npz:{url}/digits.npz{query}"),
    "a wrong flag beside": (2, "--source=npz:{url}/digits.npz{query} --labels=x"),
    "an option of another kind": (2, "--source=npz:{url}/digits.npz{query} --class_level=1"),
    "another flag": (2, "--source=sample --name={url}/{query}"),
    "a directory to write": (2, "--source=sample --output_dir={url}/out{query}"),
    "a password": (2, "--source=sample --output_dir=gs://user:{secret}@bucket/out"),
    "a directory of a set": (2, "--source=sample --tfds_data_dir s3://bucket/a{query}"),
    "class names of a set": (2, "--source=sample --class_names=@{url}/set{query}"),
}


_LONG = ("a refusal", "damage", "an image set of another kind")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[long] * (case in _LONG)) for case in FAILING]
)
def test_a_failing_command_shows_the_address_alone(server, tmp_path, case):
    status, line = FAILING[case]
    arguments = line.format(url=server, query=QUERY, secret=SECRET).split()
    if not any(argument.startswith("--output_dir") for argument in arguments):
        arguments.append(f"--output_dir={tmp_path}/out")
    done = run_command("pipeline.preprocess", *arguments, check=False)
    assert done.returncode == status, done.stderr
    check_no_secret(done, tmp_path)


def test_logs_and_the_traceback_of_a_defect_show_the_address_alone(server):
    spec = f"tests.storage.signed_server.break_on:{server}/a{QUERY}"
    # A process of its own: a fork has the logging of the tests.
    done = conftest.run_command("pipeline.preprocess", f"--source={spec}", "--dry_run", check=False)
    check_no_secret(done)
    assert done.returncode == 1
    assert done.stderr.startswith(f"WARNING source: cannot read {server}/a\n")
    assert done.stderr.endswith(f"ValueError: '{server}/a'\n")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("pipeline.verify", ["{url}"]),
        ("pipeline.verify", ["--absent={url}", "x"]),
        ("pipeline.latest", ["{url}"]),
        ("pipeline.remove", ["--data_dir={url}", "--ids=x"]),
        ("pipeline.export", ["--data_dir={url}", "--model_dir=x", "--output_dir=y"]),
        ("pipeline.export", ["--source=sample", "--model_dir={url}", "--output_dir=y"]),
        ("pipeline.report", ["--data_dir=x", "--model_dir=x", "--output_dir={url}"]),
        ("trainer.main", ["--config=smoke", "--config.data_dir={url}", "--workdir=x"]),
        ("trainer.main", ["--config=smoke", "--config.data_dir=x", "--workdir", "{url}"]),
        ("trainer.evaluate", ["--data_dir={url}", "--model_dir=x"]),
    ],
)
def test_no_other_flag_takes_a_signed_url(server, tmp_path, module, arguments):
    url = f"{server}/x{QUERY}"
    done = run_command(module, *(part.format(url=url) for part in arguments), check=False)
    assert done.returncode == 2 and not holds_secret(done.stderr.encode()), done.stderr
    assert f"{server}/x: expected a path or URL without query string" in done.stderr


def test_from_python_too(server, tmp_path):
    with pytest.raises(UsageError, match="expected a path or URL without query string") as caught:
        preprocess("sample", f"{server}/out{QUERY}")
    assert not holds_secret("".join(traceback.format_exception(caught.value)).encode())
    for source in (f"npy:{server}/broken", f"csv:{server}/none.csv", f"npz:{server}/none.npz"):
        with pytest.raises(StageError) as caught:
            preprocess(f"{source}{QUERY}", tmp_path / "out")
        # What Python prints of an error that nobody catches.
        assert not holds_secret("".join(traceback.format_exception(caught.value)).encode())
    data = preprocess(f"npz:{server}/digits.npz{QUERY}", tmp_path / "out")
    assert sum(data.splits.values()) == 20


def test_a_spec_shows_no_secret():
    spec = conversion.SourceSpec(f"npz:https://host/a.npz{QUERY}")
    assert spec.source == "npz:https://host/a.npz" and not holds_secret(repr(spec).encode())


NAMES = st.text("abcXYZ019-_.~%é/", min_size=1, max_size=20)
HOSTS = st.sampled_from(["host", "127.0.0.1:80", "bucket.s3.eu-1.amazonaws.com"])
SECRETS = st.text("abcXYZ019-_.~%&=/+:,;()?", min_size=1, max_size=40).map(
    lambda text: f"{text}S3C"
)


@given(st.sampled_from(["http", "https", "HTTPS"]), HOSTS, NAMES, SECRETS, st.booleans())
def test_any_text_loses_all_after_the_question_mark(scheme, host, path, secret, has_password):
    url = f"{scheme}://{'user:S3C@' * has_password}{host}/{path}?{secret}"
    address = signed_urls.address(url)
    assert address == f"{scheme}://{host}/{path}"
    assert signed_urls.is_signed(url) and not signed_urls.is_signed(address)
    for text in ("{}", "--source=npz:{}: is wrong", "('{}')", '<a href="{}">', "404, url={}\nnext"):
        shown = signed_urls.without_secrets(text.format(url))
        assert "S3C" not in shown and f"{host}/{path}" in shown
        assert signed_urls.without_secrets(shown) == shown


@given(st.sampled_from(["gs", "s3", "abfs"]), NAMES, st.sampled_from("?*["), NAMES)
def test_a_pattern_is_no_query(scheme, before, magic, after):
    url = f"{scheme}://bucket/{before}{magic}{after}"
    assert signed_urls.address(f"parquet:{url}") == f"parquet:{url}"
    assert signed_urls.without_secrets(f"{url}: missing") == f"{url}: missing"
    assert signed_urls.address(f"{url}?sig=S3C") == url or "?" in url


@given(st.text("abc?=&/:. '\"", max_size=60))
def test_a_local_path_stays(path):
    if "//" not in path:
        assert signed_urls.address(path) == path == signed_urls.without_secrets(path)
