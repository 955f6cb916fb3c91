#!/usr/bin/env bash
# Runs everything that a GPU can tell, in under ten minutes: kernel tests and all benchmarks, into one folder.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash tools/bench_gpu.sh [--out FOLDER] [--only PART,PART] [--limit SECONDS] [--device DEVICE] [--quick]

  --out FOLDER     where results go (default: runs/bench_gpu)
  --only PARTS     some of: node, tests, layer, scaling, lora, step; one layer: layer_stablelm, layer_small, layer_16,
                   layer_64
  --limit SECONDS  for all of it (default: 590); each part has a limit of its own besides
  --device DEVICE  cuda, cuda:N or cpu (default: cuda)
  --quick          tiny sizes and one round, to see that all parts run

Each part leaves NAME.log, and a benchmark NAME.json, NAME.md and NAME.png; summary.md holds all of it. A part that
fails, or finds no time, is said at the end and gives status 1; the others still run. Ctrl-C keeps what is there.
The interpreter is $PYTHON, else .venv's, else python3.

examples:
  bash tools/bench_gpu.sh --out runs/h100
  bash tools/bench_gpu.sh --device cpu --quick --only layer,step
TEXT
}

mistake() { # SENTENCE: what the caller can mend
    echo "bench_gpu.sh: $1" >&2
    exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
all_parts=(node tests layer_stablelm step layer_small layer_16 layer_64 scaling lora)
out="$root/runs/bench_gpu" only="" limit=590 device=cuda quick=""
while [ $# -gt 0 ]; do
    case "$1" in --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case "$1" in
        --out | --only | --limit | --device)
            if [ $# -lt 2 ] || [ -z "$2" ] || [[ "$2" == --* ]]; then mistake "$1 needs a value (see --help)"; fi
            case "$1" in
                --out) out="$2" ;;
                --only) only="$2" ;;
                --limit) limit="$2" ;;
                --device) device="$2" ;;
            esac
            shift 2
            ;;
        --quick) quick=yes && shift ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) mistake "unknown argument '$1' (see --help)" ;;
    esac
done
if ! [[ "$limit" =~ ^[1-9][0-9]{0,5}$ ]]; then mistake "--limit '$limit'; allowed: seconds, a whole number of 1 or more"; fi
if ! [[ "$device" =~ ^(cpu|cuda(:[0-9]+)?)$ ]]; then mistake "--device '$device'; allowed: cpu, cuda, cuda:N"; fi

parts=()
IFS=, read -ra wanted <<<"$only"
for name in ${wanted[@]+"${wanted[@]}"}; do
    if [[ " layer ${all_parts[*]} " != *" $name "* ]]; then
        mistake "--only '$name'; allowed: layer, ${all_parts[*]}"
    fi
done
for part in "${all_parts[@]}"; do
    if [ -z "$only" ] || [[ ",$only," == *",$part,"* ]] || [[ ",$only,$part" == *",layer,"*layer_* ]]; then parts+=("$part"); fi
done

python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ "$device" = cpu ]; then export DS_ACCELERATOR=cpu; fi
mkdir -p "$out"
out="$(cd "$out" && pwd)"

rows=() failures=() interrupted=""

# NAME LIMIT COMMAND...: one part, with what it says in a log of its own
part() {
    local name="$1" own="$2" start="$SECONDS" left=$((limit - SECONDS)) status=0 said=ok
    shift 2
    if [ "$left" -lt "$own" ]; then own="$left"; fi
    if [ "$own" -lt 5 ]; then
        note "$name" 0 "not run: no time left of $limit s"
        return
    fi
    echo "bench_gpu.sh: $name (at most $own s)" >&2
    # a Ctrl-C first, upon which a benchmark writes what it has; env, since who runs this in the background ignores it
    env --default-signal=INT timeout --foreground --signal=INT --kill-after=15 "$own" "$@" >"$out/$name.log" 2>&1 ||
        status=$?
    case "$status" in
        0) ;;
        124 | 137) said="cut off after $own s" ;;
        130) said=interrupted interrupted=yes ;;
        *) said="failed with status $status" ;;
    esac
    note "$name" $((SECONDS - start)) "$said"
}

note() { # NAME SECONDS WHAT
    rows+=("| $1 | $2 | $3 |")
    if [ "$3" != ok ] && [[ "$3" != none:* ]]; then
        failures+=("$1: $3")
        echo "bench_gpu.sh: $1: $3; its log: $out/$1.log" >&2
    fi
}

# NAME LIMIT TOOL ARGUMENTS...: a benchmark and its three files
bench() {
    local name="$1" own="$2" tool="$3"
    shift 3
    part "$name" "$own" "$python" "$root/tools/$tool.py" --device "$device" "$@" \
        --json "$out/$name.json" --markdown "$out/$name.md" ${png:+--png "$out/$name.png"}
}

