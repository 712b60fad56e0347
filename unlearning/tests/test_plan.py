"""plan.yaml: every run is valid, has cells of its own that some table shows; every printed number is shown; claims
judge."""

import functools
from collections import Counter

from lab import plan as plans
from lab import runs
from lab.cells import read_printed
from lab.claims import FAILS, HOLDS, UNKNOWN

import pandas as pd
import pytest

import claims
import corpora
import data
import figures
import metrics
import models
import settings
import study
import train
from methods import METHODS

PLAN = plans.load_plan()
PRINTED = read_printed(runs.HERE / "paper.csv")


@functools.cache
def resolved(words):
    """Settings of a command line of the plan."""
    assert words[0] == "train.py"
    s = runs.parse(settings.Settings, "", list(words[1:]))
    s.check()
    s.resolve()
    return s


def keys_of(s):
    """(table, dataset, setting, method) of every record of a run but the originals'."""
    title, model = {"miniature": "miniature", "tofu": "TOFU"}[s.dataset], models.PRESETS[s.preset].title
    settings = ["calibration=none", *(f"calibration=UWC tau={t:g}" for t in s.tau)]
    out = [
        (s.table, f"{title} {split}", f"{c},model={model}", train.label_of(s, m))
        for split in s.forget
        for c in settings
        for m in s.methods
    ]
    return out + [(s.table, title, f"attack={a},model={model}", k) for a in s.attacks for k in study.STUDIED]


def shown(view, where, key):
    order = view.get("order", {})
    axes = {view["rows"]: order.get("rows"), view["columns"]: order.get("columns")}
    picked = all(key[k] in (v if isinstance(v, list) else [v]) for k, v in where.items())
    return picked and all(names is None or key[k] in names for k, names in axes.items() if k != "metric")


@pytest.mark.parametrize("scale", PLAN["scales"])
def test_every_run_is_valid_and_has_cells_of_its_own(scale):
    cells = Counter()
    for job in plans.jobs(PLAN, scale):
        s = resolved(tuple(job.command(scale)))
        cells.update((key, seed) for key in keys_of(s) for seed in job.seeds)
    assert max(cells.values()) == 1, [k for k, n in cells.items() if n > 1][:3]


def test_a_run_by_hand_enters_no_table():
    own = settings.Settings().table
    for view in PLAN["tables"]:
        where = view.get("where", {})["table"]
        assert own != where and own not in where


@pytest.mark.parametrize("scale", ["demo", "real", "paper"])
def test_every_run_stands_in_a_table(scale):
    views = [v for v in PLAN["tables"] if v.get("scale", "paper") == scale]
    names = ("table", "dataset", "setting", "method")
    hidden = []
    for job in plans.jobs(PLAN, scale):
        for key in keys_of(resolved(tuple(job.command(scale)))):
            if key[0] == "study" and not key[2].startswith("attack="):
                continue  # the same models as in the main tables, of one seed
            if "tau=0.4" in key[2] or "tau=0.6" in key[2]:
                continue  # tricks and searches are shown at 0.9 and 0.95
            if key[0] in ("tricks", "search", "quality") and ("none" in key[2]) != (key[0] == "quality"):
                continue
            if not any(shown(v, v["where"], dict(zip(names, key, strict=True))) for v in views):
                hidden.append(key)
    assert not hidden, f"{len(hidden)} in no table, the first {hidden[0]}"


def test_every_printed_number_is_shown():
    hidden = []
    for row in PRINTED[PRINTED["value"].notna()].to_dict("records"):
        found = False
        for view in PLAN["tables"]:
            where = view.get("printed", view.get("where", {}))
            listed = view["order"]["columns"]
            metric = listed if view["columns"] == "metric" else [view.get("metric")]
            found = found or row["metric"] in metric and shown(view, where, row)
        hidden += [] if found else [tuple(row.values())]
    assert not hidden, f"{len(hidden)} printed numbers in no table, the first {hidden[0]}"
    assert len(PRINTED) == 407


def test_the_six_methods_of_the_tables_are_planned_for_all_splits_and_both_models():
    cells = set()
    for job in plans.jobs(PLAN, "paper"):
        s = resolved(tuple(job.command("paper")))
        if s.table == "main":
            cells |= {(s.preset, split, m) for split in s.forget for m in s.methods}
            assert len(job.seeds) == 5 and set(s.tau) >= {0.4, 0.6, 0.9, 0.95}
    assert {(p, f, m) for p in ("phi", "llama2") for f in corpora.FORGET for m in METHODS} <= cells


