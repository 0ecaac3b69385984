"""The commands for LoRA adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gemma4_moe.cli import options
from gemma4_moe.cli.help import Command
from gemma4_moe.layout.lora import LoraForm

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.cli.options import Output


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
    "The adapter to read: a directory with adapter_model.safetensors and adapter_config.json.",
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
    from gemma4_moe.cli import report
    from gemma4_moe.lora.convert import convert_lora

    done = convert_lora(source, target, to=to, base=base, legacy_layout=legacy_layout)
    output.say(*(f"note: {note}" for note in done.notes))
    output.give(report.lora_conversion(done), is_faultless=True)
