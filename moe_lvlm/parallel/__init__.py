"""The only room that knows DeepSpeed's groups and its expert-parallel contract."""
