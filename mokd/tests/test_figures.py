"""Pictures: one colour a method in all of them, the classes of a task on its heat map, whiskers over what varies."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

import figures


def record(method: str, seed: int, gain: float, dataset: str = "MNIST", table: str = "t", **settings) -> dict:
    where = {"table": table, "dataset": dataset, "setting": "s", "method": method, "seed": seed, "settings": settings}
    return {**where, "metrics": {"accuracy": 50.0, "gain over NCC": gain, "gain over NCC ci95": 0.5}}


def painted(rows: list[dict]) -> dict[str, tuple]:
    figure, _ = figures.gains(rows)
    found = {c.get_label(): c[0].get_facecolor() for c in figure.axes[0].containers if hasattr(c, "patches")}
    plt.close(figure)
    return found


def test_a_method_has_its_colour_whatever_stands_beside_it():
    rows = [record(m, 0, 1.0) for m in ("URL", "MOKD", "MOKD(no TPM)", "MOKD(lr=1)")]
    all_four, alone = painted(rows), painted(rows[1:2])
    assert all_four["MOKD"] == alone["MOKD"] != all_four["URL"] and all_four["MOKD(no TPM)"] != all_four["MOKD"]
    assert figures.colour("MOKD(lr=1)") == (figures.COLOURS["MOKD"], figures.HATCH)
    assert figures.colour("MOKD(lr=1,bandwidth=none)") == (figures.COLOURS["MOKD(no TPM)"], figures.HATCH)
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)


def test_the_heat_map_names_its_classes():
    labels = [0, 0, 0, 1, 2, 2]
    example = {"labels": labels, "targets": [0, 1], "cosine": np.eye(6).tolist(), "tsne": np.zeros((8, 2)).tolist()}
    rows = [record(m, 0, 1.0) for m in ("NCC", "MOKD")]
    for r in rows:
        r["metrics"]["example"] = example
    figure, _ = figures.task(rows, "MNIST")
    axis = figure.axes[0]
    assert axis.get_xticks().tolist() == [1, 3, 4.5] and [t.get_text() for t in axis.get_yticklabels()] == [
        "1",
        "2",
        "3",
    ]
    assert axis.get_xticks(minor=True).tolist() == [-0.5, 2.5, 3.5, 5.5]
    plt.close(figure)


@pytest.mark.parametrize(("settings", "word"), [({"train": ["drawn"]}, "network of its own"), ({}, "over the tasks")])
def test_whiskers_are_over_networks_where_there_are_several(settings, word):
    """Tasks of several networks are never joined into one interval."""
    rows = [record("MOKD", k, gain, **settings) for k, gain in enumerate((1.0, 3.0, 5.0))]
    figure, caption = figures.gains(rows)
    (line,) = figure.axes[0].containers[0].lines[2][0].get_segments()
    half = (line[1][1] - line[0][1]) / 2
    assert word in caption and half == pytest.approx(4.97 if settings else 0.5 / 3**0.5, abs=0.01)
    plt.close(figure)
