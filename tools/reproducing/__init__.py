"""The tables and figures of the LTDR paper, made again: what is trained, how it is counted, and how it is shown."""
