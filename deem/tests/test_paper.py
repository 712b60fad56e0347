"""paper.csv: the printed numbers, their odd places, and that the settings here are the paper's recipe."""

import re

from lab import cells, runs

import pytest

import recipe
from settings import Settings

PRINTED = cells.read_printed(runs.HERE / "paper.csv")
COUNTS = {
    **{"table1": 80, "table2": 92, "table3": 28, "table4": 35, "table5": 28, "table6": 12, "table7": 22, "table8": 35},
    **{"table9": 9, "table10": 18, "table11": 48, "readme": 61, "llava-zoo": 6, "figure1": 6},
    **{"abstract": 3, "section1": 3},
}
ROBUST, POPE = ["RobustVQA-A", "RobustVQA-R", "RobustVQA-V"], ["POPE-Random", "POPE-Popular", "POPE-Adversarial"]


def of(table: str, method: str | None = None, **more):
    found = PRINTED[PRINTED["table"] == table]
    for key, value in {"method": method, **more}.items():
        if value is not None:
            found = found[found[key] == value]
    return found


def value(table: str, method: str, dataset: str, metric: str = "accuracy") -> float:
    found = of(table, method, dataset=dataset, metric=metric)["value"]
    assert len(found) == 1, (table, method, dataset)
    return float(found.iloc[0])


def test_every_printed_number_stands_once():
    assert len(PRINTED) == sum(COUNTS.values()) == 486
    assert PRINTED["table"].value_counts().to_dict() == COUNTS
    assert PRINTED["value"].notna().all()  # what is not known is not a row
    keys = ["table", "dataset", "setting", "method", "metric"]
    assert not PRINTED.duplicated(keys).any()
    assert PRINTED["source"].str.contains("http|github").all()


@pytest.mark.parametrize(
    "table", ["table1", "table3", "table4", "table5", "table6", "table7", "table8", "table10", "readme"]
)
def test_a_table_of_methods_and_data_sets_has_one_number_a_cell(table):
    assert not of(table).duplicated(["dataset", "method", "metric"]).any()


def test_averages_are_the_means_but_for_the_two_noted_ones():
    odd = {}
    for table, columns in (("table1", 7), ("readme", 6)):
        for method, rows in of(table).groupby("method"):
            mean = rows[~rows["dataset"].str.startswith("average")]["value"]
            assert len(mean) in (3, columns)  # three for CLIP, which answers no POPE
            printed = rows[rows["dataset"].str.startswith("average")]
            gap = abs(float(printed["value"].iloc[0]) - mean.mean())
            if gap > 0.02:
                odd[method] = round(mean.mean(), 2)
                assert f"average {mean.mean():.2f}" in printed["source"].iloc[0]
    assert odd == {"DEEM-VQA": 66.27, "DreamLLM": 61.92}


def test_the_same_run_printed_twice_with_other_numbers_is_noted():
    pairs = [("table3", "DEEM", "table1", "DEEM"), ("table3", "DEEM-VQA", "table1", "DEEM-VQA")]
    for a, m, b, n in pairs:
        for dataset in ROBUST + POPE:
            first, second = value(a, m, dataset), value(b, n, dataset)
            if abs(first - second) > 0.06:  # more than rounding to one digit
                note = of(a, m, dataset=dataset)["source"].iloc[0]
                assert f"{second:.2f}" in note, (m, dataset)
    row = of("table4", "DEEM, 32K", dataset="POPE-Adversarial")
    assert row["value"].iloc[0] == 50.06 and "50.0" in row["source"].iloc[0]
    assert value("table8", "DEEM, 256 px, lambda=5", "POPE-Adversarial") == 50.0
    # Table 10 repeats rows of Tables 1 and 5, at one digit.
    for method in ("DEEM* (baseline)", "DEEM"):
        for dataset in ROBUST + POPE:
            assert value("table10", method, dataset) == pytest.approx(value("table1", method, dataset), abs=0.07)


