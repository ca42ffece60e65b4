"""Runs `gmf` with the statistics of BatchNorm frozen: on CPU they are not synchronised, so processes could not agree.

With PAUSE_AT="EPOCH BATCH FOLDER" every process writes its number to FOLDER/paused-RANK before that batch and waits for
FOLDER/go. With POISON_AT="EPOCH BATCH RANK" one process gets images that are not numbers.
With LEARN_STATISTICS nothing is frozen.
"""

import os
import sys
import time
from pathlib import Path

from torch import nn

from groupmixformer.cli.main import main
from groupmixformer.tasks.classification.training import ClassificationModule

real = ClassificationModule.training_step


def training_step(task, batch, batch_idx):
    for module in task.model.modules():
        if isinstance(module, nn.BatchNorm2d) and "LEARN_STATISTICS" not in os.environ:
            module.eval()
    return real(task, batch, batch_idx)


def poisoned_step(task, batch, batch_idx):
    epoch, index, rank = map(int, os.environ["POISON_AT"].split())
    if (task.current_epoch, batch_idx, task.global_rank) == (epoch, index, rank):
        batch[0][:] = float("nan")
    return training_step(task, batch, batch_idx)


def pausing_step(task, batch, batch_idx):
    epoch, index, folder = os.environ["PAUSE_AT"].split(" ", 2)
    if (task.current_epoch, batch_idx) == (int(epoch), int(index)):
        written = Path(folder, f"writing-{task.global_rank}")
        written.write_text(str(os.getpid()))
        written.rename(Path(folder, f"paused-{task.global_rank}"))
        while not Path(folder, "go").exists():
            time.sleep(0.05)
    return training_step(task, batch, batch_idx)


if __name__ == "__main__":
    steps = {"PAUSE_AT": pausing_step, "POISON_AT": poisoned_step}
    ClassificationModule.training_step = next((step for name, step in steps.items() if name in os.environ), training_step)
    sys.exit(main(sys.argv[1:]))
