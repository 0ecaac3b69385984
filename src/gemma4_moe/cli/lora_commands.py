"""The commands for LoRA adapters: `lora` and `merge`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma4_moe.cli import options, writing
from gemma4_moe.cli.help import Command
from gemma4_moe.errors import command_line
from gemma4_moe.layout.lora import LoraForm
from gemma4_moe.layout.table import Layout

if TYPE_CHECKING:
    from gemma4_moe.cli.options import Output


_ADAPTER = "a directory with adapter_model.safetensors and adapter_config.json"


@click.command(
    cls=Command,
    examples=[
        "gemma4-moe lora step-1000/model adapter-peft --to peft --base gemma-4-26B-A4B",
        "gemma4-moe lora adapter-peft adapter-vllm --to vllm",
    ],
)
@options.argument(
    "source",
    "SRC",
    f"The adapter to read: {_ADAPTER}.",
    type=options.Directory(),
)
@options.argument(
    "target", "DST", "The directory to make. It must not exist yet, or be empty.", type=options.Directory()
)
@click.option(
    "--to", type=click.Choice([form.value for form in LoraForm]), required=True, help="The form of DST, by its reader."
)
@click.option(
    "--base",
    metavar="CHECKPOINT",
    type=options.Checkpoint(),
    help="The published hf checkpoint that the adapter was trained from, a directory or a Hub id. Only its "
    "per_expert_scale is read. Needed between nemo and the other forms if the adapter changes down_proj.",
)
@click.option("--legacy-layout", is_flag=True, help="With --to peft, write the layout of PEFT before 0.19.1.")
@options.common
def lora(output: Output, *, source: Path, target: Path, to: str, base: str | None, legacy_layout: bool) -> None:
    """Convert a LoRA adapter: NeMo, PEFT, vLLM.

    NeMo trains beside weights into which each expert's scale is folded; PEFT and vLLM use the published weights. The B
    of down_proj is divided or multiplied by the scale of its expert.
    """
    from gemma4_moe.cli import lora_report
    from gemma4_moe.lora.convert import convert_lora

    done = convert_lora(source, target, to=to, base=base, legacy_layout=legacy_layout)
    output.say(*(f"note: {note}" for note in done.notes))
    output.give(lora_report.lora_conversion(done), is_faultless=True)


@click.command(
    cls=Command,
    examples=[
        "gemma4-moe merge gemma-4-26B-A4B step-1000/model merged",
        "gemma4-moe merge google/gemma-4-26B-A4B adapter-peft merged-nemo --to nemo",
    ],
)
@options.argument("base", "BASE", f"The checkpoint to change: {options.CHECKPOINT}", type=options.Checkpoint())
@options.argument(
    "adapter", "ADAPTER", f"The LoRA adapter: {_ADAPTER}, of NeMo, PEFT or vLLM.", type=options.Directory()
)
@options.target
@click.option(
    "--to",
    type=click.Choice([layout.value for layout in Layout]),
    default=Layout.HF.value,
    show_default=True,
    help="Layout of DST.",
)
@options.writing
@options.common
def merge(output: Output, *, base: str, adapter: Path, target: Path, dry_run: bool, **arguments: Any) -> None:
    """Merge a LoRA adapter into BASE, as a new directory.

    Products are taken in fp32 and rounded once. NeMo's adapters belong to weights with each expert's scale folded in,
    PEFT's and vLLM's to the published ones: the scales of BASE account for the difference.
    """
    from gemma4_moe.converter import merge as merging

    if dry_run:
        writing.show_plan(output, base, target, arguments | {"adapter": adapter})
        return
    writing.write(output, "merging", partial(merging.merge, base, adapter), target, arguments)
    compared = [target] if arguments["stream"] else ["--adapter", adapter, Path(base), target]
    output.say(f"next: {command_line('gemma4-moe', 'verify', *compared)}")
