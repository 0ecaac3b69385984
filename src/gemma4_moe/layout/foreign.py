"""Forms of Gemma 4 MoE, and of relatives, that are not converted: how each is recognised, and the next step.

`FOREIGN` is the one registry. `foreign_spelling` recognises a form by a tensor's name, `checkpoint.foreign_formats` by
the names of files and directories, and `checkpoint.recognition` by config.json. docs/forms.md explains each row.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gemma4_moe.layout.lora import LORA_NAME


class Foreign(NamedTuple):
    """A form that this package names and does not convert.

    Attributes:
        name: Its name in messages, in `inspect` and in docs/forms.md.
        hint: The next step. "{}" stands for the directory, quoted for a shell.
        tensor: Matches the name of a tensor that only this form has.
        file: Matches the name of a file, or of a directory with a slash at its end, that only this form has.
        always: Whether such a file tells the form even in a directory with other safetensors files or an index.
        model_types: Values of config.json's `model_type` that only this form has.
        quant_methods: Values of `quant_method` in config.json's `quantization_config` that only this form has.
        reason: Why it is refused, if not for its form alone.
        dequantised: Whether a directory in this form is read (`checkpoint.quantised`), and only a state dict refused.
    """

    name: str
    hint: str
    tensor: re.Pattern[str] | None = None
    file: re.Pattern[str] | None = None
    always: bool = False
    model_types: tuple[str, ...] = ()
    quant_methods: tuple[str, ...] = ()
    reason: str | None = None
    dequantised: bool = False


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.DOTALL)


_DEQUANTISE = "quantised weights are not dequantised here: start from the unquantised checkpoint"
_CONVERT = "a state dict is not dequantised: convert its directory with gemma4-moe convert, which reads this form"
_EXPORT = "export it to Hugging Face safetensors first, or start from the published checkpoint"
_MERGE = "merge it into its base: gemma4-moe merge BASE ADAPTER DST; or give it another form: gemma4-moe lora"

#: In order of precedence: the first form that any name shows is the checkpoint's. Quantised forms may have one tensor
#: an expert, too. A file of torch's own formats counts after those of programs that write such files.
FOREIGN = (
    Foreign(
        "bitsandbytes",
        _DEQUANTISE,
        tensor=_pattern(r".*\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|quant_state\.bitsandbytes__\w+)"),
        quant_methods=("bitsandbytes",),
    ),
    Foreign("GPTQ", _DEQUANTISE, tensor=_pattern(r".*\.g_idx"), quant_methods=("gptq",)),
    Foreign("AWQ", _DEQUANTISE, tensor=_pattern(r".*\.(qweight|qzeros)"), quant_methods=("awq",)),
    Foreign(
        "compressed-tensors INT4 (AWQ or GPTQ)",
        _DEQUANTISE,
        tensor=_pattern(r".*\.(weight_shape|weight_zero_point|weight_g_idx)"),
    ),
    Foreign(
        "compressed-tensors NVFP4",
        _CONVERT,
        tensor=_pattern(r".*\.(weight_packed|weight_global_scale|input_global_scale)"),
        dequantised=True,
    ),
    Foreign("ModelOpt NVFP4", _CONVERT, tensor=_pattern(r".*[._]weight_scale_2"), dequantised=True),
    Foreign(
        "FP8 in blocks",
        _CONVERT,
        tensor=_pattern(r".*(\.weight|_proj)_scale_inv"),
        quant_methods=("fp8",),
        dequantised=True,
    ),
    Foreign("compressed-tensors FP8", _CONVERT, tensor=_pattern(r".*\.weight_scale"), dequantised=True),
    Foreign("ModelOpt FP8", _CONVERT, tensor=_pattern(r".*_proj_weight_scale"), dequantised=True),
    Foreign("MXFP4", _DEQUANTISE, tensor=_pattern(r".*_proj_(blocks|scales)"), quant_methods=("mxfp4",)),
    Foreign(
        "MLX quantised",
        "dequantise it with its own tool, mlx_lm.convert --dequantize (or mlx_vlm.convert), and name the result",
        tensor=_pattern(r".*\.(scales|biases)"),
    ),
    Foreign("LoRA adapter", _MERGE, tensor=_pattern(LORA_NAME)),
    Foreign(
        "Gemma 4 unified",
        "use it as it is: it is the same in both layouts",
        model_types=("gemma4_unified", "gemma4_unified_text"),
        reason="Gemma 4 unified is a dense model: it has no experts to convert",
    ),
    Foreign(
        "MTP drafter",
        "use it as it is beside its converted target model",
        model_types=("gemma4_assistant", "gemma4_unified_assistant"),
        reason="an MTP drafter never holds experts",
    ),
    Foreign(
        "rank files of verl",
        "merge them: python3 -m verl.model_merger merge --backend fsdp --local_dir {} --target_dir MERGED",
        file=_pattern(r"model_world_size_\d+_rank_\d+\.pt"),
    ),
    Foreign(
        "a sharded state of Accelerate",
        "name its directory, and the config of the model that it was trained from: gemma4-moe convert "
        "{}/pytorch_model_fsdp_0 DST --config-from BASE",
        file=_pattern(r"pytorch_model_fsdp_0/"),
    ),
    Foreign(
        "DeepSpeed ZeRO",
        "merge it: python3 {0}/zero_to_fp32.py {0} MERGED --safe_serialization; then put the model's config.json there",
        file=_pattern(r"global_step\d+/|(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_\w+\.pt|zero_to_fp32\.py"),
    ),
    Foreign(
        "torch.distributed.checkpoint without its metadata",
        "put .metadata beside its files: the save writes it last, and without it nothing tells where a tensor is",
        file=_pattern(r".*\.distcp"),
        always=True,
    ),
    Foreign("Orbax", _EXPORT, file=_pattern(r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt"), always=True),
    Foreign("PEFT adapter", _MERGE, file=_pattern(r"adapter_model\.(safetensors|bin)")),
    Foreign(
        "GGUF",
        "GGUF is quantised and renamed: start from the Hugging Face checkpoint",
        file=_pattern(r".*\.gguf"),
    ),
    Foreign(
        "pickled weights",
        "unpickling runs code: get the safetensors files, or save the model again with save_pretrained",
        file=_pattern(r".*\.(bin|pt|pth|ckpt|pkl)"),
    ),
)


def foreign_spelling(name: str) -> Foreign | None:
    """Return the form that has a tensor of this name, or None if there is none."""
    return next((form for form in FOREIGN if form.tensor is not None and form.tensor.fullmatch(name)), None)
