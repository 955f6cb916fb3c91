"""The check of nodes before a job trains: each node by itself, then what lies between them."""
