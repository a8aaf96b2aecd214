"""--metrics_file: what commands write for Prometheus, however they end."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import yaml
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import parser

from pipeline.cli import metrics_file
from pipeline.cli.errors import UsageError
from tests.conftest import REPOSITORY, die_at_file, make_folder_set
from tests.engines.processes import free_ports
from tests.faults import interrupting
from tests.forked import run_command, start

SUCCESS = "vae_last_success_timestamp_seconds"
ALERTS = REPOSITORY / "configs" / "deploy" / "alerts.yaml"
PAGE = REPOSITORY / "docs" / "metrics.md"


def samples(path: pathlib.Path) -> list:
    families = parser.text_string_to_metric_families(path.read_text())
    return [sample for family in families for sample in family.samples]


def read(path: pathlib.Path) -> dict[str, float]:
    """Metric, or metric:value of its own label -> value."""
    values = {}
    for name, labels, value, *_ in samples(path):
        own = [text for key, text in labels.items() if key not in metrics_file.COMMON_LABELS]
        values[":".join([name, *own])] = value
    return values


def records(path: pathlib.Path) -> dict[str, float]:
    """Fate -> number of records."""
    prefix = "vae_records:"
    return {k.removeprefix(prefix): v for k, v in read(path).items() if k.startswith(prefix)}


class Runs:
    """Commands over one small image set, each with a file for its metrics."""

    def __init__(self, directory: pathlib.Path, idx_dir: pathlib.Path):
        self.directory, self._idx_dir = directory, idx_dir

    def file(self, stage: str) -> pathlib.Path:
        return self.directory / f"{stage}.prom"

    def flags(self, stage: str) -> list[str]:
        at = self.directory
        own = {
            "preprocess": [f"--source=idx:{self._idx_dir}", f"--output_dir={at}/shards"]
            + ["--num_shards=2", "--name=blobs"],
            "train": ["--config=configs/smoke.py", f"--config.data_dir={at}/shards"]
            + ["--config.batch_size=27", f"--workdir={at}/run"],
            "export": [f"--data_dir={at}/shards", f"--model_dir={at}/run/export", "--noreport"],
        }[stage]
        return [*own, f"--metrics_file={self.file(stage)}"]

    def run(self, stage: str, *more: str, status: int = 0, program: tuple = ()) -> str:
        """Runs a stage; returns its standard error."""
        module = {"train": "trainer.main"}.get(stage, f"pipeline.{stage}")
        done = run_command(*program, module, *self.flags(stage), *more, check=False)
        assert done.returncode == status, done.stderr
        return done.stderr


STOP_AT_MANIFEST = ("tests.faults.stop_at_file", "manifest.json")


@pytest.fixture(scope="module")
def runs(idx_dir, tmp_path_factory):
    """The three stages, each of them stopped once by SIGTERM, and then run to its end."""
    runs = Runs(tmp_path_factory.mktemp("metrics"), idx_dir)
    runs.stopped = {}

    def keep(stage: str) -> None:
        runs.stopped[stage] = read(runs.file(stage))

    runs.run("preprocess", status=75, program=STOP_AT_MANIFEST)
    keep("preprocess")
    runs.run("preprocess")
    at = interrupting.At("report", 3, signal.SIGTERM)  # In the second epoch.
    log = runs.directory / "log"
    assert interrupting.train(runs.flags("train"), log=log, at=at) == 75, log.read_text()
    keep("train")
    runs.run("train")
    first = f"--output_dir={runs.directory}/first"
    runs.run("export", first, status=75, program=STOP_AT_MANIFEST)
    keep("export")
    runs.run("export", first)
    second = f"--output_dir={runs.directory}/second"
    reference = f"--reference={runs.directory}/first"
    runs.run("export", second, "--split=all", f"--reuse_from={runs.directory}/first", reference)
    return runs


def test_a_finished_stage_has_written_its_account(runs):
    for stage in ("preprocess", "train", "export"):
        values = read(runs.file(stage))
        assert values["vae_exit_status"] == 0 < values["vae_duration_seconds"] < 600
        assert values[SUCCESS] == values["vae_last_run_timestamp_seconds"] <= time.time()
        assert {s.labels["stage"] for s in samples(runs.file(stage))} == {stage}
        assert {s.labels["name"] for s in samples(runs.file(stage))} == {stage}
    assert records(runs.file("preprocess")) == {"written": 350, "quarantined": 0, "existing": 0}
    assert records(runs.file("train")) == {"used": 350, "quarantined": 0}
    assert records(runs.file("export")) == {"computed": 300, "reused": 50, "quarantined": 0}
    manifest = json.loads((runs.directory / "second" / "manifest.json").read_text())
    values, drift = read(runs.file("export")), manifest["drift"]
    assert values["vae_drift_warnings"] == len(drift["warnings"])
    latents = [latent["statistic"] for latent in drift["latents"]]
    assert values["vae_drift_statistic:latents"] == max(latents) > 0
    statistic = drift["reconstruction_loss"]["statistic"]
    assert values["vae_drift_statistic:reconstruction_loss"] == statistic


def test_the_validation_losses_are_those_of_the_run(runs):
    def check(last: float, best: float) -> None:
        assert last == losses[-1] and best == min(losses)

    lines = (runs.directory / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    losses = [line["loss"] for line in lines if line["split"] == "validation"]
    names = ("vae_validation_loss_last_nats", "vae_validation_loss_best_nats")
    values = read(runs.file("train"))
    assert [values[name] for name in names] == [losses[-1], min(losses)]
    # When the run was stopped, it had reported its first epoch.
    assert [runs.stopped["train"][name] for name in names] == [losses[0]] * 2
    runs.run("train")  # Already finished.
    again = read(runs.file("train"))
    assert [again[name] for name in names] == [values[name] for name in names]


def test_a_stopped_stage_has_written_what_it_had_counted(runs):
    for stage, counts in {
        "preprocess": {"written": 350, "quarantined": 0, "existing": 0},
        "train": {"used": 350, "quarantined": 0},
        "export": {"computed": 50, "reused": 0, "quarantined": 0},
    }.items():
        values = runs.stopped[stage]
        assert (values["vae_exit_status"], values[SUCCESS]) == (75, 0), stage
        assert {fate: values[f"vae_records:{fate}"] for fate in counts} == counts, stage


def test_the_last_success_outlives_what_fails_and_what_is_stopped(runs, tmp_path):
    path, out = runs.file("preprocess"), f"--output_dir={tmp_path}/out"
    before = read(path)
    runs.run("preprocess", out, status=75, program=STOP_AT_MANIFEST)
    stopped = read(path)
    assert stopped["vae_exit_status"] == 75 and stopped[SUCCESS] == before[SUCCESS] > 0
    runs.run("preprocess", out, "--seed=x", status=2)  # The flags do not parse.
    failed = read(path)
    assert failed["vae_exit_status"] == 2 and failed[SUCCESS] == before[SUCCESS]
    assert failed["vae_last_run_timestamp_seconds"] > stopped["vae_last_run_timestamp_seconds"]
    assert records(path) == {}
    runs.run("preprocess", out)
    assert read(path)[SUCCESS] > before[SUCCESS]
    for more in ((), ("--append",)):  # Already finished; nothing to append.
        runs.run("preprocess", out, *more)
        assert records(path) == {"written": 0, "quarantined": 0, "existing": 350}


def test_a_killed_stage_leaves_the_file_as_it_was(runs, tmp_path):
    before = runs.file("preprocess").read_bytes()
    out = f"--output_dir={tmp_path}/out"
    die_at_file(3, "pipeline.preprocess", *runs.flags("preprocess"), out)
    assert runs.file("preprocess").read_bytes() == before
    assert not [*runs.directory.glob("*.prom.*")]


def test_too_many_unreadable_records_are_counted(tmp_path):
    images = make_folder_set(tmp_path / "set", num_train=40, num_test=0)
    for path in sorted(images.rglob("*.png"))[::20]:
        path.write_bytes(path.read_bytes()[:50])
    flags_ = [f"--source=folder:{images}", f"--output_dir={tmp_path}/out"]
    path = tmp_path / "x.prom"
    command = ["pipeline.preprocess", *flags_, f"--metrics_file={path}"]
    assert run_command(*command, check=False).returncode == 1
    assert records(path) == {"written": 38, "quarantined": 2, "existing": 0}
    run_command(*command, "--max_quarantined=2")
    assert records(path) == {"written": 38, "quarantined": 2, "existing": 0}
    run_command(*command, "--max_quarantined=2")
    assert records(path) == {"written": 0, "quarantined": 2, "existing": 38}


def test_a_rejected_export_has_written_its_account_and_its_drift(runs, tmp_path):
    path = tmp_path / "export.prom"
    flags_ = [*runs.flags("export"), f"--output_dir={tmp_path}/out", f"--metrics_file={path}"]
    flags_ += ["--require=elbo>0", f"--reference={runs.directory}/second"]
    for _ in range(2):  # Found rejected, the second time.
        done = run_command("pipeline.export", *flags_, check=False)
        assert done.returncode == 1 and re.search("(is|was) rejected", done.stderr)
        values = read(path)
        assert values["vae_exit_status"] == 1 and "vae_drift_warnings" in values
        assert sum(records(path).values()) == 50


def test_a_rejected_data_set_has_written_its_account_and_its_drift(runs, tmp_path):
    path, out = tmp_path / "preprocess.prom", f"--output_dir={tmp_path}/out"
    flags_ = [*runs.flags("preprocess"), out, f"--metrics_file={path}"]
    reference = f"--reference={runs.directory}/shards"
    for fate in ("written", "existing"):  # Found rejected, the second time.
        done = run_command(
            "pipeline.preprocess", *flags_, reference, "--require=blank>1", check=False
        )
        assert done.returncode == 1 and records(path)[fate] == sum(records(path).values()) == 350
        values = read(path)
        assert values["vae_exit_status"] == 1 and values["vae_drift_warnings"] == 0
        for quantity in ("class_shares", "brightness", "contrast"):
            assert values[f"vae_drift_statistic:{quantity}"] == 0
    run_command("pipeline.preprocess", *flags_, "--require=blank<1")
    more = ["--append", "--id_prefix=more-", "--require=duplicates<0.1"]
    done = run_command("pipeline.preprocess", *flags_, *more, check=False)
    assert done.returncode == 1 and "duplicates<0.1 (it is " in done.stderr
    assert records(path) == {"written": 0, "rejected": 350, "quarantined": 0, "existing": 0}


@pytest.mark.long
def test_a_second_interrupt_writes_too(runs, tmp_path):
    path, log = tmp_path / "x.prom", tmp_path / "log"
    more = [f"--workdir={tmp_path}/run", f"--metrics_file={path}"]
    at = interrupting.At(interrupting.STUCK, 1, signal.SIGINT)
    assert interrupting.train([*runs.flags("train"), *more], log=log, at=at) == 75
    assert read(path)["vae_exit_status"] == 75


def _raise() -> None:
    from pipeline.stages import pointer

    pointer.read = lambda path: 1 / 0


def test_a_defect_is_a_failure(tmp_path):
    path, log = tmp_path / "x.prom", tmp_path / "log"
    arguments = ["/nonesuch", f"--metrics_file={path}"]
    process = start("pipeline.latest", *arguments, stdout=log, stderr=log, prepare=_raise)
    process.join()
    assert process.exitcode == 1 and "ZeroDivisionError" in log.read_text()
    assert read(path)["vae_exit_status"] == 1


def test_a_command_that_ends_at_once_does_so_in_one_place():
    paths = [path for top in ("pipeline", "trainer") for path in (REPOSITORY / top).rglob("*.py")]
    ending = {str(p.relative_to(REPOSITORY)) for p in paths if "os._exit(" in p.read_text()}
    assert ending == {"pipeline/cli/command.py", "pipeline/runners/worker.py"}  # No command.


@pytest.mark.parametrize("index", [0, 1])
def test_of_a_cluster_the_chief_writes(tmp_path, index):
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    path = tmp_path / "x.prom"
    more = ["--config.strategy=multi_worker", f"--config.data_dir={tmp_path}/nonesuch"]
    more += [f"--workdir={tmp_path}/run", f"--metrics_file={path}"]
    env = {"TF_CONFIG": json.dumps(task)}
    done = run_command("trainer.main", "--config=configs/smoke.py", *more, check=False, env=env)
    assert done.returncode == 1, done.stderr
    assert path.exists() == (index == 0)


def test_a_dry_run_and_help_are_no_runs(tmp_path):
    path = tmp_path / "x.prom"
    for more in ("--dry_run", "--help"):
        run_command("pipeline.preprocess", "--source=sample", more, f"--metrics_file={path}")
        assert not path.exists()


COMMANDS = ["preprocess", "remove", "verify", "export", "latest", "report"]


@pytest.mark.parametrize("module", [*(f"pipeline.{name}" for name in COMMANDS), "trainer.evaluate"])
def test_every_command_has_the_flag(tmp_path, module):
    path = tmp_path / "x.prom"
    done = run_command(module, f"--metrics_file={path}", "--nonesuch", check=False)
    assert done.returncode == 2, done.stderr
    (sample,) = [s for s in samples(path) if s.name == "vae_exit_status"]
    assert sample.value == 2
    assert sample.labels == {"stage": module.partition(".")[2], "name": "x"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/x.txt", "expected a name *.prom"),
        ("{tmp}/.prom", "expected a name *.prom"),
        ("", "expected a name *.prom"),
        ("gs://bucket/x.prom", "is a URL; expected a local path"),
        ("{tmp}/nonesuch/x.prom", "/nonesuch is no directory; expected an existing one"),
        ("{tmp}/directory.prom", "is no regular file; expected a file or a free name"),
        ("{tmp}/apt.prom", "holds a metric apt_upgrades of another program; expected a file for"),
        ("{tmp}/train.prom", "holds a metric vae_exit_status of train; expected a file for"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(tmp_path, path, message):
    (tmp_path / "directory.prom").mkdir()
    (tmp_path / "apt.prom").write_text('apt_upgrades{arch="amd64"} 3\n')
    (tmp_path / "train.prom").write_text('vae_exit_status{stage="train",name="train"} 0\n')
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    path = path.format(tmp=tmp_path)
    flags_ = ["--source=sample", f"--output_dir={tmp_path}/out", f"--metrics_file={path}"]
    done = run_command("pipeline.preprocess", *flags_, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"preprocess: --metrics_file={path}: " in done.stderr and message in done.stderr
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def _drop_root() -> None:
    """Becomes a user who may not write anywhere; such a one may not read all of Python either."""
    import prometheus_client.parser  # noqa: F401

    if os.geteuid() == 0:
        os.setuid(65534)


def test_a_directory_that_is_not_writable_is_refused(tmp_path):
    log = tmp_path / "log"
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # Others may enter it.
        os.chmod(directory, 0o555)
        arguments = ["/nonesuch", f"--metrics_file={directory}/x.prom"]
        process = start("pipeline.latest", *arguments, stdout=log, stderr=log, prepare=_drop_root)
        process.join()
    assert process.exitcode == 2, log.read_text()
    assert f"{directory} is not writable; expected a directory" in log.read_text()


def test_it_is_refused_without_the_heavy_imports_and_without_the_flag_costs_none(tmp_path):
    def imported(*arguments: str) -> set[str]:
        command = [sys.executable, "-X", "importtime", "-m", "pipeline.export", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        return {line.split("|")[-1].strip() for line in done.stderr.splitlines()}

    names = imported(f"--metrics_file={tmp_path}/x.txt")
    assert "prometheus_client" in names
    assert not names & {"tensorflow", "apache_beam", "pyarrow", "keras"}
    assert "prometheus_client" not in imported("--nonesuch")


@pytest.fixture(scope="module", autouse=True)
def the_flag():
    if metrics_file.FLAG not in flags.FLAGS:
        metrics_file.define_flag()


def run_here(path: pathlib.Path, status: int) -> None:
    """What command.run does, in this process."""
    metrics_file.begin("export", ["export", f"--metrics_file={path}"])
    try:
        metrics_file.write(status)
    finally:
        metrics_file.disable()


@settings(max_examples=30)
@given(statuses=st.lists(st.sampled_from([0, 1, 2, 3, 75]), min_size=1, max_size=6))
def test_the_last_success_is_that_of_the_last_status_0(tmp_path_factory, statuses):
    path, expected = tmp_path_factory.mktemp("file") / "x.prom", 0.0
    for status in statuses:
        run_here(path, status)
        values = read(path)
        expected = values["vae_last_run_timestamp_seconds"] if status == 0 else expected
        assert (values["vae_exit_status"], values[SUCCESS]) == (status, expected)


@given(data=st.data())
def test_a_damaged_file_is_replaced_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("file") / "x.prom"
    content = b"".join(
        b'# HELP %b Of what?\n# TYPE %b gauge\n%b{name="x",stage="export"} 1.5e+09\n'
        % (3 * (name,))
        for name in (name.encode() for name in metrics_file.METRICS)
    )
    first = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, 40))
    damaged = content[:first] + data.draw(st.binary(max_size=8)) + content[first + length :]
    path.write_bytes(damaged)
    try:
        run_here(path, 1)
    except UsageError:
        assert path.read_bytes() == damaged
        return
    values = read(path)
    assert values["vae_exit_status"] == 1
    assert 0 <= values[SUCCESS] <= time.time()


@pytest.mark.parametrize("content", ["", "x" * 99, f"{SUCCESS} NaN\n", f"{SUCCESS} -1\n"])
def test_an_unknown_last_success_is_said_in_one_line(tmp_path, capfd, content):
    path = tmp_path / "x.prom"
    path.write_text(content)
    run_here(path, 1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"export: warning: --metrics_file={path}: does not tell when a run last")
    assert read(path)[SUCCESS] == 0
    run_here(path, 1)  # Now it is known that none has succeeded.
    assert capfd.readouterr().err == ""


def test_a_name_may_be_any_bytes(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.prom")
    run_here(path, 0)
    assert {sample.labels["name"] for sample in samples(path)} == {"?"}
    assert read(path)[SUCCESS] > 0


def test_a_last_success_in_the_future_is_now(tmp_path):
    path = tmp_path / "x.prom"
    path.write_text(f'{SUCCESS}{{stage="export",name="x"}} 9e12\n')
    run_here(path, 1)
    assert read(path)[SUCCESS] <= time.time()


def _no_room() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def test_a_file_that_turns_out_unwritable_changes_no_status(runs, tmp_path):
    path, log = tmp_path / "x.prom", tmp_path / "log"
    pointer = tmp_path / "latest"
    pointer.symlink_to(runs.directory / "second")
    arguments = [pointer, f"--metrics_file={path}"]
    reader, writer = os.pipe()  # The log would be too large as well.
    process = start(
        "pipeline.latest",
        *arguments,
        stdout=log,
        stderr=pathlib.Path(f"/proc/{os.getpid()}/fd/{writer}"),
        prepare=_no_room,
    )
    process.join()
    os.close(writer)
    with os.fdopen(reader) as text:
        (line,) = text.read().splitlines()
    assert process.exitcode == 0
    assert line.startswith(f"latest: warning: --metrics_file={path}: cannot be written (File too")
    assert line.endswith("The exit status stays 0")
    assert [*tmp_path.glob("x.prom*")] == []


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the page, without backquotes."""
    text = PAGE.read_text().partition(f"\n## {heading}\n")[2]
    lines = re.search(r"^\|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", text, re.M)[1].splitlines()
    return [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines
    ]


def test_what_is_written_is_what_the_page_lists(runs):
    written, fates = {}, {}
    for stage in ("preprocess", "train", "export"):
        text = runs.file(stage).read_text()
        for family in parser.text_string_to_metric_families(text):
            labels = ", ".join(sorted({*family.samples[0].labels} - {"name", "stage"}))
            written[family.name] = [family.type, labels, family.documentation]
        fates[stage] = [*records(runs.file(stage))]
    assert {name: row for name, *row in table("Metrics")} == written
    assert written.keys() == metrics_file.METRICS.keys()
    listed = {stage: fates_.split(", ") for stage, fates_, _ in table("Fates of records")}
    assert listed == fates


def test_alerts_name_only_metrics_that_are_written():
    rules = [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]
    names = {name for rule in rules for name in re.findall(r"\bvae_\w+", rule["expr"])}
    assert len(rules) == 6 and names <= metrics_file.METRICS.keys()
    for rule in rules:
        labels = re.findall(r'(\w+)=~?"', rule["expr"]) + re.findall(r"\.labels\.(\w+)", str(rule))
        assert {*labels} <= {*metrics_file.COMMON_LABELS, "fate", "quantity"}
