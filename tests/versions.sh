#!/bin/sh
# Runs the fast tests with other versions than those of .venv: sh tests/versions.sh minimal|newest [PYTEST ARGUMENTS]
# The environment is .cache/minimal or .cache/newest, several GB of which are torch's CUDA packages; delete it afterwards.
set -eu
kind=${1:?give minimal or newest}
shift
python=${PYTHON:-python3}
dir=.cache/$kind
py=$dir/bin/python
test -x "$py" || "$python" -m venv "$dir"
"$py" -m pip install --quiet --upgrade pip setuptools # a venv of Python 3.11 begins with those of its release
case $kind in
  minimal)
    "$python" tests/support/lowest.py > "$dir/lowest.txt"
    cat "$dir/lowest.txt"
    # torchcodec fits one version of torch only, the newest; torch 2.5 cannot compile the loss without graph
    # breaks; warnings come from old versions that meet newer packages.
    "$py" -m pip install --quiet --constraint "$dir/lowest.txt" --editable '.[test]'
    "$py" -m pip uninstall --quiet --yes torchcodec
    set -- -W default -k 'not torchcodec and not compile' "$@"
    ;;
  newest) "$py" -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]' ;;
  *) echo "expected minimal or newest: got $kind" >&2; exit 2 ;;
esac
"$py" -m pip list 2> /dev/null | grep -iE "^(torch|torchvision|kornia|numpy|pillow|timm|lightly|matplotlib|lightning) "
"$py" -m pytest -n auto --dist loadscope -m "not slow and not distributed" "$@"
