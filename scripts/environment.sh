# Shared by quickstart.sh and test.sh: the Python environment. Not to be run by itself.
#
# Which one is used: VENV=folder, else the active virtual or conda environment, else .venv at the repository's root.
# PYTHON=program chooses the Python that makes a new one. PIP_ARGS=words go to pip (an index of your choice, say).

REPOSITORY=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# fail MESSAGE: ends the script.
fail() {
    printf '\nerror: %s\n' "$1" >&2
    exit 1
}

# find_python: prints a Python of at least 3.10 that can make virtual environments.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        elif [[ $candidate == "${PYTHON:-}" ]]; then
            fail "PYTHON=$PYTHON is not a Python of version 3.10 or newer ($("$PYTHON" --version 2>&1 || true))"
        fi
    done
    fail "no Python 3.10 or newer was found (python3 is $(python3 --version 2>&1 || echo missing)); install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# use_environment REQUIREMENTS...: sets `python` (the environment's), making the environment and installing what the
# files ask for where that is missing. Takes no second when everything is there.
use_environment() {
    local folder=${VENV:-${VIRTUAL_ENV:-${CONDA_PREFIX:-$REPOSITORY/.venv}}} base free_kib
    if [[ ! -x $folder/bin/python ]]; then
        base=$(find_python)
        free_kib=$(df -Pk "$(dirname "$folder")" 2>/dev/null | awk 'NR == 2 { print $4 }') || true
        # 2 GiB is what the CPU build of PyTorch and the rest take; the CUDA build takes three times as much.
        if [[ ${free_kib:-} =~ ^[0-9]+$ ]] && ((free_kib < 2 * 1024 * 1024)); then
            fail "$(dirname "$folder") has $((free_kib / 1024)) MiB free, and the installation needs at least 2,048 (7,000 with CUDA); make room, or name another place: VENV=/path bash $0"
        fi
        echo "making the virtual environment $folder with $("$base" --version 2>&1)"
        "$base" -m venv "$folder" ||
            fail "$base cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
    fi
    python=$folder/bin/python
    if "$python" "$REPOSITORY/scripts/check_requirements.py" "$@"; then
        return
    fi
    echo "installing into $folder, once. (PyTorch is the largest part. Without a GPU its CPU build is enough and much"
    echo "smaller: get it with the command that pytorch.org/get-started shows, then start this script again.)"
    local requirements
    local -a options=()
    for requirements in "$@"; do
        options+=(-r "$REPOSITORY/$requirements")
    done
    # PIP_ARGS holds words: it must be split.
    # shellcheck disable=SC2086
    "$python" -m pip install ${PIP_ARGS:-} "${options[@]}" -c "$REPOSITORY/constraints.txt" ||
        fail "pip could not install the packages (see above). Without network access, or behind a proxy, tell pip where packages are: PIP_INDEX_URL=… bash $0; on a full disk make room and start again"
    "$python" "$REPOSITORY/scripts/check_requirements.py" "$@" || fail "pip ended without an error, yet packages are missing"
}
