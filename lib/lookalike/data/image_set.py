"""ImageSet, the one form in which data reaches a chapter, and the way to tensors and back."""

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ORIGINS = ("real", "embedded", "phantom", "synthetic")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels, subjects and the terms of their use.

    images uint8 (N, C, H, W); labels int64 (N,), an index into `classes`; subjects str (N,): rows with an
    equal subject show one person, lesion or exam and belong on one side of a split. `subject_kind` says which
    of these it is; "image" means that nobody knows, and every image has a subject of its own. `origin` is
    "real", "embedded" (real images inside a dependency), "phantom" (made by a formula) or "synthetic" (made
    by somebody's generator).
    """

    images: np.ndarray
    labels: np.ndarray
    subjects: np.ndarray
    classes: tuple[str, ...]
    name: str
    split: str
    licence: str
    restricted: bool
    origin: str
    stand_in_for: str = ""
    subject_kind: str = "image"

    def __post_init__(self):
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"{self.name}: images must be uint8 (N, C, H, W), not {self.images.dtype} {self.images.shape}."
            )
        if self.labels.dtype != np.int64 or self.labels.shape != (len(self),):
            raise ValueError(
                f"{self.name}: labels must be int64 ({len(self)},), not {self.labels.dtype} {self.labels.shape}."
            )
        if self.subjects.dtype.kind != "U" or self.subjects.shape != (len(self),):
            raise ValueError(f"{self.name}: subjects must be {len(self)} strings, one per image.")
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"{self.name}: labels run outside 0..{len(self.classes) - 1}.")
        if self.origin not in ORIGINS:
            raise ValueError(f"{self.name}: origin is {self.origin!r}, but must be one of {', '.join(ORIGINS)}.")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices) -> "ImageSet":
        """The chosen rows, in the order given; `indices` are integers or one boolean per row."""
        indices = np.asarray(indices)
        if not indices.size:
            indices = indices.astype(int)
        return dataclasses.replace(
            self, images=self.images[indices], labels=self.labels[indices], subjects=self.subjects[indices]
        )

    def first_per_class(self, k: int, classes=None) -> "ImageSet":
        """The first k images of each class in stored order, class after class (all classes, or those label
        indices).
        """
        rows = []
        for label in range(len(self.classes)) if classes is None else classes:
            found = np.flatnonzero(self.labels == label)
            if len(found) < k:
                raise ValueError(
                    f"{self.name} ({self.split}) has {len(found)} images of class {self.classes[label]!r}, not {k}."
                )
            rows.append(found[:k])
        return self.subset(np.concatenate(rows) if rows else [])

    @cached_property
    def content_hash(self) -> str:
        """sha256 over shape and bytes of images and labels: equal exactly when a model would see the same
        data.
        """
        digest = hashlib.sha256()
        for array in (self.images, self.labels):
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def describe(self) -> str:
        """One sentence for a page: what it is, how many, whose, and under which terms."""
        shape = " x ".join(str(side) for side in self.images.shape[1:])
        counts = ", ".join(f"{name} {count:,}" for name, count in zip(self.classes, self._class_counts()))
        whose = (
            "no patient ids, so each image counts as its own subject"
            if self.subject_kind == "image"
            else f"{len(np.unique(self.subjects)):,} {self.subject_kind}s"
        )
        terms = f"licence: {self.licence}" + ("; restricted, not to be shown or passed on" if self.restricted else "")
        stand_in = f"; a stand-in for {self.stand_in_for}" if self.stand_in_for else ""
        return (
            f"{self.name} ({self.split}): {len(self):,} {self.origin} images of {shape} ({counts}); "
            f"{whose}; {terms}{stand_in}."
        )

    def _class_counts(self):
        return np.bincount(self.labels, minlength=len(self.classes))


def as_tensor(images):
    """uint8 images (N, C, H, W), or an ImageSet, as float32 tensor in [-1, 1]."""
    import torch  # takes seconds; listing and fetching data should not

    images = images.images if isinstance(images, ImageSet) else images
    if images.dtype != np.uint8:
        raise ValueError(f"as_tensor takes uint8 images, not {images.dtype}.")
    return torch.tensor(np.ascontiguousarray(images), dtype=torch.float32).div_(127.5).sub_(1)


def to_uint8(images) -> np.ndarray:
    """A float tensor in [-1, 1] as uint8 array, rounded; undoes `as_tensor` exactly. Values outside are
    clipped.
    """
    import torch

    return images.detach().float().cpu().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).numpy()
