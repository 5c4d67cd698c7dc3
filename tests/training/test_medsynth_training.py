"""Training MedSynth: inputs, balanced batches, the copying optimum, resuming, privacy, and what the stages leave."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from lookalike.data import datasets
from lookalike.data.image_set import ImageSet
from lookalike.models.attention_gan import Critic, Generator
from lookalike.models.vits import lora_vit
from lookalike.privacy.dpsgd import Privacy
from lookalike.training import medsynth
from lookalike.training.checkpoint import Checkpoint

SMALL = {"image_size": 8, "channels": 1, "num_classes": 3}
PRIVACY = Privacy(1.0, 0.5, 6, 0.05)
STAGE = {"data": "toy", "image_size": 8, "seed": 0, "epochs": 1}
GAN = {"conv_dim": 4, "blocks": 1, "critic_width": 2, "batch_size": 6, "n_critic": 1}
DIMS = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
LABELS = np.array([0] * 8 + [1] * 5 + [2] * 2)


def toy(n_seed=0, name="toy", split="train"):
    """Fifteen 8 px images whose place of a bright square is their class; each has a level of its own."""
    g = np.random.default_rng(n_seed)
    images = g.integers(0, 60, (len(LABELS), 1, 8, 8))
    for image, label, level in zip(images, LABELS, g.integers(120, 256, len(LABELS))):
        image[:, :, 2 * label : 2 * label + 3] = level
    subjects = np.array([f"s{i // 2}" for i in range(len(LABELS))])
    return ImageSet(
        images.astype(np.uint8), LABELS.astype(np.int64), subjects, ("a", "b", "c"), name, split, "none", False,
        "phantom", subject_kind="subject",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def toy_data(monkeypatch):
    sets = {("toy", "train"): toy(), ("toy", "test"): toy(1, split="test"), ("elsewhere", "train"): toy(2, "elsewhere")}
    monkeypatch.setattr(datasets, "load", lambda name, split="train", image_size=None: sets[name, split])


@pytest.fixture
def data():
    return datasets.as_tensor(toy()), torch.as_tensor(toy().labels)


def networks(seed=0):
    torch.manual_seed(seed)
    return Generator(**SMALL, conv_dim=4, blocks=1), Critic(**SMALL, width=2)


def train(data, nets=None, **settings):
    nets = nets or networks()
    usual = {"source": "noise", "epochs": 2, "batch_size": 6, "n_critic": 1}
    torch.manual_seed(1)
    return nets, medsynth.train_gan(*nets, *data, **usual | settings, generator=torch.Generator().manual_seed(1))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def linear_classifier():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).requires_grad_(False)


def test_inputs_are_the_real_images_another_sites_or_noise(data):
    images, labels = data
    assert medsynth.inputs("real", labels, images) is images
    other = datasets.as_tensor(toy(2))
    found = medsynth.inputs("other", labels, images, other, None, torch.Generator().manual_seed(0))
    rows = (found[:, None] == other[None]).flatten(2).all(2)
    assert (rows.sum(1) == 1).all()
    assert len(set(rows.long().argmax(1).tolist())) > 5
    noise = medsynth.inputs(
        "noise", torch.zeros(400).long(), noise=networks()[0].noise, generator=torch.Generator().manual_seed(0)
    )
    assert noise.shape == (400, 1, 8, 8)
    assert noise.abs().max() == 1
    assert noise.std().item() == pytest.approx(0.4797, abs=0.005)  # of a normal, halved and clamped to [-1, 1]
    for source, match in (("real", "`real`"), ("other", "`other`"), ("dream", "source must be")):
        with pytest.raises(ValueError, match=match):
            medsynth.inputs(source, labels)


def test_balanced_rows_take_classes_alike_and_their_rows_alike():
    labels = torch.tensor([3] * 50 + [0] * 5 + [3] * 40 + [5])  # unsorted, and classes 1, 2, 4 are absent
    rows = medsynth.balanced_rows(labels, 30_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(labels[rows], minlength=6) / 30_000
    np.testing.assert_allclose(counts, [1 / 3, 0, 0, 1 / 3, 0, 1 / 3], atol=0.01)
    share = torch.bincount(rows, minlength=len(labels)) / 30_000
    np.testing.assert_allclose(share[50:55], 1 / 15, atol=0.006)
    np.testing.assert_allclose(share[:50], 1 / 270, atol=0.002)
    with pytest.raises(ValueError, match="no images"):
        medsynth.balanced_rows(torch.zeros(0).long(), 3)


def test_batches_of_the_loop_are_balanced_unless_asked_otherwise(data):
    seen = {}
    for balanced in (True, False):
        drawn = torch.cat(list(medsynth._batches(data[1], 5, balanced, None, torch.Generator().manual_seed(0))))
        seen[balanced] = drawn
    assert sorted(seen[False].tolist()) == list(range(15))
    assert len(seen[True]) == 15
    many = torch.cat([torch.cat(list(medsynth._batches(data[1], 5, True, None, g))) for g in [torch.Generator()] * 100])
    np.testing.assert_allclose(torch.bincount(data[1][many]) / 1500, 1 / 3, atol=0.05)


def test_with_a_real_input_and_matching_the_mask_rises_and_the_image_becomes_its_input(data):
    """The copying optimum: a = 1 makes Eq. 4 zero and the critic blind."""
    nets = networks(1)
    objective = medsynth.Objective(match_weight=100.0)
    _, report = train(
        data, nets, source="real", epochs=25, lr=3e-3, objective=objective, classifier=linear_classifier()
    )  # fmt: skip
    early, late = (np.mean(report["mask"][part]) for part in (slice(0, 3), slice(-3, None)))
    assert late > max(0.8, early + 0.1)
    assert np.mean(report["change"][-3:]) < 0.5 * np.mean(report["change"][:3])
    assert np.mean(report["match"][-3:]) < 0.5 * report["match"][0]
    with torch.no_grad():
        made = nets[0].eval()(*data)[0]
    nearest = torch.cdist(made.flatten(1), data[0].flatten(1)).argmin(1)
    assert (nearest == torch.arange(15)).float().mean() > 0.9


def test_a_mask_penalty_lowers_the_mask(data):
    free, held = (
        train(data, source="real", epochs=4, lr=3e-3, objective=medsynth.Objective(mask_penalty=weight))[1]
        for weight in (0.0, 30.0)
    )  # fmt: skip
    assert held["mask"][-1] < free["mask"][-1] - 0.05


def test_mask_terms_against_a_slow_twin():
    x, s, a = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    terms = medsynth.Objective(mask_penalty=2.0, reconstruction=3.0).mask_terms(x, s, a)
    for i in range(2):
        kept = np.mean([
            abs(float(s[i, c, j, k] - x[i, c, j, k])) * (1 - float(a[i, 0, j, k]))
            for c in range(3) for j in range(4) for k in range(4)
        ])  # fmt: skip
        assert terms[i].item() == pytest.approx(2 * a[i].mean().item() + 3 * kept, rel=1e-4)
    only = medsynth.Objective(total_variation=1.0).mask_terms(x, s, torch.full_like(a, 0.5))
    assert only.abs().max() == 0
    with pytest.raises(ValueError, match="mask_penalty must be 0 or more"):
        medsynth.Objective(mask_penalty=-1.0)


def test_steps_are_counted_and_wrong_settings_refused(data):
    _, report = train(data, n_critic=2, epochs=2)
    assert (report["steps_taken"], report["generator_steps"]) == (6, 3)
    assert report["match"] == [None, None]
    assert report["epsilon"] is None
    assert all(np.isfinite(report[name]).all() for name in ("loss", "mask", "change", "gap", "generator_loss"))
    for wrong, match in (
        ({"n_critic": 0}, "n_critic"),
        ({"source": "dream"}, "source"),
        ({"objective": medsynth.Objective(reconstruction=1.0)}, "reconstruction"),
        ({"objective": medsynth.Objective(match_weight=1.0)}, "classifier"),
    ):
        with pytest.raises(ValueError, match=match):
            train(data, **wrong)


def test_as_printed_trains_the_generator_to_look_less_real(data):
    """Against a fixed critic, the score of made images rises with the corrected sign and falls with the printed one."""
    score = {}
    for printed in (False, True):
        torch.manual_seed(0)
        made, critic = networks()
        x, wanted = (
            medsynth.inputs("noise", data[1], noise=networks()[0].noise, generator=torch.Generator().manual_seed(0)),
            data[1],
        )
        adam = torch.optim.Adam(made.parameters(), 3e-3)
        objective = medsynth.Objective(as_printed=printed, class_weight=0.0)
        before = critic(made(x, wanted)[0])[0].mean().item()
        for _ in range(5):
            medsynth._generator_step({"generator": made, "critic": critic}, adam, objective, None, x, wanted, data[0])
        score[printed] = critic(made(x, wanted)[0])[0].mean().item() - before
    assert score[False] > 1e-4
    assert score[True] < -1e-4


@pytest.mark.parametrize("privacy", [None, PRIVACY])
def test_a_killed_training_goes_on_to_the_same_bits(data, tmp_path, privacy):
    settings = {"privacy": privacy, "source": "noise" if privacy else "other", "other": data[0].flip(0)}
    whole, full = train(data, epochs=3, **settings)
    train(data, epochs=2, checkpoint=Checkpoint(tmp_path), **settings)
    resumed, report = train(data, epochs=3, checkpoint=Checkpoint(tmp_path), **settings)
    assert all(same(a, b) for a, b in zip(whole, resumed))
    assert report == full


def test_a_private_training_spends_what_is_accounted_and_bounds_its_critic(data):
    (_, critic), report = train(data, privacy=PRIVACY, critic_bound=0.7)
    assert report["steps"] == 4
    assert report["epsilon"] == pytest.approx(PRIVACY.epsilon(4))
    assert report["private_outputs"] == ["loss"]
    assert report["gap"] == [None, None]
    norms = [torch.linalg.matrix_norm(p.flatten(1), 2).item() for p in critic.parameters() if p.ndim > 1]
    assert max(norms) == pytest.approx(0.7, abs=1e-4)
    assert len(norms) == 11


def test_a_bound_leaves_smaller_weights_alone():
    critic = Critic(**SMALL, width=2)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    medsynth.bound_weights(critic, 1e6)
    assert all(torch.equal(before[name], value) for name, value in critic.state_dict().items())
    with pytest.raises(ValueError, match="critic_bound"):
        medsynth.bound_weights(critic, 0)


def test_privacy_refuses_whatever_lets_images_past_the_critic(data):
    for wrong, match in (
        ({"source": "real"}, "reads noise"),
        ({"source": "other", "other": data[0]}, "reads noise"),
        ({"classifier": linear_classifier()}, "classifier"),
        ({"objective": medsynth.Objective(as_printed=True)}, "as printed"),
    ):
        with pytest.raises(ValueError, match=match):
            train(data, privacy=PRIVACY, **wrong)


def test_a_private_generator_draws_the_same_whoever_is_in_the_data(data):
    """Its inputs and labels come from a stream that the private batches do not move."""
    drawn = []
    for n in (15, 14):
        seen, (made, critic) = [], networks()
        made.register_forward_pre_hook(
            lambda net, args, seen=seen: seen.append(args) if torch.is_grad_enabled() else None
        )
        train((data[0][:n], data[1][:n]), (made, critic), privacy=PRIVACY)
        drawn.append(seen)
    assert len(drawn[0]) == 4
    for one, other in zip(*drawn):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


# --- stages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both phases and a ViT, once."""
    root = tmp_path_factory.mktemp("medsynth")
    with pytest.MonkeyPatch.context() as patch:
        sets = {("toy", "train"): toy(), ("toy", "test"): toy(1, split="test")}
        patch.setattr(datasets, "load", lambda name, split="train", image_size=None: sets[name, split])
        places = {name: root / name for name in ("vit", "one", "two")}
        for place in places.values():
            place.mkdir()
        settings = {"rows": list(range(1, 15))}
        reports = {
            "vit": medsynth.train_vit(
                places["vit"], **STAGE | {"epochs": 10}, small=DIMS, base_epochs=40, base_lr=1e-2, batch_size=15, rank=2
            ),
            "one": medsynth.train_phase_one(places["one"], **STAGE, **settings, **GAN, source="real", mask_penalty=0.1),
            "two": medsynth.train_phase_two(
                places["two"], phase_one=places["one"], classifier=places["vit"], match_weight=4.0, epochs=2, seed=0,
                batch_size=6,
            ),
        }  # fmt: skip
    return places, reports


