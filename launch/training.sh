# shellcheck shell=bash
# What torchrun.sh and deepspeed.sh share: options, checks, and a launcher's life from its start to its exit status.
# Sourced. $launcher begins every message; stop_training and interrupt_training are the sourcing script's own.

launcher="${launcher:?}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$root/.venv/bin/python"
arguments=() # RECIPE and its settings
options=()   # of `moe-lvlm train`
stop_signal="" until="" job=""

say() { echo "$launcher: $1" >&2; }

mistake() { # SENTENCE: what the caller can mend
    say "$1"
    exit 2
}

need_value() { # OPTION [VALUE]
    if [ $# -lt 2 ] || [ -z "$2" ] || [[ "$2" == --* ]]; then mistake "$1 needs a value (see --help)"; fi
}

need_number() { # OPTION VALUE LEAST
    need_value "$@"
    if ! [[ "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] || [ "$2" -lt "$3" ]; then
        mistake "$1 '$2'; allowed: a whole number, $3 or more"
    fi
}

need_port() { # WHERE PORT
    if ! [[ "$2" =~ ^[1-9][0-9]{0,4}$ ]] || [ "$2" -gt 65535 ]; then mistake "$1 '$2'; allowed: a port, 1 to 65535"; fi
}

# One argument that is not the launcher's own: RECIPE, a setting, or an option of train. $taken: how many it was.
take_argument() {
    taken=1
    case "$1" in
        --until | --stop-signal)
            need_value "$@"
            options+=("$1" "$2")
            # shellcheck disable=SC2034  # the sourcing script shifts by it
            taken=2
            case "$1 $2" in
                "--until "*) until="$2" ;;
                "--stop-signal USR1" | "--stop-signal USR2") stop_signal="$2" ;;
                *) mistake "--stop-signal '$2'; allowed: USR1, USR2" ;;
            esac
            ;;
        --resume | --fresh | --debug | --dry-run) options+=("$1") ;;
        -*) mistake "unknown option '$1' (see --help)" ;;
        *) arguments+=("$1") ;;
    esac
}

count_gpus() { # those of this machine that may be used
    local found=0 visible
    if command -v nvidia-smi >/dev/null; then found="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        visible="$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cvE '^(-1)?$' || true)"
        if [ "$visible" -lt "$found" ]; then found="$visible"; fi
    fi
    echo "$found"
}

# The environment of training, and the folder of the run in $run. Says what is wrong with the recipe, once.
prepare() {
    if [ "${#arguments[@]}" -eq 0 ]; then mistake "no RECIPE (see --help)"; fi
    if ! [ -x "$PYTHON" ]; then
        mistake "no environment at $root/.venv; make it with: bash \"$root/launch/install.sh\""
    fi
    # shellcheck source=/dev/null
    . "$root/moe_lvlm/slurm/environment.sh"
    run="$("$PYTHON" -m moe_lvlm recipes "${arguments[@]}" --folder)"
    if [[ " ${options[*]} " == *" --dry-run "* ]]; then # one process says it all
        exec "$PYTHON" -m moe_lvlm train "${arguments[@]}" "${options[@]}"
    fi
}

check_processes() { # OPTIONS: of `python -m moe_lvlm.config.launch`
    "$PYTHON" -m moe_lvlm.config.launch --name "$launcher" ${until:+--until "$until"} "$@" "${arguments[@]}"
}

address_of() { # NAME -> its address, or nothing
    { getent ahostsv4 "$1" || getent ahosts "$1"; } | awk 'NR == 1 { print $1 }' || true
}

children_of() { # PID...
    local pid
    for pid in "$@"; do cat "/proc/$pid"/task/*/children 2>/dev/null || true; done
}

last_event() { tail -n 1 "$run/log.jsonl" 2>/dev/null || true; }

# Run a launcher and end with the status that its training deserves. It gets a process group of its own: a signal to
# ours, such as Ctrl-C, would reach both it and us, and a launcher takes the second signal for a reason to give up.
follow() { # COMMAND...
    local before after status signals told=0
    before="$(last_event)"
    set +e # Ctrl-C also ends the commands with which an earlier signal is answered
    trap 'on_signal INT' INT
    trap 'on_signal TERM' TERM
    trap 'on_signal HUP' HUP
    # Of processes in a job's step, all get this signal; launchers know nothing of it and would die.
    if [ -n "$stop_signal" ]; then trap 'on_signal "$stop_signal"' "$stop_signal"; fi
    set -m
    (
        if [ -n "$stop_signal" ]; then trap '' "$stop_signal"; fi
        exec "$@"
    ) </dev/null &
    job=$!
    set +m
    while true; do
        signals=$told
        wait "$job"
        status=$?
        if [ "$signals" = "$told" ]; then break; fi # else a signal ended the wait, not the launcher its work
    done
    end_left_over
    after="$(last_event)"
    case "$after" in
        "$before") ;;
        '{"event": "stopped"'*)
            # Launchers that were told to end call it a failure even if all processes saved and ended well.
            if [ "$status" -ne 0 ]; then
                say "stopped, and saved as $run/checkpoints/$(cat "$run/checkpoints/latest"); the same command goes on"
            fi
            exit 0
            ;;
        '{"event": "done"'*) if [ "$told" -gt 0 ]; then status=0; fi ;; # it was done when the signal came
    esac
    if [ "$told" -gt 0 ] && [ "$status" -ne 0 ]; then say "ended without saving; what was saved before is in $run"; fi
    exit "$status"
}

# What a launcher that was killed leaves in its process group; DeepSpeed's says 0 then.
end_left_over() {
    local tries=0
    while group_lives; do
        tries=$((tries + 1))
        if [ "$tries" -gt 100 ]; then break; fi
        sleep 0.1 # data workers leave a moment after their trainer
    done
    if [ "$tries" -le 100 ]; then return; fi
    say "the launcher ended before its processes did; they are killed"
    kill -KILL -- "-$job" 2>/dev/null || true
    if [ "$status" -eq 0 ]; then status=1; fi
}

group_lives() { # some process of it that is no zombie
    { cat /proc/[0-9]*/stat 2>/dev/null || true; } | # one may have ended since the names were listed
        sed 's/.*) //' | awk -v group="$job" '$3 == group && $1 != "Z" { found = 1 } END { exit !found }'
}

on_signal() { # NAME
    if [ -z "$job" ]; then exit 1; fi # nothing has started
    told=$((told + 1))
    if [ "$told" -eq 1 ]; then
        say "SIG$1: training saves after this step and ends; another Ctrl-C kills it"
        stop_training
    elif [ "$1" = INT ]; then
        interrupt_training
    fi
}
