"""Lets `pytest --nbmake` execute the book's text notebooks.

nbmake knows only .ipynb. Here each chapter becomes build/nb/<its path>.ipynb, is executed there with its
small defaults and keeps its outputs beside the run's record: the book shows them where no larger run is kept.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from lookalike import paths, runner

# The kernel of this environment, even where the machine has another one of the same name.
os.environ["JUPYTER_PATH"] = os.path.join(sys.prefix, "share", "jupyter")


def pytest_collect_file(file_path: Path, parent):
    if parent.config.getoption("nbmake") and file_path.parent == paths.chapters_dir() and file_path.suffix == ".md":
        return _text_notebook().from_parent(parent, path=file_path)
    return None


def _text_notebook():
    import nbformat
    from nbmake.pytest_items import NotebookFile, NotebookItem

    from lookalike.keep import strip

    class Chapter(NotebookItem):
        def runtest(self):
            notebook = Path(self.filename)
            notebook.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(runner.read_chapter(self.path), notebook)
            self.config.option.overwrite = True  # keep the outputs; the source is never written
            notebook.with_suffix(".json").unlink(missing_ok=True)
            started = time.time()
            os.environ["LOOKALIKE_RESUME"] = "0"  # a page's outputs come from one whole run
            super().runtest()
            record = paths.runs_dir() / self.path.stem / "small" / "run.json"
            if record.stat().st_mtime < started or not json.loads(record.read_text("utf-8"))["finished"]:
                raise AssertionError(f"{self.path.name} must save its small run with run.save()")
            executed = nbformat.read(notebook, as_version=4)
            strip(executed)
            nbformat.write(executed, notebook)
            shutil.copy(record, notebook.with_suffix(".json"))

    class ChapterFile(NotebookFile):
        def collect(self):
            yield Chapter.from_parent(self, filename=str(paths.small_notebook(self.path.stem)))

    return ChapterFile
