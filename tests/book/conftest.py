"""A project of its own in a temporary folder: one small chapter, its scales and its reported numbers."""

import shutil
from pathlib import Path

import pytest

from lookalike import paths

FRONT = """\
---
chapter: tiny
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A tiny chapter

Some text.

```{code-cell} ipython3
:tags: [parameters]

seed: int = 0
epochs: int = 2                  # paper: 500 (Sec. 3.2)
lr: float = 0.1
sigmas: list = [1.0]
names: list[str] = []
private: bool = False
run_name: str = "small"
```
"""


def cell(source: str) -> str:
    return f"\n```{{code-cell}} ipython3\n{source}\n```\n"


@pytest.fixture
def write_chapter(tmp_path, monkeypatch):
    """write_chapter(*cells) -> path: the project's only chapter, these code cells after its parameters."""
    for name in ("chapters", "params", "reported"):
        (tmp_path / "book" / name).mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    shutil.copy(paths.project_root() / "data_manifest.yaml", tmp_path)
    (tmp_path / "book/params/tiny.medium.yaml").write_text("epochs: 30\nsigmas: [0.5, 1]\nrun_name: medium\n")
    monkeypatch.setenv("LOOKALIKE_ROOT", str(tmp_path))
    monkeypatch.delenv("LOOKALIKE_RUNS", raising=False)

    def write(*cells: str) -> Path:
        path = tmp_path / "book/chapters/tiny.md"
        path.write_text(FRONT + "".join(map(cell, cells)))
        return path

    return write
