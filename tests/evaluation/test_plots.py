from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.image import imread

from moe_fast.evaluation import plots
from moe_fast.evaluation.plots import (
    plot_expert_usage,
    plot_losses,
    plot_training,
    running_mean,
)

DOMAINS = ["numpy", "scipy", "stdlib"]


def _usage(layers: int, experts: int = 3) -> np.ndarray:
    shares = np.random.default_rng(0).uniform(size=(len(DOMAINS), layers, experts))
    return shares / shares.sum(-1, keepdims=True)


def _is_a_picture(path: Path) -> bool:
    pixels = imread(path)
    return min(pixels.shape[:2]) > 200 and float(pixels[..., :3].std()) > 0.01


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_expert_usage_is_drawn(tmp_path: Path, layers: int) -> None:
    path = tmp_path / "new" / "usage.png"
    plot_expert_usage({"learned": _usage(layers)}, DOMAINS, path)
    assert _is_a_picture(path)
    assert [file.name for file in path.parent.iterdir()] == ["usage.png"]


LONG = "a name of a domain, or of a model, that somebody wrote out in full"


@pytest.mark.parametrize(
    "draw",
    [
        lambda p: plot_expert_usage({"m": np.full((1, 1, 2), 0.5)}, ["all texts"], p),
        lambda p: plot_expert_usage({LONG: _usage(2)}, ["x", LONG, "y"], p),
        lambda p: plot_expert_usage({"m": _usage(1, experts=64)}, DOMAINS, p),
        lambda p: plot_losses({LONG: [(1, 0.5), (2, 0.4)]}, p, y_label=LONG),
    ],
)
def test_nothing_is_cropped(tmp_path: Path, draw) -> None:
    draw(tmp_path / "x.png")
    pixels = imread(tmp_path / "x.png")[..., :3]
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 1.0).all()


def test_titles_of_panels_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _Kept(monkeypatch)
    plot_expert_usage({LONG: _usage(3)}, DOMAINS, "unused")
    kept.figure.canvas.draw()
    titles = [axis.title.get_window_extent() for axis in kept.figure.axes[:3]]
    assert all(left.x1 < right.x0 for left, right in zip(titles, titles[1:], strict=False))


def test_layers_that_agree_share_a_panel() -> None:
    same = np.repeat(np.eye(3)[:, None], 4, axis=1)
    panels = plots._usage_panels({"enforced": same, "learned": _usage(2)}, 3)
    assert [title for title, _ in panels] == [
        "enforced\nall 4 layers alike",
        "learned\nlayer 0",
        "learned\nlayer 1",
    ]
    np.testing.assert_array_equal(panels[0][1], np.eye(3))


def test_layers_are_named_by_their_numbers_in_the_model() -> None:
    panels = plots._usage_panels({"learned": _usage(2)}, 3, [0, 3])
    assert [title for title, _ in panels] == ["learned\nlayer 0", "learned\nlayer 3"]
    same = np.repeat(np.eye(3)[:, None], 2, axis=1)
    assert plots._usage_panels({"x": same}, 3, [1, 3])[0][0] == "x\nlayers 1, 3 alike"
    many = np.repeat(np.eye(3)[:, None], 12, axis=1)
    assert plots._usage_panels({"x": many}, 3, range(12))[0][0] == "x\nall 12 layers alike"


def test_losses_are_drawn(tmp_path: Path) -> None:
    curves = {name: [(32 * i, 1 / i) for i in range(1, 40)] for name in ("dense", "a", "b", "c")}
    plot_losses(curves, tmp_path / "losses.png")
    assert _is_a_picture(tmp_path / "losses.png")
    plot_losses({"one point": [(1, 0.5)]}, tmp_path / "losses.svg")
    assert "svg" in (tmp_path / "losses.svg").read_text()[:300]


class _Kept:
    """Keeps the figure instead of writing it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plots, "_save", lambda figure, path: setattr(self, "figure", figure))

    def panels(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """{y label: {label of a line: its points}}."""
        return {
            axis.get_ylabel(): {
                line.get_label(): [tuple(point) for point in line.get_xydata().tolist()]
                for line in axis.lines
            }
            for axis in self.figure.axes
        }


LOG = [
    {"step": 10, "epoch": 0.5, "loss": 2.0, "in_batch_accuracy": 0.25},
    {"step": 10, "epoch": 0.5, "eval_loss": 2.5, "eval_in_batch_accuracy": 0.125},
    {"step": 20, "epoch": 1.0, "loss": 1.0, "in_batch_accuracy": 0.5},
    {"step": 20, "epoch": 1.0, "train_loss": 1.5},
]


def test_training_has_a_panel_for_what_was_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _Kept(monkeypatch)
    plot_training(LOG, "unused")
    assert kept.panels() == {
        "loss": {"training": [(10, 2.0), (20, 1.0)], "evaluation": [(10, 2.5)]},
        "in-batch accuracy": {"training": [(10, 0.25), (20, 0.5)], "evaluation": [(10, 0.125)]},
    }
    assert kept.figure.axes[-1].get_xlabel() == "step"
    (epochs,) = kept.figure.axes[0].child_axes
    assert epochs.get_xlabel() == "epoch"
    # 20 steps are one epoch
    assert epochs.get_xlim()[1] == pytest.approx(kept.figure.axes[0].get_xlim()[1] / 20, rel=0.1)


def test_long_runs_are_smoothed_but_not_the_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _Kept(monkeypatch)
    log = [{"step": i, "loss": 1 / i, "temperature": 0.05} for i in range(1, 50)]
    plot_training(log, "unused", window=5)
    loss, temperature = kept.panels().values()
    smooth = dict(loss["training (mean of the last 5 logs)"])
    assert smooth[10] == pytest.approx(np.mean([1 / i for i in range(6, 11)]))
    assert list(temperature) == ["training"]


def test_training_is_written(tmp_path: Path) -> None:
    plot_training(LOG, tmp_path / "training.png")
    assert _is_a_picture(tmp_path / "training.png")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: plot_expert_usage({}, DOMAINS, p), "usages is empty"),
        (lambda p: plot_expert_usage({"x": np.ones((2, 1, 3))}, DOMAINS, p), r"with 3 domains"),
        (
            lambda p: plot_expert_usage({"x": np.ones((3, 2, 3))}, DOMAINS, p, layers=[1]),
            r"layers=\[1\]: usages\['x'\] has 2 layers",
        ),
        (lambda p: plot_losses({}, p), "curves: nothing to draw"),
        (lambda p: plot_losses({"x": []}, p), r"nothing to draw for \['x'\]"),
        (lambda p: plot_training([{"step": 1, "train_loss": 2.0}], p), "none of loss"),
    ],
)
def test_nothing_to_draw_is_an_error(tmp_path: Path, draw, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_running_mean_by_hand() -> None:
    np.testing.assert_allclose(running_mean([1, 3, 5, 7], 2), [1, 2, 4, 6])
    np.testing.assert_allclose(running_mean([2.0], 10), [2.0])