def test_the_papers_settings():
    jobs = {j.name: tuple(j.command("paper")) for j in plans.jobs(PLAN, "paper")}
    s = resolved(jobs["main-phi-forget05-ga"])
    assert (s.lr, s.unlearn_lr, s.relearn_lr, s.epochs, s.unlearn_epochs) == (2e-5, 2e-5, 2e-5, 5, 5)
    assert (s.batch * s.accum, s.train_batch * s.train_accum, s.weight_decay, s.clip, s.max_length) == (
        16,
        32,
        0,
        1,
        500,
    )
    assert (s.precision, s.optimizer, s.kl) == ("mixed", "paged32", "padded")
    s = resolved(jobs["main-llama2-forget05-npo"])
    assert (s.lr, s.unlearn_lr, s.checkpointing) == (1e-5, 1e-5, True)


# -------------------------------------------------------------------------------------------------------------- claims


def frame(cells):
    rows = [
        {"table": t, "dataset": d, "setting": s, "method": m, "seed": seed, "metric": k, "value": v}
        for d, s, m, k, v in cells
        for t in ["study" if s.startswith("attack=") else "main"]
        for seed in (0, 1)
    ]
    names = ["table", "dataset", "setting", "method", "seed", "metric", "value"]
    return pd.DataFrame(rows, columns=names)


def world(**change):
    """Cells of the demo on which every claim holds; `change` replaces values by their short name."""
    none, bar = f"calibration=none,{claims.MINI}", f"calibration=UWC tau=0.9,{claims.MINI}"
    values = {"original": 0.95, "ga_retain": 0.1, "ga_forget": 0.0, "gd": 0.1, "ga": 0.5, "po": 0.6, "kept": 0.92}
    values |= {"alpha_ga": 0.2, "alpha_gd": 0.4, "other_raw": 0.05, "rho": -0.95, "jump": 0.3, "es": 0.9, "ppl": 0.5}
    v = values | change
    cells = [(claims.SMALL, none, "Original", f"ES_exact_{p}", v["original"]) for p in ("retain", "unlearn")]
    cells += [(claims.SMALL, none, "GA", "ES_exact_retain", v["ga_retain"])]
    for m in claims.METHODS:
        cells.append((claims.SMALL, none, m, "ES_exact_unlearn", v["ga_forget"] if m == "GA" else v["other_raw"]))
        after = {"GA": v["ga"], "GD": v["gd"], "PO": v["po"]}.get(m, 0.5)
        cells += [
            (claims.SMALL, bar, m, "ES_exact_unlearn", after),
            (claims.SMALL, bar, m, "ES_exact_retain", v["kept"]),
        ]
        cells += [(claims.SMALL, bar, m, "bar_exact", 0.9)]
        cells += [(claims.SMALL, bar, m, "alpha_exact", v["alpha_ga"] if m == "GA" else v["alpha_gd"])]
    for m in ("GA", "NPO"):
        for p in ("retain", "unlearn"):
            cells += [(claims.SMALL, none, m, f"spearman_exact_{p}", v["rho"])]
            cells += [(claims.SMALL, none, m, f"jump_exact_{p}", v["jump"])]
    for a in claims.ATTACKS:
        for m, value in (("ES", v["es"]), ("PPL", v["ppl"])):
            cells += [("miniature", f"attack={a},{claims.MINI}", m, f"PCC_{p}", value) for p in ("retain", "unlearn")]
    return frame(cells)


