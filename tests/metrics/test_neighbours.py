import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.metrics import neighbours
from lookalike.metrics.neighbours import nearest, scan

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10_000)
KINDS = ("uint8", "float32", "float64")


def draw(seed, n=12, dim=5, shift=0.0):
    return shift + np.random.default_rng(seed).normal(size=(n, dim))


def pixels(seed, n=12, shape=(1, 4, 5), levels=256):
    return np.random.default_rng(seed).integers(0, levels, (n, *shape), dtype=np.uint8)


def rows_of(kind, seed, n, levels=256, dim=None):
    if kind == "uint8":
        return pixels(seed, n, (1, 4, 5) if dim is None else (dim,), levels)
    return draw(seed, n, dim or 5).astype(kind)


def all_pairs(queries, reference):
    """Distances (N, M) from the differences of each pair, in float64."""
    a, b = (np.asarray(rows).reshape(len(rows), -1).astype(np.float64) for rows in (queries, reference))
    return np.sqrt(np.square(a[:, None] - b).sum(-1))


@pytest.fixture(params=["int8", "slabs"])
def product(request, monkeypatch):
    """Both ways of multiplying pixels: this processor's int8 product, and the one for processors without."""
    if request.param == "slabs":
        monkeypatch.setattr(neighbours, "_int8_serves", lambda: False)


@pytest.fixture(params=[2, 10**6])
def chunks(request, monkeypatch):
    """Chunks of one or two rows, and everything at once."""
    for name in ("PAIRS", "BLOCK", "BYTES"):
        monkeypatch.setattr(neighbours, name, 20 * request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [2, 256])  # with two grey levels nearly all pairs tie
def test_a_scan_equals_all_pairs(kind, levels, chunks):
    queries, reference = rows_of(kind, 0, 23, levels), rows_of(kind, 1, 34, levels)
    every = all_pairs(queries, reference)
    radii = [0, every[0, 0], every.max()] if kind == "uint8" else [0.5, 1.5, 9]
    found = scan(queries, reference, k=4, median=True, radii=radii, share=0.1)
    order = every.argsort(1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.distances, np.take_along_axis(every, order, 1), rtol=1e-7)
    np.testing.assert_allclose(found.medians, np.median(every, axis=1), rtol=1e-7)
    np.testing.assert_array_equal(found.counts, np.stack([(every <= radius).sum(1) for radius in radii], 1))
    radius = np.sort(every, axis=None)[round(0.1 * every.size) - 1]
    assert found.share_radius == pytest.approx(radius, rel=1e-7)
    np.testing.assert_array_equal(found.share_counts, (every <= radius * (1 + 1e-9)).sum(1))


@few
@given(seeds, st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 9), st.data())
def test_nearest_equals_all_pairs(seed, kind, n, m, data):
    levels, dim = data.draw(st.sampled_from([1, 2, 256])), data.draw(st.integers(1, 9))
    queries, reference = rows_of(kind, seed, n, levels, dim), rows_of(kind, seed + 1, m, levels, dim)
    every = all_pairs(queries, reference)
    found, index = nearest(queries, reference)
    np.testing.assert_allclose(found, every.min(1), rtol=1e-12)
    np.testing.assert_array_equal(index, every.argmin(1))
    everyone = scan(queries, reference, k=m)
    np.testing.assert_array_equal(everyone.indices, every.argsort(1, kind="stable"))
    assert everyone.medians is everyone.counts is everyone.share_radius is everyone.share_counts is None


