"""Our own checkpoint format: topology-free, atomic, checksummed, and without pickle.

A checkpoint is a folder of JSON and safetensors files. It speaks of logical tensors (global parameter names, all
experts), never of ranks: any world size, expert-parallel size or ZeRO stage reads the ranges that it needs.
`save` writes one, `verify` judges one, `restore` continues from one, `source` reads weights out of one.
"""
