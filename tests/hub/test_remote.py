"""A model on the Hub as a source: converted in place or fetched first, planned and inspected by its headers alone.

The Hub is a server of our own on this machine.
"""

import json
import os
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import huggingface_hub
import pytest

from gemma4_moe import convert
from gemma4_moe.cli import commands
from gemma4_moe.layout.dtypes import BFLOAT16
from support.checkpoints import config_of, contents, write_checkpoint
from support.formulas import assert_same_tensors
from support.hub_server import COMMIT, FILE_PATH, serving, start
from support.models import random_hf_state_dict, read_directory
from support.sparse import real_config, real_names_and_shapes, write_sparse_checkpoint

MODEL = "google/small-gemma"
MANIFEST = "gemma4_moe.json"


@pytest.fixture
def hub(source):
    with serving(MODEL, source) as hub:
        yield hub


@pytest.fixture
def nemo_hub(source, tmp_path):
    convert(source, tmp_path / "published", max_shard_size=4000)
    with serving(MODEL, tmp_path / "published") as hub:
        yield hub


@pytest.fixture
def large_hub(tmp_path):
    """A model of 100 MB in five files, all zeros."""
    state = random_hf_state_dict()
    E, H, I, V = 16, 512, 640, 9000  # noqa: E741
    enlarged = {
        "experts.down_proj": [E, H, I],
        "experts.gate_up_proj": [E, 2 * I, H],
        "input_layernorm.weight": [H],
        "layer_scalar": [1],
        "mlp.down_proj.weight": [H, 3],
        "router.per_expert_scale": [E],
        "router.proj.weight": [E, H],
        "router.scale": [H],
        "embed_tokens.weight": [V, H],
    }
    shapes = {name: next(enlarged[rest] for rest in enlarged if name.endswith(rest)) for name in state}
    config = config_of(state, num_experts=E, hidden_size=H, moe_intermediate_size=I)
    directory = tmp_path / "large"
    write_sparse_checkpoint(directory, shapes, BFLOAT16, config, 20 * 10**6)
    (directory / "tokenizer.json").write_bytes(b" " * 3_000_000)
    with serving(MODEL, directory) as hub:
        yield hub


