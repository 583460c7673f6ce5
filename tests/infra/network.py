"""Evaluation of NetworkPolicies, by the rules of the Kubernetes API (networking.k8s.io/v1)."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from tests.infra.pods import Pod

#: The label that Kubernetes sets on each namespace.
NAMESPACE_NAME = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Endpoint:
    """One end of a connection: a pod, or an address outside the cluster (then without namespace)."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    address: str = ""


def endpoint(pod: Pod) -> Endpoint:
    named = {
        port["name"]: port["containerPort"]
        for container in pod.containers
        for port in container.get("ports", [])
        if "name" in port
    }
    return Endpoint(pod.namespace, pod.labels, named)


def connects(
    policies: list[dict[str, Any]], source: Endpoint, target: Endpoint, port: int, protocol: str = "TCP"
) -> bool:
    """Return True if the policies allow a connection: egress at its source and ingress at its target."""
    asked = (target, port, protocol)
    return _allows(policies, "Egress", source, target, asked) and _allows(
        policies, "Ingress", target, source, asked
    )


def _allows(
    policies: list[dict[str, Any]],
    direction: str,
    pod: Endpoint,
    peer: Endpoint,
    asked: tuple[Endpoint, int, str],
) -> bool:
    """Return True if no policy selects the pod in this direction, or one rule of those that do matches."""
    selecting = [
        policy
        for policy in policies
        if pod.namespace == policy["metadata"]["namespace"]
        and direction in _types(policy["spec"])
        and _selects(policy["spec"]["podSelector"], pod.labels)
    ]
    peers, rules = ("to", "egress") if direction == "Egress" else ("from", "ingress")
    return not selecting or any(
        _any_peer(rule.get(peers), peer, policy["metadata"]["namespace"])
        and _any_port(rule.get("ports"), *asked)
        for policy in selecting
        for rule in policy["spec"].get(rules) or []
    )


def _types(spec: dict[str, Any]) -> list[str]:
    types: list[str] = spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]
    return types


def _any_peer(peers: list[dict[str, Any]] | None, peer: Endpoint, own_namespace: str) -> bool:
    return not peers or any(_matches(found, peer, own_namespace) for found in peers)


def _matches(found: dict[str, Any], peer: Endpoint, own_namespace: str) -> bool:
    if "ipBlock" in found:
        return bool(peer.address) and _in_block(found["ipBlock"], peer.address)
    if not peer.namespace or not _selects(found.get("podSelector", {}), peer.labels):
        return False
    if "namespaceSelector" in found:
        return _selects(found["namespaceSelector"], {NAMESPACE_NAME: peer.namespace})
    return peer.namespace == own_namespace


def _in_block(block: dict[str, Any], address: str) -> bool:
    ip = ipaddress.ip_address(address)
    excluded = any(ip in ipaddress.ip_network(part) for part in block.get("except", []))
    return ip in ipaddress.ip_network(block["cidr"]) and not excluded


def _any_port(ports: list[dict[str, Any]] | None, target: Endpoint, port: int, protocol: str) -> bool:
    return not ports or any(
        found.get("protocol", "TCP") == protocol and _includes(found, target, port) for found in ports
    )


def _includes(found: dict[str, Any], target: Endpoint, port: int) -> bool:
    if "port" not in found:
        return True
    first = target.ports.get(found["port"]) if isinstance(found["port"], str) else found["port"]
    return first is not None and first <= port <= found.get("endPort", first)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return labels.items() >= selector.get("matchLabels", {}).items() and all(
        _fulfils(wanted, labels) for wanted in selector.get("matchExpressions", [])
    )


def _fulfils(wanted: dict[str, Any], labels: dict[str, str]) -> bool:
    key, operator, values = wanted["key"], wanted["operator"], wanted.get("values", [])
    if operator in ("Exists", "DoesNotExist"):
        return (key in labels) is (operator == "Exists")
    return (labels.get(key) in values) is (operator == "In")
