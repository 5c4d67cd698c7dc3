"""What the stages in test_stages.py do; worker processes import this file, so it imports little."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lookalike.files import read_json
from lookalike.training.checkpoint import Checkpoint, save_weights

CHAPTER = """---
chapter: toy
kernelspec: {name: python3, display_name: Python 3, language: python}
---
# Toy

```{code-cell} ipython3
:tags: [parameters]

seed: int = 0
run_name: str = "small"
```
"""


def start(run_name="small", resume=False, seed=0):
    """A run of the chapter that the fixture `book` writes."""
    from lookalike.results import Run

    return Run("toy", {"seed": seed, "run_name": run_name}, resume)


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def draw(folder, scale=1.0):
    (folder / "pid").write_text(str(os.getpid()))
    print("drawing")
    values = [random.random(), np.random.random(), torch.rand(()).item()]  # noqa: NPY002 - what a stage may do
    return {"values": [scale * value for value in values], "threads": torch.get_num_threads()}


def save_net(folder):
    save_weights(folder / "weights.safetensors", net())
    return {}


def count_calls(folder, step=1):
    calls = folder / "calls"
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    return {"calls": len(calls.read_text()), "step": step}


def read_other(folder, other, cache=None, run=None):
    return {"step": read_json(Path(other) / "result.json")["result"]["step"]}


def sleep(folder):
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
    return {}


def fail(folder):
    raise ValueError("no images")


def vanish(folder):
    os._exit(1)


def return_nothing(folder):
    return None


def train(folder, epochs):
    """Dropout draws from the global state, batches from a generator, Adam has moments: all must come back."""
    model = net()
    adam, batches = torch.optim.Adam(model.parameters(), lr=0.01), torch.Generator().manual_seed(1)
    checkpoint = Checkpoint(folder / "checkpoint")
    parts = {"net": model}, {"adam": adam}, {"batches": batches}
    state = checkpoint.load(*parts) or {"epoch": 0}
    for epoch in range(state["epoch"], epochs):
        for step in range(3):
            adam.zero_grad()
            model(torch.rand(5, 4, generator=batches)).square().mean().backward()
            adam.step()
            if os.environ.get("KILL_AT") == f"{epoch}.{step}":
                os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("KILL_AT") == f"{epoch}.save":
            die_in_the_next_write()
        checkpoint.save(*parts, {"epoch": epoch + 1})
    save_weights(folder / "net.safetensors", model)
    return {"first": state["epoch"]}


def die_in_the_next_write():
    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killed
