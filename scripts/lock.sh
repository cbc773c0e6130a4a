#!/usr/bin/env bash
# Makes the files in requirements/ anew from pyproject.toml: versions and hashes, valid for every Python from
# 3.11 on, and no address of any index, so that they work with whatever index pip is set up for.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=.venv/bin/uv
if ! [ -x "$uv" ]; then
    .venv/bin/python -m pip install --quiet 'uv ~= 0.13.8'
fi

# lock NAME SOURCE...: requirements/NAME.lock. Versions that the present file has stay, unless UPGRADE=1.
lock() {
    local target=requirements/$1.lock
    shift
    "$uv" pip compile --quiet ${UPGRADE:+--upgrade} \
        --universal --python-version 3.11 --generate-hashes \
        --no-header --no-emit-index-url --no-emit-find-links \
        --output-file "$target" "$@" >/dev/null
    sed -i '1i # Made by `make lock` from pyproject.toml; `make lock UPGRADE=1` takes newer versions.' "$target"
}

lock build --group build
lock runtime pyproject.toml
lock dev -c requirements/runtime.lock pyproject.toml --group dev