def test_the_vit_learns_and_lora_alone_goes_on(trained):
    places, reports = trained
    report = reports["vit"]
    json.dumps(reports, allow_nan=False)
    assert report["network"].startswith("small ViT")
    assert (len(report["base_loss"]), len(report["loss"])) == (40, 10)
    assert report["base_loss"][-1] < 0.5 * report["base_loss"][0]
    assert report["test"]["balanced_accuracy"] > 0.45  # chance: a third
    assert report["trained"] == 2 * (8 + 24) + 8 * 3 + 3 < report["weights"]
    vit = medsynth.load_classifier(places["vit"])
    base = load_file(places["vit"] / "base.safetensors")
    assert torch.equal(vit.network.patch_embed.proj.weight, base["network.patch_embed.proj.weight"])
    assert not any(p.requires_grad for p in vit.parameters())
    right = vit(datasets.as_tensor(toy(1))).argmax(1).numpy() == LABELS
    assert right.mean() == pytest.approx(report["test"]["accuracy"])
    lora_vit("small", 3, 8, rank=2, weights=places["vit"] / "base.safetensors", small=DIMS)


def test_a_small_vit_must_be_trained_and_one_base_chosen(tmp_path):
    for wrong in ({"small": DIMS}, {}, {"small": DIMS, "weights": "x.pth"}):
        with pytest.raises(ValueError, match=r"base_epochs|Give `weights`"):
            medsynth.train_vit(tmp_path, **STAGE, **wrong)


