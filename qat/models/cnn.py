"""A small convolutional network for small grey images, such as 28x28 MNIST or 8x8 digits."""

from __future__ import annotations

from torch import Tensor, nn


def conv_bn_relu(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a 3x3 convolution without bias, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class ConvNet(nn.Module):
    """Four convolutions, the last three of stride 2, then average pooling and a linear classifier."""

    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn_relu(in_channels, width, stride=1),
            conv_bn_relu(width, 2 * width, stride=2),
            conv_bn_relu(2 * width, 4 * width, stride=2),
            conv_bn_relu(4 * width, 4 * width, stride=2),
        )
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        return self.classifier(self.features(x).mean((2, 3)))


def cnn(num_classes: int = 10, in_channels: int = 1, width: int = 8) -> ConvNet:
    """Return the network: 61 thousand parameters at width 16."""
    return ConvNet(num_classes, in_channels, width)