node() {
    if [ "$device" != cpu ]; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv || return
    fi
    "$python" - "$device" <<'PYTHON'
import importlib.metadata
import platform
import sys

import torch

print("Python", platform.python_version(), "on", platform.platform())
print("torch", torch.__version__, "CUDA", torch.version.cuda)
for package in ("triton", "transformers", "deepspeed"):
    try:
        print(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        print(package, "is not installed")
if sys.argv[1] != "cpu":
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    facts = torch.cuda.get_device_properties(sys.argv[1])
    print(facts.name, f"{facts.total_memory / 2**30:.1f} GiB,", facts.multi_processor_count, "multiprocessors")
PYTHON
}

gpu_tests() { # files that say that they run on a GPU so
    { grep -rlE 'mark\.gpu\b|DS_ACCELERATOR=cuda' "$root/tests" --include='test_*.py' || true; } | sort
}

# Sizes: StableLM-1.6B's layer, the same FLOPs in 16 and in 64 experts, and PERFORMANCE's small one.
sizes_of() {
    case "$1" in
        layer_stablelm) sizes=(--tokens 16384 --model-width 2048 --ffn-width 5632 --experts 4 --top-k 2) ;;
        layer_16) sizes=(--tokens 16384 --model-width 2048 --ffn-width 2816 --experts 16 --top-k 4) ;;
        layer_64) sizes=(--tokens 16384 --model-width 2048 --ffn-width 1408 --experts 64 --top-k 8) ;;
        layer_small) sizes=(--tokens 4096 --model-width 512 --ffn-width 1408 --experts 4 --top-k 2) ;;
        scaling) sizes=(--tokens 16384 --model-width 2048 --ffn-width 1408 --dtype bf16) ;;
        lora) sizes=(--linears "2048x2048,2048x5632,5632x2048" --dtype bf16) ;;
        step) sizes=(--size stablelm) ;;
    esac
    if [ -z "$quick" ]; then return; fi
    case "$1" in
        layer_16) sizes=(--tokens 64 --model-width 32 --ffn-width 24 --experts 16 --top-k 4) ;;
        layer_64) sizes=(--tokens 64 --model-width 32 --ffn-width 12 --experts 64 --top-k 8) ;;
        layer_*) sizes=(--tokens 64 --model-width 32 --ffn-width 48 --experts 4 --top-k 2) ;;
        scaling)
            sizes=(--tokens 64 --model-width 32 --ffn-width 24)
            sizes+=(--points "experts=4,8" --points "tokens=32,64" --points "ranks=1")
            ;;
        lora) sizes=(--linears 24x32 --batch 3 --sequence 5) ;;
        step) sizes=(--size tiny) ;;
    esac
}

rounds() { # REPEATS WARMUP
    turns=(--repeats "$1" --warmup "$2")
    if [ -n "$quick" ]; then turns=(--repeats 1 --warmup 0); fi
}

# Rivals worth their time where there are many experts: the einsum's tensors would not fit there.
many="ours,ours_ltdr,transformers_eager,transformers_grouped_mm,deepspeed_dropless,deepspeed_dropless_grouped,deepspeed_capacity"

run_part() {
    local sizes=() turns=() png=yes
    sizes_of "$1"
    case "$1" in
        node) if node >"$out/node.log" 2>&1; then note node 0 ok; else note node 0 failed; fi ;;
        tests)
            mapfile -t files < <(gpu_tests)
            if [ "$device" = cpu ] || [ "${#files[@]}" -eq 0 ]; then
                note tests 0 "none: no tests for a GPU, or no GPU"
            else
                part tests 150 env DS_ACCELERATOR=cuda "$python" -m pytest -q -p no:cacheprovider "${files[@]}"
            fi
            ;;
        layer_stablelm)
            rounds 7 2
            bench "$1" 150 bench_layer "${sizes[@]}" "${turns[@]}" --profile "$out/where_time_goes"
            ;;
        layer_small)
            rounds 25 5
            bench "$1" 60 bench_layer "${sizes[@]}" "${turns[@]}"
            ;;
        layer_16 | layer_64)
            rounds 5 2
            bench "$1" 90 bench_layer "${sizes[@]}" "${turns[@]}" --variants "$many"
            ;;
        scaling)
            rounds 15 3
            bench "$1" 120 bench_scaling "${sizes[@]}" "${turns[@]}"
            ;;
        lora)
            png=""
            rounds 25 5
            bench "$1" 60 bench_lora "${sizes[@]}" "${turns[@]}"
            ;;
        step)
            rounds 3 1
            bench "$1" 240 bench_step "${sizes[@]}" "${turns[@]}"
            ;;
    esac
}

summary() { # all of it on one page
    local name table
    echo "# bench_gpu.sh"
    if [ -f "$out/node.log" ]; then quoted "$(cat "$out/node.log")"; fi
    printf '\n| part | s | |\n|---|---|---|\n'
    printf '%s\n' "${rows[@]}"
    for name in "${parts[@]}"; do
        if [ "$name" = tests ] && [ -f "$out/tests.log" ]; then
            printf '\n## tests\n'
            quoted "$(tail -n 15 "$out/tests.log")"
        fi
        if [ ! -f "$out/$name.md" ]; then continue; fi
        printf '\n## %s\n\n%s\n' "$name" "$(cat "$out/$name.md")"
        if [ -f "$out/$name.png" ]; then printf '\n![%s](%s.png)\n' "$name" "$name"; fi
        if [ "$name" != layer_stablelm ]; then continue; fi
        for table in "$out"/where_time_goes/{ours,ours_bf16}.md; do
            if [ -f "$table" ]; then printf '\n%s\n' "$(cat "$table")"; fi
        done
    done
}

quoted() { # TEXT
    # shellcheck disable=SC2016  # Markdown's fence
    printf '\n```\n%s\n```\n' "$1"
}

for name in "${parts[@]}"; do
    # what an earlier run left must not pass for this one's
    rm -f "$out/$name.log" "$out/$name.json" "$out/$name.md" "$out/$name.png"
    if [ "$name" = layer_stablelm ]; then rm -f "$out"/where_time_goes/{ours,ours_bf16}.md; fi
done
for name in "${parts[@]}"; do
    run_part "$name"
    if [ -n "$interrupted" ]; then break; fi
done
summary >"$out/summary.md"
echo "bench_gpu.sh: wrote $out/summary.md ($SECONDS s)" >&2
if [ -n "$interrupted" ]; then exit 130; fi
for failure in ${failures[@]+"${failures[@]}"}; do echo "bench_gpu.sh: $failure" >&2; done
if [ "${#failures[@]}" -gt 0 ]; then exit 1; fi
