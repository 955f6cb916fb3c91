"""Jobs for SLURM clusters: what is asked for, the script that asks for it, and its way into the queue."""
