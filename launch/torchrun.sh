#!/usr/bin/env bash
# Trains a recipe with several processes on this machine.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh [--nproc N] RECIPE [key=value ...] [--resume | --fresh]

  --nproc N  processes on this machine (default: one a GPU, or one where there is none)

With fewer GPUs than processes, all of them compute on the CPU.

example: bash launch/torchrun.sh --nproc 2 quickstart stages.0.steps=20
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
gpus=0
if command -v nvidia-smi >/dev/null; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
nproc=$((gpus > 0 ? gpus : 1))
case "${1:-}" in
    --nproc)
        nproc="${2:-}"
        if ! [[ "$nproc" =~ ^[1-9][0-9]*$ ]]; then
            echo "torchrun.sh: --nproc '$nproc'; allowed: a whole number above 0" >&2
            exit 2
        fi
        shift 2
        ;;
    -h | --help | "")
        usage
        exit 0
        ;;
esac
if ! [ -x "$root/.venv/bin/python" ]; then
    echo "torchrun.sh: no environment at $root/.venv; make it with: bash \"$root/launch/install.sh\"" >&2
    exit 1
fi

if [ "$gpus" -lt "$nproc" ]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""
fi
# Waiting threads that spin take the cores from the processes that compute: a factor of ten on two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# Environments that share a cache of compiled extensions rebuild each other's. The build needs ninja.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$root/.venv/torch_extensions}"
export PATH="$root/.venv/bin:$PATH"

# A mistake in the recipe is said once, here, and not by every process.
check=()
for argument in "$@"; do
    case "$argument" in -*) ;; *) check+=("$argument") ;; esac
done
"$root/.venv/bin/python" -m moe_lvlm recipes "${check[@]}" >/dev/null

exec "$root/.venv/bin/python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$nproc" \
    -m moe_lvlm train "$@"
