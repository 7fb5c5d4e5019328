#!/usr/bin/env bash
# Runs the tests, two files at a time. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh --thorough          # those too that repeat a proof over methods, seeds and many kills
#   bash scripts/test.sh tests/test_tokenizer.py -x
# Installs what is missing, like quickstart.sh (see scripts/environment.sh). Tests need no network, no GPU, no weights.
# Knobs: VENV, PYTHON, PIP_ARGS, TEST_PROCESSES (2), CHATGLM3_TOKENIZER (a folder with the official tokenizer.model;
# THUDM/chatglm3-6b is found by itself). Without the official tokenizer the tests that compare with it are skipped, and
# say so.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/environment.sh"

use_environment requirements.txt requirements-dev.txt

if [[ ${CHATGLM3_TOKENIZER:-} && $CHATGLM3_TOKENIZER != /* ]]; then
    CHATGLM3_TOKENIZER=$PWD/$CHATGLM3_TOKENIZER
    export CHATGLM3_TOKENIZER
fi
cd "$REPOSITORY"
# The scripts that tests start use this environment too.
export PYTHON=$python PATH=$(dirname "$python"):$PATH
# Each process computes on one core; the programs that tests start do as well.
export OMP_NUM_THREADS=1
choice="not thorough"
if [[ ${1:-} == --thorough ]]; then
    choice="thorough or not thorough"
    shift
fi
exec "$python" -m pytest -m "$choice" -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
