"""The package with its oldest and newest neighbours, by hand before a release: nox -s oldest, nox -s newest-3.13."""

import nox

nox.options.default_venv_backend = "venv"
# The lower limits of pyproject.toml, with the extras that the tests below import, and what timm can do since 1.0.31 alone.
OLDEST = ("torch==2.8.*", "torchvision==0.23.*", "timm==1.0.26")
NETWORK = ("checkpoint", "dispatch", "fuse", "groupmixformer", "mixers", "onednn", "recompute")
RUNS = ("classes", "detection", "recipe", "resume", "segmentation", "weights")
NEWER = "coat_lite_tiny or (resnet18 and (recomputed_activations or gradient_checkpointing_changes))"


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The network, its checkpoints and runs with the oldest PyTorch, torchvision and timm that pyproject.toml admits."""
    session.install(*OLDEST, ".[segmentation,export,data]", "pytest", "pytest-xdist", "hypothesis", "scipy")
    files = [f"tests/test_{name}.py" for name in (*NETWORK, *RUNS)]
    session.run("pytest", *files, "-k", f"not ({NEWER})", *session.posargs)


@nox.session(python=["3.12", "3.13"])
def newest(session: nox.Session) -> None:
    """Everything with the newest releases, on later Pythons than CI has."""
    session.install("torch", "torchvision", ".[test]")
    session.run("pytest", *session.posargs)
