#!/usr/bin/env bash
# Trains a recipe with several processes, on this machine or as one node of several.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh [--nproc N] RECIPE [key=value ...] [option of `moe-lvlm train` ...]
       bash launch/torchrun.sh --nnodes N --node-rank R --master HOST[:PORT] [--nproc N] RECIPE ...   (on each node)

  --nproc N             processes on this machine (default: one a GPU, or one where there is none)
  --nnodes N            nodes, each of which runs this command with the same --nproc
  --node-rank R         which of them this is: 0 to N-1
  --master HOST[:PORT]  node 0 as the others reach it, and a free port on it (default: 29500)
  --rdzv-id ID          nodes meet only nodes with the same ID
  --log-dir DIR         output of each process into files below DIR as well

With fewer GPUs than processes, all of them compute on the CPU. SIGTERM, Ctrl-C or a closed terminal end in a saved
checkpoint and status 0; the same command goes on from it. Options of train: --until STAGE, --resume, --fresh,
--stop-signal USR1|USR2, --debug, --dry-run.

examples:
  bash launch/torchrun.sh --nproc 2 quickstart stages.0.steps=20
  bash launch/torchrun.sh --nnodes 2 --node-rank 0 --master node1 my_recipe.yaml     # on node1
  bash launch/torchrun.sh --nnodes 2 --node-rank 1 --master node1 my_recipe.yaml     # on node2
TEXT
}

launcher=torchrun.sh
# shellcheck source=launch/training.sh
. "$(dirname "${BASH_SOURCE[0]}")/training.sh"

# To the processes that train, not to torchrun: it would count the end as a failure and not wait for the other nodes.
# shellcheck disable=SC2329  # training.sh calls it
stop_training() {
    local trainers
    trainers="$(children_of "$job")"
    # shellcheck disable=SC2086  # process ids
    kill -TERM ${trainers:-$job} 2>/dev/null || true
}

# shellcheck disable=SC2329  # as above
interrupt_training() { # torchrun gives each trainer a process group of its own
    local trainer
    for trainer in $(children_of "$job"); do kill -KILL -- "-$trainer" 2>/dev/null || true; done
}

nproc="" nnodes=1 node_rank="" master="" nodes_options=() log_options=()
if [ $# -eq 0 ]; then set -- --help; fi
while [ $# -gt 0 ]; do
    case "$1" in --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    taken=2
    case "$1" in
        --nproc) need_number "$1" "${2:-}" 1 && nproc="$2" ;;
        --nnodes) need_number "$1" "${2:-}" 1 && nnodes="$2" ;;
        --node-rank) need_number "$1" "${2:-}" 0 && node_rank="$2" ;;
        --master) need_value "$@" && master="$2" ;;
        --rdzv-id) need_value "$@" && nodes_options+=(--rdzv-id "$2") ;;
        --log-dir) need_value "$@" && log_options=(--log-dir "$2" --tee 3) ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) take_argument "$@" ;;
    esac
    shift "$taken"
done

check_nodes() { # what several nodes need, before any of them waits for another
    local address port own
    if [ -z "$master" ] || [ -z "$node_rank" ]; then
        mistake "--nnodes $nnodes needs --node-rank R, which of them this is, and --master HOST, node 0"
    fi
    if [ "$node_rank" -ge "$nnodes" ]; then
        mistake "--node-rank $node_rank with --nnodes $nnodes; allowed: 0 to $((nnodes - 1))"
    fi
    port=29500
    if [[ "$master" =~ ^([^:]+):([^:]*)$ ]]; then
        master="${BASH_REMATCH[1]}" port="${BASH_REMATCH[2]}"
        need_port "--master: port" "$port"
    elif [[ "$master" == *:* ]]; then
        mistake "--master '$master'; allowed: HOST or HOST:PORT"
    fi
    # torchrun asks for a name that does not resolve again and again, for a minute and a half, and says little.
    address="$(address_of "$master")"
    if [ -z "$address" ]; then mistake "--master $master: no such host (getent ahosts $master finds nothing)"; fi
    if [ "$node_rank" -eq 0 ] && (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        mistake "--master $master: port $port is in use on this machine; take another on all nodes: --master $master:PORT"
    fi
    own="$(address_of "$(hostname)")"
    # gloo tells the others the address that this machine's name has here; Debian gives it 127.0.1.1 in /etc/hosts.
    if [[ "$address" != 127.* ]] && [[ "${own:-127.}" == 127.* ]] && [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then
        mistake "this machine's name, $(hostname), is ${own:-no address} here, where other nodes cannot reach it; set \
GLOO_SOCKET_IFNAME to the interface towards $master, such as eth0, or correct /etc/hosts"
    fi
    # Static: ranks follow --node-rank and all nodes use the master's name as given. c10d numbers nodes as they come,
    # and makes up the master from its own full name, which the others often cannot resolve.
    nodes_options+=(--nnodes "$nnodes" --node-rank "$node_rank" --rdzv-backend static --rdzv-endpoint "$master:$port")
}

if [ "$nnodes" -gt 1 ]; then
    check_nodes
elif [ -n "$node_rank$master" ] || [ "${#nodes_options[@]}" -gt 0 ]; then
    mistake "--node-rank, --master and --rdzv-id are for several nodes; give --nnodes N with N above 1"
else
    nodes_options=(--standalone --local-addr 127.0.0.1)
fi
prepare
gpus="$(count_gpus)"
nproc="${nproc:-$((gpus > 0 ? gpus : 1))}"
if [ "$gpus" -lt "$nproc" ]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""
fi
check_processes --processes "$((nnodes * nproc))"
# Where torchrun itself is told to end, it tells its processes, and kills them after this many seconds (30 by itself).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

follow "$PYTHON" -m torch.distributed.run "${nodes_options[@]}" --nproc-per-node "$nproc" "${log_options[@]}" \
    -m moe_lvlm train "${arguments[@]}" "${options[@]}"
