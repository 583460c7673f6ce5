"""Signatures of decisions by Ed25519 (RFC 8032): only the gate can move an alias.

The gate's process holds the private key, everyone who reads the log the public one. Make a pair with

    openssl genpkey -algorithm ed25519 -out gate.pem
    openssl pkey -in gate.pem -pubout -out gate.pub
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from advtrain.errors import UserError
from advtrain.registry.decision import MOVES, Decision
from advtrain.user_paths import user_path

#: Variables that name the PEM file of the gate's private key, and of its public key.
PRIVATE_KEY, PUBLIC_KEY = "ADVTRAIN_SIGNING_KEY", "ADVTRAIN_PUBLIC_KEY"


def sign(text: str) -> str:
    """Return the signature of a record's text in base64; "" if this process has no private key.

    Raises:
        UserError: $ADVTRAIN_SIGNING_KEY names no Ed25519 key.
    """
    key = private_key()
    return "" if key is None else base64.b64encode(key.sign(text.encode())).decode()


def private_key() -> Ed25519PrivateKey | None:
    """Return the key that $ADVTRAIN_SIGNING_KEY names; None if it is not set."""
    if not (name := os.environ.get(PRIVATE_KEY)):
        return None
    try:
        key = load_pem_private_key(user_path(name, f"${PRIVATE_KEY}").read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"${PRIVATE_KEY} '{name}' is not a private key without passphrase: {error}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"${PRIVATE_KEY} '{name}' is not an Ed25519 key")
    return key


def public_key(given: str | None = None) -> Ed25519PublicKey | None:
    """Return a public key; None if none is given and $ADVTRAIN_PUBLIC_KEY is not set.

    Args:
        given: PEM text, or the path of a PEM file; None: the file that $ADVTRAIN_PUBLIC_KEY names.

    Raises:
        UserError: it is not an Ed25519 public key.
    """
    text = given or os.environ.get(PUBLIC_KEY)
    if not text:
        return None
    try:
        content = text.encode() if "BEGIN" in text else user_path(text, "the public key").read_bytes()
        key = load_pem_public_key(content)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"'{text.strip()[:80]}' is not a public key in PEM: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"'{text.strip()[:80]}' is not an Ed25519 public key")
    return key


def can_sign(key: Ed25519PublicKey | None) -> bool:
    """Return whether this process can sign for a public key, or needs no signature."""
    mine = private_key()
    return key is None or (mine is not None and mine.public_key() == key)


def signatures_of(decisions: Iterable[Decision]) -> str:
    """Return a sentence on who can have written the decisions that move an alias."""
    moves = [decision for decision in decisions if decision.kind in MOVES]
    if public_key() is not None:
        return f"the {len(moves)} decisions that move an alias are signed with the key of ${PUBLIC_KEY}"
    signed = sum(bool(decision.signature) for decision in moves)
    if signed < len(moves):
        return (
            f"not signed: {len(moves) - signed} decisions that move an alias; whoever may write to the store can have "
            "written them"
        )
    return f"signatures are not checked: set ${PUBLIC_KEY} to the gate's public key"


def unsigned(decisions: Iterable[Decision], key: Ed25519PublicKey) -> list[str]:
    """Return a message for each decision that moves an alias and is not signed with the key."""
    found = []
    for decision in decisions:
        if decision.kind not in MOVES:
            continue
        try:
            key.verify(base64.b64decode(decision.signature, validate=True), decision.text.encode())
        except (InvalidSignature, binascii.Error, ValueError):
            what = "has a signature of another key" if decision.signature else "is not signed"
            found.append(
                f"decision {decision.sequence}, which makes version {decision.version} champion, {what}"
            )
    return found
