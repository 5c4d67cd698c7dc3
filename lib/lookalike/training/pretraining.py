"""SynPre: every layer of the feature network trained on made images, before a head is fine-tuned on real ones.

Paper: Osuala et al. 2024 (arXiv 2407.12669), Sec. 2 and Table 1; the authors' `swin_t_imagenet` with the one-layer head
that is kept for the fine-tuning. Chapter: mcgan_dp. No privacy is claimed here: the made images come from a generator
with an epsilon of its own, or without one.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lookalike.data import datasets
from lookalike.metrics import as_images
from lookalike.privacy.randomness import stream
from lookalike.training.checkpoint import save_weights
from lookalike.training.heads import build_head, load_masses, mass_extractor


def pretrain(extractor, images, labels, *, epochs, seed, lr=1e-4, batch_size=64, label_smoothing=0.1):
    """Trains every layer of `extractor.network`, in place, with a new linear head on its features.

    images uint8 (N, C, S, S); each is flipped either way with a chance of one half. AdamW, weight decay 1e-8 (paper:
    lr 1e-5, batches of 128, 300 epochs). Returns the head and the mean loss of each epoch.
    """
    generator, network = stream(seed, "pretraining"), extractor.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_head("one-layer", extractor.dim)
    device = next(network.parameters()).device
    head, labels, losses = head.to(device), torch.as_tensor(labels).long(), []
    weights = [*network.requires_grad_(True).parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=1e-8, fused=True)
    for _ in range(epochs):
        network.train()
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            x = _prepared(images[rows.numpy()], extractor.image_size, generator).to(device)
            loss = F.cross_entropy(head(network(x)), labels[rows].to(device), label_smoothing=label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(images))
    network.eval().requires_grad_(False)
    return head, losses


def pretrain_masses(folder, *, source, extractor, image_size, epochs, seed, weights="", lr=1e-4, batch_size=64):
    """A stage: SynPre on the made set `source`, a set's name (its train split) or a stage's folder.

    Writes backbone.safetensors (`heads.view_masses` takes it by this folder) and weights.safetensors, the head as
    `heads.head_trial` writes and starts from one. Returns the mean loss of each epoch, and trainable.
    """
    network = mass_extractor(extractor, image_size, weights)
    images, labels, _ = load_masses(source, "train" if source in datasets.names() else None)
    head, losses = pretrain(network, images, labels, epochs=epochs, seed=seed, lr=lr, batch_size=batch_size)
    save_weights(folder / "backbone.safetensors", network.network)
    kept = {f"{which}.{name}": t.detach().cpu() for which in ("best", "last") for name, t in head.state_dict().items()}
    save_file({name: t.clone() for name, t in kept.items()}, Path(folder) / "weights.safetensors")
    return {"loss": losses, "trainable": sum(p.numel() for net in (network.network, head) for p in net.parameters())}


def _prepared(images, image_size, generator):
    """uint8 images as the network takes them: flipped, resized, three channels."""
    x = as_images(images)
    flips = torch.randint(2, (len(x), 2), generator=generator).bool()
    x = torch.where(flips[:, 0, None, None, None], x.flip(-1), x)
    x = torch.where(flips[:, 1, None, None, None], x.flip(-2), x)
    if x.shape[-1] != image_size:
        x = F.interpolate(x, (image_size, image_size), mode="bilinear", antialias=True)
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
