"""A checkpoint brings everything back, survives a kill at any write, and holds nothing private."""

import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lookalike.training import checkpoint as module
from lookalike.training.checkpoint import Checkpoint, CheckpointError, load_weights, save_weights


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the library may catch it."""


def parts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    adam = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.5, 0.9))
    return {"net": net}, {"adam": adam}, {"noise": torch.Generator().manual_seed(5)}


def step(modules, optimizers, generators):
    loss = modules["net"](torch.rand(6, 3, generator=generators["noise"])).square().sum()
    optimizers["adam"].zero_grad()
    loss.backward()
    optimizers["adam"].step()
    return [loss.item(), random.random(), np.random.random(), torch.rand(()).item()]  # noqa: NPY002


def test_nothing_saved_is_none(tmp_path):
    assert Checkpoint(tmp_path / "new").load(*parts()) is None


def test_everything_comes_back(tmp_path):
    trained = parts()
    step(*trained)
    state = {"epoch": 3, "history": [(0.5, 0.1, 7)], "best": float("inf"), "note": None}
    Checkpoint(tmp_path).save(*trained, state)
    expected = [step(*trained), step(*trained)]

    fresh = parts()
    fresh[1]["adam"].param_groups[0]["lr"] = 9.0
    assert Checkpoint(tmp_path).load(*fresh) == state  # tuples included
    assert [step(*fresh), step(*fresh)] == expected
    for ours, theirs in zip(fresh[0]["net"].parameters(), trained[0]["net"].parameters()):
        assert torch.equal(ours, theirs)
    assert fresh[1]["adam"].param_groups[0]["lr"] == 0.01
    assert fresh[1]["adam"].param_groups[0]["betas"] == (0.5, 0.9)


def test_only_the_newest_is_kept(tmp_path):
    for epoch in range(3):
        Checkpoint(tmp_path).save(*parts(), {"epoch": epoch})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000003", "latest"]
    assert Checkpoint(tmp_path).load(*parts()) == {"epoch": 2}


def test_a_kill_at_any_step_of_a_save_leaves_a_checkpoint(tmp_path, monkeypatch):
    """Every call that touches the disk is the last one once: first the old state counts, then the new one."""
    found = []
    while True:
        folder = tmp_path / str(len(found))
        Checkpoint(folder).save(*parts(), {"epoch": 1})
        with monkeypatch.context() as patch:
            calls_left = iter(range(len(found), -1, -1))
            for owner, name in [(os, "fsync"), (os, "replace"), (module, "save_file"), (shutil, "rmtree")]:
                patch.setattr(owner, name, _killing(getattr(owner, name), calls_left))
            try:
                Checkpoint(folder).save(*parts(), {"epoch": 2})
                break
            except Killed:
                pass
        found.append(Checkpoint(folder).load(*parts())["epoch"])
        Checkpoint(folder).save(*parts(), {"epoch": 3})
        assert Checkpoint(folder).load(*parts()) == {"epoch": 3}
    assert len(found) > 8
    assert found == sorted(found)
    assert set(found) == {1, 2}


def _killing(function, calls_left):
    def call(*args, **kwargs):
        if not next(calls_left):
            raise Killed
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_truncated_file_is_a_sentence(tmp_path, name):
    Checkpoint(tmp_path).save(*parts(), {})
    path = tmp_path / "000001" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"is damaged .*: delete the folder to train from the start"):
        Checkpoint(tmp_path).load(*parts())


def test_lost_or_garbled_pointer_target_is_a_sentence(tmp_path):
    Checkpoint(tmp_path).save(*parts(), {})
    (tmp_path / "latest").write_text("000009")
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint(tmp_path).load(*parts())
    (tmp_path / "latest").write_bytes(b"\0\0\0")
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint(tmp_path).load(*parts())


def test_another_model_is_refused_before_anything_changes(tmp_path):
    Checkpoint(tmp_path).save(*parts(), {})
    modules, optimizers, generators = parts()
    wider = {"net": nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2))}
    before = wider["net"][0].weight.clone()
    with pytest.raises(CheckpointError, match=r"0.weight is \(4, 3\) there and \(5, 3\) in the model"):
        Checkpoint(tmp_path).load(wider, optimizers, generators)
    assert torch.equal(wider["net"][0].weight, before)
    with pytest.raises(CheckpointError, match=r"holds the modules \['net'\], not \['vae'\]"):
        Checkpoint(tmp_path).load({"vae": modules["net"]}, optimizers, generators)
    two_groups = torch.optim.AdamW([{"params": [p]} for p in modules["net"].parameters()])
    with pytest.raises(CheckpointError, match=r"Optimizer adam .* does not fit"):
        Checkpoint(tmp_path).load(modules, {"adam": two_groups}, generators)


def test_state_that_is_not_plain_is_refused_and_the_old_checkpoint_stays(tmp_path):
    Checkpoint(tmp_path).save(*parts(), {"epoch": 1})
    with pytest.raises(CheckpointError, match="state/model is a Linear"):
        Checkpoint(tmp_path).save(*parts(), {"model": nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match="Two tensors"):
        Checkpoint(tmp_path).save(*parts(), {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}})
    assert Checkpoint(tmp_path).load(*parts()) == {"epoch": 1}


def test_weights_round_trip_and_shared_tensors(tmp_path):
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    save_weights(tmp_path / "new/folder/w.safetensors", tied)
    other = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    assert load_weights(tmp_path / "new/folder/w.safetensors", other) is other
    for name, value in tied.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_misfit_names_the_first_keys(tmp_path):
    save_weights(tmp_path / "w.safetensors", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    sentence = "does not fit Linear: weight is missing; bias is missing; 0.bias is not in the model and 3 more"
    with pytest.raises(CheckpointError, match=sentence):
        load_weights(tmp_path / "w.safetensors", nn.Linear(3, 4))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_weights(tmp_path / "absent.safetensors", nn.Linear(3, 4))


def test_private_gradients_are_never_stored(tmp_path):
    """After a DP-SGD step Opacus holds each image's gradient; the published files must not."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    net = nn.Linear(3, 2)
    wrapped = GradSampleModule(net)
    adam = DPOptimizer(
        torch.optim.Adam(net.parameters()), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
    )
    wrapped(torch.rand(4, 3, requires_grad=True)).sum().backward()
    adam.step()
    assert net.weight.grad_sample.shape == (4, 2, 3)
    save_weights(tmp_path / "w.safetensors", wrapped)
    assert set(load_file(tmp_path / "w.safetensors")) == {"weight", "bias"}
    assert (tmp_path / "w.safetensors").stat().st_size < 300
    load_weights(tmp_path / "w.safetensors", nn.Linear(3, 2))

    Checkpoint(tmp_path / "c").save({"net": wrapped}, {"adam": adam}, {}, {})
    stored = load_file(tmp_path / "c/000001/tensors.safetensors")
    assert not any(value.shape[:1] == (4,) for value in stored.values())
    assert not any("grad" in name for name in stored)
    plain = nn.Linear(3, 2)
    assert Checkpoint(tmp_path / "c").load({"net": plain}, {"adam": torch.optim.Adam(plain.parameters())}, {}) == {}
    assert torch.equal(plain.weight, net.weight)


