"""Learned perceptual distances between pairs of images: shift-tolerant LPIPS offline, LPIPS v0.1 from its own files.

Papers: Zhang et al. 2018 (CVPR, LPIPS; github.com/richzhang/PerceptualSimilarity, BSD-2-Clause) and Ghildyal and Liu
2022 (ECCV, ST-LPIPS; github.com/abhijay9/ShiftTolerant-LPIPS, BSD-2-Clause). Chapters: no_free_lunch,
stylegan2_dermatology. Both have one formula: unit-length features at each position of five maps, squared differences,
weighted by channel, averaged over positions, summed over maps. They are different metrics with different scales: a
number of ST-LPIPS is never printed as LPIPS. Written after the papers and the packages' source, in our own code.
"""

from pathlib import Path

import torch
from torch import nn

from lookalike.data import manifest
from lookalike.metrics import as_array, as_images
from lookalike.metrics.extractors import load_trunk, load_weights, stlpips_weights, verified
from lookalike.metrics.trunks import TRUNK_WIDTHS

LPIPS_FILES = {
    "alex": (("lpips_alex", "weights/alexnet-owt-7be5be79.pth"), ("lpips_alex", "weights/lpips_v0.1_alex.pth")),
    "vgg": (("vgg16", "weights/vgg16-397923af.pth"), ("lpips_vgg", "weights/lpips_v0.1_vgg.pth")),
}


class PerceptualDistance(nn.Module):
    """`distance(real, synthetic)`: distances (N,) of pairs of images (N, C, H, W) in [-1, 1].

    0 for equal images, larger is farther, no upper bound; it reads images at their own size, both sides at least
    `smallest`. C is 1 (grey) or 3; any other number is a stack of slices, and the distance is the mean over them.
    Gradients flow to both images, not to the weights; `between` is the call without. `name` belongs beside every
    number. The distance is squared in the features, so small steps e cost order e^2, as path length assumes.
    """

    def __init__(self, name, trunk, heads):
        super().__init__()
        self.name, self.smallest, self.trunk = name, trunk.smallest, trunk
        self.heads = nn.ParameterList(head.flatten()[:, None, None] for head in heads)
        self.eval().requires_grad_(False)

    def forward(self, real, synthetic):
        """Distances (N,), differentiable in both arguments."""
        if real.shape != synthetic.shape or real.ndim != 4:
            raise ValueError(
                f"Pairs need two batches of one shape (N, C, H, W), not {tuple(real.shape)}, {tuple(synthetic.shape)}."
            )
        slices = 1 if real.shape[1] in (1, 3) else real.shape[1]
        pairs = zip(self.heads, self._units(real, slices), self._units(synthetic, slices))
        parts = [(head * (a - b).square()).sum(1).mean((1, 2)) for head, a, b in pairs]
        return sum(parts).view(-1, slices).mean(1)

    @torch.no_grad()
    def between(self, real, synthetic, batch_size=16):
        """Distances (N,) float64 of uint8 or [-1, 1] images of any kind (arrays, tensors, ImageSets), in batches."""
        real, synthetic = as_array(real), as_array(synthetic)
        if real.shape != synthetic.shape or real.ndim != 4 or len(real) == 0:
            raise ValueError(f"Pairs need two sets of one shape (N, C, H, W), not {real.shape} and {synthetic.shape}.")
        parts = [slice(i, i + batch_size) for i in range(0, len(real), batch_size)]
        found = [self(as_images(real[part]), as_images(synthetic[part])) for part in parts]
        return torch.cat(found).double().cpu().numpy()

    def _units(self, images, slices):
        """The five maps with features of length one at each position."""
        weight = self.heads[0]
        if not images.is_floating_point():
            raise ValueError("Perceptual distances with gradients read floats in [-1, 1]; for uint8 call `between`.")
        images = images.to(weight.device, weight.dtype)
        if slices > 1:
            images = images.flatten(0, 1)[:, None]
        images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        # vector_norm, not a root of a sum: where all features are zero its gradient is 0, not nan
        return [maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + 1e-10) for maps in self.trunk(images)]


def stlpips(net="vgg", device="cpu"):
    """ST-LPIPS, "vgg" or "alex", as stlpips-pytorch computes it, with the weights of that package. Not LPIPS."""
    weights = stlpips_weights(net)
    return _distance("ST-LPIPS", net, weights, weights, shift_tolerant=True).to(device)


def lpips(trunk, heads, net="alex", device="cpu"):
    """LPIPS v0.1, "alex" or "vgg", for those who have its own weights; the files are verified against the manifest.

    trunk: path of torchvision's ImageNet weights; heads: path of the linear layers. For "alex" both are files of the
    manifest's entry lpips_alex; for "vgg" they are those of vgg16 and lpips_vgg (`lookalike data fetch ...`).
    """
    if net not in LPIPS_FILES:
        raise ValueError(f'LPIPS has the nets "vgg" and "alex" here, not {net!r}.')
    paths = [_lpips_file(path, *file) for path, file in zip((trunk, heads), LPIPS_FILES[net])]
    return _distance("LPIPS v0.1", net, *map(load_weights, paths), shift_tolerant=False).to(device)


def _distance(kind, net, trunk_weights, head_weights, shift_tolerant):
    trunk = load_trunk(net, trunk_weights, shift_tolerant)
    heads = [head_weights[f"lin{i}.model.1.weight"] for i in range(len(TRUNK_WIDTHS[net]))]
    return PerceptualDistance(f"{kind} ({net})", trunk, heads).to(memory_format=torch.channels_last)


def _lpips_file(path, entry, name):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there: 'lookalike data fetch {entry}' brings {name}.")
    (file,) = (file for file in manifest.load_manifest().entry(entry).files if file.path == name)
    return verified(path, file.sha256)
