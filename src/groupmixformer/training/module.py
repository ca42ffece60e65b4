"""What every task shares: optimiser and schedule, EMA weights, sharding, skipped steps, unreadable images."""

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import lightning
import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torchmetrics import MeanMetric

from ..data.samples import Doubts, Samples, too_many
from ..data.seeding import seed_all
from ..models.groupmixformer import GroupMixFormer, joined_name
from ..run_folder import PRETRAINING, RunFolder
from . import old_names
from .loaders import DataModule
from .recipe import Recipe
from .resume import describe


def _drop_path(path: Any, x: torch.Tensor) -> torch.Tensor:
    """Do what timm's DropPath does, with its rate in a tensor: of a number, each value would need a graph of its own."""
    if not path.training:
        return x
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < path.keep
    return x * (kept / path.keep).to(x.dtype)


def compile_blocks(network: nn.Module) -> None:
    """Compile each block of a network in place for training, or all of it if it has none; names of weights do not change.

    Equal blocks share what is compiled. Where it fails, all blocks run eager from then on, and a warning says so once.
    """
    failed = False
    paths: list[Any] = [module for module in network.modules() if type(module) is DropPath and 0 < module.drop_prob < 1]
    for path in paths:
        path.register_buffer("keep", torch.tensor(1 - path.drop_prob), persistent=False)
        path.forward = MethodType(_drop_path, path)

    def compile_block(block: Any) -> None:
        eager: Callable[..., Any] = block.forward
        compiled: Callable[..., Any] = torch.compile(eager, dynamic=False)

        def forward(*args: Any, **options: Any) -> Any:
            nonlocal failed
            if failed or not block.training:  # graphs for validation, of other sizes, would be compiled for a few batches
                return eager(*args, **options)
            try:
                return compiled(*args, **options)
            except torch._dynamo.exc.TorchDynamoException as error:
                failed = True
                reason = " ".join(str(error).split())[:200]
                logging.getLogger(__name__).warning(f"torch.compile failed, so the run goes on without it: {reason}")
                return eager(*args, **options)

        block.forward = forward

    for block in [block for module in network.modules() for block in getattr(module, "blocks", ())] or [network]:
        compile_block(block)


