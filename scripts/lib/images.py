"""Fashion-MNIST, from the Debian package dataset-fashion-mnist (MIT licence, 31 MB)."""

import gzip
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
CACHE = Path(__file__).resolve().parents[2] / ".sparse_comm_cache" / "fashion-mnist"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class NoImages(RuntimeError):
    """The images are not here, and could not be had."""


def find_images() -> Path:
    """The folder of the images: where the package is installed, or a cache in the checkout.

    Raises:
        NoImages: neither has them, and ``apt-get download`` cannot get the package.
    """
    for folder in (INSTALLED, CACHE):
        if all((folder / name).exists() for names in FILES.values() for name in names):
            return folder
    _download()
    return CACHE


def _download() -> None:
    """Unpack the package into the cache; nothing is installed, and no rights are needed."""
    print(f"Getting {PACKAGE} (31 MB) by apt-get download", flush=True)
    with tempfile.TemporaryDirectory(prefix="sparse-comm-") as folder:
        try:
            for command in (["apt-get", "download", PACKAGE], ["dpkg-deb", "-x", None, "."]):
                package = next(Path(folder).glob("*.deb"), None)
                whole = [str(package) if part is None else part for part in command]
                subprocess.run(whole, cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            raise NoImages(
                f"the images of Fashion-MNIST are not in {INSTALLED}, and apt-get download "
                f"{PACKAGE} failed ({said}): install that package (Debian, Ubuntu), or put its "
                "four files there"
            ) from error
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        found = next(Path(folder).rglob(FILES["train"][0])).parent
        shutil.copytree(found, CACHE, dirs_exist_ok=True)


def fashion_mnist(part: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 28, 28), fp32, of mean 0 and deviation 1; labels (count,), int64."""
    images, labels = (folder / name for name in FILES[part])
    pixels = torch.frombuffer(
        bytearray(gzip.decompress(images.read_bytes())[16:]), dtype=torch.uint8
    )
    classes = torch.frombuffer(
        bytearray(gzip.decompress(labels.read_bytes())[8:]), dtype=torch.uint8
    )
    scaled = (pixels.view(-1, 1, 28, 28).float() / 255 - 0.286) / 0.353
    return scaled, classes.long()
