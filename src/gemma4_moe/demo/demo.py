"""The demo: a small random model converted to nemo and back on disk, with every step checked.

There are three independent judges. `verify` computes each tensor of both conversions again and compares bits;
transformers loads the result and must find every name; both models must give the same logits. A control step loses the
experts' scales on purpose, and passes if the logits then differ.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.storage import refusals, temporary_directory
from gemma4_moe.errors import DifferenceError, StorageError, UsageError
from gemma4_moe.layout.table import SCALE, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

#: Largest difference of two fp32 logits that rounding in the fold explains, with logits of about one.
TOLERANCE = 5e-6

#: So small that the demo's checkpoints have several files.
_MAX_SHARD_SIZE = "200KB"


@dataclass(frozen=True, slots=True)
class Check:
    """The check of one step of the demo.

    Attributes:
        finding: The result in words.
        passed: Whether it is the expected one.
        tensors: Number of tensors that were checked.
        files: Number of safetensors files that the step wrote.
        bytes: Their size together.
    """

    step: str
    finding: str
    passed: bool
    tensors: int | None = None
    files: int | None = None
    bytes: int | None = None


def run_demo(directory: Path | None, *, show: Callable[[tuple[Check, ...]], object]) -> None:
    """Convert a small random multimodal model hf → nemo → hf, check every step, and show the checks.

    Args:
        directory: A new or empty directory that keeps the three checkpoints `hf`, `nemo` and `hf-again`; None for a
            temporary one, which is removed at the end.
        show: Called with the checks, whether they passed or failed.

    Raises:
        UsageError: The directory is not empty, or torch or transformers is not installed.
        DifferenceError: A check failed.
        StorageError: The disk or its permissions refused.
    """
    _require_libraries()
    if directory is None:
        with temporary_directory("gemma4-moe-demo-") as temporary:
            run_demo(Path(temporary), show=show)
        return
    with refusals("make the directory", directory):
        directory.mkdir(parents=True, exist_ok=True)
        filled = any(directory.iterdir())
    if filled:
        hint = "name a new directory, or none for a temporary one"
        raise UsageError("the demo's directory is not empty", file=directory, hint=hint)
    with _quiet_transformers():
        checks = tuple(_round_trip(directory))
    show(checks)
    failed = [check.step for check in checks if not check.passed]
    if failed:
        raise DifferenceError(
            "the demo found a difference",
            expected="✓ on every line of the table",
            found=f"✗ at {', '.join(failed)}",
            hint="gemma4-moe demo DIR, which keeps the checkpoints, then gemma4-moe verify DIR/hf DIR/nemo",
        )


def _round_trip(directory: Path) -> Iterator[Check]:
    """Build, convert there and back, verify and compare in `directory`, which exists and is empty; yield each check."""
    from safetensors import SafetensorError

    from gemma4_moe.converter.convert import convert
    from gemma4_moe.demo import small_models

    hf, nemo, again = (directory / name for name in ("hf", "nemo", "hf-again"))
    source: Any = small_models.build_model("multimodal")
    try:
        with refusals("write the model", hf):
            small_models.save_model(source, hf, max_shard_size=_MAX_SHARD_SIZE)
    except SafetensorError as error:  # the library's own error if the disk refuses
        raise StorageError(f"can't write the model: {error}", file=hf) from error
    yield _built(source, hf)
    convert(hf, nemo, to=Layout.NEMO, max_shard_size=_MAX_SHARD_SIZE)
    yield _verified("hf → nemo", hf, nemo)
    convert(nemo, again, to=Layout.HF, max_shard_size=_MAX_SHARD_SIZE)
    yield _verified("nemo → hf", nemo, again)
    result, loading = type(source).from_pretrained(again, output_loading_info=True)
    yield _loaded(source, loading)
    expected = small_models.logits(source)
    difference = (small_models.logits(result) - expected).abs().max().item()
    finding = f"max |Δ logit| = {difference:.1e} from the source; {TOLERANCE:.0e} is rounding"
    yield Check("logits", finding, difference <= TOLERANCE)
    for name, parameter in source.named_parameters():
        if name.endswith(SCALE.hf):
            parameter.data.fill_(1.0)
    difference = (small_models.logits(source) - expected).abs().max().item()
    finding = f"max |Δ logit| = {difference:.1e} with the scales lost on purpose"
    yield Check("control", finding, difference > 1000 * TOLERANCE)


def _built(source: PreTrainedModel, directory: Path) -> Check:
    config = source.config.get_text_config()
    finding = (
        f"random fp32 model of transformers {version('transformers')}: {config.num_hidden_layers} layers, "
        f"E {config.num_experts}, H {config.hidden_size}, I {config.moe_intermediate_size}"
    )
    written = len(source.state_dict()) - 1  # lm_head is the embedding, which is written once
    return Check("build", finding, True, written, *_on_disk(directory))


def _verified(step: str, source: Path, target: Path) -> Check:
    from gemma4_moe.verifier.verify import verify

    result = verify(source, target)
    finding = "same bits as the verifier computes"
    if result.different:
        finding = f"{result.different_tensors} tensors differ; {result.different[0]}"
    return Check(step, finding, not result.different, result.tensors, *_on_disk(target))


def _on_disk(directory: Path) -> tuple[int, int]:
    """Return the number of a checkpoint's weight files and their size in bytes."""
    sizes = [file.stat().st_size for file in directory.glob("*.safetensors")]
    return len(sizes), sum(sizes)


def _loaded(source: PreTrainedModel, loading: dict[str, object]) -> Check:
    """Check the names that transformers missed or did not expect while it loaded the result."""
    complaints = {kind: names for kind, names in loading.items() if names}
    finding = "; ".join(f"{kind}: {names}" for kind, names in complaints.items()) or "every name found, none left over"
    return Check("from_pretrained", finding, not complaints, len(source.state_dict()) - 1)


def _require_libraries() -> None:
    try:
        for library in ("torch", "transformers"):
            import_module(library)
    except ImportError as error:
        problem = "the demo needs torch, and transformers to build and load a model"
        hint = "pip install 'gemma4-moe[demo]'"
        raise UsageError(problem, found=str(error), expected="the extra `demo`", hint=hint) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars, which would break the table."""
    import transformers

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