def test_a_buffer_with_private_gradients_is_refused(tmp_path):
    net = nn.Linear(3, 2)
    net.register_buffer("grad_sample", torch.zeros(4, 2, 3))
    with pytest.raises(CheckpointError, match="grad_sample holds gradients of single training images"):
        save_weights(tmp_path / "w.safetensors", net)
    with pytest.raises(CheckpointError, match="grad_sample holds gradients"):
        Checkpoint(tmp_path).save({"net": net}, {}, {}, {})
    assert not list(tmp_path.iterdir())


def test_foreign_weights_with_private_gradients_do_not_fit(tmp_path):
    save_file(
        {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "weight.grad_sample": torch.zeros(4, 2, 3)},
        tmp_path / "w",
    )
    with pytest.raises(CheckpointError, match=r"weight\.grad_sample is not in the model"):
        load_weights(tmp_path / "w", nn.Linear(3, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_random_state_and_moments_come_back(tmp_path):
    def gpu_parts():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).cuda()
        return {"net": net}, {"adam": torch.optim.Adam(net.parameters())}, {"noise": torch.Generator("cuda")}

    def gpu_step(modules, optimizers, generators):
        loss = modules["net"](torch.rand(6, 3, generator=generators["noise"], device="cuda")).square().sum()
        optimizers["adam"].zero_grad()
        loss.backward()
        optimizers["adam"].step()
        return loss.item()

    trained = gpu_parts()
    gpu_step(*trained)
    Checkpoint(tmp_path).save(*trained, {})
    expected = [gpu_step(*trained), gpu_step(*trained)]
    fresh = gpu_parts()
    Checkpoint(tmp_path).load(*fresh)
    assert [gpu_step(*fresh), gpu_step(*fresh)] == expected
