#!/usr/bin/env bash
# Trains a recipe with DeepSpeed's launcher: on this machine, or from it on all nodes of a hostfile.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/deepspeed.sh [--nproc N] RECIPE [key=value ...] [option of `moe-lvlm train` ...]
       bash launch/deepspeed.sh --hostfile FILE [option ...] RECIPE ...   (on one node, for all)

  --hostfile FILE     a line a node: `node1 slots=8`; nodes are reached by ssh without a password, through pdsh
  --include CHOICE    these alone, --exclude CHOICE all but these: HOST[:SLOT,SLOT...], with @ between hosts
  --num-nodes N       the first N nodes of the hostfile
  --nproc N           processes on each node (default: its slots; without a hostfile one a GPU, or one)
  --master-addr HOST  the first node as the others reach it (default: its name in the hostfile)
  --master-port PORT  a free port there (default: 29500; on one machine any free one)
  --launcher pdsh     the one of DeepSpeed's that tells each process its rank

All nodes need this checkout, its .venv and the run's folder at the same paths. Where they have fewer GPUs than
processes, one machine computes on the CPU, and so do nodes without any. SIGTERM, Ctrl-C or a closed terminal end in a
saved checkpoint and status 0; the same command goes on from it. Options of train: --until STAGE, --resume, --fresh,
--stop-signal USR1|USR2, --debug, --dry-run.

examples:
  bash launch/deepspeed.sh --nproc 2 quickstart stages.0.steps=20
  bash launch/deepspeed.sh --hostfile hosts.txt --num-nodes 2 my_recipe.yaml
  bash launch/deepspeed.sh --hostfile hosts.txt --include node1@node3:0,1,2,3 my_recipe.yaml
TEXT
}

launcher=deepspeed.sh
# shellcheck source=launch/training.sh
. "$(dirname "${BASH_SOURCE[0]}")/training.sh"

nproc="" port="" master="" hostfile="" choice=() hosts=() slots=()
if [ $# -eq 0 ]; then set -- --help; fi
while [ $# -gt 0 ]; do
    case "$1" in --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    taken=2
    case "$1" in
        --hostfile) need_value "$@" && hostfile="$2" ;;
        --include | --exclude) need_value "$@" && choice+=("$1" "$2") ;;
        --num-nodes) need_number "$1" "${2:-}" 1 && choice+=("$1" "$2") ;;
        --nproc) need_number "$1" "${2:-}" 1 && nproc="$2" ;;
        --master-addr) need_value "$@" && master="$2" ;;
        --master-port) need_value "$@" && need_port "$1" "$2" && port="$2" ;;
        --launcher)
            need_value "$@"
            if [ "$2" != pdsh ]; then
                mistake "--launcher '$2'; allowed: pdsh; DeepSpeed's others leave RANK or MASTER_ADDR to MPI (SLURM: moe-lvlm submit)"
            fi
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) take_argument "$@" ;;
    esac
    shift "$taken"
done

is_here() { # HOST
    case "$1" in localhost | 127.* | "$(hostname)" | "$(hostname -s)") return 0 ;; esac
    [[ " $(hostname -I 2>/dev/null || true) " == *" $(address_of "$1") "* ]]
}

on_nodes() { # HOST,HOST... COMMAND: pdsh puts the host's name in place of %h
    PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes -o ConnectTimeout=10" \
        pdsh -N -w "$1" "$2"
}

