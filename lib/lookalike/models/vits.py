"""Vision transformers with LoRA: MedSynth's network of phase II and of its downstream task.

Paper: Kanagavelu et al. 2024, MedSynth, Sec. 3.2 and 4.3 (ViT-B/16 with ImageNet weights, LoRA). Chapter: medsynth.
LoRA is peft's. It adapts a network that has been trained before: ImageNet weights are a file of the reader's own, and
where there is none a small transformer of timm's design is first trained from scratch on the same images. That is
another network than the paper's and is called small.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lookalike.metrics import to_unit
from lookalike.metrics.extractors import load_weights

CHANNELS = 3  # grey images get three equal ones
RANK, DROPOUT = 8, 0.1  # the paper names neither; alpha is twice the rank


class ViT(nn.Module):
    """Images (N, C, H, W) in [-1, 1], C 1 or 3, to logits (N, K); resized to `image_size` (bilinear) where they differ.

    `network` is timm's; `mean` and `std` are the pixels' that its weights were trained with, on a scale of 0 to 1.
    """

    def __init__(self, network, image_size, mean=(0.5,) * 3, std=(0.5,) * 3):
        super().__init__()
        self.network, self.image_size = network, image_size
        for key, value in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(value).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, images):
        if images.shape[1] not in (1, CHANNELS):
            raise ValueError(f"A ViT reads 1 or {CHANNELS} channels; these images have {images.shape[1]}.")
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return self.network((to_unit(images).expand(-1, CHANNELS, -1, -1) - self.mean) / self.std)


def small_vit(num_classes, image_size, patch_size=4, embed_dim=64, depth=4, num_heads=4):
    """A small vision transformer with random weights, every one of them trainable."""
    from timm.models.vision_transformer import VisionTransformer  # seconds to import

    if image_size % patch_size or embed_dim % num_heads:
        raise ValueError(
            f"patch_size {patch_size} must divide image_size {image_size}, and num_heads {num_heads} must divide "
            f"embed_dim {embed_dim}."
        )
    network = VisionTransformer(
        img_size=image_size, patch_size=patch_size, in_chans=CHANNELS, num_classes=num_classes, embed_dim=embed_dim,
        depth=depth, num_heads=num_heads,
    )  # fmt: skip
    return ViT(network, image_size)


def named_vit(name, num_classes, image_size):
    """timm's transformer `name` for images of `image_size`, with random weights."""
    import timm  # seconds to import

    network = timm.create_model(name, img_size=image_size, num_classes=num_classes)
    return ViT(network, image_size, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])


def pretrained_vit(name, num_classes, image_size, weights):
    """timm's transformer `name` with the weights of a file (.safetensors or .pth) but for the head, which is random.

    Position embeddings are resampled to `image_size`, where that is not the file's.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    vit = named_vit(name, num_classes, image_size)
    _load_all_but_head(vit.network, checkpoint_filter_fn(load_weights(weights), vit.network), weights)
    return vit


def add_lora(vit, rank=RANK, alpha=None, dropout=DROPOUT):
    """LoRA on every fused query, key and value layer, in place: these and the head train, all else is frozen.

    alpha None: 2 rank. Right after, the network gives what it gave before: LoRA starts at zero.
    """
    import peft  # seconds to import

    if rank < 1:
        raise ValueError(f"rank must be 1 or more, not {rank}.")
    alpha = 2 * rank if alpha is None else alpha
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["qkv"])
    peft.inject_adapter_in_model(config, vit.network)
    vit.network.head.requires_grad_(True)
    return vit


def lora_vit(name, num_classes, image_size, rank=RANK, weights=None, small=None):
    """A transformer with LoRA whose base was trained before: timm's `name` from a file, or a small one.

    small: the settings of `small_vit`; `weights` is then a file that a training of it has left (`save_weights` of the
    `ViT`, as in base.safetensors of `training.medsynth.train_vit`). Either way the head starts at random, so the base
    may have learnt other classes. Random weights are no base: train `small_vit`, then call `add_lora`.
    """
    if weights is None:
        raise ValueError(
            "LoRA adapts a trained network: give `weights`, or train small_vit first and then call add_lora."
        )
    if small is None:
        return add_lora(pretrained_vit(name, num_classes, image_size, weights), rank)
    return add_lora(based_vit(weights, num_classes, image_size, small), rank)


def based_vit(weights, num_classes, image_size, small):
    """`small_vit` with the weights of a file but for the head, which is random."""
    vit = small_vit(num_classes, image_size, **small)
    found = {key.removeprefix("network."): value for key, value in load_weights(weights).items()}
    _load_all_but_head(vit.network, found, weights)
    return vit


def trainable(model):
    """Names of the weights that train."""
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def _load_all_but_head(network, found, path):
    """Every weight but the head's must be there and fit."""
    own = network.state_dict()
    body = [key for key in own if not key.startswith("head.")]
    wrong = [key for key in body if key not in found or found[key].shape != own[key].shape]
    if wrong:
        raise ValueError(
            f"{path} does not fit the network: {wrong[0]} and {len(wrong) - 1} others differ or are absent."
        )
    network.load_state_dict({key: found[key] for key in body}, strict=False)