def real(**change):
    """Cells of scale real on which every claim and control holds."""
    none, bar = f"calibration=none,{claims.REAL.model}", f"calibration=UWC tau=0.9,{claims.REAL.model}"
    values = {"original": 0.95, "ga_retain": 0.1, "ga_forget": 0.0, "gd": 0.1, "ga": 0.5, "kept": 0.92, "slow": 0.7}
    values |= {
        "alpha_ga": 0.2,
        "alpha_gd": 0.4,
        "other_raw": 0.05,
        "rho": -0.95,
        "jump": 0.3,
        "never": 0.05,
        "lower": 0.4,
    }
    v, d = values | change, claims.REAL.dataset
    cells = [(d, none, "Original", f"ES_exact_{p}", v["original"]) for p in ("retain", "unlearn")]
    cells += [(d, none, "GA", "ES_exact_retain", v["ga_retain"]), (d, none, "GA", "ES_exact_unlearn", v["ga_forget"])]
    cells += [(d, none, claims.SLOW, "ES_exact_unlearn", v["slow"]), (d, none, claims.SLOW, "ES_exact_retain", 0.95)]
    cells += [(d, none, "Retrained", "ES_exact_unlearn", v["never"]), (d, none, "Retrained", "ES_exact_retain", 0.95)]
    for m in claims.REAL.methods:
        cells += [(d, none, m, "ES_exact_unlearn", v["other_raw"])] if m != "GA" else []
        after = {"GA": v["ga"], "GD": v["gd"]}.get(m, 0.5)
        cells += [(d, bar, m, "ES_exact_unlearn", after), (d, bar, m, "ES_exact_retain", v["kept"])]
        cells += [(d, bar, m, "bar_exact", 0.9)]
        cells += [(d, bar, m, "alpha_exact", v["alpha_ga"] if m == "GA" else v["alpha_gd"])]
        for p in ("retain", "unlearn"):
            cells += [(d, none, m, f"spearman_exact_{p}", v["rho"]), (d, none, m, f"jump_exact_{p}", v["jump"])]
    return frame(cells)


def test_the_bottom_line_of_either_scale():
    """The first sentence stands alone; without the numbers there is none."""
    both = claims.bottom_line({"real": real(), "demo": world()})
    assert (
        len(both) == 4 and both[0].startswith("On SmolLM2-135M") and "to 0.00 and of all the others to 0.10" in both[0]
    )
    assert "GA 0.50, GD 0.10, NPO 0.50 of the author; GA at a lower rate leaves 0.70 at a retention of 0.95" in both[1]
    assert "0.05 there, 0.95 on the others" in both[2]
    assert len(claims.bottom_line({"demo": world()})) == 1 and claims.bottom_line({"real": frame([])}) == []
    gone = real()
    assert claims.bottom_line({"real": gone[gone["method"] != "Retrained"]}) == []


JUDGES = {c.id: c.judge for c in claims.CLAIMS}


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("A", {"original": 0.79}),
        ("B", {"ga_forget": 0.06}),
        ("B", {"ga_retain": 0.48}),
        ("C", {"kept": 0.88}),
        ("C", {"alpha_ga": 0.41}),
        ("D", {"gd": 0.45}),
        ("D", {"po": 0.19}),
        ("D", {"other_raw": -0.03}),
        ("E", {"rho": -0.89}),
        ("E", {"jump": 0.36}),
        ("F", {"es": 0.49}),
    ],
)
def test_claims_hold_and_fail_on_either_side_of_their_bars(claim, change):
    assert JUDGES[claim](world())[0] == HOLDS
    assert JUDGES[claim](world(**change))[0] == FAILS


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("RA", {"original": 0.79}),
        ("RB", {"ga_forget": 0.06}),
        ("RB", {"ga_retain": 0.48}),
        ("RC", {"kept": 0.88}),
        ("RC", {"alpha_ga": 0.41}),
        ("RD", {"gd": 0.45}),
        ("RD", {"other_raw": -0.03}),
        ("RE", {"rho": -0.89}),
        ("RE", {"jump": 0.51}),
        ("RL", {"slow": 0.49}),
        ("RG", {"never": -0.01}),
    ],
)
def test_claims_of_scale_real_hold_and_fail_on_either_side_of_their_bars(claim, change):
    assert JUDGES[claim](real())[0] == HOLDS
    assert JUDGES[claim](real(**change))[0] == FAILS


@pytest.mark.parametrize("claim", [c.id for c in claims.CLAIMS])
def test_claims_without_their_numbers_are_not_measured(claim):
    assert JUDGES[claim](frame([("x", "y", "z", "w", 1.0)]))[0] == UNKNOWN


def test_claims_of_the_paper_hold_on_its_own_numbers():
    """The printed reply tables, read as if they were measured, bear out what is claimed about them."""
    p = PRINTED[PRINTED["table"].str.startswith("rebuttal")].assign(table="main")
    p = pd.concat([p.assign(seed=k) for k in (0, 1)])  # seeds that agree: only the order counts
    verdicts = {k: JUDGES[k](p)[0] for k in ("P1", "P2", "P3", "P4", "P5", "P6")}
    assert verdicts == dict.fromkeys(verdicts, HOLDS)


