#!/usr/bin/env bash
# A real SLURM of several nodes on this one machine: for the project's tests, and to try a job without a cluster.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/slurm/local_cluster.sh install
       bash launch/slurm/local_cluster.sh start DIR [options]
       bash launch/slurm/local_cluster.sh status DIR
       bash launch/slurm/local_cluster.sh stop DIR

  install  SLURM and munge from the packages of Debian or Ubuntu, by apt-get
  start    brings up the cluster whose settings, logs and state are in DIR (made when missing), and prints the line
           that makes sbatch, squeue and the others use it. Of a running cluster it starts only what has died
  status   what runs and what does not: exit status 0 when everything does, else 1
  stop     ends every process of the cluster, jobs too, at once and without time to save. Logs stay in DIR/log

options of start; they hold until the cluster is stopped and started with others:
  --nodes N          nodes, named n1, n2, ... (default 3)
  --cpus N           CPUs that each node says it has (default 8)
  --memory MB        memory that each node says it has (default 16000)
  --gpus N           GPUs that each node says it has (default 0). They can be asked for and set CUDA_VISIBLE_DEVICES,
                     but nothing computes on them.
  --gpu-type TYPE    their type (default h100)
  --port N           ports of the cluster: N for the controller, N+1, N+2, ... for the nodes (default 17000)
  --network A.B.C    the nodes' addresses: A.B.C.1, A.B.C.2, ... (default 127.0.1)
  --kill-wait S      seconds between a job's SIGTERM and its SIGKILL, SLURM's KillWait (default 30, as SLURM's)
  --grace S          GraceTime of the partition `grace` (default 20)
  --requeue-wait S   seconds before a requeued job may start again (default 6; 121 on most clusters)
  --node-timeout S   SLURM's SlurmdTimeout (default 10). A dead node is seen as down 5 to 10 seconds after that time

Partitions:
  batch    the default. Its jobs make way for urgent ones and are requeued: SIGTERM, and SIGKILL after --kill-wait
  grace    as batch, but its jobs' steps get SIGTERM the seconds of --grace earlier
  urgent   its jobs take the place of those in batch and grace
  members  only with --account members

The machine's true cores and memory are shared by all nodes, and no job is held to what it asked for. There is no
accounting database: sacct does not work.

Each node has a host name and a hosts file of its own, by namespaces. Root may make them; another user may where the
kernel allows user namespaces (Ubuntu's AppArmor does not), and then only that user has jobs there. --gpus needs root.

example: eval "$(bash launch/slurm/local_cluster.sh start ~/slurm --nodes 2 --gpus 8)" && srun --nodes=2 hostname
TEXT
}

mistake() {
    echo "local_cluster.sh: $1 (see --help)" >&2
    exit 2
}

die() {
    echo "local_cluster.sh: $1" >&2
    exit 1
}

PATH="$PATH:/usr/sbin:/sbin" # the daemons' place, which a user's PATH may lack
nodes=3 cpus=8 memory=16000 gpus=0 gpu_type=h100 port=17000 network=127.0.1
kill_wait=30 grace=20 requeue_wait=6 node_timeout=10

# ---- arguments

# whole NAME OPTION VALUE LEAST MOST: sets the variable to a whole number within bounds.
whole() {
    if ! [[ "$3" =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($3 < $4 || $3 > $5)); then
        mistake "$2 '$3'; allowed: a whole number from $4 to $5"
    fi
    printf -v "$1" '%s' "$3"
}

read_options() {
    while [ $# -gt 0 ]; do
        [ $# -ge 2 ] || mistake "$1: an option of start and its value are expected"
        case "$1" in
            --nodes) whole nodes "$1" "$2" 1 64 ;;
            --cpus) whole cpus "$1" "$2" 1 1024 ;;
            --memory) whole memory "$1" "$2" 1 100000000 ;;
            --gpus) whole gpus "$1" "$2" 0 64 ;;
            --port) whole port "$1" "$2" 1024 65000 ;;
            --kill-wait) whole kill_wait "$1" "$2" 1 65000 ;;
            --grace) whole grace "$1" "$2" 1 65000 ;;
            --requeue-wait) whole requeue_wait "$1" "$2" 2 3600 ;;
            --node-timeout) whole node_timeout "$1" "$2" 3 65000 ;;
            --gpu-type)
                [[ "$2" =~ ^[a-z][a-z0-9_]*$ ]] || mistake "$1 '$2'; allowed: small letters, digits and _"
                gpu_type="$2"
                ;;
            --network)
                [[ "$2" =~ ^127(\.(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){2}$ ]] ||
                    mistake "$1 '$2'; allowed: 127.B.C, such as 127.0.1"
                network="$2"
                ;;
            *) mistake "unknown option '$1'" ;;
        esac
        shift 2
    done
}

