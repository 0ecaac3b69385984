"""Run by `make test-fallback` where no compiler was: the package says so, and converts the same values with NumPy."""

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

import gemma4_moe
from gemma4_moe.kernels import available
from gemma4_moe.layout.dtypes import BFLOAT16
from gemma4_moe.target.file_layout import layout_header


def main():
    cpu = available()["cpu"]
    assert not cpu.usable, "the extension module was built without a compiler?"
    print(f"cpu kernel: {cpu.detail}")
    E, H, I = 4, 10, 7  # noqa: E741
    rng = np.random.default_rng(0)
    layer = "model.layers.0."
    state = {
        layer + "experts.gate_up_proj": rng.normal(size=(E, 2 * I, H)),
        layer + "experts.down_proj": rng.normal(size=(E, H, I)),
        layer + "router.per_expert_scale": rng.uniform(0.5, 1.5, size=E),
        layer + "router.proj.weight": rng.normal(size=(E, H)),
        layer + "router.scale": rng.normal(size=H),
    }
    arrays = {name: values.astype(ml_dtypes.bfloat16) for name, values in state.items()}
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "hf", Path(scratch) / "nemo"
        source.mkdir()
        header, entries = layout_header([(name, BFLOAT16, array.shape) for name, array in arrays.items()])
        data = b"".join(arrays[entry.name].tobytes() for entry in entries)
        (source / "model.safetensors").write_bytes(header + data)
        (source / "config.json").write_text(json.dumps({"model_type": "gemma4_text"}))
        done = gemma4_moe.convert(source, target)
        (file,) = done.plan.files
        raw = (target / file.name).read_bytes()
        entry = next(entry for entry in file.entries if entry.name.endswith("down_projs"))
        found = np.frombuffer(raw[entry.start : entry.end], ml_dtypes.bfloat16).reshape(E, I, H)
        down, scale = arrays[layer + "experts.down_proj"], arrays[layer + "router.per_expert_scale"]
        product = down.astype(np.float32) * scale.astype(np.float32)[:, None, None]
        assert np.array_equal(found, product.astype(ml_dtypes.bfloat16).swapaxes(1, 2))
        cast = gemma4_moe.convert(source, Path(scratch) / "fp32", dtype="float32")
        assert cast.notes == ()
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
