"""Runs `gmf` with the statistics of BatchNorm frozen: on CPU they are not synchronised, so processes could not agree."""

import sys

from torch import nn

from groupmixformer.classification import Classification
from groupmixformer.cli import main


def freeze(task):
    for module in task.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


Classification.on_train_epoch_start = freeze

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
