"""Print a table of the packages in infra/requirements.lock with their licenses, from the installed metadata."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

ABOUT = """# Licenses of the packages in the image

Written by `make licenses` from the metadata of the packages in `requirements.lock`. advtrain itself is Apache-2.0.
psycopg is under the LGPL and is imported unchanged. The `nvidia-*` packages hold NVIDIA's libraries under NVIDIA's own
terms, which their packages include.
"""
LOCK = Path(__file__).parent / "requirements.lock"


def license_of(name: str) -> str:
    """Return the license that a package declares: the SPDX expression, else its classifier, else its text."""
    about = metadata.metadata(name)
    if expression := about.get("License-Expression"):
        return str(expression)
    classified = [
        c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    words = ", ".join(c for c in classified if c != "OSI Approved") or str(
        about.get("License") or "not declared"
    )
    return words.splitlines()[0][:60]


def main() -> None:
    """Print the table."""
    print(ABOUT)
    print("| package | version | license |\n|---|---|---|")
    for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;]+)", LOCK.read_text(), re.MULTILINE):
        print(f"| {name} | {version} | {license_of(name)} |")


if __name__ == "__main__":
    main()
