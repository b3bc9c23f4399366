#!/bin/sh
# Type-checks a user's script against the wheel that tests/wheel.sh installed: usage: typing.sh PYTHON FIRST_PYTHON
# PYTHON sees the wheel and not the repository; FIRST_PYTHON has mypy and pyright.
set -eu
python=$1; first=$2
here=$(cd "$(dirname "$0")/typing" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cp "$here/user.py" "$here/mistakes.py" "$dir"
cd "$dir"
"$first" -m mypy --strict --python-executable "$python" user.py
"$first" -m pyright --pythonpath "$python" user.py
for checker in mypy pyright; do
  case $checker in
    mypy) "$first" -m mypy --strict --python-executable "$python" mistakes.py > found.txt || true ;;
    pyright) "$first" -m pyright --pythonpath "$python" mistakes.py > found.txt || true ;;
  esac
  grep -n '# mistake' mistakes.py | cut -d: -f1 > expected.lines
  grep -oE 'mistakes\.py:[0-9]+' found.txt | cut -d: -f2 | sort -nu > found.lines
  diff expected.lines found.lines || { echo "$checker: expected a mistake on the lines marked <, and on no other:"; cat found.txt; exit 1; }
  echo "$checker: a user's script passes, and each of $(wc -l < expected.lines) mistakes is found"
done
