"""Networks that a condensed set is judged with, and matched in: ConvNet-3, ResNets, a small DenseNet, ViT with LoRA.

Papers: Kanagavelu et al. 2024, MedSynth, Sec. 4.2-4.4 (ResNet-18 for the baselines, ViT with LoRA for their own rows;
ConvNet, ResNet-18 and DenseNet in Fig. 2); ConvNet-3 is the field's (Zhao and Bilen 2023, "Dataset Condensation with
Distribution Matching"). Chapter: medsynth. All but the ViT start at random and take images of any side that they fit.
"""

from torch import nn

from lookalike.metrics.classifiers import TimmClassifier

NETWORKS = ("convnet3", "resnet10", "resnet18", "densenet", "vit_lora")
SMALL_DENSENET = {"growth_rate": 12, "block_config": (6, 6, 6)}  # 0.1 million weights; DenseNet-121 has 7 million
SMALLEST_DENSENET = 16


class ConvNet(nn.Module):
    """Images (N, C, S, S) in [-1, 1] to logits (N, K): `depth` blocks of convolution, instance norm, ReLU, mean pool.

    Each block halves the side (rounded down); S is at least 2^depth, for instance norm of a single pixel is always 0.
    `width` is the channel count of every convolution (the field: 128). `dim` is D of `embed`.
    """

    def __init__(self, channels=1, num_classes=10, image_size=32, width=128, depth=3):
        super().__init__()
        if image_size < 2**depth:
            raise ValueError(f"A ConvNet of depth {depth} needs images of {2**depth} px or more, not {image_size}.")
        layers = []
        for before in [channels] + [width] * (depth - 1):
            norm = nn.GroupNorm(width, width)  # a group per channel is instance norm with weights
            layers += [nn.Conv2d(before, width, 3, padding=1), norm, nn.ReLU(), nn.AvgPool2d(2)]
        self.dim = width * (image_size // 2**depth) ** 2
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(self.dim, num_classes)

    def embed(self, images):
        """What stands before the last layer, (N, D)."""
        return self.trunk(images)

    def forward(self, images):
        return self.head(self.embed(images))


def build_network(name, channels, num_classes, image_size, width=128, depth=3, vit=None):
    """One of NETWORKS by name, from images (N, C, S, S) in [-1, 1] to logits (N, K).

    width and depth: of "convnet3" alone. vit: the keyword arguments of `lookalike.models.vits.lora_vit` but
    num_classes and image_size, for "vit_lora" alone. The ResNets and the DenseNet keep the stem for large images, which
    quarters the side: at 32 px they see little, and all sets alike.
    """
    if name not in NETWORKS:
        raise ValueError(f"A network is one of {', '.join(NETWORKS)}, not {name!r}.")
    if name == "convnet3":
        return ConvNet(channels, num_classes, image_size, width, depth)
    if name == "vit_lora":
        return _lora_vit(num_classes, image_size, vit)
    if name == "densenet":
        return _small_densenet(channels, num_classes, image_size)
    return _resnet10(channels, num_classes) if name == "resnet10" else TimmClassifier(name, channels, num_classes)


def _lora_vit(num_classes, image_size, vit):
    from lookalike.models.vits import lora_vit  # peft takes seconds to import

    if not vit:
        raise ValueError("vit_lora needs `vit`, the settings of lora_vit: its name, and weights or small.")
    return lora_vit(num_classes=num_classes, image_size=image_size, **vit)


def _small_densenet(channels, num_classes, image_size):
    from timm.models.densenet import DenseNet  # seconds to import

    if image_size < SMALLEST_DENSENET:
        raise ValueError(f"The DenseNet needs images of {SMALLEST_DENSENET} px or more, not {image_size}.")
    return DenseNet(**SMALL_DENSENET, in_chans=channels, num_classes=num_classes)


def _resnet10(channels, num_classes):
    from timm.models.resnet import BasicBlock, ResNet  # seconds to import

    return ResNet(BasicBlock, (1, 1, 1, 1), in_chans=channels, num_classes=num_classes)
