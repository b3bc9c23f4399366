#!/bin/sh
# The recipe for solo-learn, run with its source: sh tests/environments/solo_learn.sh FOLDER
# FOLDER is a checkout of https://github.com/vturrisi/solo-learn (tested at 9187ea3, version 1.0.6). It is read from there,
# not installed: its requirements name lightning 2.1.2, which is older than torch 2.14 takes.
set -eu
source=$(cd "${1:?give the folder of the source of solo-learn}" && pwd)
. "$(dirname "$0")/common.sh"
"$env" -m pip install --quiet hydra-core einops scipy scikit-learn lightning timm
"$env" -m pip list 2>/dev/null | grep -E "^(torch|lightning|timm|torchmetrics) "
echo "$source" > "$site/zz_solo_learn.pth"
run_tests tests/pipelines/test_solo_learn.py
