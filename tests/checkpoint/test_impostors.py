"""Files that are not what their names say, and files that are not there: named, with the step that brings them."""

import shlex

import pytest

from gemma4_moe import convert, inspect
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.errors import ConfigError, InputError
from support.checkpoints import contents

FIRST, SECOND = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 2336\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
IMPOSTORS = {"a pointer of Git LFS": POINTER, "a web page": PAGE, "a web page, bare": PAGE.split(b"\n")[2].upper()}


@pytest.mark.parametrize("name", [FIRST, "model.safetensors.index.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", IMPOSTORS)
def test_an_impostor_is_named_wherever_it_is(kind, name, source, tmp_path):
    (source / name).write_bytes(IMPOSTORS[kind])
    with pytest.raises((InputError, ConfigError), match=f"{kind.split(',')[0]} in place of the file") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.facts["file"] == str(source / name)
    if kind.endswith("LFS"):
        assert shlex.quote(str(source)) in caught.value.hint
        assert caught.value.hint.endswith("lfs pull")
    else:
        assert f"fetch {name} again" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_files_that_only_begin_likewise_are_no_impostors(source):
    (source / "README.md").write_text("version 2 of the model\n")
    (source / "LICENSE").write_text("")
    (source / "chat_template.jinja").write_text("<h1>{{ message }}")
    assert inspect(source).problems == ()


@pytest.mark.parametrize("state", ["missing", "dangling", "incomplete"])
def test_one_missing_file_is_fetched_alone(state, source):
    (source / SECOND).rename(source / f"{SECOND}.incomplete")
    if state != "incomplete":
        (source / f"{SECOND}.incomplete").unlink()
    if state == "dangling":
        (source / SECOND).symlink_to("../blobs/0123")
    with pytest.raises(InputError) as caught:
        open_checkpoint(source)
    assert f"fetch {SECOND}" in caught.value.hint
    assert FIRST not in caught.value.hint
    assert "whole checkpoint" not in str(caught.value)
    if state == "incomplete":
        assert caught.value.facts["found"] == f"{SECOND}.incomplete, whose download has not ended"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "consolidated.safetensors"])
def test_weights_beside_a_model_are_the_users_and_moved_by_the_hint(name, source, tmp_path):
    (source / name).write_bytes((source / FIRST).read_bytes())
    with pytest.raises(InputError) as caught:
        open_checkpoint(source)
    assert "left over" not in str(caught.value)
    assert "remove" not in caught.value.hint
    kept = contents(source)[name]
    first, second = caught.value.hint.rpartition("elsewhere: ")[2].split(" && ")
    import subprocess

    for command in (first, second):
        subprocess.run(shlex.split(command), check=True)
    assert inspect(source).problems == ()
    assert contents(tmp_path / "hf-other-files") == {name: kept}


def test_a_directory_of_checkpoints_lists_them(source, tmp_path):
    run = tmp_path / "run"
    for place in ("epoch_0_step_9", "epoch_0_step_10"):
        (run / place).mkdir(parents=True)
        (run / place / "losses.json").write_text("{}")
    (run / ".hidden").mkdir()
    for place in ("epoch_0_step_9/other", "export", ".hidden/copy"):
        (run / place).mkdir()
        for path in source.iterdir():
            (run / place / path.name).write_bytes(path.read_bytes())
    (run / "LATEST").symlink_to("export")
    with pytest.raises(InputError, match="holds checkpoints, and is none itself") as caught:
        open_checkpoint(run)
    assert caught.value.facts["found"] == "epoch_0_step_9/other, export"
    words = shlex.split(caught.value.hint.rpartition(": ")[2])
    assert words == ["gemma4-moe", "inspect", str(run / "epoch_0_step_9" / "other")]
    assert inspect(words[-1]).problems == ()
