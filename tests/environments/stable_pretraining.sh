#!/bin/sh
# The recipe for stable-pretraining, run with the package from PyPI: sh tests/environments/stable_pretraining.sh
set -eu
. "$(dirname "$0")/common.sh"
"$env" -m pip install --quiet "stable-pretraining==0.1.8"
"$env" -m pip list 2>/dev/null | grep -E "^(torch|lightning|stable-pretraining|transformers) "
run_tests tests/pipelines/test_stable_pretraining.py
