"""What `torture.py` is made of: a tiny run, processes that can be killed, the faults, and the judge."""
