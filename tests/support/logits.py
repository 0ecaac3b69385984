"""How far two models' logits are apart."""

from gemma4_moe.demo.small_models import logits

#: The largest difference of two fp32 logits that the order of additions explains.
TOLERANCE = 5e-6


def difference(model, other):
    """The largest absolute difference of two models' logits."""
    return (logits(model) - logits(other)).abs().max().item()