def test_a_base_of_another_training_is_taken_and_rank_0_trains_all_of_it(trained, tmp_path):
    base = trained[0]["vit"]
    report = medsynth.train_vit(tmp_path, **STAGE | {"epochs": 1}, base=str(base), rank=0, batch_size=15)
    assert report["network"] == "small ViT trained on other data, then all weights"
    assert report["trained"] == report["weights"]
    taken, before = (load_file(folder / "base.safetensors") for folder in (tmp_path, base))
    assert all(torch.equal(taken[key], before[key]) for key in before if ".head." not in key)
    after = load_file(tmp_path / "weights.safetensors")
    assert not torch.equal(after["network.patch_embed.proj.weight"], before["network.patch_embed.proj.weight"])


def test_a_convnet_can_stand_in_the_vits_place(trained, tmp_path):
    net, two = tmp_path / "net", tmp_path / "two"
    net.mkdir(), two.mkdir()
    report = medsynth.train_convnet(net, **STAGE | {"epochs": 8}, width=4, depth=1, batch_size=15)
    assert report["loss"][-1] < report["loss"][0]
    loaded = medsynth.load_classifier(net)
    right = loaded(datasets.as_tensor(toy(1))).argmax(1).numpy() == LABELS
    assert right.mean() == pytest.approx(report["test"]["accuracy"])
    found = medsynth.train_phase_two(
        two, phase_one=trained[0]["one"], classifier=net, match_weight=1.0, epochs=1, seed=0, batch_size=6
    )
    assert found["match"][0] > 0


