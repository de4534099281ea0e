"""Tables become matrices column by column, and what cannot be a number is named."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_wine
from sklearn.preprocessing import OneHotEncoder

from shoestring.data import load
from shoestring.data.tables import is_table, matrix

PEOPLE = {
    "age": [41, 7, 30],
    "income": [1.5, 0.0, -2.0],
    "member": [True, False, True],
    "colour": ["red", "blue", "red"],
    "label": [0, 1, 0],
}


def test_numbers_stay_and_text_becomes_one_column_a_value():
    X, names = matrix(datasets.Dataset.from_dict(PEOPLE), drop=["label"])
    assert names == ["age", "income", "member", "colour=blue", "colour=red"]
    text = OneHotEncoder(sparse_output=False).fit_transform(np.array(PEOPLE["colour"])[:, None])
    np.testing.assert_array_equal(X, np.column_stack([PEOPLE["age"], PEOPLE["income"], PEOPLE["member"], text]))
    assert X.dtype == np.float64


def test_a_csv_of_wines_is_the_array_it_came_from(tmp_path):
    wine = load_wine(as_frame=True)
    wine.frame.to_csv(tmp_path / "wine.csv", index=False)
    rows = load(tmp_path / "wine.csv")
    X, names = matrix(rows, drop=["target"])
    np.testing.assert_array_equal(X, wine.data.to_numpy())
    assert names == list(wine.data.columns)


def test_class_labels_are_text():
    rows = datasets.Dataset.from_dict({"k": [1, 0]}, datasets.Features(k=datasets.ClassLabel(names=["a", "b"])))
    assert matrix(rows)[0].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("columns", "drop", "expected"),
    [
        ({"x": [1.0, 2.0], "colour": ["a", "b"]}, (), True),
        ({"x": [1.0, 2.0]}, ("x",), False),
        ({"text": ["a", "b"]}, (), False),
        ({"X": [[1.0], [2.0]], "x": [1, 2]}, (), False),
        ({"X": [[1.0], [2.0]], "x": [1, 2]}, ("X",), True),
    ],
)
def test_is_table(columns, drop, expected):
    assert is_table(datasets.Dataset.from_dict(columns), drop) is expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1.0, None]}, "column 'x' must have a value in every row, got 1 without"),
        ({"x": ["a", None]}, "column 'x' must have a value in every row, got 1 without"),
        ({"x": [1.0, float("nan")]}, "column 'x' must be finite"),
        ({"x": [1.0, float("inf")]}, "column 'x' must be finite"),
        ({"x": [[1.0], [2.0]]}, "column 'x' must hold numbers or text"),
        ({"x": [str(i) for i in range(101)]}, "column 'x' must hold at most 100 different values, got 101"),
        ({"x": []}, "at least one row"),
    ],
)
def test_bad_tables_are_refused_by_name(columns, message):
    with pytest.raises(ValueError, match=message):
        matrix(datasets.Dataset.from_dict(columns))


def test_no_column_left():
    with pytest.raises(ValueError, match="no column is left"):
        matrix(datasets.Dataset.from_dict({"x": [1]}), drop=["x"])
