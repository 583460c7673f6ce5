"""Edits of texts: threat models, candidates, counted queries and searches."""

from __future__ import annotations

from advtrain.edits.candidates import Candidates, Chosen
from advtrain.edits.greedy import greedy_texts, random_texts
from advtrain.edits.problem import Change
from advtrain.edits.score import Encoder, Score, TextScore, TokenScore, key_ids, margins
from advtrain.edits.search import METHODS, Status, Verdict, search, search_texts
from advtrain.edits.shares import EditShares, edit_shares
from advtrain.edits.stop_words import STOP_WORDS
from advtrain.edits.tables import COUNTERFITTED, Table, load_table
from advtrain.edits.threats import OPERATIONS, CharEdits, Edit, EditThreat, WordEdits, apply_edits

__all__ = [
    "COUNTERFITTED",
    "METHODS",
    "OPERATIONS",
    "STOP_WORDS",
    "Candidates",
    "Change",
    "CharEdits",
    "Chosen",
    "Edit",
    "EditShares",
    "EditThreat",
    "Encoder",
    "Score",
    "Status",
    "Table",
    "TextScore",
    "TokenScore",
    "Verdict",
    "WordEdits",
    "apply_edits",
    "edit_shares",
    "greedy_texts",
    "key_ids",
    "load_table",
    "margins",
    "random_texts",
    "search",
    "search_texts",
]
