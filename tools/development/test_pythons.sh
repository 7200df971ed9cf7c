#!/bin/sh
# Runs the tests under other versions of Python, each in an environment .venv-VERSION; run by the Makefile.
#
# usage: test_pythons.sh VERSION ...
#
# Interpreters are looked for on PATH, in pyenv and in uv. From the environment: PYTEST_ARGS, the arguments of pytest.
set -eu
cd "$(dirname "$0")/../.."

# The path of an interpreter that runs and can make environments; nothing where there is none.
interpreter() {
    for each in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python"$1" "$(uv python find "$1" 2>/dev/null || true)"; do
        # A shim of pyenv may stand for no interpreter.
        if [ "$("$each" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
            echo "$each"
            return
        fi
    done
}

status=0 tested="" missing=""
for version in "$@"; do
    python=$(interpreter "$version")
    if [ -z "$python" ]; then
        missing="$missing $version"
        continue
    fi
    echo "== Python $version: $python"
    [ -x ".venv-$version/bin/pip" ] || "$python" -m venv ".venv-$version"
    # Of this setup.py, whole: an interrupted installation is done again.
    if ! cmp -s setup.py ".venv-$version/.setup.py"; then
        tools/development/install.sh ".venv-$version/bin/python" test
        cp setup.py ".venv-$version/.setup.py"
    fi
    # Unquoted, since it is a list of arguments.
    # shellcheck disable=SC2086
    if OMP_NUM_THREADS=1 ".venv-$version/bin/python" -m pytest ${PYTEST_ARGS:--n 2 --dist loadfile}; then
        tested="$tested $version: passed."
    else
        tested="$tested $version: failed."
        status=1
    fi
done
echo "tested:${tested:- nothing}"
[ -z "$missing" ] || echo "no interpreter (with venv) for:$missing; not tested"
exit $status
