"""Weights and the whole state of a training, without pickle and safe from a kill at any moment.

A checkpoint is a numbered folder of tensors (safetensors) and everything else (JSON). The small file `latest`
names the valid one and is replaced only when the new folder is durable; the old folder goes after that. Only
state dicts are stored: Opacus keeps un-noised gradients of single images in attributes named grad_sample, and
they never leave.
"""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from lookalike.files import sync_folder, write_atomically


class CheckpointError(RuntimeError):
    """Weights or a checkpoint that cannot be written, read or fitted to a model; the message says why."""


class Checkpoint:
    """The last state of a training, in a folder of its own; an interrupted training goes on to the same bits.

    >>> checkpoint = Checkpoint(folder / "checkpoint")                                      # doctest: +SKIP
    >>> state = checkpoint.load({"vae": vae}, {"adam": adam}, {"noise": noise}) or {"epoch": 0}
    >>> for epoch in range(state["epoch"], epochs):
    ...     ...
    ...     checkpoint.save({"vae": vae}, {"adam": adam}, {"noise": noise}, {"epoch": epoch + 1})
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def save(
        self,
        modules: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        generators: dict[str, torch.Generator],
        state: dict,
        global_random: bool = True,
    ) -> None:
        """Stores them with the global random states of python, numpy and torch; `state` is the caller's JSON.

        Without `global_random` these are left out, and a resumed training draws on as it comes.

        Save between two optimizer steps: gradients are not part of a checkpoint.
        """
        tensors = {}
        document = {
            "modules": {name: _pack(_weights(module), tensors, f"modules/{name}") for name, module in modules.items()},
            "optimizers": _pack({n: o.state_dict() for n, o in optimizers.items()}, tensors, "optimizers"),
            "generators": _pack({n: g.get_state() for n, g in generators.items()}, tensors, "generators"),
            "random": _pack(_global_random_state() if global_random else {}, tensors, "random"),
            "state": _pack(state, tensors, "state"),
        }
        self._write(tensors, json.dumps(document).encode())

    def load(
        self,
        modules: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        generators: dict[str, torch.Generator],
    ) -> dict | None:
        """Restores all of it in place, global random states too; `state`, or None if nothing is saved."""
        found = self._read()
        if found is None:
            return None
        tensors, document = found
        stored = {part: _unpack(document[part], tensors) for part in ("optimizers", "generators", "random", "state")}
        weights = {name: _unpack(packed, tensors) for name, packed in document["modules"].items()}
        for part, given, saved in (
            ("modules", modules, weights),
            ("optimizers", optimizers, stored["optimizers"]),
            ("generators", generators, stored["generators"]),
        ):
            if given.keys() != saved.keys():
                raise CheckpointError(f"{self.folder} holds the {part} {sorted(saved)}, not {sorted(given)}.")
        for name, module in modules.items():
            _check_fit(f"{name} in {self.folder}", weights[name], module)
        for name, module in modules.items():
            _plain(module).load_state_dict(weights[name])
        for name, optimizer in optimizers.items():
            try:
                optimizer.load_state_dict(stored["optimizers"][name])
            except ValueError as error:
                raise CheckpointError(f"Optimizer {name} in {self.folder} does not fit: {error}.") from None
            _lay_out_as_weights(optimizer)
        for name, generator in generators.items():
            generator.set_state(stored["generators"][name])
        if stored["random"]:
            _restore_global_random_state(stored["random"])
        return stored["state"]

    def load_module(self, name: str, module: nn.Module) -> nn.Module:
        """Restores one module alone, to look at it or go on from it otherwise; random states stay as they are."""
        found = self._read()
        if found is None or name not in found[1]["modules"]:
            raise CheckpointError(f"{self.folder} holds no {name}; train it first.")
        weights = _unpack(found[1]["modules"][name], found[0])
        _check_fit(f"{name} in {self.folder}", weights, module)
        _plain(module).load_state_dict(weights)
        return module

    def _write(self, tensors: dict[str, torch.Tensor], document: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        current = self._current()
        fresh = self.folder / f"{int(current.name) + 1 if current else 1:06d}"
        shutil.rmtree(fresh, ignore_errors=True)  # half written by a save that was killed
        fresh.mkdir()
        _save_tensors(fresh / "tensors.safetensors", tensors)
        write_atomically(fresh / "state.json", document)
        sync_folder(self.folder)
        write_atomically(self.folder / "latest", fresh.name.encode())
        for old in self.folder.glob("[0-9]*"):
            if old != fresh:
                shutil.rmtree(old)

    def _current(self) -> Path | None:
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None
        name = pointer.read_text(errors="replace")
        if not name.isdigit():
            raise CheckpointError(self._damaged(f"{pointer.name} holds {name[:20]!r}"))
        return self.folder / name

    def _read(self) -> tuple[dict, dict] | None:
        current = self._current()
        if current is None:
            return None
        try:
            document = json.loads((current / "state.json").read_bytes())
            return load_file(current / "tensors.safetensors"), document
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(self._damaged(error)) from None

    def _damaged(self, why) -> str:
        return f"The checkpoint in {self.folder} is damaged ({why}): delete the folder to train from the start."


def _lay_out_as_weights(optimizer: Optimizer) -> None:
    """Moments come from a file in plain order; a fused step walks them and weights in channels_last side by side."""
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == weight.shape and value.stride() != weight.stride():
                state[key] = torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)


def save_weights(path: Path, module: nn.Module) -> None:
    """Writes a module's state dict as safetensors, atomically; an Opacus wrapper is left out of the names."""
    _save_tensors(Path(path), _weights(module))


