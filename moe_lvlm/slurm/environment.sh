# shellcheck shell=bash
# The environment in which processes train, in one place: sourced by launch/*.sh, and part of the job that
# `moe-lvlm submit` writes. What is set already keeps its value. PYTHON, set before, is the interpreter that trains.

# Threads of one process. Many processes share a node, and each would take all its cores. With offload the optimizer's
# step runs on the host: give each process its share of the cores then.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Waiting threads that spin take the cores from the processes that compute: a factor of ten on two cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# Data workers are forks, which cannot use the tokenizer's threads; without this it warns in each of them.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Environments that share a cache of compiled extensions rebuild each other's, so each has its own, unless it cannot be
# written to. The build needs ninja, which lies beside the interpreter.
if [ -e "${PYTHON%/bin/*}/pyvenv.cfg" ]; then
    if [ -w "${PYTHON%/bin/*}" ]; then
        export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${PYTHON%/bin/*}/torch_extensions}"
    fi
    export PATH="${PYTHON%/bin/*}/bin:$PATH"
fi

# NCCL says nothing of what went wrong unless asked; WARN prints errors alone. Which interfaces and adapters it uses is
# the cluster's affair: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, and GLOO_SOCKET_IFNAME for gloo, which moves checkpoints.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