# set_folder DIR: the variables that hang on it. SLURM's settings have no way to quote, and a socket's path is short.
set_folder() {
    dir="$(realpath -m -- "$1")"
    [[ "$dir" =~ ^[A-Za-z0-9_./+-]+$ ]] || mistake "DIR '$dir'; allowed in its path: letters, digits and _ . / + -"
    [ "${#dir}" -le 70 ] || mistake "DIR '$dir' is a path of ${#dir} characters; allowed: 70"
    conf="$dir/slurm.conf"
    export SLURM_CONF="$conf"
}

need_cluster() {
    [ -s "$conf" ] || mistake "no cluster in '$dir': it has no slurm.conf"
}

# ---- packages

commands=(munged slurmctld slurmd sbatch srun squeue sinfo scancel scontrol unshare mount)

missing_commands() {
    local name
    for name in "${commands[@]}"; do
        command -v "$name" >/dev/null || echo "$name"
    done
}

install_packages() {
    local advice="install SLURM (controller, node daemon, commands) and munge with the system's packages, which are"
    advice+=" slurm-wlm and munge for apt-get, or slurm, slurm-slurmctld, slurm-slurmd and munge for dnf"
    if [ -z "$(missing_commands)" ]; then
        echo "local_cluster.sh: $(slurmctld -V) and munge are installed"
        return
    fi
    command -v apt-get >/dev/null || die "no apt-get here; $advice"
    ((EUID == 0)) || die "install needs root for apt-get; use sudo, or $advice"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q >&2
    # The packages' own services find no settings and stay off: a failed start of theirs does no harm.
    apt-get install -yq --no-install-recommends slurm-wlm munge >&2 ||
        die "apt-get could not install slurm-wlm and munge (above)"
    local missing
    missing="$(missing_commands)"
    [ -z "$missing" ] || die "still missing after apt-get install: ${missing//$'\n'/ }"
    echo "local_cluster.sh: $(slurmctld -V) and munge are installed"
}

# ---- processes