# Names, ssh, paths and devices of all nodes, before any process waits for another.
check_nodes() {
    local index host name answer answers gpus count=0 others_reach
    for name in pdsh ssh; do
        if ! command -v "$name" >/dev/null; then
            mistake "several nodes need $name, which is not installed (Debian and Ubuntu: apt-get install pdsh openssh-client)"
        fi
    done
    for host in "${hosts[@]}"; do
        # shellcheck disable=SC2086  # options; and what ~/.ssh/config makes of the name
        name="$(ssh ${PDSH_SSH_ARGS_APPEND:-} -G "$host" 2>/dev/null | awk '$1 == "hostname" { print $2 }')"
        if [ -z "$(address_of "$name")" ]; then mistake "$hostfile: $host: no such host (getent finds no $name)"; fi
        if [ -z "$master" ]; then master="$name"; fi
    done
    case "$(address_of "$master")" in
        "") mistake "--master-addr $master: no such host (getent ahosts $master finds nothing)" ;;
        127.*) others_reach=yes ;; # all nodes are this machine, or nothing works
        *) others_reach="${GLOO_SOCKET_IFNAME:-}" ;;
    esac
    # gloo tells other nodes the address that a node's name has on it; Debian gives it 127.0.1.1 in /etc/hosts.
    answers="$(on_nodes "$(join , "${hosts[@]}")" "$(
        cat <<PROBE
cd $(printf %q "$PWD") 2>/dev/null || { echo "%h has no folder $(printf %q "$PWD")"; exit 0; }
[ -x $(printf %q "$PYTHON") ] || { echo "%h has no $(printf %q "$PYTHON")"; exit 0; }
own=\$(getent ahostsv4 "\$(hostname)" | awk "NR == 1 { print \\\$1 }")
case "$others_reach\${own:-127.}" in
    127.*) echo "%h gives its own name, \$(hostname), the address \${own:-(none)}: set GLOO_SOCKET_IFNAME"; exit 0 ;;
esac
echo "%h ready \$(nvidia-smi -L 2>/dev/null | grep -c ^GPU)"
PROBE
    )")" || true # a node that does not answer is found below
    for index in "${!hosts[@]}"; do
        host="${hosts[index]}"
        answer="$(awk -v host="$host" '$1 == host' <<<"$answers")"
        case "$answer" in
            "") mistake "$host: ssh without a password does not work (try: ssh -o BatchMode=yes $host true)" ;;
            "$host ready "*) gpus="${answer##* }" ;;
            *) mistake "$answer" ;;
        esac
        if [ "${DS_ACCELERATOR:-}" != cpu ] && [ "$gpus" -gt 0 ]; then
            count=$((count + 1))
            if [ "${slots[index]##*,}" -ge "$gpus" ]; then
                mistake "$host has $gpus GPUs; the slots chosen there: ${slots[index]}"
            fi
        fi
    done
    if [ "$count" -eq 0 ]; then
        export DS_ACCELERATOR=cpu
    elif [ "$count" -lt "${#hosts[@]}" ]; then
        mistake "$count of the ${#hosts[@]} nodes have GPUs; allowed: all or none"
    fi
}

join() { # SEPARATOR WORD...
    local IFS="$1"
    shift
    echo "$*"
}

# DeepSpeed tells other nodes little of this environment; a file named by DS_ENV_FILE says what else. Its values land
# in double quotes of a remote shell.
write_environment() {
    local name value
    # shellcheck disable=SC2016  # the node's own PATH
    echo "PATH=${PYTHON%/*}:"'$PATH'
    while IFS= read -r name; do
        case "$name" in
            *_TOKEN | DS_ENV_FILE | CUDA_VISIBLE_DEVICES) continue ;; # secrets, and what DeepSpeed itself sets
            DS_* | OMP_* | MKL_* | KMP_* | TORCH* | PYTORCH_* | NCCL_* | GLOO_* | CUDA_* | LD_LIBRARY_PATH | HF_* | \
                TRANSFORMERS_* | TOKENIZERS_* | MOE_LVLM_*) ;;
            *) continue ;;
        esac
        value="${!name}"
        if [[ "$value" == *[$'\n%']* ]]; then mistake "$name has a % or a line break, which cannot pass pdsh"; fi
        value="${value//\\/\\\\}"
        value="${value//\"/\\\"}"
        value="${value//\$/\\\$}"
        echo "$name=${value//\`/\\\`}"
    done < <(compgen -e)
    cat "$HOME/.deepspeed_env" .deepspeed_env 2>/dev/null | grep '=' || true
}

# The trainers, and not DeepSpeed's launcher: it would kill them 30 seconds later, saved or not, and pdsh's by the name
# of their command, other runs' too. One that is told tells the others.
# shellcheck disable=SC2329  # training.sh calls it
stop_training() {
    local trainers
    if [ "${#hosts[@]}" -gt 0 ]; then
        # Until training has begun there is none to be told, and nothing lost by waiting.
        until stop_first_rank || ! kill -0 "$job" 2>/dev/null; do sleep 1; done &
    else
        # shellcheck disable=SC2046  # process ids
        trainers="$(children_of $(children_of "$job"))"
        # shellcheck disable=SC2086  # process ids
        kill -TERM ${trainers:-"-$job"} 2>/dev/null || true
    fi
}

