"""AdapterFusion: attention over the updates of several trained bottlenecks, which stay frozen.

``files`` reads the bottlenecks from checkpoints of AdapterCallback, ``layer`` computes, ``method`` answers what a run
asks. The frozen bottlenecks are buffers, so every checkpoint of a fusion holds them.
"""
