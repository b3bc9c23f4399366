#!/bin/sh
# The recipe for Hugging Face, run with transformers and datasets from PyPI: sh tests/environments/huggingface.sh
set -eu
. "$(dirname "$0")/common.sh"
"$env" -m pip install --quiet "transformers>=5" "datasets>=4"
"$env" -m pip list 2>/dev/null | grep -E "^(torch|transformers|datasets|accelerate|pyarrow) "
run_tests tests/pipelines/test_huggingface.py
