"""Ranks, meshes and DTensors: who holds which part of a tensor, and how parts become whole tensors.

`sharding` is the formula, without torch. `placements` turns torch's meshes and placements into it. `collectives` moves
the bytes. `ranks` lets the processes of one run agree.

May import: errors, sizes, layout.
"""