def load_weights(path: Path, module: nn.Module) -> nn.Module:
    """Reads weights written by save_weights into a module of the same build, and returns it."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}).") from None
    _check_fit(str(path), weights, module)
    _plain(module).load_state_dict(weights)
    return module


def _plain(module: nn.Module) -> nn.Module:
    """The module inside an Opacus wrapper, or the module itself."""
    inner = getattr(module, "_module", None)
    return inner if isinstance(inner, nn.Module) else module


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    weights = _plain(module).state_dict()
    for name, value in weights.items():
        if "grad_sample" in name:
            raise CheckpointError(f"{name} holds gradients of single training images; it must not be stored.")
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}, not a tensor; it cannot be stored.")
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}


def _check_fit(source: str, weights: dict[str, torch.Tensor], module: nn.Module) -> None:
    wanted = {name: tuple(value.shape) for name, value in _plain(module).state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in weights.items()}
    complaints = [f"{name} is missing" for name in wanted if name not in stored]
    complaints += [f"{name} is not in the model" for name in stored if name not in wanted]
    complaints += [
        f"{name} is {stored[name]} there and {wanted[name]} in the model"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    if complaints:
        more = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise CheckpointError(
            f"{source} does not fit {type(_plain(module)).__name__}: {'; '.join(complaints[:3])}{more}."
        )


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary)
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


# JSON knows neither tensors, tuples nor keys that are numbers, and an optimizer's state has all three.


def _pack(value, tensors: dict[str, torch.Tensor], at: str):
    """A nested value as JSON; its tensors move to `tensors` under names that begin with `at`."""
    if isinstance(value, torch.Tensor):
        if at in tensors:
            raise CheckpointError(f"Two tensors of the checkpoint would be called {at}; rename one.")
        tensors[at] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": at}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors, f"{at}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, tensors, f"{at}/{index}") for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{at} is a {type(value).__name__}; a checkpoint holds tensors and plain JSON values.")


def _unpack(packed, tensors: dict[str, torch.Tensor]):
    if not isinstance(packed, dict):
        return packed
    [(kind, content)] = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _global_random_state() -> dict:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - libraries draw from the global state
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _restore_global_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():  # a training may be finished on a machine without its GPUs
        for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"]):
            torch.cuda.set_rng_state(device_state, device)
