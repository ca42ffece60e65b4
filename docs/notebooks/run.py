"""Run the notebooks of this folder again and keep what they show: ``python docs/notebooks/run.py``, with gmf on the PATH."""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

os.environ["PYTHONWARNINGS"] = "ignore"  # which name paths of this machine
for path in [Path(name) for name in sys.argv[1:]] or sorted(Path(__file__).parent.glob("*.ipynb")):
    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=1800, record_timing=False, resources=place).execute()
    for cell in notebook.cells:
        whole = []  # what a command prints comes in pieces
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/jpeg", None)  # beside the same as PNG
            if whole and "stream" == output.output_type == whole[-1].output_type and output.name == whole[-1].name:
                whole[-1].text += output.text
            else:
                whole.append(output)
        if whole:
            cell.outputs = whole
    nbformat.write(notebook, path)
