"""Figures: what is drawn is what was given, in its place and its colour."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from lookalike import plots


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def axis():
    return plt.subplots()[1]


def star(axis):
    (found,) = [c for c in axis.collections if c.get_label() == "query"]
    return found.get_offsets()[0].tolist()


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def squares(n=5):
    images = np.zeros((n, 1, 8, 8), np.uint8)
    images[:, :, 2:5, 2:5] = 255
    return images


def test_heat_maps_stand_under_their_images_in_bands():
    maps = np.random.default_rng(0).random((5, 8, 8))
    figure = plots.plot_heatmaps(squares(), maps, list("abcde"), columns=3)
    axes = np.reshape(figure.axes[:-1], (4, 3))  # the last holds the colour bar
    for i in range(5):
        above, below = axes[2 * (i // 3), i % 3], axes[2 * (i // 3) + 1, i % 3]
        assert above.get_title() == "abcde"[i]
        assert np.array_equal(above.images[0].get_array(), squares()[i, 0])
        assert np.array_equal(below.images[0].get_array(), maps[i])
        assert below.images[0].get_clim() == (0, 1)  # one colour bar for all
    assert not axes[2, 2].images


def test_a_line_marks_the_edge_of_bright_pixels_where_there_is_one():
    images = squares(3)
    images[1] = 0
    images[2] = 255
    figure = plots.plot_heatmaps(np.repeat(images, 3, axis=1), np.ones((3, 8, 8)))  # in colour
    lines = [axis.collections for axis in figure.axes[3:6]]
    assert [len(found) for found in lines] == [1, 0, 0]
    (edge,) = lines[0][0].get_paths()
    assert edge.vertices.min() == 1.5
    assert edge.vertices.max() == 4.5


def test_heat_maps_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="5 images, 4 maps and 5 titles"):
        plots.plot_heatmaps(squares(), np.ones((4, 8, 8)))
    with pytest.raises(ValueError, match="5 images, 5 maps and 1 titles"):
        plots.plot_heatmaps(squares(), np.ones((5, 8, 8)), ["a"])


def test_density_differences_are_in_their_place_with_symmetric_limits(axis):
    points = np.array([[2.5, 0.5]] * 3)
    difference, x_edges, y_edges = np.histogram2d(*points.T, bins=(4, 2), range=((0, 4), (0, 2)))
    difference[0, 1] = -1
    mesh = plots.plot_density_difference(axis, difference, x_edges, y_edges, (2.5, 0.5))
    assert mesh.get_clim() == (-3, 3)
    mesh.update_scalarmappable()
    colours = mesh.get_facecolors().reshape(2, 4, 4)  # rows are y
    red, blue, white = colours[0, 2], colours[1, 0], colours[1, 3]
    assert red[0] > red[2] + 0.2
    assert blue[2] > blue[0] + 0.1
    assert min(white[:3]) > 0.95
    assert star(axis) == [2.5, 0.5]


def test_no_difference_is_white(axis):
    mesh = plots.plot_density_difference(axis, np.zeros((2, 2)), [0, 1, 2], [0, 1, 2], (1, 1))
    mesh.update_scalarmappable()
    assert mesh.get_facecolors().min() > 0.95


def test_maps_colour_by_label_and_alike_where_a_class_is_absent():
    _, (whole, lacking) = plt.subplots(1, 2)
    points, labels = np.arange(24.0).reshape(12, 2), np.arange(12) % 4
    plots.plot_map(whole, points, labels, (3, 4), names=["a", "b", "c", "d"])
    plots.plot_map(lacking, points[labels != 1], labels[labels != 1])
    assert legend(whole) == ["a", "b", "c", "d", "query"]
    assert legend(lacking) == ["0", "2", "3"]
    assert star(whole) == [3, 4]
    assert whole.collections[2].get_offsets().tolist() == points[labels == 2].tolist()
    for one, other in zip((0, 2, 3), range(3)):
        assert (whole.collections[one].get_facecolor() == lacking.collections[other].get_facecolor()).all()
    assert not (whole.collections[0].get_facecolor() == whole.collections[1].get_facecolor()).all()


@pytest.mark.parametrize("classes", [10, 11, 14])
def test_every_class_of_a_map_has_a_colour_of_its_own(axis, classes):
    plots.plot_map(axis, np.zeros((classes, 2)), np.arange(classes))
    assert len({tuple(drawn.get_facecolor()[0]) for drawn in axis.collections}) == classes


def test_forests_list_effects_from_the_top_and_fill_those_clear_of_zero(axis):
    rows = [("below", -2, -3, -1), ("across", 0.5, -1, 2), ("above", 4, 1, 6), ("touching", 1, 0, 2)]
    plots.plot_forest(axis, [dict(zip(("name", "value", "low", "high"), row)) for row in rows], "change")
    dots, zero = axis.lines[:-1], axis.lines[-1]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [name for name, *_ in rows]
    assert axis.yaxis_inverted()
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(row[1], i) for i, row in enumerate(rows)]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True, False, True]
    assert [tuple(bar.get_segments()[0][:, 0]) for bar in axis.collections] == [row[2:] for row in rows]
    assert list(zero.get_xdata()) == [0, 0]
    assert axis.get_xlabel() == "change"


def test_a_forest_refuses_a_value_outside_its_interval(axis):
    with pytest.raises(ValueError, match="noise: the value 3 is not within 0 to 2"):
        plots.plot_forest(axis, [{"name": "noise", "value": 3, "low": 0, "high": 2}])


def grid(n):
    return np.array([(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)]) / n


def ternary(axis, points, winners):
    plots.plot_ternary(axis, points, winners, ["one", "two", "three"], ["C0", "C1", "C2"], ("x", "y", "z"))


def test_the_heaviest_dimension_wins_at_its_own_corner(axis):
    points = grid(8)
    winners = points.argmax(1)
    winners[np.sort(points, 1)[:, -2] == points.max(1)] = -1  # ties
    ternary(axis, points, winners)
    places = {text.get_text(): text.xy for text in axis.texts}
    for name, corner, colour in (("one", "x", "C0"), ("two", "y", "C1"), ("three", "z", "C2")):
        (drawn,) = [c for c in axis.collections if c.get_label() == name]
        at = drawn.get_paths()[0].get_extents()
        centres = np.array([path.vertices[:6].mean(0) for path in drawn.get_paths()])
        distances = {other: np.linalg.norm(centres - place, axis=1).min() for other, place in places.items()}
        assert min(distances, key=distances.get) == corner
        assert distances[corner] == pytest.approx(0, abs=1e-9)
        assert tuple(drawn.get_facecolor()[0][:3]) == pytest.approx(to_rgb(colour))
        assert at.width == pytest.approx(1 / 8)
    assert legend(axis) == ["one", "two", "three", "none"]
    assert sum(len(drawn.get_paths()) for drawn in axis.collections) == len(points)


def test_cells_of_the_triangle_leave_no_gap(axis):
    ternary(axis, grid(4), np.zeros(15, int))
    (drawn,) = [c for c in axis.collections if len(c.get_paths())]
    corners = np.concatenate([path.vertices[:6] for path in drawn.get_paths()]).round(9)
    # Euler: 15 cells, 30 of their 90 edges shared by two neighbours, so 60 edges and 60 - 15 + 1 corners
    assert len(np.unique(corners, axis=0)) == 46
    assert legend(axis) == ["one"]


def test_weights_that_do_not_sum_to_one_are_refused(axis):
    for wrong in (2 * grid(4), grid(4) + [0.5, -0.25, -0.25]):
        with pytest.raises(ValueError, match="Weights are not negative and sum to 1"):
            ternary(axis, wrong, np.zeros(15, int))


def test_an_animation_goes_there_and_back():
    frames = np.stack([np.full((4, 6), level, np.uint8) for level in (0, 100, 200)])
    picture = Image.open(io.BytesIO(plots.animate(frames, enlarged=2)))
    assert (picture.n_frames, picture.size) == (4, (12, 8))
    levels = []
    for k in range(4):
        picture.seek(k)
        levels.append(int(np.asarray(picture)[0, 0]))
    assert levels == [0, 100, 200, 100]