def test_gains_of_the_abstract_are_the_llava_rows():
    def mean(method, sets):
        return sum(value("table5", method, d) for d in sets) / len(sets)

    gains = {
        "RobustVQA": mean("LLaVA + CSR", ROBUST) - mean("LLaVA", ROBUST),
        "MMVP": mean("LLaVA + CSR", ["MMVP"]) - mean("LLaVA", ["MMVP"]),
        "POPE": mean("LLaVA + CSR", POPE) - mean("LLaVA", POPE),
    }
    for dataset, gain in gains.items():
        printed = of("abstract", dataset=dataset)
        assert abs(float(printed["value"].iloc[0]) - gain) < 0.2 and "LLaVA rows" in printed["source"].iloc[0]
    ours = mean("DEEM", POPE) - mean("DEEM* (baseline)", POPE)
    assert ours > gains["POPE"] + 4  # not the gain of DEEM over its own baseline


@pytest.mark.parametrize("table", ["table1", "readme"])
def test_pope_random_values_tell_their_number_of_questions(table):
    for _, row in of(table, dataset="POPE-Random").iterrows():
        fits = [n for n in (3000, 2910) if any(abs(round(100 * c / n, 2) - row["value"]) < 1e-9 for c in range(n + 1))]
        said = re.search(r"fits ([^;]*)", row["source"])[1]
        assert (
            said
            == {
                (3000, 2910): "3000 and 2910 questions",
                (3000,): "3000 questions, not 2910",
                (2910,): "2910 questions, not 3000",
                (): "neither 3000 nor 2910 questions",
            }[tuple(fits)]
        )


def test_no_mmvp_value_is_a_share_of_150_pairs_or_300_questions():
    for v in of("table1", dataset="MMVP")["value"]:
        assert not any(abs(100 * c / 300 - v) < 0.005 for c in range(301)), v


def test_methods_of_our_runs_have_their_labels():
    ours = set(recipe.LABELS.values())
    assert {"DEEM", "DEEM* (baseline)", "DEEM + MM-Interleaved", "LLaVA", "LLaVA + CSR"} <= ours
    for table, wanted in (
        ("table1", {"DEEM", "DEEM* (baseline)"}),
        ("table5", {"LLaVA", "LLaVA + CSR", "DEEM", "DEEM* (baseline)"}),
        ("table10", {"DEEM", "DEEM* (baseline)", "DEEM + MM-Interleaved"}),
    ):
        assert wanted <= set(of(table)["method"])
    assert set(of("table10")["method"]) <= ours


def test_data_sets_of_the_tables_are_those_eval_records():
    from evaluation import sets

    labels = {one.label for some in sets.BENCHMARKS.values() for one in some}
    for table in ("table1", "table3", "table4", "table5", "table6", "table7", "table8", "table9", "table10", "table2"):
        named = {d for d in of(table)["dataset"] if not d.startswith("average")}
        assert named - labels <= {"training", "MMBench", "MMVet"}, table
    assert set(of("table9")["setting"]) - {"yes or no"} == set(sets.SETTINGS_OF.values())


def test_the_settings_are_the_recipe_of_table_11():
    for stage, name in ((1, "Stage I"), (2, "Stage II"), (3, "Stage III")):
        printed = of("table11", setting=name).set_index("metric")["value"].to_dict()
        s = Settings(preset="deem", stage=stage, dataset="paper")
        s.resolve()
        assert s.encoder.resolution == printed["input resolution"] and s.steps == printed["iterations"]
        assert s.lr == printed["lr others"] and s.max_tokens == printed["max tokens"]
        assert s.batch == printed["batch per GPU"] and s.max_images == {1: 15, 2: 1, 3: 16}[stage]
        assert s.warmup == printed["warmup steps"] and s.weight_decay == printed["weight decay"]
        assert s.lambda_csr == printed["lambda"]
        key = "lr image encoder and decoder" if stage == 1 else "lr language model"
        assert {1: s.encoder.lr}.get(stage, s.lm.lr) == printed[key]
