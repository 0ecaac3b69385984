"""Checkpoint directories for tests, written by the safetensors library, and what a directory holds as bytes."""

import hashlib
import json
import os

from safetensors.torch import save_file


def config_of(state, **changes):
    """A config.json for a state dict that `random_hf_state_dict` made."""
    gate_up = next(tensor for name, tensor in state.items() if name.endswith("experts.gate_up_proj"))
    layers = sum(name.endswith("experts.gate_up_proj") for name in state)
    text = {
        "model_type": "gemma4_text",
        "num_experts": gate_up.shape[0],
        "moe_intermediate_size": gate_up.shape[1] // 2,
        "hidden_size": gate_up.shape[2],
        "num_hidden_layers": layers,
    }
    return {"model_type": "gemma4", "text_config": text | changes}


def write_checkpoint(directory, state, config=None, files=2):
    """Write `state` into `files` safetensors files with an index, and config.json and a tokenizer beside them."""
    directory.mkdir()
    names = sorted(state)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = names[number::files]
        save_file({name: state[name].contiguous() for name in part}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config or config_of(state)))
    (directory / "tokenizer.json").write_bytes(b'{"version": "1.0"} \n')
    return directory


def flip_bit(path, position):
    """Flip one bit of the byte at `position`, in place; a negative position counts from the end."""
    with path.open("r+b") as file:
        position = file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 4]))


def contents(directory):
    """The SHA-256 of every file below `directory`, hidden ones too, the names of its directories, and its links."""
    return {str(path.relative_to(directory)): _content(path) for path in sorted(directory.rglob("*"))}


def _content(path):
    if path.is_symlink():
        return f"a link to {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
