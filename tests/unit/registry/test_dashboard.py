"""The dashboard links a version to the models that it came from, and to those that came from it."""

from __future__ import annotations

import re

from advtrain.registry import build_dashboard
from advtrain.runs.lineage import Ancestor, ancestors_tag


def test_dashboard_shows_parent_and_child(client, make):
    make()
    parent = Ancestor("start", "models:/m/1", "a" * 64)
    client.set_model_version_tag(
        "m", make(), "advtrain.ancestors", ancestors_tag([parent])["advtrain.ancestors"]
    )
    page = build_dashboard(client, ["m"], "store", "http://mlflow")
    assert "start: <a href='http://mlflow/#/models/m/versions/1'>models:/m/1</a>" in page
    assert "used by <a href='http://mlflow/#/models/m/versions/2'>models:/m/2</a>" in page


def test_dashboard_without_ancestors_has_no_column_for_them(client, make):
    make()
    client.set_model_version_tag("m", "1", "advtrain.ancestors", "[<script>")
    page = build_dashboard(client, ["m"], "store", "http://mlflow")
    assert not re.search("ancestors|<script>", page)


def test_dashboard_links_no_ancestor_of_another_server(client, make):
    parent = Ancestor("start", "models:/m/1 at http://other/2", "a" * 64)
    client.set_model_version_tag(
        "m", make(), "advtrain.ancestors", ancestors_tag([parent])["advtrain.ancestors"]
    )
    assert "start: models:/m/1 at http://other/2<br>" in build_dashboard(client, ["m"], "store", "http://m")
