"""Which runs are the same: every fact of source, plan and options is compared, and none is taken on trust."""

import copy
import hashlib
import json
from dataclasses import replace
from functools import reduce
from operator import getitem

import pytest

import gemma4_moe
from gemma4_moe import convert
from gemma4_moe.checkpoint.directory import open_checkpoint
from gemma4_moe.converter import resume as resume_module
from gemma4_moe.converter.plan import make_plan
from gemma4_moe.errors import UsageError
from gemma4_moe.layout.dtypes import FLOAT32
from gemma4_moe.layout.table import Operation
from gemma4_moe.target.journal import Journal, as_rows, journals, read_journals
from support.checkpoints import contents, write_checkpoint
from support.interrupted import interrupt, resume
from support.models import random_hf_state_dict

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def done(source, tmp_path):
    convert(source, tmp_path / "done", max_shard_size=60_000)
    return tmp_path / "done"


def test_what_a_run_is_called_by_is_what_the_filesystem_says(source):
    with open_checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint)
        opening = resume_module.opening_record(plan, checkpoint, {"dtype": "keep", "commit": "abc"})
    files = {}
    for path in source.glob("*.safetensors"):
        raw, status = path.read_bytes(), path.stat()
        files[path.name] = {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "inode": status.st_ino,
            "header_sha256": hashlib.sha256(raw[: 8 + int.from_bytes(raw[:8], "little")]).hexdigest(),
        }
    plan_digest = opening.pop("plan")
    assert len(plan_digest) == 64
    assert opening == {
        "version": gemma4_moe.__version__,
        "block_bytes": 8192,
        "options": {"dtype": "keep", "commit": "abc"},
        "source": files,
    }


def leaves(record, path=()):
    if not isinstance(record, dict):
        return [path]
    return [leaf for key, value in record.items() for leaf in leaves(value, (*path, key))]


def test_each_fact_of_a_run_is_compared_and_named(source, tmp_path):
    interrupt(source, tmp_path / "nemo")
    control = tmp_path / ".nemo.gemma4-moe"
    known, written = read_journals(control), contents(control / "out")
    facts = leaves(known.opening)
    assert len(facts) == 3 + 2 + 4 * 2, "version, size of blocks, plan; two options; four facts of each of two files"
    for fact in facts:
        opening = copy.deepcopy(known.opening)
        reduce(getitem, fact[:-1], opening)[fact[-1]] = "another"
        for path in journals(control):
            path.unlink()
        with Journal(control, 0) as journal:
            journal.append(opening=opening)
            journal.append(pieces=as_rows(known.pieces.values()))
        with pytest.raises(UsageError, match="another one") as caught:
            resume(source, tmp_path / "nemo")
        label = " ".join(fact) if fact[0] != "options" else f"--{fact[1].replace('_', '-')}"
        assert caught.value.facts["found"].startswith(f"{label} was another, is "), fact
        assert contents(control / "out") == written


def test_whatever_decides_the_bytes_decides_the_hash_of_the_plan(source):
    with open_checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint)
        name, down = next((name, tensor) for name, tensor in plan.tensors.items() if tensor.scale is not None)
        other = next(tensor.origin for tensor in plan.tensors.values() if tensor.origin.file is not down.origin.file)
        (part,), (file,) = down.source.parts, plan.files

        def having(**changes):
            return replace(plan, tensors={**plan.tensors, name: replace(down, **changes)})

        def stored(**changes):
            made_from = replace(part, stored=replace(part.stored, **changes))
            return having(source=replace(down.source, parts=(made_from,)))

        plans = [
            plan,
            stored(start=1, end=2),
            stored(name="another"),
            stored(dtype=FLOAT32),
            stored(file=other.file),
            having(name="another"),
            having(operation=Operation.KEEP),
            having(scale=None),
            having(scale=other),
            replace(plan, source_layout=plan.target_layout),
            replace(plan, target_layout=plan.source_layout),
            replace(plan, files=(replace(file, name="another"),)),
            replace(plan, files=(replace(file, size=file.size + 1),)),
            replace(plan, files=(replace(file, header=file.header[:-1] + b"\n"),)),
        ]
        digests = [resume_module.plan_digest(changed) for changed in plans]
        assert len(set(digests)) == len(digests)
        assert resume_module.plan_digest(make_plan(checkpoint)) == digests[0]


@pytest.mark.parametrize("different", ["option", "files", "model", "side file"])
def test_a_complete_target_of_another_conversion_is_not_taken_for_it(different, source, done, tmp_path):
    state = random_hf_state_dict(layers=2, E=6, H=40, I=24)
    if different == "model":  # a fine-tuned model has the same headers
        state["model.language_model.layers.1.input_layernorm.weight"][39] += 1
    if different == "side file":
        (done / "tokenizer.json").write_bytes(b"{}")
    if different in ("files", "model"):
        source = write_checkpoint(tmp_path / "other", state, files=3 if different == "files" else 2)
    before = contents(done)
    with pytest.raises(UsageError, match="the target exists"):
        resume(source, done, max_shard_size=50_000 if different == "option" else 60_000)
    assert contents(done) == before


FILE, SCALAR = "model-00002-of-00002.safetensors", "model.language_model.layers.1.layer_scalar"
NONSENSE = (None, True, 3, "x", [], {}, {"bytes": None})


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("plan",), "0" * 64),
        (("source", "files", FILE, "header_sha256"), "0" * 64),
        (("source", "files", FILE, "bytes"), 3),
        *((("source", "files", FILE), said) for said in NONSENSE),
        *((("source", "blocks", SCALAR), said) for said in NONSENSE),
        *((("overflowed",), {"no such tensor": 1} if said == {} else said) for said in NONSENSE),
        *((("given_back",), {SCALAR: -3 if said == 3 else said}) for said in NONSENSE),
    ],
)
def test_a_manifest_that_says_something_else_is_of_another_conversion(path, said, source, done):
    manifest = json.loads((done / "gemma4_moe.json").read_text())
    reduce(getitem, path[:-1], manifest)[path[-1]] = said
    (done / "gemma4_moe.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="the target exists"):
        resume(source, done)


def test_a_commit_says_what_a_source_is(source, done, monkeypatch):
    options = {"dtype": "keep", "max_shard_size": 60_000, "commit": "c" * 40}
    path = done / "gemma4_moe.json"
    manifest = json.loads(path.read_text())
    manifest["options"]["commit"] = "c" * 40
    path.write_text(json.dumps(manifest))
    monkeypatch.setattr(resume_module, "hash_extents", lambda *_, **__: pytest.fail("the whole model is fetched again"))
    with open_checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint, max_shard_size=60_000)

        def is_made_already(**changes):
            return resume_module.is_made_already(done, plan, checkpoint, options | changes, 2**20, None)

        assert is_made_already()
        assert not is_made_already(commit="d" * 40)
        manifest["source"]["files"]["model-00001-of-00002.safetensors"]["header_sha256"] = "0" * 64
        path.write_text(json.dumps(manifest))
        assert not is_made_already()