@few
@given(seeds, st.sampled_from(KINDS))
def test_order_moves_rows_and_no_number(seed, kind):
    queries, reference = rows_of(kind, seed, 9), rows_of(kind, seed + 1, 14)
    settings = {"k": 3, "median": True, "radii": (2.0, 300.0), "share": 0.2}
    there, back = scan(queries, reference, **settings), scan(queries[::-1], reference[::-1], **settings)
    np.testing.assert_allclose(back.distances[::-1], there.distances, rtol=1e-9)
    np.testing.assert_allclose(back.medians[::-1], there.medians, rtol=1e-9)
    np.testing.assert_array_equal(back.counts[::-1], there.counts)
    np.testing.assert_array_equal(back.share_counts[::-1], there.share_counts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_without_itself(kind, chunks):
    rows = rows_of(kind, 0, 21)
    rows[7] = rows[3]
    every = all_pairs(rows, rows)
    others = every[~np.eye(21, dtype=bool)].reshape(21, 20)
    found = scan(rows, rows, k=2, median=True, radii=[1.0, 400.0], share=1.0, exclude_self=True)
    np.testing.assert_allclose(found.distances, np.sort(others, axis=1)[:, :2], rtol=1e-7)
    assert (found.indices != np.arange(21)[:, None]).all()
    assert (found.indices[7, 0], found.indices[3, 0]) == (3, 7)
    np.testing.assert_allclose(found.medians, np.median(others, axis=1), rtol=1e-7)
    np.testing.assert_array_equal(found.counts[:, 1], (others <= 400).sum(1))
    assert found.share_radius == pytest.approx(every.max())
    assert scan(rows, rows, k=20, exclude_self=True).distances.max() == pytest.approx(every.max())


def test_pixels_are_exact_at_the_ends_of_their_range(product):
    dim = 2**17 + 3  # products of more columns than int32 or float32 hold
    rows = np.stack([np.zeros(dim), np.full(dim, 255), np.arange(dim) % 2 * 255, np.full(dim, 254)]).astype(np.uint8)
    found = scan(rows, rows, k=4)
    every = np.square(rows[:, None].astype(np.int64) - rows).sum(-1)
    np.testing.assert_array_equal(found.distances**2 * (1 + 1e-15) // 1, np.sort(every, axis=1))
    assert found.distances[0, -1] == np.sqrt(255**2 * dim)


def test_pixels_that_differ_in_one_grey_level(product):
    reference = pixels(0, 50, (1, 40, 40))
    queries = reference.copy()
    queries[:, 0, 3, 5] ^= 1
    found, index = nearest(queries, reference)
    assert (found == 1).all()
    assert (index == np.arange(50)).all()


@pytest.mark.parametrize(("n", "m", "dim"), [(3, 5, 1), (40, 97, 1), (3, 5, 2**16 + 1)])
def test_a_single_column_is_exact(product, n, m, dim):
    queries, reference = pixels(0, n, (dim,)), pixels(1, m, (dim,))
    a, b = neighbours._signed(queries), neighbours._signed(reference)
    assert torch.equal(neighbours._products(a, b).double(), a.double() @ b.double().T)
    np.testing.assert_array_equal(scan(queries, reference, k=m).distances, np.sort(all_pairs(queries, reference), 1))


def test_products_are_exact_and_a_processor_that_saturates_is_found_out(product, monkeypatch):
    rows = torch.randint(-128, 128, (40, 3000)).to(torch.int8)
    expected = (rows.long() @ rows.long().T).double()
    assert torch.equal(neighbours._products(rows, rows).double(), expected)
    assert torch.equal(neighbours._lengths(rows), expected.diagonal())
    monkeypatch.undo()

    def saturating(a, b):
        """Pairs of products of unsigned and signed bytes summed in 16 bits, as without VNNI."""
        a, b = a.long() + 128, b.long()
        pairs = a[:, 0::2, None] * b[0::2] + a[:, 1::2, None] * b[1::2]
        return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.sum(0)).int()

    few_rows = torch.randint(-9, 9, (256, 8)).to(torch.int8)
    assert torch.equal(saturating(few_rows, few_rows.T), torch._int_mm(few_rows, few_rows.T))
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.cat([saturating(row[None], b) for row in a]))
    assert not neighbours._int8_serves.__wrapped__()


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_near_copies_far_from_the_origin(kind, every):
    reference = draw(0, 300, 500, shift=40).astype(kind)
    step = np.dtype(kind).type(1e-3) * draw(1, 300, 500).astype(kind)
    found = scan(reference + step, reference, median=every)
    exact = np.linalg.norm(((reference + step) - reference).astype(np.float64), axis=1)
    np.testing.assert_allclose(found.distances[:, 0], exact, rtol=1e-10)
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(300))


@pytest.mark.parametrize("every", [False, True])
def test_copies_that_a_float32_product_cannot_tell_apart(every):
    row, step = draw(0, 1, 500, shift=40), 1e-3 * draw(1, 200, 500)
    reference = np.concatenate([row + step, -row]).astype(np.float32)
    exact = all_pairs(row.astype(np.float32), reference)[0]
    naive = torch.cdist(torch.tensor(row).float(), torch.tensor(reference))[0].numpy()
    assert abs(naive / exact - 1).max() > 1e-2  # this is what the test is about
    between = np.sort(exact)[99:101].mean()
    found = scan(row.astype(np.float32), reference, k=7, radii=(between,) if every else ())
    np.testing.assert_array_equal(found.indices[0], exact.argsort()[:7])
    np.testing.assert_allclose(found.distances[0], np.sort(exact)[:7], rtol=1e-10)
    if every:
        assert found.counts[0, 0] == 100


