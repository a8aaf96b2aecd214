"""What Kubernetes makes of the manifests under configs/deploy/: pods and NetworkPolicies."""

import copy
from collections.abc import Iterator

import yaml

from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "configs" / "deploy"


def documents() -> list[dict]:
    paths = [path for folder in ("kubernetes", "flink") for path in DEPLOY.glob(f"{folder}/*.yaml")]
    return [document for path in sorted(paths) for document in yaml.safe_load_all(path.read_text())]


def pods() -> dict[str, dict]:
    """Name -> each pod, with the labels that controllers give it."""
    return {pod["metadata"]["name"]: pod for document in documents() for pod in _pods_of(document)}


def _pods_of(document: dict) -> Iterator[dict]:
    name, spec = document["metadata"]["name"], document.get("spec", {})
    match document["kind"]:
        case "Job":
            yield _pod(name, spec["template"], {"batch.kubernetes.io/job-name": name})
        case "CronJob":
            yield _pod(name, spec["jobTemplate"]["spec"]["template"], {})
        case "Deployment":
            yield _pod(name, spec["template"], {})
        case "FlinkDeployment":
            for role in ("jobManager", "taskManager"):
                labels = {"app": name, "component": role.lower()}
                pod = _pod(f"{name}-{role.lower()}", spec[role]["podTemplate"], labels)
                pod["spec"]["containers"][0]["image"] = spec["image"]
                yield pod
        case "Namespace" | "NetworkPolicy" | "Service":
            pass
        case kind:
            raise ValueError(f"{kind} {name}: expected a kind whose pods this function knows")


def _pod(name: str, template: dict, labels: dict[str, str]) -> dict:
    labels = template.get("metadata", {}).get("labels", {}) | labels
    metadata = {"name": name, "labels": labels}
    spec = copy.deepcopy(template["spec"])
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
