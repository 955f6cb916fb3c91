#!/usr/bin/env bash
# Installs what the tests need and runs them. Arguments go to pytest; tests marked `slow` run with -m slow.
#
# example: bash tests/run.sh tests/config -k override
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash launch/install.sh --dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export PATH="$root/.venv/bin:$PATH" # ninja, for extensions that torch compiles
exec "$root/.venv/bin/python" -m pytest "$@"
