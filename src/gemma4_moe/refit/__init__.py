"""Stream training weights into a running inference engine.

Start with `stream`: `state` reads the trainer's tensors, `items` lists the tensors to send, `buckets` lays them out,
`lending` gives out their memory, `filling` converts them into place, and `ahead` begins the next bucket. `preflight`
compares with the engine. `broadcasting` and `ipc` carry buckets to other processes; `mailboxes` and `endings` have
their messages. `vllm_source`, `sglang_bucket` and `verl_params` serve engines.

May import: everything below the command line.
"""

from gemma4_moe.refit.buckets import Bucket, BucketEntry, unpack
from gemma4_moe.refit.items import Planned
from gemma4_moe.refit.stream import WeightStream

__all__ = ["Bucket", "BucketEntry", "Planned", "WeightStream", "unpack"]