def run(hub, home, *arguments, status=0, offline=False, free=None):
    """Run the command in this process, below `home`, with `hub` for the Hub and its cache in `home/cache`."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as data,
        redirect_stderr(StringIO()) as talk,
    ):
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + FILE_PATH)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        patch.setenv("HF_TOKEN", "hf_small")
        patch.setattr("tempfile.tempdir", str(home))
        patch.chdir(home)
        if free is not None:
            patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
        with pytest.raises(SystemExit) as ended:
            commands.main([str(argument) for argument in arguments])
        huggingface_hub.close_session()
    assert int(ended.value.code or 0) == status, talk.getvalue()
    return subprocess.CompletedProcess(arguments, status, data.getvalue(), talk.getvalue())


def ask(hub, home, *arguments, **options):
    """The JSON of a command that succeeds."""
    return json.loads(run(hub, home, *arguments, "--format", "json", **options).stdout)


def test_the_target_is_that_of_the_same_directory_and_nothing_is_kept(hub, source, tmp_path):
    start(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    convert(source, tmp_path / "local")
    _require_the_same_but_for_the_commit(tmp_path / "nemo", tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "local", "nemo"]
    assert None not in hub.weight_requests
    assert hub.tokens == {"hub": {"Bearer hf_small"}, "cdn": {None}}, "a token goes to the Hub and not beyond"
    run(hub, tmp_path, "verify", tmp_path / "nemo")


@pytest.mark.parametrize("options", [["--stream"], []])
def test_a_base_is_read_on_the_hub_or_fetched(options, hub, source, tmp_path):
    convert(source, tmp_path / "nemo")
    run(hub, tmp_path, "convert", tmp_path / "nemo", tmp_path / "back", "--base", MODEL, *options)
    assert_same_tensors(read_directory(tmp_path / "back"), read_directory(source))
    assert (None in hub.weight_requests) == (tmp_path / "cache").exists() == (not options)
    told = json.loads((tmp_path / "back" / MANIFEST).read_text())["options"]
    assert told.get("base_commit") == (COMMIT if options else None)


def test_a_plan_counts_the_space_for_a_base(hub, source, tmp_path):
    convert(source, tmp_path / "nemo")
    assert ask(hub, tmp_path, "plan", tmp_path / "nemo", "--base", MODEL)["cache_bytes"] == sum(_weights(source))


def _require_the_same_but_for_the_commit(streamed, local):
    one, other = contents(streamed), contents(local)
    assert one.keys() == other.keys()
    assert {name for name in other if one[name] != other[name]} == {MANIFEST}
    manifest = json.loads((streamed / MANIFEST).read_text())
    assert manifest["options"].pop("commit") == COMMIT
    assert manifest == json.loads((local / MANIFEST).read_text())


def test_a_nemo_model_gets_its_scales_back_by_its_manifest(nemo_hub, tmp_path):
    run(nemo_hub, tmp_path, "convert", MODEL, tmp_path / "streamed", "--stream")
    run(nemo_hub, tmp_path, "convert", MODEL, tmp_path / "fetched")
    local = convert(nemo_hub.directory, tmp_path / "local")
    assert any("scale" in note for note in local.notes), "the manifest is of use"
    _require_the_same_but_for_the_commit(tmp_path / "streamed", tmp_path / "local")
    assert contents(tmp_path / "fetched") == contents(tmp_path / "local")
    assert json.loads((tmp_path / "streamed" / MANIFEST).read_text())["layout"] == "hf", "its own, not the source's"


def test_a_nemo_model_without_a_manifest_is_read_too(nemo_hub, tmp_path):
    (nemo_hub.directory / MANIFEST).unlink()
    run(nemo_hub, tmp_path, "convert", MODEL, tmp_path / "streamed", "--stream")
    convert(nemo_hub.directory, tmp_path / "local")
    _require_the_same_but_for_the_commit(tmp_path / "streamed", tmp_path / "local")


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_what_is_read_is_what_lies_beside_the_weights(options, hub, source, tmp_path):
    read = {path.name for path in source.iterdir()}
    (source / "onnx").mkdir()
    for other in ("onnx/model.safetensors", "model.gguf", "training_args.bin"):
        (source / other).write_bytes(b"not of this checkpoint")
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", *options)
    assert set(hub.served) == read
    assert not options or "skipped: model.gguf, onnx/, training_args.bin" in done.stderr
    convert(source, tmp_path / "local")
    if options:
        _require_the_same_but_for_the_commit(tmp_path / "nemo", tmp_path / "local")
    else:
        assert contents(tmp_path / "nemo") == contents(tmp_path / "local")


@pytest.mark.parametrize("options", [[], ["--stream"]])
@pytest.mark.parametrize("command", [["plan", MODEL], ["convert", MODEL, "nemo", "--dry-run"]])
def test_a_plan_reads_headers_alone(command, options, large_hub, tmp_path):
    found = ask(large_hub, tmp_path, *command, *options)
    assert (found["source"]["path"], found["source"]["tensors"]) == (MODEL, 17)
    assert found["source"]["bytes"] > 60_000_000
    assert found["target"]["side_files"] == ["config.json", "tokenizer.json"]
    assert found["cache_bytes"] == (0 if options else sum(_weights(large_hub.directory)))
    _require_headers_alone(large_hub, tmp_path, found["source"]["bytes"])


def test_an_inspection_reads_headers_alone(large_hub, tmp_path):
    found = ask(large_hub, tmp_path, "inspect", MODEL)
    assert (found["source"], found["layout"], found["problems"]) == (MODEL, "hf", [])
    assert found["config"] == {"E": 16, "H": 512, "I": 640, "L": 2}
    _require_headers_alone(large_hub, tmp_path, found["bytes"])


def _weights(directory):
    return [path.stat().st_size for path in directory.glob("*.safetensors")]


def _listed(directory):
    """The side file that a plan reads, and so counts: it is copied."""
    return (directory / "config.json").stat().st_size


def _require_headers_alone(hub, home, total):
    files = len(_weights(hub.directory))
    assert hub.listings == 1
    assert len(hub.weight_requests) == files, "one for each header"
    small = {"config.json", "model.safetensors.index.json"}
    assert {name for name, _ in hub.requests if name.endswith("json")} == small
    assert hub.weight_bytes <= files * 2**16 < total / 100
    assert [path.name for path in home.iterdir()] == ["large"], "nothing is kept"


def test_a_plan_says_when_the_cache_and_the_target_do_not_fit(large_hub, tmp_path):
    source = sum(_weights(large_hub.directory))
    target = ask(large_hub, tmp_path, "plan", MODEL)["target"]["bytes"] + _listed(large_hub.directory)
    short = run(large_hub, tmp_path, "plan", MODEL, free=target + source - 10)
    assert "note: 10 bytes of space are missing for the target, and for SRC in the Hub's cache" in short.stderr
    assert "note: with --stream, convert keeps nothing of SRC on this machine, and the target fits" in short.stderr
    shorter = run(large_hub, tmp_path, "plan", MODEL, free=target - 10)
    assert f"note: {source + 10:,} bytes of space are missing" in shorter.stderr
    assert "and 10 bytes are missing" in shorter.stderr
    assert "note: " not in run(large_hub, tmp_path, "plan", MODEL, free=target + source).stderr
    assert "note: " not in run(large_hub, tmp_path, "plan", MODEL, "--stream", free=target).stderr
    streamed = run(large_hub, tmp_path, "plan", MODEL, "--stream", free=target - 10)
    assert "note: 10 bytes of space are missing for the target\n" in streamed.stderr
    assert "--stream" not in streamed.stderr


def test_nothing_is_fetched_where_it_and_the_target_do_not_fit(large_hub, tmp_path):
    source = sum(_weights(large_hub.directory))
    target = ask(large_hub, tmp_path, "plan", MODEL)["target"]["bytes"] + _listed(large_hub.directory)
    for free, hint in ((target + source - 10, "give --stream"), (target - 10, "free some space")):
        short = run(large_hub, tmp_path, "convert", MODEL, tmp_path / "nemo", free=free, status=5)
        assert "no room for the model in the Hub's cache and for the target" in short.stderr
        assert hint in short.stderr
    assert None not in large_hub.weight_requests
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_a_base_is_not_fetched_where_it_does_not_fit(hub, source, tmp_path):
    convert(source, tmp_path / "nemo")
    command = ["convert", tmp_path / "nemo", tmp_path / "back", "--base", MODEL]
    short = run(hub, tmp_path, *command, free=sum(_weights(source)), status=5)
    assert "no room for the model in the Hub's cache and for the target" in short.stderr
    wide = run(hub, tmp_path, *command, "--dtype", "float16", status=2)
    assert "does not hold the base's values" in wide.stderr
    assert None not in hub.weight_requests, "it is refused by its headers"
    assert not (tmp_path / "cache").exists()


def test_what_is_in_the_cache_needs_no_space_no_connection_and_no_access(hub, tmp_path):
    cached = ask(hub, tmp_path, "plan", MODEL) | {"cache_bytes": 0}
    run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo")
    again = ask(hub, tmp_path, "plan", MODEL)
    assert again == cached | {"free_bytes": again["free_bytes"]}
    asked = hub.listings, len(hub.requests)
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        began = time.monotonic()
        found = json.loads(start(hub, tmp_path, "plan", MODEL, "--format", "json", **more).stdout)
        assert time.monotonic() - began < 15, "it is not tried for long"
        assert found == cached | {"free_bytes": found["free_bytes"]}
    assert ask(hub, tmp_path, "inspect", MODEL, offline=True)["tensors"] == 17
    start(hub, tmp_path, "convert", MODEL, tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert contents(tmp_path / "offline") == contents(tmp_path / "nemo")
    assert (hub.listings, len(hub.requests)) == asked
    hub.gated = True
    run(hub, tmp_path, "plan", MODEL)


def test_a_conversion_asks_once_for_each_header(hub, source, tmp_path):
    run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo")
    ranges = [asked for asked in hub.weight_requests if asked is not None]
    assert len(ranges) == len(_weights(source)), "the download is not planned again over the network"
    assert hub.weight_requests.count(None) == len(_weights(source))


def test_a_file_in_the_cache_with_another_header_is_refused(hub, tmp_path):
    run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo")
    (damaged, *_) = (tmp_path / "cache").rglob("model-00001-of-00002.safetensors")
    damaged.write_bytes(damaged.read_bytes().replace(b'"BF16"', b' "F16"', 1))
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "again", status=3)
    assert "the copy in the Hub's cache is not the file on the Hub" in done.stderr
    assert not (tmp_path / "again").exists()


def test_a_revision_that_moves_before_the_download_is_told(hub, tmp_path, monkeypatch):
    moved = tmp_path / "cache" / ("f" * 40)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(moved))
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", status=3)
    assert "the model on the Hub changed while it was read" in done.stderr
    assert not (tmp_path / "nemo").exists()


@pytest.mark.parametrize("command", ["plan", "inspect", "convert nemo", "convert nemo --stream"])
def test_offline_a_model_must_be_in_the_cache(command, hub, tmp_path):
    name, *rest = command.split()
    done = run(hub, tmp_path, name, MODEL, *rest, offline=True, status=5)
    assert MODEL in done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert not (tmp_path / "nemo").exists()


def test_another_format_is_named(hub, source, tmp_path):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert json.loads(run(hub, tmp_path, "inspect", MODEL, "--format", "json", status=3).stdout)["spelling"] == "GGUF"
    assert hub.served["model-Q4_K_M.gguf"] == 0


def test_a_pull_request_is_a_revision(hub, tmp_path):
    run(hub, tmp_path, "plan", MODEL, "--revision", "refs/pr/1")


def test_errors_name_the_model_and_its_commit(hub, source, tmp_path):
    (source / "config.json").write_text("{")
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream", status=3)
    assert f"{MODEL}@{COMMIT[:12]}/config.json" in done.stderr


def test_a_busy_hub_that_lists_no_sizes_is_asked_again_and_for_them(hub, source, tmp_path):
    hub.answers = [(429, {"Retry-After": "0"})]
    hub.sizes = False
    run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert hub.answers == []
    convert(source, tmp_path / "local")
    _require_the_same_but_for_the_commit(tmp_path / "nemo", tmp_path / "local")


def test_a_side_file_without_end_is_refused_before_it_is_fetched(hub, source, tmp_path):
    os.truncate(source / "tokenizer.json", 2**30 + 1)
    for command in (["plan", MODEL], ["convert", MODEL, tmp_path / "nemo", "--stream"]):
        done = run(hub, tmp_path, *command, status=3)
        assert f"{MODEL}@{COMMIT[:12]}/tokenizer.json" in done.stderr
    assert hub.served["tokenizer.json"] == 0


def test_the_real_model_is_planned_in_a_few_requests(tmp_path):
    write_sparse_checkpoint(tmp_path / "real", real_names_and_shapes(), BFLOAT16, real_config())
    with serving(MODEL, tmp_path / "real") as hub:
        assert ask(hub, tmp_path, "plan", MODEL)["source"]["bytes"] == 51_611_872_412
        assert hub.listings + len(hub.requests) <= 8
        assert sum(hub.served.values()) < 500_000


def test_a_streamed_conversion_goes_on_where_it_was_cut_off(tmp_path):
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict(layers=4, H=34, I=22))
    command = ["convert", MODEL, tmp_path / "nemo", "--stream"]
    with serving(MODEL, source) as hub:
        hub.last = 36
        assert "resume with: " in run(hub, tmp_path, *command, status=5).stderr
        asked, hub.last = len(hub.weight_requests), None
        run(hub, tmp_path, *command, "--resume")
        assert len(hub.weight_requests) - asked < asked / 2, "what was done is not read again"
    convert(source, tmp_path / "local")
    _require_the_same_but_for_the_commit(tmp_path / "nemo", tmp_path / "local")


NO_MODEL = "no such directory, and no such model on the Hub"
IS_GATED = ["a gated model, which this token may not read", "hf auth login"]


@pytest.mark.parametrize(
    ("arguments", "status", "words", "trouble"),
    [
        (f"convert {MODEL} nemo --stream --revision nowhere", 3, ["no such revision"], {}),
        (f"convert {MODEL} nemo --revision nowhere", 3, ["no such revision"], {}),
        (f"plan {MODEL} --revision nowhere", 3, ["no such revision"], {}),
        ("convert google/unknown nemo --stream", 3, [NO_MODEL], {}),
        ("convert google/unknown nemo", 3, [NO_MODEL], {}),
        ("inspect google/unknown", 3, [NO_MODEL], {}),
        ("inspect google/unknown.", 3, ["no such directory"], {}),
        (f"inspect google/{97 * 'a'}", 3, ["no such directory"], {}),
        ("inspect foo/bar.git", 3, ["no such directory"], {}),
        ("convert hf nemo --stream", 2, ["only a model on the Hub can be streamed"], {}),
        ("plan hf --stream", 2, ["only a model on the Hub can be streamed"], {}),
        (f"convert {MODEL} nemo", 3, IS_GATED, {"gated": True}),
        (f"convert {MODEL} nemo --stream", 3, IS_GATED, {"gated": True}),
        (f"convert {MODEL} nemo --stream", 5, ["the range that was asked for"], {"cut": True}),
        (f"convert {MODEL} nemo --stream", 5, ["the Hub can't be read"], {"url": "http://127.0.0.1:9"}),
        (f"plan {MODEL}", 5, ["HF_ENDPOINT"], {"answers": [(200, {})]}),
    ],
)
def test_what_is_not_there_is_told(arguments, status, words, trouble, hub, tmp_path):
    vars(hub).update(trouble)
    done = run(hub, tmp_path, *arguments.split(), status=status)
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "nemo").exists()
