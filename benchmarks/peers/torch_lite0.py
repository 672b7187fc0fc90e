"""EfficientNet-Lite0 for PyTorch, without its top: the architecture that Kith's encoder has.

Weights are random, which changes nothing about speed.
"""

import torch
from torch import Tensor, nn

INPUT_SIZE = 224
HEAD_FILTERS = 1280

# (repeats, filters, expansion, kernel, stride of the first block)
STAGES = (
    (1, 16, 1, 3, 1),
    (2, 24, 6, 3, 2),
    (2, 40, 6, 5, 2),
    (3, 80, 6, 3, 2),
    (3, 112, 6, 5, 1),
    (4, 192, 6, 5, 2),
    (1, 320, 6, 3, 1),
)


class InvertedResidual(nn.Module):
    """One MBConv block without squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        middle = inputs * expansion
        layers = _conv(inputs, middle, 1, 1) if expansion != 1 else []
        layers += _conv(middle, middle, kernel, stride, groups=middle)
        layers += _conv(middle, outputs, 1, 1)[:-1]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        """Applies the block to [b, inputs, h, w]."""
        found: Tensor = self.layers(images)
        return images + found if self.adds else found


class EfficientNetLite0(nn.Module):
    """From normalised images [b, 3, 224, 224] to vectors [b, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        layers = _conv(3, 32, 3, 2)
        filters = 32
        for repeats, outputs, expansion, kernel, first_stride in STAGES:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                layers.append(InvertedResidual(filters, outputs, expansion, kernel, stride))
                filters = outputs
        layers += _conv(filters, HEAD_FILTERS, 1, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the average of the last feature map."""
        found: Tensor = self.layers(images).mean((2, 3))
        return found


def build() -> EfficientNetLite0:
    """Returns the network, ready for inference, with weights from a fixed seed."""
    torch.manual_seed(0)
    return EfficientNetLite0().eval()


def _conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
        nn.ReLU6(inplace=True),
    ]