@few
@given(seeds, st.floats(-25, 18), st.floats(0, 4), st.integers(1, 4))
def test_float_rows_of_any_size(seed, power, spread, k):
    """Scales from where squares are below float32's smallest number to where they are near its largest."""
    rng = np.random.default_rng(seed)
    reference = (10.0**power * (1 + 10.0**-spread * rng.normal(size=(15, 6)))).astype(np.float32)
    queries = (reference[:5] * (1 + 1e-4 * rng.normal(size=(5, 6)))).astype(np.float32)
    every = all_pairs(queries, reference)
    found = scan(queries, reference, k=k)
    np.testing.assert_allclose(found.distances, np.sort(every, axis=1)[:, :k], rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_rows_the_first_counts(kind, chunks):
    rows = np.full((40, 1, 4, 5), 3).astype(kind)
    found = scan(rows[:9] + np.array(1, kind), rows, k=3, median=True, radii=(4.0, 5.0), share=0.01)
    np.testing.assert_allclose(found.distances, 20**0.5)
    assert (found.indices == [0, 1, 2]).all()
    assert (found.counts == [0, 40]).all()
    assert (found.share_counts == 40).all()  # all pairs lie at the edge of the smallest share


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_whole_numbers_as_floats_have_exact_edges(kind, chunks):
    queries, reference = pixels(0, 60, (30,), 4), pixels(1, 70, (30,), 4)
    every = all_pairs(queries, reference)
    radii = np.sqrt([50, 60, 64, 75, 81])
    settings = {"k": 3, "median": True, "radii": radii, "share": 0.01}
    found, exact = scan(queries.astype(kind), reference.astype(kind), **settings), scan(queries, reference, **settings)
    np.testing.assert_array_equal(found.counts, np.stack([(every <= radius).sum(1) for radius in radii], 1))
    np.testing.assert_array_equal(found.indices, exact.indices)
    np.testing.assert_array_equal(found.medians, exact.medians)
    assert found.share_radius == exact.share_radius
    np.testing.assert_array_equal(found.share_counts, exact.share_counts)


@few
@given(seeds)
def test_a_pair_at_a_radius_is_inside(seed):
    """Any float rows: the radius of each pair, from its differences, holds that pair."""
    queries, reference = draw(seed, 6, 40, shift=30), draw(seed + 1, 9, 40, shift=30)
    reference[0] = 1e4  # its length is what rounding follows
    every = all_pairs(queries, reference)
    for i, radii in enumerate(every):
        counts = scan(queries[i : i + 1], reference, radii=radii * (1 + 1e-15)).counts[0]
        np.testing.assert_array_equal(counts, (radii[:, None] >= radii).sum(1))


@pytest.mark.parametrize("what", ["outlier", "clusters"])
def test_rows_that_float32_cannot_tell_apart_are_not_measured_one_by_one(what, monkeypatch):
    queries, reference = (draw(seed, 200, 60).astype(np.float32) for seed in (0, 1))
    if what == "outlier":
        reference[0] = 1e5
    else:
        queries, reference = (1e-3 * rows + np.repeat([[0], [1]], 100, 0) for rows in (queries, reference))
        queries, reference = queries.astype(np.float32), reference.astype(np.float32)
    measured, measure = [], neighbours._measure
    monkeypatch.setattr(neighbours, "_measure", lambda s, u, *rest: measured.append(u.sum()) or measure(s, u, *rest))
    found, index = nearest(queries, reference)
    every = all_pairs(queries, reference)
    np.testing.assert_allclose(found, every.min(1), rtol=1e-9)
    np.testing.assert_array_equal(index, every.argmin(1))
    assert 200 <= sum(measured) < 300  # of 40,000 pairs


def test_arrays_tensors_image_sets_and_views_agree():
    from lookalike.data import phantoms

    images = phantoms.grey28(20, seed=0, sites=1).image_set
    other = pixels(1, 30, (1, 28, 28))
    expected = scan(np.array(images.images), other, k=2)
    strided = np.repeat(other, 2, axis=0)[::2]
    for queries, reference in (
        (images, torch.tensor(other)),
        (torch.as_tensor(images.images).clone(), strided),
        (np.asarray(images.images).reshape(20, -1), np.asfortranarray(other)),
    ):
        found = scan(queries, reference, k=2)
        np.testing.assert_array_equal(found.distances, expected.distances)
        np.testing.assert_array_equal(found.indices, expected.indices)
    needs_grad = torch.tensor(draw(0), requires_grad=True)
    np.testing.assert_allclose(nearest(needs_grad, draw(1))[0], all_pairs(draw(0), draw(1)).min(1))


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_memmaps_are_read_and_left_as_they_are(tmp_path, kind, chunks):
    rows = rows_of(kind, 1, 50)
    np.save(tmp_path / "rows.npy", rows)
    queries = rows_of(kind, 0, 8)
    expected = scan(queries, rows, k=3, median=True)
    for mode in ("r", "r+", "c"):
        mapped = np.load(tmp_path / "rows.npy", mmap_mode=mode)
        if mode == "c":
            mapped[0] = rows[0]  # a private page: given back, it would be lost
        found = scan(queries, mapped, k=3, median=True)
        np.testing.assert_array_equal(found.distances, expected.distances)
        np.testing.assert_array_equal(found.medians, expected.medians)
        np.testing.assert_array_equal(mapped, rows)
    tail = np.load(tmp_path / "rows.npy", mmap_mode="r")[20:]
    np.testing.assert_array_equal(nearest(queries, tail)[0], nearest(queries, rows[20:])[0])


def test_private_changes_to_a_memmap_are_kept(tmp_path):
    np.save(tmp_path / "rows.npy", pixels(0, 50))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="c")
    mapped[:] = 7
    assert (nearest(np.full((1, 20), 7, np.uint8), mapped)[0] == 0).all()
    assert (mapped == 7).all()


