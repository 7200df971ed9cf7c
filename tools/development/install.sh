#!/bin/sh
# Installs this checkout, editable, with one of its extras; run by the Makefile.
#
# usage: install.sh PYTHON EXTRA
#
# Where there is no NVIDIA GPU, torch for CPUs is installed first, so that gigabytes of CUDA never come unasked. From the
# environment: TORCH_INDEX, a package index with torch for CPUs; TORCH=cpu or TORCH=cuda instead of looking for a GPU.
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

# A question for a person at a terminal; a script goes on.
confirm() {
    [ -t 0 ] || return 0
    printf 'Go on? [y/N] '
    read -r answer
    case $answer in y* | Y*) ;; *) return 1 ;; esac
}

kind=${TORCH:-auto}
if [ "$kind" = auto ]; then
    if has_gpu; then kind=cuda; else kind=cpu; fi
fi
case $kind in
    cpu) sizes="about 0.3 GB are downloaded, 1.2 GB installed" ;;
    cuda) sizes="about 3 GB are downloaded, 5 GB installed" ;;
    *) echo "TORCH is $kind; expected cpu or cuda" >&2; exit 2 ;;
esac

if has_torch; then
    echo "torch $release is installed already; installing the other packages"
else
    echo "installing torch $release ($kind) and the other packages: $sizes"
    if [ "$kind" = cpu ]; then
        # Only builds for CPUs have this version, so nothing else can come, whichever indexes pip asks besides.
        if sees_torch_for_cpus; then
            "$python" -m pip install --no-deps --extra-index-url "$TORCH_INDEX" "torch==$release+cpu"
        else
            echo "no torch for CPUs at $TORCH_INDEX; pip installs the usual one, on x86-64 with CUDA: 3 GB, 5 GB installed"
            confirm || { echo "nothing was installed; set TORCH_INDEX to an index that has it" >&2; exit 1; }
        fi
    fi
fi
exec "$python" -m pip install --editable "$checkout[$extra]"
