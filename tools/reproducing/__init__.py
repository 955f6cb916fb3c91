"""Tables and figures of papers, made again: what is trained, how it is counted, and how it is shown."""
