#!/usr/bin/env bash
# Makes this machine ready for the tree's checks and tests. Repeating it is harmless and takes a second.
#
#   setup.sh venv       the Python environment .venv, with what the locks name (no root, if python3-venv is there)
#   setup.sh machine    the Debian packages too, for the lab, the demo and the tests
#
# It must not start or leave running any daemon of the packages that it installs: they belong in namespaces here.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "setup: $*" >&2
    exit 1
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# quietly WHAT REMEDY COMMAND...: runs it; if it fails, shows the end of its output and one line that says what to do.
quietly() {
    local what=$1 remedy=$2
    shift 2
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        fail "$what failed; $remedy"
    fi
}

missing_of() {
    local package
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || echo "$package"
    done
}

policy=/usr/sbin/policy-rc.d
policy_mark='Put here by the set-up of nfsha for the length of one installation.'

# Forbids Debian's packages to start their daemons (invoke-rc.d asks this file; 101 means forbidden).
forbid_starts() {
    trap 'allow_starts; rm -f "$log"' EXIT
    trap 'exit 130' INT TERM
    # Ours may be left from a run that was killed; then the machine's own is aside already.
    if [ -e "$policy" ] && ! grep -qF "$policy_mark" "$policy"; then
        mv "$policy" "$policy.before-nfsha"
    fi
    printf '#!/bin/sh\n# %s\nexit 101\n' "$policy_mark" >"$policy"
    chmod 755 "$policy"
}

# Puts the machine's own policy back. Idempotent: it removes nothing but ours.
allow_starts() {
    if grep -qsF "$policy_mark" "$policy"; then
        rm "$policy"
    fi
    if [ -e "$policy.before-nfsha" ]; then
        mv "$policy.before-nfsha" "$policy"
    fi
}

# Packages whose daemons the next boot would start, in the way of the lab's (and on the network).
with_daemons=(keepalived mosquitto nfs-common nfs-ganesha nfs-kernel-server rpcbind)

# Switches those daemons off, where this very run has installed them: what was there before stays as it was.
disable_daemons_of() {
    local package unit
    command -v systemctl >/dev/null || return 0
    for package in "${with_daemons[@]}"; do
        [[ " $* " == *" $package "* ]] || continue
        for unit in $(dpkg -L "$package" | sed -nE 's#^(/usr)?/lib/systemd/system/([^/@]+\.(service|socket))$#\2#p'); do
            systemctl disable "$unit" >/dev/null 2>&1 || echo "setup: $unit of $package could not be switched off"
        done
    done
}

install_packages() {
    local missing=() unavailable=() package
    mapfile -t missing < <(missing_of "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || fail "must be root to install ${missing[*]}; run it as: sudo make ..."
    echo "setup: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    quietly "apt-get update" "check this machine's network and /etc/apt/sources.list*" apt-get update
    for package in "${missing[@]}"; do
        apt-get install --simulate --no-install-recommends "$package" >/dev/null 2>&1 || unavailable+=("$package")
    done
    [ ${#unavailable[@]} = 0 ] ||
        fail "cannot be had from this machine's package sources: ${unavailable[*]}; use Debian 12 with 'main' in /etc/apt/sources.list*"
    forbid_starts
    quietly "apt-get install ${missing[*]}" "repair the packages named above, then run it again" \
        apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=120 "${missing[@]}"
    allow_starts
    disable_daemons_of "${missing[@]}"
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# The system's own Python first, so that two machines of one kind come out equal. Prints nothing if none will do.
choose_python() {
    local candidate
    for candidate in /usr/bin/python3 /usr/bin/python3.1{3,2,1} python3.1{3,2,1} python3; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

# What the environment was made from; it is made up to date whenever that changes.
venv_inputs() {
    cat requirements/build.lock requirements/dev.lock pyproject.toml | sha256sum
    .venv/bin/python -c 'import sys; print(sys.version)'
}

make_venv() {
    local python remedy
    if ! new_enough .venv/bin/python; then
        python=$(choose_python)
        # Debian's python3 comes without what venv needs; other builds have it inside.
        if [ -z "$python" ] || ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            command -v apt-get >/dev/null || fail "no Python of 3.11 or later with venv found; install one"
            install_packages python3 python3-venv
            python=$(choose_python)
            [ -n "$python" ] || fail "this system's python3 is older than 3.11; use Debian 12 or later"
        fi
        quietly "making .venv with $python" "remove .venv and run it again" "$python" -m venv --clear .venv
    fi
    if [ "$(venv_inputs)" = "$(cat .venv/nfsha-setup.stamp 2>/dev/null || true)" ]; then
        return
    fi
    echo "setup: installing what requirements/ names into .venv"
    remedy="the lines above name the package; check that pip can reach its index, then run it again"
    quietly "pip install (build.lock)" "$remedy" .venv/bin/python -m pip install --require-hashes -r requirements/build.lock
    # Some come as source only: they are built with what build.lock pins, not with whatever is newest today.
    quietly "pip install (dev.lock)" "$remedy" .venv/bin/python -m pip install --require-hashes \
        --no-build-isolation --use-pep517 -r requirements/dev.lock
    quietly "pip install of nfsha itself" "$remedy" .venv/bin/python -m pip install --no-deps --no-build-isolation -e .
    venv_inputs >.venv/nfsha-setup.stamp
}

[ "$(uname -s)" = Linux ] || fail "nfsha runs on Linux only (this is $(uname -s)); use a Debian 12 machine"

case ${1-} in
venv)
    make_venv
    ;;
machine)
    [ "$(id -u)" = 0 ] || fail "must be root (network namespaces, mounts, packages); run it as: sudo make ..."
    command -v apt-get >/dev/null || fail "needs apt-get for its test peers; use a machine with Debian 12"
    mapfile -t packages < <(grep -v '^#' scripts/debian-packages.txt)
    install_packages "${packages[@]}"
    make_venv
    ;;
*)
    fail "say: setup.sh venv | setup.sh machine"
    ;;
esac
