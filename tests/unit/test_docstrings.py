"""Docstrings follow the rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.kit import ROOT

#: First words of function docstrings.
_VERBS = (
    "Accept Add Advance Append Apply Attack Average Build Call Change Check Classify Clip Close Collect "
    "Compare Compute Connect Continue Convert Copy Count Create Crop Decode Delete Do Download Draw End "
    "Evaluate Export Fail Find Format Free Freeze Generate Halve Handle Hold Ignore Import Index Keep Leave List "
    "Load Lock Log Make Map Mark Minimize Move Open Parse Pass Perturb Predict Print Promote Put Raise "
    "Randomly Read Reconcile Record Redirect Redistribute Register Reject Remove Reopen Repair Replace "
    "Report Request Reset Reshape Resize Resolve Resume Retry Return Roll Run Save Scale Search Seed Send "
    "Serialize Set Shard Split Start Stop Store Submit Suppress Sync Test Train Upload Validate Wait "
    "Write Yield Zoom "
)
VERBS = set(_VERBS.split())
#: Words with which a first sentence gets hard to read.
NOT_FIRST = {"Of", "What", "Where", "Whether", "How", "Those", "As", "So"}
PROPERTIES = {"property", "cached_property", "setter"}


def docstrings() -> Iterator[tuple[str, ast.AST, str]]:
    for package in ("advtrain", "tuning", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    name = getattr(node, "name", "")
                    if text := ast.get_docstring(node):
                        sentence = " ".join(text.split("\n\n")[0].split())
                        yield f"{path.relative_to(ROOT)}:{name}", node, sentence


def is_property(node: ast.FunctionDef) -> bool:
    names = {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}
    return bool(names & PROPERTIES)


def test_first_sentences_are_short_and_begin_plainly():
    wrong = []
    for where, node, sentence in docstrings():
        public = not getattr(node, "name", "").startswith("_")
        too_long = public and len(sentence) > 90
        if too_long or sentence.split()[0] in NOT_FIRST or sentence[-1] not in ".?:":
            wrong.append(f"{where}: {sentence}")
    assert wrong == []


def test_functions_are_described_by_an_imperative():
    wrong = [
        f"{where}: {sentence}"
        for where, node, sentence in docstrings()
        if isinstance(node, ast.FunctionDef)
        and not is_property(node)
        and sentence.split()[0].rstrip(",") not in VERBS
    ]
    assert wrong == []