class Task(lightning.LightningModule):
    """A model and how a recipe trains it; a task adds `training_step`, `validation_step` and `save`.

    Args:
        recipe: The settings.
        model: What is trained.
        loaders: Batches for training and validation.
        class_names: Names of the classes, in order.
        world_size: Number of processes.

    Raises:
        ValueError: If there are fewer samples than a batch, or the model cannot do what the recipe asks of it.
    """

    fixed_size = True  # whether all images of training are of one size
    monitor = "val_top1"  # the validation metric that decides which epoch is best; higher is better; without one, the last is

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        loaders: DataModule,
        class_names: list[str],
        world_size: int,
    ) -> None:
        super().__init__()
        self.recipe, self.loaders, self.class_names = recipe, loaders, class_names
        batch = recipe.batch_size * world_size
        self.total_batch = batch * recipe.grad_accum_steps  # samples in a step
        lr_batch = recipe.optimizer.lr_batch
        self.rate_scale = self.total_batch / lr_batch if lr_batch else 1.0  # of the recipe's learning rates
        self.steps_per_epoch = -(-loaders.batches(world_size) // recipe.grad_accum_steps)
        if not self.steps_per_epoch:
            share = (
                f", of which each of {recipe.workers} workers gets its part" if loaders.streams and recipe.workers > 1 else ""
            )
            raise ValueError(
                f"{loaders.samples} training images{share} are fewer than one batch of {batch}: lower batch_size"
                + (" or workers" if share else "")
            )
        if recipe.ema and recipe.strategy == "fsdp":
            raise ValueError("strategy fsdp shards the weights and cannot average them: set ema to null")
        # GroupMixFormer chooses its memory format itself; weights that are sharded must be contiguous.
        ours = any(isinstance(module, GroupMixFormer) for module in model.modules())
        if recipe.channels_last and recipe.strategy != "fsdp" and not ours:
            model = model.to(memory_format=torch.channels_last)
        if recipe.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise ValueError(f"{recipe.model} has no gradient checkpointing: set grad_checkpointing to false")
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.model: Any = model
        # In a list, and so no part of this module, all of whose weights Lightning would empty if it found some on meta.
        self.blueprint = [copy.deepcopy(model).to("meta")] if recipe.strategy == "fsdp" else []
        self.average = ModelEmaV3(model, recipe.ema, use_warmup=True) if recipe.ema else None
        if self.average:
            self.average.module.requires_grad_(False)  # DDP would wait for its gradients
        self.notes: list[str] = []  # about the data: what was left out, which classes are not there
        if recipe.checkpoint and RunFolder(recipe.checkpoint).task == PRETRAINING:
            self.notes.append(
                f"{recipe.checkpoint}: a pre-trained backbone: its own head is left out, what comes after it is new"
            )
        self.depends: dict[str, Any] = {}  # on what is not in the recipe, by name: resuming tells that it changed
        self.before: dict[str, Any] = {}  # what the checkpoint that the run continues from says of it
        self.history: list[dict[str, Any]] = []  # changes of the recipe while it ran, each with its place
        for name, samples in (("training", loaders.train), ("held-out", loaders.held_out)):
            if isinstance(samples, Samples):
                self.notes += samples.check(name, recipe.max_unreadable)
        self.skipped = 0  # steps without finite gradients
        self.skipped_in_a_row = 0
        self.unreadable: dict[str, None] = {}  # images, with the reason
        self.doubts = Doubts()  # of images that are read
        self.train_loss = MeanMetric(nan_strategy="ignore")
        self._losses: list[tuple[float, float]] = []  # a run that is resumed inside an epoch reports the whole epoch's loss
        self._statistics: list[torch.Tensor] = []

    @abstractmethod
    def save(self, model: Any, folder: Path) -> None:
        """Write `model`, which is `evaluated`, to a folder."""

    @property
    def trained(self) -> nn.Module:
        """What the optimiser updates: the model, maybe with layers that only training needs."""
        return self.model

    def compile_model(self) -> None:
        """Compile what is trained, or the part of it that compiles well."""
        compile_blocks(self.model)

    @property
    def counted(self) -> tuple[str, nn.Module]:
        """The network whose multiply-adds are told, and which part of the model it is, if not all."""
        return "", self.model

    @property
    def evaluated(self) -> Any:
        """The model that is evaluated and saved: the EMA one, if there is one."""
        return self.average.module if self.average else self.model

    def configure_model(self) -> None:
        """Shard the parameters over the processes, block by block, if the recipe says so."""
        if self.recipe.strategy == "fsdp" and self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for module in list(self.model.modules()):
                for block in getattr(module, "blocks", ()):
                    fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> Any:
        """Return timm's optimiser and its schedule, stepped after every update; rates are scaled to the total batch."""
        optimizer, schedule = self.recipe.optimizer, self.recipe.schedule
        made = create_optimizer_v2(
            self.trained,
            opt=optimizer.name,
            lr=optimizer.lr * self.rate_scale,
            weight_decay=optimizer.weight_decay,
            layer_decay=optimizer.layer_decay,
        )
        scheduler, _ = create_scheduler_v2(
            made,
            sched=schedule.name,
            num_epochs=self.recipe.epochs,
            warmup_epochs=schedule.warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=schedule.warmup_lr * self.rate_scale,
            min_lr=schedule.min_lr * self.rate_scale,
            decay_milestones=schedule.milestones,
            decay_rate=schedule.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        return [made], [{"scheduler": scheduler, "interval": "step"}] if scheduler else []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the rate of the next step by its place among the epochs, wherever the run was resumed with other batches."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self._set_rate(scheduler, done)

    def _set_rate(self, scheduler: Any, done: int) -> None:
        steps = self.current_epoch * self.steps_per_epoch + -(-done // self.recipe.grad_accum_steps)
        scheduler.step_update(num_updates=steps)

    def on_train_start(self) -> None:
        """Restore the loss of the epoch and the rate of this step, where a run is resumed."""
        if self._losses:
            self.train_loss.mean_value.fill_(sum(value for value, _ in self._losses))
            self.train_loss.weight.fill_(sum(weight for _, weight in self._losses))
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        for config in self.trainer.lr_scheduler_configs:
            self._set_rate(config.scheduler, 0 if progress.is_last_batch else progress.current.ready)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the random numbers of this step, so that they need no place in a checkpoint; remember the statistics of BN."""
        seed_all(self.recipe.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(torch.initial_seed())  # the accelerator's generator too
        if batch_idx == 0:
            self.train_loss.reset()  # a checkpoint of an epoch's end still holds the loss of that epoch
        if batch_idx % self.recipe.grad_accum_steps == 0 or not self._statistics:
            buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
            if self._statistics:
                torch._foreach_copy_(self._statistics, buffers)
            else:
                self._statistics = [buffer.clone() for buffer in buffers]

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradients; without finite gradients, skip the step.

        Raises:
            ValueError: If more than `recipe.max_skipped_steps` steps in a row had to be skipped.
        """
        gradients = [p.grad for p in self.trained.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if norm.isfinite():  # the same on every process, as gradients are
            self.skipped_in_a_row = 0
            if self.recipe.optimizer.clip_grad is not None:
                torch.nn.utils.clip_grads_with_norm_(self.trained.parameters(), self.recipe.optimizer.clip_grad, norm)
            self.log("grad_norm", norm)
            return
        # Optimisers pass over parameters without a gradient. BN has already averaged in what came of this batch.
        self.trained.zero_grad(set_to_none=True)
        torch._foreach_copy_([buffer for buffer in self.model.buffers() if buffer.is_floating_point()], self._statistics)
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.recipe.max_skipped_steps:
            last = self.recipe.last_checkpoint
            saved = f"The last checkpoint is {last}" if last.exists() else "There is no checkpoint yet"
            raise ValueError(
                f"the gradients of {self.skipped_in_a_row} steps in a row were not finite, the last at step "
                f"{self.global_step}; the weights are those before them. {saved}: lower optimizer.lr, or use precision "
                "bf16 or fp32"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, and the EMA weights after them."""
        super().optimizer_step(*args, **kwargs)
        if self.average and not self.skipped_in_a_row:
            self.average.update(self.model, step=self.global_step)

    def log_loss(self, loss: torch.Tensor, samples: int) -> None:
        """Log the training loss of a batch, and its mean over the epoch and the processes."""
        self.train_loss.update(loss.detach(), samples)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)

    def note_new(self, parameters: Sequence[str]) -> None:
        """Note, to be printed before training, which parameters a checkpoint of the same task did not have."""
        if parameters:
            few = ", ".join(parameters[:3]) + (", ..." if len(parameters) > 3 else "")
            self.notes.append(f"{self.recipe.checkpoint}: does not fit {len(parameters)} parameters, which stay new: {few}")

    def note_unreadable(self, problems: Sequence[str]) -> None:
        """Count unreadable images, and log what else is said of images.

        Args:
            problems: Names and reasons, as samples have them.

        Raises:
            ValueError: If they are more than the recipe's share of the training set.
        """
        self.unreadable.update(dict.fromkeys(self.doubts.take(problems)))
        self.check_unreadable(list(self.unreadable))

    def check_unreadable(self, found: Sequence[str]) -> None:
        """Stop the run if these unreadable images, of one process or of all, are more than the recipe allows.

        Raises:
            ValueError: If they are.
        """
        if too_many(len(found), self.loaders.samples, self.recipe.max_unreadable):
            raise ValueError(
                f"{len(found)} of {self.loaders.samples} training images cannot be read, more than max_unreadable "
                f"({self.recipe.max_unreadable:.2%}) allows: {'; '.join(found[:5])}{'; ...' if len(found) > 5 else ''}"
            )

    def _of_all(self, value: Any) -> list[Any]:
        """Return the values of all processes; all must call this."""
        gathered = [value] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(gathered, value)
        return gathered

    def all_unreadable(self) -> list[str]:
        """Return the unreadable images of all processes; all must call this."""
        return sorted({name for names in self._of_all(list(self.unreadable)) for name in names})

    def whole_model(self) -> nn.Module:
        """Return the model that is evaluated, with all its weights where they are sharded; all processes must call this."""
        if not self.blueprint:
            return self.evaluated
        weights = self.trainer.strategy.lightning_module_state_dict()  # empty on all processes but the first
        model = copy.deepcopy(self.blueprint[0])
        if weights:
            prefix = "model."
            model.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}, assign=True)
        return model.eval()

    def describe(self, processes: int) -> dict[str, Any]:
        """Return what a checkpoint says of the run."""
        return describe(self.recipe, processes, self.loaders.samples, self.class_names) | self.depends

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counts of all processes; Lightning saves the metrics of the first only."""
        loss = (float(self.train_loss.mean_value), float(self.train_loss.weight))
        checkpoint["counts"] = {"skipped": self.skipped, "unreadable": self.all_unreadable(), "losses": self._of_all(loss)}
        checkpoint["run"] = self.describe(self.trainer.world_size)
        checkpoint["run"]["history"] = self.history

    def _update_settings(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Set in an optimizer's state what the recipe says of its groups now.

        Raises:
            ValueError: If the state is that of another optimizer.
        """
        old = self.before.get("recipe", {}).get("optimizer", {}).get("name", self.recipe.optimizer.name)
        sizes = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
        if old != self.recipe.optimizer.name or sizes[0] != sizes[1]:
            raise ValueError(
                f"the checkpoint's state of {old} is not for {self.recipe.optimizer.name} with the groups of parameters that "
                "optimizer.layer_decay and weight_decay make: continue with these fields as they were"
            )
        for group, new in zip(state["param_groups"], optimizer.param_groups, strict=True):
            group |= {name: new[name] for name in ("lr", "initial_lr", "weight_decay", "lr_scale") if name in group}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counts; the schedule follows from the step and the recipe, which may have more epochs now."""
        old_names.rename_state(checkpoint)
        (optimizer,), _ = self.configure_optimizers()
        if any(joined_name(name) != name for name in checkpoint.get("state_dict", ())):
            names = {parameter: name for name, parameter in self.named_parameters()}
            groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
            old_names.join_segments(checkpoint, groups)
        self._update_settings(checkpoint["optimizer_states"][0], optimizer)
        checkpoint["lr_schedulers"] = []
        self.loaders.move(checkpoint, self.before)
        counts = checkpoint["counts"]
        self.skipped = counts["skipped"]
        self.unreadable = dict.fromkeys(counts["unreadable"])
        self._losses = counts["losses"][self.global_rank :: self.trainer.world_size]  # there may have been more processes
