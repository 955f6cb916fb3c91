"""The environment of all tests: few threads, no network, computation on the CPU, and Ctrl-C means what it says."""

import os
import signal

# Before torch and transformers are imported, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ["DS_ACCELERATOR"] == "cpu":  # our CUDA kernels are run by Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Shells let what they start in the background ignore it, and whatever that starts in turn; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
