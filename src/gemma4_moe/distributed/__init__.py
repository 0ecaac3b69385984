"""Ranks, meshes and DTensors: each rank's shard of a tensor, and collectives over shards.

`sharding` is the formula, without torch. `placements` turns torch's meshes and placements into it. `gathering` makes
shards whole, `packing` small tensors together; `collectives` lets ranks agree before and after. `ranks` lets the
processes of one conversion wait for each other.

May import: errors, sizes, layout.
"""
