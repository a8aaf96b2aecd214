"""The commands as a user meets them: processes, flags, exit status, output."""

import fcntl
import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import termios

import pytest

from pipeline.cli import command, proxies
from pipeline.cli.progress import Progress
from tests import forked
from tests.conftest import REPOSITORY, make_idx_set, make_shards, outputs_of, run_command

MODULES = ["pipeline.preprocess", "trainer.main", "pipeline.export"]
# Every command that is installed -> its module, and a flag of its own.
INSTALLED = {
    "vae-preprocess": ("pipeline.preprocess", "--overwrite"),
    "vae-train": ("trainer.main", "--overwrite"),
    "vae-export": ("pipeline.export", "--overwrite"),
    "vae-verify": ("pipeline.verify", "--max_shown"),
    "vae-evaluate": ("trainer.evaluate", "--num_importance_samples"),
    "vae-launch": ("trainer.launch", "--num_workers"),
    "vae-join": ("trainer.join", "--hosts"),
    "vae-compare-routes": ("trainer.compare_routes", "--num_rounds"),
    "vae-report": ("pipeline.report", "--run_dir"),
}


@pytest.mark.parametrize(("module", "flag"), list(INSTALLED.values()))
def test_help_answers_without_the_heavy_imports(module, flag):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"python -m {module}" in done.stdout
    assert flag in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"tensorflow", "apache_beam", "pyarrow", "keras"}


REQUIRED = {
    "pipeline.preprocess": ["--source=sample", "--output_dir=x"],
    "trainer.main": ["--config=configs/smoke.py", "--workdir=x"],
    "pipeline.export": ["--model_dir=x", "--data_dir=x", "--output_dir=x"],
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("what", ["a flag is missing", "an argument is no flag"])
def test_bad_usage_exits_2(module, what):
    if what == "a flag is missing":
        arguments, message = REQUIRED[module][1:], "is not set; expected a value"
    else:
        arguments, message = [*REQUIRED[module], "extra"], "extra"
    done = run_command(module, *arguments, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{tmp}/own.py", "own.py:2: ZeroDivisionError: division by zero"),
        ("configs/mnist.py:foo=1", "'foo=1' is not one of latent_dim=INT, beta=FLOAT"),
        ("configs/smoke.py:latent_dim=3", "get_config() takes 0 positional arguments"),
    ],
)
def test_errors_in_a_config_file_are_one_line(tmp_path, config, message):
    (tmp_path / "own.py").write_text("def get_config():\n    return 1 / 0\n")
    flags = [f"--config={config.format(tmp=tmp_path)}", f"--workdir={tmp_path}"]
    done = run_command("trainer.main", *flags, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("preprocess", ["--num_shard=4"], "did you mean --num_shards?"),
        ("preprocess", ["--direct_num_worker=4"], "did you mean --direct_num_workers?"),
        ("preprocess", ["--num_shards=0"], "--num_shards=0"),
        ("preprocess", ["--num_shards=many"], "--num_shards=many"),
        ("preprocess", ["--direct_num_workers=x"], "invalid int value: 'x'"),
        ("preprocess", ["--runner=Nonesuch"], "--runner=Nonesuch"),
        ("preprocess", ["--name=../mnist"], "at most 100 bytes of letters, digits and underscores"),
    ],
)
def test_flags_nobody_knows_are_never_swallowed(tmp_path, module, arguments, message):
    required = ["--source=sample", f"--output_dir={tmp_path}/out"]
    done = run_command(f"pipeline.{module}", *required, *arguments, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.latent_dims=3", "did you mean --config.latent_dim?"),
        ("--config.batch_size=many", "--config.batch_size"),
        ("--config.batch_size=1.5", "--config.batch_size"),
        ("--config.strides=(3,1)", "which its stride 3 does not divide"),
        ("--config=configs/nothing.py", "configs/nothing.py: no such config; expected a path"),
        ("--config=configs/", "Is a directory: 'configs/'; expected a readable Python"),
        ("--config.num_epochs=0", "--config.num_epochs=0: expected at least 1"),
    ],
)
def test_a_config_that_cannot_be_exits_2(data_dir, tmp_path, argument, message):
    arguments = ["--config=configs/smoke.py", f"--config.data_dir={data_dir}", argument]
    if argument.startswith("--config="):
        arguments = [argument]
    done = run_command("trainer.main", *arguments, f"--workdir={tmp_path}/run", check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            "pipeline.preprocess",
            ["--source=sample", "--output_dir={file}/x"],
            "Not a directory",
        ),
        (
            "trainer.main",
            ["--config=configs/mnist.py", "--config.data_dir={tmp}/nothing", "--workdir={tmp}/run"],
            "no such directory; expected the output of python -m pipeline.preprocess",
        ),
        (
            "trainer.main",
            ["--config=configs/smoke.py", "--config.data_dir={data}", "--workdir={file}/x"],
            "Not a directory",
        ),
    ],
)
def test_what_fails_exits_1_with_one_line(tmp_path, data_dir, module, arguments, message):
    (tmp_path / "file").write_text("")
    places = {"file": tmp_path / "file", "tmp": tmp_path, "data": data_dir}
    done = run_command(module, *[a.format(**places) for a in arguments], check=False)
    assert done.returncode == 1, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def without_progress(stderr):
    """The lines of standard error but those that a slow machine has time to print meanwhile."""
    progress = re.compile(r"(preprocess \d+/\d+ shards|export \d+/\d+ records)(, .*)?")
    return [line for line in stderr.splitlines() if not progress.fullmatch(line)]


