"""docs/it-failed.md: its errors are the program's own, and its commands lead out of those that are provoked here."""

import ast
import json
import re
import shlex
import shutil
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from gemma4_moe import convert
from gemma4_moe.checkpoint.directory import control_directory
from gemma4_moe.layout.dtypes import BFLOAT16
from gemma4_moe.target.recovery import take_lock
from support.checkpoints import write_checkpoint
from support.command import run
from support.documents import ROOT, blocks, rows
from support.formulas import assert_same_tensors, nemo_from_hf
from support.models import random_hf_state_dict, read_directory, rename_tensors
from support.sparse import real_config, real_names_and_shapes, write_sparse_checkpoint

PAGE = (ROOT / "docs/it-failed.md").read_text()
ROWS = {cells[0]: cells[2] for cells in rows(PAGE) if cells[0] not in ("error", "command", "---")}
ERRORS = {error.strip("`"): todo for error, todo in ROWS.items() if re.fullmatch(r"`[^`]+`", error)}

#: Errors that are not this program's, and commands whose result is meant.
OTHERS = {"gemma4-moe verify SRC DST", "gemma4-moe verify DST", "torchrun: command not found"}


def texts():
    """Each text in the program's code, with `…` for what is filled in; docstrings are left out."""
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield node.value


#: Those with some words of their own.
TEXTS = {text for text in texts() if len(text.replace("…", "")) >= len("can't : ")}


def fits(text, filled):
    """Whether a text is another one, in which more is filled in."""
    return re.fullmatch(re.escape(text).replace("…", ".*"), filled, re.DOTALL)


def is_said(error):
    """Whether the program has a text of which an error is an instance, or that is one of the error's."""
    return any(fits(text, error) or fits(error, text) for text in TEXTS)


@pytest.mark.parametrize("error", sorted(ERRORS.keys() - OTHERS))
def test_each_error_is_one_of_the_programs(error):
    assert is_said(error), "say it as the code does"


def test_an_error_that_the_program_does_not_have_is_noticed():
    assert not is_said("the target is there already")
    assert not is_said("can't be read")
    assert len(ERRORS) > 40


def test_the_example_is_what_the_command_prints(source, tmp_path):
    convert(source, tmp_path / "gemma-4-nemo")
    done = run("convert", source, "gemma-4-nemo", cwd=tmp_path, status=2)
    assert done.stderr == blocks(PAGE)[0]


# ----- what goes wrong, by the error on the page: a function that does it in a directory with `hf`, the hf checkpoint


def fill(place):
    convert(place / "hf", place / "nemo")


def forget_a_shard(place):
    (place / "hf/model-00002-of-00002.safetensors").unlink()


def put_in(content, name, place):
    (place / "hf" / name).write_bytes(content)


def rename(pattern, replacement, place):
    rename_tensors(place / "hf", lambda name: re.sub(pattern, replacement, name))


def lose_the_scales(place):
    for file in (place / "hf").glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if "per_expert_scale" not in n}, file, {"format": "pt"})
    index = place / "hf/model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = {n: f for n, f in document["weight_map"].items() if "per_expert_scale" not in n}
    index.write_text(json.dumps(document))


def be_interrupted(place):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(place / "hf", place / "nemo", progress=stop)


def take_the_lock(place):
    return take_lock(control_directory(place / "nemo"), break_lock=False).release


def prune(place):
    config = json.loads((place / "hf/config.json").read_text())
    config["text_config"]["num_experts"] = 9
    (place / "hf/config.json").write_text(json.dumps(config))


def quantise(place):
    config = json.loads((place / "hf/config.json").read_text())
    (place / "hf/config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))


PROVOKED = {
    "an earlier run to this target was not finished": (be_interrupted, 2),
    "the target exists": (fill, 2),
    "the target holds files that no checkpoint accounts for": (
        lambda place: (fill(place), (place / "nemo/notes.txt").touch()),
        (2, "--overwrite"),
    ),
    "another process is writing this target": (take_the_lock, 6),
    "the index names a file that is not there": (forget_a_shard, 3),
    "a pointer of Git LFS in place of the file": (
        partial(put_in, b"version https://git-lfs.github.com/spec/v1\n", "model-00001-of-00002.safetensors"),
        3,
    ),
    "a web page in place of the file": (partial(put_in, b"<!doctype html><html></html>", "tokenizer.json"), 3),
    "a safetensors file that the index does not name": (
        lambda place: shutil.copy(place / "hf/model-00001-of-00002.safetensors", place / "hf/more.safetensors"),
        3,
    ),
    "several safetensors files, and no index that says which belong together": (
        lambda place: (place / "hf/model.safetensors.index.json").unlink(),
        3,
    ),
    "names of a wrapped module": (partial(rename, "^model", "_orig_mod.model"), 3),
    "names with another prefix than config.json calls for": (partial(rename, "^model", "model.model"), 3),
    "Incomplete expert weights: no layer has its per_expert_scale": (lose_the_scales, 3),
    "num_experts in config.json is not the weights' number of experts, which agree": (prune, 3),
    "config.json says that the weights are quantised": (quantise, 3),
    "a … checkpoint, which is not converted": (partial(rename, "layer_scalar", "layer_scalar.absmax"), 3),
    "the Hub may not be asked: HF_HUB_OFFLINE is set": (lambda _: None, (5, "--stream")),
}


@pytest.mark.parametrize("error", PROVOKED)
def test_an_error_reads_as_on_the_page_and_its_commands_work(error, tmp_path):
    published = random_hf_state_dict(layers=2, E=6, H=40, I=24)
    write_checkpoint(tmp_path / "hf", published)
    write_checkpoint(tmp_path / "base", published)
    provoke, status = PROVOKED[error]
    undo = provoke(tmp_path)
    status, *options = status if isinstance(status, tuple) else (status,)
    source = "google/hf" if "--stream" in options else "hf"
    command = ["convert", source, "nemo", *options]
    printed = run(*command, cwd=tmp_path, status=status).stderr.splitlines()
    (first,) = (line.removeprefix("gemma4-moe: error: ") for line in printed if line.startswith("gemma4-moe: error: "))
    assert fits(error, first)

    todo = ERRORS[error]
    named = re.findall(r"`(gemma4-moe [^`]+)`", todo)
    ways = [shlex.split(way)[1:] for way in named if "clean" not in way]
    if "--resume" in todo:
        ways.append([*command, "--resume"])
    if "give `--overwrite`" in todo:
        ways.append([*command, "--overwrite"])
    for number, way in enumerate(ways):
        target = "nemo" if way[0] != "convert" or not number else f"nemo{number}"
        places = {"SRC": "hf", "DST": target, "BASE": "base"}
        run(*[places.get(word, word) for word in way], cwd=tmp_path)
    assert bool(ways) == bool(re.search("`(gemma4-moe|--resume|--overwrite)", todo))
    if ways and "ones" not in todo:
        assert_same_tensors(read_directory(tmp_path / "nemo"), nemo_from_hf(published))
    if callable(undo):
        undo()


def test_a_budget_that_is_too_small_gets_the_number_of_the_page(tmp_path):
    error, todo = next(item for item in ERRORS.items() if "memory budget" in item[0])
    write_sparse_checkpoint(tmp_path / "real", real_names_and_shapes(), BFLOAT16, real_config())
    refused = run("plan", tmp_path / "real", "--max-memory", "1MB", status=2).stderr
    assert error in refused
    (said,) = re.findall(r"--max-memory (\w+)", refused)
    assert f"it is {said} for" in todo
    run("plan", tmp_path / "real", "--max-memory", said)
