"""A model on the Hub as a source: converted in place or fetched first, planned and inspected by its headers alone.

The Hub is a server of our own on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import TYPE_CHECKING

import huggingface_hub
import pytest

from gemma4_moe import convert
from gemma4_moe.cli import commands
from gemma4_moe.layout.dtypes import BFLOAT16
from support.checkpoints import config_of, contents, write_checkpoint
from support.formulas import assert_same_tensors
from support.hub_server import COMMIT, FILE_PATH, Hub, serving
from support.models import random_hf_state_dict, read_directory
from support.sparse import real_config, real_names_and_shapes, write_sparse_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "google/small-gemma"
MANIFEST = "gemma4_moe.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "hf", random_hf_state_dict())


@pytest.fixture
def hub(source: Path) -> Iterator[Hub]:
    with serving(MODEL, source) as hub:
        yield hub


@pytest.fixture
def nemo_hub(source: Path, tmp_path: Path) -> Iterator[Hub]:
    convert(source, tmp_path / "published", max_shard_size=4000)
    with serving(MODEL, tmp_path / "published") as hub:
        yield hub


@pytest.fixture
def large_hub(tmp_path: Path) -> Iterator[Hub]:
    """A model of 100 MB in five files, all zeros."""
    state = random_hf_state_dict(E=6, H=10, I=7)
    shapes = {name: [*tensor.shape] for name, tensor in state.items()}
    E, H, I, V = 16, 512, 640, 9000  # noqa: E741
    for name in shapes:
        for ending, shape in (
            ("experts.down_proj", [E, H, I]),
            ("experts.gate_up_proj", [E, 2 * I, H]),
            ("input_layernorm.weight", [H]),
            ("mlp.down_proj.weight", [H, 3]),
            ("router.per_expert_scale", [E]),
            ("router.proj.weight", [E, H]),
            ("router.scale", [H]),
            ("embed_tokens.weight", [V, H]),
        ):
            if name.endswith(ending):
                shapes[name] = shape
    config = config_of(state, num_experts=E, hidden_size=H, moe_intermediate_size=I)
    directory = tmp_path / "large"
    write_sparse_checkpoint(directory, shapes, BFLOAT16, config, 20 * 10**6)
    (directory / "tokenizer.json").write_bytes(b" " * 3_000_000)
    with serving(MODEL, directory) as hub:
        yield hub


def run(
    hub: Hub, home: Path, *arguments: object, offline: bool = False, free: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, below `home`, with `hub` for the Hub and its cache in `home/cache`."""
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
    return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), data.getvalue(), talk.getvalue())


def start(hub: Hub, home: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, whose environment says the same, with its home in `home/home`."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home / "home"),
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_TOKEN": "hf_small",
        "TMPDIR": str(home),
    }
    called = [sys.executable, "-m", "gemma4_moe", *map(str, arguments)]
    done = subprocess.run(
        called, capture_output=True, text=True, env=os.environ | environment | more, check=False, cwd=home
    )
    assert "Traceback" not in done.stderr
    return done


