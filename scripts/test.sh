#!/usr/bin/env bash
# Runs every test, the slow ones too. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_tokenizer.py -x
# Installs what is missing, like quickstart.sh (see scripts/environment.sh). Tests need no network, no GPU, no weights.
# Knobs: VENV, PYTHON, PIP_ARGS, CHATGLM3_TOKENIZER (a folder with the official tokenizer.model; THUDM/chatglm3-6b is
# found by itself). Without the official tokenizer the tests that compare with it are skipped, and say so.

set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment requirements.txt requirements-dev.txt

if [[ ${CHATGLM3_TOKENIZER:-} && $CHATGLM3_TOKENIZER != /* ]]; then
    CHATGLM3_TOKENIZER=$PWD/$CHATGLM3_TOKENIZER
    export CHATGLM3_TOKENIZER
fi
cd "$REPOSITORY"
# The scripts that tests start use this environment too.
export PYTHON=$python PATH=$(dirname "$python"):$PATH
exec "$python" -m pytest -m "slow or not slow" "$@"
