"""What a namespace admits: pods by the restricted standard, connections by NetworkPolicies."""

import copy
import json
import re
import shutil
import subprocess
import sys

import kubernetes_validate
import pytest

from tests.deploy import manifests

PODS = manifests.pods()
# Kubernetes' own evaluator of the standard; `make pod-security` builds it.
EVALUATOR = shutil.which("pod-security", path=f"{sys.prefix}/bin")
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"}
VOLUMES |= {"projected", "secret"}


def faults(pod: dict) -> set[str]:
    """Names of the rules that a pod breaks: those of the restricted standard, and our own."""
    spec = pod["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    broken = {key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)}
    if {key for volume in spec["volumes"] for key in volume} - {"name"} - VOLUMES:
        broken.add("volumes")
    if any("sizeLimit" not in v["emptyDir"] for v in spec["volumes"] if "emptyDir" in v):
        broken.add("sizeLimit")
    if spec.get("automountServiceAccountToken") is not False:
        broken.add("token")
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        context = spec.get("securityContext", {}) | container.get("securityContext", {})
        capabilities = context.get("capabilities", {})
        mounts = {m["mountPath"]: volumes.get(m["name"]) for m in container.get("volumeMounts", ())}
        rules = {
            "privileged": not context.get("privileged"),
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
            "drop": "ALL" in capabilities.get("drop", ()),
            "add": {*capabilities.get("add", ())} <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": context.get("runAsNonRoot") is True,
            "runAsUser": context.get("runAsUser", 0) > 0,
            "seccomp": context.get("seccompProfile", {}).get("type") == "RuntimeDefault",
            "hostPort": not any("hostPort" in port for port in container.get("ports", ())),
            "readOnlyRootFilesystem": context.get("readOnlyRootFilesystem") is True,
            "/tmp": "emptyDir" in (mounts.get("/tmp") or ()),
            "digest": re.search(r"@sha256:[0-9a-f]{64}$", container["image"]),
        }
        broken |= {rule for rule, holds in rules.items() if not holds}
    return broken


# Rule -> what breaks it: a place in a pod, by the keys that lead there, and the value to put there,
# or None to remove what is there.
OF_THE_STANDARD = {
    "hostNetwork": (["hostNetwork"], True),
    "hostPID": (["hostPID"], True),
    "hostIPC": (["hostIPC"], True),
    "volumes": (["volumes", 0], {"name": "tmp", "hostPath": {"path": "/tmp"}}),
    "privileged": (["containers", -1, "securityContext", "privileged"], True),
    "allowPrivilegeEscalation": (
        ["containers", -1, "securityContext", "allowPrivilegeEscalation"],
        None,
    ),
    "drop": (["containers", -1, "securityContext", "capabilities", "drop"], ["NET_RAW"]),
    "add": (["containers", -1, "securityContext", "capabilities", "add"], ["IPC_LOCK"]),
    "runAsNonRoot": (["securityContext", "runAsNonRoot"], None),
    "runAsUser": (["containers", -1, "securityContext", "runAsUser"], 0),
    "seccomp": (["securityContext", "seccompProfile"], None),
    "hostPort": (["containers", -1, "ports"], [{"containerPort": 2222, "hostPort": 2222}]),
}
OF_OURS = {
    "token": (["automountServiceAccountToken"], True),
    "sizeLimit": (["volumes", 0], {"name": "tmp", "emptyDir": {}}),
    "readOnlyRootFilesystem": (
        ["containers", -1, "securityContext", "readOnlyRootFilesystem"],
        None,
    ),
    "/tmp": (["containers", -1, "volumeMounts"], []),
    "digest": (["containers", -1, "image"], "vae-pipeline:0.1.0"),
}


def broken(pod: dict, keys: list, value: object) -> dict:
    pod = copy.deepcopy(pod)
    place = pod["spec"]
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return pod


def test_every_pod_keeps_the_rules():
    assert len(PODS) == 6
    for version in ("1.31", "1.37"):
        for pod in PODS.values():  # Those of Flink have no schema but this.
            kubernetes_validate.validate(pod, version, strict=True)
    assert {name: faults(pod) for name, pod in PODS.items()} == dict.fromkeys(PODS, set())


@pytest.mark.parametrize("rule", [*OF_THE_STANDARD, *OF_OURS])
def test_a_pod_that_breaks_a_rule_is_noticed(rule):
    for pod in PODS.values():
        assert faults(broken(pod, *(OF_THE_STANDARD | OF_OURS)[rule])) >= {rule}


@pytest.mark.skipif(not EVALUATOR, reason="no pod-security; make pod-security builds it with Go")
def test_a_restricted_namespace_admits_every_pod_and_refuses_each_broken_one():
    admitted = list(PODS.values())
    refused = [broken(pod, *change) for pod in admitted for change in OF_THE_STANDARD.values()]
    done = subprocess.run(
        [EVALUATOR],
        input=json.dumps(admitted + refused),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(done.stdout)
    assert answers[: len(admitted)] == [""] * len(admitted)
    assert len(answers) == len(admitted) + len(refused) and all(answers[len(admitted) :])


def test_the_namespace_enforces_the_standard_and_denies_what_no_policy_allows():
    (namespace,) = (d for d in manifests.documents() if d["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    name = namespace["metadata"]["name"]
    (policy,) = (d for d in manifests.documents() if d["metadata"].get("namespace") == name)
    assert policy["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}


# Every pod of ours, each with a pod of the same labels in another namespace; a worker of another
# Job under the same app; a pod without labels; and Flink's operator. A pod is (namespace, labels).
OPERATOR = ("flink-operator", {"app.kubernetes.io/name": "flink-kubernetes-operator"})
SOURCES = {
    **{name: ("vae", pod["metadata"]["labels"]) for name, pod in PODS.items()},
    **{f"{name} elsewhere": ("b", pod["metadata"]["labels"]) for name, pod in PODS.items()},
    "another job": ("vae", {"app": "vae-train", "batch.kubernetes.io/job-name": "b"}),
    "stranger": ("vae", {}),
    "operator": OPERATOR,
    "operator's twin": ("vae", OPERATOR[1]),
}
FLINK = {"vae-flink-jobmanager", "vae-flink-taskmanager"}
# Target and port -> who may connect. Port 50,123 stands for those that the kernel picks.
CONNECTIONS = {
    ("vae-train", 2222): {"vae-train"},
    ("vae-train", 50_123): {"vae-train"},  # NCCL
    ("vae-job-server", 8099): {"vae-preprocess"},
    ("vae-job-server", 8098): {"vae-preprocess"},
    ("vae-job-server", 8097): set(),
    ("vae-flink-taskmanager", 50_000): set(),
    ("vae-flink-taskmanager", 6122): FLINK,
    ("vae-flink-taskmanager", 50_123): set(),
    ("vae-flink-jobmanager", 8081): {*FLINK, "vae-job-server", "vae-preprocess", "operator"},
    ("vae-flink-jobmanager", 6123): FLINK,
    ("vae-nightly", 50_123): set(),
    ("vae-preprocess", 50_123): set(),
}


def is_selected(labels: dict[str, str], selector: dict) -> bool:
    assert selector.keys() <= {"matchLabels"}, selector
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(namespace: str, labels: dict[str, str], peer: dict) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}, peer
    if "namespaceSelector" in peer:
        names = {"kubernetes.io/metadata.name": namespace}
        is_near = is_selected(names, peer["namespaceSelector"])
    else:
        is_near = namespace == "vae"
    return is_near and is_selected(labels, peer.get("podSelector", {}))


def may_connect(policies: list[dict], source: tuple[str, dict], target: str, port: int) -> bool:
    """Whether NetworkPolicies, of which one has to let it in, let a pod connect to one of ours."""
    labels = PODS[target]["metadata"]["labels"]
    specs = [p["spec"] for p in policies if is_selected(labels, p["spec"]["podSelector"])]
    return not specs or any(
        any(is_peer(*source, peer) for peer in rule["from"])
        and ("ports" not in rule or any(is_port(port, allowed) for allowed in rule["ports"]))
        for spec in specs
        for rule in spec.get("ingress", ())
    )


def is_port(port: int, allowed: dict) -> bool:
    return allowed["port"] <= port <= allowed.get("endPort", allowed["port"])


@pytest.mark.parametrize("namespace", ["vae", "without the general denial"])
def test_ports_that_take_code_are_reached_by_those_who_need_them(namespace):
    policies = [d for d in manifests.documents() if d["kind"] == "NetworkPolicy"]
    connections = dict(CONNECTIONS)
    if namespace != "vae":
        policies = [policy for policy in policies if policy["spec"]["podSelector"]]
        del connections["vae-preprocess", 50_123]  # This pod opens no port.
    for (target, port), expected in connections.items():
        names = {name for name, pod in SOURCES.items() if may_connect(policies, pod, target, port)}
        assert names == expected, (target, port)


def test_each_port_of_a_pod_has_its_line_above():
    ports = {
        (name, port["containerPort"])
        for name, pod in PODS.items()
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
    }
    assert len(ports) == 4 and ports <= CONNECTIONS.keys()


def test_kueue_gets_every_job_suspended_and_with_its_requests():
    jobs = {}
    for document in manifests.documents():
        if document["kind"] == "Job":
            jobs[document["metadata"]["name"]] = document
        elif document["kind"] == "CronJob":
            jobs[document["metadata"]["name"]] = document["spec"]["jobTemplate"]
    assert len(jobs) == 3
    for name, job in jobs.items():
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        assert job["spec"]["suspend"] is True
        for container in PODS[name]["spec"]["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
