"""The examples of the documentation run as they are written, one page after another."""

from __future__ import annotations

import re

import pytest

from tests.kit import ROOT

PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if "```python\n" in page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_examples_of_a_page_run_in_their_order(page):
    namespace: dict[str, object] = {"__name__": "example"}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    for block in blocks:
        exec(compile(block, f"{page.name}", "exec"), namespace)
