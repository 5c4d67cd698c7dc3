"""Fixtures shared by the library's tests."""

import os

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

# a busy machine is no bug; in CI hypothesis' own profile has no deadline either
hypothesis.settings.register_profile("here", deadline=None)
if "CI" not in os.environ:
    hypothesis.settings.load_profile("here")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Several test processes share two cores; more threads than cores make torch many times slower."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache; one that needs an empty cache takes its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOKALIKE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny_images():
    """Eight 28 px images in [-1, 1] with labels of four classes: bright squares at a place that depends on the
    class.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 4
    images = 0.1 * torch.rand(8, 1, 28, 28, generator=generator) - 1
    for image, label in zip(images, labels):
        row, column = 14 * (label // 2), 14 * (label % 2)
        image[:, row + 3 : row + 11, column + 3 : column + 11] = 0.9
    return images.clamp(-1, 1), labels
