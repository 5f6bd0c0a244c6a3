"""The figures of an evaluation, against tables and arithmetic done by hand; and the pictures that show it."""

import math

import pytest
import torch
from comfy_dancegrpo.runs.evaluate import Comparison, Evaluation, t_quantile
from comfy_dancegrpo.runs.pictures import before_after, contact_sheet, curves, to_tensor


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (7, 2.364624), (15, 2.131450), (30, 2.042272), (127, 1.978820), (10**6, 1.959966)])
def test_t_quantile_is_that_of_the_printed_tables(degrees, value):
    assert t_quantile(0.975, degrees) == pytest.approx(value, rel=2e-3 if degrees == 3 else 4e-4)


def test_summary_of_a_paired_difference_worked_by_hand():
    before, after = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([1.5, 2.0, 4.0, 4.5, 5.5])
    # differences 0.5, 0, 1, 0.5, 0.5: mean 0.5, unbiased variance 0.5 / 4
    summary = Comparison("r", before, after).summary()
    error = math.sqrt(0.125 / 5)
    assert summary["before"] == 3.0 and summary["after"] == 3.5 and summary["gain"] == 0.5 and summary["n"] == 5
    assert summary["t"] == pytest.approx(0.5 / error)
    assert summary["ci95"] == pytest.approx([0.5 - 2.776445 * error, 0.5 + 2.776445 * error], abs=4e-4 * 2.776445 * error)  # the quantile's own accuracy


def test_summary_without_any_difference_claims_nothing():
    summary = Comparison("r", torch.ones(4), torch.ones(4)).summary()
    assert summary["gain"] == 0 and summary["t"] == 0 and summary["ci95"] == [0, 0]


def test_before_after_grid_shows_the_pictures_themselves():
    pictures = torch.rand(6, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    scores = Comparison("r", torch.zeros(6), torch.linspace(-1, 1, 6))
    grid = before_after(Evaluation(tuple(f"prompt {i}" for i in range(6)), (scores,), pictures, 1 - pictures), columns=3, rows=1)
    pixels = to_tensor(grid)[0]
    zoom = round(150 / 16)
    first = pixels[34: 34 + 16 * zoom: zoom, 52: 52 + 16 * zoom: zoom]
    torch.testing.assert_close(first, pictures[0], atol=1 / 255, rtol=0)


def test_contact_sheet_takes_pictures_of_several_sizes():
    sheet = contact_sheet([torch.rand(8, 8, 3), torch.rand(16, 4, 3), torch.ones(4, 20, 3)])
    assert sheet.width >= 40 and sheet.height >= 16


ROW = {"reward_mean": 0.1, "reward_std": 0.2, "group_std": 0.1, "clip_fraction": 0.0, "grad_norm": 1.0}


def test_curves_of_one_iteration_and_of_many():
    for count in (1, 40):
        image = curves(tuple({**ROW, "iteration": i + 1} for i in range(count)), "run", 640, 480)
        assert image.size == (640, 480) and len(image.getcolors(640 * 480)) > 10


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(...)`: the curves, by title: (x, y) of their lines."""
    from matplotlib.figure import Figure

    figures, made = [], Figure.subfigures
    monkeypatch.setattr(Figure, "subfigures", lambda self, *args, **named: (figures.append(self), made(self, *args, **named))[1])

    def draw(rows, **options):
        assert curves(tuple(rows), "run", 960, 960, **options).size == (960, 960)
        return {axes.get_title(): (list(axes.lines[0].get_xdata()), list(axes.lines[0].get_ydata())) for axes in figures[-1].axes}

    return draw


def test_curves_show_what_watch_found_every_reward_that_trains_and_on_request_the_pictures(drawn):
    pictures = {"sharpness": 90.0, "saturation": 0.1, "grid": -0.5, "near_duplicates": 0.0}
    trained = {"clip_score": {"mean": 0.5, "std": 0.1, "weight": 1.0}, "jpeg_size": {"mean": 1.5, "std": 0.1, "weight": -0.5}}
    rows = [{**ROW, "iteration": i + 1, "pictures": pictures, "rewards": trained} for i in range(4)]
    watched = [{"iteration": 0, "rewards": {"exact": 0.7}}, {"iteration": 4, "rewards": {"exact": 0.6}}]
    found = drawn(rows, watched=watched, statistics=True)
    assert found["exact, watched on held-out prompts"] == ([0, 4], [0.7, 0.6])
    assert found["clip_score, trained on (weight 1)"] == ([1, 2, 3, 4], [0.5] * 4) and found["jpeg_size, trained on (weight -0.5)"][1] == [1.5] * 4
    assert found["sharpness"][1] == [90.0] * 4 and found["near-duplicates"][1] == [0.0] * 4 and found["gradient norm"][1] == [1.0] * 4
    assert drawn(rows).keys() == found.keys() - {"exact, watched on held-out prompts", "sharpness", "saturation", "grid artefacts", "near-duplicates"}


def test_curves_of_a_run_from_before_the_statistics_were_written(drawn):
    found = drawn([{**ROW, "iteration": 1}, {**ROW, "iteration": 2, "pictures": {"sharpness": 5.0}}], statistics=True)
    assert math.isnan(found["sharpness"][1][0]) and found["sharpness"][1][1] == 5.0
