"""vLLM on the CPU: an engine that takes weights from this process, and what its CPU backend needs after a refit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm import LLM, SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

if TYPE_CHECKING:
    from pathlib import Path

NEW_TOKENS = 64
PROMPT = [5, 77, 402, 13, 250, 31, 8, 199]


@dataclass
class Nothing(WeightTransferInitInfo):
    """What the engine needs to know beforehand."""


@dataclass
class Chunk(WeightTransferUpdateInfo):
    """Some weights: (hf name, tensor)."""

    weights: list[tuple[str, torch.Tensor]]


class InProcessEngine(WeightTransferEngine[Nothing, Chunk]):
    """Loads chunks that a trainer in the same process hands over."""

    init_info_cls = Nothing
    update_info_cls = Chunk

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # the base class waits for an accelerator

    def receive_weights(self, update_info: Chunk) -> None:
        self.model.load_weights(update_info.weights)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repair(self.model)

    def shutdown(self) -> None:
        pass


def repair(model: torch.nn.Module) -> None:
    """Pack again what vLLM 0.32 leaves packed from the old weights on the CPU: the experts and a tied lm_head."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
        if type(module).__name__ == "ParallelLMHead":
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


WeightTransferEngineFactory.register_engine("in-process", InProcessEngine)


def load(directory: Path) -> LLM:
    return LLM(
        str(directory),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0},
        weight_transfer_config=WeightTransferConfig(backend="in-process"),
    )


def generate(llm: LLM) -> list[int]:
    """The tokens that vLLM finds most likely, one after the other."""
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    llm.reset_prefix_cache()
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def expected(model: Any) -> list[int]:
    """The tokens that transformers finds most likely, end-of-text as good as any other."""
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            best = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], 1)
    return tokens[0, len(PROMPT) :].tolist()
