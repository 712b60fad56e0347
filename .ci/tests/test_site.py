"""The whole site from hand-made reports: built, linked, and with nothing fetched from elsewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build
import front
import links
import pytest
from test_cells import cell, measured, run, table

SITE = Path(build.__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workspace with a reproduced folder, one that was not, and one that is named and missing."""
    root = tmp_path_factory.mktemp("workspace")
    (root / "README.md").write_text(
        "| [`one`](one) | First *paper* | x |\n| `two` | Second | x |\n| `three` | 3 | x |\n"
    )
    for name in ("one", "two"):
        (root / name / "results" / "figures").mkdir(parents=True)
        (root / name / "requirements.in").write_text("")
        (root / name / "README.md").write_text(
            f"# {name}\n\nSee [this](train.py) and [that](https://example.org).\n\n"
            "![a picture](results/figures/a.png)\n\n## Deviations and open points\n\nNone [known](x.md).\n"
        )
        (root / name / "results" / "figures" / "a.png").write_bytes(b"png")
        (root / name / "results" / "figures" / "b.jpg").write_bytes(b"jpg")
    (root / "two" / "RESULTS.md").write_text("# Two\n\n![a](results/figures/a.png) [r](results/x.jsonl)\n")
    done = run(records=2, seconds=7200, commits=["0" * 40 + "+changes"], devices=["CPU"], data=["d (half)"])
    needs = [{"path": "sets/d", "origin": "example.org"}]
    odd = "<script>y</script>"
    report = {
        "title": "One, a paper",
        "claims": [
            {"id": i, "text": "a | b", "source": "s", "scale": scale, "numbers": "1 > 0", "verdict": verdict}
            | {"control": i == 2}
            for i, scale, verdict in (
                *((1, "demo", "holds"), (2, "demo", "does not hold")),
                *((3, "demo", "not measured"), (4, "paper", "not measured"), (5, "real", "undecided")),
            )
        ],
        "tables": [
            table([measured(50.0, 50.0)], title="Main", note="Noted."),
            table([cell(printed=1.0)], title="Later", row_names=["later"]),
            table([measured(1.0, expected=False)], scale="demo", title="Small", tolerance=2.0),
        ],
        "figures": [
            {"path": f"results/figures/{name}", "caption": "A figure", "scale": "demo"} for name in ("a.png", "b.jpg")
        ],
        "runs": {
            "paper": {"r1": done, "later": run(needs=needs), "ready": run()},
            "demo": {
                "r1": run(
                    records=1,
                    data=["g<script>x</script> (generated)"],
                    devices=[odd],
                    commits=["f" * 40],
                )
            },
        },
        "differences": [{"finding": "f1", "switch": "`--s`", "effect": "+1"}],
    }
    (root / "one" / "results" / "report.json").write_text(json.dumps(report))
    (root / "one" / "plan.yaml").write_text("facts: [other-recipe]\n")
    (root / "one" / "paper.csv").write_text(
        "table,dataset,setting,method,metric,value,std,unit,source\n"
        "other-recipe,<i>D</i>,eps=8/255,M,pgd,41.5,,per cent,a benchmark\nmain,D,s,M,pgd,1,,,its own table\n"
    )
    (root / "one" / "results" / "paper").mkdir()
    (root / "one" / "results" / "paper" / "r1.jsonl").write_text("{}\n")
    (root / "one" / "results" / "demo.jsonl").write_text('{"run": "r1"}\n{"run": "r2"}\n')
    (root / "one" / "runs" / "demo").mkdir(parents=True)
    told = {"line": "one: 1 of 2 claims hold; 5 of 6 numbers equal", "flipped": []}
    (root / "one" / "runs" / "demo" / "comparison.json").write_text(json.dumps(told))
    command = [sys.executable, str(SITE / "build.py"), "site", "one", "two", "three"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "site"


def text(path: Path) -> str:
    words = re.sub(r"<[^>]+>", " ", path.read_text(encoding="utf-8"))
    return " ".join(words.replace("¶", "").split())


def test_front_page(place):
    page = text(place / "index.html")
    assert "one First paper" in page and "two Second No committed records." in page
    assert "1 holds, 1 not measured; controls: 1 does not hold" in page  # the bar of scale demo
    assert "paper: d (half); day not known" in page and not (place / "three").exists()
    row = re.search(r"outside runs: recorded / ready / all (one .*?) two", page)[1]
    assert row == "one 2 2 1 1 0 1 / 1 / 3"
    assert 'src="one/figures/' in (place / "index.html").read_text()


def test_controls_stand_beside_the_explanation_that_they_could_break():
    def claim(**changes):
        base = {
            "id": "1",
            "text": "with <other> maps",
            "source": "ours",
            "scale": "demo",
            "numbers": "+1",
            "control": True,
        }
        return {**base, "verdict": "holds", "explanation": "maps matter", **changes}

    def told(*claims):
        return front.controls(["one"], {"one": {"claims": list(claims)}})

    page = told(
        claim(), claim(scale="real", text="real one", verdict="undecided"), claim(control=False, text="no control")
    )
    assert "real one" in page and "with" not in page and "no control" not in page  # of the best scale alone
    assert "with &lt;other&gt; maps" in told(claim(), claim(scale="real", verdict="not measured"))
    assert told(claim(explanation="")) == told() == "No control was measured yet."


def test_a_papers_page(place):
    page = (place / "one" / "index.html").read_text()
    assert '<span class="held">holds</span>' in page and '<span class="failed">does not hold</span>' in page
    assert "2 cells, 2 with a printed number; 1 measured: 1 within, 0 outside, 0 without" in text(
        place / "one/index.html"
    )
    assert "2 records of 1 of the 3 planned runs, 2.00 hours. Data: d (half). Machine: CPU." in text(
        place / "one/index.html"
    )
    assert '<td class="own"><a href="runs.html#demo-r1">' in page and "Tolerance 2." in page
    assert '<span class="open">undecided</span>' in page
    assert "Reproduced here, scale demo: 1 of 2 claims hold; 5 of 6 numbers equal." in page
    assert 'href="runs.html#paper-later"' in page and 'src="figures/a.png"' in page


def test_numbers_that_no_run_can_fill_are_listed(place):
    page = (place / "one" / "index.html").read_text()
    assert "other recipe: 1 numbers" in page and "&lt;i&gt;D&lt;/i&gt;" in page and "<i>D</i>" not in page
    assert "&lt;i&gt;D&lt;/i&gt; eps=8/255 M pgd 41.5 per cent a benchmark" in text(place / "one" / "index.html")
    assert "its own table" not in page
    assert "Printed elsewhere" not in (place / "two" / "index.html").read_text()


def test_page_of_runs_has_command_cost_needs_and_records(place):
    page = text(place / "one" / "runs.html")
    assert "1 of 3 runs have records; the others: about 2.0 hours" in page
    assert "needs sets/d from example.org not here: sets/d" in page
    assert (place / "one" / "records" / "paper-r1.jsonl").read_text() == "{}\n"
    assert (place / "one" / "records" / "demo-r1.jsonl").read_text() == '{"run": "r1"}\n'


def test_texts_of_records_are_escaped(place):
    pages = [p.read_text() for p in place.rglob("*.html")]
    assert not any("<script>x" in page or "<script>y" in page for page in pages)
    assert any("&lt;script&gt;x" in page for page in pages) and any("&lt;script&gt;y" in page for page in pages)


def test_a_folder_that_was_not_reproduced_shows_what_it_has(place):
    page = (place / "two" / "index.html").read_text()
    assert "make record-two" in page and 'src="figures/a.png"' in page and "x.jsonl" not in page
    assert not (place / "two" / "runs.html").exists()


def test_differences_and_open_points(place):
    page = text(place / "differences.html")
    assert "f1 --s +1" in page and "None known." in page


def test_links_live_and_nothing_is_fetched(place):
    assert links.dead(place) == []


@pytest.mark.parametrize(
    "wrong, said",
    [
        ('<a href="gone.html">x</a>', "index.html: no file gone.html"),
        ('<a href="#nowhere">x</a>', "index.html: no place #nowhere"),
        ('<a href="one/runs.html#nowhere">x</a>', "index.html: no place one/runs.html#nowhere"),
        ('<script src="https://cdn.example/x.js"></script>', "index.html: fetches https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "index.html: fetches //cdn.example/x.css"),
        ('<img src="gone.png">', "index.html: no file gone.png"),
    ],
)
def test_a_dead_link_is_named(place, tmp_path, wrong, said):
    shutil.copytree(place, tmp_path / "site")
    page = tmp_path / "site" / "index.html"
    page.write_text(page.read_text().replace("</body>", wrong + "</body>"))
    assert links.dead(tmp_path / "site") == [said]


def test_a_broken_report_is_one_line(tmp_path):
    (tmp_path / "one" / "results").mkdir(parents=True)
    (tmp_path / "one" / "results" / "report.json").write_text("{")
    with pytest.raises(SystemExit, match="not valid JSON .*make record-one"):
        build.committed(tmp_path / "one")
    assert build.committed(tmp_path / "two") is None


def test_the_newest_commit_is_named_with_its_own_day(monkeypatch):
    days = {"a" * 40: "2026-01-02", "f" * 40: "2026-01-01"}
    monkeypatch.setattr(build, "date", days.get)
    told = build.commits([run(commits=["f" * 40]), run(commits=["a" * 40 + "+changes"])])
    assert told == ["2026-01-02 `aaaaaaaaaa+changes`", "2026-01-01 `ffffffffff`"]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
@pytest.mark.parametrize("page", ["index.html", "one/index.html", "one/runs.html", "differences.html"])
@pytest.mark.parametrize("scheme", [0, 1])  # dark, light
def test_pages_fit_a_phone_and_follow_the_systems_colours(place, tmp_path, page, scheme):
    shutil.copytree(place, tmp_path / "site")
    path = tmp_path / "site" / page
    look = "<script>onload = () => { const d = document; d.title = [d.documentElement.scrollWidth - innerWidth, "
    look += "d.body.dataset.mdColorScheme, innerWidth].join(' ') }</script></body>"
    path.write_text(path.read_text().replace("</body>", look))
    words = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--blink-settings=preferredColorScheme={scheme}",
    ]
    words += [
        "--window-size=500,900",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    dom = subprocess.run([*words, path.as_uri()], capture_output=True, text=True, timeout=180).stdout
    wider, found, _ = re.search(r"<title>(\S+ \S+ \S+)</title>", dom)[1].split()
    assert int(wider) <= 0 and found == ("default" if scheme else "slate")
