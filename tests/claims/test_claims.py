"""Every claim runs in its short form; every shipped result is whole and says what its source says."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from shoestring.catalogue import card, list_methods
from shoestring.claims import (
    RESULTS,
    VERDICTS,
    Result,
    Row,
    claim_module,
    find,
    load_result,
    measurable,
    measure,
    recorded,
    save_result,
)

READY = measurable()


@pytest.mark.parametrize("slug", READY)
def test_fast_form_runs(slug, tmp_path):
    steps = []
    result = measure(slug, fast=True, seeds=1, progress=lambda done, text: steps.append(done))
    assert result.verdict in VERDICTS
    assert result.fast
    assert steps == sorted(steps)
    assert steps[-1] == 1.0
    assert len({row.method for row in result.rows}) > 1  # a method and a baseline
    assert load_result(save_result(result, tmp_path)) == result


@pytest.mark.parametrize("slug", READY)
def test_shipped_result_is_of_the_full_form_and_of_this_source(slug):
    result = recorded(slug)
    assert result is not None, f"run: shoestring claim {slug} --out {RESULTS}"
    module = import_module(claim_module(slug))
    assert not result.fast
    assert (result.slug, result.claim, result.rule) == (slug, module.CLAIM, module.RULE)
    assert result.verdict == module.verdict(result.rows)
    assert 0 < result.seconds < 90
    assert {"torch", "numpy", "python", "shoestring"} <= result.versions.keys()
    assert result.machine["cores"] >= 1


def test_no_result_without_a_method():
    assert {path.stem for path in RESULTS.glob("*.json")} == set(READY)


def test_planned_methods_cannot_be_measured():
    planned = next(slug for slug in list_methods() if card(slug).status == "planned")
    with pytest.raises(ValueError, match="planned"):
        measure(planned)
    with pytest.raises(ValueError, match="seeds must be >= 1"):
        measure(READY[0], seeds=0)
    with pytest.raises(ValueError, match="did you mean 'g-acil'"):
        measure("g-acill")


def test_row_of_several_seeds():
    row = Row.of("a", "accuracy", [1.0, 2.0, 6.0], unit="%", paper=3.5)
    assert (row.value, row.seeds) == (3.0, (1.0, 2.0, 6.0))
    assert row.spread == pytest.approx((14 / 3) ** 0.5)
    with pytest.raises(ValueError, match="finite"):
        Row.of("a", "accuracy", [1.0, float("nan")])
    with pytest.raises(ValueError, match="finite"):
        Row.of("a", "accuracy", [])


def test_find_wants_exactly_one():
    rows = [Row("a", "m", 1.0), Row("a", "m", 2.0, setting="s"), Row("b", "m", 3.0), Row("b", "m", 4.0)]
    assert find(rows, "a", "m").value == 1.0
    assert find(rows, "a", "m", "s").value == 2.0
    for method in ("b", "c"):
        with pytest.raises(LookupError):
            find(rows, method, "m")


def test_damaged_results_are_named(tmp_path):
    path = save_result(Result("g-acil", "c", "r", [Row("a", "m", 1.0)], "d"), tmp_path)
    whole = path.read_text()
    for text in (whole[:50], "[]", json.dumps({"rows": [{"method": "a"}]}), whole.replace('"rule"', '"rules"')):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"g-acil\.json is not a recorded result"):
            load_result(path)


def test_verdict_of_g_acil_follows_its_rule():
    from shoestring.claims.learn.g_acil import verdict

    def rows(ours=(90.0, 90.1), joint=90.0, sgd=80.0, mean=80.0, ablation=70.0, along=85.0, setting="n=50 m=10"):
        made = [Row.of("G-ACIL", "A_Last", ours, setting=setting), Row("joint ridge", "A_Last", joint, setting=setting)]
        made += [Row("G-ACIL without gain", "A_Last", ablation, setting=setting)]
        for metric in ("A_AUC", "A_Avg", "A_Last"):
            made += [
                Row("online SGD", metric, sgd, setting=setting),
                Row("nearest mean", metric, mean, setting=setting),
            ]
            if metric != "A_Last":
                made += [Row("G-ACIL", metric, along, setting=setting)]
        return made

    assert verdict(rows()) == "holds"
    assert verdict(rows(along=79.0)) == "partly"
    assert verdict(rows(ablation=95.0)) == "partly"
    assert verdict(rows(ablation=90.05, setting="n=100 m=10")) == "holds"  # nothing to gain where no class returns
    assert verdict(rows(ours=(90.0, 90.3))) == "not at this scale"
    assert verdict(rows(joint=90.3)) == "not at this scale"
    assert verdict(rows(sgd=91.0)) == "not at this scale"
