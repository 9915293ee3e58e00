"""Images and labels for ``images.py``, from what is on this machine: nothing is downloaded."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Images(NamedTuple):
    """Training and test set of (image, label); images of shape (channels, height, width), about standardised."""

    train: Dataset[Any]
    test: Dataset[Any]
    channels: int
    classes: int


def _standardised(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Images:
    """Images of shape (N, channels, height, width) less the mean of the training set, over its deviation."""
    axes = (0, 2, 3)
    mean, deviation = train[0].mean(axes, keepdims=True), train[0].std(axes, keepdims=True)
    sets = [
        TensorDataset(torch.from_numpy(((x - mean) / deviation).astype(np.float32)), torch.tensor(y).long())
        for x, y in (train, test)
    ]
    return Images(*sets, channels=train[0].shape[1], classes=int(train[1].max()) + 1)


def _idx(path: Path) -> np.ndarray:
    """An idx file of bytes, compressed or not: two zeros, type, number of dimensions, the dimensions, the data."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dims = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(dims)


def fashion_mnist(folder: Path | None) -> Images:
    """The idx files of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017)."""
    folder = folder or FASHION_MNIST
    arrays = []
    for part in ("train", "t10k"):
        found = [sorted(folder.glob(f"{part}-{kind}-ubyte*")) for kind in ("images-idx3", "labels-idx1")]
        if not all(found):
            raise SystemExit(
                f"{folder} has no idx files of Fashion-MNIST. Install the Debian package dataset-fashion-mnist "
                "(apt-get install dataset-fashion-mnist), or name their folder with --data."
            )
        images, labels = (_idx(paths[0]) for paths in found)
        arrays.append((images[:, None].astype(np.float32), labels))
    return _standardised(*arrays)


def digits(folder: Path | None = None) -> Images:
    """scikit-learn's 8 x 8 digits; every third is for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, test = data.images[:, None].astype(np.float32), np.arange(len(data.images)) % 3 == 0
    return _standardised((images[~test], data.target[~test]), (images[test], data.target[test]))


def cifar10(folder: Path | None) -> Images:
    """The Python version of CIFAR-10 (Krizhevsky 2009): a folder with data_batch_1 to 5 and test_batch."""
    if folder is None or not (folder / "test_batch").exists():
        raise SystemExit(
            "CIFAR-10: name the folder cifar-10-batches-py (from https://www.cs.toronto.edu/~kriz/cifar.html) "
            f"with --data; got {folder}."
        )
    sets = []
    for names in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]):
        batches = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        sets.append((images.astype(np.float32), np.concatenate([batch[b"labels"] for batch in batches])))
    return _standardised(*sets)


def image_folder(folder: Path | None) -> Images:
    """Folders train and val with a folder a class, as ImageNet's; the paper's crops and flips."""
    if folder is None or not ((folder / "train").is_dir() and (folder / "val").is_dir()):
        raise SystemExit(f"folder: name a folder that holds train/ and val/ with --data; got {folder}.")
    try:
        from torchvision import datasets, transforms
    except ImportError:
        raise SystemExit("Folders of images are read by torchvision: pip install torchvision.") from None
    last = (transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    augmented = transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *last]
    )
    plain = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *last])
    train = datasets.ImageFolder(str(folder / "train"), augmented)
    test = datasets.ImageFolder(str(folder / "val"), plain)
    return Images(train, test, channels=3, classes=len(train.classes))


DATASETS: dict[str, Callable[[Path | None], Images]] = {
    "fashion-mnist": fashion_mnist,
    "digits": digits,
    "cifar10": cifar10,
    "folder": image_folder,
}