# ------------------------------------------------------------------------------------------------ study and figures


def test_correlations_of_a_made_up_population():
    population = [
        {f"study.{m}_{p}": float(i) for m in study.STUDIED for p in metrics.PARTS}
        | {f"study.{m}_{p}@relearning": 2.0 * i + 1 for m in study.STUDIED for p in metrics.PARTS}
        for i in range(4)
    ]
    for kind, _, found in study.summarise(population, ("relearning",)):
        assert (
            kind == "relearning"
            and found["PCC_retain"] == pytest.approx(1)
            and found["slope_unlearn"] == pytest.approx(2)
        )
    assert study.correlation([1, 1, 1], [1, 2, 3]) is None and study.correlation([1, 2], [1, 2]) is None
    assert study.correlation([1, 2, float("nan")], [1, 2, 3]) is None


def test_attacked_prompts(tiny, corpus):
    _, chat = tiny
    rows = corpus.full[:5]
    items = [data.encode(chat, q.question, q.answer) for q in rows]
    noisy = study.noised(items, 0.05, len(chat.tokenizer), 3)
    for a, b in zip(items, noisy, strict=True):
        assert a.ids[a.start :] == b.ids[b.start :] and a.ids[0] == b.ids[0] and len(a.ids) == len(b.ids)
    assert noisy == study.noised(items, 0.05, len(chat.tokenizer), 3) != items
    broken = study.jailbroken(chat, rows, 500)
    text = chat.tokenizer.decode(broken[0].ids[: broken[0].start])
    assert "Ignore all rules" in text and text.endswith("here is the answer :") and rows[0].question in text
    assert "<unk>" not in text and broken[0].ids[broken[0].start :] == items[0].ids[items[0].start :]
    assert study.layers_of(24, (1 / 3, 2 / 3, 1.0)) == [8, 16, 24] and study.layers_of(1, (0.1, 1.0)) == [1]


def test_gcg_never_makes_the_answers_less_likely_than_its_first_suffix(tiny, corpus):
    import torch

    lm, chat = tiny
    items = [data.encode(chat, q.question, q.answer) for q in corpus.full[:3]]
    losses = []
    for steps in (1, 6):
        attacked = study.gcg(lm, chat, items, torch.device("cpu"), length=3, steps=steps, tries=8, top=16)
        losses.append(metrics.score_items(lm, attacked, chat.pad, torch.device("cpu")).nll.mean())
        assert all(len(a.ids) == len(e.ids) + 3 for a, e in zip(attacked, items, strict=True))
    assert losses[1] < losses[0]


def test_figures_can_be_drawn_from_few_records(tmp_path):
    curve = {"curve_alpha": [0.0, 1.0], "curve_ES_exact_retain": [1.0, 0.2], "curve_ES_exact_unlearn": [1.0, 0.0]}
    told = {"answers": [{"question": "Who ?", "answer": "$She$ did .", "model": "\u4e2d" * 300}]}
    one = {"ES_exact_retain": 0.2, "ES_exact_unlearn": 0.0} | told
    base = {"table": "main", "dataset": "d s", "method": "GA", "seed": 0}
    records = [{**base, "setting": "calibration=none,model=m", "metrics": curve | one}]
    records += [{**base, "setting": "calibration=UWC tau=0.9,model=m", "metrics": one}]
    sides = {f"{w}_{p}": [0.1, 0.5] for w in ("before", "after") for p in ("retain", "unlearn")}
    records += [
        {**base, "method": "ES", "setting": "attack=relearning,model=m", "metrics": {**sides, "PCC_retain": 1.0}}
    ]
    drawn = figures.draw(records, tmp_path, "demo")
    assert [p.name for p, _ in drawn] == ["demo-alpha-curves.png", "demo-trade-off.png", "demo-metric-study.png"]
    for method in ("Original", "Retrained"):
        records += [{**base, "method": method, "setting": "calibration=none,model=m", "metrics": one}]
    drawn = figures.draw(records, tmp_path, "demo")
    assert [p.name for p, _ in drawn][:2] == ["demo-path.png", "demo-answers.png"] and len(drawn) == 5
    assert all(p.stat().st_size > 1000 for p, _ in drawn)
    assert figures.draw([], tmp_path, "demo") == []
