import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data import phantoms
from lookalike.metrics import diversity
from lookalike.metrics.diversity import fit_umap, tsne, vendi_score

few = settings(max_examples=25, deadline=None)


def draw(seed, n=12, dim=5):
    return np.random.default_rng(seed).normal(size=(n, dim))


def vendi_by_matrix(rows):
    """Eq. 3 as it stands: the whole kernel matrix, its eigenvalues, their entropy."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(unit @ unit.T / len(rows))
    return np.exp(-sum(share * np.log(share) for share in shares if share > 1e-15))


@few
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
def test_vendi_equals_the_definition_and_stays_in_its_range(n, dim, seed):
    rows = draw(seed, n, dim)
    assert vendi_score(rows) == pytest.approx(vendi_by_matrix(rows), rel=1e-9)
    assert 1 - 1e-9 <= vendi_score(rows) <= min(n, dim) + 1e-9


@pytest.mark.parametrize(("n", "dim"), [(7, 3), (3, 7)])
def test_vendi_of_equal_rows_is_one(n, dim):
    assert vendi_score(np.tile(draw(0, 1, dim), (n, 1))) == pytest.approx(1)


@pytest.mark.parametrize("dim", [6, 9])
def test_vendi_of_orthogonal_rows_is_their_number(dim):
    basis, _ = np.linalg.qr(draw(0, dim, dim))
    assert vendi_score(basis[:6]) == pytest.approx(6)


def test_vendi_of_groups_is_the_entropy_of_their_shares():
    """Groups of 1, 2 and 5 equal images, orthogonal to one another."""
    shares = np.array([1, 2, 5]) / 8
    assert vendi_score(np.repeat(np.eye(3), [1, 2, 5], axis=0)) == pytest.approx(np.exp(-shares @ np.log(shares)))


@few
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_vendi_heeds_neither_scale_nor_order_nor_a_second_copy_of_all(seed, scale):
    rows = draw(seed)
    changed = np.concatenate([scale * rows[::-1], rows])
    assert vendi_score(changed) == pytest.approx(vendi_score(rows), rel=1e-9)


def test_vendi_refuses_what_has_no_direction():
    with pytest.raises(ValueError, match="no direction"):
        vendi_score(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"not \(0, 4\)"):
        vendi_score(np.zeros((0, 4)))


@pytest.fixture(scope="module")
def images():
    return phantoms.grey28(150, seed=0, image_size=16).image_set.images


@pytest.fixture(scope="module")
def fitted(images):
    return fit_umap(images, n_neighbors=10, seed=3)


def test_the_map_is_that_of_umap_learn(images, fitted):
    """The same neighbours in, the same map out: at this size umap-learn finds them exactly too."""
    from umap import UMAP

    plain = UMAP(n_neighbors=10, min_dist=0.0, random_state=3, n_jobs=1)
    np.testing.assert_allclose(fitted.points, plain.fit_transform(images.reshape(150, -1)), atol=1e-3)


def test_a_map_repeats(images, fitted):
    new = phantoms.grey28(20, seed=1, image_size=16).image_set.images
    again = fit_umap(images, n_neighbors=10, seed=3)
    assert np.array_equal(again.points, fitted.points)
    assert np.array_equal(again.transform(new), fitted.transform(new))
    assert np.array_equal(again.points, fitted.points)  # new images move nothing


def test_new_images_fall_where_their_neighbours_lie(images, fitted):
    """Slightly noisy copies of real images land beside the originals, others' copies do not."""
    noise = np.random.default_rng(0).integers(-2, 3, images[:30].shape)
    copies = np.clip(images[:30].astype(int) + noise, 0, 255).astype(np.uint8)
    placed = fitted.transform(copies)
    gap = np.linalg.norm(placed - fitted.points[:30], axis=1)
    stranger = np.linalg.norm(placed - fitted.points[30:60], axis=1)
    assert np.median(gap) < 0.5 * np.median(stranger)


def test_the_fitted_images_themselves_fall_on_their_points(images, fitted):
    assert np.array_equal(fitted.transform(images), fitted.points)


def test_a_map_has_as_many_axes_as_asked_and_the_plane_stays_the_plane(images, fitted):
    """In eight axes copies lie beside their originals too, which a map of the wrong points would not do."""
    deep = fit_umap(images, n_neighbors=10, seed=3, n_components=8)
    assert deep.points.shape == (150, 8)
    assert deep.points.std(0).min() > 0.05  # every axis is used
    noise = np.random.default_rng(0).integers(-2, 3, images[:30].shape)
    copies = np.clip(images[:30].astype(int) + noise, 0, 255).astype(np.uint8)
    placed = deep.transform(copies)
    assert placed.shape == (30, 8)
    gap, stranger = (np.linalg.norm(placed - deep.points[rows], axis=1) for rows in (slice(30), slice(30, 60)))
    assert np.median(gap) < 0.5 * np.median(stranger)
    flat = fit_umap(images, n_neighbors=10, seed=3, n_components=2)
    assert np.array_equal(flat.points, fitted.points)


def test_bad_input_gets_a_sentence(images, fitted):
    with pytest.raises(ValueError, match="1 to 148 components, not 149"):
        fit_umap(images, n_components=149)
    with pytest.raises(ValueError, match="components, not 0"):
        fit_umap(images, n_components=0)
    with pytest.raises(ValueError, match="20 neighbours needs more images than that, not 8"):
        fit_umap(images[:8])
    with pytest.raises(ValueError, match=r"256 numbers \(uint8\) an image; these have 256 \(float32\)"):
        fitted.transform(images / 255)
    with pytest.raises(ValueError, match="these have 64"):
        fitted.transform(images[:, :, :8, :8])
    with pytest.raises(ValueError, match="perplexity of 30 needs more images"):
        tsne(images[:10], images[10:20])


def test_stand_ins_keep_distances_and_do_not_depend_on_chunks(monkeypatch):
    rows = np.random.default_rng(0).integers(0, 256, (10, 900)).astype(np.uint8)
    whole = diversity._stand_in(rows, seed=0)
    monkeypatch.setattr(diversity, "AT_ONCE", 2000)
    np.testing.assert_allclose(diversity._stand_in(rows, seed=0), whole, rtol=1e-5, atol=1e-2)
    ratio = np.linalg.norm(whole[1:] - whole[0], axis=1) / np.linalg.norm(rows[1:] - rows[0].astype(float), axis=1)
    assert np.all(np.abs(ratio - 1) < 0.4)


def test_tsne_keeps_far_sets_apart_and_repeats():
    sets = draw(0, 14), draw(1, 10) + 50
    near, far = tsne(*sets, perplexity=4)
    assert near.shape == (14, 2)
    assert far.shape == (10, 2)
    middle, towards = (near.mean(0) + far.mean(0)) / 2, far.mean(0) - near.mean(0)
    assert ((near - middle) @ towards < 0).all()
    assert ((far - middle) @ towards > 0).all()
    assert all(np.array_equal(a, b) for a, b in zip((near, far), tsne(*sets, perplexity=4)))
