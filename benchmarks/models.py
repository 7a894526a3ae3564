"""Networks of known shapes for benchmarks, in plain torch: a Llama-like decoder and ResNet-50."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DecoderBlock(nn.Module):
    """Llama's block: RMS norm, rotary attention, RMS norm, SwiGLU."""

    def __init__(self, hidden: int, mlp: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(hidden, mlp, bias=False), nn.Linear(hidden, mlp, bias=False)
        self.down = nn.Linear(mlp, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, hidden) to the same shape; cos and sin are (T, hidden / heads)."""
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (part * cos + torch.cat([-part.chunk(2, -1)[1], part.chunk(2, -1)[0]], -1) * sin for part in (q, k))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head; ``forward`` returns the loss."""

    def __init__(self, hidden: int, layers: int, mlp: int, vocabulary: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(DecoderBlock(hidden, mlp, heads) for _ in range(layers))
        self.norm, self.lm_head = nn.RMSNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)
        self.head_width = hidden // heads
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of tokens (B, T + 1)."""
        x = self.embedding(tokens[:, :-1])
        turns = torch.arange(x.shape[1], device=x.device)[:, None] / 10000.0 ** (
            torch.arange(0, self.head_width, 2, device=x.device) / self.head_width
        )
        cos, sin = (table.repeat(1, 2).to(x.dtype) for table in (turns.cos(), turns.sin()))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.loss(x, tokens[:, 1:])

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the last block's output."""
        return F.cross_entropy(self.lm_head(self.norm(x)).float().flatten(0, 1), targets.flatten())

    def compile_parts(self, **options) -> None:
        """Compile one block, whose code all of them share, and the head with the loss."""
        for block in self.blocks:
            block.compile(**options)
        self.loss = torch.compile(self.loss, **options)


class Bottleneck(nn.Module):
    """ResNet's bottleneck block (He et al. 2016, arXiv:1512.03385), with the stride in its 3 x 3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.down = None
        if stride != 1 or inputs != 4 * width:
            convolution = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.down = nn.Sequential(convolution, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, 4 width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.down is None else self.down(x)))


class ResNet50(nn.Module):
    """ResNet-50 for 224 x 224 images; ``forward`` returns the loss."""

    def __init__(self, classes: int = 1000, width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                blocks.append(Bottleneck(inputs, width * 2**stage, 2 if stage and not block else 1))
                inputs = 4 * width * 2**stage
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(inputs, classes)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of (images, labels)."""
        images, labels = batch
        x = F.max_pool2d(F.relu(self.bn(self.stem(images))), 3, 2, 1)
        return F.cross_entropy(self.fc(self.blocks(x).mean((2, 3))), labels)

    def compile_parts(self, **options) -> None:
        """Compile the whole."""
        self.compile(**options)


def training_step(
    model: nn.Module, batch, autocast: torch.dtype | None = None, after: Callable[[], None] = lambda: None
) -> Callable[[], Tensor]:
    """Return a function that does one step of fused AdamW, then ``after``, and returns the loss."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        after()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