# daemon NAME: the process of the daemon with that pid file, else status 1. Ids are used again: what it runs must fit.
daemon() {
    local pid
    pid="$(cat "$dir/pid/$1.pid" 2>/dev/null)" || return 1
    [ -n "$pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$dir/" && echo "$pid"
}

# is_on HOST PID: by the hosts file that it sees, so that a process cannot hide by leaving its session, nor by the death
# of the daemon that started it. A zombie is on no host.
is_on() {
    [ "/proc/$2/root/etc/hosts" -ef "$dir/hosts/$1" ]
}

# processes_of HOST: what runs on a node (jobs too), or as the controller.
processes_of() {
    local folder
    for folder in /proc/[0-9]*; do
        if is_on "$1" "${folder#/proc/}"; then echo "${folder#/proc/}"; fi
    done
}

# end_host HOST: every process of it. A dying process can have started another: look until none is left.
end_host() {
    local tries pids
    for ((tries = 0; tries < 200; tries++)); do
        mapfile -t pids < <(processes_of "$1")
        if [ ${#pids[@]} -eq 0 ]; then return 0; fi
        kill -s KILL "${pids[@]}" 2>/dev/null || true
        sleep 0.05
    done
    die "processes of $1 do not end: ${pids[*]}"
}

node_names() {
    local file
    for file in "$dir"/hosts/n*; do basename "$file"; done | sort -V
}

# ---- settings

write_hosts() {
    local node
    echo "127.0.0.1 localhost controller"
    for ((node = 1; node <= nodes; node++)); do echo "$network.$node n$node"; done
    cat /etc/hosts
}

write_conf() {
    local per_cpu=$((memory / cpus > 0 ? memory / cpus : 1)) gres=""
    if ((gpus)); then gres=" Gres=gpu:$gpu_type:$gpus"; fi
    cat <<CONF
# Made by local_cluster.sh start.
ClusterName=local
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A requeued job waits for the end of its credential: cred_expire + 1 seconds.
AuthInfo=socket=$dir/munge/munge.sock,cred_expire=$((requeue_wait - 1))
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/pid/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdSpoolDir=$dir/spool/%n
SlurmdPidFile=$dir/pid/%n.pid
SlurmdLogFile=$dir/log/%n.log
# No cgroups: they need systemd or a cgroup tree that can be written.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Schedule at once rather than every half minute.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobSubmitPlugins=lua
KillWait=$kill_wait
SlurmdTimeout=$node_timeout
# A dead node is noticed when a message to it has timed out: 10 s here make that half a minute.
MessageTimeout=5
# A node that comes back is used again, whatever took it down.
ReturnToService=2
# Ended jobs stay in squeue and scontrol for ten minutes.
MinJobAge=600
# Nodes have what is written here, not what the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=$cpus RealMemory=$memory$gres State=UNKNOWN
NodeName=n[1-$nodes] NodeHostname=n[1-$nodes] NodeAddr=$network.[1-$nodes] Port=[$((port + 1))-$((port + nodes))]
PartitionName=DEFAULT Nodes=ALL DefaultTime=10 MaxTime=INFINITE DefMemPerCPU=$per_cpu State=UP
PartitionName=DEFAULT PriorityTier=1 PreemptMode=REQUEUE
PartitionName=batch Default=YES
PartitionName=grace GraceTime=$grace
PartitionName=urgent PriorityTier=10 PreemptMode=OFF GraceTime=0
PartitionName=members PreemptMode=OFF GraceTime=0
CONF
}

write_gres() {
    if ((gpus)); then echo "NodeName=n[1-$nodes] Name=gpu Type=$gpu_type File=$dir/dev/nvidia[0-$((gpus - 1))]"; fi
}

# SLURM enforces AllowAccounts only with an accounting database: this does it for the one partition.
write_job_submit() {
    cat <<'LUA'
function slurm_job_submit(job, partitions, user)
   if job.partition == "members" and job.account ~= "members" then
      slurm.log_user("partition members needs --account=members")
      return slurm.ESLURM_INVALID_ACCOUNT or 2045
   end
   return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, user)
   return slurm.SUCCESS
end
LUA
}

put() {
    cat >"$dir/$1"
}

write_settings() {
    local node gpu
    mkdir -p "$dir"/{dev,hosts,log,munge,pid,spool,state}
    chmod 755 "$dir"
    chmod 700 "$dir/state"
    chmod 711 "$dir/munge" # munged refuses a socket that others cannot reach
    rm -f "$dir"/hosts/*
    write_hosts | put hosts/controller
    for ((node = 1; node <= nodes; node++)); do
        write_hosts | put "hosts/n$node"
        mkdir -p "$dir/spool/n$node"
    done
    # Only character devices set CUDA_VISIBLE_DEVICES. The number is that of NVIDIA's driver; nobody opens them.
    for ((gpu = 0; gpu < gpus; gpu++)); do
        [ -c "$dir/dev/nvidia$gpu" ] || mknod "$dir/dev/nvidia$gpu" c 195 "$gpu" ||
            die "--gpus needs root, to make device files"
    done
    write_gres | put gres.conf
    write_job_submit | put job_submit.lua
    write_conf | put slurm.conf
}

# ---- start

# Any process of this cluster, a job's too.
is_running() {
    local name
    for name in controller $(node_names); do
        [ -z "$(processes_of "$name")" ] || return 0
    done
    return 1
}

# Those of the daemons that do not run yet: before any is started.
need_free_ports() {
    local number name
    for ((number = 0; number <= nodes; number++)); do
        if ((number)); then name="n$number"; else name=slurmctld; fi
        daemon "$name" >/dev/null && continue
        # A connection that succeeds means that somebody listens.
        if (exec 3<>"/dev/tcp/127.0.0.1/$((port + number))") 2>/dev/null; then
            die "port $((port + number)), for $name, is in use (another cluster?): choose other ports with --port"
        fi
    done
}

# on_host NAME COMMAND...: a daemon with that host name and its hosts file; what it starts has them too.
on_host() {
    local rights=()
    # A user who is not root gets the rights for this in a namespace of users.
    if ((EUID)); then rights=(--map-current-user --keep-caps); fi
    # shellcheck disable=SC2016  # expanded in the host's own shell
    unshare "${rights[@]}" --uts --mount bash -c 'mount --bind "$1" /etc/hosts && hostname "$2" && exec "${@:3}"' bash \
        "$dir/hosts/$1" "$@" 2>>"$dir/log/$1.err" ||
        die "$2 does not start (it cannot where namespaces are forbidden; see $dir/log): $(tail -n 1 "$dir/log/$1.err")"
}

start_daemons() {
    local name
    if ! daemon munged >/dev/null; then
        [ -s "$dir/munge/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/munge.key")
        rm -f "$dir"/munge/munge.sock*
        # --force: the folders above DIR may be writable for others, as /tmp is.
        on_host controller munged --force --key-file="$dir/munge/munge.key" --socket="$dir/munge/munge.sock" \
            --pid-file="$dir/pid/munged.pid" --seed-file="$dir/munge/munge.seed" --log-file="$dir/log/munged.log"
    fi
    daemon slurmctld >/dev/null || on_host controller slurmctld -i -f "$conf"
    for name in $(node_names); do
        daemon "$name" >/dev/null || on_host "$name" slurmd -N "$name" -f "$conf"
    done
}

# Nodes that answer, as the controller sees it; one that was drained by hand answers too.
count_answering() {
    sinfo -h -N -p batch -o '%N %T' 2>/dev/null | sort -u | grep -cvE ' (down|unknown|.*\*$)' || true
}

start() {
    local missing tries
    missing="$(missing_commands)"
    [ -z "$missing" ] || die "not installed: ${missing//$'\n'/ }; try: bash launch/slurm/local_cluster.sh install"
    if is_running; then
        write_conf | cmp -s - "$conf" ||
            mistake "the cluster in '$dir' runs with other options: stop it first, or give those of its start"
    else
        write_settings
    fi
    need_free_ports
    start_daemons
    for ((tries = 0; tries < 300; tries++)); do
        if [ "$(count_answering)" -ge "$nodes" ]; then
            echo "export SLURM_CONF=$conf"
            return
        fi
        sleep 0.1
    done
    sinfo -N -l >&2 || true
    tail -n 5 "$dir"/log/*.log >&2
    die "the nodes did not come up in 30 s (above: what the controller sees, then the ends of the logs)"
}

# ---- stop and status

# Or the next start would begin them anew.
cancel_jobs() {
    local jobs
    jobs="$(timeout 10 squeue -h -o %F | sort -u)" || return 1
    # shellcheck disable=SC2086  # a word a job
    [ -z "$jobs" ] || timeout 10 scancel $jobs
}

stop() {
    local name pid tries
    if pid="$(daemon slurmctld)"; then
        cancel_jobs || echo "local_cluster.sh: jobs could not be cancelled: they may begin anew at the next start" >&2
        # It saves its state.
        kill -s TERM "$pid"
        for ((tries = 0; tries < 200; tries++)); do
            is_on controller "$pid" || break
            sleep 0.05
        done
    elif is_running; then
        echo "local_cluster.sh: the controller was dead: jobs that it had begin anew at the next start" >&2
    fi
    for name in $(node_names) controller; do end_host "$name"; done
    rm -f "$dir"/pid/*.pid
    echo "local_cluster.sh: stopped; logs are in $dir/log"
}

status() {
    local all=0 name pid
    for name in munged slurmctld $(node_names); do
        if pid="$(daemon "$name")"; then
            echo "$name: runs, process $pid"
        else
            echo "$name: does not run"
            all=1
        fi
    done
    if ((all == 0)); then
        echo "export SLURM_CONF=$conf"
        sinfo -N -h -p batch -o '%N: %T'
    fi
    return "$all"
}

for argument in "$@"; do
    case "$argument" in
        -h | --help)
            usage
            exit 0
            ;;
    esac
done
action="${1:-}"
case "$action" in
    install)
        [ $# -eq 1 ] || mistake "install takes no arguments"
        install_packages
        exit
        ;;
    start | stop | status) ;;
    "") mistake "install, start, stop or status is expected" ;;
    *) mistake "'$action'; allowed: install, start, stop, status" ;;
esac
case "${2:-}" in
    "" | -*) mistake "$action needs DIR, the cluster's folder" ;;
esac
set_folder "$2"
if [ "$action" = start ]; then
    read_options "${@:3}"
    start
else
    [ $# -eq 2 ] || mistake "$action takes DIR and no more"
    need_cluster
    "$action"
fi
