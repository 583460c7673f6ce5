"""Tables in CSV: columns, scaling by the training samples, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from advtrain.data import DataConfig, load_data, read_inputs
from advtrain.data.tables import RawTable, encode, fit
from advtrain.data.units import FeatureUnits, feature_units, unit_table
from advtrain.data.unseen import Accepts, load_unseen
from advtrain.documents import parse_yaml
from advtrain.errors import UserError
from advtrain.recipe import load_recipe
from pipelines.workspace import Workspace, start_for


def write(path, rows, header="age;color;ok;kind"):
    path.write_text("\ufeff" + "\n".join([header, *rows]) + "\n")
    return DataConfig(source="csv", path=path.name, label="kind")


def rows(n=60):
    return [
        f"{20 + i % 9};{'red' if i % 2 else 'blue'};{str(i % 3 == 0).lower()};{'ab'[i % 2]}" for i in range(n)
    ]


def test_csv_is_scaled_by_training_samples_and_one_hot(tmp_path):
    config = write(tmp_path / "t.csv", rows())
    data = load_data(config, tmp_path)
    assert data.class_names == ["a", "b"]
    assert data.table.features == ["age", "color=blue", "color=red", "ok=false", "ok=true"]
    assert (data.table.columns[0].low, data.table.columns[0].high) == (20, 28)
    assert np.array_equal(data.train.images[:, 2], data.train.labels)
    assert data.train.images[:, 0].min() == 0
    assert data.train.images[:, 0].max() == 1


def test_test_rows_outside_the_training_range_are_clipped_and_counted(tmp_path):
    write(tmp_path / "train.csv", rows())
    write(tmp_path / "test.csv", ["99;green;true;a", "24;red;true;b"])
    data = load_data(DataConfig(source="csv", path=".", label="kind"), tmp_path)
    assert data.test.images[0].tolist() == [1, 0, 0, 0, 1]
    assert [note.rpartition(": ")[2] for note in data.found.notes] == ["age (1).", "color (1)."]


def test_missing_value_is_refused_or_imputed(tmp_path):
    config = write(tmp_path / "t.csv", [";red;true;a", *rows()])
    with pytest.raises(UserError, match="column age has no value in row 0"):
        load_data(config, tmp_path)
    data = load_data(config.model_copy(update={"missing": "impute"}), tmp_path)
    assert np.isfinite(data.train.images).all()


@pytest.mark.parametrize(
    ("cell", "message"),
    [("3,5", "numbers with a comma"), ("2020-01-01", "dates or times"), ("31.12.2020", "dates or times")],
)
def test_column_that_is_no_number_is_refused(tmp_path, cell, message):
    config = write(tmp_path / "t.csv", [f"{cell};red;true;{'ab'[i % 2]}" for i in range(20)])
    with pytest.raises(UserError, match=f"column age holds.*{message}"):
        load_data(config, tmp_path)


def test_radius_is_given_in_the_units_of_each_column(tmp_path):
    data = load_data(write(tmp_path / "t.csv", rows()), tmp_path)
    features = feature_units(data.table)
    assert features == [
        FeatureUnits("age", 20, 28),
        FeatureUnits("color", 0, 1, 2),
        FeatureUnits("ok", 0, 1, 2),
    ]
    head, shown = unit_table(features, {"linf:0.05": 0.05}, 2)
    assert head[-1] == "change at linf:0.05"
    assert shown == [
        ["age", "20 to 28", "± 0.4"],
        ["color (one-hot, 2 categories)", "0 to 1", "± 0.05"],
        ["and 1 more", "", ""],
    ]
    moved = {
        "age": np.array([20.0, 20.4]),
        "color": np.array(["red"] * 2, object),
        "ok": np.array(["true"] * 2, object),
    }
    x, *_ = encode(data.table, RawTable("new", "kind", moved, np.zeros(2)))
    assert np.abs(x[1] - x[0]).max() == pytest.approx(0.05)


def test_change_is_at_most_the_range_of_a_column():
    _, shown = unit_table([FeatureUnits("income", 1_000, 61_000)], {"l2:0.02": 0.02, "l2:3": 3.0}, 5)
    assert shown == [["income", "1,000 to 61,000", "± 1,200", "± 60,000"]]


@pytest.mark.parametrize(
    ("path", "name"), [("t.csv", "t.csv"), (".", "people/"), ("../people/t.csv", "t.csv")]
)
def test_data_has_the_own_name_of_its_file_or_folder(tmp_path, path, name):
    folder = tmp_path / "people"
    folder.mkdir()
    write(folder / "t.csv", rows())
    write(folder / "train.csv", rows())
    data = load_data(DataConfig(source="csv", path=path, label="kind"), folder)
    assert (data.name, data.file, data.title) == ("csv", name, name)


def test_standard_scaling_counts_in_standard_deviations(tmp_path):
    """The mean becomes 0.5 and a standard deviation 0.1; numbers beyond 5 of them are clipped."""
    ages = np.array([20.0, 30, 40, 50, 60] * 40)
    ages[0] = 4000  # an outlier
    table = "age,hours,color,kind\n" + "".join(
        f"{age},{n % 7},{'red' if n % 3 else 'blue'},{'a' if n % 2 else 'b'}\n" for n, age in enumerate(ages)
    )
    (tmp_path / "t.csv").write_text(table)
    data = load_data(DataConfig(source="csv", path="t.csv", label="kind", scale="standard"), tmp_path)
    x = np.concatenate([split.images for split in (data.train, data.validation, data.test)])
    assert x.min() == 0
    assert x.max() == 1
    assert data.train.images[:, 1].mean() == pytest.approx(0.5, abs=1e-6)
    assert data.train.images[:, 1].std() == pytest.approx(0.1, abs=1e-6)
    assert set(np.unique(x[:, 2:])) == {0, 1}  # categories
    assert any("age (1)" in note for note in data.found.notes)
    age, hours, _ = feature_units(data.table)
    deviation = np.std([n % 7 for n in range(200)])
    assert hours.high - hours.low == pytest.approx(10 * deviation, rel=0.05)
    again = encode(
        data.table,
        RawTable(
            "new",
            "kind",
            {"age": np.array([4000.0]), "hours": np.array([3.0]), "color": np.array(["red"], object)},
            np.zeros(1),
        ),
    )
    assert age.high < 4000
    assert again[0][0, 0] == 1


def test_a_scale_that_does_not_exist_is_refused(tmp_path):
    text = "name: n\ndata: {source: npz, path: t.npz, scale: robust}\nmodel: {name: mlp}\nadversary: {eps: 0.1}\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"'data.scale'.*minmax.*standard"):
        load_recipe(tmp_path / "r.yaml")


def unseen(folder, text):
    """Load the rows as data of a model that was trained on `rows()`."""
    data = load_data(write(folder / "t.csv", rows()), folder)
    accepts = Accepts(data.shape, data.num_classes, data.class_names, data.table)
    (folder / "new.csv").write_text(text)
    return load_unseen(DataConfig(source="csv", path="new.csv"), folder, accepts), data


def test_new_rows_take_the_types_of_the_training_columns(tmp_path):
    """A category that looks like a number is a category, as in training and in prediction."""
    new, data = unseen(tmp_path, "age,color,ok,kind\n24,7,true,a\n24,8,false,b\n")
    assert new.table == data.table
    assert new.title == "new.csv"
    assert new.test.images.tolist() == [[0.5, 0, 0, 0, 1], [0.5, 0, 0, 1, 0]]
    assert [note.rpartition(": ")[2] for note in new.found.notes] == ["color (2)."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age,color,ok,kind\nold,red,true,a\n", "column age is 'old' in row 0, but a number in the training"),
        ("age,ok,kind\n25,true,a\n", "has no column color"),
        ("age,color,ok,kind\ninf,red,true,a\n", "column age is inf in row 0"),
        ("age,color,ok,kind\n,red,true,a\n", "column age has no value in row 0"),
    ],
)
def test_new_rows_that_do_not_fit_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        unseen(tmp_path, text)


@pytest.mark.parametrize(
    ("columns", "starts"), [({}, True), ({"label": "y"}, False), ({"features": ["a"]}, False)]
)
def test_parquet_table_starts_no_ray(tmp_path, monkeypatch, columns, starts):
    pq.write_table(pa.table({"a": [1.0, 2.0], "y": [0, 1]}), tmp_path / "t.parquet")
    started = []
    monkeypatch.setattr("pipelines.workspace.start_ray", lambda *_: started.append(1))
    config = DataConfig(source="parquet", path="t.parquet", **columns)
    start_for(config, Workspace(tmp_path, "", tmp_path))
    assert bool(started) == starts


def write_lists(path, values, kind=None):
    """Write a parquet table with a column v of lists, a column w of numbers and labels."""
    labels = ["ab"[i % 2] for i in range(len(values))]
    table = pa.table({"v": pa.array(values, kind), "w": np.arange(len(values)) * 1.0, "y": labels})
    pq.write_table(table, path)
    return DataConfig(source="parquet", path=path.name, label="y")


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 3), pa.list_(pa.int64()), pa.large_list(pa.uint8())])
@pytest.mark.parametrize("features", [None, ["v", "w"]])
def test_list_of_numbers_becomes_a_feature_for_each_value(tmp_path, kind, features):
    values = np.random.default_rng(0).integers(0, 256, (40, 3))
    config = write_lists(tmp_path / "t.parquet", values.tolist(), kind)
    data = load_data(config.model_copy(update={"features": features}), tmp_path)
    assert data.table.features == ["v[0]", "v[1]", "v[2]", "w"]
    spec = {column.name: column for column in data.table.columns}
    first = data.test.images[:, 1] * (spec["v[1]"].high - spec["v[1]"].low) + spec["v[1]"].low
    rows = data.test.images[:, 3] * (spec["w"].high - spec["w"].low) + spec["w"].low
    inside = (rows > spec["w"].low) & (rows < spec["w"].high)
    assert inside.any()
    expected = values[rows.round().astype(int), 1].clip(spec["v[1]"].low, spec["v[1]"].high)
    assert first[inside] == pytest.approx(expected[inside], abs=1e-3)

    accepts = Accepts(data.shape, data.num_classes, data.class_names, data.table)
    new = load_unseen(DataConfig(source="parquet", path="t.parquet"), tmp_path, accepts)
    assert len(new.test) == 40
    inputs = read_inputs(tmp_path / "t.parquet", data.shape, data.class_names, data.table)
    assert np.array_equal(inputs.arrays, new.test.images)


def test_missing_list_is_a_missing_value_of_each_feature(tmp_path):
    config = write_lists(
        tmp_path / "t.parquet", [[1.0, 2.0], None, [3.0, None]] + [[i, i] for i in range(40)]
    )
    with pytest.raises(UserError, match=r"column v\[0\] has no value in row 1"):
        load_data(config, tmp_path)
    data = load_data(config.model_copy(update={"missing": "impute"}), tmp_path)
    assert data.shape == (3,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2], [3]], "column v holds lists of 1 to 2 numbers; every row needs the same number"),
        ([[[1, 2], [3, 4]]] * 2, r"column v holds lists of lists.*save an \.npz"),
        ([["a"], ["b"]], "column v holds lists of string; lists become features if they hold numbers"),
        ([[0] * 4_097] * 2, "column v holds lists of 4,097 numbers; 1 to 4,096"),
        ([[], []], "lists of null"),
    ],
)
def test_list_that_is_no_row_of_numbers_is_refused(tmp_path, values, message):
    config = write_lists(tmp_path / "t.parquet", values)
    with pytest.raises(UserError, match=message):
        load_data(config, tmp_path)
    features = config.model_copy(update={"features": ["w"], "validation_fraction": 0.5})
    with pytest.raises(UserError, match="would leave a split"):  # the column is not used
        load_data(features, tmp_path)


@pytest.mark.parametrize("settings", [{"image": "image"}, {}])
def test_list_of_pixels_as_an_image_is_refused_with_what_is_right(tmp_path, settings):
    pq.write_table(pa.table({"image": [[1, 2], [3, 4]], "label": [0, 1]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"column image holds list<.*>; images are encoded.*data\.label"):
        load_data(DataConfig(source="parquet", path="t.parquet", **settings), tmp_path)


@pytest.mark.parametrize("length", [1, 3])
def test_lists_of_another_length_are_refused(tmp_path, length):
    message = f"column v holds lists of {length} numbers, those of the training samples have 2"
    write_lists(tmp_path / "train.parquet", [[i, -i] for i in range(40)])
    write_lists(tmp_path / "test.parquet", [[i] * length for i in range(4)])
    with pytest.raises(UserError, match=message):
        load_data(DataConfig(source="parquet", path=".", label="y"), tmp_path)


def test_part_of_a_list_is_used_and_longer_lists_are_refused(tmp_path):
    write_lists(tmp_path / "train.parquet", [[i, 7] for i in range(40)])  # v[1] is constant and left out
    write_lists(tmp_path / "test.parquet", [[i, 8] for i in range(4)])
    data = load_data(DataConfig(source="parquet", path=".", label="y", features=["v", "w"]), tmp_path)
    assert data.table.features == ["v[0]", "w"]
    part = DataConfig(source="parquet", path=".", label="y", features=["v[0]", "w"])
    assert load_data(part, tmp_path).table.features == ["v[0]", "w"]
    accepts = Accepts(data.shape, data.num_classes, data.class_names, data.table)
    assert len(load_unseen(part, tmp_path, accepts).test) == 4
    (tmp_path / "new").mkdir()
    config = write_lists(tmp_path / "new" / "n.parquet", [[i, 7, 7] for i in range(9)])
    message = "column v holds lists of 3 numbers, those of the training samples have 2"
    with pytest.raises(UserError, match=message):
        load_unseen(config, tmp_path / "new", accepts)
    with pytest.raises(UserError, match=message):
        read_inputs(tmp_path / "new" / "n.parquet", data.shape, data.class_names, data.table)


@pytest.mark.parametrize(("columns", "fits"), [(4_096, True), (9_000, False)])
def test_columns_that_fit_are_stored_with_a_model(tmp_path, columns, fits):
    x = np.random.default_rng(0).random((4, columns))
    raw = RawTable(
        "'t.csv'", "y", {f"embedding[{i}]": x[:, i] for i in range(columns)}, np.zeros(4, np.int64)
    )
    if not fits:
        with pytest.raises(UserError, match="9,000 columns with 9,000 inputs are too many to be stored"):
            fit(raw, impute=True)
        return
    spec, _ = fit(raw, impute=True)
    stored = yaml.dump(
        {"metadata": {"advtrain": {"table": spec.model_dump(mode="json")}}}, Dumper=yaml.CSafeDumper
    )
    assert len(parse_yaml(stored, "columns")["metadata"]["advtrain"]["table"]["columns"]) == columns
