"""What the switches between paper and released code are worth: the same tests in every folder of the workspace."""

import re

from lab import differences
from lab import plan as plans
from lab.cli import HERE, UserError

import pytest
from hand import frame, record

FINDING = {"finding": "a", "switch": "`--m`"}


def test_the_effect_of_a_switch_is_paired_by_seed_and_data_set():
    found = [
        record(method="on", dataset="d1", seed=0, metrics={"f1": 5.0}),
        record(method="on", dataset="d1", seed=1, metrics={"f1": 7.0}),
        record(method="on", dataset="d2", seed=0, metrics={"f1": 9.0}),
        record(method="on", dataset="d3", seed=0, metrics={"f1": 99.0}),  # no partner
        record(method="off", dataset="d1", seed=0, metrics={"f1": 4.0}),
        record(method="off", dataset="d1", seed=1, metrics={"f1": 4.0}),
        record(method="off", dataset="d2", seed=0, metrics={"f1": 4.0}),
    ]
    given = {"metric": "f1", "of": {"method": "on"}, "against": {"method": "off"}}
    out = differences.effect(given, {"paper": frame(*found)})
    assert out == {"mean": 3.0, "half": 0.0, "seeds": 2, "datasets": ["d1", "d2"]}  # (1 + 5) / 2 and 3
    plan = {"differences": [{**FINDING, "effect": {**given, "unit": "points"}}, FINDING, {**FINDING, "switch": "none"}]}
    texts = [d["effect"] for d in differences.described(plan, {"paper": frame(*found)})]
    assert texts == ["+3.00 ± 0.00 points (f1, scale paper, 2 seeds, mean of 2 data sets)", "not measured", ""]
    more = [*found, record(method="on", dataset="d1", seed=2, metrics={"f1": 13.0})]
    more += [record(method="off", dataset="d1", seed=2, metrics={"f1": 4.0})]
    half = differences.effect(given, {"paper": frame(*more)})["half"]  # of 3, 3 and 9: t 4.303, deviation sqrt(12)
    assert half == pytest.approx(4.3027 * 12**0.5 / 3**0.5, abs=1e-3)
    both = record(method="on", metrics={"f1": 5.0, "f1_released": 3.5})
    two = {"metric": "f1_released", "of": {"method": "on"}, "against": {"method": "on", "metric": "f1"}}
    assert differences.effect(two, {"paper": frame(both)})["mean"] == -1.5  # two metrics of one record
    assert differences.effect(given, {"paper": frame(found[0])}) is None
    assert differences.effect(given, {}) is None
    with pytest.raises(UserError, match="more than one record a seed"):
        differences.effect({**given, "of": {}}, {"paper": frame(*found, record(table="other", method="on"))})


@pytest.mark.parametrize(
    "wrong",
    [
        "text",
        {"finding": "a"},
        {**FINDING, "x": 1},
        {**FINDING, "effect": {"metric": "f1", "of": {"seed": 1}, "against": {}}},
    ],
)
def test_a_malformed_difference_is_named_by_its_number(wrong):
    with pytest.raises(UserError, match="difference 2"):
        differences.entries({"differences": [FINDING, wrong]})


def test_every_switch_of_this_folder_exists():
    source = "\n".join(p.read_text() for p in HERE.glob("*.py"))
    found = differences.entries(plans.load_plan())
    assert found, "plan.yaml says nothing of where paper and released code differ"
    for entry in found:
        for option in re.findall(r"--([a-z][a-z0-9-]*)", entry["switch"]):
            assert re.search(rf"^    {option.replace('-', '_')}: ", source, re.M), f"no option --{option}"
