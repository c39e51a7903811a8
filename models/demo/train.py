"""Train the demo model on Fashion-MNIST and write it, with its image samples, beside this file.

Run from the root of the repository, in an environment with torch, onnx and numpy::

    python -m models.demo.train --data /usr/share/datasets/fashion-mnist

The torch network below is the twin of :func:`models.inception.naive_inception_net`: the keys of its
state are the names of that graph's initializers, so the weights are carried over by name and no
exporter is involved. A checkpoint after every epoch lets an interrupted run go on where it was.
"""

# mypy: allow-untyped-calls

import argparse
import gzip
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

EPOCHS = 14
BATCH = 128
MAX_RATE = 0.1
SEED = 0


class ConvBnRelu(nn.Sequential):
    """The torch side of `Net.conv_bn_relu`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        super().__init__(
            OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU(inplace=True))
        )


class NaiveInception(nn.Module):
    """1×1, 3×3, 5×5 and max pooling side by side, none of them reduced first."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBnRelu(in_channels, 64, 1)
        self.branch3x3 = ConvBnRelu(in_channels, 96, 3)
        self.branch5x5 = ConvBnRelu(in_channels, 32, 5)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, in_channels, h, w] to [n, 192 + in_channels, h, w]."""
        return torch.cat([self.branch1x1(x), self.branch3x3(x), self.branch5x5(x), self.pool(x)], 1)


def twin() -> nn.Sequential:
    """The network of `naive_inception_net`, name by name."""
    return nn.Sequential(
        OrderedDict(
            stem1=ConvBnRelu(1, 32, 3),
            pool1=nn.MaxPool2d(2),
            stem2=ConvBnRelu(32, 192, 3),
            pool2=nn.MaxPool2d(2),
            inception1=NaiveInception(192),
            inception2=NaiveInception(384),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(576, 10),
        )
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in a gzipped IDX file of unsigned bytes (the format of MNIST)."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [n, 28, 28, 1] and labels [n] of `train` or `t10k`."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")[..., np.newaxis]
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64)
    return images, labels


def as_input(images: NDArray[np.uint8]) -> Tensor:
    """uint8 NHWC to the network's input: float NCHW in 0..1."""
    return torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """A crop shifted by up to two pixels, and a flip, drawn for every image by itself."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (2, 2, 2, 2))
    rows = torch.arange(height) + torch.randint(5, (count, 1), generator=random)
    columns = torch.arange(width) + torch.randint(5, (count, 1), generator=random)
    flipped = torch.rand(count, 1, generator=random) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    sample = torch.arange(count)[:, None, None]
    return padded[sample, 0, rows[:, :, None], columns[:, None, :]][:, None]


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1, between 0 and 1."""
    network.eval()
    with torch.inference_mode():
        right = [
            (network(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y)
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return torch.cat(right).float().mean().item()


def train(network: nn.Module, images: Tensor, labels: Tensor, checkpoint: Path) -> None:
    """SGD with a one-cycle rate; bfloat16 activations, float32 weights."""
    steps = len(images) // BATCH
    optimizer = torch.optim.SGD(
        network.parameters(), MAX_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, MAX_RATE, epochs=EPOCHS, steps_per_epoch=steps
    )
    first_epoch = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first_epoch = state["epochs"]
    for epoch in range(first_epoch, EPOCHS):
        start = time.perf_counter()
        random = torch.Generator().manual_seed(SEED + epoch)
        network.train()
        total = 0.0
        for batch in torch.randperm(len(images), generator=random)[: steps * BATCH].split(BATCH):
            x = augment(images[batch], random).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(x)
            loss = functional.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epochs": epoch + 1,
            },
            checkpoint,
        )
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {total / steps:.4f}, {seconds:.0f} s", flush=True)


def export(network: nn.Module, path: Path) -> None:
    """Write the twin's weights into the builder's graph, initializer by initializer."""
    from ..inception import naive_inception_net

    model = naive_inception_net()
    state = network.state_dict()
    for initializer in model.graph.initializer:
        weight = state[initializer.name].contiguous().numpy()
        if list(weight.shape) != list(initializer.dims):
            raise ValueError(f"{initializer.name}: {weight.shape} is not {initializer.dims}")
        initializer.CopyFrom(numpy_helper.from_array(weight, initializer.name))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def save_sample(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], per_class: int
) -> None:
    """Write the first `per_class` images of each class, in their original order."""
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
    np.savez_compressed(path, images=images[chosen], labels=labels[chosen])


def main() -> None:
    """Train, judge on the test images, write the model and the samples."""
    parser = argparse.ArgumentParser(description="Train the demo model of pwopt.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four idx.gz files")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/naive_inception.pt"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    train_images, train_labels = load_split(arguments.data, "train")
    test_images, test_labels = load_split(arguments.data, "t10k")
    network = twin()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its types
    train(network, as_input(train_images), torch.from_numpy(train_labels), arguments.checkpoint)
    test_accuracy = accuracy(network, as_input(test_images), torch.from_numpy(test_labels))
    print(f"test accuracy: {test_accuracy:.2%}")

    folder = Path(__file__).parent
    export(network, folder / "naive_inception.onnx")
    save_sample(folder / "calib.npz", train_images, train_labels, per_class=50)
    save_sample(folder / "eval.npz", test_images, test_labels, per_class=200)


if __name__ == "__main__":
    main()
