"""Rounds through Flower are those of `run_rounds`. Runs where flwr is installed; else only the refusals do."""

import builtins
import sys

import pytest
import torch
from test_federated import fake_clients

from lookalike.training import federated_flower
from lookalike.training.federated import EXCHANGED, run_rounds
from lookalike.training.federated_flower import flower_rounds


def test_without_flower_one_sentence_says_what_to_install(monkeypatch):
    def absent(name, *args, **kwargs):
        if name.split(".")[0] == "flwr":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'flwr==1.41"):
        flower_rounds(fake_clients(), rounds=1, iterations=1)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", type(sys)("flwr"))
    sys.modules["flwr"].__version__ = "1.42.0"
    with pytest.raises(ImportError, match=r"must be 1.41.\*, not 1.42.0"):
        federated_flower.require_flower()


@pytest.mark.flower
@pytest.mark.parametrize("weighting", ["samples", "equal"])
@pytest.mark.parametrize("exchanged", [EXCHANGED, ("generator", "ema")])
def test_flower_s_rounds_are_ours(weighting, exchanged):
    pytest.importorskip("flwr")
    first, second = fake_clients(), fake_clients()
    ours = run_rounds(first, 3, 4, weighting, exchanged)
    theirs = flower_rounds(second, 3, 4, weighting, exchanged)
    assert ours["shared"].keys() == theirs["shared"].keys()
    for name, value in ours["shared"].items():
        torch.testing.assert_close(theirs["shared"][name], value, atol=1e-6, rtol=0)
    for a, b in zip(first, second):
        for part in EXCHANGED:
            for x, y in zip(getattr(a, part).state_dict().values(), getattr(b, part).state_dict().values()):
                torch.testing.assert_close(x, y, atol=1e-6, rtol=0)
    for mine, other in zip(ours["rounds"], theirs["rounds"]):
        assert mine["round"] == other["round"]
        assert [row["images_seen"] for row in mine["clients"]] == [row["images_seen"] for row in other["clients"]]
        norms = [[row["update_norm"] for row in of["clients"]] for of in (mine, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.flower
def test_flower_leaves_no_task_behind():
    pytest.importorskip("flwr")
    from flwr.supercore.task_identity import TaskIdentity

    before = TaskIdentity._run_id
    flower_rounds(fake_clients(), rounds=1, iterations=1)
    assert TaskIdentity._run_id == before


@pytest.mark.flower
def test_whole_numbers_are_not_averaged_by_flower():
    pytest.importorskip("flwr")
    clients = fake_clients()
    for client in clients:
        client.discriminator.register_buffer("steps", torch.tensor(3))
    with pytest.raises(ValueError, match=r"whole numbers of discriminator\.steps"):
        flower_rounds(clients, rounds=1, iterations=1)
