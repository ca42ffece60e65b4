"""The paper: the network, its checkpoints, its inference form, its attention maps."""
