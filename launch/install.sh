#!/usr/bin/env bash
# Makes .venv with pinned dependencies and this project in it. Quick when all is up to date.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/install.sh [--dev] [--python PYTHON]

  --dev            also what tests and checks need (ruff, mypy, shellcheck, hypothesis)
  --python PYTHON  the interpreter to use, 3.11 or 3.12 (default: python3.12, python3.11, python3: the first that fits)

The build of torch follows the machine: a CUDA build where nvidia-smi finds a GPU, else a CPU build where pip finds
one (pip's own settings, such as PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, say where it looks).

example: bash launch/install.sh --dev
TEXT
}

die() {
    echo "install.sh: $1" >&2
    exit 1
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/install-stamp"
constraints="$root/launch/constraints.txt"
extra=""
python=""
while [ $# -gt 0 ]; do
    case "$1" in
        --dev) extra="dev" ;;
        --python)
            [ $# -ge 2 ] || die "--python needs an interpreter, such as --python python3.11"
            python="$2"
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) die "unknown argument '$1' (see --help)" ;;
    esac
    shift
done

# An interpreter of that name may be a shim that only prints an error: run it to know.
fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "$python" ]; then
        fits "$python" || die "--python $python: not Python 3.11 or 3.12 with the venv and ensurepip modules"
        echo "$python"
        return
    fi
    for candidate in "$venv/bin/python" python3.12 python3.11 python3; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or 3.12 with the venv and ensurepip modules found (on Debian and Ubuntu: python3.11-venv); name one with --python"
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# What the environment depends on. It holds absolute paths, so a moved checkout is installed anew.
fingerprint() {
    "$1" - "$root" "$2" <<'PYTHON'
import hashlib, pathlib, platform, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256()
for part in (str(root), sys.argv[2], platform.python_version(), platform.machine()):
    digest.update(part.encode() + b"\0")
for name in ("setup.py", "pyproject.toml", "launch/constraints.txt", "launch/install.sh"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

pinned() {
    sed -n "s/^$1==//p" "$constraints"
}

interpreter="$(find_python)"
build="cpu"
if has_gpu; then build="cuda"; fi
wanted="$(fingerprint "$interpreter" "$build")"
# A line for the environment and, when they are in it, one for the development tools.
if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$wanted" ] &&
    { [ -z "$extra" ] || [ "$(sed -n 2p "$stamp")" = "$extra" ]; }; then
    echo "install.sh: $venv is up to date"
    exit 0
fi

version="$("$interpreter" -c 'import platform; print(platform.python_version())')"
echo "install.sh: Python $version, $build build of torch, into $venv (a few minutes the first time)"
# A virtual environment of another interpreter or place cannot be mended: make it anew.
if [ -x "$venv/bin/python" ] && [ "$interpreter" = "$venv/bin/python" ] &&
    head -n 3 "$venv/bin/pip" 2>/dev/null | grep -qF "$venv/bin/python"; then
    rm -f "$stamp"
else
    # The interpreter may itself be the one in .venv.
    base="$("$interpreter" -c 'import os, sys; print(os.path.realpath(sys._base_executable))')"
    "$base" -m venv --clear "$venv"
fi

options=(--disable-pip-version-check --no-compile -c "$constraints") # byte code is written when a file is first used
if [ ! -t 1 ]; then options+=(--quiet); fi
pip_install() {
    "$venv/bin/python" -m pip install "${options[@]}" "$@"
}

# torch comes first and pinned: whatever else asks for it then takes what is there.
torch="$(pinned torch)"
setuptools="$(pinned setuptools)"
echo "install.sh: torch $torch"
if [ "$build" = cuda ]; then
    pip_install "torch==$torch" "setuptools==$setuptools"
elif ! pip_install "torch==$torch+cpu" "setuptools==$setuptools" 2>/dev/null; then
    echo "install.sh: pip finds no build $torch+cpu, so the default build it is (it may bring CUDA libraries)"
    pip_install "torch==$torch" "setuptools==$setuptools"
fi
echo "install.sh: the other dependencies, and this project"
(
    cd "$root"
    pip_install --no-build-isolation -e ".${extra:+[$extra]}"
)
if [ "$build" = cuda ]; then
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        die "this machine has a GPU, but pip found a CPU build of torch; see pip's index settings, then run this again"
fi

printf '%s\n%s\n' "$wanted" "$extra" >"$stamp"
echo "install.sh: done; activate with: source $venv/bin/activate"