@pytest.fixture
def silent_proxy(monkeypatch):
    """A proxy in the environment that takes connections and never answers; its socket."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        yield proxy


def test_three_stages_end_to_end_say_only_their_own_lines(tmp_path, silent_proxy):
    # The proxy is to have no say: workers of a job on this machine are reached directly.
    source = make_idx_set(tmp_path / "idx", suffix=".gz")
    shards_dir, workdir, out = (tmp_path / name for name in ("shards", "run", "out"))
    preprocess = run_command(
        "pipeline.preprocess",
        f"--source=idx:{source}",
        f"--output_dir={shards_dir}",
        "--num_shards=2",
        "--name=blobs",
        "--direct_num_workers=2",
    )
    assert [line.split()[1] for line in without_progress(preprocess.stderr)] == [
        *("reads", "10", "images", "the")
    ]
    assert preprocess.stdout.startswith(
        "preprocess: finished: 350 read = 350 written (train 272, validation 28, test 50)"
    )
    make_shards(f"idx:{source}", tmp_path / "alone", num_shards=2)
    assert outputs_of(shards_dir) == outputs_of(tmp_path / "alone")
    train_args = [
        "--config=configs/smoke.py",
        f"--config.data_dir={shards_dir}",
        f"--workdir={workdir}",
        "--config.num_virtual_devices=2",
        "--config.deterministic=True",
    ]
    train = run_command("trainer.main", *train_args)
    lines = train.stderr.splitlines()
    assert lines[0].startswith("train: from the start to step 18, 2 replica(s), train 272")
    assert [line.split()[0] for line in lines[1:]] == ["epoch"] * (len(lines) - 1)
    assert train.stdout.startswith("train: finished: train: loss")
    assert "already finished" in forked.run_command("trainer.main", *train_args).stdout

    # Again with operations that may not depend on timing: the same to the last bit.
    again = forked.run_command("trainer.main", *train_args, f"--workdir={tmp_path}/again")
    assert again.stdout.split("model_id ")[1][:16] == train.stdout.split("model_id ")[1][:16]

    export_args = [
        f"--data_dir={shards_dir}",
        f"--model_dir={workdir}/export",
        f"--output_dir={out}",
        "--split=validation",
    ]
    export = run_command("pipeline.export", *export_args)
    assert without_progress(export.stderr) == []
    *of_shards, in_all, page = export.stdout.splitlines()
    assert [line.split(":")[0] for line in of_shards] == sorted(
        path.name for path in shards_dir.glob("*-validation.tfrecord-*")
    )
    assert in_all.startswith("export: finished: 28 read = 28 written + 0 quarantined (28 computed")
    assert page == f"export: {out}/report.html"
    assert "already finished" in forked.run_command("pipeline.export", *export_args).stdout
    assert json.loads((out / "manifest.json").read_text())["records"]["written"] == 28
    with pytest.raises(BlockingIOError):
        silent_proxy.accept()  # Nobody came.


_LOOPBACK = "localhost,127.0.0.1,::1"


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, {}),
        ({"http_proxy": ""}, {}),
        ({"HTTPS_PROXY": "http://p"}, dict.fromkeys(proxies._DIRECT, _LOOPBACK)),
        # What one reader finds in one of the variables it goes on finding in all that are set.
        (
            {"grpc_proxy": "p", "NO_PROXY": "a.b, localhost"},
            dict.fromkeys(proxies._DIRECT, "a.b,localhost,127.0.0.1,::1"),
        ),
        (
            {"http_proxy": "p", "no_proxy": "a", "NO_PROXY": "b", "no_grpc_proxy": "c"},
            {
                "no_proxy": f"a,{_LOOPBACK}",
                "NO_PROXY": f"b,{_LOOPBACK}",
                "no_grpc_proxy": f"c,{_LOOPBACK}",
            },
        ),
        # All hosts to all but gRPC, as long as it stands alone.
        (
            {"http_proxy": "p", "no_proxy": "*"},
            {"no_proxy": "*", "no_grpc_proxy": f"*,{_LOOPBACK}"},
        ),
    ],
)
def test_loopback_is_in_every_list_of_hosts_without_a_proxy(monkeypatch, there, expected):
    monkeypatch.setattr(os, "environ", dict(there))
    proxies.reach_directly()
    proxies.reach_directly()
    assert os.environ == {**there, **expected}


def test_installed_commands_are_the_modules():
    for name, (module, _) in INSTALLED.items():
        path = os.path.join(os.path.dirname(sys.executable), name)
        if not os.path.exists(path):
            pytest.skip("the package is not installed in this environment")
        done = subprocess.run([path, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout == run_command(module, "--help").stdout


def test_arrows_point_one_way():
    heavy = "import sys; {first}import {module}; print(*sys.modules)"
    loaded = {}
    for module in (
        "trainer.runs.train",
        "pipeline.datasets.building.shard_writer",
        "pipeline.embeddings.create",
    ):
        is_trainer = module.startswith("trainer")
        first = "from pipeline.cli import quiet; quiet.hide_unused(); quiet.import_tensorflow(); "
        first = first if is_trainer else ""
        done = subprocess.run(
            [sys.executable, "-c", heavy.format(first=first, module=module)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        loaded[module] = set(done.stdout.split())
    assert not loaded["trainer.runs.train"] & {"apache_beam", "matplotlib", "sklearn"}
    for module in ("pipeline.datasets.building.shard_writer", "pipeline.embeddings.create"):
        assert "trainer" not in loaded[module]
        assert "tensorflow" not in loaded[module]


def test_progress_updates_in_place_on_a_terminal_and_in_lines_elsewhere(tmp_path):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 20, 0, 0))  # 20 columns
    with os.fdopen(writer, "w") as terminal:
        progress = Progress("work", total=10, unit="files", stream=terminal)
        progress._shown = float("-inf")
        progress.update(5, "a note that is too long for this terminal")
        progress.close("work done, and this line may be as long as it likes")
        seen = ""
        while not seen.rstrip().endswith("likes"):  # A terminal hands over piece by piece.
            seen += os.read(reader, 1000).decode()
    os.close(reader)
    in_place, _, last = seen.rstrip().rpartition("\r")
    assert in_place.rstrip("\r") == "\rwork 5/10 files, a "
    assert last.strip() == "work done, and this line may be as long as it likes"

    with open(tmp_path / "log", "w+") as log:
        progress = Progress("work", total=10, unit="files", stream=log)
        progress.update(5)  # Too soon for a log.
        progress.close("work done")
        log.seek(0)
        assert log.read() == "work done\n"


@pytest.mark.parametrize("module", ["pipeline.preprocess", "pipeline.export", "pipeline.report"])
def test_help_has_every_flag_under_a_subject(module):
    text = run_command(module, "--help").stdout
    assert "\nFlags:\n" not in text
    headings = re.findall(r"^(\w.*):$", text, re.M)
    assert len(headings) >= 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--overwrite=maybe"], "--overwrite=maybe: expected true or false; see --help"),
        (["--seed=x"], "--seed=x: expected a whole number; see --help"),
        (["--validation_fraction=x"], "--validation_fraction=x: expected a number; see --help"),
        (["--output_dir="], "--output_dir=: is empty; expected a directory: name one"),
        (["--source=os.path.join:x"], "returned a str; expected a Source"),
    ],
)
def test_wrong_flags_are_named_as_they_were_typed(tmp_path, arguments, text):
    command = ["pipeline.preprocess", "--source=sample", f"--output_dir={tmp_path}/out"]
    done = run_command(*command, *arguments, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert text in done.stderr


def test_a_config_flag_without_a_config_says_so():
    done = run_command("trainer.main", "--config.data_dir=x", "--workdir=y", check=False)
    assert done.returncode == 2
    assert "--config.data_dir: --config is not set; name --config=FILE too" in done.stderr


@pytest.mark.parametrize("arguments", [["pipeline.export", "--help"], ["pipeline.verify"]])
def test_a_closed_pipe_is_no_failure_of_a_disk(data_dir, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    if arguments[0] == "pipeline.verify":
        arguments = [*arguments, str(data_dir)]
    with open(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=REPOSITORY,
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_another_broken_pipe_is_told(capsys):
    def work():
        raise BrokenPipeError(32, "Broken pipe")

    assert command.end("train", work) == 1
    assert capsys.readouterr().err.startswith("train: [Errno 32] Broken pipe; expected")
