"""Unpacks the CIFAR-10 of a development checkout (`../shared/data/cifar10`, WebP mosaics) into an image folder.

    python benchmarks/cifar10_folder.py ../shared/data/cifar10 /tmp/cifar10

The images of each part are in random order there: the first ones of `--train` and `--test` make a smaller set.
With a network, `--data torch/cifar10 --download true` needs none of this.
"""

import argparse
import io
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image


def unpack(source, split):
    """Yield (image (32, 32, 3), class name) of a split."""
    for file in sorted(source.glob(f"{split}*.npz")):
        with np.load(file) as arrays:
            mosaics, offsets, labels, names = (arrays[key] for key in ("mosaics", "offsets", "labels", "classes"))
        for i, label in enumerate(labels):
            if i % 100 == 0:
                start, stop = offsets[i // 100 : i // 100 + 2]
                tiles = np.asarray(Image.open(io.BytesIO(mosaics[start:stop].tobytes())).convert("RGB"))
                tiles = tiles.reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(100, 32, 32, 3)
            yield tiles[i % 100], str(names[label])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=50000, help="images for training")
    parser.add_argument("--test", type=int, default=10000, help="images for testing")
    args = parser.parse_args()
    for split, folder, count in (("train", "train", args.train), ("test", "val", args.test)):
        for i, (image, name) in enumerate(islice(unpack(args.source, split), count)):
            place = args.out / folder / name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i:05d}.png", compress_level=1)
        print(split, i + 1)


if __name__ == "__main__":
    main()