def test_the_scores_of_a_classifier_are_kept_with_whose_image_each_is(trained):
    found = load_file(trained[0]["vit"] / "scores.safetensors")
    test = trained[1]["vit"]["test"]
    assert found["labels"].tolist() == LABELS.tolist()
    assert found["units"].tolist() == [i // 2 for i in range(len(LABELS))]
    scores = found["scores"].numpy()
    assert (scores.argmax(1) == LABELS).mean() == pytest.approx(test["accuracy"])
    assert roc_auc_score(LABELS, scores, multi_class="ovr") == pytest.approx(test["auc"])


def test_both_phases_leave_networks_and_their_settings(trained):
    places, reports = trained
    assert reports["one"]["images"] == 14
    assert len(reports["two"]["match"]) == 2
    assert reports["two"]["match"][1] is not None
    assert reports["two"]["lambda"] == 0.25
    first, second = (medsynth.load_settings(places[name]) for name in ("one", "two"))
    assert (first["phase"], second["phase"]) == (1, 2)
    assert second["rows"] == list(range(1, 15))
    assert (second["source"], second["data"], second["image_size"]) == ("real", "toy", 8)
    assert first["objective"]["match_weight"] == 0
    assert second["objective"] == first["objective"] | {"match_weight": 4.0}
    one, two = (medsynth.load_networks(places[name]) for name in ("one", "two"))
    assert not one[0].training
    for before, after in zip(one, two):
        moved = [(a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters())]
        assert 0 < max(moved) < 1e-3  # both train, at 5e-6


def test_a_set_from_real_images_names_its_inputs_and_is_what_the_generator_makes_of_them(trained, tmp_path):
    places, _ = trained
    report = medsynth.make_set(tmp_path, trained=places["two"], data="toy", image_size=8, ipc=4, seed=3)
    found = load_file(tmp_path / "samples.safetensors")
    rows, labels = found["source_rows"], found["labels"]
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (toy().labels[rows.numpy()] == labels.numpy()).all()
    assert 0 not in rows.tolist()  # not among the rows that were trained on
    assert len(set(rows[:4].tolist())) == 4
    assert sorted(rows[8:].tolist()) == [13, 13, 14, 14]  # class 2 has two images: IPC 4 has to repeat them
    assert report["repeated"] == 2
    assert (report["images"], report["source"]) == (12, "real")
    with torch.no_grad():
        s, a, _ = medsynth.load_networks(places["two"])[0](datasets.as_tensor(toy())[rows], labels)
    np.testing.assert_array_equal(found["images"].numpy(), datasets.to_uint8(s))
    assert report["mask"] == pytest.approx(a.mean().item(), rel=1e-4)
    assert report["change"] == pytest.approx((s - datasets.as_tensor(toy())[rows]).abs().mean().item(), rel=1e-4)


def test_sets_from_noise_and_from_another_site_have_no_source_rows(trained, tmp_path):
    places, _ = trained
    how = {"trained": places["one"], "data": "toy", "image_size": 8, "ipc": 2, "seed": 3}
    drawn = {}
    for name, extra in (
        ("noise", {"source": "noise"}), ("again", {"source": "noise"}), ("seed", {"source": "noise", "seed": 4}),
        ("other", {"source": "other", "other": {"data": "elsewhere", "rows": [3, 9, 11, 12]}}),
        ("rows", {"rows": [2, 9, 14]}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        report = medsynth.make_set(tmp_path / name, **how | extra)
        drawn[name] = load_file(tmp_path / name / "samples.safetensors") | {"report": report}
    assert torch.equal(drawn["noise"]["images"], drawn["again"]["images"])
    assert not torch.equal(drawn["noise"]["images"], drawn["seed"]["images"])
    for name in ("noise", "other"):
        assert (drawn[name]["source_rows"] == -1).all()
    assert sorted(set(drawn["other"]["other_rows"].tolist())) == [3, 9, 11, 12]
    assert drawn["other"]["report"]["repeated"] == 2
    assert drawn["noise"]["report"]["repeated"] == 0
    assert drawn["rows"]["source_rows"].tolist() == [2, 2, 9, 9, 14, 14]
    for wrong, match in (({"image_size": 16}, "8 px"), ({"rows": [0, 1]}, "class 1"), ({"source": "other"}, "`other`")):
        with pytest.raises(ValueError, match=match):
            medsynth.make_set(tmp_path, **how | wrong)


def test_a_private_phase_one_is_of_subjects_and_has_no_phase_two(trained, tmp_path):
    report = medsynth.train_phase_one(tmp_path, **STAGE, **GAN, source="noise", epsilon=30.0, records="subjects")
    assert 0 < report["epsilon"] <= 30.001
    assert report["privacy"]["records"] == "subjects"
    assert medsynth.load_settings(tmp_path)["epsilon"] == 30.0
    with pytest.raises(ValueError, match="without noise"):
        medsynth.train_phase_two(
            tmp_path, phase_one=tmp_path, classifier=trained[0]["vit"], match_weight=1.0, epochs=1, seed=0
        )  # fmt: skip
