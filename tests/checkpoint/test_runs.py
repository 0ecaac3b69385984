"""Which model a run, a step, a pointer or a model's own directory means."""

import shlex

import pytest

from gemma4_moe import inspect
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.checkpoint.runs import taken
from gemma4_moe.errors import CheckpointFormatError
from support.steps import write_step

STEPS = [(0, 9), (0, 100), (1, 20)]


@pytest.fixture
def run(source, tmp_path):
    """A run of three steps in parts."""
    for epoch, step in STEPS:
        write_step(tmp_path / "run" / f"epoch_{epoch}_step_{step}", source, 2)
    return tmp_path / "run"


def test_the_last_step_of_a_run_is_that_of_the_highest_number(run):
    found = taken(run)
    assert found.path == run / "epoch_0_step_100" / "model"
    assert found.notes == (f"of {run}, the model in {found.path} was taken: its last complete step of 3",)


def test_latest_decides_if_it_is_complete(run):
    (run / "LATEST").symlink_to("epoch_1_step_20")
    assert taken(run).path == run / "epoch_1_step_20" / "model"
    assert "its LATEST of 3" in taken(run).notes[0]
    (run / "epoch_1_step_20" / ".incomplete").touch()
    assert taken(run).path == run / "epoch_0_step_100" / "model"
    assert taken(run).notes[0].endswith("its last complete step of 3; 1 were interrupted")


@pytest.mark.parametrize("name", ["LATEST", "LOWEST_VAL"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_pointer_is_followed_as_a_link_or_as_text(run, name, as_text):
    if as_text:
        (run / f"{name}.txt").write_text("epoch_0_step_9\n")
    else:
        (run / name).symlink_to("epoch_0_step_9")
    assert taken(run / name).path.resolve() == run / "epoch_0_step_9" / "model"
    assert "epoch_0_step_9" in taken(run / name).notes[0]


def test_a_consolidated_model_of_a_step_comes_first(run, source):
    step = run / "epoch_0_step_9"
    source.rename(step / "model" / "consolidated")
    assert taken(step).path == step / "model" / "consolidated"
    assert taken(step / "model") == (step / "model", ()), "the parts themselves were named"
    assert taken(step / "model" / "consolidated") == (step / "model" / "consolidated", ())
    assert inspect(step).notes[0] == f"of {step}, the model in {step / 'model' / 'consolidated'} was taken"


@pytest.mark.parametrize("place", ["", "model", "model/consolidated"])
def test_an_interrupted_step_is_never_taken(run, source, place):
    step = run / "epoch_0_step_9"
    source.rename(step / "model" / "consolidated")
    (step / ".incomplete").touch()
    with pytest.raises(CheckpointFormatError, match="was interrupted") as caught:
        open_checkpoint(step / place)
    assert shlex.split(caught.value.hint.partition(": ")[2])[0] == "ls"


def test_a_run_of_interrupted_steps_is_refused(run):
    for epoch, step in STEPS:
        (run / f"epoch_{epoch}_step_{step}" / ".incomplete").touch()
    with pytest.raises(CheckpointFormatError, match="was interrupted"):
        open_checkpoint(run)


def test_other_directories_mean_themselves(run, source, tmp_path):
    for path in (source, tmp_path / "absent", tmp_path, run / "LATEST"):
        assert taken(path) == (path, ())
