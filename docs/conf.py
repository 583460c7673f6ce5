"""Sphinx configuration; the reference pages are written from the code before each build."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from generate_reference import write_reference

project = "advtrain"
author = "The advtrain authors"
copyright = f"2026, {author}"  # noqa: A001 (the name that Sphinx reads)
release = metadata.version("advtrain")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True

html_theme = "furo"
html_title = "advtrain"
html_show_sphinx = False
html_extra_path = ["reference/report.schema.json"]


def setup(app: object) -> None:
    """Write the generated pages."""
    write_reference(Path(__file__).parent / "reference" / "generated")
