"""Data: verified files, image sets with their terms and subjects, made stand-ins, and splits that keep
subjects whole.
"""

from lookalike.data.datasets import ImageSet, as_tensor, load, names, to_uint8
from lookalike.data.manifest import DataError, fetch
from lookalike.data.splits import exact_duplicates, subject_split

__all__ = [
    "DataError",
    "ImageSet",
    "as_tensor",
    "exact_duplicates",
    "fetch",
    "load",
    "names",
    "subject_split",
    "to_uint8",
]
