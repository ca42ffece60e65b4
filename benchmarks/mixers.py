"""The table of docs/mixers.md: parameters and multiply-accumulates of a network with each mixer.

python benchmarks/mixers.py [--model groupmixformer_mobile] [--size 224]
"""

import argparse

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import groupmixformer  # noqa: F401 - registers the variants
from groupmixformer.models.mixers import MIXERS, mixer_class


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="groupmixformer_mobile")
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    print("| mixer | what it does, and its paper | parameters M | MACs G | whose code |")
    print("|---|---|---|---|---|")
    for name, (_, source) in MIXERS.items():
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = timm.create_model(arguments.model, mixer=name).eval()
            model(torch.empty(1, 3, arguments.size, arguments.size))
        about = mixer_class(name).__doc__.splitlines()[0].rstrip(".")
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        row = name, about, f"{parameters:.2f}", f"{counter.get_total_flops() / 2e9:.2f}", source.rpartition("; ")[2]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