def test_the_target_is_that_of_the_same_directory_and_nothing_is_kept(hub: Hub, source: Path, tmp_path: Path) -> None:
    done = start(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert done.returncode == 0, done.stderr
    convert(source, tmp_path / "local")
    _require_the_same_but_for_the_commit(tmp_path / "nemo", tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "local", "nemo"]
    assert None not in hub.weight_requests
    assert run(hub, tmp_path, "verify", tmp_path / "nemo").returncode == 0


@pytest.mark.parametrize("options", [["--stream"], []])
def test_a_base_is_read_on_the_hub_or_fetched(options: list[str], hub: Hub, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "nemo")
    done = run(hub, tmp_path, "convert", tmp_path / "nemo", tmp_path / "back", "--base", MODEL, *options)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(read_directory(tmp_path / "back"), read_directory(source))
    assert (None in hub.weight_requests) == (tmp_path / "cache").exists() == (not options)
    told = json.loads((tmp_path / "back" / MANIFEST).read_text())["options"]
    assert told.get("base_commit") == (COMMIT if options else None)


def test_a_plan_counts_the_space_for_a_base(hub: Hub, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "nemo")
    done = run(hub, tmp_path, "plan", tmp_path / "nemo", "--base", MODEL, "--format", "json")
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    assert json.loads(done.stdout)["cache_bytes"] == sum(sizes), done.stderr


def _require_the_same_but_for_the_commit(streamed: Path, local: Path) -> None:
    one, other = contents(streamed), contents(local)
    assert one.keys() == other.keys()
    assert {name for name in other if one[name] != other[name]} == {MANIFEST}
    manifest = json.loads((streamed / MANIFEST).read_text())
    assert manifest["options"].pop("commit") == COMMIT
    assert manifest == json.loads((local / MANIFEST).read_text())


def test_a_nemo_model_gets_its_scales_back_by_its_manifest(nemo_hub: Hub, tmp_path: Path) -> None:
    done = run(nemo_hub, tmp_path, "convert", MODEL, tmp_path / "streamed", "--stream")
    assert done.returncode == 0, done.stderr
    done = run(nemo_hub, tmp_path, "convert", MODEL, tmp_path / "fetched")
    assert done.returncode == 0, done.stderr
    local = convert(nemo_hub.directory, tmp_path / "local")
    assert any("scale" in note for note in local.notes), "the manifest is of use"
    _require_the_same_but_for_the_commit(tmp_path / "streamed", tmp_path / "local")
    assert contents(tmp_path / "fetched") == contents(tmp_path / "local")
    assert json.loads((tmp_path / "streamed" / MANIFEST).read_text())["layout"] == "hf", "its own, not the source's"


def test_a_nemo_model_without_a_manifest_is_read_too(nemo_hub: Hub, tmp_path: Path) -> None:
    (nemo_hub.directory / MANIFEST).unlink()
    assert run(nemo_hub, tmp_path, "convert", MODEL, tmp_path / "streamed", "--stream").returncode == 0
    convert(nemo_hub.directory, tmp_path / "local")
    _require_the_same_but_for_the_commit(tmp_path / "streamed", tmp_path / "local")


def test_what_is_fetched_is_what_lies_beside_the_weights(hub: Hub, source: Path, tmp_path: Path) -> None:
    (source / "onnx").mkdir()
    (source / "onnx/model.safetensors").write_bytes(b"not of this checkpoint")
    (source / "model.gguf").write_bytes(b"GGUF")
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo")
    assert done.returncode == 0, done.stderr
    assert set(hub.served) == {path.name for path in source.iterdir()} - {"onnx", "model.gguf"}
    convert(source, tmp_path / "local")
    assert contents(tmp_path / "nemo") == contents(tmp_path / "local")


def test_other_files_of_a_streamed_model_are_skipped(hub: Hub, source: Path, tmp_path: Path) -> None:
    (source / "onnx").mkdir()
    (source / "onnx/model.safetensors").write_bytes(b"not of this checkpoint")
    (source / "training_args.bin").write_bytes(b"a pickle")
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert done.returncode == 0, done.stderr
    assert "skipped: onnx/, training_args.bin" in done.stderr
    assert not hub.served.keys() & {"model.safetensors", "training_args.bin"}


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_a_plan_reads_headers_alone(options: list[str], large_hub: Hub, tmp_path: Path) -> None:
    done = run(large_hub, tmp_path, "plan", MODEL, "--format", "json", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["source"]["path"], found["source"]["tensors"]) == (MODEL, 17)
    assert found["source"]["bytes"] > 60_000_000
    assert found["target"]["side_files"] == ["config.json", "tokenizer.json"]
    assert found["cache_bytes"] == (0 if options else sum(_weights(large_hub.directory)))
    _require_headers_alone(large_hub, tmp_path, found["source"]["bytes"])


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_a_dry_run_reads_headers_alone(options: list[str], large_hub: Hub, tmp_path: Path) -> None:
    done = run(large_hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--dry-run", "--format", "json", *options)
    assert done.returncode == 0, done.stderr
    _require_headers_alone(large_hub, tmp_path, json.loads(done.stdout)["source"]["bytes"])


def test_an_inspection_reads_headers_alone(large_hub: Hub, tmp_path: Path) -> None:
    done = run(large_hub, tmp_path, "inspect", MODEL, "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["source"], found["layout"], found["problems"]) == (MODEL, "hf", [])
    assert found["config"] == {"E": 16, "H": 512, "I": 640, "L": 2}
    _require_headers_alone(large_hub, tmp_path, found["bytes"])


def _weights(directory: Path) -> list[int]:
    return [path.stat().st_size for path in directory.glob("*.safetensors")]


def _require_headers_alone(hub: Hub, home: Path, total: int) -> None:
    files = len(_weights(hub.directory))
    assert hub.listings == 1
    assert len(hub.weight_requests) == files, "one for each header"
    assert {name for name, _ in hub.requests if name.endswith("json")} == {
        "config.json",
        "model.safetensors.index.json",
    }
    assert hub.weight_bytes <= files * 2**16 < total / 100
    assert [path.name for path in home.iterdir()] == ["large"], "nothing is kept"


def test_a_plan_says_when_the_cache_and_the_target_do_not_fit(large_hub: Hub, tmp_path: Path) -> None:
    source = sum(_weights(large_hub.directory))
    plan = json.loads(run(large_hub, tmp_path, "plan", MODEL, "--format", "json").stdout)
    target = plan["target"]["bytes"]
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


def test_nothing_is_fetched_where_it_and_the_target_do_not_fit(large_hub: Hub, tmp_path: Path) -> None:
    source = sum(_weights(large_hub.directory))
    target = json.loads(run(large_hub, tmp_path, "plan", MODEL, "--format", "json").stdout)["target"]["bytes"]
    for free, hint in ((target + source - 10, "give --stream"), (target - 10, "free some space")):
        short = run(large_hub, tmp_path, "convert", MODEL, tmp_path / "nemo", free=free)
        assert short.returncode == 5
        assert "no room for the model in the Hub's cache and for the target" in short.stderr
        assert hint in short.stderr
    assert None not in large_hub.weight_requests
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_a_base_is_not_fetched_where_it_does_not_fit(hub: Hub, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "nemo")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    short = run(hub, tmp_path, "convert", tmp_path / "nemo", tmp_path / "back", "--base", MODEL, free=size)
    assert short.returncode == 5
    assert "no room for the model in the Hub's cache and for the target" in short.stderr
    wide = run(hub, tmp_path, "convert", tmp_path / "nemo", tmp_path / "back", "--base", MODEL, "--dtype", "float16")
    assert wide.returncode == 2
    assert "does not hold the base's values" in wide.stderr
    assert None not in hub.weight_requests, "it is refused by its headers"
    assert not (tmp_path / "cache").exists()


def test_what_is_in_the_cache_needs_no_space_and_no_connection(hub: Hub, tmp_path: Path) -> None:
    online = run(hub, tmp_path, "plan", MODEL, "--format", "json")
    assert run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo").returncode == 0
    cached = json.loads(online.stdout) | {"cache_bytes": 0}
    again = json.loads(run(hub, tmp_path, "plan", MODEL, "--format", "json").stdout)
    assert again == cached | {"free_bytes": again["free_bytes"]}
    asked = hub.listings, len(hub.requests)
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        began = time.monotonic()
        offline = start(hub, tmp_path, "plan", MODEL, "--format", "json", **more)
        assert offline.returncode == 0, offline.stderr
        assert time.monotonic() - began < 15, "it is not tried for long"
        found = json.loads(offline.stdout)
        assert found == cached | {"free_bytes": found["free_bytes"]}
    inspected = run(hub, tmp_path, "inspect", MODEL, "--format", "json", offline=True)
    assert json.loads(inspected.stdout)["tensors"] == 17, inspected.stderr
    assert (hub.listings, len(hub.requests)) == asked


def test_a_model_that_the_hub_withholds_is_planned_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo").returncode == 0
    hub.gated = True
    assert run(hub, tmp_path, "plan", MODEL).returncode == 0


@pytest.mark.parametrize("command", [["plan", MODEL], ["inspect", MODEL], ["convert", MODEL, "nemo"]])
def test_offline_a_model_must_be_in_the_cache(command: list[str], hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, *command, offline=True)
    assert done.returncode == 5
    assert "HF_HUB_OFFLINE" in done.stderr


def test_a_conversion_asks_once_for_each_header(hub: Hub, source: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo")
    assert done.returncode == 0, done.stderr
    ranges = [asked for asked in hub.weight_requests if asked is not None]
    assert len(ranges) == len(_weights(source)), "the download is not planned again over the network"
    assert hub.weight_requests.count(None) == len(_weights(source))


def test_a_file_in_the_cache_with_another_header_is_refused(hub: Hub, source: Path, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo").returncode == 0
    (damaged, *_) = (tmp_path / "cache").rglob("model-00001-of-00002.safetensors")
    raw = damaged.read_bytes()
    damaged.write_bytes(raw.replace(b'"BF16"', b' "F16"', 1))
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "again")
    assert done.returncode == 3
    assert "the copy in the Hub's cache is not the file on the Hub" in done.stderr
    assert not (tmp_path / "again").exists()


def test_a_revision_that_moves_before_the_download_is_told(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "cache" / ("f" * 40)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(moved))
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo")
    assert done.returncode == 3
    assert "the model on the Hub changed while it was read" in done.stderr
    assert not (tmp_path / "nemo").exists()


def test_offline_nothing_can_be_streamed(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream", offline=True)
    assert done.returncode == 5
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert not (tmp_path / "nemo").exists()


def test_another_format_is_named(hub: Hub, source: Path, tmp_path: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    done = run(hub, tmp_path, "inspect", MODEL, "--format", "json")
    assert json.loads(done.stdout)["spelling"] == "GGUF", done.stderr
    assert hub.served["model-Q4_K_M.gguf"] == 0


def test_a_pull_request_is_a_revision(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "plan", MODEL, "--revision", "refs/pr/1")
    assert done.returncode == 0, done.stderr


def test_errors_name_the_model_and_its_commit(hub: Hub, source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{")
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert done.returncode == 3
    assert f"{MODEL}@{COMMIT[:12]}/config.json" in done.stderr


def test_a_token_goes_to_the_hub_and_not_beyond(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream").returncode == 0
    assert hub.tokens == {"hub": {"Bearer hf_small"}, "cdn": {None}}


def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.answers = [(429, {"Retry-After": "0"})]
    assert run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream").returncode == 0
    assert hub.answers == []


def test_a_hub_that_lists_no_sizes_is_asked_for_them(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.sizes = False
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert done.returncode == 0, done.stderr
    convert(source, tmp_path / "local")
    _require_the_same_but_for_the_commit(tmp_path / "nemo", tmp_path / "local")


def test_a_server_that_is_no_hub_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.answers = [(200, {})]
    done = run(hub, tmp_path, "plan", MODEL)
    assert done.returncode == 5
    assert "HF_ENDPOINT" in done.stderr


def test_a_side_file_without_end_is_refused_before_it_is_fetched(hub: Hub, source: Path, tmp_path: Path) -> None:
    with (source / "tokenizer.json").open("r+b") as file:
        file.truncate(2**30 + 1)
    for command in (["plan", MODEL], ["convert", MODEL, tmp_path / "nemo", "--stream"]):
        done = run(hub, tmp_path, *command)
        assert done.returncode == 3, done.stderr
        assert f"{MODEL}@{COMMIT[:12]}/tokenizer.json" in done.stderr
    assert hub.served["tokenizer.json"] == 0


def test_the_real_model_is_planned_in_a_few_requests(tmp_path: Path) -> None:
    write_sparse_checkpoint(tmp_path / "real", real_names_and_shapes(), BFLOAT16, real_config())
    with serving(MODEL, tmp_path / "real") as hub:
        done = run(hub, tmp_path, "plan", MODEL, "--format", "json")
        assert json.loads(done.stdout)["source"]["bytes"] == 51_611_872_412, done.stderr
        assert hub.listings + len(hub.requests) <= 8
        assert sum(hub.served.values()) < 500_000


def test_a_streamed_conversion_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", random_hf_state_dict(layers=4, H=34, I=22))
    command = ["convert", MODEL, tmp_path / "nemo", "--stream", "--max-shard-size", "20KB"]
    with serving(MODEL, source) as hub:
        hub.last = 36
        failed = run(hub, tmp_path, *command)
        assert failed.returncode == 5
        assert "resume with: " in failed.stderr
        asked, hub.last = len(hub.weight_requests), None
        done = run(hub, tmp_path, *command, "--resume")
        assert done.returncode == 0, done.stderr
        assert len(hub.weight_requests) - asked < asked / 2, "what was done is not read again"
    convert(source, tmp_path / "local", max_shard_size="20KB")
    _require_the_same_but_for_the_commit(tmp_path / "nemo", tmp_path / "local")


def test_an_answer_that_is_too_short_is_no_data(hub: Hub, tmp_path: Path) -> None:
    hub.cut = True
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert done.returncode == 5
    assert "the range that was asked for" in done.stderr
    assert not (tmp_path / "nemo").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["convert", MODEL, "nemo", "--stream", "--revision", "nowhere"], 3, "no such revision"),
        (["convert", MODEL, "nemo", "--revision", "nowhere"], 3, "no such revision"),
        (["plan", MODEL, "--revision", "nowhere"], 3, "no such revision"),
        (["convert", "google/unknown", "nemo", "--stream"], 3, "no such directory, and no such model on the Hub"),
        (["convert", "google/unknown", "nemo"], 3, "no such directory, and no such model on the Hub"),
        (["inspect", "google/unknown"], 3, "no such directory, and no such model on the Hub"),
        (["inspect", "google/unknown."], 3, "no such directory"),
        (["inspect", "google/" + 97 * "a"], 3, "no such directory"),
        (["convert", "hf", "nemo", "--stream"], 2, "only a model on the Hub can be streamed"),
        (["plan", "hf", "--stream"], 2, "only a model on the Hub can be streamed"),
    ],
)
def test_what_is_not_there_is_told(arguments: list[str], status: int, words: str, hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, *arguments)
    assert done.returncode == status, done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_a_gated_model_is_told_from_an_unknown_one(options: list[str], hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    done = run(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", *options)
    assert done.returncode == 3, done.stderr
    assert "a gated model, which this token may not read" in done.stderr
    assert "hf auth login" in done.stderr


def test_no_connection_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    done = start(hub, tmp_path, "convert", MODEL, tmp_path / "nemo", "--stream")
    assert done.returncode == 5
    assert "the Hub can't be read" in done.stderr
