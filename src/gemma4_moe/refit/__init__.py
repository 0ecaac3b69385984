"""Stream training weights into a running inference engine: the plan, pairs of name and tensor, and buckets."""

from gemma4_moe.refit.buckets import Bucket, BucketEntry, unpack
from gemma4_moe.refit.items import Planned
from gemma4_moe.refit.stream import WeightStream

__all__ = ["Bucket", "BucketEntry", "Planned", "WeightStream", "unpack"]
