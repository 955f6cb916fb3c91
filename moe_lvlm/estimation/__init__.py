"""What a training step costs on paper: FLOPs, memory, traffic and time."""
