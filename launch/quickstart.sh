#!/usr/bin/env bash
# From nothing to a trained, evaluated model and its report: install, train, evaluate, report.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/quickstart.sh [key=value ...]

Installs what is needed, trains the recipe `quickstart` with two processes (expert parallelism 2), evaluates it on
held-out images and writes a report: about 12 minutes on two cores, less when installed. A run that was stopped goes
on; a finished one is not trained again. key=value changes settings of the recipe.

example: bash launch/quickstart.sh name=seed1 seed=1
TEXT
}

for argument in "$@"; do
    case "$argument" in
        -h | --help)
            usage
            exit 0
            ;;
        *=*) ;;
        *)
            echo "quickstart.sh: '$argument': only key=value is allowed (see --help)" >&2
            exit 2
            ;;
    esac
done

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash launch/install.sh
PYTHON="$root/.venv/bin/python"
cli=("$PYTHON" -m moe_lvlm)
run="$("${cli[@]}" recipes quickstart "$@" --folder)"

if [ -e "$run/DONE" ]; then
    echo "quickstart.sh: $run is trained already (its DONE is there); remove the folder, or give name=..., to train anew"
else
    bash launch/torchrun.sh --nproc 2 quickstart "$@"
    if [ ! -e "$run/DONE" ]; then
        echo "quickstart.sh: stopped before the end; the same command goes on from the last checkpoint" >&2
        exit 1
    fi
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" # one process now: it may have all cores
# shellcheck source=/dev/null
. moe_lvlm/slurm/environment.sh
"${cli[@]}" eval "$run"
"${cli[@]}" report "$run"

echo
echo "Scores are in $run/metrics.json and in the table above, beside those of always giving the most frequent answer."
echo "The report: $(cd "$run" && pwd)/report/index.html"
