"""The network policies allow the connections that training needs, and no others."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.infra.manifests import RENDERED, files, rendered
from tests.infra.network import Endpoint, connects, endpoint
from tests.infra.pods import pods

WRITTEN = [document for _, document in files()]
POLICIES = [document for document in WRITTEN if document["kind"] == "NetworkPolicy"]
PODS = {pod.name: endpoint(pod) for pod in pods(WRITTEN)}
#: What connects to these pods, or is reached by them, without being in the manifests.
OTHERS = {
    "dns": Endpoint("kube-system", {"k8s-app": "kube-dns"}),
    "node dns": Endpoint(address="169.254.20.10"),
    "operator": Endpoint("kuberay-operator"),
    "prometheus": Endpoint("monitoring"),
    "ingress": Endpoint("ingress"),
    "stranger": Endpoint("default", {"app.kubernetes.io/name": "advtrain", "advtrain.io/submits": "true"}),
    "unlabeled": Endpoint("advtrain"),
    "kubernetes": Endpoint(address="10.0.0.1"),
    "internet": Endpoint(address="203.0.113.7"),
}
ALL = PODS | OTHERS
CLUSTERS = [("advtrain-head", "advtrain-gpu"), ("train-head", "train-gpu")]
RAY = [name for cluster in CLUSTERS for name in cluster]

NEEDED = [
    ("train-submitter", "train-head", 8265),
    ("operator", "train-head", 8265),
    ("operator", "advtrain-head", 8265),
    *(
        (a, b, port)
        for cluster in CLUSTERS
        for a in cluster
        for b in cluster
        for port in (6379, 10002, 45678)
    ),
    *((name, "mlflow", 5000) for name in RAY),
    *((name, "dns", 53) for name in (*RAY, "train-submitter")),
    *((name, "node dns", 53) for name in (*RAY, "train-submitter")),
    *(("prometheus", name, 8080) for name in RAY),
    *((head, "kubernetes", port) for head, _ in CLUSTERS for port in (443, 6443)),
    *((name, "database", 5432) for name in ("mlflow", "backup", "restore")),
    ("ingress", "mlflow", 5000),
]
DENIED = [
    *((who, head, port) for who in ("stranger", "unlabeled") for head, _ in CLUSTERS for port in (8265, 10001, 6379)),
    *((who, name, 8080) for who in ("stranger", "unlabeled", "ingress") for name in RAY),
    *(("prometheus", head, port) for head, _ in CLUSTERS for port in (8265, 6379)),
    *(("operator", head, 6379) for head, _ in CLUSTERS),
    *(("train-submitter", "train-head", port) for port in (6379, 10001)),
    ("train-submitter", "train-gpu", 8265),
    ("train-submitter", "mlflow", 5000),
    *((name, "internet", port) for name in ("train-gpu", "train-submitter", "unlabeled") for port in (80, 443)),
    *((name, "database", 5432) for name in RAY),
    *((head, "internet", 80) for head, _ in CLUSTERS),
    ("stranger", "mlflow", 5000),
    ("stranger", "database", 5432),
    ("ingress", "database", 5432),
]  # fmt: skip


def is_allowed(policies: list[dict[str, Any]], source: str, target: str, port: int) -> bool:
    protocols = ("TCP", "UDP") if port == 53 else ("TCP",)
    return all(connects(policies, ALL[source], ALL[target], port, protocol) for protocol in protocols)


@pytest.mark.parametrize(("source", "target", "port"), NEEDED)
def test_needed_connection_is_allowed(source, target, port):
    assert is_allowed(POLICIES, source, target, port)


def parts() -> list[tuple[int, str, int, str, int]]:
    """Return the place of each peer and port: policy, direction, rule, `from`, `to` or `ports`, number."""
    return [
        (index, direction, at, key, number)
        for index, found in enumerate(POLICIES)
        for direction in ("ingress", "egress")
        for at, rule in enumerate(found["spec"].get(direction, []))
        for key, values in rule.items()
        for number in range(len(values))
    ]


@pytest.mark.parametrize(("index", "direction", "at", "key", "number"), parts())
def test_every_peer_and_port_of_a_policy_allows_a_needed_connection(index, direction, at, key, number):
    """Without the part, a needed connection is denied. Otherwise nothing needs it, or NEEDED lacks a connection."""
    changed = copy.deepcopy(POLICIES)
    name = changed[index]["metadata"]["name"]
    values = changed[index]["spec"][direction][at][key]
    del values[number]
    if not values:  # an empty list would match everything
        del changed[index]["spec"][direction][at]
    assert not all(is_allowed(changed, *connection) for connection in NEEDED), name


@pytest.mark.parametrize(("source", "target", "port"), DENIED)
def test_other_connection_is_denied(source, target, port):
    assert not connects(POLICIES, ALL[source], ALL[target], port)


@pytest.mark.parametrize("folder", RENDERED)
def test_rendered_folder_has_the_same_policies_and_labels(folder):
    """The tests above read the files as written."""
    found = rendered(folder)
    for policy in found:
        if policy["kind"] == "NetworkPolicy":
            assert policy["spec"] in [written["spec"] for written in POLICIES]
    if "overlays" in folder:
        assert any(policy["kind"] == "NetworkPolicy" for policy in found)
    labels = [{k: v for k, v in pod.labels.items() if k != "ray.io/cluster"} for pod in pods(WRITTEN)]
    for pod in pods(found):
        assert {k: v for k, v in pod.labels.items() if k != "ray.io/cluster"} in labels


def test_every_connection_of_a_submitter_without_label_is_denied():
    job = copy.deepcopy(next(document for document in WRITTEN if document["kind"] == "RayJob"))
    del job["spec"]["submitterPodTemplate"]
    submitter = endpoint(pods([job])[-1])
    assert not connects(POLICIES, submitter, PODS["train-head"], 8265)
    assert connects(POLICIES, submitter, OTHERS["dns"], 53)


def policy(**spec: Any) -> list[dict[str, Any]]:
    return [{"metadata": {"namespace": "here"}, "spec": {"podSelector": {}, **spec}}]


HERE, THERE = Endpoint("here", {"app": "a"}, {"web": 80}), Endpoint("there", {"app": "b"})
SELECT_B = {"podSelector": {"matchLabels": {"app": "b"}}}
THERE_ONLY = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "there"}}}


@pytest.mark.parametrize(
    ("policies", "allowed"),
    [
        ([], True),
        (policy(), False),
        (policy(policyTypes=["Egress"]), True),
        (policy(podSelector={"matchLabels": {"app": "b"}}), True),
        (policy(ingress=[{}]), True),
        (policy(ingress=[{"from": [SELECT_B]}]), False),
        (policy(ingress=[{"from": [THERE_ONLY]}]), True),
        (policy(ingress=[{"from": [SELECT_B | THERE_ONLY]}]), True),
        (policy(ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "c"}}} | THERE_ONLY]}]), False),
        (policy(ingress=[{"from": [{"namespaceSelector": {}}]}]), True),
        (policy(ingress=[{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]), False),
        (policy(ingress=[{"ports": [{"port": 80}]}]), True),
        (policy(ingress=[{"ports": [{"port": 81}]}]), False),
        (policy(ingress=[{"ports": [{"port": 80, "protocol": "UDP"}]}]), False),
        (policy(ingress=[{"ports": [{"port": 70, "endPort": 90}]}]), True),
        (policy(ingress=[{"ports": [{"port": "web"}]}]), True),
        (policy(ingress=[{"ports": [{"port": "other"}]}]), False),
        (policy(ingress=[{"ports": [{"protocol": "TCP"}]}]), True),
        (policy() + policy(ingress=[{}]), True),
    ],
)
def test_connects_follows_ingress_rules(policies, allowed):
    assert connects(policies, THERE, HERE, 80) is allowed


@pytest.mark.parametrize(
    ("spec", "address", "allowed"),
    [
        ({"egress": []}, "10.1.2.3", False),
        ({"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]}, "10.1.2.3", True),
        ({"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]}]}, "10.1.2.3", False),
        ({"egress": [{"to": [{"namespaceSelector": {}}]}]}, "10.1.2.3", False),
        ({"ingress": [{}]}, "10.1.2.3", True),
    ],
)  # fmt: skip
def test_connects_follows_egress_rules(spec, address, allowed):
    assert connects(policy(**spec), HERE, Endpoint(address=address), 443) is allowed


@pytest.mark.parametrize(
    ("expression", "selected"),
    [
        ({"key": "app", "operator": "In", "values": ["a"]}, True),
        ({"key": "app", "operator": "NotIn", "values": ["a"]}, False),
        ({"key": "app", "operator": "Exists"}, True),
        ({"key": "app", "operator": "DoesNotExist"}, False),
        ({"key": "other", "operator": "NotIn", "values": ["a"]}, True),
    ],
)
def test_connects_follows_match_expressions(expression, selected):
    denied = not connects(policy(podSelector={"matchExpressions": [expression]}), THERE, HERE, 80)
    assert denied is selected
