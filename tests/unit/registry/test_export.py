"""What the MLmodel file of an exported model says of its data."""

from __future__ import annotations

from dataclasses import replace

from advtrain.registry.export import MAX_DESCRIPTION, description_of, downloaded, log_archive
from advtrain.registry.facts import facts_of
from advtrain.registry.predictor import load_served
from advtrain.tracking.store import find_experiment, open_client
from tests.kit import digits_data
from tests.registry_kit import TenClasses, flags, make_evaluation, make_version

NAMES = ["zero", "Übung", "two words", "😀", *"456789"]


def test_class_names_are_stored_with_the_model_and_used_by_predictions(store, tmp_path):
    client = open_client(store)
    run = client.create_run(find_experiment(client, store, "named"))
    info = log_archive(run.info.run_id, TenClasses(64).eval(), replace(digits_data(), class_names=NAMES))
    with downloaded(client, info.model_uri, run.info.run_id) as found:
        assert facts_of(found / "model" / "MLmodel") == {"class_names": NAMES}
        # The report knows eight of the ten classes, those with test samples, and no names.
        evaluation = make_evaluation(flags(8, 8), flags(8, 8))
        number = make_version(store, found / "model", tmp_path, evaluation)
    assert load_served(f"models:/digits/{number}", store).class_names == NAMES


def test_description_is_the_model_card_cut_to_the_length_that_mlflow_stores(tmp_path):
    assert description_of(tmp_path) is None
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "model_card.md").write_text("# m\n" + "x" * MAX_DESCRIPTION)
    text = description_of(tmp_path)
    assert text.startswith("# m\n")
    assert len(text) == MAX_DESCRIPTION