# shellcheck disable=SC2329
stop_first_rank() { # it holds the lock of the run's folder, which names its process
    local pid
    pid="$(cut -d ' ' -f 1 "$run/.lock" 2>/dev/null)"
    [[ "$pid" =~ ^[0-9]+$ ]] || return 1
    on_nodes "${hosts[0]}" "tr '\\0' ' ' </proc/$pid/cmdline | grep -F 'moe_lvlm train' | \
grep -qF $(printf %q "${arguments[0]}") && kill -TERM $pid && echo told" 2>/dev/null | grep -q told
}

# shellcheck disable=SC2329
interrupt_training() {
    if [ "${#hosts[@]}" -gt 0 ]; then kill -TERM "$job"; else kill -KILL -- "-$job"; fi 2>/dev/null || true
}

if [ -z "$hostfile" ] && [ "${#choice[@]}" -gt 0 ]; then mistake "${choice[0]} chooses from a hostfile; give --hostfile"; fi
prepare
if [ -n "$hostfile" ]; then
    nodes="$(check_processes --hostfile "$hostfile" "${choice[@]}" ${nproc:+--nproc "$nproc"})"
    while read -r host listed; do
        hosts+=("$host")
        slots+=("$listed")
    done <<<"$nodes"
    if [ "${#hosts[@]}" -eq 1 ] && is_here "${hosts[0]}"; then
        nproc="$(tr -d '0-9\n' <<<"${slots[0]}," | wc -c)"
        hosts=()
    fi
fi

run_deepspeed=("$PYTHON" -m deepspeed.launcher.runner --module --no_local_rank --no_ssh_check --log_level error)
if [ "${#hosts[@]}" -gt 0 ]; then
    check_nodes
    include=""
    for index in "${!hosts[@]}"; do include+="${include:+@}${hosts[index]}:${slots[index]}"; done
    for argument in "${arguments[@]}" "${options[@]}"; do
        case "$argument" in *[[:space:]%]*) mistake "'$argument' has a blank or a %, which cannot pass pdsh; write it in the recipe" ;; esac
    done
    mapfile -t quoted < <(printf '%q\n' "${arguments[@]}" "${options[@]}") # for the shell of each node
    DS_ENV_FILE="$(mktemp)"
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    export DS_ENV_FILE
    write_environment >"$DS_ENV_FILE"
    # One node alone runs on this machine unless forced, whatever the hostfile says.
    follow "${run_deepspeed[@]}" --force_multi --launcher pdsh --hostfile "$hostfile" --include "$include" \
        --master_addr "$master" --master_port "${port:-29500}" moe_lvlm train "${quoted[@]}"
fi

gpus="$(count_gpus)"
nproc="${nproc:-$((gpus > 0 ? gpus : 1))}"
if [ "${#slots[@]}" -eq 0 ]; then check_processes --processes "$nproc"; fi
if [ "$gpus" -lt "$nproc" ]; then
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""
    devices=(--num_gpus "$nproc") # processes, whatever they compute on
elif [ "${#slots[@]}" -gt 0 ]; then
    devices=(--include "localhost:${slots[0]}")
elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # DeepSpeed forgets it beside --num_gpus
    if ! [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
        mistake "CUDA_VISIBLE_DEVICES '$CUDA_VISIBLE_DEVICES'; DeepSpeed's launcher takes numbers, such as 0,1"
    fi
    devices=(--include "localhost:$(cut -d , -f "1-$nproc" <<<"$CUDA_VISIBLE_DEVICES")")
else
    devices=(--num_gpus "$nproc")
fi
if [ -z "$port" ]; then
    port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
fi
# No file: the default, /job/hostfile, would be read where it happens to be.
follow "${run_deepspeed[@]}" --hostfile "" "${devices[@]}" --master_port "$port" \
    moe_lvlm train "${arguments[@]}" "${options[@]}"
