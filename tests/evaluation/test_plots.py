from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.image import imread

from moe_fast.evaluation import plots
from moe_fast.evaluation.plots import plot_expert_usage, plot_losses, running_mean

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


def test_layers_that_agree_share_a_panel() -> None:
    same = np.repeat(np.eye(3)[:, None], 4, axis=1)
    panels = plots._usage_panels({"enforced": same, "learned": _usage(2)}, 3)
    assert [title for title, _ in panels] == [
        "enforced\nall 4 layers alike",
        "learned\nlayer 1 of 2",
        "learned\nlayer 2 of 2",
    ]
    np.testing.assert_array_equal(panels[0][1], np.eye(3))


def test_losses_are_drawn(tmp_path: Path) -> None:
    curves = {name: [(32 * i, 1 / i) for i in range(1, 40)] for name in ("dense", "a", "b", "c")}
    plot_losses(curves, tmp_path / "losses.png")
    assert _is_a_picture(tmp_path / "losses.png")
    plot_losses({"one point": [(1, 0.5)]}, tmp_path / "losses.svg")
    assert "svg" in (tmp_path / "losses.svg").read_text()[:300]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: plot_expert_usage({}, DOMAINS, p), "usages is empty"),
        (lambda p: plot_expert_usage({"x": np.ones((2, 1, 3))}, DOMAINS, p), r"with 3 domains"),
        (lambda p: plot_losses({}, p), "curves: nothing to draw"),
        (lambda p: plot_losses({"x": []}, p), r"nothing to draw for \['x'\]"),
    ],
)
def test_nothing_to_draw_is_an_error(tmp_path: Path, draw, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_running_mean_by_hand() -> None:
    np.testing.assert_allclose(running_mean([1, 3, 5, 7], 2), [1, 2, 4, 6])
    np.testing.assert_allclose(running_mean([2.0], 10), [2.0])