def test_mixed_precisions_use_the_finer():
    queries = draw(0, 5) * 1e-9 + 1
    reference = queries[::-1] + 1e-12
    found, index = nearest(queries, reference.astype(np.float64))
    np.testing.assert_allclose(found, all_pairs(queries, reference).min(1), rtol=1e-9)
    np.testing.assert_array_equal(index, np.arange(5)[::-1])
    whole = np.array([[2**53 - 1, 0]]), np.array([[2**53 - 3, 0], [2**53 - 2, 0]])
    assert nearest(*whole)[1][0] == 1
    half = draw(0).astype(np.float16), draw(1).astype(np.float32)
    np.testing.assert_allclose(nearest(*half)[0], all_pairs(*half).min(1), rtol=1e-9)


def test_memory_stays_bounded(monkeypatch):
    """No block passes its budget whatever the sets' sizes."""
    held = []
    monkeypatch.setattr(neighbours, "PAIRS", 5000)
    monkeypatch.setattr(neighbours, "BLOCK", 900)
    squares = neighbours._pixel_squares
    monkeypatch.setattr(neighbours, "_pixel_squares", lambda a, b: held.append(len(a) * len(b)) or squares(a, b))
    summary = neighbours._summary
    monkeypatch.setattr(neighbours, "_summary", lambda d, *rest: held.append(d.size * 5) or summary(d, *rest))
    queries, reference = pixels(0, 200), pixels(1, 300)
    found = scan(queries, reference, median=True)
    assert max(held) <= 5000
    np.testing.assert_allclose(found.medians, np.median(all_pairs(queries, reference), axis=1))


def test_the_share_keeps_few_more_than_it_needs(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 300)
    most = []
    add = neighbours._Smallest.add

    def watched(self, *block):
        add(self, *block)
        most.append(self.held)

    monkeypatch.setattr(neighbours._Smallest, "add", watched)
    queries, reference = pixels(0, 100), pixels(1, 300)
    found = scan(queries, reference, share=0.01)
    assert max(most) <= 2 * 300 + 300
    assert found.share_counts.sum() >= 300 > found.share_counts.sum() - 20  # ties at the edge


def test_bad_input_is_refused_in_a_sentence():
    rows, images = draw(0), pixels(0)
    for queries, reference in ((rows[:0], rows), (rows, rows[:0]), (rows[:, :0], rows[:, :0]), (rows[0], rows)):
        with pytest.raises(ValueError, match="at least one query and one reference row"):
            nearest(queries, reference)
    with pytest.raises(ValueError, match="20 and 19 values each: give both the same size"):
        nearest(images, images.reshape(12, -1)[:, 1:])
    with pytest.raises(ValueError, match="give both in the same numbers"):
        nearest(images, images / 255)
    with pytest.raises(ValueError, match="k is 13; there are 12 reference rows, so it must be from 1 to 12"):
        scan(rows, rows, k=13)
    with pytest.raises(ValueError, match="k is 12; there are 11"):
        scan(rows, rows, k=12, exclude_self=True)
    with pytest.raises(ValueError, match="k is 0"):
        scan(rows, rows, k=0)
    with pytest.raises(ValueError, match="for a set and itself, not for 12 and 11 rows"):
        scan(rows, rows[1:], exclude_self=True)
    for share in (0, 1.5, np.nan):
        with pytest.raises(ValueError, match=r"lies in \(0, 1\]"):
            scan(rows, rows, share=share)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("median", [False, True])
def test_rows_that_are_not_finite_are_refused(value, median):
    rows, spoilt = draw(0, 300), draw(1, 300)
    spoilt[257, 3] = value
    for pair in ((rows, spoilt), (spoilt, rows)):
        with pytest.raises(ValueError, match="not finite, or too large to square"):
            scan(*pair, median=median)
