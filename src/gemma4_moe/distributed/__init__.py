"""Ranks, meshes and DTensors: which shard of a tensor each rank holds, and how shards are gathered.

`sharding` is the formula, without torch. `placements` turns torch's meshes and placements into it. `collectives` moves
the bytes. `ranks` lets the processes of one conversion wait for each other.

May import: errors, sizes, layout.
"""
