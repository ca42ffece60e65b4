"""A run for the Hugging Face Hub: a folder with weights, configuration, recipe and a card; its upload."""

import tempfile
from pathlib import Path

import yaml

from ..files import atomic_write
from ..run_folder import RECIPE, RunFolder, one_line
from ..tasks.registry import find_task
from .model_card import read_card_info, render_card


def _collect(run: str | Path | RunFolder, folder: Path, repo_id: str, license: str) -> str:
    """Write everything but the card into a folder that is there, and return the card."""
    run = RunFolder.of(run)
    known = read_card_info(run, find_task(run.task).publish(run, folder))
    if known.recipe:
        (folder / RECIPE).write_text(yaml.safe_dump(known.recipe, sort_keys=False))
    return render_card(known, repo_id, license)


def model_card(run: str | Path | RunFolder, repo_id: str, license: str = "unknown") -> str:
    """Write down what is known of a model, in the Hub's form: Markdown headed by YAML.

    Args:
        run: Folder of a run, or what `load_model` reads; metrics and recipe are known for the folder of a run alone.
        repo_id: Where the model will be, ``user/name``.
        license: Of the weights, by the Hub's names, such as mit.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _collect(run, Path(folder), repo_id, license)


def write_folder(run: str | Path | RunFolder, folder: str | Path, repo_id: str, license: str = "unknown") -> list[str]:
    """Write what `push_to_hub` uploads: weights as safetensors, config.json, README.md and the recipe; no other file of a run.

    Args:
        run: As `model_card` has it.
        folder: Must be new or empty.
        repo_id: As `model_card` has it.
        license: As `model_card` has it.

    Returns:
        The names of the files.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it cannot be read, the folder holds something already, or the hub has no such names.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    folder = Path(folder)
    if "/" not in repo_id:
        raise ValueError(f"got {repo_id}, expected a user or organisation and a name, such as user/{repo_id}")
    validate_repo_id(repo_id)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: holds files already, expected a new or empty folder")
    with atomic_write(folder) as temporary:
        written = temporary / folder.name
        written.mkdir()
        (written / "README.md").write_text(_collect(run, written, repo_id, license), encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())


def push_to_hub(
    run: str | Path | RunFolder,
    repo_id: str,
    *,
    license: str = "unknown",
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Upload the model",
) -> str:
    """Upload a model with a card, so that timm, transformers and `load_checkpoint` find it as ``hf-hub:user/name``.

    Args:
        run: Folder of a run, or what `load_model` reads. Optimiser state and checkpoints of training stay here.
        repo_id: ``user/name``, which is created if need be. A file of the same name there is replaced, others stay.
        license: Of the weights, by the Hub's names, such as mit; the card says it.
        token: Of the Hub; by default that of ``hf auth login`` or of the variable HF_TOKEN.
        private: Make a new repository private.
        revision: Branch, which must exist; main by default.
        commit_message: First line of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it cannot be read, or the hub refuses a name or the card.
        OSError: If the hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "folder")
        write_folder(run, folder, repo_id, license)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
        except ValueError as error:
            raise ValueError(f"{repo_id}: the hub refuses the upload: {one_line(error)}") from error
        except Exception as error:  # what the HTTP client raises is its own
            status = getattr(getattr(error, "response", None), "status_code", None)
            remedy = "; log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
            raise OSError(f"{repo_id}: cannot be uploaded: {one_line(error)}{remedy}") from error
    return str(commit.commit_url)
