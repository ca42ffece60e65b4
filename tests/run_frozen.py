"""Runs `gmf` with the statistics of BatchNorm frozen: on CPU they are not synchronised, so processes could not agree.

With PAUSE_AT="EPOCH BATCH FOLDER" every process writes its number to FOLDER/paused-RANK before that batch and waits for FOLDER/go.
"""

import os
import sys
import time
from pathlib import Path

from torch import nn

from groupmixformer.classification import Classification
from groupmixformer.cli import main

training_step = Classification.training_step


def freeze(task):
    for module in task.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def pause(task, batch, batch_idx):
    epoch, index, folder = os.environ["PAUSE_AT"].split(" ", 2)
    if (task.current_epoch, batch_idx) == (int(epoch), int(index)):
        written = Path(folder, f"writing-{task.global_rank}")
        written.write_text(str(os.getpid()))
        written.rename(Path(folder, f"paused-{task.global_rank}"))
        while not Path(folder, "go").exists():
            time.sleep(0.05)
    return training_step(task, batch, batch_idx)


if __name__ == "__main__":
    Classification.on_train_epoch_start = freeze
    if "PAUSE_AT" in os.environ:
        Classification.training_step = pause
    sys.exit(main(sys.argv[1:]))
