# Sourced by the other scripts: a virtual environment in .venv with the pinned versions of constraints.txt.
# usage: ensure_environment EXTRAS   (e.g. "" or "test" or "test,parity")

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "dsjax needs Python 3.11 or newer, found none" >&2
    exit 2
}

ensure_environment() {
    local extras="$1" stamp want python
    stamp="$VENV/.installed-${extras//,/-}"
    want="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum) $ROOT"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
        return
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        python="$(find_python)"
        echo "making a virtual environment with $python" >&2
        "$python" -m venv "$VENV"
    fi
    echo "installing dsjax${extras:+ with $extras}" >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$ROOT/constraints.txt" --editable "$ROOT${extras:+[$extras]}"
    echo "$want" >"$stamp"
}
