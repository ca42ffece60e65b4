"""timm's own published tests of models, on our variants.

The variants differ in widths and depths alone, and the large ones take most of the time. GMF_TIMM=all runs them too.
"""

import os
import subprocess
import sys
import tarfile

import pytest
import timm


@pytest.mark.slow
def test_timm_suite(tmp_path):
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "timm", "-d", str(tmp_path)]
    fetched = subprocess.run([*download, f"timm=={timm.__version__}"], capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"timm's source archive, which holds its tests, cannot be had here: {fetched.stderr[-200:]}")
    with tarfile.open(next(tmp_path.glob("timm-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    suite = next(tmp_path.glob("timm-*/tests/test_models.py"))
    # Some tests choose models by a list of module names.
    text = suite.read_text()
    assert "FEAT_INTER_FILTERS = [" in text
    suite.write_text(text.replace("FEAT_INTER_FILTERS = [", "FEAT_INTER_FILTERS = ['groupmixformer', ", 1))
    # One file without the suite's own settings; importing the plugin `groupmixformer` registers the variants.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = [
        "-q",
        "-n",
        "2",
        "-p",
        "groupmixformer",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-c",
        str(tmp_path / "pytest.ini"),
    ]
    chosen = "groupmixformer" if os.environ.get("GMF_TIMM") == "all" else "groupmixformer_mobile"
    command = [sys.executable, "-m", "pytest", *options, "-k", chosen, str(suite)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TIMEOUT": "600"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=suite.parents[1], env=environment, check=False)
    print(result.stdout[-3000:])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
