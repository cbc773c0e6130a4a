#!/usr/bin/env bash
# Runs the unit tests and a short simulation on each Python after 3.11 that this machine really has.
set -euo pipefail
cd "$(dirname "$0")/.."

# A name on the PATH may be a shim for a version that is not chosen: only what runs counts.
find_python() {
    local candidate
    for candidate in /usr/bin/python"$1" "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
}

# prepare VENV PYTHON: the same locks as .venv has.
prepare() {
    [ -x "$1/bin/python" ] || "$2" -m venv "$1"
    "$1/bin/python" -m pip install --quiet --require-hashes -r requirements/build.lock
    "$1/bin/python" -m pip install --quiet --require-hashes --no-build-isolation --use-pep517 -r requirements/dev.lock
    "$1/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
}

failed=()
for version in 3.12 3.13; do
    python=$(find_python "$version")
    if [ -z "$python" ]; then
        echo "Python $version: not on this machine, nothing was run"
        continue
    fi
    venv=.venv-$version
    echo "Python $version: $("$python" --version) in $venv"
    prepare "$venv" "$python"
    "$venv/bin/python" -m pytest --quiet tests/unit || failed+=("$version: tests/unit")
    if [ -e tests/sim/__main__.py ]; then
        "$venv/bin/python" -m tests.sim --seeds "${SEEDS:-50}" || failed+=("$version: tests.sim")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed on Python %s\n' "${failed[@]}" >&2
    exit 1
fi
