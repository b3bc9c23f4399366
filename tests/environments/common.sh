# Read by the other scripts. Makes an environment of its own in $dir, with this project's wheel, that reads the packages
# of the first environment (PY, .venv/bin/python where it is not given): no second torch is installed.
root=$(cd "$(dirname "$0")/../.." && pwd)
py=${PY:-$root/.venv/bin/python}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
packages=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$py" -m venv "$dir/env"
env=$dir/env/bin/python
site=$("$env" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" > "$site/zz_first_environment.pth" # after the environment's own packages
"$py" -m pip wheel --quiet --no-deps --wheel-dir "$dir/dist" "$root"
"$env" -m pip install --quiet --no-deps "$dir"/dist/*.whl

# Runs a test file outside the repository, whose folder `kernels` would be taken for the package of that name.
run_tests() {
    (cd "$dir" && "$env" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -o pythonpath=tests/support "$root/$1")
}
