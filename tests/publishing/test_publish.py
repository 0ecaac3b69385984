"""`publish`: any source of a run becomes one complete, verified hf directory, and its upload is that directory."""

import json

import pytest
import torch

from gemma4_moe import publish, verify
from gemma4_moe.errors import ConfigError, DifferenceError, UsageError
from gemma4_moe.publishing import publish as module
from support.checkpoints import contents, flip_bit, write_checkpoint
from support.command import run
from support.formulas import assert_same_tensors, hf_from_nemo, nemo_from_hf
from support.hub_server import start
from support.hub_uploads import receiving
from support.models import DOWN, random_hf_state_dict, read_directory
from support.steps import write_step

SIZES = {"E": 6, "H": 40, "I": 24}
EXTRA = ("generation_config.json", "chat_template.jinja", "processor_config.json", "LICENSE")


@pytest.fixture
def base(tmp_path):
    path = write_checkpoint(tmp_path / "base", random_hf_state_dict(**SIZES))
    for name in EXTRA:
        (path / name).write_text(f"the base's {name}")
    (path / "README.md").write_text("the base's card")
    return path


@pytest.fixture
def trained():
    state = hf_from_nemo(nemo_from_hf(random_hf_state_dict(**SIZES)))
    state[DOWN] = state[DOWN].clone()
    state[DOWN][1] += 1
    return state


@pytest.fixture
def step(tmp_path, base, trained):
    """A run's step in parts, whose config was written anew and whose tokenizer is gone."""
    whole = write_checkpoint(tmp_path / "whole", trained)
    model = write_step(tmp_path / "run" / "epoch_0_step_7", whole, 2)
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": "/home/me/base"}
    (model / ".hf_metadata" / "config.json").write_text(json.dumps(config))
    (model / ".hf_metadata" / "tokenizer.json").unlink()
    return model.parent


def given_back(trained):
    published = random_hf_state_dict(**SIZES)
    scale = DOWN.replace("experts.down_proj", "router.per_expert_scale")
    expected = {name: tensor.clone() for name, tensor in published.items()}
    expected[DOWN][1], expected[scale][1] = trained[DOWN][1], 1
    return expected


def test_a_run_becomes_a_complete_directory(step, base, trained, tmp_path):
    done = publish(step.parent, tmp_path / "out", base=base)
    assert_same_tensors(read_directory(tmp_path / "out"), given_back(trained))
    for name in ("config.json", "tokenizer.json", *EXTRA):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made from: `epoch_0_step_7`, in the hf layout, in parts" in card
    assert "base: `base`; 11 of 12 experts" in card
    assert str(tmp_path) not in card
    assert done.verification.different == ()
    assert str(step / "model") in " ".join(done.notes)
    assert verify(tmp_path / "out").wrong == ()


def test_without_a_base_the_step_is_published_with_notes(step, trained, tmp_path):
    done = publish(step, tmp_path / "out")
    assert_same_tensors(read_directory(tmp_path / "out"), trained)
    assert any("config.json names a place of this machine, /home/me/base" in note for note in done.notes)
    assert any("no tokenizer" in note for note in done.notes)


def test_a_native_directory_and_an_export_are_published_too(base, trained, tmp_path):
    from gemma4_moe import convert

    convert(write_checkpoint(tmp_path / "whole", trained), tmp_path / "native")
    for name in ("native", "whole"):
        publish(tmp_path / name, tmp_path / f"{name}-out", base=base)
        assert_same_tensors(read_directory(tmp_path / f"{name}-out"), given_back(trained))


def test_the_card_of_a_source_is_kept(base, trained, tmp_path):
    source = write_checkpoint(tmp_path / "whole", trained)
    (source / "README.md").write_text("mine")
    publish(source, tmp_path / "out", base=base)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_weights_of_another_dtype_than_the_config_says_are_noted(trained, tmp_path):
    from support.checkpoints import config_of

    state = {name: tensor.float() for name, tensor in trained.items()}
    whole = write_checkpoint(tmp_path / "whole", state, config_of(state) | {"dtype": "bfloat16"})
    step = write_step(tmp_path / "step", whole, 2)
    done = publish(step, tmp_path / "out")
    assert "weights are float32, and config.json says bfloat16" in done.notes
    done = publish(step, tmp_path / "bf16", dtype="bfloat16")
    assert_same_tensors(read_directory(tmp_path / "bf16"), {k: t.to(torch.bfloat16) for k, t in state.items()})


