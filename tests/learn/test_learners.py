"""What every learner of the room can do, beyond scikit-learn's own checks: be saved, go on, and be told apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier

from shoestring.learn import GACIL, TEEN, DKVBClassifier, FeTrIL

DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = DIGITS / 16.0
NAMES = np.array(list("jihgfedcba"))[LABELS]  # so that order of appearance is not the sorted one
LEARNERS = {
    "g-acil": lambda: GACIL(n_components=100),
    "teen": lambda: TEEN(base_classes=list("jihgf")),
    "fetril": FeTrIL,
    "fetril sgd": lambda: FeTrIL(SGDClassifier(loss="log_loss", random_state=0), metric="euclidean", normalize=False),
    "fetril logistic": lambda: FeTrIL(LogisticRegression(), k=2),
    "dkvb": lambda: DKVBClassifier(num_codebooks=8, num_pairs=64, key_dim=6),
}
by_name = pytest.mark.parametrize("name", LEARNERS)


def taught(name, upto=6):
    model = LEARNERS[name]()
    for start in range(0, upto, 2):
        rows = (LABELS >= start) & (LABELS < start + 2)
        model.partial_fit(DIGITS[rows], NAMES[rows])
    return model


@by_name
def test_saved_and_loaded_it_answers_and_goes_on_the_same(name, tmp_path):
    model = taught(name)
    model.save(tmp_path / "a.safetensors", extra={"note": ["x", 1]})
    twin = type(model).load(tmp_path / "a.safetensors")
    assert twin.classes_.tolist() == list("efghij")
    assert np.array_equal(twin.class_count_, model.class_count_)
    assert twin.n_samples_seen_ == model.n_samples_seen_ == (LABELS < 6).sum()
    assert np.array_equal(twin.decision_function(DIGITS), model.decision_function(DIGITS))
    assert np.array_equal(twin.predict(DIGITS), model.predict(DIGITS))
    for learner in (model, twin):
        learner.partial_fit(DIGITS[LABELS >= 6], NAMES[LABELS >= 6])
    np.testing.assert_allclose(twin.decision_function(DIGITS), model.decision_function(DIGITS), rtol=0, atol=1e-12)
    for parameter, value in model.get_params().items():
        if parameter not in ("estimator", "base_classes"):  # an object; and a set, in sorted order
            assert twin.get_params()[parameter] == value
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert json.loads(file.metadata()["shoestring"])["extra"] == {"note": ["x", 1]}


@by_name
def test_feature_names_are_kept(name, tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = pandas.DataFrame(DIGITS, columns=[f"pixel {i}" for i in range(64)])
    model = LEARNERS[name]().partial_fit(rows, NAMES)
    model.save(tmp_path / "a.safetensors")
    twin = type(model).load(tmp_path / "a.safetensors")
    assert twin.feature_names_in_.tolist() == rows.columns.tolist()
    assert np.array_equal(twin.predict(rows), model.predict(rows))


@by_name
def test_damaged_and_foreign_files_are_refused(name, tmp_path):
    path = tmp_path / "a.safetensors"
    model = taught(name, 4)
    model.save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            type(model).load(path)
    other = taught("teen" if name != "teen" else "g-acil", 2)
    other.save(path)
    with pytest.raises(ValueError, match="is of the format"):
        type(model).load(path)
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(ValueError, match="version 9"):
        type(model).load(path)
    with pytest.raises(FileNotFoundError, match="no saved model"):
        type(model).load(tmp_path / "none.safetensors")


def test_a_classifier_that_cannot_be_restored_is_not_saved(tmp_path):
    model = FeTrIL(RidgeClassifier()).fit(DIGITS, LABELS)
    with pytest.raises(TypeError, match=r"estimator must be one of LinearSVC, .*got RidgeClassifier"):
        model.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@by_name
def test_the_same_rows_in_float32_give_nearly_the_same(name):
    model = LEARNERS[name]().partial_fit(DIGITS.astype(np.float32), NAMES)
    assert model.score(DIGITS.astype(np.float32), NAMES) > 0.8


@by_name
def test_integers_beyond_int64_are_refused(name):
    with pytest.raises((ValueError, TypeError)):
        LEARNERS[name]().partial_fit(DIGITS[:3], np.array([2**63, 2**63 + 1, 5], dtype=np.uint64))
