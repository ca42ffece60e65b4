"""The released variants: their sizes, the pages with their weights, and the folder in which a downloaded file is found."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = "https://github.com/AILab-CVC/GroupMixFormer"
FOLDER = "https://connecthkuhk-my.sharepoint.com/:f:/g/personal/rhettgee_connect_hku_hk"


@dataclass(frozen=True)
class Variant:
    """What is known of a variant without building it; the tests count it again.

    Attributes:
        parameters: With the classifier of 1000 classes.
        macs: Multiply-adds of an image.
        image_size: Its side in pixels.
        top1: Accuracy in % on ImageNet-1K, as published in the paper (arXiv 2311.15157).
        page: The link of the release's model zoo, which gives mobile and large the same one.
    """

    parameters: int
    macs: int
    image_size: int
    top1: float
    page: str


VARIANTS = {
    "mobile": Variant(5_733_120, 1_333_196_768, 224, 79.6, FOLDER + "/EuH7I7RGUSVHhD46RTECpesBqJVyACRzmBDwBXYWRxcDtg?e=Qvexbk"),
    "tiny": Variant(10_949_152, 3_685_821_256, 224, 82.6, FOLDER + "/EnRAzY3LalhGmqx91sEIqrUBLoa5ISS9kOw1ujNcOWSrzA?e=vkCUTZ"),
    "small": Variant(22_421_320, 5_133_120_960, 224, 83.4, FOLDER + "/Em7lUESSPaFPowQotlsUi1sBjA9uVldOUi2mbqdF40Uktw?e=ExCTeU"),
    "base": Variant(45_827_272, 17_428_041_088, 224, 84.7, FOLDER + "/Env1DBxPFZpMifAaVhHpKYgB3O4urE34o4b9_g4Jr-JfQQ?e=C6ed1c"),
    "large": Variant(
        71_833_648, 38_067_620_776, 224, 85.0, FOLDER + "/EuH7I7RGUSVHhD46RTECpesBqJVyACRzmBDwBXYWRxcDtg?e=Qvexbk"
    ),
}
VARIANTS["large_384"] = replace(VARIANTS["large"], macs=111_871_261_056, image_size=384, top1=86.2)

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
ENVIRONMENT = "GMF_WEIGHTS"


def variant_named(text: str) -> str | None:
    """Return the variant that a text names, ``small`` or ``groupmixformer_small``; none if it names none."""
    name = text.removeprefix("groupmixformer_")
    return name if name in VARIANTS else None


def weights_folder() -> Path:
    """Return where downloaded weights are looked for: GMF_WEIGHTS, or groupmixformer in the user's cache folder."""
    if folder := os.environ.get(ENVIRONMENT):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "groupmixformer"


def _is_of(path: Path, variant: str) -> bool:
    """Whether a file's name names the variant; large_384 is one of large at 384."""
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    return variant.removesuffix("_384") in words and variant.endswith("_384") == ("384" in words)


def find_weights(variant: str) -> Path:
    """Find the file with a variant's weights that a user has put into `weights_folder`.

    Args:
        variant: A key of `VARIANTS`. The file's name has it as a word, such as ``groupmixformer_small.pth``.

    Raises:
        FileNotFoundError: If there is none; says where to download it.
        ValueError: If there are several.
    """
    folder = weights_folder()
    known = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    found = [path for path in known if _is_of(path, variant)]
    if len(found) > 1:
        raise ValueError(f"{folder}: {', '.join(path.name for path in found)} are all named as {variant}: leave one there")
    if not found:
        where = f"download them with a browser from {VARIANTS[variant].page} (linked by {REPOSITORY}) and"
        if variant.startswith("large"):
            where = (
                f"they seem never to have been public ({REPOSITORY} links those of mobile in their place): if you have them,"
            )
        told = f"{where} put them there as groupmixformer_{variant}.pth, or set {ENVIRONMENT} to their folder"
        raise FileNotFoundError(f"no weights of {variant} in {folder}: {told}")
    return found[0]
