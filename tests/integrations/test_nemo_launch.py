"""`install()` by way of NeMo's own launcher, of torchrun and of Ray's setup hook."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4_moe.errors import UsageError
from gemma4_moe.integrations import nemo_launch

RECIPE = """
import os
from nemo_automodel.components.models.gemma4_moe import model

class Recipe:
    def __init__(self, config):
        self.config = config

    def setup(self):
        self.text = f"rank {os.environ.get('RANK')} {self.config.step} {model.Gemma4MoEStateDictAdapter.__module__}"

    def run_train_validation_loop(self):
        with open(os.path.join(os.environ["FOUND"], os.environ["RANK"]), "w") as out:
            out.write(self.text)

if __name__ == "__main__":
    raise SystemExit("run as a file, without the adapter")
"""


def launched(tmp_path, *command):
    (tmp_path / "recipe_of_a_test.py").write_text(RECIPE)
    (tmp_path / "recipe.yaml").write_text("recipe:\n  _target_: recipe_of_a_test.Recipe\nstep: 3\n")
    found = tmp_path / "found"
    found.mkdir()
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "FOUND": str(found), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return {path.name: path.read_text() for path in found.iterdir()}


OURS = "gemma4_moe.integrations.nemo_automodel"
THEIRS = "nemo_automodel.components.models.gemma4_moe.state_dict_adapter"


def test_the_launcher_installs_in_each_process(tmp_path):
    module = "gemma4_moe.integrations.nemo_launch"
    found = launched(tmp_path, "-m", module, "recipe.yaml", "--nproc-per-node", "2", "--step=7")
    assert found == {"0": f"rank 0 7 {OURS}", "1": f"rank 1 7 {OURS}"}


def test_torchrun_may_start_the_launcher(tmp_path):
    module = "gemma4_moe.integrations.nemo_launch"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", module]
    assert launched(tmp_path, *torchrun, "recipe.yaml") == {"0": f"rank 0 3 {OURS}"}


def test_nemos_own_launcher_uses_its_own_adapter(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "nemo_automodel.cli.app"]
    assert launched(tmp_path, *torchrun, "recipe.yaml") == {"0": f"rank 0 3 {THEIRS}"}


@pytest.mark.parametrize("section", ["skypilot", "nemo_run"])
def test_a_recipe_for_other_machines_is_refused(tmp_path, section):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"recipe: a.Recipe\n{section}:\n  nodes: 2\n")
    with pytest.raises(UsageError, match=rf"(?s)other machines.*{section}.*torchrun"):
        nemo_launch.main([str(recipe)])


def test_the_setup_hook_in_the_docs_is_a_callable_without_arguments():
    """Ray imports a hook that is a string, and calls it in every worker process."""
    text = (Path(__file__).parents[2] / "docs" / "nemo-automodel.md").read_text()
    (hook,) = [line for line in text.splitlines() if "worker_process_setup_hook" in line]
    module, _, name = hook.split('"')[3].rpartition(".")
    inspect.signature(getattr(importlib.import_module(module), name)).bind()
