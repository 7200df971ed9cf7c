#!/bin/sh
# Installs this checkout, editable, with one of its extras; run by the Makefile.
#
# usage: install.sh PYTHON EXTRA
#
# Without an NVIDIA GPU the CPU build of torch is installed first. Where no index has one, the script asks before it installs
# the usual build, which brings gigabytes of CUDA; without a terminal it stops. From the environment:
#
# TORCH_INDEX: a package index with CPU builds of torch, in addition to the indexes that pip is configured for.
# TORCH: cpu or cuda, instead of looking for a GPU; any: as without TORCH, but never ask or stop, for CI.
set -eu
python=$1 extra=$2
checkout=$(cd "$(dirname "$0")/../.." && pwd)
release=$(sed -n 's/.*"torch==\([0-9.]*\)".*/\1/p' "$checkout/setup.py" | head -n 1)

has_gpu() {
    nvidia-smi -L >/dev/null 2>&1 || [ -e "${NVIDIA_DEVICE:-/dev/nvidia0}" ]
}

has_torch() {
    "$python" -c "import importlib.metadata, sys; sys.exit(importlib.metadata.version('torch').split('+')[0] != '$release')" 2>/dev/null
}

# Whether pip can reach one; it says nothing, since the answer may be no.
sees_torch_for_cpus() {
    "$python" -m pip index versions torch --extra-index-url "$TORCH_INDEX" --retries 1 --timeout 15 2>/dev/null |
        grep -qF "$release+cpu"
}

stop() {
    echo "$1" >&2
    exit 1
}

# Consent to the usual build of torch: TORCH=any, or a yes at a terminal.
confirm_usual_torch() {
    usual="no CPU build of torch at $TORCH_INDEX; the usual one brings CUDA on x86-64: 3 GB to download, 5 GB installed"
    if [ "$choice" != any ] && [ ! -t 0 ]; then
        stop "$usual; nothing was installed: set TORCH=cuda to install that one, or TORCH_INDEX to an index with CPU builds"
    fi
    echo "$usual"
    if [ "$choice" = any ]; then return; fi
    printf 'Go on? [y/N] '
    read -r answer
    case $answer in
        y* | Y*) ;;
        *) stop "nothing was installed; set TORCH_INDEX to an index with CPU builds" ;;
    esac
}

choice=${TORCH:-auto} kind=$choice
case $choice in
    auto | any) if has_gpu; then kind=cuda; else kind=cpu; fi ;;
esac
case $kind in
    cpu | cuda) ;;
    *) echo "TORCH is $kind; expected cpu, cuda or any" >&2; exit 2 ;;
esac

if has_torch; then
    echo "torch $release is installed already; installing the other packages"
else
    if [ "$kind" = cpu ] && ! sees_torch_for_cpus; then
        confirm_usual_torch
        kind=cuda
    fi
    sizes="about 3 GB are downloaded, 5 GB installed"
    if [ "$kind" = cpu ]; then sizes="about 0.3 GB are downloaded, 1.2 GB installed"; fi
    echo "installing torch $release ($kind) and the other packages: $sizes"
    # Only builds for CPUs have this version, so nothing else can come, whichever indexes pip asks besides.
    if [ "$kind" = cpu ]; then
        "$python" -m pip install --no-deps --extra-index-url "$TORCH_INDEX" "torch==$release+cpu"
    fi
fi
exec "$python" -m pip install --editable "$checkout[$extra]"
