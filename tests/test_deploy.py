"""The files under configs/deploy/: what can be checked of them without a cluster."""

import ast
import datetime
import os
import re
import shutil
import subprocess
import sys
import types

import kubernetes_validate
import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.trainer.test_join import MANIFEST, trainer_of

DEPLOY = REPOSITORY / "configs" / "deploy"
ALERTS_TEST = REPOSITORY / "tests" / "alerts_test.yaml"
# The oldest and the newest Kubernetes that manifests are checked for.
VERSIONS = ("1.31", "1.37")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*/*.yaml")), ids=lambda path: path.name)
def test_manifests_are_of_the_schema(path, version):
    for document in yaml.safe_load_all(path.read_text()):
        # Of the Flink operator's resources there is no schema to be had; kind and name it has.
        if document["apiVersion"].startswith("flink.apache.org/"):
            assert document["kind"] == "FlinkDeployment"
            assert document["metadata"]["name"]
            continue
        kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_manifest_is_noticed():
    service, _, job = yaml.safe_load_all(MANIFEST.read_text())
    del service["spec"]["ports"][0]["port"]
    job["spec"]["completionmode"] = job["spec"].pop("completionMode")
    for document in (service, job):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


def test_the_parts_of_the_training_manifest_fit_each_other():
    service, _, job = yaml.safe_load_all(MANIFEST.read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod, container = spec["template"]["spec"], trainer_of(MANIFEST)
    flags = dict(a.partition("=")[::2] for a in container["args"])
    assert flags["--hosts"] == f"{name}-{{index}}.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == spec["template"]["metadata"]["labels"]
    assert spec["completions"] == spec["parallelism"] == int(flags["--num_workers"])
    port = int(flags["--port"])
    assert service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"] == port
    rules = {
        value: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for value in rule.get("onExitCodes", {"values": ()})["values"]
    }
    assert rules == {2: "FailJob", 75: "Ignore", 143: "Ignore"}


def test_the_flags_after_the_dashes_are_the_trainers():
    arguments = trainer_of(MANIFEST)["args"]
    program = (
        "import sys, trainer.main; from pipeline.cli import flag_parsing;"
        "flag_parsing.parse_flags(sys.argv, doc='', module='trainer.main')"
    )
    flags = arguments[arguments.index("--") + 1 :]
    for changed, status in (([], 0), (["--config.batchsize=1"], 1)):
        command = [sys.executable, "-c", program, *flags, *changed]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
        assert done.returncode == status, done.stderr


def test_the_image_is_made_of_what_is_there():
    text = (DEPLOY / "Dockerfile").read_text()
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M)
        for source in line.split()[:-1]
    ]
    assert {"pipeline", "trainer", "configs"} <= {*sources}
    for source in sources:
        assert (REPOSITORY / source).exists(), source
    pins = (REPOSITORY / "constraints.txt").read_text()
    beam = re.search(r"^apache-beam==(.*)$", pins, re.M)[1]
    assert f"_sdk:{beam}@${{BEAM_DIGEST}} AS beam" in text
    # Both bases are named by a digest, of which a build has to say which one.
    digests = re.findall(r"^FROM \S+@\$\{(\w+)\}", text, re.M)
    assert len(digests) == len(re.findall("^FROM", text, re.M)) == 2
    assert {*digests} <= {*re.findall(r"^ARG (\w+)$", text, re.M)}
    # What starts the workers and the workers themselves are of one Python.
    assert (
        re.search(r"apache/beam_python(\S+)_sdk", text)[1]
        in re.search(r"FROM python:(\S+)", text)[1]
    )


@pytest.mark.parametrize(
    "job_name, date",
    [
        ("vae-nightly-29933417", "2026-11-30"),
        *((name, "") for name in ("", "by-hand", "vae-nightly-7", "vae-nightly-")),
    ],
)
def test_a_night_on_kubernetes_has_the_date_of_its_job(tmp_path, job_name, date):
    _, job = yaml.safe_load_all((DEPLOY / "kubernetes" / "nightly-export.yaml").read_text())
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (tmp_path / "vae-nightly").write_text('#!/bin/sh\necho "$DATE"\n')
    (tmp_path / "vae-nightly").chmod(0o755)
    environment = {"JOB_NAME": job_name, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = pod["containers"][0]["command"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{date}\n"


def test_a_night_in_airflow_has_the_date_of_its_run():
    # Airflow is not installed here; the function needs nothing of it.
    tree = ast.parse((DEPLOY / "airflow" / "nightly_dag.py").read_text())
    [function] = [node for node in tree.body if getattr(node, "name", "") == "_date"]
    names = {}
    exec(compile(ast.Module([function], []), "nightly_dag.py", "exec"), names)
    first, second = datetime.datetime(2026, 11, 25, 2, 30), datetime.datetime(2026, 11, 26, 9)
    for logical_date, expected in ((first, "2026-11-25"), (None, "2026-11-26")):
        run = types.SimpleNamespace(logical_date=logical_date, run_after=second)
        assert names["_date"]({"dag_run": run}) == expected


@pytest.mark.parametrize(
    "path",
    sorted(p for p in DEPLOY.rglob("*") if p.suffix in (".sh", ".sbatch")),
    ids=lambda path: path.name,
)
def test_scripts_are_clean(path):
    shellcheck = shutil.which("shellcheck", path=f"{sys.prefix}/bin")
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_alerts_fire_when_they_should():
    promtool = shutil.which("promtool", path=f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}")
    if not promtool:
        pytest.skip("no promtool here; make promtool builds it where there is Go")
    for arguments in (["check", "rules", DEPLOY / "alerts.yaml"], ["test", "rules", ALERTS_TEST]):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("go"), reason="no Go here to run actionlint with")
def test_workflows_are_clean():
    actionlint = "github.com/rhysd/actionlint/cmd/actionlint@v1.7.7"
    workflows = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
    done = subprocess.run(
        ["go", "run", actionlint, "-shellcheck=", *map(str, workflows)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert workflows and done.returncode == 0, done.stdout + done.stderr
