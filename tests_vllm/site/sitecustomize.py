"""Let the published torchvision be imported beside a torch without CUDA, in vLLM's helper processes too.

Its operators are built for CUDA and don't load; all that an import needs is that their schemas are declared.
"""

from __future__ import annotations

import sys

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators:
    """A finder that finds nothing, and declares the operators before torchvision is looked for elsewhere."""

    library = None

    def find_spec(self, name: str, *_: object) -> None:
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in _SCHEMAS:
                self.library.define(schema)


sys.meta_path.insert(0, DeclareOperators())
