"""The networks of `step.py` and their distillation step in PyTorch, layer for layer those of `kdjax.models`."""

import itertools

import torch
from torch import nn
from torch.nn import functional


class CNN(nn.Module):
    """As `kdjax.models.CNN`, for 32x32 images."""

    def __init__(self, channels: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> None:
        super().__init__()
        sizes = (3, *channels)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes))
        widths = (channels[-1] * (32 // 2 ** len(channels)) ** 2, *hidden, classes)
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images [batch, channels, height, width] to logits."""
        for convolution in self.convolutions:
            x = functional.max_pool2d(functional.relu(convolution(x)), 2)
        x = x.flatten(1)
        for layer in self.dense[:-1]:
            x = functional.relu(layer(x))
        return self.dense[-1](x)


class ResNet(nn.Module):
    """As `kdjax.models.ResNet`."""

    def __init__(self, depth: int, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        blocks = []
        for i, (incoming, width) in enumerate(itertools.pairwise(widths)):
            for j in range((depth - 2) // 6):
                blocks.append(_Block(incoming if j == 0 else width, width, 2 if i and j == 0 else 1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images [batch, channels, height, width] to logits."""
        x = functional.relu(self.stem_norm(self.stem(x)))
        return self.head(self.blocks(x).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, incoming: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(incoming, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if incoming != width or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(incoming, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Step:
    """One step: teacher forward, student forward and backward, SGD with momentum.

    Args:
      student: the module that learns.
      teacher: the module that it learns from.
      images: [batch, channels, height, width].
      labels: [batch].
      half: whether to compute in bfloat16, by autocast.
      compiled: whether to use torch.compile for both networks and the loss.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, half: bool, compiled: bool
    ) -> None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.student = student.to(device, memory_format=torch.channels_last).train()
        self.teacher = teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.images = images.to(device, memory_format=torch.channels_last)
        self.labels = labels.to(device)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)
        self.cast = torch.autocast(device, torch.bfloat16, enabled=half)
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self) -> torch.Tensor:
        with torch.no_grad():
            taught = functional.log_softmax(self.teacher(self.images).float() / 4, -1)
        logits = self.student(self.images).float()
        soft = 16 * functional.kl_div(functional.log_softmax(logits / 4, -1), taught, reduction='batchmean', log_target=True)
        return 0.1 * functional.cross_entropy(logits, self.labels) + 0.9 * soft

    def __call__(self) -> None:
        """Takes the step and waits for it."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.cast:
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        if self.images.is_cuda:
            torch.cuda.synchronize()