def test_an_hf_directory_with_nothing_to_change_is_said(base, tmp_path):
    with pytest.raises(UsageError, match="in the hf layout already") as caught:
        publish(base, tmp_path / "out")
    assert f"hf upload USER/MODEL {base}" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_step_without_a_config_asks_for_the_base(step, base, trained, tmp_path):
    (step / "model" / ".hf_metadata" / "config.json").unlink()
    with pytest.raises(ConfigError) as caught:
        publish(step, tmp_path / "out")
    assert "give --base SRC" in caught.value.hint
    publish(step, tmp_path / "out", base=base)
    assert_same_tensors(read_directory(tmp_path / "out"), given_back(trained))


def test_a_directory_that_differs_is_an_error_and_not_pushed(step, base, tmp_path, monkeypatch):
    convert = module.convert

    def flipping(*arguments, **more):
        done = convert(*arguments, **more)
        flip_bit(done.target / "model.safetensors", -9)
        return done

    monkeypatch.setattr(module, "convert", flipping)
    monkeypatch.setattr(module, "push_directory", lambda *_, **__: pytest.fail("pushed"))
    with pytest.raises(DifferenceError):
        publish(step, tmp_path / "out", base=base, push="USER/MODEL")


def test_a_name_that_is_none_is_refused_before_anything_is_made(step, base, tmp_path):
    with pytest.raises(UsageError, match="no name of a repository"):
        publish(step, tmp_path / "out", base=base, push="not a name")
    assert not (tmp_path / "out").exists()


def pushing(hub, home, *arguments, **more):
    return start(hub, home, "publish", *arguments, HF_HUB_DISABLE_XET="1", **more)


def test_the_upload_is_the_directory(step, base, tmp_path):
    with receiving("me/tuned", tmp_path) as hub:
        done = pushing(hub, tmp_path, step, tmp_path / "out", "--base", base, "--push", "me/tuned", "--private")
        assert hub.created[0]["visibility"] == "private"
        assert sorted(hub.files) == sorted(contents(tmp_path / "out"))
        assert all(content == (tmp_path / "out" / name).read_bytes() for name, content in hub.files.items())
    assert "pushed  me/tuned, commit 0123456789abcdef0123456789abcdef01234567" in done.stdout


def test_an_upload_that_broke_off_is_not_sent_twice(base, tmp_path):
    with receiving("me/tuned", tmp_path) as hub:
        hub.refused = 1
        failed = pushing(hub, tmp_path, base, tmp_path / "out", "--push", "me/tuned", status=5)
        assert "hf upload me/tuned" in failed.stderr
        before = hub.received
        assert len(before) < 2
        done = pushing(hub, tmp_path, base, tmp_path / "out", "--push", "me/tuned", "--format", "json")
        assert hub.received[: len(before)] == before
        assert json.loads(done.stdout)["pushed"]["repository"] == "me/tuned"
        assert sorted(name for name in hub.files if name.endswith(".safetensors")) == sorted(
            path.name for path in base.glob("*.safetensors")
        )
    assert "nothing was made" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_token_that_may_not_write_is_named(base, tmp_path):
    with receiving("me/tuned", tmp_path) as hub:
        hub.forbidden = True
        failed = pushing(hub, tmp_path, base, tmp_path / "out", "--push", "me/tuned", status=5)
    assert "the Hub refuses the upload: status 403" in failed.stderr


def test_the_command_loads_no_torch_and_no_hub_client(step, base, tmp_path):
    program = (
        "import sys; from gemma4_moe.cli.commands import main\n"
        f"sys.argv = ['gemma4-moe', 'publish', {str(step)!r}, {str(tmp_path / 'out')!r}, '--base', {str(base)!r}]\n"
        "try: main()\n"
        "finally: assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    )
    run(program=program)
