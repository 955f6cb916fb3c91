"""From one form of a model to another: dense and sparse, our layout and others', checkpoints and Hugging Face folders.

A conversion is a function from a `WeightSource` to a `WeightSource` (`checkpoint/source.py`): nothing is read before it
is written, a few rows at a time. The scripts under tools/ call what is here.
"""
